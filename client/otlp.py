"""Where a process sends its spans: OpenTelemetry's SDK, set up for OTLP over HTTP."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import threading
from collections.abc import Callable

from cxr_triton.extras import remedy, require
from cxr_triton.trace import ENDPOINT, traces_url, traces_url_is_whole

_MODULE = "opentelemetry.exporter"
_is_started = threading.Event()
EXIT_S = 2.0
"""How long the end of a process waits for spans that are not sent yet."""


def start(url: str | None, service: str, say: Callable[[str], None]) -> None:
    """Record spans from now on, and send them as they come and at the end of the process; a second call does nothing.

    Parameters
    ----------
    url : str, optional
        Of a collector, as ``http://127.0.0.1:4318``. Without it the environment may name one, as the SDK reads it
        (`ENDPOINT` and its relatives); where it does not either, nothing is imported, and nothing done.
    service : str
        Of ``service.name``, behind ``cxr-triton-``; the environment's ``OTEL_SERVICE_NAME`` comes first.
    say : callable
        Is told in a line when spans cannot be sent. A reading never waits for them, nor fails of them, and the end of
        the process waits for `EXIT_S` at most.

    Raises
    ------
    InvalidRequest
        `url` is no address of HTTP.
    ModuleNotFoundError
        It was given, and the extra `trace` is not installed.
    """
    if _is_started.is_set():
        return
    _is_started.set()
    endpoint: str | None = None
    if url:
        require("opentelemetry", _MODULE)
        endpoint = traces_url(url)
    elif not any(os.environ.get(name) for name in (ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        return
    elif not _is_here():
        say(f"{ENDPOINT} is set and no span is sent: {remedy('trace')}")
        return
    else:
        # Left to the SDK, but where it would add a path that is there.
        named = os.environ.get(ENDPOINT, "")
        is_whole = not os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") and traces_url_is_whole(named)
        endpoint = named if is_whole else None
    _logs(say)
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": f"cxr-triton-{service}"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # which would wait for half a minute
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    trace.set_tracer_provider(provider)
    _end_with_process(provider.shutdown, say)


def _is_here() -> bool:
    try:
        return importlib.util.find_spec(f"{_MODULE}.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def _end_with_process(end: Callable[[], None], say: Callable[[str], None]) -> None:
    """Send what is left at the end of the process, in a thread that is there before: none can be started by then."""
    ending, ended = threading.Event(), threading.Event()

    def send() -> None:
        ending.wait()
        end()
        ended.set()

    def wait() -> None:
        ending.set()
        if not ended.wait(EXIT_S):
            logging.getLogger("opentelemetry").handlers[:] = [logging.NullHandler()]  # none may write from now on
            say(f"spans: those that could not be sent within {EXIT_S:g} s are lost")

    threading.Thread(target=send, name="cxr-spans", daemon=True).start()
    atexit.register(wait)


def _logs(say: Callable[[str], None]) -> None:
    """What the SDK logs is said like everything else."""

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"spans: {' '.join(record.getMessage().split())[:300]}")

    logger = logging.getLogger("opentelemetry")
    logger.addHandler(Said(logging.WARNING))
    logger.propagate = False
