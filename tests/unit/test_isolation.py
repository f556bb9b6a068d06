"""A decoding process that a hostile image took over can do nothing with it, and its answers are checked."""

import ctypes
import io
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable

import imagecodecs
import numpy as np
import pytest
from dicom_files import compressed_bytes, dataset_of, deflated, file_bytes, pattern
from PIL import Image

from cxr_triton import errors
from cxr_triton.phantom_file import LOSSY_BITS, SYNTAXES, encode
from cxr_triton.pixels import isolation, sandbox, sandbox_answer
from cxr_triton.pixels.dicom import read_image
from cxr_triton.pixels.display import render
from cxr_triton.pixels.image import resize, target_size
from cxr_triton.pixels.part10 import read_meta
from cxr_triton.pixels.sandbox import Sandbox

GOOD = file_bytes(dataset_of(pattern(12), 12))
BUDGET = {"min_pixels": 3136, "max_pixels": 226576}
is_locked = pytest.mark.skipif(
    set(sandbox.isolation().values()) != {isolation.ON}, reason="this kernel gives a process less: see doctor"
)


def locked(attempt: str) -> str:
    """What comes of some lines in a process that locked itself: ``done``, or the error's number."""
    script = textwrap.dedent("""
        import ctypes, fcntl, mmap, os, resource, signal, socket, threading
        from cxr_triton.pixels.isolation import lock
        libc = ctypes.CDLL(None, use_errno=True)
        kept = open(TARGET, "r+b")
        def call(*arguments):
            if libc.syscall(*(ctypes.c_long(a) for a in arguments)) < 0:
                raise OSError(ctypes.get_errno(), "refused")
        LOCK
        try:
            ATTEMPT
            print("done", flush=True)
        except OSError as error:
            print("errno", error.errno, flush=True)
    """)
    return script.replace("ATTEMPT", attempt)


@pytest.fixture(scope="module", autouse=True)
def decoders():
    """Each test's own: their start and end are tried."""


ATTEMPTS = {
    "open": "open('/etc/passwd').read()",
    "write a file": "open(TARGET + '.new', 'w')",
    "list": "os.listdir('/')",
    "remove": "os.unlink(TARGET)",
    "truncate": "kept.truncate(0)",
    "connect": "socket.socket().connect(('127.0.0.1', 9))",
    "pair": "socket.socketpair()",
    "fork": "os.fork() or os._exit(0)",
    "program": "os.execv('/bin/true', ['true'])",
    "signal": "os.kill(os.getppid(), 0)",
    "thread signal": "call(234, os.getppid(), os.getppid(), 0)",
    "trace": "call(101, 16, os.getppid(), 0, 0)",
    "memory of another": "call(310, os.getppid(), 0, 0, 0, 0, 0)",
    "limits of another": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
    "executable memory": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "namespace": "call(272, 0x10000000)",
    "kernel ring": "call(425, 1, 0)",
    "terminal input": "fcntl.ioctl(0, 0x5412, b'x')",
}


@is_locked
@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
def test_what_an_attacker_wants_is_refused(tmp_path, attempt):
    """And only by the lock: the same lines without it are not refused by this error."""
    if "call(" in attempt and isolation.platform.machine() != "x86_64":
        pytest.skip("numbers of x86-64")
    target = tmp_path / "target"
    target.write_bytes(b"kept")
    script = locked(attempt).replace("TARGET", repr(str(target)))
    # another process of this user above it, which may be signalled and read
    shell = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, script.replace("LOCK", "lock()")]
    run = subprocess.run(shell, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip().startswith("errno 1"), run.stdout + run.stderr
    assert target.read_bytes() == b"kept" and not (tmp_path / "target.new").exists()


@is_locked
def test_what_a_decoder_needs_is_left():
    script = locked("[threading.Thread(target=print).start(), bytes(1 << 26), os.getpid()]").replace(
        "TARGET", "'/dev/null'"
    )
    run = subprocess.run(
        [sys.executable, "-c", script.replace("LOCK", "print(set(lock().values()))")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.stdout.split() == ["{'on'}", "done"], run.stdout + run.stderr


@is_locked
def test_each_layer_refuses_alone(tmp_path):
    """Files stay closed where the kernel has Landlock and no seccomp."""
    for step, attempt in (("_give_up_files", "open('/etc/passwd')"), ("_give_up_calls", "open('/etc/passwd')")):
        script = locked(attempt).replace("TARGET", "'/dev/null'")
        lock = f"from cxr_triton.pixels import isolation; isolation._give_up_privileges(); isolation.{step}()"
        run = subprocess.run([sys.executable, "-c", script.replace("LOCK", lock)], capture_output=True, text=True)
        assert run.stdout.strip() in ("errno 1", "errno 13"), run.stderr


def test_less_isolation_is_said_once_and_reported(monkeypatch, caplog):
    """The child of another kernel says what it lacks; decoding goes on."""
    state = {"no_new_privileges": "on", "landlock": "off: Function not implemented", "seccomp": "on"}
    parsed = sandbox_answer.parsed

    def without_landlock(text):
        answer = parsed(text)
        return answer | {"isolation": state} if "python" in answer else answer

    monkeypatch.setattr(sandbox_answer, "parsed", without_landlock)
    monkeypatch.setattr(sandbox, "_said", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert sandbox.isolation() == state
    assert [record.getMessage().count("landlock is off") for record in caplog.records] == [1]


def test_lock_says_why_a_layer_is_missing(monkeypatch):
    monkeypatch.setattr(isolation, "_call", lambda *_: isolation._require(-1))
    monkeypatch.setattr(isolation, "_give_up_privileges", lambda: None)
    ctypes.set_errno(38)
    assert isolation.lock()["landlock"] == "off: Function not implemented"
    monkeypatch.setattr(isolation.platform, "machine", lambda: "riscv64")
    assert isolation.lock()["seccomp"] == "off: no list of system calls for riscv64"


def filtered(machine: str, number: int, *arguments: int) -> int:
    """Run the filter, as the kernel would, on one system call: the action."""
    column = list(isolation._ARCHITECTURES).index(machine)
    steps = isolation._filter(isolation._ARCHITECTURES[machine], column, 77)
    words = {0: number, 4: isolation._ARCHITECTURES[machine]} | {16 + 8 * i: a for i, a in enumerate(arguments)}
    at, value = 0, 0
    while True:
        code, yes, no, operand = steps[at]
        at += 1
        if code == isolation._RETURN:
            return operand
        if code == isolation._LOAD:
            value = words.get(operand, 0)
        else:
            at += yes if (value == operand if code == isolation._EQUAL else value & operand) else no


@pytest.mark.parametrize(
    ("machine", "openat", "mmap", "clone", "tgkill"),
    [("x86_64", 257, 9, 56, 234), ("aarch64", 56, 222, 220, 131)],
)
def test_the_filter_of_each_architecture(machine, openat, mmap, clone, tgkill):
    allow, refuse = isolation._ALLOW, isolation._ERRNO | 1
    assert filtered(machine, openat) == refuse
    assert filtered(machine, mmap, 0, 4096, 3) == allow and filtered(machine, mmap, 0, 4096, 7) == refuse
    assert filtered(machine, clone, 0x3D0F00) == allow and filtered(machine, clone, 17) == refuse
    assert filtered(machine, 435) == isolation._ERRNO | 38
    assert filtered(machine, tgkill, 77, 77, 6) == allow and filtered(machine, tgkill, 1, 1, 9) == refuse


@pytest.fixture(scope="module")
def answer() -> dict:
    """A true answer, as it comes from the child."""
    kept = []
    require = sandbox_answer.require_outcome
    with pytest.MonkeyPatch.context() as patch, Sandbox() as box:
        patch.setattr(sandbox_answer, "require_outcome", lambda given: (kept.append(given), require(given)))
        box.prepare(GOOD, preset="mimic_jpg", **BUDGET)
    return kept[0]


LIES = {
    "shape of more": lambda a: a | {"shape": [1 << 20, 1 << 20]},
    "shape below zero": lambda a: a | {"shape": [-1, -a["shape"][0] * a["shape"][1]]},
    "shape of four": lambda a: a | {"shape": [*a["shape"], 1, 1]},
    "no recycle": lambda a: {k: v for k, v in a.items() if k != "recycle"},
    "unknown error": lambda a: {"error": "rm", "message": "", "recycle": False},
    "text for a list": lambda a: a | {"source_size": "12"},
    "another fact": lambda a: a | {"facts": a["facts"] | {"html": "<script>"}},
    "long text": lambda a: a | {"facts": a["facts"] | {"view": "x" * 5000}},
    "truth for a number": lambda a: a | {"facts": a["facts"] | {"rows": True}},
    "nested identity": lambda a: a | {"facts": a["facts"] | {"identity": {"file_sha256": ["x"]}}},
    "more keys": lambda a: a | {"also": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_an_answer_that_makes_no_sense_fails_one_image(monkeypatch, answer, lie):
    parsed, lies = sandbox_answer.parsed, [True]

    def lied(text):
        told = parsed(text)
        return lie(told) if "facts" in told and lies.pop() else told

    with Sandbox() as box:
        first = box.pid
        monkeypatch.setattr(sandbox_answer, "parsed", lied)
        with pytest.raises(errors.InvalidImage, match="makes no sense"):
            box.prepare(GOOD, preset="mimic_jpg", **BUDGET)
        monkeypatch.setattr(sandbox_answer, "parsed", parsed)
        assert box.prepare(GOOD, preset="mimic_jpg", **BUDGET).source_size == (45, 67)
        assert box.pid != first


@pytest.mark.parametrize("text", [b"[" * 60_000, b"nonsense", b"[1]", b'{"a": NaN}', b"\xff"])
def test_json_of_another_form_is_malformed(text):
    with pytest.raises(sandbox_answer.Malformed):
        sandbox_answer.parsed(text)


@pytest.mark.parametrize("sizes", [(1 << 31, 0), (10, 1 << 31)])
def test_sizes_that_a_child_claims_are_not_allocated(monkeypatch, sizes):
    with Sandbox() as box:
        box.prepare(GOOD, preset="mimic_jpg", **BUDGET)
        read = box._child._read
        asked = []

        def claimed(size, deadline):
            asked.append(size)
            return sandbox.HEAD.pack(*sizes) if size == sandbox.HEAD.size else read(size, deadline)

        monkeypatch.setattr(box._child, "_read", claimed)
        with pytest.raises(errors.InvalidImage, match="makes no sense"):
            box.prepare(GOOD, preset="mimic_jpg", **BUDGET)
        assert max(asked) == sandbox.HEAD.size


def identity(**changes) -> dict:
    uids = dict.fromkeys(sandbox_answer._UIDS, "1.2.3")
    texts = {"modality": "DX", "view": "PA", "patient_id": "1", "taken": ""}
    found = {**uids, **texts, "number": 1, "offset": 300, "is_radiograph": True} | changes
    return {"identity": found, "recycle": False}


@pytest.mark.parametrize(
    "changes",
    [{"offset": 5000}, {"offset": -1}, {"study": "../x"}, {"number": "1"}, {"more": 1}, {"patient_id": "x" * 3000}],
)
def test_an_identity_of_another_form_is_malformed(changes):
    assert sandbox_answer.identity(identity(), 1000).offset == 300
    with pytest.raises(sandbox_answer.Malformed):
        sandbox_answer.identity(identity(**changes), 1000)


def codecs() -> dict[str, bytes]:
    """A file of every kind that is read."""
    files = {"implicit": GOOD, "deflated": deflated(GOOD[read_meta(GOOD, 132)[1] :])}
    for name, uid in SYNTAXES.items():
        if name not in ("implicit", "explicit", "deflated", "rle"):
            bits = LOSSY_BITS.get(name, 12)
            values = pattern(bits, rows=64, columns=96)
            files[name] = compressed_bytes(values, bits, str(uid), encode(values, bits, name))
    octets = pattern(8, rows=64, columns=96)
    runs = b"".join(b"\x5f" + row.tobytes() for row in octets)
    rle = np.array([1, 64, *[0] * 14], "<u4").tobytes() + runs
    files["rle"] = compressed_bytes(octets, 8, str(SYNTAXES["rle"]), rle)
    colour = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, options in {"jpeg": {"exif": turned}, "progressive": {"progressive": True}, "png": {}}.items():
        out = io.BytesIO()
        Image.fromarray(colour).save(out, "PNG" if name == "png" else "JPEG", **options)
        files[name] = out.getvalue()
    files["png16"] = imagecodecs.png_encode(pattern(16))
    return files


CODECS = codecs()


def outcome(step: Callable[[], object]) -> str:
    try:
        step()
    except errors.CxrError as error:
        return error.code
    except Exception:  # as the child calls what a library raises
        return errors.InvalidImage.code
    return "read"


@pytest.mark.parametrize("preset", ["mimic_jpg", "voi_display"])
def test_every_codec_and_preset_works_under_the_lock(preset):
    with Sandbox() as box:
        for name, data in CODECS.items():
            prepared = box.prepare(data, preset=preset, not_a_chest="flag", **BUDGET)
            picture = render(read_image(data), preset)
            expected = resize(picture.pixels, target_size(*picture.pixels.shape[:2], **BUDGET, factor=28))
            np.testing.assert_array_equal(prepared.pixels, expected, err_msg=name)
            for part in (data[: len(data) * 2 // 3], data[:200], data[:-300] + bytes(300)):
                assert outcome(lambda: box.prepare(part, preset=preset, **BUDGET)) == outcome(  # noqa: B023
                    lambda: render(read_image(part), preset)  # noqa: B023
                ), name
