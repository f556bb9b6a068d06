"""Whether an image is a chest radiograph: what its picture looks like, weighed against its header (`anatomy`).

Nothing here recognises a disease, a person or a part of the body.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cxr_triton.pixels.anatomy import EXTENT_MM, Anatomy
from cxr_triton.pixels.image import resize

VIEWS = ("frontal", "lateral", "oblique")
POLICIES = ("refuse", "flag")

MIN_CHEST = 0.40
"""Least `Likeness.chest` where the header names no part of the body."""
MIN_BASES = 0.20
"""Least correlation of the columns under the lungs' middle, which grow brighter downwards."""
MIN_LUNGS_NAMED = 0.20
"""Least `Likeness.lungs` where the header names the chest: white lungs and inverted pictures are still over it."""
MAX_FLAT, MAX_FLAT_SILENT = 0.90, 0.40
"""Largest share of one grey in a picture, and in one whose header names no part of the body."""
MIN_SMOOTHNESS = 0.5
"""Least correlation of neighbouring pixels: noise has 0, every radiograph seen over 0.85."""
MAX_COLOURED, MAX_COLOURED_SILENT = 0.20, 0.02
"""Largest share of coloured pixels, as a photo has them, and as a marker or a tint has them."""


class Likeness(NamedTuple):
    """How much a picture looks like a frontal chest, -1 to 1.

    Attributes
    ----------
    lungs : float
        Correlation with two dark upright ellipses beside a bright middle: the mean of the whole pair's and of the worse
        half's, at the best place and size.
    chest : float
        The same with the place's correlation with its mirror image as a third part, in places of at least three
        quarters of the picture a side that are brighter under the lungs. It tells more from a chest, limbs above all,
        and takes more chests with a white lung for something else.
    """

    lungs: float
    chest: float


def likeness(picture: np.ndarray) -> Likeness:
    """Compare a picture, reduced to 32 x 32 ranks of grey, with the proportions of a chest; nothing is learnt.

    What lies beyond the body's wall has no weight.

    Parameters
    ----------
    picture : uint8 [rows, cols] or [rows, cols, 3]
        Upright and bright where dense.
    """
    small = resize(_sample(_gray(picture)), (_SIDE, _SIDE)).ravel()
    # equal greys share a rank, so that a flat area has no pattern
    ranks = np.searchsorted(np.sort(small), small, "left") + np.searchsorted(np.sort(small), small, "right")
    ranks = ranks.reshape(_SIDE, _SIDE).astype(np.float64)
    lungs = chest = -1.0
    for parts, (height, width) in _templates():
        places = np.lib.stride_tricks.sliding_window_view(ranks, (height, width))[::2, ::2]
        places = places.reshape(-1, height * width)
        left, right, both, bases = (_correlations(places, *part) for part in parts)
        pair = (np.minimum(left, right) + both) / 2
        lungs = max(lungs, float(pair.max()))
        if min(height, width) >= 0.75 * _SIDE:
            found = np.where(bases > MIN_BASES, (2 * pair + _symmetry(places, width)) / 3, -1.0)
            chest = max(chest, float(found.max()))
    return Likeness(lungs, chest)


def flatness(picture: np.ndarray) -> float:
    """Largest share of one grey."""
    sample = _sample(_gray(picture))
    return float(np.bincount(sample.ravel()).max() / sample.size)


def smoothness(picture: np.ndarray) -> float:
    """Correlation of neighbouring pixels, in rows or columns, whichever is less; 1 for a constant."""
    gray = _gray(picture)
    rows = gray[:: max(1, gray.shape[0] // _LINES)]
    columns = gray[:, :: max(1, gray.shape[1] // _LINES)].T
    return min(_neighbours(rows), _neighbours(columns))


def coloured(picture: np.ndarray) -> float:
    """Share of pixels whose channels differ by over 48 of 255."""
    if picture.ndim == 2:
        return 0.0
    sample = _sample(picture)
    return float((np.ptp(sample, axis=2) > 48).mean())


_LINES = 32
_SIDE = 32
_SIZES = (20, 24, 28, 32)


@functools.cache
def _templates() -> tuple:
    """Left half, right half, whole and lung bases of the template in each size: indices, and unit-norm weights."""
    made = []
    for height in _SIZES:
        for width in _SIZES:
            y = (np.arange(height)[:, None] + 0.5) / height
            x = (np.arange(width)[None, :] + 0.5) / width
            lungs = [((x - center) / 0.15) ** 2 + ((y - 0.47) / 0.36) ** 2 for center in (0.27, 0.73)]
            radius = np.minimum(*lungs)
            dense = 1 / (1 + np.exp(-4 * (radius - 1)))
            inside = (radius < 2.2) | (np.abs(x - 0.5) < 0.23)
            bases = (np.abs(np.abs(x - 0.5) - 0.23) < 0.1) & (y > 0.3)
            parts = (inside & (x < 0.5), inside & (x > 0.5), inside, bases)
            made.append((tuple(_unit(dense, part) for part in parts), (height, width)))
    return tuple(made)


def _unit(values: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen = values[part] - values[part].mean()
    return np.flatnonzero(part), chosen / np.linalg.norm(chosen)


def _correlations(places: np.ndarray, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    chosen = places[:, index]
    norms = np.sqrt(chosen.var(axis=1) * chosen.shape[1])
    # no matrix product: BLAS takes address space, which the process that decodes has little of
    return np.einsum("pk,k->p", chosen, weights) / np.maximum(norms, 1e-9)


def _symmetry(places: np.ndarray, width: int) -> np.ndarray:
    """Correlation of each place with its mirror image."""
    centered = places - places.mean(axis=1, keepdims=True)
    mirrored = centered.reshape(len(places), -1, width)[:, :, ::-1].reshape(centered.shape)
    return (centered * mirrored).sum(axis=1) / np.maximum((centered**2).sum(axis=1), 1e-9)


def _neighbours(lines: np.ndarray) -> float:
    if lines.shape[1] < 3:
        return 1.0
    values = lines.astype(np.float64)
    before, after = values[:, :-1].ravel(), values[:, 1:].ravel()
    deviation = before.std() * after.std()
    return float(((before - before.mean()) * (after - after.mean())).mean() / deviation) if deviation else 1.0


def _gray(picture: np.ndarray) -> np.ndarray:
    return picture if picture.ndim == 2 else picture.mean(axis=2).astype(np.uint8)


def _sample(picture: np.ndarray) -> np.ndarray:
    step = max(1, min(picture.shape[:2]) // 512)
    return picture[::step, ::step]


# ------------------------------------------------------------------------------------------------------------ judgement


@dataclass(frozen=True)
class Judgement:
    """What header and picture together say.

    Attributes
    ----------
    refusal : str
        Why it is no chest, as a clause; empty when it may be one.
    doubts : tuple of str
        Keys of `DOUBTS`, sorted; none where it is taken for a chest.
    likeness : Likeness or None
        None for lateral and oblique views.
    """

    refusal: str
    doubts: tuple[str, ...]
    likeness: Likeness | None


def judge(found: Anatomy, view: str, picture: np.ndarray, views: Sequence[str] = VIEWS) -> Judgement:
    """Whether an image is a chest radiograph of a view that a model knows.

    Parameters
    ----------
    found : Anatomy
    view : str
        As in `cxr_triton.pixels.radiograph.Metadata`.
    picture : uint8 [rows, cols] or [rows, cols, 3]
        As displayed, see `cxr_triton.pixels.display.render`.
    views : sequence of str
        Members of `VIEWS` that the model was trained on.
    """
    kind = view if view in ("lateral", "oblique", "unknown") else "frontal"
    gray = _gray(picture)
    flat, colour = flatness(gray), coloured(picture)
    measured = None if kind in ("lateral", "oblique") else likeness(gray)
    is_named, doubts = found.says == "chest", set()
    refusal = _impossible(flat, colour, smoothness(gray))
    if is_named:
        unlike = measured is not None and measured.lungs < MIN_LUNGS_NAMED
    else:
        # a side view has no measure, so without the header's word it stays a doubt
        unlike = measured is None or measured.chest < MIN_CHEST
        unlike = unlike or flat > MAX_FLAT_SILENT or colour > MAX_COLOURED_SILENT
    if found.says == "elsewhere":
        refusal = f"the header names {found.named.upper()} as the part of the body"
    elif not found.has_extent_of_chest and not is_named:
        refusal = refusal or (
            f"its longer side is {found.extent_mm:.0f} mm, that of a chest {EXTENT_MM[0]:.0f} to {EXTENT_MM[1]:.0f} mm"
        )
    elif found.says == "described" and unlike:
        refusal = refusal or f"a description names {found.named.upper()} and the picture does not look like a chest"
    if not found.has_extent_of_chest:
        doubts.add("extent_suspect")
    if found.says == "conflict":
        doubts.add("region_conflict")
    if found.says == "described":
        doubts.add("region_described_elsewhere")
    if unlike:
        doubts.add("picture_unlike_chest")
    if kind != "unknown" and kind not in views:
        doubts.add("view_untrained")
    return Judgement(refusal, tuple(sorted(doubts)), measured)


def _impossible(flat: float, colour: float, smooth: float) -> str:
    """Why a picture can be no radiograph whatever its header says; empty when it can."""
    if colour > MAX_COLOURED:
        return f"{colour:.0%} of the picture is coloured, allowed {MAX_COLOURED:.0%}"
    if flat > MAX_FLAT:
        return f"{flat:.0%} of the picture is one grey, allowed {MAX_FLAT:.0%}"
    if smooth < MIN_SMOOTHNESS:
        return f"the picture is noise: neighbouring pixels correlate by {smooth:.2f}, at least {MIN_SMOOTHNESS:g}"
    return ""
