"""`cxr-triton bench run` and its client against the real Triton: the ensemble, and a double that does no work."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import scripted
from click.testing import CliRunner
from instant_server import InstantServer

from cxr_triton.cli import main
from cxr_triton.engines.secret import SECRET
from cxr_triton.errors import Unavailable
from cxr_triton.perf import perf_analyzer
from cxr_triton.perf.capacity.compare import again
from cxr_triton.perf.capacity.served import main as capacity_served
from cxr_triton.perf.capacity.simulate import PARTS
from cxr_triton.perf.capacity.stages import load_stages
from cxr_triton.triton_repo.guard import statistics_header

pytestmark = pytest.mark.triton
SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "bench.schema.json").read_text())
TOKENS = 12
WORKLOAD = """\
name: tiny
version: 1
description: A test's.
count: 4
images: {phantoms: 2, syntaxes: [explicit, jpeg_ls]}
requests: [{task: TASK, output: {median: 12, p95: 12, max: 12}}]
"""
# Bounds that no loaded machine reaches; how fast it is stands in recorded runs.
BOUNDS = ["--latency-ms", "600000", "--ttft-ms", "600000", "--itl-ms", "600000"]
SHORT = ["--seconds", "0.5", "--requests", "4", "--repeats", "2", "--offline-concurrency", "4", *BOUNDS]


def run(server, tmp_path, *options, task="findings"):
    (tmp_path / "tiny.yaml").write_text(WORKLOAD.replace("TASK", task))
    command = ["bench", "run", "--url", server.grpc, "--metrics", server.metrics, *SHORT, *options]
    return CliRunner(env={SECRET: server.secret}).invoke(
        main, [*command, "--workload", str(tmp_path / "tiny.yaml"), "--json", str(tmp_path / "r.json")]
    )


@pytest.fixture
def analyzer():
    try:
        return perf_analyzer.find()
    except Unavailable as error:
        pytest.skip(f"no perf_analyzer: {error.message}")


def test_one_run_measures_all_four_scenarios_by_both_drivers(raw, server, tmp_path, analyzer):
    pages = ["--html", str(tmp_path / "r.html"), "--csv", str(tmp_path / "r.csv")]
    done = run(server, tmp_path, "--sweep", "2", "--rates", "5", *pages)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(result, SCHEMA)
    assert [s["name"] for s in result["scenarios"]] == ["single_stream", "offline", "server", "interactive"]
    assert all(scenario["result"]["valid"] for scenario in result["scenarios"])
    assert result["model"]["profile"] == "random" and result["server"]["name"] == "triton"
    assert [item["prompt_tokens"] is not None for item in result["workload"]["items"]] == [True] * 4
    points = [point for scenario in result["scenarios"] for point in scenario["points"]] + result["sweep"]
    assert [point["driver"] for point in result["sweep"]] == ["open_loop", "perf_analyzer"]
    for point in points:
        assert len(point["repeats"]) == 2
        for repeat in point["repeats"]:
            requests = repeat["requests"]
            # Random weights never end by themselves, so every answer has all of its tokens, by either driver.
            assert set(requests["tokens"]) == {TOKENS} and not repeat["summary"]["failed"]
            # Triton counted what the client sent, no more and no less.
            counted = len(requests["status"])
            assert counted >= 4 and repeat["triton"]["cxr_reader"]["requests"] == counted
            assert repeat["triton"]["dicom_preprocess"]["requests"] == counted
            steps = repeat["metrics"]["cxr_decoder_steps_total"]
            assert steps[1] > steps[0]
            assert all(len(deltas) > 1 for deltas in requests["deltas_s"])
        fallen = point["waterfall"]
        assert sum(fallen["stages_ms"].values()) + fallen["remainder_ms"] == pytest.approx(fallen["end_to_end_ms"])
        assert abs(fallen["remainder_share"]) < 0.5  # 5 % is for a machine that does nothing else
        assert fallen["triton_ms"]["ensemble"] > fallen["stages_ms"]["decode"]
    checks = [
        c
        for c in result["cross_check"]
        if c["a"] == "printed" and c["metric"] in ("latency_ms.mean", "requests in its window per s")
    ]
    assert len(checks) == 2 and all(abs(check["relative_difference"]) < 0.01 for check in checks)
    ours = [c for c in result["cross_check"] if c["a"] == "open_loop" and c["metric"] == "output_tokens_per_s"]
    assert len(ours) == 1 and abs(ours[0]["relative_difference"]) < 5  # the same order; 5 % is for a quiet machine
    assert "single_stream" in done.output and (tmp_path / "r.csv").stat().st_size > 1000
    assert "diagnosis" in (tmp_path / "r.html").read_text()
    opens = statistics_header(server.secret)[1]
    assert not any(opens in file.read_text() for file in tmp_path.iterdir()), "the result tells what opens the server"


def test_without_the_servers_secret_a_run_says_what_it_needs(server, tmp_path):
    done = run(SimpleNamespace(grpc=server.grpc, metrics=server.metrics, secret="another server's " * 2), tmp_path)
    assert done.exit_code == 75 and "[UNAVAILABLE]" in done.output and SECRET in done.output


def test_a_run_ends_at_the_first_fault(raw, server, tmp_path):
    done = run(server, tmp_path, "--sweep", "", "--perf-analyzer", "none", task="finding")
    assert done.exit_code == 1 and "[INVALID_REQUEST]" in done.output and "did you mean 'findings'" in done.output
    assert not (tmp_path / "r.json").exists()


def test_wrong_usage_is_said(server, tmp_path):
    runner = CliRunner(env={SECRET: server.secret})
    for arguments, said in (
        ([], "give REPOSITORY or --url"),
        (["--url", server.grpc, "--scenario", "servr"], "did you mean 'server'"),
        (["--url", server.grpc, "--sweep", "1,x"], "no list of numbers"),
        (["--url", server.grpc, "--perf-analyzer", "/nowhere"], "does not start"),
        (["--url", server.grpc, "--scenario", "server", "--sweep", ""], "give --rates"),
    ):
        done = runner.invoke(main, ["bench", "run", "--seconds", "0.1", *arguments])
        assert done.exit_code and said in done.output, (arguments, done.output)


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    """A warm Triton whose `cxr_reader` is the scripted double."""
    if importlib.util.find_spec("pytriton") is None:
        pytest.skip("no Triton server here; install it with pip install '.[local]'")
    from cxr_triton.triton_repo.serve import Server

    repository = scripted.write_repository(tmp_path_factory.mktemp("double") / "repository")
    with Server(repository, grpc_port=0, metrics_port=0) as server:
        yield server


def test_a_large_request_with_many_responses_costs_the_client_little(double):
    measured = scripted.overhead(double.grpc, image_bytes=8 << 20, responses=300, concurrency=2, seconds=1.0)
    # Processor time, because other work may share the cores; docs/benchmarks.md has it from a quiet machine.
    assert measured["requests"] >= 3 and measured["client_cpu_s_per_request"] < 0.5


def test_timestamps_are_those_of_the_server(double):
    script = {"responses": 20, "first_ms": 50, "gap_ms": 10}
    with InstantServer(**script) as instant:
        for url in (instant.url, double.grpc):
            late = scripted.timestamps_ms(url, script, streams=4, requests=16)["late"]
            late = np.reshape(late, (16, 20))
            assert late.min() > 0  # nothing arrives before it was sent
            # A quarter of each were in time, of 16; docs/benchmarks.md has all of them from a quiet machine.
            assert np.quantile(late, 0.25, axis=0).max() < 100


def test_a_server_under_load_stands_beside_its_simulation(served_bundle, tmp_path):
    """How near they are is recorded on a quiet machine; here, that both had the same readings at the same times."""
    pytest.importorskip("pytriton")
    (tmp_path / "tiny.yaml").write_text(WORKLOAD.replace("TASK", "findings"))
    record, stages = tmp_path / "record.json", tmp_path / "stages.json"
    options = ["--workload", tmp_path / "tiny.yaml", "--slots", 2, "--concurrency", 2, "--rounds", 1, "--seconds", 0.5]
    options += ["--json", record, "--stages", stages]
    done = CliRunner().invoke(capacity_served, [str(served_bundle), *map(str, options)])
    assert done.exit_code == 0, done.output
    (each,) = json.loads(record.read_text())["rounds"]
    assert [point["load"]["kind"] for point in each["points"]] == ["concurrency", *["rate_per_s"] * 2]
    for point in each["points"][1:]:
        assert point["simulated"]["requests"] == point["measured"]["requests"] >= 4
    made = load_stages(stages)
    assert {kind.answer_tokens for kind in made.readings} == {TOKENS} and len(made.readings) == 4
    assert [point.at for point in made.step.points] == [1, 2] and made.machine.slots == 2
    assert made.kept.memory_mib > 100 and each["one_stream"]["processor_ms"] > 0
    for point in each["points"]:
        assert list(point["measured"]["stages_ms"]) == list(point["simulated"]["stages_ms"]) == list(PARTS)
    assert each["alone"]["token_ms"] > 0 and 0 <= each["scattered"] <= 1
    told = json.loads(record.read_text())
    assert again(told) == told
