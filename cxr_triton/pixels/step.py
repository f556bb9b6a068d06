"""Whether a picture jumps in grey from one line to the next, as damage that leaves its bits' number right makes it."""

from __future__ import annotations

import numpy as np

_STRIPS = 8  # columns are looked at in so many parts
_MOST_STEPS = 16  # candidates that are looked at; damage makes one
_AROUND = 8  # lines on each side, which is as far as the next blocks of a DCT


def has_step(values: np.ndarray) -> bool:
    """Whether from one row or column to the next the grey values jump by a constant, through structure that goes on.

    Parameters
    ----------
    values : ndarray (rows, columns)

    Notes
    -----
    The jump has to be over four times any other in the sixteen lines around it, over twice the spread within the line,
    over a fiftieth of the picture's range, and the same in two neighbouring eighths of the line. Edges of anatomy are
    blurred over several lines, and at the edge of a collimator the structure does not go on.
    """
    least = max(2.0, np.ptp(values) / 50)
    return _steps_down(values, least) or _steps_down(values.T, least)


def _steps_down(values: np.ndarray, least: float) -> bool:
    width = values.shape[1] // _STRIPS
    if width < 8 or len(values) <= 2 * _AROUND:
        return False
    strips = values[:, : _STRIPS * width].reshape(len(values), _STRIPS, width)
    step = np.diff(strips.mean(axis=2, dtype=np.float32), axis=0)  # [rows - 1, strips]
    others = np.delete(_around(np.abs(step)), _AROUND, axis=0).max(axis=0)
    alike = np.abs(np.diff(step, axis=1)) <= np.maximum(2, 0.1 * np.abs(step[:, :-1]))
    jumps = np.abs(step) > 4 * others + least
    rows = np.flatnonzero((jumps[:, :-1] & jumps[:, 1:] & alike).any(axis=1))
    return any(_goes_on(strips[row : row + 2].astype(np.int32), jumps[row], alike[row]) for row in rows[:_MOST_STEPS])


def _goes_on(lines: np.ndarray, jumps: np.ndarray, alike: np.ndarray) -> bool:
    """Whether two lines, [2, strips, columns], differ by a constant in two neighbouring strips that jump alike."""
    difference = lines[1] - lines[0]
    step = np.median(difference, axis=1)
    spread = np.median(np.abs(difference - step[:, None]), axis=1)
    structure = np.median(np.abs(lines - np.median(lines, axis=2)[..., None]), axis=2).min(axis=0)
    constant = jumps & (np.abs(step) > 2 * spread) & (structure > 1.5 * spread) & (structure > 0)
    return bool((constant[:-1] & constant[1:] & alike).any())


def _around(values: np.ndarray) -> np.ndarray:
    """The lines around each one, itself in the middle: [2 * _AROUND + 1, rows, strips]."""
    padded = np.pad(values, ((_AROUND, _AROUND), (0, 0)), mode="edge")
    return np.stack([padded[first : first + len(values)] for first in range(2 * _AROUND + 1)])
