"""Rows of a result as columns, and what is measured of each kind: label sets, options, boxes, reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from cxr_triton.evaluate import boxes, measures, text
from cxr_triton.evaluate.intervals import Floats, Resamples
from cxr_triton.evaluate.measures import LabelSets, Scored
from cxr_triton.evaluate.rows import NOT_ASKED, Answer, Box, Header, Row
from cxr_triton.rewards import box_iou

Rows = NDArray[np.bool_]
"""Which rows count, (rows,)."""
SHARED = 0.5
"""Overlap from which on boxes of two readers are of one thing."""
UNNAMED = "unnamed"
"""Label of a box without one."""


@dataclass(frozen=True)
class Measured:
    """Measures over some rows, for all resamples.

    Attributes
    ----------
    overall : dict of str to (1 + count,)
    labels : tuple of str
    each : dict of str to (1 + count, labels)
        Measures of each label.
    """

    overall: dict[str, Floats]
    labels: tuple[str, ...] = ()
    each: dict[str, Floats] = field(default_factory=dict)


class Kind(ABC):
    """The columns of one kind of question.

    Attributes
    ----------
    decides : tuple of str
        Measures that say whether one engine is worse than another, the first one before all.
    """

    decides: tuple[str, ...]

    @abstractmethod
    def measured(self, resamples: Resamples, rows: Rows) -> Measured:
        """Every measure of the rows."""

    @abstractmethod
    def basis(self, measure: str, label: int | None = None) -> Rows:
        """Rows whose patients a measure stands on, of one label or of all."""

    @property
    @abstractmethod
    def rightness(self) -> Floats:
        """How right each row is, 0 to 1, (rows,); not a number where nothing is known."""

    @property
    @abstractmethod
    def said(self) -> Sequence[object]:
        """What each row says, to be held against what another engine says."""


class Labels(Kind):
    """Label sets, and scores of labels where there are any."""

    decides = ("f1_macro", "label_iou", "exact_match")

    def __init__(self, header: Header, rows: Sequence[Row]):
        self.labels = header.labels
        truth, said, scores = (np.full((len(rows), len(self.labels)), np.nan) for _ in range(3))
        for i, row in enumerate(rows):
            answer = row.answer or Answer()
            truth[i] = _by_label(row.truth.labels, self.labels)
            said[i] = _by_label(answer.labels or {}, self.labels)
            scores[i] = _by_label(answer.scores or {}, self.labels)
        self.sets = LabelSets(truth == 1, said == 1, np.isfinite(truth), np.isfinite(said))
        self.scores = scores

    def measured(self, resamples: Resamples, rows: Rows) -> Measured:
        sets = self.sets.only(rows)
        counts, of_sets = measures.counted(sets, resamples), measures.set_measures(sets)
        overall = {name: resamples.mean(values, sets.counted) for name, values in of_sets.items()}
        overall |= measures.averages(counts)
        each = counts | measures.per_label(counts)
        if np.isfinite(self.scores).any():
            each |= self._scored(sets, resamples)
            for name in ("auroc", "average_precision", "ece", "brier"):
                overall[f"{name}_macro"] = measures.mean_of_known(each[name])
        return Measured(overall, self.labels, each)

    def basis(self, measure: str, label: int | None = None) -> Rows:
        return self.sets.counted if label is None else measures.basis(self.sets, measure, label)

    @property
    def rightness(self) -> Floats:
        return np.where(self.sets.counted, measures.set_measures(self.sets)["label_iou"], np.nan)

    @property
    def said(self) -> Sequence[object]:
        return np.where(self.sets.known, np.where(self.sets.answered, self.sets.said, -1), 0).tolist()

    def scored(self, label: int, sets: LabelSets) -> Scored:
        """Truth and score of a label, and the rows that have both."""
        rows = np.flatnonzero(sets.known[:, label] & np.isfinite(self.scores[:, label]))
        return sets.truth[rows, label], self.scores[rows, label], rows

    def _scored(self, sets: LabelSets, resamples: Resamples) -> dict[str, Floats]:
        def of(label: int) -> dict[str, Floats]:
            facts = self.scored(label, sets)
            sure = measures.reliability(*facts, resamples)
            return measures.ranking(*facts, resamples) | {"ece": sure["ece"], "brier": sure["brier"]}

        with ThreadPoolExecutor() as pool:  # numpy sorts and sums without Python's lock
            found = list(pool.map(of, range(len(self.labels))))
        return {name: np.column_stack([each[name] for each in found]) for name in found[0]}


class Options(Kind):
    """Answers to closed questions."""

    decides = ("accuracy",)

    def __init__(self, header: Header, rows: Sequence[Row]):
        self.truth = [frozenset(row.truth.options) for row in rows]
        self._said = [frozenset(row.answer.options if row.answer else ()) for row in rows]
        sure = [_confidence(row.answer) for row in rows]
        self.scores = np.array(sure, np.float64)

    def measured(self, resamples: Resamples, rows: Rows) -> Measured:
        overall = {"accuracy": resamples.mean(self.rightness, rows)}
        if (facts := self.scored(rows))[-1].size:
            sure = measures.reliability(*facts, resamples)
            overall |= {"ece": sure["ece"], "brier": sure["brier"]}
        return Measured(overall)

    def basis(self, measure: str, label: int | None = None) -> Rows:
        return np.ones(len(self.truth), bool)

    @property
    def rightness(self) -> Floats:
        return np.array([float(a == b) for a, b in zip(self.truth, self._said, strict=True)])

    @property
    def said(self) -> Sequence[object]:
        return self._said

    def scored(self, rows: Rows) -> Scored:
        """Whether the answer is right and its score, and the rows that have one."""
        chosen = np.flatnonzero(rows & np.isfinite(self.scores))
        return self.rightness[chosen] == 1, self.scores[chosen], chosen


class Boxes(Kind):
    """Boxes of labels.

    Boxes that several readers drew around one thing are one. Whoever was asked of one label alone placed boxes of it,
    whatever the answer calls them.
    """

    decides = ("box_iou", "box_f1_50")

    def __init__(self, header: Header, rows: Sequence[Row]):
        self.truth = [_merged(row.truth.boxes) for row in rows]
        self.placed = [_named(row.answer, true) for row, true in zip(rows, self.truth, strict=True)]
        self.labels = tuple(sorted({box.label for placed in (*self.truth, *self.placed) for box in placed}))

    def measured(self, resamples: Resamples, rows: Rows) -> Measured:
        chosen = [[box for box in placed if keep] for placed, keep in zip(self.truth, rows, strict=True)]
        said = [[box for box in placed if keep] for placed, keep in zip(self.placed, rows, strict=True)]
        iou = boxes.overlaps(chosen, said)
        overall, each = {"box_iou": resamples.mean(iou, np.isfinite(iou))}, {}
        for threshold in boxes.THRESHOLDS:
            found, name = boxes.hits(chosen, said, threshold), f"{100 * threshold:.0f}"
            counts = boxes.counted(chosen, said, found, resamples)
            overall |= {f"box_{measure}_{name}": values for measure, values in counts.items()}
            columns = [boxes.average_precision(label, chosen, said, found, resamples) for label in self.labels]
            each[f"ap_{name}"] = np.column_stack(columns) if columns else np.zeros((1 + resamples.count, 0))
            overall[f"map_{name}"] = measures.mean_of_known(each[f"ap_{name}"])
        return Measured(overall, self.labels, each)

    def basis(self, measure: str, label: int | None = None) -> Rows:
        name = None if label is None else self.labels[label]
        both = zip(self.truth, self.placed, strict=True)
        return np.array([any(name in (None, box.label) for box in chain(*each)) for each in both])

    @cached_property
    def rightness(self) -> Floats:
        return boxes.overlaps(self.truth, self.placed)

    @property
    def said(self) -> Sequence[object]:
        return [sorted((box.image, box.label, box.corners) for box in placed) for placed in self.placed]


class Reports(Kind):
    """Texts of reports, by what is shipped and by what is plugged in."""

    decides = ("rouge_l",)

    def __init__(self, header: Header, rows: Sequence[Row]):
        self.truth = [row.truth.text or "" for row in rows]
        self._said = [(row.answer.text if row.answer else None) or "" for row in rows]

    @cached_property
    def scores(self) -> dict[str, Floats]:
        """``rouge_l``, and what each plugged metric gives, (rows,)."""
        plugged = text.plugged().items()
        found = {name: text.scored(name, metric, self._said, self.truth) for name, metric in plugged}
        return {"rouge_l": text.rouge_l(self._said, self.truth)} | found

    def measured(self, resamples: Resamples, rows: Rows) -> Measured:
        chosen = np.flatnonzero(rows)
        said, truth = ([column[i] for i in chosen] for column in (self._said, self.truth))
        overall = {name: resamples.mean(values, rows) for name, values in self.scores.items()}
        return Measured(overall | {"bleu": text.bleu(said, truth, resamples, chosen)})

    def basis(self, measure: str, label: int | None = None) -> Rows:
        return np.ones(len(self.truth), bool)

    @property
    def rightness(self) -> Floats:
        return self.scores["rouge_l"]

    @property
    def said(self) -> Sequence[object]:
        return self._said


KINDS: dict[str, type[Labels] | type[Options] | type[Boxes] | type[Reports]] = {
    "labels": Labels,
    "options": Options,
    "boxes": Boxes,
    "report": Reports,
}
"""By `Header.kind`."""


class Columns:
    """A result as columns.

    Parameters
    ----------
    header : Header
    rows : iterable of Row

    Attributes
    ----------
    rows : list of Row
    patients : list of str
    groups : dict of str to list of (str or None)
        What each row says of view, sex and the like; None where it says nothing.
    codes : (rows,) str
        Of `Row.code`; empty where nothing is wrong.
    asked : (rows,) bool
        All but those of `NOT_ASKED`, which count nowhere.
    kind : Kind
    """

    def __init__(self, header: Header, rows: Iterable[Row]):
        self.header, self.rows = header, list(rows)
        self.patients = [row.patient for row in self.rows]
        names = dict.fromkeys(name for row in self.rows for name in row.groups)
        self.groups = {name: [row.groups.get(name) for row in self.rows] for name in names}
        self.codes = np.array([row.code for row in self.rows], str)
        self.failed = np.array([row.answer is None for row in self.rows], bool)
        self.asked = ~np.isin(self.codes, NOT_ASKED)
        self.kind = KINDS[header.kind](header, self.rows)

    def measured(self, resamples: Resamples, rows: Rows | None = None) -> Measured:
        """Every measure of the rows; of all that were asked by default."""
        return self.kind.measured(resamples, self.asked if rows is None else self.asked & rows)


def _by_label(values: dict[str, int | None] | dict[str, float], labels: Sequence[str]) -> list[float]:
    return [np.nan if (value := values.get(label)) is None else float(value) for label in labels]


def _confidence(answer: Answer | None) -> float:
    """Score of the one option that was given; not a number without one."""
    if answer is None or answer.scores is None or len(answer.options) != 1:
        return np.nan
    return answer.scores.get(answer.options[0], np.nan)


def _merged(drawn: Sequence[Box]) -> list[boxes.Placed]:
    """Boxes that are known; of several readers' around one thing, their mean."""
    things: list[list[Box]] = []
    for box in drawn:
        thing = next((thing for thing in things if all(_are_of_one(box, each) for each in thing)), None)
        if thing is None:
            things.append([box])
        else:
            thing.append(box)
    means = [np.mean([box.corners for box in thing], axis=0).tolist() for thing in things]
    return [
        boxes.Placed(thing[0].label or UNNAMED, (x1, y1, x2, y2), image=thing[0].image)
        for thing, (x1, y1, x2, y2) in zip(things, means, strict=True)
    ]


def _are_of_one(a: Box, b: Box) -> bool:
    is_shared = None not in (a.reader, b.reader) and a.reader != b.reader and (a.label, a.image) == (b.label, b.image)
    return is_shared and box_iou(a.corners, b.corners) >= SHARED


def _named(answer: Answer | None, truth: Sequence[boxes.Placed]) -> list[boxes.Placed]:
    """Boxes that were said, by the names that the truth of their row has."""
    if answer is None:
        return []
    labels, scores = {box.label.casefold(): box.label for box in truth}, answer.scores or {}
    only = truth[0].label if len(labels) == 1 else None
    return [
        boxes.Placed(only or labels.get(name.casefold(), name), box.corners, scores.get(name), box.image)
        for box in answer.boxes
        for name in [box.label or UNNAMED]
    ]
