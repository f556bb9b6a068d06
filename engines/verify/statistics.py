"""Distances between what an engine and the reference compute; NaN where a number is not finite."""

from __future__ import annotations

import math

import numpy as np

from cxr_triton.errors import InvalidBundle


def kl_divergence(reference: np.ndarray, engine: np.ndarray) -> float:
    """KL(reference || engine) of two rows of logits (vocab,) in nats, in float64."""
    p, q = (_log_softmax(row.astype(np.float64)) for row in (reference, engine))
    if not np.isfinite(q).all():
        return math.nan
    return max(float(np.sum(np.exp(p) * (p - q))), 0.0)


def _log_softmax(row: np.ndarray) -> np.ndarray:
    row = row - row.max()
    return row - np.log(np.exp(row).sum())


def logit_error(reference: np.ndarray, engine: np.ndarray) -> np.ndarray:
    """Relative distance of logits (A, vocab), token by token, each less its mean, which a softmax does not see."""
    theirs, ours = (rows.astype(np.float64) - rows.mean(-1, keepdims=True) for rows in (reference, engine))
    with np.errstate(all="ignore"):
        return np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)


def embedding_error(reference: np.ndarray, engine: np.ndarray) -> tuple[np.ndarray, float]:
    """Cosine of each of T image embeddings (T, hidden), and the relative error of their root mean square.

    Raises
    ------
    InvalidBundle
        The shapes differ.
    """
    if engine.shape != reference.shape:
        raise InvalidBundle(f"the engine gives {engine.shape} image embeddings, the reference {reference.shape}")
    ours, theirs = engine.astype(np.float64), reference.astype(np.float64)
    with np.errstate(all="ignore"):
        cosine = (ours * theirs).sum(-1) / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1))
        norm = abs(np.sqrt((ours**2).mean()) / np.sqrt((theirs**2).mean()) - 1)
    return cosine, float(norm) if np.isfinite(ours).all() else math.nan


def histogram(values: np.ndarray, low: int, high: int) -> dict:
    """Counts of finite values by powers of ten from 10**low to 10**high, which are the outer bins' limits too."""
    values = values[np.isfinite(values)]
    counts, _ = np.histogram(np.clip(np.log10(values), low, high - 1e-9), bins=high - low, range=(low, high))
    return {"log10_from": low, "log10_to": high, "counts": counts.tolist()}
