"""A result as a table of measures with intervals: the JSON of docs/evaluation.schema.json, and its CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from cxr_triton.evaluate import measures
from cxr_triton.evaluate.intervals import LEVEL, RESAMPLES, Floats, Resamples, interval
from cxr_triton.evaluate.kinds import Columns, Labels, Measured, Options, Rows
from cxr_triton.evaluate.rows import Row

SCHEMA_VERSION = 1
GROUP_VALUES = 20
"""Most values of a group that are told apart, the most frequent ones."""
WORST = 12
"""Cases that a page shows."""
NO_ANSWER = ("malformed", "truncated")
"""Codes of answers that are not whole."""
COUNTS = ("tp", "fp", "fn", "tn")

Estimate = dict[str, float | None]


def summarize(columns: Columns, *, count: int = RESAMPLES, seed: int = 0, identifiers: bool = False) -> dict[str, Any]:
    """The table of a result.

    Parameters
    ----------
    columns : Columns
    count, seed : int
        Of the resamples.
    identifiers : bool
        Name the studies and patients of the worst cases, as the data set does, and quote their reports.

    Returns
    -------
    dict
        As docs/evaluation.schema.json describes it.
    """
    header, resamples = columns.header, Resamples(columns.patients, count, seed)
    measured = columns.measured(resamples)
    return {
        "schema_version": SCHEMA_VERSION,
        "notice": header.notice,
        "result": result_facts(columns),
        "bootstrap": {"level": LEVEL, "resamples": count, "seed": seed, "unit": "patient"},
        "studies": _studies(columns, resamples),
        "codes": _codes(columns, resamples),
        "measures": estimates(measured, columns, resamples),
        "labels": _labels(measured, columns, resamples, columns.asked),
        "confusion": _confusion(columns),
        "curves": _curves(columns),
        "calibration": list(_calibration(columns, resamples)),
        "groups": list(_groups(columns, resamples)),
        "worst": [_case(columns, i, identifiers) for i in worst(columns)],
    }


def result_facts(columns: Columns) -> dict[str, Any]:
    """What a result is of: data, question, model."""
    header = columns.header
    names = ("kind", "data", "labels", "uncertain", "blank", "readers", "request", "seed", "model", "versions")
    return {name: _listed(getattr(header, name)) for name in names}


def estimates(measured: Measured, columns: Columns, resamples: Resamples) -> dict[str, Estimate]:
    """Value and interval of each overall measure."""

    def patients(name: str) -> Callable[[], int]:
        return lambda: resamples.patients_of(columns.kind.basis(name) & columns.asked)

    return {name: interval(values, patients(name)) for name, values in measured.overall.items()}


def worst(columns: Columns, count: int = WORST) -> list[int]:
    """Places of the rows that were answered most wrongly, the worst first; then those without a whole answer."""
    right = np.where(columns.asked & ~columns.failed, columns.kind.rightness, np.nan)
    order = np.lexsort((np.arange(len(right)), -_mistakes(columns), right, np.isin(columns.codes, NO_ANSWER)))
    return [int(i) for i in order if right[i] < 1][:count]


def _mistakes(columns: Columns) -> Floats:
    """How many labels are wrong, which tells rows apart that are equally right."""
    if not isinstance(columns.kind, Labels):
        return np.zeros(len(columns.rows))
    sets = columns.kind.sets
    return ((sets.truth != sets.said) & sets.known).sum(axis=1).astype(np.float64)


def _studies(columns: Columns, resamples: Resamples) -> dict[str, int]:
    return {
        "all": len(columns.rows),
        "asked": int(columns.asked.sum()),
        "failed": int((columns.failed & columns.asked).sum()),
        "patients": resamples.patients_of(columns.asked),
    }


def _codes(columns: Columns, resamples: Resamples) -> list[dict[str, Any]]:
    """What was wrong with answers, and with how many."""
    counts = Counter(columns.codes.tolist())
    return [
        {
            "code": code,
            "studies": number,
            "share": interval(
                resamples.mean(columns.codes == code, columns.asked), lambda: resamples.patients_of(columns.asked)
            )
            if (columns.asked & (columns.codes == code)).any()
            else None,
        }
        for code, number in counts.most_common()
        if code
    ]


def _labels(measured: Measured, columns: Columns, resamples: Resamples, rows: Rows) -> list[dict[str, Any]]:
    return [{"label": name, **_label(measured, columns, resamples, rows, i)} for i, name in enumerate(measured.labels)]


def _label(measured: Measured, columns: Columns, resamples: Resamples, rows: Rows, i: int) -> dict[str, Any]:
    def patients(name: str) -> Callable[[], int]:
        return lambda: resamples.patients_of(columns.kind.basis(name, i) & rows)

    told: dict[str, Any] = {}
    if "tp" in measured.each:
        found = {name: round(float(measured.each[name][0, i])) for name in COUNTS}
        told = {"support": found["tp"] + found["fn"], "said": found["tp"] + found["fp"], **found}
    names = [name for name in measured.each if name not in COUNTS]
    return told | {"measures": {name: interval(measured.each[name][:, i], patients(name)) for name in names}}


def _confusion(columns: Columns) -> list[list[int]] | None:
    if not isinstance(columns.kind, Labels):
        return None
    return measures.confusion(columns.kind.sets.only(columns.asked)).tolist()


def _curves(columns: Columns) -> list[dict[str, Any]]:
    if not isinstance(columns.kind, Labels):
        return []
    kind, sets = columns.kind, columns.kind.sets.only(columns.asked)
    found = {label: measures.curves(*kind.scored(i, sets)[:2]) for i, label in enumerate(kind.labels)}
    return [{"label": label, **points} for label, points in found.items() if points]


def _calibration(columns: Columns, resamples: Resamples) -> Iterator[dict[str, Any]]:
    for label, facts in _scored(columns):
        if facts[-1].size:
            sure = measures.reliability(*facts, resamples)
            bins = [entry | {"observed": interval(entry["observed"])} for entry in sure["bins"]]
            yield {"label": label, "scored": len(facts[-1]), "bins": bins}


def _scored(columns: Columns) -> Iterator[tuple[str | None, measures.Scored]]:
    kind = columns.kind
    if isinstance(kind, Options):
        yield None, kind.scored(columns.asked)
    if isinstance(kind, Labels):
        sets = kind.sets.only(columns.asked)
        for i, label in enumerate(kind.labels):
            yield label, kind.scored(i, sets)


def _groups(columns: Columns, resamples: Resamples) -> Iterator[dict[str, Any]]:
    for group, values in columns.groups.items():
        counted = Counter(value for value, asked in zip(values, columns.asked, strict=True) if asked and value)
        for value, number in counted.most_common(GROUP_VALUES):
            rows = columns.asked & np.array([each == value for each in values])
            measured = columns.measured(resamples, rows)
            yield {
                "group": group,
                "value": value,
                "studies": number,
                "patients": resamples.patients_of(rows),
                "measures": estimates(measured, columns, resamples),
                "labels": _labels(measured, columns, resamples, rows),
            }


def _case(columns: Columns, place: int, identifiers: bool) -> dict[str, Any]:
    row = columns.rows[place]
    told: dict[str, Any] = {"number": row.number, "rightness": float(columns.kind.rightness[place]), "code": row.code}
    if identifiers or row.kind != "report":  # what somebody wrote of a patient may name one
        told |= {"truth": known(row), "said": said(row)}
    return told | ({"study": row.study, "patient": row.patient} if identifiers else {})


def known(row: Row) -> list[str]:
    """What is true of a study, in words."""
    truth = row.truth
    if row.kind == "labels":
        return [label for label, value in truth.labels.items() if value]
    if row.kind == "boxes":
        return [_placed(box) for box in truth.boxes]
    return list(truth.options) if row.kind == "options" else [truth.text or ""]


def said(row: Row) -> list[str] | None:
    """What an engine says of a study, in words; None where it gave no answer."""
    answer = row.answer
    if answer is None or (row.kind == "labels" and answer.labels is None):
        return None
    if row.kind == "labels":
        return [label for label, value in (answer.labels or {}).items() if value] + list(answer.unknown_labels)
    if row.kind == "boxes":
        return [_placed(box) for box in answer.boxes]
    if row.kind == "options":
        return list(answer.options) or None
    return [answer.text] if answer.text else None


def _placed(box: Any) -> str:
    return f"{box.label or 'unnamed'} at {', '.join(f'{value:.0f}' for value in box.corners)} {box.unit}"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def to_csv(summary: Mapping[str, Any]) -> str:
    """One row for each measure of all studies, of each label, and of each group."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "value", "label", "measure", "studies", "estimate", "low", "high"])
    everything = {"group": "", "value": "", "studies": summary["studies"]["asked"]}
    for part in (everything | {key: summary[key] for key in ("measures", "labels")}, *summary["groups"]):
        whose = [part["group"], part["value"]]
        for name, estimate in part["measures"].items():
            writer.writerow([*whose, "", name, part["studies"], *_cells(estimate)])
        for label in part["labels"]:
            for name in ("support", "said", *COUNTS):
                if name in label:
                    writer.writerow([*whose, label["label"], name, part["studies"], label[name], "", ""])
            for name, estimate in label["measures"].items():
                writer.writerow([*whose, label["label"], name, part["studies"], *_cells(estimate)])
    for code in summary["codes"]:
        writer.writerow(["", "", "", f"code {code['code']}", code["studies"], *_cells(code["share"] or {})])
    return out.getvalue()


def _cells(estimate: Mapping[str, float | None]) -> list[float | None]:
    return [estimate.get(key) for key in ("value", "low", "high")]
