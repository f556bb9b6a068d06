"""The gate's part `readings`: what engine and reference say of the same images."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cxr_triton.engines.verify.answers import MEASURES, Answer
from cxr_triton.engines.verify.trial import Judged, Trial, finite
from cxr_triton.rewards import Sample, gold_of, rewards_for

STATUSES = (("ok", "format_drop", -1), ("truncated", "truncated_rise", 1), ("out_of_vocabulary", "unknown_rise", 1))
"""A status, the threshold that its share is held against, and the sign that makes worse larger."""


def judge(trial: Trial) -> Judged:
    """Agreement, flipped labels, form, lengths and rewards of the answers."""
    pairs, labels = list(zip(trial.theirs, trial.ours, strict=True)), trial.reference.profile.labels
    agreements: dict[str, list[float]] = {name: [] for name in MEASURES.values()}
    rewards = defaultdict(list)
    for detail, (its, mine) in zip(trial.details, pairs, strict=True):
        detail["agreement"] = mine.agreement(its)
        detail["engine"] = mine.raw() | mine.short()
        detail["reference"] |= its.short()
        agreements[MEASURES[mine.kind]].append(detail["agreement"])
        for name, both in _rewards(its, mine, labels).items():
            rewards[name].append(both)
            detail.setdefault("rewards", {})[name] = finite(both)
    checks = [trial.check("images", len(pairs))]
    checks += [trial.check(name, np.mean(values)) for name, values in agreements.items() if values]
    measured: dict[str, object] = {"labels": (flips := _flips(pairs, labels))}
    if flips:
        checks.append(trial.check("label_flips", max(flip["flips"] for flip in flips.values()) / len(pairs)))
    for status, threshold, sign in STATUSES:
        measured[status] = share = _means([[said.parsed.status == status for said in pair] for pair in pairs])
        checks.append(trial.check(threshold, sign * (share["engine"] - share["reference"])))
    measured["tokens"] = length = _means([[said.tokens for said in pair] for pair in pairs])
    drift = abs(length["engine"] / length["reference"] - 1) if length["reference"] else math.nan
    checks.append(trial.check("length_drift", drift))
    measured["identical"] = np.mean([its.text == mine.text for its, mine in pairs])
    measured["rewards"] = means = {name: _means(values) for name, values in rewards.items()}
    if means:
        checks.append(trial.check("reward_drop", max(mean["reference"] - mean["engine"] for mean in means.values())))
    return checks, measured


def _means(pairs: Sequence[Sequence[float]]) -> dict[str, float]:
    reference, engine = np.mean(pairs, axis=0)
    return {"reference": reference, "engine": engine}


def _rewards(theirs: Answer, ours: Answer, labels: tuple[str, ...]) -> dict[str, list[float]]:
    """By name, both answers' rewards where the reference's is the right one."""
    gold = gold_of(theirs.text, ours.grammar)
    samples = [Sample(text=said.text, gold=gold, tokens=said.tokens, labels=labels) for said in (theirs, ours)]
    return {name: [reward(s) for s in samples] for name, reward in rewards_for(ours.grammar, ours.kind).items()}


def _flips(pairs: Sequence[tuple[Answer, Answer]], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Of each label that either side gave: on how many images each gave it, and on how many only one did."""
    given = [[{finding.label for finding in said.parsed.findings} for said in pair] for pair in pairs]
    table = {}
    for label in labels:
        has = [(label in its, label in mine) for its, mine in given]
        if any(map(any, has)):
            table[label] = {
                "engine": sum(mine for _, mine in has),
                "reference": sum(its for its, _ in has),
                "flips": sum(its != mine for its, mine in has),
            }
    return table
