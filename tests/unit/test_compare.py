"""`bench compare` and `bench history`: what differs is said, what does not is not, and CI sees it."""

import copy
import json
from pathlib import Path

import bench_results
import numpy as np
import pytest
import record
from click.testing import CliRunner

from cxr_triton.errors import InvalidRequest
from cxr_triton.perf import command
from cxr_triton.perf.compare import compare, history, load_result

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def run(speed: float = 1.0, seed: int = 0, repeats: int = 3) -> dict:
    """A result at the loads of speed 1, of one workload."""
    made, like = (bench_results.result(speed=s, seed=seed, repeats=repeats) for s in (speed, 1.0))
    for scenario, other in zip(made["scenarios"], like["scenarios"], strict=True):
        for point, same in zip(scenario["points"], other["points"], strict=True):
            point["load"] = same["load"]
    return made


def test_a_slower_run_is_worse_a_faster_one_better_and_the_same_neither():
    base = run()
    slower, faster, again = compare(base, run(0.8, 1)), compare(base, run(1.25, 2)), compare(base, run(1.0, 3))
    assert slower["verdict"] == "worse" and faster["verdict"] == "better"
    assert again["verdict"] == "no difference shown"
    told = {(entry["scenario"], entry["metric"]): entry for entry in slower["metrics"]}
    assert set(told) == {
        ("single_stream", "latency_ms.p90"), ("offline", "readings_per_s"), ("server", "latency_ms.p99"),
        ("interactive", "ttft_ms.p99"), ("interactive", "itl_ms.p99"),
    }  # fmt: skip
    assert told["single_stream", "latency_ms.p90"]["change"] == pytest.approx(0.25, abs=0.05)
    assert told["offline", "readings_per_s"]["change"] < -0.15
    assert {entry["verdict"] for entry in slower["metrics"]} == {"worse"}


@pytest.mark.slow
def test_chance_is_called_a_difference_about_as_often_as_alpha_says():
    """200 pairs of equal servers, five metrics each that are drawn anew; either direction at level 0.05."""
    base, rng = run(), np.random.default_rng(0)
    for scenario in base["scenarios"]:
        for repeat in (repeat for point in scenario["points"] for repeat in point["repeats"]):
            del repeat["requests"]

    def drawn() -> dict:
        made = base | {"scenarios": json.loads(json.dumps(base["scenarios"]))}
        for scenario in made["scenarios"]:
            for repeat in (repeat for point in scenario["points"] for repeat in point["repeats"]):
                summary = repeat["summary"]
                summary["readings_per_s"] = rng.normal(5, 0.1)
                for name, statistic in (
                    ("latency_ms", "p90"),
                    ("latency_ms", "p99"),
                    ("ttft_ms", "p99"),
                    ("itl_ms", "p99"),
                ):
                    summary[name][statistic] = rng.normal(100, 2)
        return made

    called = sum(compare(drawn(), drawn(), min_change=0)["verdict"] != "no difference shown" for _ in range(200))
    assert 6 <= called <= 34


def test_a_change_below_the_least_one_does_not_count():
    assert compare(run(), run(0.8, 1), min_change=0.5)["verdict"] == "no difference shown"


def test_one_scenario_that_is_worse_makes_the_run_worse():
    base, mixed = run(), run(1.25, 1)
    mixed["scenarios"][0] = run(0.8, 2)["scenarios"][0]
    assert compare(base, mixed)["verdict"] == "worse"


def test_what_cannot_be_compared_is_refused():
    base = run()
    other = copy.deepcopy(base)
    other["workload"]["digest"] = "3" * 64
    with pytest.raises(InvalidRequest, match="different requests"):
        compare(base, other)
    other = copy.deepcopy(base)
    other["scenarios"] = [s for s in other["scenarios"] if s["name"] == "server"]
    for point in other["scenarios"][0]["points"]:
        point["load"] = {**point["load"], "value": 99.0}
    with pytest.raises(InvalidRequest, match="load in common"):
        compare(base, other)
    with pytest.raises(InvalidRequest, match="ran 1 time"):
        compare(base, run(repeats=1))


def test_repeats_without_spread_are_told_apart_by_their_values():
    base, other = run(), run()
    for repeat in other["scenarios"][1]["points"][0]["repeats"]:
        repeat["summary"]["readings_per_s"] = 3.0
    for repeat in base["scenarios"][1]["points"][0]["repeats"]:
        repeat["summary"]["readings_per_s"] = 4.0
    told = {entry["metric"]: entry for entry in compare(base, other)["metrics"]}
    assert told["readings_per_s"]["verdict"] == "worse" and told["readings_per_s"]["p"] == 0
    assert told["latency_ms.p90"]["verdict"] == "no difference shown"


def test_other_differences_are_named():
    base, other = run(), run()
    other["environment"] |= {"cores": 4, "versions": {"onnxruntime": "1.32.0"}}
    other["model"]["precision"] = "int4"
    named = compare(base, other)["differences"]
    assert any("cores: 2 and 4" in text for text in named) and any("precision: fp32 and int4" in t for t in named)
    assert any(text == "onnxruntime: 1.31.1 and 1.32.0" for text in named) and any(t.startswith("numpy") for t in named)


@pytest.fixture
def files(tmp_path):
    def write(name: str, result: dict) -> str:
        (tmp_path / name).write_text(json.dumps(result))
        return str(tmp_path / name)

    return write


def test_ci_sees_the_exit_status(files, tmp_path):
    base, slower = files("a.json", run()), files("b.json", run(0.8, 1))
    done = CliRunner().invoke(command.compare, [base, slower, "--html", str(tmp_path / "c.html"), "--json", "-"])
    assert done.exit_code == 3, done.output
    assert json.loads(done.stdout)["verdict"] == "worse"
    assert "Against the earlier run: worse" in (tmp_path / "c.html").read_text()
    done = CliRunner().invoke(command.compare, [base, base])
    assert done.exit_code == 0 and done.output.endswith("no difference shown\n")
    done = CliRunner().invoke(command.compare, [slower, base])
    assert done.exit_code == 0 and done.output.endswith("better\n")


def test_history_lists_results_by_time_and_leaves_other_files_out(files, tmp_path):
    late, early = run(), run(0.8)
    late["created"], early["created"] = "2026-11-23T00:00:00+00:00", "2026-11-20T00:00:00+00:00"
    (tmp_path / "deeper").mkdir()
    files("a.json", late), files("deeper/b.json", early)
    files("other.json", {"schema": 1}), (tmp_path / "broken.json").write_text("{")
    assert [result["file"] for result in history(tmp_path)] == ["b.json", "a.json"]
    done = CliRunner().invoke(command.history, [str(tmp_path), "--html", str(tmp_path / "h.html"), "--json", "-"])
    assert done.exit_code == 0, done.output
    listed = json.loads(done.stdout)["results"]
    assert [entry["file"] for entry in listed] == ["b.json", "a.json"]
    assert {"scenario": "single_stream", "metric": "latency_ms.p90"}.items() <= listed[0]["headline"][0].items()
    assert "2 runs" in (tmp_path / "h.html").read_text()
    with pytest.raises(InvalidRequest, match="no benchmark result"):
        history(tmp_path / "nothing")


def test_a_file_that_is_no_result_is_refused(files):
    from pathlib import Path

    for text, message in (
        ("{", "cannot be read"),
        ("[]", "schema_version None"),
        ('{"schema_version": 2}', "2, results"),
    ):
        path = Path(files("x.json", {}))
        path.write_text(text)
        with pytest.raises(InvalidRequest, match=message):
            load_result(path)


def test_a_record_of_a_result_compares_and_draws_as_the_result_does(tmp_path, files):
    (tmp_path / "cut.json").write_text(record.text(record.record(copy.deepcopy(run()))))
    for other, status in ((run(0.8, 1), 3), (run(1.25, 2), 0)):
        whole, cut = (compare(result, other) for result in (run(), load_result(tmp_path / "cut.json")))
        assert whole["verdict"] == cut["verdict"] != "no difference shown"
        paths = [str(tmp_path / "cut.json"), files("other.json", other), "--html", str(tmp_path / "page.html")]
        assert CliRunner().invoke(command.compare, paths).exit_code == status


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_published_records_are_cut(path):
    assert path.stat().st_size <= 55_000, f"python tests/bench/record.py {path} {path}"
