"""The login of a page for people: one password, cookies that end, and a limit of wrong tries."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

from aiohttp import web

SESSION_S = 8 * 3600.0
TRIES, TRIES_S = 5, 60.0
"""Wrong passwords that all visitors together have in so many seconds, before the login answers 429."""


class Login:
    """Who is logged in, by a cookie that only its digest is kept of.

    Parameters
    ----------
    password : str
    cookie : str
        Its name.
    secure : bool
        Whether the cookie travels encrypted only.
    """

    def __init__(self, password: str, cookie: str, *, secure: bool):
        self._password, self._cookie, self._secure = digest(password), cookie, secure
        self._sessions: dict[str, float] = {}  # digest of a cookie → when it ends
        self._wrong: list[float] = []

    async def enter(self, request: web.Request) -> web.Response | None:
        """The way in for who sends a form with the password, 429 after too many wrong ones; None where it is wrong."""
        given = await form_field(request, "password")
        now = time.monotonic()  # from here on nothing waits: requests side by side are counted one after the other
        self._wrong = [at for at in self._wrong if now - at < TRIES_S]
        if len(self._wrong) >= TRIES:
            return web.Response(
                status=429, text="too many wrong passwords; wait a minute\n", headers={"Retry-After": "60"}
            )
        if not hmac.compare_digest(digest(given), self._password):
            self._wrong.append(now)
            return None
        cookie = secrets.token_urlsafe(32)
        self._sessions = {name: ends for name, ends in self._sessions.items() if ends > now}
        self._sessions[digest(cookie)] = now + SESSION_S
        response = web.Response(status=303, headers={"Location": "/"})
        response.set_cookie(
            self._cookie, cookie, max_age=int(SESSION_S), httponly=True, samesite="Strict", secure=self._secure
        )
        return response

    def is_in(self, request: web.Request) -> bool:
        """Whether the request comes with a cookie that still counts."""
        return self._sessions.get(digest(self.cookie(request)), 0.0) > time.monotonic()

    async def leave(self, request: web.Request) -> web.Response:
        """Forget the request's cookie, here and in the browser; leads to the login."""
        self._sessions.pop(digest(self.cookie(request)), None)
        response = web.Response(status=303, headers={"Location": "/login"})
        response.del_cookie(self._cookie)
        return response

    def cookie(self, request: web.Request) -> str:
        """The request's cookie, empty without one."""
        return request.cookies.get(self._cookie, "")


def digest(text: str) -> str:
    """SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


async def form_field(request: web.Request, name: str) -> str:
    """What a form says in a field; "" where it has none, or is none.

    Only what a browser sends of fields alone is read: files in a form would come to lie on the disk.
    """
    if request.content_type != "application/x-www-form-urlencoded":
        return ""
    try:
        return str((await request.post()).get(name, ""))
    except (LookupError, ValueError):  # a character set that nobody knows, bytes that are not of it
        return ""
