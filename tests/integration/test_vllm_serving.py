"""vLLM behind the real Triton: the gate, `golden`, every form of request, readings at once, callers that leave, an
engine that dies."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from click.testing import CliRunner
from served import Raw, outputs
from served_list import SHORT, Native, dicom_files, forms, profile_with_tasks
from test_serving import until
from vllm_endurance import SEEN_DEAD_S, at_once, cancelled, engine_pid, freed, in_a_row, kill_engine
from vllm_room import CHECKPOINT, PHANTOM, build, vllm_python  # noqa: F401

from cxr_triton import phantom
from cxr_triton.cli import main
from cxr_triton.engines.verify.gate import verify_bundle
from cxr_triton.engines.verify.record import write_record
from cxr_triton.engines.verify.reference import Reference
from cxr_triton.profile import load_profile
from cxr_triton.reading import STAGES
from cxr_triton.triton_repo.package import Settings, write_repository
from cxr_triton.triton_repo.serve import Server

pytestmark = [pytest.mark.slow, pytest.mark.triton, pytest.mark.usefixtures("vllm_python")]
IMAGES = 8
SLOTS = 4
EXIT_UNAVAILABLE = 75
DEADLINE_S = 20


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """A folder as `make-engine` leaves it, of a bf16 bundle that the gate judged here, and the images."""
    folder = tmp_path_factory.mktemp("vllm")
    bundle = build(folder, "bf16")
    (folder / "phantoms").mkdir()
    (folder / "verification").mkdir()
    images = list(phantom.png_files(IMAGES, 11, bundle.profile.pixel_preset))
    for number, content in enumerate(images):
        (folder / "phantoms" / f"{number}.png").write_bytes(content)
    with Reference(CHECKPOINT, load_profile(PHANTOM / "profile.yaml"), device="cpu") as reference:
        record = verify_bundle(bundle, reference, reference.profile, images, threads=1)
    (folder / "verification" / "record.json").write_text(json.dumps(record))
    write_record(bundle, record)
    return folder, images, record


@pytest.fixture(scope="module")
def server(verified):
    if importlib.util.find_spec("pytriton") is None:
        pytest.skip("no Triton server here; install it with pip install '.[local]'")
    repository = verified[0] / "repository"
    write_repository(verified[0] / "bundle", repository, Settings(threads=1, options={"step-tokens": "256"}))
    with Server(repository, grpc_port=0, http_port=0, metrics_port=0, ready_timeout_s=300) as server:
        yield server


def test_the_gate_judges_the_engine_itself(verified):
    record = verified[2]
    failed = [check for part in record["parts"].values() for check in part["checks"] if not check["passed"]]
    assert record["passed"], (failed, [part["error"] for part in record["parts"].values()])
    assert record["runtime"]["engine"] == "vllm"


def test_golden_finds_the_readings_of_the_verification(verified, server):
    command = ["golden", str(verified[0]), "--url", server.grpc, "--concurrency", "4", "--json", "-"]
    held = CliRunner().invoke(main, command)
    assert held.exit_code == 0, held.output
    assert json.loads(held.stdout)["passed"]


def test_readings_in_a_row_and_32_at_once(verified, server):
    assert in_a_row(server.grpc, verified[1], 2 * IMAGES)["readings"] == 2 * IMAGES
    assert at_once(server.grpc, verified[1], 32)["readings"] == 32
    server.check()


def test_callers_that_leave_free_their_sequences(verified, server):
    """Where each leaves depends on the machine; which of them waited is not held."""
    outcomes = cancelled(server.grpc, verified[1], 48, 0.6)
    assert sum(outcomes.values()) == 48 and outcomes["before_text"] + outcomes["in_text"] > 0, outcomes
    freed(Raw(server))
    in_a_row(server.grpc, verified[1], 1)
    server.check()


def test_an_engine_that_dies_ends_the_server(verified, server):
    """The last test: `cxr-triton serve` ends with what `check` raises."""
    killed = kill_engine(server, server.grpc, verified[1])
    assert killed["seen_s"] < SEEN_DEAD_S
    assert set(killed["readings_in_flight"]) <= {"read", "UNAVAILABLE"}
    assert server.pids == []


@pytest.fixture(scope="module")
def files():
    return dicom_files(IMAGES)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An export in fp32 with tasks of every form, and its bundle for vLLM."""
    folder = tmp_path_factory.mktemp("vllm-fp32")
    return folder, build(folder, "fp32", profile=profile_with_tasks(folder))


@pytest.fixture(scope="module")
def native(made, tmp_path_factory):
    """The native decoder on the same images."""
    from cxr_triton.export.export import export_checkpoint

    folder = tmp_path_factory.mktemp("native")
    export_checkpoint(str(CHECKPOINT), folder / "export", made[1].profile, precision="fp32", progress=False)
    with Native(folder / "export", folder, rounded=False) as native:
        yield native


@pytest.fixture(scope="module")
def commanded(made):
    """`cxr-triton serve` as a process, and a client of what it serves."""
    if importlib.util.find_spec("pytriton") is None:
        pytest.skip("no Triton server here; install it with pip install '.[local]'")
    folder, bundle = made
    write_repository(bundle.path, folder / "repository", Settings(threads=1, slots=SLOTS), unverified=True)
    ports = ("--grpc-port", "0", "--metrics-port", "0", "--drain-seconds", "0")
    command = [Path(sys.executable).with_name("cxr-triton"), "serve", "repository", *ports, "--json", "ready.json"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("ready: gRPC 127.0.0.1:"), process.communicate()[1]
            yield process, Raw(SimpleNamespace(**json.loads((folder / "ready.json").read_text())))
        finally:
            process.terminate()


@pytest.fixture
def raw(commanded):
    process, raw = commanded
    yield raw
    assert process.poll() is None


@contextlib.contextmanager
def halted(raw):
    """The engine stands still, so that what runs in it neither goes on nor ends."""
    pid = engine_pid(raw.server)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_every_form_of_request_gets_the_native_decoders_text(raw, native, files):
    """One image, text alone, two images, a follow-up turn."""
    for images, asked in [(files[:1], {}), *forms(files)]:
        reading, expected = raw.read(images, **asked, **SHORT), native(images, **asked, **SHORT)
        assert reading["text"] == expected.text, asked
        assert expected.usage.items() <= reading["usage"].items()
        assert (reading["usage"]["image_tokens"] > 0) == bool(images)


def test_a_reading_streams_and_says_where_its_time_went(raw, native, files):
    reading, expected = raw.read(files[:1], temperature=0.0), native(files[:1], temperature=0.0)
    assert reading["text"] == expected.text and reading["status"] == "ok" and reading["model"]["engine"] == "vllm"
    assert "".join(reading["deltas"]) == reading["text"] and len(reading["deltas"]) > 3
    assert reading["usage"] == expected.usage
    timings_ms = reading["timings_ms"]
    stages = [timings_ms[stage] for stage in STAGES if stage != "scores"]
    assert min(stages) >= 0 and timings_ms["prefill"] > 0 and timings_ms["decode"] > 0
    assert sum(stages) == pytest.approx(timings_ms["total"], abs=1)
    assert timings_ms["first_token"] < timings_ms["total"]


def test_sampling_reaches_the_engine(raw, native, files):
    drawn = {"max_new_tokens": 24, "temperature": 2.0, "top_p": 0.95}
    first, again, other = (raw.read(files[:1], **drawn, seed=seed)["text"] for seed in (5, 5, 6))
    assert first == again != other
    assert len({raw.read(files[:1], **drawn)["text"] for _ in range(4)}) > 1  # without a seed each is drawn anew
    greedy = {"max_new_tokens": 60, "temperature": 0.0}
    plain, held = (raw.read(files[:1], **greedy, repetition_penalty=penalty)["text"] for penalty in (1.0, 2.0))
    assert held == native(files[:1], **greedy, repetition_penalty=2.0).text != plain


def test_a_stop_string_ends_the_text_before_it(raw, native, files):
    whole = native(files[:1], temperature=0.0).text
    stop = whole[len(whole) // 3 :][:6]
    reading = raw.read(files[:1], temperature=0.0, stop=[stop])
    assert reading["text"] == whole[: whole.index(stop)] and reading["finish_reason"] == "stop"
    assert until(lambda: raw.metric("cxr_decoder_streams") == 0)


def test_a_request_that_waits_has_a_heartbeat_and_can_be_cancelled(raw, files):
    cancelled_before = raw.metric("cxr_decoder_cancelled_total")
    with halted(raw):
        calls = [raw.call(files[i % IMAGES : i % IMAGES + 1], timeout_s=600) for i in range(SLOTS + 1)]
        assert until(lambda: raw.metric("cxr_decoder_streams") == SLOTS + 1)
        for call in calls:
            assert outputs(next(call)) == ("", "")
            call.cancel()
        assert until(lambda: raw.metric("cxr_decoder_streams") == 0)
    assert raw.metric("cxr_decoder_cancelled_total") == cancelled_before + SLOTS + 1
    assert raw.read(files[:1], **SHORT)["usage"]["completion_tokens"] == 10


def test_a_deadline_that_passes_ends_the_streams_in_the_engine(raw, files):
    """All slots are held by callers whose deadline passes; who comes after them is read."""
    before = raw.metric("cxr_decoder_cancelled_total")
    with halted(raw):
        calls = [raw.call(files[i : i + 1], timeout_s=DEADLINE_S) for i in range(SLOTS)]
        assert until(lambda: raw.metric("cxr_decoder_streams") == SLOTS, DEADLINE_S)
        for call in calls:
            with pytest.raises(grpc.RpcError) as passed:
                list(call)
            assert passed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert until(lambda: raw.metric("cxr_decoder_streams") == 0)
    assert raw.metric("cxr_decoder_cancelled_total") == before + SLOTS
    assert raw.read(files[:1], **SHORT)["usage"]["completion_tokens"] == 10


def test_a_killed_engine_ends_serve_with_the_status_for_a_supervisor(commanded):
    """The last test of this server."""
    process, raw = commanded
    os.kill(engine_pid(raw.server), signal.SIGKILL)
    assert process.wait(60) == EXIT_UNAVAILABLE
    assert "UNAVAILABLE" in process.stderr.read()
