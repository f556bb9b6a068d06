"""The server as a process: its parts started, watched and stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TextIO

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from cxr_triton.client import otlp
from cxr_triton.client.aio import AsyncReader
from cxr_triton.client.door.service import run_until_told, serve_until
from cxr_triton.client.listener import HttpListener
from cxr_triton.client.log import Log
from cxr_triton.client.openai.answer import model
from cxr_triton.client.openai.completions import Completions
from cxr_triton.client.openai.description import description
from cxr_triton.client.openai.guard import Guard
from cxr_triton.client.openai.keys import Keys
from cxr_triton.client.openai.metrics import Metrics
from cxr_triton.client.openai.refusal import Refusal
from cxr_triton.client.openai.settings import Settings
from cxr_triton.client.served import ServedProfile
from cxr_triton.errors import CxrError, InvalidRequest

HEALTH_S = 1.0
"""How long an answer about the server's health is taken for true."""


class Service:
    """All parts of one process.

    Parameters
    ----------
    settings : Settings
    reader : AsyncReader
        Of the served `cxr_reader`; closed at the end.
    stream : file, optional
        Takes the log; standard error by default.

    Attributes
    ----------
    port : int or None
        What is listened on, once `run` has started.

    Raises
    ------
    InvalidConfig
        Keys or certificate cannot be used.
    """

    def __init__(self, settings: Settings, reader: AsyncReader, stream: TextIO | None = None):
        self.settings, self._reader = settings, reader
        self._log, self._metrics = Log(stream), Metrics()
        keys = Keys(settings.api_keys_file) if settings.api_keys_file else None
        if keys and keys.is_open:
            self._log("keys_readable_by_others", remedy="chmod o= FILE")
        self._guard = Guard(settings, keys, self._metrics, self._log)
        self._profile = ServedProfile(reader)
        self._completions = Completions(settings, reader, self._profile, self._metrics, self._log)
        self._looking = asyncio.Lock()
        self._health: tuple[float, CxrError | None] | None = None
        self._listener = HttpListener(
            self._app(), settings.http, self._tell, handler_cancellation=True, shutdown_timeout=0.1
        )
        self.port: int | None = None

    async def run(self, stopping: asyncio.Event, started: Callable[[str], None] = lambda address: None) -> None:
        """Serve until `stopping` is set, then let what is under way end within `grace_s`.

        Raises
        ------
        Unavailable
            The port is taken.
        """
        try:
            async with self._listener as listener:
                self.port = listener.port
                started(listener.address)
                await serve_until(stopping, listener, self._guard, lambda: self._completions.under_way)
        finally:
            await self._reader.close()
            self._log("stopped")

    def _app(self) -> web.Application:
        app = self._guard.around(web.Application())
        app.router.add_get("/health", self._healthy, allow_head=False)
        app.router.add_get("/metrics", self._metrics_page, allow_head=False)
        app.router.add_get("/openapi.json", self._description, allow_head=False)
        app.router.add_get("/v1/models", self._models, allow_head=False)
        app.router.add_get("/v1/models/{name}", self._model, allow_head=False)
        app.router.add_post("/v1/chat/completions", self._completions.handle)
        return app

    def _tell(self, event: str, facts: dict[str, str]) -> None:
        if event == "connection_refused":
            self._metrics.connections_refused.labels(facts["why"]).inc()
        self._log(event, **facts)

    async def _healthy(self, request: web.Request) -> web.Response:
        """200 when a completion that came now would be read; what fails is said."""
        async with self._looking:
            if self._health is None or time.monotonic() > self._health[0]:
                failure = None
                try:
                    await self._reader.server_info()
                except CxrError as error:
                    failure = error
                    self._log("not_healthy", error=error.wire())
                self._health = (time.monotonic() + HEALTH_S, failure)
        if failure := self._health[1]:
            raise type(failure)("no reading can be made at the moment; the log says why")  # to anybody, so no more
        return web.json_response({"status": "ok"})

    async def _metrics_page(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _description(self, request: web.Request) -> web.Response:
        return web.json_response(description())

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [model(await self._profile())]})

    async def _model(self, request: web.Request) -> web.Response:
        profile = await self._profile()
        if request.match_info["name"] != profile.name:
            said = f"model: {request.match_info['name']!r:.60} is not served here; ask for {profile.name!r}"
            raise Refusal(InvalidRequest(said), status=404, param="model")
        return web.json_response(model(profile))


def serve(
    settings: Settings, reader: Callable[[], AsyncReader], started: Callable[[str], None], trace_otlp: str | None
) -> None:
    """Run until SIGTERM or SIGINT; both end it in order. `started` gets the address."""
    log = Log()
    otlp.start(trace_otlp, "openai", lambda said: log("spans_not_sent", error=said))
    run_until_told(lambda stopping: Service(settings, reader()).run(stopping, started))
