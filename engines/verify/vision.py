"""The gate's part `vision`: image embeddings token by token, of the images and of every kind of aspect ratio."""

from __future__ import annotations

import numpy as np

from cxr_triton.engines.verify.statistics import embedding_error, histogram
from cxr_triton.engines.verify.trial import Judged, Trial, finite
from cxr_triton.pixels import image
from cxr_triton.profile import WINDOW_UNITS, ModelProfile, grids

UNIT = image.PATCH * image.MERGE
"""Pixels a side of what becomes one token."""


def judge(trial: Trial) -> Judged:
    """Embeddings of the images end to end, and of an image resized to each of `aspect_ratios`."""
    engine, reference = trial.engine, trial.reference
    shapes = aspect_ratios(reference.profile)
    count = trial.counter("vision", len(trial.cases) + len(shapes))
    cosines, norms = [], []

    def compare(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
        cosine, norm = embedding_error(theirs, ours)
        cosines.append(cosine)
        norms.append(norm)
        count(1)
        return cosine

    for case, detail in zip(trial.cases, trial.details, strict=True):
        cosine = compare(reference.embeddings(case), engine.embeddings(case))
        detail["vision_cosine"], detail["vision_cosine_min"] = finite([cosine.mean(), cosine.min()])
    measured: dict[str, object] = {"images": _summary(cosines, norms)}
    for i, (name, (rows, cols)) in enumerate(shapes.items()):
        pixels = reference.picture(trial.cases[i % len(trial.cases)].image)
        pixels = image.resize(pixels, (rows * UNIT, cols * UNIT))
        compare(reference.encode(pixels, resize=False), engine.encode(pixels))
        measured[name] = {"grid": [rows, cols], **_summary(cosines[-1:], norms[-1:])}
    every, summary = np.concatenate(cosines), _summary(cosines, norms)
    measured |= {"tokens": len(every), "histogram": histogram(np.maximum(1 - every, 1e-9), -9, 0)}
    checks = [
        trial.check("vision_cosine", summary["cosine"]),
        trial.check("vision_cosine_min", summary["cosine_min"]),
        trial.check("vision_norm", summary["norm_error"]),
    ]
    return checks, measured


def _summary(cosines: list[np.ndarray], norms: list[float]) -> dict:
    cosine = np.concatenate(cosines)
    return {"cosine": cosine.mean(), "cosine_min": cosine.min(), "norm_error": np.max(norms)}


def aspect_ratios(profile: ModelProfile) -> dict[str, tuple[int, int]]:
    """A grid in merge units, rows and columns, for each kind of aspect ratio that the profile's resize can give."""
    possible = grids(profile.min_pixels, profile.max_pixels, profile.max_aspect_ratio)
    upright = {
        "smallest": min(possible, key=lambda g: (g[0] * g[1], g[1])),
        "square": max((g for g in possible if g[0] == g[1]), key=lambda g: g[0], default=possible[0]),
        "fills the budget": max(possible, key=lambda g: (g[0] * g[1], g[0])),
        "extreme": max(possible, key=lambda g: (g[1] / g[0], g[1])),
        "oblong": min(possible, key=lambda g: (abs(g[1] / g[0] - 1.4), -g[0] * g[1])),
        "edge windows": max(
            (g for g in possible if g[0] % WINDOW_UNITS and g[1] % WINDOW_UNITS),
            key=lambda g: g[0] * g[1],
            default=possible[0],
        ),
    }
    named = {}
    for name, (rows, cols) in upright.items():
        if rows == cols:
            named[name] = (rows, cols)
        else:
            named[f"{name}, wide"], named[f"{name}, tall"] = (rows, cols), (cols, rows)
    return named
