"""Two engines on the same studies, held against each other, and whether an engine is accurate enough to be packaged.

Differences are paired: every resample of the patients is measured for both engines. A measure is `worse` where its
difference is over the margin and the paired bootstrap finds it unlikely without a loss (two-sided p, corrected by Holm
for the number of measures that decide); `no worse` where even the low end of its interval is within the margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cxr_triton.errors import InvalidRequest, unknown_key
from cxr_triton.evaluate.intervals import LEVEL, Floats, Resamples, interval
from cxr_triton.evaluate.kinds import Columns, Labels
from cxr_triton.evaluate.summary import result_facts

ALPHA = 0.05
MARGIN = 0.02
"""Loss of a measure between 0 and 1 that is put up with."""
RESAMPLES = 2000
PARTED = 200
"""Most studies that are listed on which both part."""
LOWER_IS_BETTER = ("ece", "brier")
"""Beginnings of the names of measures of which less is better."""


def compare(
    a: Columns, b: Columns, *, margin: float = MARGIN, alpha: float = ALPHA, count: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Whether `b` is less accurate than `a`.

    Parameters
    ----------
    a, b : Columns
        Of results on the same data.
    margin : float
        Loss that is put up with.
    alpha : float
        Probability of calling any measure worse or better when nothing changed.
    count, seed : int
        Of the resamples.

    Returns
    -------
    dict
        As ``comparison`` of docs/evaluation.schema.json: ``verdict`` (``worse`` if any measure that decides is, ``no
        worse`` if all are within the margin, else ``not shown``), ``measures``, ``labels``, ``parted``.

    Raises
    ------
    InvalidRequest
        The results are of other data, or of another kind of question.
    """
    _require_same(a, b)
    resamples, rows = Resamples(a.patients, count, seed), a.asked & b.asked
    ours, theirs = (columns.measured(resamples, rows) for columns in (a, b))
    common = [name for name in ours.overall if name in theirs.overall]
    told = [_difference(name, ours.overall[name], theirs.overall[name]) for name in common]
    decides = [entry for entry in told if entry["measure"] in a.kind.decides]
    _correct(decides)
    for entry in decides:
        entry["verdict"] = _verdict(entry, margin, alpha)
    return {
        "a": result_facts(a),
        "b": result_facts(b),
        "margin": margin,
        "alpha": alpha,
        "bootstrap": {"level": LEVEL, "resamples": count, "seed": seed, "unit": "patient"},
        "studies": int(rows.sum()),
        "patients": resamples.patients_of(rows),
        "verdict": _overall([entry["verdict"] for entry in decides]),
        "measures": told,
        "labels": _labels(a, b, resamples, rows),
        "parted": parted(a, b, rows),
    }


def _require_same(a: Columns, b: Columns) -> None:
    if a.header.kind != b.header.kind:
        raise InvalidRequest(f"the results are of {a.header.kind} and of {b.header.kind}; compare two of one kind")
    for name in ("data", "labels", "uncertain", "blank", "readers"):
        ours, theirs = (getattr(columns.header, name) for columns in (a, b))
        if name == "data":
            ours, theirs = ours["digest"], theirs["digest"]
        if ours != theirs:
            what = "studies or truth" if name == "data" else name
            raise InvalidRequest(
                f"the results are of other {what}: {ours} and {theirs}; evaluate both on the same data"
            )
    if [row.study for row in a.rows] != [row.study for row in b.rows]:
        raise InvalidRequest("the results have other rows, though their data have one digest; evaluate both again")


def _difference(name: str, a: Floats, b: Floats) -> dict[str, Any]:
    return {
        "measure": name,
        "a": interval(a)["value"],
        "b": interval(b)["value"],
        "difference": interval(b - a),
        "p": _p(b - a),
        "decides": False,
        "verdict": None,
    }


def _p(differences: Floats) -> float | None:
    """Two-sided, of a difference: how often the resamples lie on the other side of 0, or on it."""
    known = differences[1:][np.isfinite(differences[1:])]
    if not len(known) or not np.isfinite(differences[0]):
        return None
    beyond = min((known >= 0).sum(), (known <= 0).sum())
    return float(min(1.0, 2 * (1 + beyond) / (1 + len(known))))


def _correct(entries: Sequence[dict[str, Any]]) -> None:
    """Holm's correction of ``p`` for their number, as ``p_corrected``."""
    least, known = 0.0, sorted((entry for entry in entries if entry["p"] is not None), key=lambda entry: entry["p"])
    for entry in entries:
        entry["p_corrected"] = None
    for rank, entry in enumerate(known):
        least = max(least, min(1.0, entry["p"] * (len(known) - rank)))
        entry["p_corrected"] = least


def _verdict(entry: dict[str, Any], margin: float, alpha: float) -> str:
    """Of a measure of which more is better."""
    entry["decides"] = True
    change, p = entry["difference"], entry["p_corrected"]
    if change["value"] is None or p is None:
        return "not shown"
    if p < alpha and abs(change["value"]) > margin:
        return "worse" if change["value"] < 0 else "better"
    return "no worse" if change["low"] is not None and change["low"] >= -margin else "not shown"


def _overall(verdicts: Sequence[str]) -> str:
    if "worse" in verdicts:
        return "worse"
    return "no worse" if verdicts and set(verdicts) <= {"no worse", "better"} else "not shown"


def _labels(a: Columns, b: Columns, resamples: Resamples, rows: np.ndarray) -> list[dict[str, Any]]:
    """McNemar's exact test of each label."""
    if not isinstance(a.kind, Labels) or not isinstance(b.kind, Labels):
        return []
    right = [
        (each.sets.said == each.sets.truth) & each.sets.answered & each.sets.known & rows[:, None]
        for each in (a.kind, b.kind)
    ]
    only = [right[0] & ~right[1], right[1] & ~right[0]]
    told: list[dict[str, Any]] = []
    for i, label in enumerate(a.kind.labels):
        ours, theirs = only[0][:, i], only[1][:, i]
        counts = {"label": label, "only_a": int(ours.sum()), "only_b": int(theirs.sum())}
        told.append(counts | {"p": mcnemar(ours, theirs, resamples)})
    _correct(told)
    return told


def mcnemar(only_a: np.ndarray, only_b: np.ndarray, resamples: Resamples) -> float:
    """Two-sided p of McNemar's exact test, over patients.

    Parameters
    ----------
    only_a, only_b : (rows,) bool
        Rows that one of both engines got right.
    resamples : Resamples
        Knows the patients. Whom one engine gets right on more rows than the other counts once for it, so that images of
        one patient do not pass for independent ones; with one row for each it is McNemar's test itself.
    """
    from scipy.stats import binomtest

    gained = resamples.by_patient(only_b[:, None].astype(np.float64) - only_a[:, None])[:, 0]
    better, worse = int((gained > 0).sum()), int((gained < 0).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def parted(a: Columns, b: Columns, rows: np.ndarray) -> dict[str, Any]:
    """Studies on which both say different things, those first on which one is most right where the other is not."""
    differs = np.array([x != y for x, y in zip(a.kind.said, b.kind.said, strict=True)]) & rows
    gained = np.nan_to_num(b.kind.rightness - a.kind.rightness)
    order = np.lexsort((np.arange(len(gained)), -np.abs(gained), ~differs))
    return {
        "studies": int(differs.sum()),
        "share": float(differs.sum() / rows.sum()) if rows.any() else None,
        "a_better": int((differs & (gained < 0)).sum()),
        "b_better": int((differs & (gained > 0)).sum()),
        "cases": [
            {
                "number": a.rows[i].number,
                "a": float(np.nan_to_num(a.kind.rightness[i])),
                "b": float(np.nan_to_num(b.kind.rightness[i])),
            }
            for i in order[: min(PARTED, int(differs.sum()))].tolist()
        ],
    }


def judge(
    summary: Mapping[str, Any], limits: Mapping[str, float], comparison: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Whether an engine is accurate enough to be packaged.

    Parameters
    ----------
    summary : mapping
        Of its result, as `cxr_triton.evaluate.summary.summarize` gives it.
    limits : mapping
        Name of a measure to the least value that it must have; the most, of those of which less is better.
    comparison : mapping, optional
        What `compare` says of the result that it must not be worse than, and of its own.

    Returns
    -------
    dict
        ``passed``, ``checks`` (``name``, ``value``, ``low``, ``high``, ``limit``, ``at_least``, ``passed``), and
        ``verdict`` of the comparison or None.

    Raises
    ------
    InvalidRequest
        A limit is of a measure that the result does not have.
    """
    checks = []
    for name, limit in limits.items():
        if name not in summary["measures"]:
            raise InvalidRequest(unknown_key(name, summary["measures"], "measures of the result"))
        at_least, estimate = not name.startswith(LOWER_IS_BETTER), summary["measures"][name]
        value = estimate["value"]
        passed = value is not None and (value >= limit if at_least else value <= limit)
        checks.append({"name": name, **estimate, "limit": limit, "at_least": at_least, "passed": passed})
    verdict = comparison["verdict"] if comparison else None
    passed = verdict != "worse" and all(check["passed"] for check in checks)
    return {"passed": passed, "verdict": verdict, "checks": checks}
