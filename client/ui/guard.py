"""Who may come in, and how every request that fails is answered; the login."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from aiohttp import web

from cxr_triton.client.door.bodies import is_plain
from cxr_triton.client.door.guard import HEADERS, DoorGuard, Handler, is_from_elsewhere
from cxr_triton.client.log import Log
from cxr_triton.client.login import Login
from cxr_triton.client.ui.refusal import Refusal
from cxr_triton.client.ui.settings import Settings
from cxr_triton.errors import AccessDenied, InvalidRequest, Unavailable

LOGIN, STYLE = "/login", "/login.css"
_FORM, _STYLE = (Path(__file__).with_name(name).read_text("utf-8") for name in ("login.html", "login.css"))
_END = re.compile(r"/api/sessions/[A-Za-z0-9_-]{1,64}/end")
_BODIES = ("application/json", "application/octet-stream")
"""Types of bodies."""


class Guard(DoorGuard):
    """Checks name, origin, login and form of a request before anything of its body is read."""

    refusal = Refusal
    headers: ClassVar[dict[str, str]] = {
        **HEADERS,
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Referrer-Policy": "same-origin",  # with less, a browser sends its forms without their origin
    }
    failed = "the page's server failed; see its log"

    def __init__(self, settings: Settings, login: Login | None, log: Log):
        super().__init__(settings, log)
        self._login = login

    def add_routes(self, app: web.Application) -> None:
        """Those of the login, where there is one."""
        if self._login:
            app.router.add_get(LOGIN, self._form, allow_head=False)
            app.router.add_get(STYLE, self._style, allow_head=False)
            app.router.add_post(LOGIN, self._enter)
            app.router.add_post("/logout", self._login.leave)

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """See `DoorGuard.answer`."""
        changes, is_api = request.method != "GET", request.path.startswith("/api/")
        if self.is_draining and changes:
            raise Unavailable("the page's server is stopping")
        if (changes or is_api) and is_from_elsewhere(request):
            raise Refusal(
                InvalidRequest("the request comes from another site's page; load this page itself"), status=403
            )
        if changes and is_api and request.body_exists and not is_plain(request, *_BODIES):
            raise Refusal(
                InvalidRequest(f"the body is of another type; send {' or '.join(_BODIES)}, not compressed"), status=415
            )
        if not self._may_enter(request):
            return self._outside(request)
        return await handler(request)

    def _may_enter(self, request: web.Request) -> bool:
        if self._login is None or request.path in (LOGIN, STYLE):
            return True
        # A tab that closes after its login ended still ends its session, whose name nobody can guess.
        return self._login.is_in(request) or (request.method == "POST" and bool(_END.fullmatch(request.path)))

    def _outside(self, request: web.Request) -> web.Response:
        if request.path == "/" and request.method == "GET":
            return web.Response(status=303, headers={"Location": LOGIN})
        raise Refusal(AccessDenied("nobody is logged in"), status=401, hint="Log in.")

    async def _form(self, request: web.Request) -> web.Response:
        return _login_page(wrong=False)

    async def _style(self, request: web.Request) -> web.Response:
        return web.Response(text=_STYLE, content_type="text/css")

    async def _enter(self, request: web.Request) -> web.StreamResponse:
        response = await self._login.enter(request) if self._login else None
        if response is None:
            self._log("login_refused", peer=request.remote or "")
            return _login_page(wrong=True)
        if response.status == 303:
            self._log("login", peer=request.remote or "")
        return response


def _login_page(*, wrong: bool) -> web.Response:
    text = _FORM.replace(" hidden>", ">") if wrong else _FORM
    return web.Response(text=text, content_type="text/html", status=403 if wrong else 200)
