"""A hostile image costs no more than its limits, fails alone, and the next one is read."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import imagecodecs
import numpy as np
import psutil
import pytest
from dicom_files import compressed_bytes, dataset_of, deflated, file_bytes, pattern
from fake_session import until
from PIL import Image

from cxr_triton import errors
from cxr_triton.identity import pixels_digest
from cxr_triton.pixels.dicom import read_image
from cxr_triton.pixels.display import render
from cxr_triton.pixels.image import resize, target_size
from cxr_triton.pixels.limits import Limits
from cxr_triton.pixels.sandbox import Sandbox

BUDGET = {"min_pixels": 28 * 28 * 4, "max_pixels": 476 * 476}
GOOD = file_bytes(dataset_of(pattern(12), 12, WindowCenter=2048, WindowWidth=4096))


@pytest.fixture(scope="module", autouse=True)
def decoders():
    """Each test's own: their start and end are tried."""


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def slow() -> bytes:
    """Noise as JPEG 2000, which takes seconds to decode."""
    values = np.random.default_rng(0).integers(0, 65536, (4000, 4000)).astype(np.uint16)
    stream = imagecodecs.jpeg2k_encode(values, codecformat="J2K", reversible=True, level=0)
    return compressed_bytes(values, 16, SYNTAX["jpeg2k"], stream)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def peak_mib(pid: int) -> float:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def require_good(sandbox: Sandbox) -> None:
    assert sandbox.prepare(GOOD, preset="voi_display", **BUDGET).source_size == (45, 67)


@pytest.mark.parametrize("preset", ["mimic_jpg", "voi_display"])
def test_prepared_picture_equals_the_steps_run_here(sandbox, preset):
    prepared = sandbox.prepare(GOOD, preset=preset, **BUDGET)
    picture = render(read_image(GOOD), preset)
    expected = resize(picture.pixels, target_size(45, 67, **BUDGET, factor=28))
    np.testing.assert_array_equal(prepared.pixels, expected)
    assert prepared.facts["preset"] == preset
    assert prepared.facts["flags"] == list(picture.flags)
    assert prepared.decode_ms > 0 and prepared.preprocess_ms > 0
    assert "Secret" not in json.dumps(prepared.facts) and "ID-4711" not in json.dumps(prepared.facts)


def test_values_below_zero_are_taken(sandbox):
    values = pattern(12, signed=True)
    prepared = sandbox.prepare(file_bytes(dataset_of(values, 12)), preset="mimic_jpg", **BUDGET)
    assert prepared.facts["percentiles"][0] < 0 < prepared.facts["percentiles"][1]
    assert prepared.facts["signed"] and prepared.facts["identity"]["pixels_sha256"] == pixels_digest(values)


@pytest.mark.parametrize("shape", [(40, 90, "1", "2"), (90, 40, "2", "1"), (60, 60, "1", "1")])
def test_pixels_that_are_not_square_become_square(sandbox, shape):
    """A disc of the patient stays one, whichever side of the pixels is longer; PNG alike."""
    rows, columns, height, width = shape[0] * 3, shape[1] * 3, int(shape[3]), int(shape[2])
    down, across = (np.arange(rows) - rows / 2 + 0.5) * height, (np.arange(columns) - columns / 2 + 0.5) * width
    disc = np.hypot(down[:, None], across) < 50
    dicom = file_bytes(dataset_of(np.where(disc, 4095, 0).astype(np.uint16), 12, PixelAspectRatio=[height, width]))
    png = io.BytesIO()
    Image.fromarray(np.where(disc, 255, 0).astype(np.uint8)).save(png, "PNG", dpi=(100 * height, 100 * width))
    for data in (dicom, png.getvalue()):
        prepared = sandbox.prepare(data, preset="voi_display", min_pixels=1, max_pixels=10**6, factor=1)
        assert prepared.pixels.shape == (rows * height // min(height, width), columns * width // min(height, width))
        y, x = np.nonzero(prepared.pixels > 128)
        assert abs(np.ptp(y) - np.ptp(x)) <= 2
        assert (prepared.facts["rows"], prepared.facts["columns"]) == prepared.source_size == (rows, columns)
        assert prepared.facts["pixel_aspect_ratio"] == height / width
        assert ("pixels_not_square" in prepared.facts["flags"]) == (height != width)


def test_colour_pictures_keep_three_channels(sandbox):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(out, "PNG")
    prepared = sandbox.prepare(out.getvalue(), preset="mimic_jpg", **BUDGET)
    assert prepared.pixels.ndim == 3 and prepared.facts["preset"] == "as_is"


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", errors.InvalidImage),
        (b"hello", errors.InvalidImage),
        (file_bytes(dataset_of(pattern(12), 12, Modality="CT")), errors.NotARadiograph),
        (file_bytes(dataset_of(pattern(12), 12, NumberOfFrames=3)), errors.MultiFrame),
        (GOOD[:-50], errors.InvalidImage),
    ],
    ids=["empty", "text", "ct", "frames", "truncated"],
)
def test_typed_errors_cross_the_process_border(sandbox, data, error):
    pid = sandbox.pid
    with pytest.raises(error) as caught:
        sandbox.prepare(data, preset="mimic_jpg", **BUDGET)
    assert type(caught.value) is error
    assert sandbox.pid == pid  # an ordinary refusal does not cost a process
    require_good(sandbox)


def black(kind: str, side: int) -> bytes:
    """Codestream of a black square: a few kB that decode to hundreds of MB."""
    values = np.zeros((side, side), np.uint16)
    if kind == "jpeg2k":
        return imagecodecs.jpeg2k_encode(values, codecformat="J2K", reversible=True, level=0)
    return getattr(imagecodecs, f"{kind}_encode")(values)


SYNTAX = {"jpeg2k": "1.2.840.10008.1.2.4.90", "jpegls": "1.2.840.10008.1.2.4.80"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SYNTAX)
@pytest.mark.parametrize("honest", [True, False])
def test_decompression_bombs_are_refused_from_their_headers(sandbox, kind, honest):
    bomb = compressed_bytes(pattern(16), 16, SYNTAX[kind], black(kind, 9000))
    size = struct.pack("<H", 9000)
    if honest:
        for name, value in ((b"\x10\0US\2\0", 45), (b"\x11\0US\2\0", 67)):
            bomb = bomb.replace(name + struct.pack("<H", value), name + size, 1)
    before = peak_mib(sandbox.pid)
    with pytest.raises(errors.LimitExceeded if honest else errors.HeaderMismatch):
        sandbox.prepare(bomb, preset="mimic_jpg", **BUDGET)
    assert peak_mib(sandbox.pid) - before < 20
    require_good(sandbox)


def test_memory_limit_fails_one_image():
    data = compressed_bytes(np.zeros((6000, 6000), np.uint16), 16, SYNTAX["jpeg2k"], black("jpeg2k", 6000))
    with Sandbox(Limits(memory_mib=320)) as sandbox:
        first = sandbox.pid
        with pytest.raises(errors.InvalidImage) as caught:
            sandbox.prepare(data, preset="mimic_jpg", **BUDGET)
        assert caught.value.code in ("LIMIT_EXCEEDED", "INVALID_IMAGE")
        require_good(sandbox)
        assert not alive(first) or sandbox.pid == first


def test_a_header_that_asks_for_too_much_does_not_cost_a_process(sandbox):
    require_good(sandbox)
    pid, rows = sandbox.pid, b"\x28\0\x10\0US\2\0"
    at = GOOD.index(rows) + len(rows)
    columns = at + 2 + len(rows)
    large = GOOD[:at] + b"\xff\xff" + GOOD[at + 2 : columns] + b"\xff\xff" + GOOD[columns + 2 :]
    for _ in range(3):
        with pytest.raises(errors.LimitExceeded, match="65535x65535"):
            sandbox.prepare(large, preset="mimic_jpg", **BUDGET)
    assert sandbox.pid == pid
    require_good(sandbox)


def test_native_memory_limit_is_limit_exceeded():
    values = np.zeros((5000, 5000), np.uint16)
    values[0] = 1
    with Sandbox(Limits(memory_mib=250)) as sandbox:
        first = sandbox.pid
        with pytest.raises(errors.LimitExceeded, match="250 MiB"):
            sandbox.prepare(file_bytes(dataset_of(values, 16)), preset="mimic_jpg", **BUDGET)
        assert sandbox.pid != first and not alive(first)
        require_good(sandbox)


@pytest.mark.slow
def test_time_limit_kills_the_child_and_fails_one_image(slow):
    with Sandbox() as sandbox:
        require_good(sandbox)
        sandbox._child.limits = Limits(time_s=0.6)  # not of the good ones, which take their time on a busy machine
        first, started = sandbox.pid, time.monotonic()
        with pytest.raises(errors.LimitExceeded, match=r"0\.6 s"):
            sandbox.prepare(slow, preset="mimic_jpg", **BUDGET)
        assert time.monotonic() - started < 15
        assert not alive(first)
        require_good(sandbox)


@pytest.mark.slow
def test_child_that_does_not_read_cannot_hang_the_parent():
    with Sandbox() as sandbox:
        require_good(sandbox)
        sandbox._child.limits = Limits(time_s=1.5)
        os.kill(sandbox.pid, signal.SIGSTOP)
        with pytest.raises(errors.LimitExceeded):
            sandbox.prepare(GOOD + b"\0" * 10_000_000, preset="mimic_jpg", **BUDGET)
        require_good(sandbox)


def kill_at_work(pid: int, number: int) -> None:
    """Once it has worked for 0.1 s more."""
    child = psutil.Process(pid)
    before = child.cpu_times().user
    until(lambda: child.cpu_times().user > before + 0.1)
    os.kill(pid, number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGKILL, errors.LimitExceeded), (signal.SIGSEGV, errors.InvalidImage)]
)
def test_killed_in_the_middle_fails_one_image(slow, number, error):
    with Sandbox() as sandbox:
        require_good(sandbox)
        threading.Thread(target=kill_at_work, args=(sandbox.pid, number)).start()
        with pytest.raises(error) as caught:
            sandbox.prepare(slow, preset="mimic_jpg", **BUDGET)
        assert type(caught.value) is error
        require_good(sandbox)


def test_child_that_died_while_idle_is_replaced_without_an_error(sandbox):
    child = sandbox._child.process
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: child.poll() is not None)  # its first thread is gone before the last
    require_good(sandbox)


@pytest.mark.slow
def test_deep_nesting_and_inflation_bombs_do_not_hurt(sandbox):
    level = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    at = GOOD.index(b"\x10\0\x10\0PN")
    nested = GOOD[:at] + level * 200_000 + GOOD[at:]
    bomb = deflated(b"\x09\0\x01\x10OB\0\0" + struct.pack("<I", 100_000_000) + b"\0" * 100_000_000)
    for data in (nested, bomb):
        with pytest.raises(errors.LimitExceeded):
            sandbox.prepare(data, preset="mimic_jpg", **BUDGET)
        require_good(sandbox)


def test_file_size_is_checked_before_sending(sandbox):
    with pytest.raises(errors.LimitExceeded, match="bytes"):
        sandbox.prepare(b"\0" * (64 * 1024**2 + 1), preset="mimic_jpg", **BUDGET)


@pytest.mark.slow
def test_a_large_parent_does_not_make_its_child_look_large():
    """Linux hands the parent's peak memory down to a forked program's `ru_maxrss`."""
    ballast = b"x" * (1200 << 20)
    with Sandbox() as sandbox:
        del ballast
        first = sandbox.pid
        require_good(sandbox)
        assert sandbox.pid == first


def test_recycling_replaces_the_process_and_keeps_working():
    with Sandbox(recycle_after=3) as sandbox:
        pids = []
        for _ in range(7):
            pids.append(sandbox.pid)
            require_good(sandbox)
        assert len(set(pids)) == 3
        assert not any(alive(pid) for pid in set(pids) - {sandbox.pid})


def test_close_leaves_no_process_and_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        sandbox = Sandbox()
        require_good(sandbox)
        pid = sandbox.pid
        sandbox.close()
        assert not alive(pid)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(errors.InternalError, match="closed"):
        sandbox.prepare(GOOD, preset="mimic_jpg", **BUDGET)


def test_child_has_its_limits_and_no_secrets(sandbox, monkeypatch):
    require_good(sandbox)
    limits = Path(f"/proc/{sandbox.pid}/limits").read_text()
    for name, value in (("Max address space", 2048 * 1024**2), ("Max core file size", 0), ("Max file size", 0)):
        assert next(x for x in limits.splitlines() if x.startswith(name)).split()[-3] == str(value)
    monkeypatch.setenv("API_TOKEN", "secret")
    with Sandbox() as other:
        require_good(other)
        assert b"secret" not in Path(f"/proc/{other.pid}/environ").read_bytes()


PARENT = """
    import {modules}
    from cxr_triton.pixels.sandbox import Sandbox
    sandbox = Sandbox()
    {before}
    with open({good!r}, "rb") as file:
        sandbox.prepare(file.read(), preset="mimic_jpg", min_pixels=3136, max_pixels=226576)
    print(sandbox.pid, flush=True)
    {after}
"""


def run_parent(tmp_path: Path, modules: str, before: str = "", after: str = "", **options) -> subprocess.Popen:
    good = tmp_path / "good.dcm"
    good.write_bytes(GOOD)
    script = textwrap.dedent(PARENT).format(modules=modules, before=before, after=after, good=str(good))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, **options)


def test_child_dies_with_its_parent(tmp_path):
    parent = run_parent(tmp_path, "time", after="time.sleep(60)")
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not alive(child))


@pytest.mark.parametrize(
    "executable", ["", "/opt/tritonserver/backends/python/triton_python_backend_stub", "/bin/false"]
)
def test_interpreter_is_found_where_the_host_is_no_python(tmp_path, executable):
    """As inside a Triton python backend: `sys.executable` is empty, the stub, or something that cannot run Python."""
    script = textwrap.dedent(f"""
        import sys
        sys.executable = {executable!r}
        from cxr_triton.pixels.sandbox import Sandbox
        with Sandbox() as sandbox, open({str(tmp_path / "good.dcm")!r}, "rb") as file:
            prepared = sandbox.prepare(file.read(), preset="mimic_jpg", min_pixels=3136, max_pixels=226576)
        print(prepared.source_size)
    """)
    (tmp_path / "good.dcm").write_bytes(GOOD)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "(45, 67)", run.stderr


def test_one_hundred_images_do_not_grow_the_child(sandbox):
    for _ in range(10):
        require_good(sandbox)
    pid, before = sandbox.pid, peak_mib(sandbox.pid)
    for _ in range(100):
        require_good(sandbox)
    assert sandbox.pid == pid
    assert peak_mib(pid) < before * 1.05
