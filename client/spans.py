"""What is told of a request's way: spans where OpenTelemetry records them, and an id that all parts name in any case.

Nothing of OpenTelemetry is imported here. A process whose caller has a span of its own, or that `otlp.start` told where
to send spans, has imported it before; in any other there is no cost.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from cxr_triton.reading import STAGES, Reading
from cxr_triton.trace import TraceParent

ATTRIBUTES = {
    "error.type": "code of the error that it ended in",
    "server.address": "host and port of the reader's server",
    "gen_ai.operation.name": "`chat`",
    "gen_ai.response.model": "profile that was served",
    "gen_ai.response.finish_reasons": "why the answer ended",
    "gen_ai.usage.input_tokens": "tokens of the prompt, those of images included",
    "gen_ai.usage.output_tokens": "tokens of the answer",
    "cxr.engine": "engine of the decoder",
    "cxr.precision": "of the decoder's weights",
    "cxr.task": "task of the profile",
    "cxr.status": "of the reading",
    "cxr.images": "how many",
    "cxr.stream": "whether the answer was streamed",
    "cxr.door": "how an object came into the gateway",
    "cxr.job": "number of the gateway's job",
    "cxr.attempt": "which one of it",
    "cxr.destination": "where a result went, by its name in `gateway.yaml`",
    "cxr.kind": "what that result is",
    "cxr.outcome": "what became of it",
}
"""All that a span may say. None is of a patient: neither texts, pictures, names, UIDs nor the messages of errors."""
_NS = 1_000_000_000


class Span:
    """A part of a request's way.

    Parameters
    ----------
    name : str
    parent : str, optional
        The ``traceparent`` that it belongs to. One that is none is left out, as if none had been given: then it belongs
        to the caller's active span, or begins a trace.
    kind : {"INTERNAL", "CLIENT", "SERVER", "PRODUCER", "CONSUMER"}
        As OpenTelemetry has them.
    attributes : dict, optional
        Of `ATTRIBUTES`.
    start_s : float, optional
        When it began, in seconds since 1970; now by default.

    Attributes
    ----------
    place : TraceParent
        Of this span, for what it brings about.
    """

    def __init__(
        self,
        name: str,
        parent: str | None = None,
        kind: str = "INTERNAL",
        attributes: dict[str, Any] | None = None,
        *,
        start_s: float | None = None,
    ):
        given = TraceParent.from_text(parent)
        self._api: Any = sys.modules.get("opentelemetry.trace")
        self._span: Any = None
        self._ended = False
        self.place = given or TraceParent.new()
        if not self._api:
            return
        span = self._api.get_tracer("cxr_triton").start_span(
            name,
            context=given and self._context(given),
            kind=self._api.SpanKind[kind],
            start_time=start_s and int(start_s * _NS),
        )
        here = span.get_span_context()
        if here.is_valid:
            self._span = span
            self.place = TraceParent(f"{here.trace_id:032x}", f"{here.span_id:016x}", here.trace_flags.sampled)
            self.set(attributes or {})

    def set(self, attributes: dict[str, Any]) -> None:
        """Say more of it."""
        if self._span:
            self._span.set_attributes(_known(attributes))

    def read(self, reading: Reading) -> None:
        """Say what came of a reading that has just arrived, with a part for each stage of `Reading.timings_ms`.

        The server gives durations, so the stages are laid end to end before now: what the answer's way took is in the
        last one's place, and what the request's way took is the gap before the first.
        """
        if not (self._span and self._span.is_recording()):
            return
        self.set(
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.response.model": reading.model.get("profile"),
                "gen_ai.response.finish_reasons": (reading.finish_reason,),
                "gen_ai.usage.input_tokens": reading.usage.get("prompt_tokens"),
                "gen_ai.usage.output_tokens": reading.usage.get("completion_tokens"),
                "cxr.engine": reading.model.get("engine"),
                "cxr.precision": reading.model.get("precision"),
                "cxr.task": reading.task,
                "cxr.status": reading.status,
                "cxr.images": len(reading.images),
            }
        )
        took_s = {stage: reading.timings_ms[stage] / 1e3 for stage in STAGES if stage in reading.timings_ms}
        at_s = time.time() - sum(took_s.values())
        for stage, seconds in took_s.items():
            Span(stage, str(self.place), start_s=at_s).end(end_s=(at_s := at_s + seconds))

    def end(self, error: str | None = None, *, end_s: float | None = None) -> None:
        """It is over, now or at a time, with the code of an error or without; a second end changes nothing."""
        if self._ended:
            return
        self._ended = True
        if self._span:
            if error:
                self.set({"error.type": error})
                self._span.set_status(self._api.StatusCode.ERROR)
            self._span.end(end_s and int(end_s * _NS))

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.end(code_of(error) if error else None)

    def _context(self, parent: TraceParent) -> Any:
        api = self._api
        place = api.SpanContext(
            int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True,
            trace_flags=api.TraceFlags(int(parent.is_sampled)),
        )  # fmt: skip
        return api.set_span_in_context(api.NonRecordingSpan(place))


def code_of(error: BaseException) -> str:
    """What a span says of an error: its code, or its type; its text may be of a patient."""
    return getattr(error, "code", None) or type(error).__name__


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    """Those that have a value.

    Raises
    ------
    KeyError
        One is none of `ATTRIBUTES`.
    """
    if unknown := attributes.keys() - ATTRIBUTES:
        raise KeyError(f"{', '.join(sorted(unknown))}: of no span; see ATTRIBUTES")
    return {name: value for name, value in attributes.items() if value is not None}
