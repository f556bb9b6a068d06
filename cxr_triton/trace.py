"""Which request something belongs to: W3C Trace Context's ``traceparent``, made here, or taken over after a check."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from cxr_triton.errors import InvalidRequest

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""Variable of the environment that names a collector, to all that speak OpenTelemetry."""
_PATH = "/v1/traces"
_LENGTH = 55
_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True)
class TraceParent:
    """A place in a trace (https://www.w3.org/TR/trace-context/); its text is the header ``traceparent``.

    Attributes
    ----------
    trace_id : str
        32 lower-case hexadecimal digits, the same for all that one request brings about.
    span_id : str
        16 of them: whose child comes next.
    is_sampled : bool
        Somebody records this trace.
    """

    trace_id: str
    span_id: str
    is_sampled: bool = False

    @classmethod
    def new(cls) -> TraceParent:
        """The first place of a trace that nobody records."""
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    @classmethod
    def from_text(cls, text: str | None) -> TraceParent | None:
        """What a caller sent, or None where that is no ``traceparent``: it is replaced then, and never quoted."""
        head, rest = (text or "")[:_LENGTH], (text or "")[_LENGTH : _LENGTH + 1]
        found = _FORM.fullmatch(head)
        # Versions after 00 may say more behind a hyphen.
        if not found or rest not in ("", "-") or (rest and head.startswith("00")):
            return None
        return cls(found[1], found[2], bool(int(found[3], 16) & 1))

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"


def trace_id_of(text: str | None) -> str:
    """The trace id in a ``traceparent``; "" where it is none."""
    place = TraceParent.from_text(text)
    return place.trace_id if place else ""


def traces_url_is_whole(url: str) -> bool:
    """Whether an address is that of traces already, which the SDK takes for the collector's."""
    return url.rstrip("/").endswith(_PATH)


def traces_url(url: str) -> str:
    """Where a collector at `url` takes traces by OTLP over HTTP.

    Raises
    ------
    InvalidRequest
        It is no address of HTTP.
    """
    if not re.fullmatch(r"https?://[!-+\--~]+", url):  # a comma would be the end of it in a flag of Triton
        raise InvalidRequest(f"{url!r:.80} is no address of a collector; write http://HOST:4318")
    return url if url.endswith(_PATH) else url.rstrip("/") + _PATH
