"""The server as a process: its parts started, watched and stopped; the page, and what it is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from aiohttp import web

from cxr_triton import __version__
from cxr_triton.client import otlp
from cxr_triton.client.aio import AsyncReader
from cxr_triton.client.door.service import run_until_told, serve_until
from cxr_triton.client.limits import read_password
from cxr_triton.client.listener import HttpListener
from cxr_triton.client.log import Log
from cxr_triton.client.login import Login
from cxr_triton.client.ui.decoders import Decoders
from cxr_triton.client.ui.exports import EXPORTS, Exports
from cxr_triton.client.ui.guard import Guard
from cxr_triton.client.ui.pictures import Pictures
from cxr_triton.client.ui.readings import Readings
from cxr_triton.client.ui.servers import Server, told
from cxr_triton.client.ui.sessions import Sessions
from cxr_triton.client.ui.settings import Settings
from cxr_triton.reading import NOT_FOR_DIAGNOSIS
from cxr_triton.request import MAX_TEXT_CHARS

PAGE = Path(__file__).with_name("page")
"""Folder of the page's files."""
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
"""Files of the page by the end of their names."""
SWEEP_S = 5.0
"""How often sessions that nobody uses are looked for."""
_COOKIE = "cxr_ui"
_SESSION = "/api/sessions/{session:[A-Za-z0-9_-]{1,64}}"


class Service:
    """All parts of one process.

    Parameters
    ----------
    settings : Settings
    readers : sequence of AsyncReader
        Of the served `cxr_reader`s, the default one first; closed at the end.
    stream : file, optional
        Takes the log; standard error by default.
    page : Path
        Folder of the page's files.

    Attributes
    ----------
    port : int or None
        What is listened on, once `run` has started.
    sessions : Sessions

    Raises
    ------
    InvalidConfig
        Password or certificate cannot be used.
    """

    def __init__(
        self, settings: Settings, readers: Sequence[AsyncReader], stream: TextIO | None = None, page: Path = PAGE
    ):
        self.settings, self.sessions = settings, Sessions(settings)
        self._log = Log(stream)
        self._servers = {server.name: server for server in map(Server, readers)}
        self._page = {
            file.name: file.read_bytes() for file in (page.iterdir() if page.is_dir() else ()) if file.suffix in TYPES
        }
        login = None
        if settings.password_file:
            password = read_password(settings.password_file, "--password-file")
            login = Login(password, _COOKIE, secure=settings.cert is not None)
        self._guard = Guard(settings, login, self._log)
        self.port: int | None = None

    async def run(self, stopping: asyncio.Event, started: Callable[[str], None] = lambda address: None) -> None:
        """Serve until `stopping` is set, then let what is under way end within `grace_s`.

        Raises
        ------
        Unavailable
            The port is taken.
        """
        decoders = Decoders(self.settings.decoders)
        sweeper = asyncio.create_task(self._sweep())
        try:
            async with self._listener(decoders) as listener:
                self.port = listener.port
                started(listener.address)
                await serve_until(stopping, listener, self._guard, lambda: self.sessions.under_way)
                self.sessions.end_all()
        finally:
            sweeper.cancel()
            self.sessions.end_all()
            for each in self._servers.values():
                await each.reader.close()
            await asyncio.to_thread(decoders.close)
            self._log("stopped")

    def _listener(self, decoders: Decoders) -> HttpListener:
        app = self._guard.around(web.Application(client_max_size=1 << 16))
        self._guard.add_routes(app)
        app.router.add_get("/", self._index, allow_head=False)
        app.router.add_get("/page/{name}", self._file, allow_head=False)
        app.router.add_get("/api/about", self._about, allow_head=False)
        app.router.add_post("/api/sessions", self._open)
        app.router.add_delete(_SESSION, self._end)
        app.router.add_post(f"{_SESSION}/end", self._end)
        servers = list(self._servers.values())
        for part in (
            Pictures(self.settings, self.sessions, decoders, servers, self._log),
            Readings(self.settings, self.sessions, self._servers, self._log),
            Exports(self.sessions, decoders),
        ):
            part.add_routes(app, _SESSION)
        self._limits = {
            "file_bytes": decoders.most_bytes,
            "pictures": self.settings.max_pictures,
            "question_chars": MAX_TEXT_CHARS,
        }
        return HttpListener(
            app,
            self.settings.http,
            lambda event, facts: self._log(event, **facts),
            handler_cancellation=True,
            shutdown_timeout=0.1,
        )

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_S, self.settings.idle_s / 2))
            if ended := self.sessions.sweep():
                self._log("sessions_expired", sessions=ended)

    async def _index(self, request: web.Request) -> web.Response:
        return self._given("index.html")

    async def _file(self, request: web.Request) -> web.Response:
        return self._given(request.match_info["name"])

    def _given(self, name: str) -> web.Response:
        if name not in self._page:
            raise web.HTTPNotFound
        return web.Response(body=self._page[name], content_type=TYPES[Path(name).suffix], charset="utf-8")

    async def _about(self, request: web.Request) -> web.Response:
        about = {
            "notice": NOT_FOR_DIAGNOSIS,
            "servers": await told(self._servers),
            "limits": self._limits,
            "exports": list(EXPORTS),
            "login": self.settings.password_file is not None,
            "version": __version__,
        }
        return web.json_response(about)

    async def _open(self, request: web.Request) -> web.Response:
        return web.json_response({"session": self.sessions.open().name}, status=201)

    async def _end(self, request: web.Request) -> web.Response:
        self.sessions.end(self.sessions.of(request))
        return web.Response(status=204)


def serve(
    settings: Settings,
    readers: Callable[[], Sequence[AsyncReader]],
    started: Callable[[str], None],
    trace_otlp: str | None = None,
) -> None:
    """Run until SIGTERM or SIGINT; both end it in order. `started` gets the address."""
    log = Log()
    otlp.start(trace_otlp, "ui", lambda said: log("spans_not_sent", error=said))
    run_until_told(lambda stopping: Service(settings, readers()).run(stopping, started))
