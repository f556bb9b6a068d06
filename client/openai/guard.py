"""Who may come in, and how every request that fails is answered: the middleware around all handlers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from aiohttp import web

from cxr_triton.client.log import Log
from cxr_triton.client.openai.keys import Keys
from cxr_triton.client.openai.metrics import Metrics
from cxr_triton.client.openai.refusal import Refusal
from cxr_triton.client.openai.settings import Settings
from cxr_triton.client.wire import FAILED
from cxr_triton.errors import CxrError, InternalError, InvalidConfig, InvalidRequest, Unavailable

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OPEN_PATHS = ("/health", "/openapi.json")
"""What nobody needs a key for."""
_HTTP = {
    404: "there is no {path}; see /openapi.json for what there is",
    405: "{path} does not take {method}; see /openapi.json for what it takes",
}


class Guard:
    """Checks name, key and form of a request before anything of its body is read."""

    def __init__(self, settings: Settings, keys: Keys | None, metrics: Metrics, log: Log):
        self._hosts, self._keys = settings.hosts, keys
        self._metrics, self._log = metrics, log
        self.is_draining = False

    def middleware(self) -> Any:
        """As aiohttp takes one."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                self._check(request)
                return await handler(request)
            except Refusal as refusal:
                return self._refused(request, refusal)
            except CxrError as error:
                return self._refused(request, Refusal(error))
            except web.HTTPException as error:
                return self._refused(request, self._of_http(request, error))
            except asyncio.CancelledError:
                raise
            except Exception as error:
                self._log("request_failed", error=type(error).__name__)  # its text may quote the request
                return self._refused(request, Refusal(InternalError(FAILED)))

        return guarded

    def _check(self, request: web.Request) -> None:
        if self._hosts is not None and _host(request) not in self._hosts:
            raise Refusal(
                InvalidRequest(
                    "the name in the Host header is not served; ask by localhost, or start with --allow-host NAME"
                ),
                status=421,
            )
        if self.is_draining:
            raise Refusal(Unavailable("the server is stopping; send the request again later"))
        if self._keys and request.path not in OPEN_PATHS and not self._is_known(request):
            raise Refusal(
                InvalidRequest("no valid API key came with the request; send it as Authorization: Bearer KEY"),
                status=401,
            )

    def _is_known(self, request: web.Request) -> bool:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        try:
            return self._keys is not None and self._keys.allow(key.strip()) and scheme.lower() == "bearer"
        except InvalidConfig as error:
            self._log("keys_unreadable", error=error.message)
            return False

    def _of_http(self, request: web.Request, error: web.HTTPException) -> Refusal:
        said = _HTTP.get(error.status, HTTPStatus(error.status).phrase)
        said = said.format(path=repr(request.path[:60]), method=request.method[:20])
        return Refusal(InvalidRequest(said), status=error.status)

    def _refused(self, request: web.Request, refusal: Refusal) -> web.Response:
        if request.path != "/v1/chat/completions" or refusal.status in (401, 421):
            self._metrics.refused.labels(str(refusal.status)).inc()
        headers = dict(refusal.headers)
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.json_response(refusal.as_json(), status=refusal.status, headers=headers)


def _host(request: web.Request) -> str:
    """The name in the Host header, without its port."""
    hosts = request.headers.getall("Host", [])
    if len(hosts) != 1:
        return ""
    name, colon, port = hosts[0].rpartition(":")
    return (name if colon and port.isdigit() else hosts[0]).lower()
