"""Two engines on one data set: what is called worse, what is not, and what is not packaged."""

import dataclasses
import json

import evaluations
import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy.stats import binomtest

from cxr_triton.cli import EXIT_NOT_AS_ASKED, main
from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.compare import compare, judge, mcnemar
from cxr_triton.evaluate.intervals import Resamples
from cxr_triton.evaluate.kinds import Columns
from cxr_triton.evaluate.rows import KINDS, write
from cxr_triton.evaluate.summary import summarize


def columns(kind="labels", studies=200, **how) -> Columns:
    return Columns(*evaluations.result(kind, studies, **how))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_engine_is_worse_and_the_same_one_is_not(kind):
    before, damaged = columns(kind), columns(kind, engine=1, skill=0.6)
    found = compare(before, damaged, count=1000)
    deciding = [entry for entry in found["measures"] if entry["decides"]]
    assert found["verdict"] == "worse" and {entry["measure"] for entry in deciding} == set(before.kind.decides)
    assert all(entry["p_corrected"] < 0.01 and entry["difference"]["high"] < 0 for entry in deciding)
    assert not judge(summarize(damaged, count=50), {}, found)["passed"]
    assert compare(damaged, before, count=200)["verdict"] == "no worse"
    same = compare(before, columns(kind), count=200)
    assert same["verdict"] == "no worse" and same["parted"]["studies"] == 0
    assert all(
        entry["difference"] == {"value": 0, "low": 0, "high": 0} for entry in same["measures"] if entry["decides"]
    )
    assert judge(summarize(before, count=50), {}, same)["passed"]


def test_few_studies_show_nothing_and_that_is_said():
    found = compare(columns(studies=25), columns(studies=25, engine=1, skill=0.82))
    assert found["verdict"] == "not shown"


def test_a_loss_within_the_margin_is_put_up_with():
    before, after = columns(studies=600), columns(studies=600, engine=1, skill=0.8, broken=0.05)
    loss = -compare(before, after)["measures"][0]["difference"]["value"]
    assert 0.02 < loss < 0.2
    assert compare(before, after, margin=0.3)["verdict"] == "no worse"
    assert compare(before, after, margin=0.01)["verdict"] == "worse"


def test_no_difference_is_seldom_called_one():
    verdicts = []
    for seed in range(40):
        both = (columns(studies=80, seed=seed, engine=engine, scores=False) for engine in (1, 2))
        found = compare(*both, margin=0.0, count=200)
        verdicts += [{entry["verdict"] for entry in found["measures"] if entry["decides"]} & {"worse", "better"}]
    assert sum(map(bool, verdicts)) <= 6  # 2 expected; over 6 in one of 300 such runs


def test_mcnemar_is_the_exact_test_and_images_of_one_patient_are_not_independent():
    random = np.random.default_rng(0)
    only_a, only_b = random.random(200) < 0.05, random.random(200) < 0.15
    only_a &= ~only_b
    expected = binomtest(int(only_b.sum()), int(only_a.sum() + only_b.sum())).pvalue
    assert mcnemar(only_a, only_b, Resamples(range(200), 0)) == pytest.approx(expected)
    assert mcnemar(only_a & False, only_b & False, Resamples(range(200), 0)) == 1.0
    tenfold = np.repeat(np.arange(200), 10)
    repeated = mcnemar(only_a[tenfold], only_b[tenfold], Resamples(tenfold, 0))
    assert (
        repeated == pytest.approx(expected)
        and mcnemar(only_a[tenfold], only_b[tenfold], Resamples(range(2000), 0)) < 1e-6
    )


def test_each_label_is_tested_and_studies_on_which_both_part_are_named():
    before, after = columns(), columns(engine=1, skill=0.6)
    found, sets = compare(before, after), (before.kind.sets, after.kind.sets)
    right = [(each.said == each.truth) & each.answered & each.known for each in sets]
    for i, entry in enumerate(found["labels"]):
        assert (
            entry["only_a"] == (right[0] & ~right[1])[:, i].sum()
            and entry["only_b"] == (right[1] & ~right[0])[:, i].sum()
        )
        assert entry["p"] <= entry["p_corrected"]
    parted = found["parted"]
    differs = [x != y for x, y in zip(before.kind.said, after.kind.said, strict=True)]
    assert (
        parted["studies"] == sum(differs)
        and parted["share"] == np.mean(differs)
        and len(parted["cases"]) == min(200, sum(differs))
    )
    assert all(differs[case["number"]] for case in parted["cases"])
    apart = [abs(case["a"] - case["b"]) for case in parted["cases"]]
    assert apart == sorted(apart, reverse=True) and apart[0] == 1


def test_results_of_other_data_are_not_compared():
    header, rows = evaluations.result(studies=10)
    other = dataclasses.replace(header, data=header.data | {"digest": "sha256:other"})
    for wrong, why in (
        (Columns(other, rows), "other studies or truth"),
        (Columns(dataclasses.replace(header, uncertain="zeros"), rows), "other uncertain"),
        (Columns(*evaluations.result("options", 10)), "labels and of options"),
        (Columns(header, rows[:-1]), "other rows"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            compare(Columns(header, rows), wrong)


def test_limits_keep_an_engine_from_being_packaged():
    summary = summarize(columns(), count=50)
    value, error = (summary["measures"][name]["value"] for name in ("f1_macro", "ece_macro"))
    good = judge(summary, {"f1_macro": value, "ece_macro": error})
    assert good["passed"] and [check["at_least"] for check in good["checks"]] == [True, False]
    for limits in ({"f1_macro": value + 0.001}, {"ece_macro": error - 0.001}):
        assert not judge(summary, limits)["passed"]
    unknown = dict(summary, measures={"f1_macro": {"value": None, "low": None, "high": None}})
    assert not judge(unknown, {"f1_macro": 0.0})["passed"]
    with pytest.raises(InvalidRequest, match="did you mean 'f1_macro'"):
        judge(summary, {"f1_marco": 0.5})


def test_the_command_ends_with_3_when_an_engine_lost_accuracy(tmp_path, capsys):
    for name, how in (("before", {}), ("after", {"engine": 1, "skill": 0.6})):
        write(tmp_path / f"{name}.jsonl", *evaluations.result("options", 200, **how))
    measure = ["evaluate", "measure", str(tmp_path / "after.jsonl"), "--against", str(tmp_path / "before.jsonl")]
    outputs = [word for form in ("html", "csv", "json") for word in (f"--{form}", str(tmp_path / f"out.{form}"))]
    with pytest.raises(SystemExit) as ended:
        main([*measure, *outputs], standalone_mode=False)
    said = capsys.readouterr()
    assert (
        ended.value.code == EXIT_NOT_AS_ASKED
        and "against paper: worse" in said.out
        and "never for diagnosis" in said.err
    )
    assert json.loads((tmp_path / "out.json").read_text())["comparison"]["verdict"] == "worse"
    assert "secret-study" not in "".join((tmp_path / f"out.{form}").read_text() for form in ("html", "csv", "json"))
    assert main([*measure[:3], "--json", "-"], standalone_mode=False) is None
    said = capsys.readouterr()
    assert json.loads(said.out)["comparison"] is None and "Right answers: 0." in said.err
