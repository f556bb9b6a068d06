"""95 % intervals by bootstrap over patients: images of one patient are drawn together, all resamples at once.

A resample is a weight for every patient: how often it was drawn. Column 0 of every result is the data as they are,
each patient once; a statistic is therefore computed once, by one formula, for its value and for its interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 1000
_AT_A_TIME = 8  # resamples whose weights of all rows are held at once: what a cache holds

Floats = NDArray[np.float64]


class Resamples:
    """Weights of the rows of a data set in every resample of its patients.

    Parameters
    ----------
    patients : sequence
        Of each row, what names its patient.
    count : int
        Resamples beside the data as they are.
    seed : int
    """

    def __init__(self, patients: Sequence[str], count: int = RESAMPLES, seed: int = 0):
        names, self._patient = np.unique(np.asarray(patients), return_inverse=True)
        self.rows, self.patients, self.count = len(self._patient), len(names), count
        self._order = np.argsort(self._patient, kind="stable")
        self._starts = np.searchsorted(self._patient[self._order], np.arange(self.patients))
        random = np.random.default_rng(seed)
        self._weights = np.ones((self.patients, 1 + count), np.int16)
        for column in range(1, 1 + count):
            drawn = random.integers(0, self.patients, self.patients)
            self._weights[:, column] = np.bincount(drawn, minlength=self.patients)

    def by_patient(self, values: np.ndarray) -> Floats:
        """Sums of (rows, n) over the rows of each patient, (patients, n)."""
        if not self.rows:
            return np.zeros((0, values.shape[1]))
        return np.add.reduceat(np.asarray(values, np.float64)[self._order], self._starts, axis=0)

    def sums(self, values: np.ndarray) -> Floats:
        """Weighted sums of (rows, n) over all rows, (1 + count, n)."""
        summed, total = self.by_patient(values), np.zeros((1 + self.count, values.shape[1]))
        for first in range(0, self.patients, 4096):
            part = slice(first, first + 4096)
            total += self._weights[part].T.astype(np.float64) @ summed[part]
        return total

    def mean(self, values: np.ndarray, counted: np.ndarray | None = None) -> Floats:
        """Weighted means of (rows,) over the rows that are `counted`, (1 + count,); not a number over none."""
        counted = np.ones(self.rows, bool) if counted is None else counted
        sums = self.sums(np.column_stack([np.where(counted, values, 0.0), counted]))
        return ratio(sums[:, 0], sums[:, 1])

    def weights(self, rows: NDArray[np.intp]) -> Iterator[tuple[slice, NDArray[np.int32]]]:
        """Weights of chosen rows, some resamples at a time: which, and (len(rows), resamples)."""
        patients = self._patient[rows]
        for first in range(0, 1 + self.count, _AT_A_TIME):
            part = slice(first, min(first + _AT_A_TIME, 1 + self.count))
            yield part, self._weights[:, part].take(patients, axis=0).astype(np.int32)

    def patients_of(self, counted: np.ndarray) -> int:
        """How many patients the rows are of that are `counted`, (rows,)."""
        return len(np.unique(self._patient[np.asarray(counted, bool)]))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Floats:
    """Quotients; not a number where both are 0."""
    whole = np.asarray(denominator, np.float64)
    return np.divide(numerator, whole, out=np.full(np.broadcast(numerator, whole).shape, np.nan), where=whole != 0)


def interval(values: np.ndarray, patients: Callable[[], int] | None = None) -> dict[str, float | None]:
    """Value and 95 % interval of a statistic: percentiles of its resamples.

    Parameters
    ----------
    values : (1 + count,) float
        The value, then those of the resamples; not a number where one is undefined.
    patients : callable, optional
        Gives how many patients a statistic between 0 and 1 stands on. Where all of them are right, or all wrong, every
        resample is so too; then the exact binomial interval (Clopper and Pearson) of that many is given, which is at
        least as wide.

    Returns
    -------
    dict
        ``value``, ``low``, ``high``; None for what is undefined, and for an interval that over 5 % of the resamples
        leave undefined.
    """
    value, known = float(values[0]), values[1:][np.isfinite(values[1:])]
    if math.isnan(value):
        return {"value": None, "low": None, "high": None}
    if not len(known) or len(known) < LEVEL * (len(values) - 1):
        return {"value": value, "low": None, "high": None}
    if patients and value in (0.0, 1.0) and (known == value).all() and (number := patients()):
        from scipy.stats import binomtest

        low, high = binomtest(round(value) * number, number).proportion_ci(LEVEL, method="exact")
    else:
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": value, "low": float(low), "high": float(high)}
