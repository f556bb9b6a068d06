"""HTTP listeners: an aiohttp application, with bounds on how many connections there are and how long one idles.

aiohttp counts none, and waits without limit for the head of a request and for a peer to take an answer.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from cxr_triton.client.endpoint import Http
from cxr_triton.errors import Unavailable

_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_LINGERING = 64
"""So many refused connections at once may send the rest of what they came with; those beyond are closed at once."""

Tell = Callable[[str, dict[str, str]], None]
"""Takes what befell a connection: an event and its facts."""


class HttpListener:
    """Listens within its ``async with``.

    Parameters
    ----------
    app : web.Application
        Its middlewares come after those of the listener, which answer a request that takes over `total_s` with 408 and
        one whose handler fails with 500; with 400 where the peer is at fault, whose body breaks off.
    settings : Http
    tell : Tell
    name : str
        Of the section of its settings, with which the error of a taken port begins.
    **runner
        Further options of `aiohttp.web.AppRunner`.

    Attributes
    ----------
    port : int
        What it listens on.

    Raises
    ------
    InvalidConfig
        The files of `settings.tls` cannot be used.
    Unavailable
        When it is entered: the port is taken.
    """

    def __init__(self, app: web.Application, settings: Http, tell: Tell, *, name: str = "", **runner: Any):
        self._settings, self._prefix = settings, f"{name}: " if name else ""
        self._keeper = Doorkeeper(settings, tell)
        app.middlewares.insert(0, self._keeper.middleware())
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, auto_decompress=False, **runner)
        self._server: asyncio.Server | None = None
        self.port = settings.port

    @property
    def address(self) -> str:
        """As a browser takes it."""
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        return f"{'https' if self._settings.tls else 'http'}://{host}:{self.port}/"

    async def __aenter__(self) -> HttpListener:
        host, port = self._settings.host, self._settings.port
        await self._runner.setup()
        if self._runner.server:
            self._keeper.inner = self._runner.server
        try:
            self._server = await asyncio.get_running_loop().create_server(self._keeper, host, port)
        except OSError as error:
            await self._runner.cleanup()
            raise Unavailable(
                f"{self._prefix}cannot listen on {host} port {port} ({error.strerror}); stop what listens there"
            ) from None
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()
        for connection in list(self._keeper.lingering):
            connection.abort()
        await self._runner.cleanup()

    def close(self) -> None:
        """Take no more connections; those that are open stay so."""
        if self._server:
            self._server.close()


class Doorkeeper:
    """Makes the protocol of each connection; its `middleware` says when a request is under way.

    Parameters
    ----------
    settings : Http
    tell : Tell

    Attributes
    ----------
    inner : callable
        Makes aiohttp's protocol of a connection; set before the first one comes.
    """

    def __init__(self, settings: Http, tell: Tell):
        self.settings, self.tell = settings, tell
        self.tls: ssl.SSLContext | None = settings.tls.server() if settings.tls else None
        self.inner: Callable[[], Any] = asyncio.Protocol
        self.open: collections.Counter[str] = collections.Counter()
        self.connections: dict[asyncio.BaseTransport | None, Connection] = {}
        self.lingering: set[Connection] = set()

    def __call__(self) -> Connection:
        """As asyncio makes protocols."""
        return Connection(self)

    def middleware(self) -> Any:
        """Gives a request `total_s`; what comes before and after it has `idle_s`."""
        total_s, idle_s = self.settings.total_s, self.settings.idle_s

        @web.middleware
        async def bounded(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            connection = self.connections.get(request.transport)
            if connection is None:
                return web.Response(status=503)  # it went meanwhile
            connection.wait(total_s + idle_s)
            try:
                async with asyncio.timeout(total_s):
                    return await handler(request)
            except TimeoutError:
                return web.json_response({"error": f"not over within {total_s:g} s"}, status=408)
            except web.HTTPException:
                raise
            except (web.RequestPayloadError, ConnectionResetError):
                return web.json_response({"error": "the request broke off on its way; send it again"}, status=400)
            except Exception as error:
                self.tell("request_failed", {"error": type(error).__name__})  # its text may quote the request
                return web.json_response({"error": "failed"}, status=500)
            finally:
                connection.wait(idle_s)

        return bounded


class Connection(asyncio.Protocol):
    """One connection: counted before its TLS handshake, and closed when its time is up."""

    def __init__(self, keeper: Doorkeeper):
        self._keeper = keeper
        self._transport: Any = None
        self._inner: Any = None
        self._early = b""
        """What comes in the last flight of a handshake."""
        self._address = ""
        self._timer: asyncio.TimerHandle | None = None
        self._handshake: asyncio.Task | None = None

    def wait(self, seconds: float) -> None:
        """Close the connection after so long, unless this is said again."""
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.abort)

    def abort(self) -> None:
        """Close the connection now."""
        self._transport.abort()

    def connection_made(self, transport: Any) -> None:
        """Count it, or refuse it unheard."""
        keeper, settings = self._keeper, self._keeper.settings
        self._transport, address = transport, (transport.get_extra_info("peername") or ("",))[0]
        reason = None
        if keeper.open[address] >= settings.max_per_address:
            reason = "too_many_of_address"
        elif keeper.open.total() >= settings.max_connections:
            reason = "too_many"
        if reason:
            keeper.tell("connection_refused", {"why": reason, "address": address})
            self._refuse(transport)
            return
        self._address = address
        keeper.open[address] += 1
        self.wait(settings.idle_s)
        if keeper.tls:
            transport.pause_reading()
            self._handshake = asyncio.get_running_loop().create_task(self._encrypt(keeper.tls))
        else:
            self._begin(transport)

    def _refuse(self, transport: Any) -> None:
        """Say so, and let the peer send the rest of its request for `idle_s`: it is thrown away.

        A socket that is closed while its peer still sends resets the connection, and a peer that writes then may never
        read the answer.
        """
        keeper = self._keeper
        if not keeper.tls:
            transport.write(_BUSY)
        if keeper.tls or len(keeper.lingering) >= _LINGERING:
            transport.close()
            return
        transport.write_eof()
        keeper.lingering.add(self)
        self.wait(keeper.settings.idle_s)

    async def _encrypt(self, tls: ssl.SSLContext) -> None:
        loop, limit_s = asyncio.get_running_loop(), self._keeper.settings.idle_s
        transport = None
        with contextlib.suppress(OSError):  # those of TLS are, too
            transport = await loop.start_tls(
                self._transport, self, tls, server_side=True, ssl_handshake_timeout=limit_s
            )
        if transport is None:
            self._transport.abort()
            self._end()  # nobody else says so
        else:
            self._begin(transport)

    def _begin(self, transport: Any) -> None:
        self._transport = transport
        self._keeper.connections[transport] = self
        self._inner = self._keeper.inner()
        self._inner.connection_made(transport)
        if self._early:
            self._inner.data_received(self._early)
            self._early = b""

    def _end(self) -> None:
        if self._timer:
            self._timer.cancel()
        keeper = self._keeper
        keeper.lingering.discard(self)
        keeper.connections.pop(self._transport, None)
        if self._address:
            keeper.open[self._address] -= 1
            keeper.open += collections.Counter()  # forget addresses without connections
            self._address = ""

    def data_received(self, data: bytes) -> None:
        """To aiohttp."""
        if self._inner:
            self._inner.data_received(data)
        elif self._handshake:
            self._early += data

    def eof_received(self) -> bool | None:
        """To aiohttp."""
        return self._inner.eof_received() if self._inner else None

    def pause_writing(self) -> None:
        """To aiohttp."""
        if self._inner:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """To aiohttp."""
        if self._inner:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """It does not count any more."""
        self._end()
        if self._inner:
            self._inner.connection_lost(exc)
