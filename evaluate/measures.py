"""Measures of labels, options and scores, each for all resamples at once; terms and edge cases are scikit-learn's.

A result has one entry for the data as they are and one for every resample, see `cxr_triton.evaluate.intervals`.
Where a measure divides nothing by nothing it is not a number: scikit-learn's ``zero_division=nan``, so that a label
that no image has lowers no average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxr_triton.evaluate.intervals import Floats, Resamples, ratio

BINS = 10
"""Of a reliability diagram, of equal width."""
CURVE_POINTS = 200
"""Most points of a curve that is drawn."""


Scored = tuple[NDArray[np.bool_], Floats, NDArray[np.intp]]
"""Truth, scores, and which rows of the data set they are; all (n,)."""


@dataclass(frozen=True)
class LabelSets:
    """What is true and what was said of labels, row by row.

    Attributes
    ----------
    truth, said : (rows, labels) bool
    known : (rows, labels) bool
        Where the truth is known; a label counts nowhere else.
    answered : (rows, labels) bool
        Whether the answer says anything of the label. One that is malformed or was cut off does not: it counts as not
        said, and its row's set as wrong.
    """

    truth: NDArray[np.bool_]
    said: NDArray[np.bool_]
    known: NDArray[np.bool_]
    answered: NDArray[np.bool_]

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Rows of which a label is known, (rows,)."""
        return self.known.any(axis=1)

    def only(self, rows: NDArray[np.bool_]) -> LabelSets:
        """The same where other rows count nowhere."""
        return LabelSets(self.truth, self.said, self.known & rows[:, None], self.answered)


def outcomes(sets: LabelSets) -> dict[str, NDArray[np.bool_]]:
    """True and false positives and negatives, (rows, labels) each."""
    truth, said, known = sets.truth, sets.said, sets.known
    return {
        "tp": truth & said & known,
        "fp": ~truth & said & known,
        "fn": truth & ~said & known,
        "tn": ~truth & ~said & known,
    }


def counted(sets: LabelSets, resamples: Resamples) -> dict[str, Floats]:
    """Weighted `outcomes`, (1 + count, labels) each."""
    found = outcomes(sets)
    sums = resamples.sums(np.concatenate(list(found.values()), axis=1))
    return dict(zip(found, np.split(sums, len(found), axis=1), strict=True))


def per_label(counts: Mapping[str, Floats]) -> dict[str, Floats]:
    """Measures of each label out of `counted`, (1 + count, labels) each."""
    tp, fp, fn, tn = (counts[name] for name in ("tp", "fp", "fn", "tn"))
    return {
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "prevalence": ratio(tp + fn, tp + fn + fp + tn),
    }


def averages(counts: Mapping[str, Floats]) -> dict[str, Floats]:
    """``precision_macro`` and its like out of `counted`, (1 + count,) each.

    ``macro`` is the mean over labels, ``weighted`` the same by their support, ``micro`` is of all labels' counts
    together.
    """
    support = counts["tp"] + counts["fn"]
    summed = per_label({name: each.sum(axis=1, keepdims=True) for name, each in counts.items()})
    found = {}
    for name, values in per_label(counts).items():
        if name != "prevalence":
            found[f"{name}_macro"] = mean_of_known(values)
            found[f"{name}_micro"] = summed[name][:, 0]
            found[f"{name}_weighted"] = mean_of_known(values, support)
    return found


def mean_of_known(values: Floats, weights: Floats | None = None) -> Floats:
    """Means over the last axis of what is a number, by weights where they are not all 0."""
    known = np.isfinite(values)
    even = known.astype(np.float64)
    weights = even if weights is None else np.where(known, weights, 0.0)
    weights = np.where(weights.sum(axis=-1, keepdims=True) > 0, weights, even)
    return ratio((np.where(known, values, 0.0) * weights).sum(axis=-1), weights.sum(axis=-1))


def set_measures(sets: LabelSets) -> dict[str, Floats]:
    """``exact_match`` and ``label_iou`` of every row's set, (rows,) each; two empty sets are the same.

    A label that the answer says nothing of is one on which both differ.
    """
    truth, said, silent = sets.truth & sets.known, sets.said & sets.known, ~sets.answered & sets.known
    both, either = (truth & said & ~silent).sum(axis=1), (truth | said | silent).sum(axis=1)
    return {
        "exact_match": (both == either).astype(np.float64),
        "label_iou": np.where(either > 0, both / np.maximum(either, 1), 1.0),
    }


def basis(sets: LabelSets, measure: str, label: int) -> NDArray[np.bool_]:
    """Rows that a measure of a label divides by, (rows,); of a ranking those of the class that has fewer."""
    truth, said, known = (columns[:, label] for columns in (sets.truth, sets.said, sets.known))
    if measure in ("auroc", "average_precision"):
        rarer = truth if (truth & known).sum() <= (~truth & known).sum() else ~truth
        return rarer & known
    divided = {"precision": said, "recall": truth, "specificity": ~truth, "f1": truth | said}
    return divided.get(measure, known) & known


def ranking(
    truth: NDArray[np.bool_], scores: Floats, rows: NDArray[np.intp], resamples: Resamples
) -> dict[str, Floats]:
    """``auroc`` and ``average_precision`` of scores, (1 + count,) each; not a number where a class is missing.

    Parameters
    ----------
    truth, scores : (n,)
        Of the `rows` that have both.
    rows : (n,) int
        Which rows of the data set they are.
    resamples : Resamples
    """
    found = {name: np.full(1 + resamples.count, np.nan) for name in ("auroc", "average_precision")}
    if not truth.any() or truth.all():
        return found
    order = np.argsort(-scores, kind="stable")
    truth, rows = truth[order], rows[order]
    ends = _ends(truth, scores[order])
    for part, weights in resamples.weights(rows):
        hits = np.cumsum(weights * truth[:, None], axis=0)[ends]
        seen = np.cumsum(weights, axis=0, out=weights)[ends]
        positive, negative = (np.diff(each, axis=0, prepend=0) for each in (hits, seen - hits))
        positives, negatives = hits[-1].astype(np.float64), (seen - hits)[-1].astype(np.float64)
        over = np.einsum("ij,ij->j", negative, hits - 0.5 * positive)
        precision = np.divide(hits, np.maximum(seen, 1))
        found["auroc"][part] = ratio(over, positives * negatives)
        found["average_precision"][part] = ratio(np.einsum("ij,ij->j", positive, precision), positives)
    return found


def _ends(truth: NDArray[np.bool_], scores: Floats) -> NDArray[np.intp]:
    """Last rows of what stands together when sorted: equal scores, and negatives with no positive between them."""
    first = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
    has_positive = np.logical_or.reduceat(truth, first)
    starts = first[np.r_[True, has_positive[1:] | has_positive[:-1]]]
    return np.r_[starts[1:] - 1, len(truth) - 1]


def reliability(truth: NDArray[np.bool_], scores: Floats, rows: NDArray[np.intp], resamples: Resamples) -> dict:
    """Whether scores are probabilities.

    Parameters
    ----------
    truth, scores, rows, resamples
        As of `ranking`; scores are between 0 and 1.

    Returns
    -------
    dict
        ``ece`` and ``brier`` (1 + count,): the expected calibration error, which is the mean over rows of how far their
        bin's mean score lies from its share of true ones, and the mean square of score less truth. ``bins``: of each
        that holds a row its ``count``, mean ``score``, and share of true ones ``observed`` (1 + count,).
    """
    place = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], scores)
    columns = np.zeros((resamples.rows, 3 * BINS + 2))
    columns[rows, place] = 1
    columns[rows, BINS + place] = scores
    columns[rows, 2 * BINS + place] = truth
    columns[rows, -2] = (scores - truth) ** 2
    columns[rows, -1] = 1
    sums = resamples.sums(columns)
    count, score, true = (sums[:, i * BINS : (i + 1) * BINS] for i in range(3))
    bins = [
        {
            "count": int(count[0, i]),
            "score": float(score[0, i] / count[0, i]),
            "observed": ratio(true[:, i], count[:, i]),
        }
        for i in range(BINS)
        if count[0, i]
    ]
    return {
        "ece": ratio(np.abs(score - true).sum(axis=1), sums[:, -1]),
        "brier": ratio(sums[:, -2], sums[:, -1]),
        "bins": bins,
    }


def curves(truth: NDArray[np.bool_], scores: Floats) -> dict[str, list[list[float]]] | None:
    """Points of the curves ``roc`` (false positive rate, recall) and ``precision_recall`` (recall, precision).

    None where a class is missing.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    if not truth.any() or truth.all():
        return None
    alarms, hits, _ = roc_curve(truth, scores)
    precision, recall, _ = precision_recall_curve(truth, scores, drop_intermediate=True)
    return {"roc": _thinned(alarms, hits), "precision_recall": _thinned(recall[::-1], precision[::-1])}


def _thinned(x: Floats, y: Floats) -> list[list[float]]:
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), CURVE_POINTS)).round().astype(int))
    return [[round(float(x[i]), 5), round(float(y[i]), 5)] for i in chosen]


def confusion(sets: LabelSets) -> NDArray[np.int_]:
    """How labels are mistaken for each other, (labels, labels) counts of rows.

    On the diagonal the label was right. Beside it, the row's label was missed and the column's was said, which is
    not there.
    """
    found = outcomes(sets)
    missed, false = found["fn"].astype(np.int_), found["fp"].astype(np.int_)
    return np.diag(found["tp"].sum(axis=0)) + missed.T @ false
