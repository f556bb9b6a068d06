"""Requests of a run as columns, their summary, and confidence intervals; terms as in docs/bench.schema.json.

Latencies run from the scheduled time of a request, not from when it was sent: a client or a server that falls behind
its schedule shows in them (coordinated omission).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

PERCENTILES = (50, 90, 95, 99)
DISTRIBUTIONS = ("latency_ms", "ttft_ms", "itl_ms", "chunk_gap_ms", "lateness_ms", "output_tokens")
RATES = ("readings_per_s", "output_tokens_per_s", "goodput_per_s", "goodput_share")


@dataclass
class Record:
    """One request of a run; times in seconds since the run began.

    Attributes
    ----------
    item : int or None
        Index in the workload's items; None where the driver does not say.
    scheduled_s, sent_s, end_s : float
        When it was due, when it was sent, when its last response came.
    deltas_s : list of float
        When each response with text came.
    status : str
        Of the reading (``ok``, ``truncated``, ...), or an error code in capitals.
    prompt_tokens, tokens : int or None
        Of prompt and answer, from the reading's usage.
    stages_ms : dict
        Stage to milliseconds, see `cxr_triton.perf.stages`; empty for a failed request.
    """

    item: int | None
    scheduled_s: float
    sent_s: float
    end_s: float
    deltas_s: list[float]
    status: str
    prompt_tokens: int | None = None
    tokens: int | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """It ended in an error."""
        return self.status.isupper()

    @property
    def latency_ms(self) -> float:
        """From its time to its last response."""
        return 1e3 * (self.end_s - self.scheduled_s)

    @property
    def ttft_ms(self) -> float | None:
        """From its time to the first text; None without any."""
        return 1e3 * (self.deltas_s[0] - self.scheduled_s) if self.deltas_s else None

    @property
    def itl_ms(self) -> float | None:
        """Mean time between two tokens after the first text: (last text - first text) / (tokens - 1)."""
        if self.tokens is None or self.tokens < 2 or len(self.deltas_s) < 2:
            return None
        return 1e3 * (self.deltas_s[-1] - self.deltas_s[0]) / (self.tokens - 1)

    def keeps(self, bounds: Mapping[str, float]) -> bool:
        """The request succeeded, and none of its latencies is over its bound; one that it has not got keeps it."""
        return not self.failed and all((getattr(self, name) or 0.0) <= bound for name, bound in bounds.items())


def columns(records: Sequence[Record]) -> dict:
    """The records as ``requests`` of the schema, in the order of their schedule."""
    records = sorted(records, key=lambda record: record.scheduled_s)
    stages = list(dict.fromkeys(stage for record in records for stage in record.stages_ms))
    return {
        "item": [record.item for record in records],
        "scheduled_s": [round(record.scheduled_s, 6) for record in records],
        "sent_s": [round(record.sent_s, 6) for record in records],
        "first_s": [round(record.deltas_s[0], 6) if record.deltas_s else None for record in records],
        "end_s": [round(record.end_s, 6) for record in records],
        "deltas_s": [[round(at_s, 6) for at_s in record.deltas_s] for record in records],
        "prompt_tokens": [record.prompt_tokens for record in records],
        "tokens": [record.tokens for record in records],
        "status": [record.status for record in records],
        "stages_ms": {
            stage: [round(record.stages_ms[stage], 3) if stage in record.stages_ms else None for record in records]
            for stage in stages
        },
    }


def distribution(values: Sequence[float]) -> dict:
    """Mean, percentiles (linear between ranks) and maximum."""
    if not len(values):
        return {"n": 0, **dict.fromkeys(("mean", *(f"p{p}" for p in PERCENTILES), "max"))}
    ranks = np.percentile(values, PERCENTILES)
    return {
        "n": len(values),
        "mean": float(np.mean(values)),
        **{f"p{p}": float(rank) for p, rank in zip(PERCENTILES, ranks, strict=True)},
        "max": float(np.max(values)),
    }


def summarize(records: Sequence[Record], bounds: Mapping[str, float]) -> dict:
    """``summary`` of the schema for one repeat.

    Parameters
    ----------
    records : sequence of Record
    bounds : mapping
        ``latency_ms``, ``ttft_ms``, ``itl_ms`` that a reading has to keep to count as goodput.
    """
    done = [record for record in records if not record.failed]
    seconds = max((record.end_s for record in records), default=0.0)
    gaps = [1e3 * gap for record in done for gap in np.diff(record.deltas_s)]
    kept = sum(record.keeps(bounds) for record in done)
    tokens = [record.tokens for record in done if record.tokens is not None]
    per_s = 1 / seconds if seconds else 0.0
    return {
        "requests": len(records),
        "failed": dict(Counter(record.status for record in records if record.failed)),
        "seconds": seconds,
        "readings_per_s": len(done) * per_s,
        "output_tokens_per_s": sum(tokens) * per_s,
        "goodput_per_s": kept * per_s,
        "goodput_share": kept / len(records) if records else 0.0,
        "latency_ms": distribution([record.latency_ms for record in done]),
        "ttft_ms": distribution([record.ttft_ms for record in done if record.ttft_ms is not None]),
        "itl_ms": distribution([record.itl_ms for record in done if record.itl_ms is not None]),
        "chunk_gap_ms": distribution(gaps),
        "lateness_ms": distribution([1e3 * (record.sent_s - record.scheduled_s) for record in records]),
        "output_tokens": distribution(tokens),
    }


def interval(values: Sequence[float | None]) -> dict:
    """Mean of the repeats and its 95 % confidence interval by Student's t; None for what cannot be said."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "low": None, "high": None}
    mean = float(np.mean(known))
    if len(known) < 2:
        return {"mean": mean, "low": None, "high": None}
    from scipy.stats import t

    half = float(t.ppf(0.975, len(known) - 1)) * float(np.std(known, ddof=1)) / math.sqrt(len(known))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def over_repeats(summaries: Sequence[dict]) -> dict:
    """``summary`` of a point: each rate, and each percentile of each distribution, over its repeats."""
    merged = {name: interval([summary[name] for summary in summaries]) for name in RATES}
    for name in DISTRIBUTIONS:
        for statistic in ("mean", *(f"p{p}" for p in PERCENTILES)):
            merged[f"{name}.{statistic}"] = interval([summary[name][statistic] for summary in summaries])
    return merged
