"""The result of a benchmark: its schema, summaries, intervals, waterfalls and what the scenarios conclude."""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import bench_results
import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from cxr_triton.cli import main
from cxr_triton.errors import InvalidRequest, Unavailable
from cxr_triton.perf import bench
from cxr_triton.perf.bench import Plan, cross_check, meets, outcome
from cxr_triton.perf.environment import Stolen
from cxr_triton.perf.stages import STAGES, stages_of, triton_times, waterfall
from cxr_triton.perf.summary import Record, columns, interval, over_repeats, summarize

ROOT = Path(__file__).resolve().parents[2]

SCHEMA = json.loads((ROOT / "docs" / "bench.schema.json").read_text())
TIMINGS = {"image_decode": 10.0, "preprocess": 5.0, "vision": 20.0, "queue": 1.0, "prefill": 30.0, "decode": 100.0}
TIMINGS |= {"report": 2.0, "first_token": 66.0, "total": 168.0}


def request(scheduled_s=0.0, sent_s=0.0, end_s=1.0, deltas_s=(0.4, 0.7, 0.9), status="ok", tokens=6, **more) -> Record:
    return Record(0, scheduled_s, sent_s, end_s, list(deltas_s), status, 300, tokens, **more)


def test_the_example_is_whole():
    jsonschema.validate(bench_results.result(repeats=1), SCHEMA)


@pytest.mark.parametrize("gone", ["scenarios", "notice"])
def test_the_schema_refuses_a_result_that_lacks_something(gone):
    result = bench_results.result(repeats=1)
    del result[gone]
    with pytest.raises(jsonschema.ValidationError, match=gone):
        jsonschema.validate(result, SCHEMA)


def test_latencies_of_a_request_count_from_its_schedule():
    late = request(scheduled_s=0.1, sent_s=0.3)
    assert late.latency_ms == pytest.approx(900) and late.ttft_ms == pytest.approx(300)
    assert late.itl_ms == pytest.approx(500 / 5)  # from the first to the last text, over the tokens after the first
    assert request(tokens=1).itl_ms is None and request(deltas_s=[0.4]).itl_ms is None
    assert request(deltas_s=[]).ttft_ms is None


def test_a_summary_counts_what_succeeded():
    records = [request(scheduled_s=0.1 * i, sent_s=0.1 * i, end_s=1.0 + i, tokens=10 + i) for i in range(10)]
    records.append(request(end_s=12.0, status="QUEUE_FULL", tokens=None, deltas_s=[]))
    summary = summarize(records, {"latency_ms": 5000.0})
    assert (summary["requests"], summary["failed"], summary["seconds"]) == (11, {"QUEUE_FULL": 1}, 12.0)
    assert summary["readings_per_s"] == pytest.approx(10 / 12)
    assert summary["output_tokens_per_s"] == pytest.approx(sum(range(10, 20)) / 12)
    # 1.0 + i - 0.1 i is at most 5 for i up to 4.
    assert summary["goodput_per_s"] == pytest.approx(5 / 12) and summary["goodput_share"] == pytest.approx(5 / 11)
    latencies = [1e3 * (1 + 0.9 * i) for i in range(10)]
    for percent in (50, 90, 95, 99):
        assert summary["latency_ms"][f"p{percent}"] == pytest.approx(np.percentile(latencies, percent))
    assert summary["chunk_gap_ms"]["n"] == 20 and summary["chunk_gap_ms"]["max"] == pytest.approx(300)


def test_goodput_wants_every_bound():
    kept = request()  # 1,000 ms, first text after 400 ms, 100 ms a token
    assert kept.keeps({"latency_ms": 1000, "ttft_ms": 401, "itl_ms": 101})
    assert not kept.keeps({"ttft_ms": 399, "itl_ms": 101}) and not kept.keeps({"ttft_ms": 401, "itl_ms": 99})
    assert not request(status="UNAVAILABLE").keeps({}) and request(status="truncated").keeps({})


def test_a_summary_of_nothing_has_no_numbers():
    summary = summarize([], {})
    assert summary["readings_per_s"] == 0 and summary["latency_ms"] == {
        "n": 0,
        **dict.fromkeys(("mean", "p50", "p90", "p95", "p99", "max")),
    }


def test_intervals_are_students():
    """Three values: mean ± 4.3027 standard errors, the textbook's two-sided 5 % point for 2 degrees of freedom."""
    said = interval([10.0, 12.0, 14.0])
    assert said["mean"] == 12 and said["high"] - 12 == pytest.approx(4.3027 * 2 / 3**0.5, rel=1e-4)
    assert 12 - said["low"] == pytest.approx(said["high"] - 12)
    assert interval([3.0]) == {"mean": 3.0, "low": None, "high": None}
    assert interval([None]) == {"mean": None, "low": None, "high": None}
    merged = over_repeats([summarize([request(end_s=end_s)], {}) for end_s in (1.0, 2.0)])
    assert merged["latency_ms.p50"]["mean"] == pytest.approx(1500)


def test_columns_keep_the_order_of_the_schedule():
    records = [request(scheduled_s=0.2), request(scheduled_s=0.1, stages_ms={"vision": 3.0})]
    table = columns(records)
    assert table["scheduled_s"] == [0.1, 0.2] and table["stages_ms"] == {"vision": [3.0, None]}
    assert {len(column) for name, column in table.items() if name != "stages_ms"} == {2}


def test_stages_add_up_to_what_the_client_saw():
    """Transport is measured at the first text, so a last response that is 3 ms late is a remainder of 3 ms."""
    way_ms = 7.0  # to the server and back
    first_s = (TIMINGS["first_token"] + TIMINGS["report"] + way_ms) / 1e3
    end_s = (TIMINGS["total"] + way_ms + 3.0) / 1e3
    stages = stages_of(TIMINGS, 0.0, [first_s, 0.1], end_s)
    assert stages["transport"] == pytest.approx(way_ms) and stages["remainder"] == pytest.approx(3.0)
    assert sum(stages.values()) == pytest.approx(1e3 * end_s) and set(stages) == {*STAGES, "remainder"}
    # Without any text there is nothing to check.
    assert stages_of(TIMINGS, 0.0, [], 0.2)["remainder"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("late_ms", "adds_up"), [(0.0, True), (8.0, True), (-8.0, True), (12.0, False), (-12.0, False)]
)
def test_a_waterfall_says_whether_it_adds_up(late_ms, adds_up):
    end_s = (TIMINGS["total"] + 7.0 + late_ms) / 1e3
    first_s = (TIMINGS["first_token"] + TIMINGS["report"] + 7.0) / 1e3
    record = request(end_s=end_s, deltas_s=[first_s], stages_ms=stages_of(TIMINGS, 0.0, [first_s], end_s))
    fallen = waterfall([record, request(status="QUEUE_FULL")], {})
    assert fallen["adds_up"] is adds_up
    assert sum(fallen["stages_ms"].values()) + fallen["remainder_ms"] == pytest.approx(fallen["end_to_end_ms"])
    assert fallen["decode_ms_per_token"] == pytest.approx(100 / 5)
    assert waterfall([request(status="QUEUE_FULL")], {}) is None


def test_tritons_clock_stands_beside():
    counted = {"requests": 4, "request_ms": 400, "queue_ms": 40}
    counted |= {"compute_input_ms": 4, "compute_infer_ms": 20, "compute_output_ms": 8}
    times = triton_times({"cxr_reader": counted, "vision_encoder": counted, "dicom_preprocess": {"requests": 0}}, 110.0)
    assert times == {"ensemble": 100.0, "outside": 10.0, "vision_wait": 10.0, "vision_compute": 8.0}


def at(rate: float, p99: float, **more) -> dict:
    tail = {"mean": p99, "low": None, "high": None}
    return {"load": {"kind": "rate_per_s", "value": rate}, "summary": {"latency_ms.p99": tail}, **more}


def test_the_server_scenario_finds_the_highest_rate_that_keeps_its_bound():
    points, bounds = [at(1.0, 900.0), at(2.0, 1000.0), at(3.0, 1001.0)], {"latency_ms": 1000.0}
    assert [meets(point, bounds) for point in points] == [True, True, False]
    assert outcome("rate_per_s", points, bounds)["value"] == 2.0
    none = outcome("rate_per_s", points[2:], bounds)
    assert none["value"] is None and not none["valid"] and "p99 latency_ms 1000" in none["why"]
    assert not meets(at(1.0, 900.0, stopped="QUEUE_FULL"), bounds) and not meets(at(1.0, None), bounds)


def test_an_overload_makes_a_throughput_invalid():
    point = {"summary": {"readings_per_s": {"mean": 5.0, "low": 4.0, "high": 6.0}}}
    assert outcome("readings_per_s", [point], {}) == {"value": 5.0, "low": 4.0, "high": 6.0, "valid": True, "why": ""}
    stopped = outcome("readings_per_s", [{**point, "stopped": "QUEUE_FULL"}], {})
    assert not stopped["valid"] and "QUEUE_FULL" in stopped["why"]


def test_the_cross_check_compares_drivers_on_the_same_load():
    sweep = bench_results.result()["sweep"]
    twins = [{**point, "driver": "open_loop"} for point in sweep]
    checks = cross_check([*twins, *sweep])
    assert {check["concurrency"] for check in checks} == {1, 2, 4}
    assert all(abs(check["relative_difference"]) < 1e-9 for check in checks if check["a"] == "open_loop")
    twins[0]["summary"] = {**twins[0]["summary"], "readings_per_s": {"mean": 2.0, "low": None, "high": None}}
    (changed,) = [c for c in cross_check([*twins, *sweep]) if c["concurrency"] == 1 and c["metric"] == "readings_per_s"]
    theirs = sweep[0]["summary"]["readings_per_s"]["mean"]
    assert changed["relative_difference"] == pytest.approx(2.0 / theirs - 1)
    assert cross_check(twins) == []


@pytest.mark.parametrize("wrong", [{"rates_per_s": (2.0, 1.0)}, {"rates_per_s": (0.0,)}, {"repeats": 0}])
def test_a_plan_refuses_what_cannot_be_run(wrong):
    with pytest.raises(InvalidRequest):
        Plan(**wrong)


def test_the_environment_is_that_of_this_machine():
    said = bench.environment()
    jsonschema.validate(said, SCHEMA["properties"]["environment"])
    assert said["cores"] >= 1 and said["memory_bytes"] > 1 << 28 and said["versions"]["numpy"] == np.__version__


def test_what_the_hypervisor_took_is_a_share_of_all_cores(monkeypatch):
    assert Stolen().share() >= 0
    monkeypatch.setattr(Stolen, "_so_far_s", staticmethod(iter([10.0, 11.0]).__next__))
    clock = SimpleNamespace(monotonic=iter([100.0, 105.0]).__next__)
    monkeypatch.setattr("cxr_triton.perf.environment.time", clock)
    assert Stolen().share() == pytest.approx(1 / (5 * os.cpu_count()))


def test_gpus_are_named_and_read(tmp_path, monkeypatch):
    """Against a stand-in for nvidia-smi: no GPU is here."""
    tool = tmp_path / "nvidia-smi"
    facts, counters = "NVIDIA H100, 81559, 580.1, 700.00, 9.0", "97, 4096, 512.5, 1980, [N/A]"
    tool.write_text(f"#!/bin/sh\ncase $1 in *name*) echo '{facts}';; *) echo '{counters}';; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (gpu,) = bench.environment()["gpus"]
    assert (gpu["name"], gpu["memory.total"], gpu["compute_cap"]) == ("NVIDIA H100", "81559", "9.0")
    read = bench.Observer("127.0.0.1:1").metrics()
    assert read == {
        "gpu0.utilization.gpu": 97,
        "gpu0.memory.used": 4096,
        "gpu0.power.draw": 512.5,
        "gpu0.clocks.sm": 1980,
    }


def test_the_table_has_a_line_for_every_point_and_scenario():
    result = bench_results.result()
    lines = bench.table(result).splitlines()
    points = sum(len(scenario["points"]) for scenario in result["scenarios"]) + len(result["sweep"])
    assert len(lines) == 1 + points + len(result["scenarios"])
    assert "single_stream: latency_ms.p90" in lines[-4]


class Interrupted(bench.Bench):
    """Repeats made by hand; Ctrl-C, or another error, comes in the one of this number."""

    def __init__(self, at: int, plan: Plan, error: BaseException | None = None):
        image = SimpleNamespace(data=b"x")
        item = SimpleNamespace(images=[image], request={}, message=lambda model: b"")
        workload = bench_results.result(repeats=1)["workload"]
        drawn = SimpleNamespace(
            items=[item] * 4, spec=SimpleNamespace(arrival="poisson"), as_json=lambda: json.loads(json.dumps(workload))
        )
        super().__init__(drawn, plan, SimpleNamespace(url="127.0.0.1:8001"))
        self.left, self.error = at, error or KeyboardInterrupt()

    def warm_up(self):
        whole = bench_results.result(repeats=1)
        return SimpleNamespace(model=whole["model"], notice="Research only."), whole["server"]

    def _repeat(self, load, bounds, repeat):
        if not self.left:
            raise self.error
        self.left -= 1
        rng = random.Random(repeat)
        records = [bench_results.record(rng, i % 4, i / 8, 1.0) for i in range(24)]
        made = bench_results.point(rng, load.kind, load.value, bounds, 1.0, 1)["repeats"][0]
        return (made | {"summary": summarize(records, bounds), "requests": columns(records)}, records), None


@pytest.mark.parametrize(
    ("at", "repeats", "sweep"),
    [
        (1, {"single_stream": [1]}, []),
        (3, {"single_stream": [3]}, []),
        (4, {"single_stream": [3], "offline": [1]}, []),
        (9, {"single_stream": [3], "offline": [3], "server": [3]}, []),
        (10, {"single_stream": [3], "offline": [3], "server": [3, 1]}, []),
        (19, {"single_stream": [3], "offline": [3], "server": [3, 3], "interactive": [3, 3]}, [1]),
    ],
)
def test_ctrl_c_keeps_every_whole_repeat(at, repeats, sweep):
    plan = Plan(rates_per_s=(0.5, 0.6), concurrencies=(1, 2), latency_ms=1e6, ttft_ms=1e6, itl_ms=1e6)
    result = Interrupted(at, plan).run(["cxr-triton"])
    jsonschema.validate(result, SCHEMA)
    assert result["interrupted"] is True
    assert {s["name"]: [len(p["repeats"]) for p in s["points"]] for s in result["scenarios"]} == repeats
    assert [len(point["repeats"]) for point in result["sweep"]] == sweep
    assert bench.table(result)
    last = result["scenarios"][-1]
    if not sweep and at != 3:  # between two scenarios the one before is whole
        assert (last["result"]["valid"], last["result"]["why"]) == (False, "interrupted")


@pytest.mark.parametrize(
    ("error", "code"),
    [(Unavailable("the server went away"), "UNAVAILABLE"), (ZeroDivisionError("division by zero"), "INTERNAL")],
)
def test_an_error_keeps_every_whole_repeat(error, code):
    plan = Plan(rates_per_s=(0.5, 0.6), concurrencies=(1,), latency_ms=1e6, ttft_ms=1e6, itl_ms=1e6)
    failing = Interrupted(4, plan, error)
    result = failing.run(["cxr-triton"])
    jsonschema.validate(result, SCHEMA)
    assert failing.ended_by is error and result["error"]["code"] == code and str(error) in result["error"]["message"]
    assert "interrupted" not in result
    whole, cut = result["scenarios"]
    assert whole["result"]["valid"] and len(whole["points"][0]["repeats"]) == 3
    assert (len(cut["points"][0]["repeats"]), cut["points"][0]["stopped"]) == (1, code)
    assert (cut["result"]["valid"], cut["result"]["why"]) == (False, f"ended by {code}")
    with pytest.raises(type(error)):
        Interrupted(0, plan, error).run(["cxr-triton"])


def test_what_was_measured_before_an_error_is_written_and_the_exit_says_so(tmp_path, monkeypatch):
    """`bench run` against a server that goes away in the fourth repeat."""
    made = Interrupted(3, Plan(), Unavailable("the server went away"))
    monkeypatch.setattr("cxr_triton.perf.served.Bench", lambda *arguments, **options: made)
    files = {kind: tmp_path / f"result.{kind}" for kind in ("json", "csv", "html")}
    options = [part for kind, path in files.items() for part in (f"--{kind}", str(path))]
    command = ["bench", "run", "--url", "127.0.0.1:8001", "--perf-analyzer", "none", *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 75 and done.stderr.splitlines()[-1] == "error: [UNAVAILABLE] the server went away"
    result = json.loads(files["json"].read_text())
    jsonschema.validate(result, SCHEMA)
    assert result["error"] == {"code": "UNAVAILABLE", "message": "the server went away"}
    assert [len(point["repeats"]) for point in result["scenarios"][0]["points"]] == [3]
    assert "single_stream" in files["html"].read_text() and files["csv"].read_text().count("single_stream") == 3
    made.left, made.ended_by = 0, None
    for path in files.values():
        path.unlink()
    assert CliRunner().invoke(main, command).exit_code == 75
    assert not any(path.exists() for path in files.values())


def test_a_server_that_went_away_is_one_error():
    gone = bench.Observer("127.0.0.1:1", "127.0.0.1:1")
    for asked in (gone.triton, gone.metrics):
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1.*log"):
            asked()


def test_ctrl_c_before_the_first_repeat_ended_has_no_result():
    with pytest.raises(KeyboardInterrupt):
        Interrupted(0, Plan()).run(["cxr-triton"])


def test_a_result_to_its_end_does_not_say_interrupted():
    result = Interrupted(99, Plan(rates_per_s=(0.5,), concurrencies=(1,))).run(["cxr-triton"])
    jsonschema.validate(result, SCHEMA)
    assert "interrupted" not in result and len(result["sweep"]) == 1
