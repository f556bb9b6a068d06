"""The served ensemble on a real Triton over gRPC: endurance, cancellation, hostile input, crashes, clean end."""

import concurrent.futures
import io
import itertools
import json
import os
import signal
import statistics
import struct
import subprocess
import sys
import threading
import time
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from collector import Collector
from served import Raw, outputs, radiograph

from cxr_triton.engines.secret import Seal

pytestmark = pytest.mark.triton
SHORT = {"max_new_tokens": 12, "temperature": 2.0, "seed": 7}  # random weights say one word for ever when greedy
LONG = {"max_new_tokens": 3500}


def resident_mib(server) -> float:
    return sum(psutil.Process(pid).memory_info().rss for pid in server.pids) / 2**20


def until(holds, timeout_s: float = 60.0) -> bool:
    """Wait for a condition; whether it came true."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_deltas_add_up_to_the_text(raw):
    reading = raw.read([radiograph(1)], max_new_tokens=500)
    assert "".join(reading["deltas"]) == reading["text"]
    assert reading["usage"]["completion_tokens"] == 500
    assert len(reading["deltas"]) > 10


def test_endurance(raw, record_property):
    """200 readings in a row and 16 at a time: no error, and memory that stays."""
    files = [radiograph(seed) for seed in range(4)]

    def crowd(count):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda i: raw.read([files[i % 4]], **SHORT), range(count)))

    for i in range(40):
        raw.read([files[i % 4]], **SHORT)
    crowd(16)
    before = resident_mib(raw.server)
    alone = [raw.read([files[i % 4]], **SHORT) for i in range(200)]
    together = crowd(16)
    growth = resident_mib(raw.server) / before - 1
    record_property("resident_mib", round(before))
    record_property("resident_growth_percent", round(100 * growth, 2))
    print(f"resident {before:.0f} MiB, growth {100 * growth:+.2f} % over 216 readings")
    assert growth <= 0.05
    for i, reading in enumerate(alone + together):
        assert reading["text"] == alone[i % 4]["text"], "a reading depends on what else runs"


def test_cancelling_frees_the_slot_within_two_steps(raw, record_property):
    """Clients that hang up after the first text: every slot is free again, no later than two steps after the stop."""
    cancelled, steps = raw.metric("cxr_decoder_cancelled_total"), raw.metric("cxr_decoder_steps_after_cancel_total")
    waits_ms = []
    for _ in range(3):
        calls = [raw.call([radiograph(seed)], **LONG) for seed in range(4)]
        for call in calls:
            next(call)
        assert raw.metric("cxr_decoder_streams") == 4
        started = time.monotonic()
        for call in calls:
            call.cancel()
        assert until(lambda: raw.metric("cxr_decoder_streams") == 0)
        waits_ms.append(1e3 * (time.monotonic() - started))
    cancelled = raw.metric("cxr_decoder_cancelled_total") - cancelled
    steps = raw.metric("cxr_decoder_steps_after_cancel_total") - steps
    record_property("steps_after_cancel_mean", steps / cancelled)
    record_property("cancel_ms", [round(wait) for wait in waits_ms])
    print(f"{cancelled:.0f} cancelled, {steps / cancelled:.2f} steps each until the slot was free; {waits_ms} ms")
    assert cancelled == 12
    assert steps <= 2 * cancelled


def test_cancelling_a_request_that_waits_takes_it_out_of_the_queue(raw):
    calls = [raw.call([radiograph(seed)], **LONG) for seed in range(4)]
    for call in calls:
        next(call)
    waiting = raw.call([radiograph(9)], **LONG)
    assert until(lambda: raw.metric("cxr_decoder_streams") == 5)
    next(waiting)  # a heartbeat
    waiting.cancel()
    for call in calls:
        call.cancel()
    assert until(lambda: raw.metric("cxr_decoder_streams") == 0)
    assert raw.read([radiograph(9)], **SHORT)["usage"]["completion_tokens"] == 12


def test_the_decoder_alone_streams_stops_and_refuses(raw):
    """A caller of its own, without the ensemble around it: seen when it hangs up, refused with a code."""
    prompt = {
        "INPUT_IDS": np.arange(40, 50),
        "IMAGE_INDEX": np.full(10, -1),
        "POSITION_IDS": np.tile(np.arange(10), (3, 1)),
    }
    beside = {"IMAGE_EMBEDDINGS": np.zeros((1, 64, 128), np.float32)}
    seal = Seal("CONTEXT", raw.server.secret)

    def sealed(context, **changed):
        asked = {**prompt, **changed}
        return {**asked, **beside, "CONTEXT": seal.close(context, *asked.values()).encode()}

    tensors, call = sealed('{"sampling": {"max_new_tokens": 3500}, "scoring": null}'), partial(raw.infer, "decoder")
    cancelled = raw.metric("cxr_decoder_cancelled_total")
    stream = call(**tensors)
    assert not next(stream).error_message
    stream.cancel()
    assert until(lambda: raw.metric("cxr_decoder_streams") == 0)
    assert raw.metric("cxr_decoder_cancelled_total") == cancelled + 1
    for wrong, hint in (
        (tensors, b"CONTEXT was used before"),
        ({**tensors, "IMAGE_INDEX": np.full(10, 0)}, b"CONTEXT and what belongs to it"),
        ({**tensors, "CONTEXT": b'{"sampling": {"max_new_tokens": 5}}'}, b"CONTEXT and what belongs to it"),
        (sealed("{}", IMAGE_INDEX=np.full(10, 64)), b"CONTEXT"),
        (
            sealed('{"sampling": {"max_new_tokens": 5}, "scoring": null}', IMAGE_INDEX=np.full(10, 64)),
            b"must stay within -1 and 63",
        ),
        (sealed("{}"), b"CONTEXT"),
        (sealed('{"sampling": {"max_new_tokens": 5, "stop": [1]}, "scoring": null}'), b"stop is [1]"),
        ({**tensors, "CONTEXT": b"\xff"}, b"CONTEXT: not UTF-8"),
        ({"STOP": b"\xff"}, b"STOP: not UTF-8"),
        ({"INPUT_IDS": tensors["INPUT_IDS"]}, b"POSITION_IDS"),
        ({"STOP": b"no such stream"}, None),
    ):
        contents = [content for message in call(**wrong) for content in message.infer_response.raw_output_contents]
        assert not contents if hint is None else any(b"[INVALID_REQUEST]" in c and hint in c for c in contents)


def test_a_photometric_twin_gives_the_same_reading(raw):
    bright, dark = (raw.read([radiograph(5, photometric=f"MONOCHROME{i}")], **SHORT) for i in (2, 1))
    assert [r["images"][0]["photometric"] for r in (bright, dark)] == ["MONOCHROME2", "MONOCHROME1"]
    assert bright["text"] == dark["text"]
    assert raw.read([radiograph(6)], **SHORT)["text"] != bright["text"], "the text does not depend on the picture"


def test_text_only_and_two_images(raw):
    text_only = raw.read(task="quiz", **SHORT)
    assert text_only["images"] == [] and text_only["usage"]["image_tokens"] == 0
    pair = [radiograph(1), radiograph(2, rows=160, columns=300)]
    forth, back = (raw.read(images, task="compare", **SHORT) for images in (pair, pair[::-1]))
    assert [image["rows"] for image in forth["images"]] == [240, 160]
    assert forth["usage"]["image_tokens"] == back["usage"]["image_tokens"] > 0
    assert forth["text"] != back["text"], "the order of the images is lost"


def test_stages_account_for_the_whole_time(raw, record_property):
    """Every stage is timed, and what Triton and gRPC add is known."""
    raw.read([radiograph(0)], **SHORT)
    added, first, stages = [], [], []
    files = [radiograph(seed, rows=1200, columns=1000) for seed in range(10)]
    for file in files:
        started = time.monotonic()
        call = raw.call([file], max_new_tokens=64)
        heard = []
        for message in call:
            heard.append(time.monotonic())
            _, reading = outputs(message)
        timings_ms = json.loads(reading)["timings_ms"]
        names = ("image_decode", "preprocess", "vision", "queue", "prefill", "decode", "report")
        assert all(timings_ms[name] >= 0 for name in names)
        assert sum(timings_ms[name] for name in names) == pytest.approx(timings_ms["total"], abs=1)
        added.append(1e3 * (heard[-1] - started) - timings_ms["total"])
        first.append(1e3 * (heard[0] - started))
        stages.append({name: timings_ms[name] for name in names})
    medians = {name: round(statistics.median(stage[name] for stage in stages), 1) for name in stages[0]}
    record_property("stages_ms", medians)
    record_property("first_delta_ms", round(statistics.median(first), 1))
    record_property("outside_ms", round(statistics.median(added), 1))
    print(f"median ms: {medians}, first delta {statistics.median(first):.1f}, outside {statistics.median(added):.1f}")


# ------------------------------------------------------------------------------------------------------- bad requests

GOOD = radiograph(3)


def patched(tag: int, value: bytes) -> bytes:
    """GOOD with another value of a US element."""
    element = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + b"US\2\0"
    at = GOOD.index(element) + len(element)
    return GOOD[:at] + value + GOOD[at + len(value) :]


def deflated_bomb() -> bytes:
    """400 MB of zeros in a private element, 400 kB on the wire."""
    import pydicom

    at = GOOD.index(b"\x08\0\x16\0UI")
    file = pydicom.dcmread(io.BytesIO(GOOD))
    file.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    head = io.BytesIO()
    pydicom.dcmwrite(head, file, enforce_file_format=True)
    header = head.getvalue()[: 144 + struct.unpack_from("<I", head.getvalue(), 140)[0]]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(4_000_000)
    body = [deflate.compress(GOOD[at:-96012]), deflate.compress(struct.pack("<HH2sHI", 9, 0x1010, b"OB", 0, 4 * 10**8))]
    body += [deflate.compress(zeros) for _ in range(100)]
    return header + b"".join(body) + deflate.flush()


def png_bomb() -> bytes:
    """A PNG of 30000 x 30000 pixels in a few hundred kB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**7)))
        + chunk(b"IEND", b"")
    )


def lying_codestream() -> bytes:
    """A JPEG 2000 picture of 6000 x 6000 pixels behind a header that says 240 x 200."""
    import imagecodecs
    import pydicom

    file = pydicom.dcmread(io.BytesIO(GOOD))
    file.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    codestream = imagecodecs.jpeg2k_encode(np.zeros((6000, 6000), np.uint16), level=0, codecformat="j2k")
    file.PixelData = pydicom.encaps.encapsulate([codestream])
    file["PixelData"].VR = "OB"
    out = io.BytesIO()
    pydicom.dcmwrite(out, file, enforce_file_format=True)
    return out.getvalue()


def nested() -> bytes:
    """Sequences in sequences, 20,000 deep."""
    pixels = GOOD.index(b"\xe0\x7f\x10\0OW")
    open_item = struct.pack("<HH2sHIHHI", 9, 0x1010, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    return GOOD[:pixels] + open_item * 20_000 + GOOD[pixels:]


BAD = {
    "unknown key": ({"max_new_token": 3}, None, "INVALID_REQUEST", "max_new_tokens"),
    "unknown task": ({"task": "finding"}, None, "INVALID_REQUEST", "findings"),
    "two images for one": ({}, [GOOD, GOOD], "INVALID_REQUEST", "2"),
    "no image": ({}, [], "INVALID_REQUEST", "0"),
    "too long": ({"prompt": "why " * 4000}, None, "PROMPT_TOO_LONG", "4095"),
    "no image file": ({}, [b"GIF89a" + bytes(100)], "INVALID_IMAGE", ""),
    "empty": ({}, [b""], "INVALID_IMAGE", ""),
    "truncated": ({}, [GOOD[:-5000]], "INVALID_IMAGE", ""),
    "second of two": ({"task": "compare"}, [GOOD, GOOD[:200]], "INVALID_IMAGE", "IMAGES[1]"),
    "rows lie": ({}, [patched(0x00280010, b"\xff\xff")], ("INVALID_IMAGE", "LIMIT_EXCEEDED", "HEADER_MISMATCH"), ""),
    "executable": ({}, [b"\x7fELF" + GOOD[4:]], "INVALID_IMAGE", ""),
    "nested": ({}, [nested()], "LIMIT_EXCEEDED", ""),
    "png bomb": ({}, [png_bomb()], "LIMIT_EXCEEDED", ""),
    "deflated bomb": ({}, [deflated_bomb()], "LIMIT_EXCEEDED", ""),
    "lying codestream": ({}, [lying_codestream()], "HEADER_MISMATCH", ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_fail_typed_and_the_next_one_succeeds(raw, name):
    asked, images, codes, hint = BAD[name]
    with pytest.raises(RuntimeError) as caught:
        raw.read([GOOD] if images is None else images, **asked)
    text = str(caught.value)
    code = text.partition("[")[2].partition("]")[0]
    assert code in ((codes,) if isinstance(codes, str) else codes)
    assert hint in text
    assert not any(secret in text for secret in ("/tmp", "Traceback", ".py", "/dev/shm", str(Path(sys.prefix))))
    assert raw.read([GOOD], **SHORT)["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(
    "content",
    [struct.pack("<I", 10**9) + b"x", struct.pack("<I", 2) + b"xxxx", b"xx", b"", struct.pack("<I", 0xFFFFFFFF)],
    ids=["longer", "shorter", "no length", "empty", "4 GiB"],
)
def test_broken_bytes_tensors_are_refused(raw, content):
    with pytest.raises(RuntimeError, match=r"string|element"):
        raw.read([GOOD], raw_images=content)
    assert raw.read([GOOD], **SHORT)["usage"]["completion_tokens"] == 12


def test_a_killed_decoding_process_fails_one_request(raw):
    children = [p for p in map(psutil.Process, raw.server.pids) if "cxr_triton.pixels.sandbox_child" in p.cmdline()]
    assert len(children) == 2
    for child in children:
        child.suspend()
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(_outcome(raw)))
    thread.start()
    time.sleep(2)  # until one of them has it, which nothing tells
    for child in children:
        child.kill()
    thread.join(60)
    assert "LIMIT_EXCEEDED" in outcome[0]
    assert [_outcome(raw) for _ in range(4)] == ["ok"] * 4


def _outcome(raw) -> str:
    try:
        raw.read([GOOD], **SHORT)
        return "ok"
    except RuntimeError as error:
        return str(error)


# --------------------------------------------------------------------------------------------------- life of a server


@pytest.fixture
def small_server(served_bundle, tmp_path):
    """A server of one slot and a queue of two that a test may break."""
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    settings = Settings(slots=1, queue_size=2, threads=1)
    write_repository(served_bundle, tmp_path / "repository", settings, unverified=True)
    server = Server(tmp_path / "repository", grpc_port=0, metrics_port=0)
    with server:
        yield server
    assert not leftovers(server)


def leftovers(server) -> list:
    return [*server.pids, *Path("/dev/shm").glob(f"{server.shm_prefix}*")]


def test_full_queues_and_a_dead_model(small_server):
    from cxr_triton.client.wire import server_error
    from cxr_triton.errors import QueueFull, Unavailable

    raw = Raw(small_server)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(lambda _: _outcome(raw), range(16)))
    errors = [server_error(outcome) for outcome in outcomes if outcome != "ok"]
    assert outcomes.count("ok") >= 3
    assert errors and all(isinstance(error, QueueFull) for error in errors)

    model = next(p for p in map(psutil.Process, small_server.pids) if "/report/1/model.py" in " ".join(p.cmdline()))
    model.kill()
    assert until(lambda: not model.is_running() or model.status() == psutil.STATUS_ZOMBIE)
    with pytest.raises(Unavailable, match="model report died"):
        small_server.check()
    assert _outcome(raw) != "ok"


def test_a_server_is_renewed_at_its_addresses(small_server):
    from cxr_triton.client import Reader, Timeouts
    from cxr_triton.triton_repo.drain import under_way
    from cxr_triton.triton_repo.renew import Renewal

    pid, models = small_server.pid, set(small_server.pids)
    with Reader(small_server.grpc, timeouts=Timeouts(connect_s=60)) as reader:
        text = reader.read(GOOD, **SHORT).result().text
        assert until(lambda: under_way(small_server.metrics) == 0)
        next(stream := reader.read(GOOD, **LONG))
        assert under_way(small_server.metrics) > 0
        stream.close()
        Renewal(small_server).renew()
        assert small_server.pid != pid and not models & set(small_server.pids)
        assert reader.read(GOOD, **SHORT).result().text == text
    assert small_server.log.with_name(small_server.log.name + ".1").exists()
    small_server.check()


def test_a_killed_server_leaves_nothing(small_server):
    assert leftovers(small_server)
    os.kill(small_server.pid, signal.SIGKILL)
    small_server.stop()
    assert not leftovers(small_server)


def runs(pid: int) -> bool:
    """The process exists and is no zombie that waits for init."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_repository_that_was_served_can_be_served_again(small_server):
    """Python puts bytecode beside the models."""
    from cxr_triton.triton_repo.integrity import require_as_packaged

    assert _outcome(Raw(small_server)) == "ok"
    require_as_packaged(small_server.repository)


def test_own_edits_are_served_when_asked(served_bundle, tmp_path):
    from cxr_triton.triton_repo.package import Settings, write_repository

    write_repository(served_bundle, tmp_path / "repository", Settings(threads=1), unverified=True)
    with open(tmp_path / "repository/report/1/model.py", "a") as file:
        file.write("# mine\n")
    ports = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
    command = [Path(sys.executable).with_name("cxr-triton"), "serve", "repository", *ports]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "report/1/model.py was changed" in refused.stderr
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--modified"], cwd=tmp_path, **pipes) as process:
        try:
            assert process.stdout.readline().startswith("ready: gRPC 127.0.0.1:")
            process.send_signal(signal.SIGTERM)
            assert "modified: report/1/model.py was changed" in process.communicate(timeout=60)[1]
        finally:
            process.kill()


def require_spans_of_triton(url: str, collector: Collector) -> None:
    """Of every model, by the request's id; and in its trace, which Triton 2.51 now and then fails to see."""
    from cxr_triton.client import Reader
    from cxr_triton.trace import trace_id_of

    def told() -> list:
        named = [(span, trace_id_of(span.attributes.get("triton.request_id"))) for span in collector.spans()]
        return [(span, trace_id) for span, trace_id in named if trace_id in ids]

    with Reader(url) as reader:
        ids = {reader.read(GOOD, **SHORT).result().trace_id for _ in range(4)}
    models = {"cxr_reader", "dicom_preprocess", "vision_encoder", "decoder", "report"}
    assert until(lambda: {(span.name, trace_id) for span, trace_id in told()} >= set(itertools.product(models, ids)))
    assert any(span.trace_id == trace_id for span, trace_id in told())
    assert {span.service for span, _ in told()} == {"cxr-triton-server"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["asked", "killed"])
def test_serve_leaves_nothing_when_it_ends(served_bundle, tmp_path, number):
    """Even when the command itself is killed in the middle of a reading; until then Triton's spans come too."""
    from cxr_triton.triton_repo.package import Settings, write_repository

    settings = Settings(preprocess_instances=1, slots=1, threads=1)
    write_repository(served_bundle, tmp_path / "repository", settings, unverified=True)
    ports = ("--grpc-port", "0", "--metrics-port", "0", "--drain-seconds", "1")
    command = [Path(sys.executable).with_name("cxr-triton"), "serve", "repository", *ports, "--json", "ready.json"]
    segments = set(Path("/dev/shm").iterdir())
    with (
        Collector() as collector,
        subprocess.Popen(
            [*command, "--trace-otlp", collector.url], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        try:
            assert process.stdout.readline().startswith("ready: gRPC 127.0.0.1:")
            ready = SimpleNamespace(**json.loads((tmp_path / "ready.json").read_text()))
            assert all(psutil.pid_exists(pid) for pid in ready.pids)
            require_spans_of_triton(ready.grpc, collector)
            next(Raw(ready).call([GOOD], **LONG))
            process.send_signal(number)
            assert process.wait(60) == (0 if number == signal.SIGTERM else -number)
        finally:
            process.kill()
    within_s = 0 if number == signal.SIGTERM else 60
    assert until(lambda: not any(map(runs, ready.pids)), within_s)
    assert until(lambda: set(Path("/dev/shm").iterdir()) <= segments, within_s)
