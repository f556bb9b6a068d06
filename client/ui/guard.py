"""Who may come in, and how every request that fails is answered: the middleware around all handlers, and the login."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from aiohttp import web

from cxr_triton.client.address import name_of, netloc_of
from cxr_triton.client.log import Log
from cxr_triton.client.login import Login, TooManyTries, form_field
from cxr_triton.client.ui.refusal import Refusal
from cxr_triton.client.ui.settings import Settings
from cxr_triton.errors import AccessDenied, CxrError, InternalError, InvalidRequest, Unavailable

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "same-origin",  # with less, a browser sends its forms without their origin
    "Server": "cxr-triton",
    "X-Content-Type-Options": "nosniff",
}
LOGIN, STYLE = "/login", "/login.css"
_FORM, _STYLE = (Path(__file__).with_name(name).read_text("utf-8") for name in ("login.html", "login.css"))
_END = re.compile(r"/api/sessions/[A-Za-z0-9_-]{1,64}/end")
_BODIES = ("application/json", "application/octet-stream")
"""Types of bodies; a page of another site cannot send them without asking first."""


class Guard:
    """Checks name, origin, login and form of a request before anything of its body is read."""

    def __init__(self, settings: Settings, login: Login | None, log: Log):
        self._hosts, self._login, self._log = settings.hosts, login, log
        self.is_draining = False

    def add_routes(self, app: web.Application) -> None:
        """Those of the login, where there is one."""
        if self._login:
            app.router.add_get(LOGIN, self._form, allow_head=False)
            app.router.add_get(STYLE, self._style, allow_head=False)
            app.router.add_post(LOGIN, self._enter)
            app.router.add_post("/logout", self._leave)

    def middleware(self) -> Any:
        """As aiohttp takes one."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                self._check(request)
                if not self._may_enter(request):
                    return self._outside(request)
                return await handler(request)
            except Refusal as refusal:
                return refused(refusal)
            except CxrError as error:
                return refused(Refusal(error))
            except web.HTTPException as error:
                return self._of_http(request, error)
            except (asyncio.CancelledError, ConnectionError):
                raise
            except Exception as error:
                self._log("request_failed", error=type(error).__name__)  # its text may quote the request
                return refused(Refusal(InternalError("the page's server failed; see its log")))

        return guarded

    def _check(self, request: web.Request) -> None:
        host = request.headers.get("Host", "")
        if self._hosts is not None and name_of(host) not in self._hosts:
            raise Refusal(
                InvalidRequest(
                    "the name in the Host header is not served; ask by localhost, or start with --allow-host NAME"
                ),
                status=421,
            )
        if self.is_draining and request.method != "GET":
            raise Unavailable("the page's server is stopping")
        origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
        is_ours = site in (None, "same-origin") or (site == "none" and request.method == "GET")
        changes = request.method != "GET"
        if (changes or request.path.startswith("/api/")) and (
            not is_ours or (origin is not None and netloc_of(origin) != host)
        ):
            raise Refusal(
                InvalidRequest("the request comes from another site's page; load this page itself"), status=403
            )
        if changes and request.path.startswith("/api/") and request.body_exists and not _is_of(request, _BODIES):
            raise Refusal(
                InvalidRequest(f"the body is of another type; send {' or '.join(_BODIES)}, not compressed"), status=415
            )

    def _may_enter(self, request: web.Request) -> bool:
        if self._login is None or request.path in (LOGIN, STYLE):
            return True
        # A tab that closes after its login ended still ends its session, whose name nobody can guess.
        return self._login.is_in(request) or (request.method == "POST" and bool(_END.fullmatch(request.path)))

    def _outside(self, request: web.Request) -> web.Response:
        if request.path == "/" and request.method == "GET":
            return web.Response(status=303, headers={"Location": LOGIN})
        return refused(Refusal(AccessDenied("nobody is logged in"), status=401, hint="Log in."))

    async def _form(self, request: web.Request) -> web.Response:
        return _login_page(wrong=False)

    async def _style(self, request: web.Request) -> web.Response:
        return web.Response(text=_STYLE, content_type="text/css")

    async def _enter(self, request: web.Request) -> web.StreamResponse:
        given = await form_field(request, "password")
        response = web.Response(status=303, headers={"Location": "/"})
        try:
            is_right = self._login is not None and self._login.enter(given, response)
        except TooManyTries:
            return web.Response(
                status=429, text="too many wrong passwords; wait a minute\n", headers={"Retry-After": "60"}
            )
        self._log("login" if is_right else "login_refused", peer=request.remote or "")
        return response if is_right else _login_page(wrong=True)

    async def _leave(self, request: web.Request) -> web.StreamResponse:
        response = web.Response(status=303, headers={"Location": LOGIN})
        if self._login:
            self._login.leave(request, response)
        return response

    def _of_http(self, request: web.Request, error: web.HTTPException) -> web.StreamResponse:
        said = HTTPStatus(error.status).phrase
        return refused(
            Refusal(InvalidRequest(f"{request.method[:10]} {request.path[:60]!r}: {said}"), status=error.status)
        )


async def harden(request: web.Request, response: web.StreamResponse) -> None:
    """Nothing of an answer is kept, framed or guessed at on the way; as aiohttp's `on_response_prepare` takes it."""
    response.headers.update(HEADERS)


def refused(refusal: Refusal) -> web.Response:
    """The answer to a request that failed."""
    return web.json_response({"error": refusal.told}, status=refusal.status, headers=refusal.headers)


def _login_page(*, wrong: bool) -> web.Response:
    text = _FORM.replace(" hidden>", ">") if wrong else _FORM
    return web.Response(text=text, content_type="text/html", status=403 if wrong else 200)


def _is_of(request: web.Request, kinds: tuple[str, ...]) -> bool:
    return request.content_type in kinds and request.headers.get("Content-Encoding", "identity") == "identity"
