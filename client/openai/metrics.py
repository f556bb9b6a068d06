"""What the server counts, as Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Of one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.completions = Counter(
            "cxr_openai_completions", "Completions, by status of the reading or code of the error.", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self.refused = Counter(
            "cxr_openai_refused", "Other requests refused, by HTTP status.", ["status"], registry=registry
        )
        self.connections_refused = Counter(
            "cxr_openai_connections_refused", "Connections closed unheard, by reason.", ["reason"], registry=registry
        )
        self.under_way = Gauge("cxr_openai_under_way", "Completions under way.", registry=registry)
        self.first_text_s = Histogram(
            "cxr_openai_first_text_seconds", "From the request's head to the first text.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.completion_s = Histogram(
            "cxr_openai_completion_seconds", "From the request's head to the end of a whole reading.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
