"""vLLM behind the real Triton: the gate, `golden`, readings at once, callers that leave, an engine that dies."""

import importlib.util
import json

import pytest
from click.testing import CliRunner
from served import Raw
from vllm_endurance import SEEN_DEAD_S, at_once, cancelled, freed, in_a_row, kill_engine
from vllm_room import CHECKPOINT, PHANTOM, build, vllm_python  # noqa: F401

from cxr_triton import phantom
from cxr_triton.cli import main
from cxr_triton.engines.verify.gate import verify_bundle
from cxr_triton.engines.verify.record import write_record
from cxr_triton.engines.verify.reference import Reference
from cxr_triton.profile import load_profile
from cxr_triton.triton_repo.package import Settings, write_repository
from cxr_triton.triton_repo.serve import Server

pytestmark = [pytest.mark.slow, pytest.mark.triton, pytest.mark.usefixtures("vllm_python")]
IMAGES = 8


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
    write_repository(
        verified[0] / "bundle", repository, Settings(threads=1, options={"draft-tokens": "2", "drafts": "ngram"})
    )
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
    outcomes = cancelled(server.grpc, verified[1], 24, 0.3)
    assert sum(outcomes.values()) == 24
    freed(Raw(server))
    in_a_row(server.grpc, verified[1], 1)
    server.check()


def test_an_engine_that_dies_ends_the_server(verified, server):
    """The last test: `cxr-triton serve` ends with what `check` raises."""
    killed = kill_engine(server, server.grpc, verified[1])
    assert killed["seen_s"] < SEEN_DEAD_S
    assert set(killed["readings_in_flight"]) <= {"read", "UNAVAILABLE"}
    assert server.pids == []
