"""Who may come in, and how every request that fails is answered."""

from __future__ import annotations

from http import HTTPStatus

from aiohttp import web

from cxr_triton.client.door.guard import DoorGuard, Handler
from cxr_triton.client.door.refusal import DoorRefusal
from cxr_triton.client.log import Log
from cxr_triton.client.openai.keys import Keys
from cxr_triton.client.openai.metrics import Metrics
from cxr_triton.client.openai.refusal import Refusal
from cxr_triton.client.openai.settings import Settings
from cxr_triton.errors import InvalidConfig, InvalidRequest, Unavailable

OPEN_PATHS = ("/health", "/openapi.json")
"""What nobody needs a key for."""
_HTTP = {
    404: "there is no {path}; see /openapi.json for what there is",
    405: "{path} does not take {method}; see /openapi.json for what it takes",
}


class Guard(DoorGuard):
    """Checks name, key and form of a request before anything of its body is read."""

    refusal = Refusal

    def __init__(self, settings: Settings, keys: Keys | None, metrics: Metrics, log: Log):
        super().__init__(settings, log)
        self._keys, self._metrics = keys, metrics

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """See `DoorGuard.answer`."""
        if self.is_draining:
            raise Unavailable("the server is stopping; send the request again later")
        if self._keys and request.path not in OPEN_PATHS and not self._is_known(request):
            raise Refusal(
                InvalidRequest("no valid API key came with the request; send it as Authorization: Bearer KEY"),
                status=401,
            )
        return await handler(request)

    def _is_known(self, request: web.Request) -> bool:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        try:
            return self._keys is not None and self._keys.allow(key.strip()) and scheme.lower() == "bearer"
        except InvalidConfig as error:
            self._log("keys_unreadable", error=error.message)
            return False

    def said_of(self, request: web.Request, status: int) -> str:
        """See `DoorGuard.said_of`."""
        said = _HTTP.get(status, HTTPStatus(status).phrase)
        return said.format(path=repr(request.path[:60]), method=request.method[:20])

    def refused(self, request: web.Request, refusal: DoorRefusal) -> web.Response:
        """See `DoorGuard.refused`."""
        if request.path != "/v1/chat/completions" or refusal.status in (401, 421):
            self._metrics.refused.labels(str(refusal.status)).inc()
        if refusal.status == 401:
            refusal.headers["WWW-Authenticate"] = "Bearer"
        return super().refused(request, refusal)
