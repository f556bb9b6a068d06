"""Who may come in, and how every request that fails is answered: the middleware around all handlers of a service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import ClassVar

from aiohttp import web

from cxr_triton.client.address import netloc_of
from cxr_triton.client.door.refusal import DoorRefusal, Misdirected
from cxr_triton.client.door.settings import DoorSettings
from cxr_triton.client.log import Log
from cxr_triton.client.wire import FAILED
from cxr_triton.errors import CxrError, InternalError, InvalidRequest

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
HEADERS = {"Cache-Control": "no-store", "Server": "cxr-triton", "X-Content-Type-Options": "nosniff"}
"""Nothing of an answer is kept or guessed at on the way, and no version is told."""


class DoorGuard:
    """Checks a request before anything of its body is read."""

    refusal: ClassVar[type[DoorRefusal]]
    headers: ClassVar[dict[str, str]] = HEADERS
    """Of every answer."""
    failed: ClassVar[str] = FAILED
    """What is told of a failure that nobody foresaw."""

    def __init__(self, settings: DoorSettings, log: Log):
        self.settings, self._log = settings, log
        self.is_draining = False

    def around(self, app: web.Application) -> web.Application:
        """An application whose requests it looks at and whose answers it hardens."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                if not self.settings.serves(request.headers.getall("Host", [])):
                    raise Misdirected(
                        "the name in the Host header is not served; ask by localhost, or start with --allow-host NAME"
                    )
                return await self.answer(request, handler)
            except DoorRefusal as refusal:
                return self.refused(request, refusal)
            except CxrError as error:
                return self.refused(request, self.refusal(error))
            except web.HTTPException as error:
                said = InvalidRequest(self.said_of(request, error.status))
                return self.refused(request, self.refusal(said, status=error.status))
            except web.RequestPayloadError:
                return self.refused(request, self.refusal(InvalidRequest("the request broke off; send it again")))
            except (asyncio.CancelledError, ConnectionResetError):
                raise  # the listener knows them
            except Exception as error:
                self._log("request_failed", error=type(error).__name__)  # its text may quote the request
                return self.refused(request, self.refusal(InternalError(self.failed)))

        app.middlewares.append(guarded)
        app.on_response_prepare.append(self._harden)
        return app

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """What the handler says to who may come in; raises `DoorRefusal` or `CxrError`."""
        raise NotImplementedError

    def said_of(self, request: web.Request, status: int) -> str:
        """What is told of a status that no handler gave."""
        return f"{request.method[:10]} {request.path[:60]!r}: {HTTPStatus(status).phrase}"

    def refused(self, request: web.Request, refusal: DoorRefusal) -> web.Response:
        """The answer to a request that failed."""
        return web.json_response(refusal.as_json(), status=refusal.status, headers=refusal.headers)

    async def _harden(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(self.headers)


def is_from_elsewhere(request: web.Request) -> bool:
    """Whether another site's page asks, through a visitor's browser."""
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
    is_ours = site in (None, "same-origin") or (site == "none" and request.method == "GET")
    return not is_ours or (origin is not None and netloc_of(origin) != request.headers.get("Host", ""))
