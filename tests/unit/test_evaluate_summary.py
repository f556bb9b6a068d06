"""A result's table: what counts, what is left out, and that the JSON and the CSV are what they say."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import evaluations
import numpy as np
import pytest

pytest.importorskip("sklearn")

from jsonschema import Draft202012Validator
from sklearn import metrics

from cxr_triton.evaluate import run
from cxr_triton.evaluate.compare import compare
from cxr_triton.evaluate.intervals import Resamples
from cxr_triton.evaluate.kinds import NOT_ASKED, Columns
from cxr_triton.evaluate.rows import KINDS, Answer, Box, Truth
from cxr_triton.evaluate.summary import summarize, to_csv
from cxr_triton.evaluate.terms import TERMS, meaning, title

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = Draft202012Validator(json.loads((ROOT / "docs" / "evaluation.schema.json").read_text()))


def columns(kind="labels", studies=120, **how) -> Columns:
    return Columns(*evaluations.result(kind, studies, **how))


@pytest.mark.parametrize(("kind", "studies"), [(kind, 60) for kind in KINDS] + [("labels", 1)])
def test_a_summary_is_what_the_schema_describes(kind, studies):
    ours, theirs = columns(kind, studies), columns(kind, studies, engine=1)
    summary = summarize(ours, count=50) | {"comparison": compare(theirs, ours, count=50)}
    SCHEMA.validate(json.loads(json.dumps(summary, allow_nan=False)))
    named = summarize(ours, count=50, identifiers=True)
    SCHEMA.validate(json.loads(json.dumps(named | {"comparison": None}, allow_nan=False)))
    with pytest.raises(Exception, match="own_measures"):
        SCHEMA.validate(summary | {"own_measures": 1})


def test_the_table_is_scikit_learns_with_what_was_not_read_as_not_said():
    result = columns(broken=0.3)
    summary = summarize(result, count=20)
    sets = result.kind.sets
    assert summary["studies"]["failed"] > 5 and {code["code"] for code in summary["codes"]} == {
        "INVALID_IMAGE",
        "truncated",
    }
    for i, entry in enumerate(summary["labels"]):
        known = sets.known[:, i]
        truth, said = sets.truth[known, i], sets.said[known, i]
        values = {name: estimate["value"] for name, estimate in entry["measures"].items()}
        assert values["recall"] == pytest.approx(metrics.recall_score(truth, said))
        assert values["precision"] == pytest.approx(metrics.precision_score(truth, said))
        assert (entry["tn"], entry["fp"], entry["fn"], entry["tp"]) == tuple(
            metrics.confusion_matrix(truth, said).ravel()
        )
        scored = known & np.isfinite(result.kind.scores[:, i])
        expected = metrics.roc_auc_score(sets.truth[scored, i], result.kind.scores[scored, i])
        assert values["auroc"] == pytest.approx(expected)
    right = [
        row.answer is not None
        and row.answer.labels is not None
        and all(value in (None, row.answer.labels[label]) for label, value in row.truth.labels.items())
        for row in result.rows
    ]
    assert summary["measures"]["exact_match"]["value"] == pytest.approx(np.mean(right))


def test_studies_without_a_picture_or_truth_count_nowhere():
    assert set(NOT_ASKED) == {run.MISSING_FILE, run.BAD_TRUTH}
    header, rows = evaluations.result(studies=60, broken=0)
    kept = summarize(Columns(header, rows), count=30)
    gone = [
        dataclasses.replace(row, number=60 + i, study=f"gone-{i}", answer=None, status="error", code=code)
        for i, (row, code) in enumerate(zip(rows, ("MISSING_FILE", "BAD_TRUTH"), strict=False))
    ]
    summary = summarize(Columns(header, [*rows, *gone]), count=30)
    assert summary["studies"] == kept["studies"] | {"all": 62}
    assert {code["code"]: code["share"] for code in summary["codes"]} == {"MISSING_FILE": None, "BAD_TRUTH": None}
    for part in ("confusion", "curves", "worst"):
        assert summary[part] == kept[part]
    assert [entry["tp"] for entry in summary["labels"]] == [entry["tp"] for entry in kept["labels"]]
    values = [{name: each["value"] for name, each in one["measures"].items()} for one in (kept, summary)]
    assert values[0] == pytest.approx(values[1])


def test_without_scores_nothing_is_said_of_ranking_or_calibration():
    for kind, names in (("labels", {"auroc_macro", "ece_macro"}), ("options", {"ece", "brier"})):
        with_scores, without = (summarize(columns(kind, scores=scores), count=10) for scores in (True, False))
        assert names <= with_scores["measures"].keys() and not names & without["measures"].keys()
        assert with_scores["calibration"] and without["calibration"] == [] and without["curves"] == []


def test_a_subgroup_is_measured_as_a_result_of_its_own():
    result = columns(studies=150)
    summary = summarize(result, count=20)
    told = {(entry["group"], entry["value"]): entry for entry in summary["groups"]}
    assert told.keys() == {(name, value) for name, values in evaluations.GROUPS.items() for value in values}
    for (group, value), entry in told.items():
        alone = [row for row in result.rows if row.groups[group] == value]
        expected = Columns(result.header, alone).measured(Resamples([row.patient for row in alone], 0))
        assert entry["studies"] == len(alone) and entry["patients"] == len({row.patient for row in alone})
        values = {name: estimate["value"] for name, estimate in entry["measures"].items()}
        assert values == pytest.approx({name: each[0] for name, each in expected.overall.items()})
        for name in ("recall", "auroc"):
            ours = [label["measures"][name]["value"] for label in entry["labels"]]
            assert ours == pytest.approx(expected.each[name][0].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_worst_cases_are_wrong_ones_and_name_nobody_unless_asked(kind):
    result = columns(kind, skill=0.6, broken=0.2)
    summary = summarize(result, count=10)
    cases = summary["worst"]
    rightness = [case["rightness"] for case in cases]
    assert len(cases) == 12 and max(rightness) < 1 and {case["code"] for case in cases} <= {"", "truncated"}
    whole = [case["rightness"] for case in cases if not case["code"]]
    assert whole == sorted(whole) and rightness[: len(whole)] == whole
    words = json.dumps(summary)
    assert not any(row.study in words or row.patient in words for row in result.rows)
    assert kind != "report" or not any(row.truth.text in words for row in result.rows)
    named = summarize(result, count=10, identifiers=True)["worst"]
    assert [(case["study"], case["patient"]) for case in named] == [
        (result.rows[case["number"]].study, result.rows[case["number"]].patient) for case in cases
    ]


def test_the_csv_holds_every_estimate_of_the_table():
    summary = summarize(columns(), count=30)
    rows = list(csv.DictReader(io.StringIO(to_csv(summary))))
    for part in ({"group": "", "value": ""} | summary, *summary["groups"]):
        own = [row for row in rows if (row["group"], row["value"]) == (part["group"], part["value"])]
        for label, measures in [("", part["measures"])] + [(e["label"], e["measures"]) for e in part["labels"]]:
            found = {row["measure"]: row for row in own if row["label"] == label}
            for name, estimate in measures.items():
                cells = [float(found[name][key]) if found[name][key] else None for key in ("estimate", "low", "high")]
                assert cells == list(estimate.values())
    assert sum(row["measure"] == "code truncated" for row in rows) == 1


def test_boxes_take_the_name_that_was_asked_for_and_several_readers_are_one_truth():
    whole, near = (0.0, 0.0, 100.0, 100.0), (5.0, 0.0, 105.0, 100.0)
    drawn = tuple(Box(label="Nodule/Mass", corners=box, reader=reader) for box, reader in ((whole, "R1"), (near, "R2")))
    far = Box(label="Nodule/Mass", corners=(300.0, 300.0, 350.0, 350.0), reader="R2")
    header, (row,) = evaluations.result("boxes", 1, broken=0)
    said = Answer(boxes=(Box(label="nodule", corners=(2.0, 0.0, 102.0, 100.0)),))
    kind = Columns(header, [dataclasses.replace(row, truth=Truth(boxes=(*drawn, far)), answer=said)]).kind
    assert [(box.label, box.corners) for box in kind.truth[0]] == [
        ("Nodule/Mass", (2.5, 0.0, 102.5, 100.0)),
        ("Nodule/Mass", far.corners),
    ]
    assert [box.label for box in kind.placed[0]] == ["Nodule/Mass"] and 0.45 < kind.rightness[0] < 0.5
    several = Truth(boxes=(Box(label="Edema", corners=whole), Box(label="Fracture", corners=far.corners)))
    kind = Columns(
        header, [dataclasses.replace(row, truth=several, answer=Answer(boxes=(Box(label="edema", corners=whole),)))]
    ).kind
    assert kind.placed[0][0].label == "Edema" and kind.rightness[0] == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_every_measure_has_a_name_and_a_meaning(kind):
    summary = summarize(columns(kind), count=5)
    names = {*summary["measures"], *(name for entry in summary["labels"] for name in entry["measures"])}
    assert all(title(name) != name and meaning(name) for name in names)
    assert (
        title("rouge_2") == "rouge_2"
        and meaning("green_30") == ""
        and len({name for name, _ in TERMS.values()}) == len(TERMS)
    )


def test_the_guide_says_what_every_measure_is():
    guide = (ROOT / "docs" / "measures.md").read_text()
    assert [name for name in TERMS if not re.search(rf"`{name}(_30)?`", guide)] == []
