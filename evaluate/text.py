"""Measures of report text: ROUGE-L and BLEU by the libraries that papers use, and whatever is plugged in.

Metrics that need models of their own (RadGraph, CheXbert, GREEN) are not shipped. A package adds one by an entry point
of the group `GROUP`: a callable that takes two lists of texts, what was said and what is true, and gives a number for
each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata

import numpy as np

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.intervals import Floats, Resamples

GROUP = "cxr_triton.report_metrics"

ReportMetric = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def rouge_l(said: Sequence[str], truth: Sequence[str]) -> Floats:
    """F1 of the longest common subsequence of words, (rows,): rouge-score's ``rougeL`` without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(said, truth, strict=True)
    return np.array([scorer.score(true, text)["rougeL"].fmeasure for text, true in pairs])


def bleu(said: Sequence[str], truth: Sequence[str], resamples: Resamples, rows: np.ndarray) -> Floats:
    """Corpus BLEU-4 between 0 and 1 of some rows, (1 + count,): sacrebleu's by its defaults, over 100.

    Parameters
    ----------
    said, truth : (n,) str
    resamples : Resamples
    rows : (n,) int
        Which rows of the data set they are.
    """
    from sacrebleu.metrics import BLEU

    counter = BLEU(effective_order=True)  # of counts alone: all orders are summed
    facts = np.zeros((resamples.rows, 10))
    for row, text, true in zip(rows, said, truth, strict=True):
        found = counter.sentence_score(text, [true])
        facts[row] = [found.sys_len, found.ref_len, *found.counts, *found.totals]
    lengths, counts, totals = np.split(resamples.sums(facts).round().astype(int), [2, 6], axis=1)
    scores = [
        BLEU.compute_bleu(right.tolist(), whole.tolist(), int(ours), int(theirs), smooth_method="exp").score
        for (ours, theirs), right, whole in zip(lengths, counts, totals, strict=True)
    ]
    return np.array(scores) / 100


def plugged() -> dict[str, ReportMetric]:
    """The report metrics that installed packages add, by name.

    Raises
    ------
    InvalidRequest
        One cannot be loaded.
    """
    found = {}
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            found[entry.name] = entry.load()
        except Exception as error:
            raise InvalidRequest(
                f"report metric {entry.name!r} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}; "
                "repair or remove the package that brings it"
            ) from error
    return found


def scored(name: str, metric: ReportMetric, said: Sequence[str], truth: Sequence[str]) -> Floats:
    """What a plugged metric gives, (rows,).

    Raises
    ------
    InvalidRequest
        It does not give one finite number for each report.
    """
    given = np.asarray(metric(list(said), list(truth)), np.float64)
    if given.shape != (len(said),) or not np.isfinite(given).all():
        raise InvalidRequest(
            f"report metric {name!r} gave shape {given.shape} for {len(said)} reports, or what is no finite number; it "
            "has to give one number for each"
        )
    return given
