"""The gate's part `decoder`: next-token distributions on the reference's own text.

With the engine's image embeddings and with the reference's; and with the reference's against a reference that holds the
weights as the engine stores them: that shows a fault of the engine which is smaller than what quantization does, or
which the text does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cxr_triton.engines.verify.engine_under_test import SLOTS
from cxr_triton.engines.verify.reference import Case
from cxr_triton.engines.verify.statistics import histogram, kl_divergence, logit_error
from cxr_triton.engines.verify.trial import Judged, Trial, finite
from cxr_triton.errors import InvalidRequest
from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.graph import QUANTIZED

Embed = Callable[[Case], np.ndarray]


def judge(trial: Trial) -> Judged:
    """Agreement and divergence with either's embeddings, and the error of logits from the stored weights."""
    count = trial.counter("decoder", 3 * len(trial.cases))
    checks, measured = [], {}
    for whose, embed in (("engine", trial.engine.embeddings), ("reference", trial.reference.embeddings)):
        name = f"{whose}'s embeddings"
        agrees, kl = _divergences(trial, whose, embed, count)
        measured[name] = {
            "tokens": len(kl),
            "top1_agreement": agrees.mean(),
            "kl_mean": kl.mean(),
            "kl_max": kl.max(),
            "kl_p99": np.quantile(kl, 0.99),
            "histogram": histogram(np.maximum(kl, 1e-9), -9, 2),
        }
        checks += [trial.check("top1_agreement", agrees.mean(), name), trial.check("kl", kl.mean(), name)]
    bundle = trial.bundle
    with trial.reference.storing(_stored(trial), bundle.precision, bundle.manifest.get("head") or "compute"):
        forced = _forced(trial, trial.reference.embeddings, count)
        errors = np.concatenate([logit_error(theirs, ours) for _, ours, theirs in forced])
    measured["stored weights"] = {
        "tokens": len(errors),
        "logit_error": errors.mean(),
        "logit_error_max": errors.max(),
        "histogram": histogram(np.maximum(errors, 1e-9), -9, 1),
    }
    return [*checks, trial.check("logit_error", errors.mean())], measured


def _divergences(trial: Trial, whose: str, embed: Embed, count: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """Of each token whether the most likely next one is the same, and KL(reference || engine)."""
    agreements, divergences = [], []
    for detail, ours, theirs in _forced(trial, embed, count):
        agrees = ours.argmax(-1) == theirs.argmax(-1)
        kl = np.array([kl_divergence(its, mine) for its, mine in zip(theirs, ours, strict=True)])
        detail[f"top1_{whose}"], detail[f"kl_{whose}"] = finite([agrees.mean(), kl.mean()])
        agreements.append(agrees)
        divergences.append(kl)
    return np.concatenate(agreements), np.concatenate(divergences)


def _forced(trial: Trial, embed: Embed, count: Callable[[int], None]) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
    """Of each case its details, and the engine's and the reference's logits (A, vocab) on the reference's text."""
    for at in range(0, len(trial.cases), SLOTS):
        some = slice(at, at + SLOTS)
        cases = trial.cases[some]
        prompts, given = [trial.reference.prompt(case) for case in cases], [embed(case) for case in cases]
        scored = trial.engine.forced(prompts, given, [trial.reference.ids(case) for case in cases])
        for case, detail, ours in zip(cases, trial.details[some], scored, strict=True):
            yield detail, ours, trial.reference.logits(case)
            count(1)


def _stored(trial: Trial) -> Checkpoint:
    """The checkpoint that the engine was exported from."""
    if trial.bundle.precision not in QUANTIZED:
        return trial.reference.source
    if trial.quantized is None:
        raise InvalidRequest("the engine was made of a quantized checkpoint; name its folder with --quantized")
    stored = Checkpoint(trial.quantized)
    if stored.digests() != trial.bundle.manifest["source"].get("files"):
        raise InvalidRequest(f"{trial.quantized} is not the quantized checkpoint that the engine was made of")
    return stored
