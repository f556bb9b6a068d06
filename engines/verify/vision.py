"""The gate's part `vision`: image embeddings token by token, of the images and of every kind of aspect ratio."""

from __future__ import annotations

import math

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
    cosines, norms = [], []
    shapes = aspect_ratios(reference.profile)
    count = trial.counter("vision", len(trial.cases) + len(shapes))
    for case, detail in zip(trial.cases, trial.details, strict=True):
        cosine, norm = embedding_error(reference.embeddings(case), engine.embeddings(case))
        detail["vision_cosine"], detail["vision_cosine_min"] = finite([cosine.mean(), cosine.min()])
        cosines.append(cosine)
        norms.append(norm)
        count(1)
    measured: dict[str, object] = {"images": _summary(np.concatenate(cosines), norms)}
    for i, (name, (rows, cols)) in enumerate(shapes.items()):
        pixels = reference.picture(trial.cases[i % len(trial.cases)].image)
        pixels = image.resize(pixels, (rows * UNIT, cols * UNIT))
        cosine, norm = embedding_error(reference.encode(pixels, resize=False), engine.encode(pixels))
        measured[name] = {"grid": [rows, cols], **_summary(cosine, [norm])}
        cosines.append(cosine)
        norms.append(norm)
        count(1)
    every = np.concatenate(cosines)
    measured |= {"tokens": len(every), "histogram": histogram(np.maximum(1 - every, 1e-9), -9, 0)}
    checks = [
        trial.check("vision_cosine", every.mean()),
        trial.check("vision_cosine_min", every.min()),
        trial.check("vision_norm", max(norms) if np.isfinite(norms).all() else math.nan),
    ]
    return checks, measured


def _summary(cosine: np.ndarray, norms: list[float]) -> dict:
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
