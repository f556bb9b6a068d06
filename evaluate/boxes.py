"""Measures of boxes: overlap, precision and recall, and average precision as COCO computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxr_triton.evaluate.intervals import Floats, Resamples, ratio
from cxr_triton.rewards import box_iou

THRESHOLDS = (0.3, 0.5)
"""Overlaps from which on a box is a hit."""
_RECALLS = np.linspace(0, 1, 101)  # where COCO reads precision


class Placed(NamedTuple):
    """A box: what it is of, corners x1, y1, x2, y2, how sure whoever placed it is, and on which image of its row."""

    label: str
    corners: tuple[float, float, float, float]
    score: float | None = None
    image: int = 0


Images = Sequence[Sequence[Placed]]
"""Boxes, row by row."""


def overlaps(truth: Images, said: Images) -> Floats:
    """``box_iou`` of each row, (rows,): intersection over union of the best pairs of one label, over all boxes.

    A box without a partner counts 0; a row without a box is not a number.
    """
    return np.array([_overlap(true, placed) for true, placed in zip(truth, said, strict=True)])


def _overlap(truth: Sequence[Placed], said: Sequence[Placed]) -> float:
    from scipy.optimize import linear_sum_assignment

    found, boxes = 0.0, 0
    for place in {_place(box) for box in (*truth, *said)}:
        table = _table(*([box for box in each if _place(box) == place] for each in (truth, said)))
        found += table[linear_sum_assignment(table, maximize=True)].sum()
        boxes += max(table.shape)
    return found / boxes if boxes else np.nan


def hits(truth: Images, said: Images, threshold: float) -> list[list[bool]]:
    """Of each box that was said, whether it is a hit, as in COCO: surest first, each takes the best that is left."""
    return [_hits(true, placed, threshold) for true, placed in zip(truth, said, strict=True)]


def _hits(truth: Sequence[Placed], said: Sequence[Placed], threshold: float) -> list[bool]:
    found = [False] * len(said)
    for place in {_place(box) for box in said}:
        left = [box for box in truth if _place(box) == place]
        for i in sorted((i for i, box in enumerate(said) if _place(box) == place), key=lambda i: -_score(said[i])):
            best = max(reversed(left), key=lambda box: box_iou(said[i].corners, box.corners), default=None)
            if best is not None and box_iou(said[i].corners, best.corners) >= threshold:
                found[i] = True
                left.remove(best)
    return found


def counted(truth: Images, said: Images, found: Sequence[Sequence[bool]], resamples: Resamples) -> dict[str, Floats]:
    """``precision``, ``recall`` and ``f1`` of the boxes of all labels together, out of `hits`; (1 + count,) each."""
    rows = [(sum(hit), len(placed), len(true)) for true, placed, hit in zip(truth, said, found, strict=True)]
    hit, placed, true = resamples.sums(np.array(rows, np.float64).reshape(-1, 3)).T
    return {"precision": ratio(hit, placed), "recall": ratio(hit, true), "f1": ratio(2 * hit, placed + true)}


def average_precision(
    label: str, truth: Images, said: Images, found: Sequence[Sequence[bool]], resamples: Resamples
) -> Floats:
    """COCO's average precision of a label's boxes, (1 + count,); not a number without one in truth.

    Boxes of one score count together. Those without a score all have the same: the curve is one point then, and its
    average precision the precision there, up to the recall there.

    Parameters
    ----------
    label : str
    truth, said, found, resamples
        The boxes, and what `hits` says of them.
    """
    rows, scores, hit = (np.array(column) for column in _column(label, said, found))
    true = np.array([[sum(box.label == label for box in boxes)] for boxes in truth], np.float64)
    values = np.full(1 + resamples.count, np.nan)
    positives = resamples.sums(true)[:, 0]
    values[positives > 0] = 0.0
    if not len(rows) or not true.any():
        return values
    order = np.argsort(-scores, kind="stable")
    rows, scores, hit = rows[order].astype(np.intp), scores[order], hit[order].astype(bool)
    starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
    for part, weights in resamples.weights(rows):
        right = np.cumsum(np.add.reduceat(weights * hit[:, None], starts, axis=0), axis=0)
        precision = ratio(right, np.cumsum(np.add.reduceat(weights, starts, axis=0), axis=0))
        recall = ratio(right, positives[part])
        for i in np.flatnonzero(positives[part] > 0):
            values[part.start + i] = _interpolated(recall[:, i], np.nan_to_num(precision[:, i]))
    return values


def _column(label: str, said: Images, found: Sequence[Sequence[bool]]) -> tuple[list, list, list]:
    """Row, score and hit of each box of a label."""
    boxes = [
        (row, _score(box), hit)
        for row, (placed, hits_of_row) in enumerate(zip(said, found, strict=True))
        for box, hit in zip(placed, hits_of_row, strict=True)
        if box.label == label
    ]
    return [row for row, _, _ in boxes], [score for _, score, _ in boxes], [hit for _, _, hit in boxes]


def _interpolated(recall: Floats, precision: Floats) -> float:
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.append(highest, 0.0)[place].mean())


def _place(box: Placed) -> tuple[int, str]:
    return box.image, box.label


def _score(box: Placed) -> float:
    return 1.0 if box.score is None else box.score


def _table(truth: Sequence[Placed], said: Sequence[Placed]) -> NDArray[np.float64]:
    return np.array([[box_iou(a.corners, b.corners) for b in said] for a in truth]).reshape(len(truth), len(said))
