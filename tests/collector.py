"""A collector of OpenTelemetry: takes traces by OTLP over HTTP and keeps what it got."""

from __future__ import annotations

import base64
import contextlib
import gzip
import logging
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@contextlib.contextmanager
def collecting(monkeypatch):
    """A collector that `otlp.start` sends this process's spans to; `flush` waits for them, `said` is what was said."""
    from opentelemetry import trace

    from cxr_triton.client import otlp

    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("opentelemetry")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(otlp, "_is_started", threading.Event())
    providers = []

    def take(provider):  # what OpenTelemetry keeps for the whole process
        providers.append(provider)
        monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)

    monkeypatch.setattr(trace, "set_tracer_provider", take)
    with Collector() as collector:
        collector.said, collector.providers = [], providers
        collector.flush = lambda: [provider.force_flush() for provider in providers]
        yield collector
        for provider in providers:
            provider.shutdown()


@dataclass(frozen=True)
class Told:
    """A span as it arrived; ids in hexadecimal digits, times in ns since 1970."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent: str
    start: int
    end: int
    failed: bool
    attributes: dict


class Collector:
    """Runs on a free port until the `with` block ends.

    Attributes
    ----------
    url : str
    bodies : list of bytes
        What came in, to the letter.
    paths : list of str
    """

    def __init__(self):
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                is_packed = self.headers.get("Content-Encoding") == "gzip"
                collector.paths.append(self.path)
                collector.bodies.append(gzip.decompress(body) if is_packed else body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self, trace_id: str | None = None) -> list[Told]:
        """All that came, or those of a trace."""
        found = []
        for body in list(self.bodies):
            for resource in _request(body).resource_spans:
                facts = _values(resource.resource.attributes)
                for scope in resource.scope_spans:
                    found += [_told(span, facts.get("service.name", "")) for span in scope.spans]
        return [span for span in found if trace_id in (None, span.trace_id)]

    def until(self, trace_id: str, names: set[str], timeout_s: float = 60) -> dict[str, Told]:
        """Spans of a trace by their names, once all of these are there."""
        ends = time.monotonic() + timeout_s
        while not names <= (found := {span.name: span for span in self.spans(trace_id)}).keys():
            assert time.monotonic() < ends, f"{names - found.keys()} did not come; there are {sorted(found)}"
            time.sleep(0.02)
        return found


def _request(body: bytes) -> ExportTraceServiceRequest:
    """Protobuf, or JSON, as Triton sends it: of its own kind, with ids in hexadecimal digits."""
    if not body.startswith(b"{"):
        return ExportTraceServiceRequest.FromString(body)
    text = re.sub(r'"((?:trace|span|parentSpan)Id)":"([0-9a-f]*)"', _base64, body.decode())
    return json_format.Parse(text, ExportTraceServiceRequest(), ignore_unknown_fields=True)


def _base64(found: re.Match) -> str:
    return f'"{found[1]}":"{base64.b64encode(bytes.fromhex(found[2])).decode()}"'


def _told(span, service: str) -> Told:
    return Told(
        name=span.name,
        service=service,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        failed=span.status.code == span.status.STATUS_CODE_ERROR,
        attributes=_values(span.attributes),
    )


def _values(attributes) -> dict:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in attributes}
