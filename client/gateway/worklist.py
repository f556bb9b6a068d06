"""The worklist page: what came in, where it is, what failed and why; retry and drop. For people, behind its own login.

A process of its own over the gateway's queue, so that nothing that it does can hold up a study. Everything is one page
of HTML that the server writes; a script of a few lines fetches it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy.exc
from aiohttp import web

from cxr_triton.client.address import is_served
from cxr_triton.client.door.guard import HEADERS, Handler, is_from_elsewhere
from cxr_triton.client.door.service import run_until_told
from cxr_triton.client.gateway.config import Config
from cxr_triton.client.gateway.log import Log
from cxr_triton.client.gateway.store import JobSeen, Store
from cxr_triton.client.gateway.watch import RejectedFiles
from cxr_triton.client.limits import read_password
from cxr_triton.client.listener import HttpListener
from cxr_triton.client.login import Login, form_field
from cxr_triton.errors import InvalidConfig
from cxr_triton.page import render

STATES = {
    "open": ("received", "grouped", "reading", "sending"),
    "failed": ("dead",),
    "done": ("done",),
    "dropped": ("dropped",),
    "all": ("received", "grouped", "reading", "sending", "done", "dead", "dropped"),
}
"""What the page can be asked for, and the states of the jobs that it then lists."""
ROWS = 100
_COOKIE = "cxr_worklist"
_UID = re.compile(r"\b\d+(?:\.\d+){3,}\b")
_HEADERS = {
    **HEADERS,
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "same-origin",  # with less, a browser sends its forms without their origin
}
_SCRIPT = Path(__file__).with_name("worklist.js")


class Page:
    """The page and its login.

    Parameters
    ----------
    config : Config
        With a section ``worklist``.
    store : Store
    log : Log
        Takes logins, retries and drops.

    Raises
    ------
    InvalidConfig
        The password cannot be read, or is too short.
    """

    def __init__(self, config: Config, store: Store, log: Log):
        if config.worklist is None:
            raise InvalidConfig("worklist: is missing; `cxr-triton gateway example` shows the section")
        self._settings, self._store, self._log = config.worklist, store, log
        self._rejected = RejectedFiles(config.folder) if config.folder else None
        password = read_password(config.worklist.password_file, "worklist.password_file")
        self._login = Login(password, _COOKIE, secure=config.worklist.tls is not None)
        self._key = secrets.token_bytes(32)

    def listener(self) -> HttpListener:
        """Routes, behind the limits of a listener and the checks of each request."""
        app = web.Application(client_max_size=1 << 16, middlewares=[self._answer])
        app.on_response_prepare.append(_harden)
        app.router.add_get("/login", self._login_page)
        app.router.add_post("/login", self._enter)
        app.router.add_get("/worklist.js", self._script)
        app.router.add_post("/logout", self._leave)
        app.router.add_get("/", self._show)
        app.router.add_get("/status.json", self._status)
        app.router.add_get("/jobs/{job:[0-9]{1,18}}/{action:retry|drop}", self._ask)
        app.router.add_post("/jobs/{job:[0-9]{1,18}}/{action:retry|drop}", self._act)
        return HttpListener(app, self._settings, self._tell, name="worklist")

    def _tell(self, event: str, facts: dict[str, str]) -> None:
        self._log("warning", event, door="worklist", **facts)

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if refusal := self._refusal(request):
            return refusal
        if request.path not in ("/login", "/worklist.js") and not self._login.is_in(request):
            if request.path != "/" or request.method != "GET":
                return web.Response(status=401, text="log in first\n")
            raise web.HTTPSeeOther("/login")
        try:
            return await handler(request)
        except sqlalchemy.exc.SQLAlchemyError as error:
            self._log("error", "queue_failed", error=type(error).__name__)
            return web.Response(status=503, text="the queue cannot be reached; look at the gateway's log\n")

    def _refusal(self, request: web.Request) -> web.Response | None:
        """A page of another site that asks through a visitor's browser."""
        if not is_served(self._settings.host, hosts := request.headers.getall("Host", [])):
            return web.Response(status=421, text=f"this is no {''.join(hosts)[:80]!r}; ask {self._settings.host}\n")
        if request.method == "POST" and is_from_elsewhere(request):
            return web.Response(status=403, text="asked for by another site\n")
        return None

    # The login.

    async def _login_page(self, request: web.Request) -> web.Response:
        return _html("worklist_login.html", wrong=False)

    async def _enter(self, request: web.Request) -> web.StreamResponse:
        response = await self._login.enter(request)
        if response is None:
            self._log("warning", "worklist_login_refused", peer=request.remote or "")
            return _html("worklist_login.html", status=403, wrong=True)
        if response.status == 303:
            self._log("info", "worklist_login", peer=request.remote or "")
        return response

    async def _leave(self, request: web.Request) -> web.StreamResponse:
        await self._require_form(request)
        return await self._login.leave(request)

    def _token(self, request: web.Request, *facts: str) -> str:
        """What a form of this session about these facts carries, so that no other page can send it."""
        said = "\n".join((self._login.cookie(request), *facts))
        return hmac.new(self._key, said.encode(), hashlib.sha256).hexdigest()

    async def _require_form(self, request: web.Request, *facts: str) -> None:
        given = await form_field(request, "token")
        if not hmac.compare_digest(given.encode(), self._token(request, *facts).encode()):
            raise web.HTTPForbidden(text="the form is of another session; load the page again\n")

    # The page.

    async def _show(self, request: web.Request) -> web.Response:
        state = request.query.get("state", "open")
        if state not in STATES:
            raise web.HTTPBadRequest(text=f"state is none of {', '.join(STATES)}\n")
        before = request.query.get("before", "")
        if before and not re.fullmatch(r"[0-9]{1,18}", before):
            raise web.HTTPBadRequest(text="before is no number of a job\n")
        status, rows = await asyncio.gather(
            asyncio.to_thread(self._status_now),
            asyncio.to_thread(
                self._store.listed, STATES[state], before=int(before) if before else None, limit=ROWS + 1
            ),
        )
        return _html(
            "worklist.html",
            status=200,
            queue=status,
            jobs=[self._shown(row) for row in rows[:ROWS]],
            state=state,
            states=list(STATES),
            older=rows[ROWS - 1]["id"] if len(rows) > ROWS else 0,
            patients=self._settings.patients,
            token=self._token(request),
        )

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(self._status_now))

    def _status_now(self) -> dict:
        status, now = self._store.status(), time.time()
        done = {"hour": self._store.done_since(now - 3600), "day": self._store.done_since(now - 86400)}
        rejected = {"rejected_files": self._rejected.count()} if self._rejected else {}
        return {key: value for key, value in status.items() if key != "dead"} | {"done_within": done} | rejected

    def _shown(self, row: dict) -> dict:
        """A row without what tells of a patient, unless that is asked for."""
        reasons = [reason for reason in (row["error"], *row["undelivered"]) if reason]
        if not self._settings.patients:
            reasons = [_UID.sub("(UID)", reason) for reason in reasons]
        now = time.time()
        return {
            **{key: row[key] for key in ("id", "state", "images", "attempts", "deliveries", "reading_s")},
            "study": row["study"] if self._settings.patients else None,
            "patient": row["patient"] if self._settings.patients else None,
            "age": _ago(now - row["first_at"]),
            "changed": _ago(now - row["changed_at"]),
            "reasons": reasons,
            "can_retry": row["state"] == "dead",
            "can_drop": row["state"] not in ("done", "dropped"),
        }

    async def _ask(self, request: web.Request) -> web.Response:
        """Confirmation: nothing is changed by following a link."""
        job, action = int(request.match_info["job"]), request.match_info["action"]
        found = await asyncio.to_thread(self._store.listed, STATES["all"], before=job + 1, limit=1)
        if not found or found[0]["id"] != job:
            raise web.HTTPNotFound(text=f"no job {job}\n")
        (row,) = found
        first_at = repr(row["first_at"])
        return _html(
            "worklist_confirm.html",
            job=self._shown(row),
            action=action,
            patients=self._settings.patients,
            first_at=first_at,
            token=self._token(request, str(job), action, first_at, row["state"]),
        )

    async def _act(self, request: web.Request) -> web.StreamResponse:
        """What was confirmed, of the job that was shown then, and as it was shown."""
        job, action = int(request.match_info["job"]), request.match_info["action"]
        first_at, state = await form_field(request, "first_at"), await form_field(request, "state")
        await self._require_form(request, str(job), action, first_at, state)
        change = self._store.retry if action == "retry" else self._store.drop
        changed = await asyncio.to_thread(change, [job], seen=JobSeen(float(first_at), state))
        self._log("info", f"worklist_{action}", job=job, changed=bool(changed), peer=request.remote or "")
        if not changed:
            raise web.HTTPConflict(text=f"Job {job} has moved on, or is another one now. Load the page again.\n")
        raise web.HTTPSeeOther("/?state=failed" if action == "drop" else "/")

    async def _script(self, request: web.Request) -> web.Response:
        return web.Response(text=_SCRIPT.read_text("utf-8"), content_type="text/javascript")


def serve(config: Config, ready: Callable[[str], None]) -> None:
    """Serve the page until SIGTERM or SIGINT; `ready` gets its address.

    Raises
    ------
    InvalidConfig
        The section ``worklist`` is missing or wrong, or the queue cannot be opened.
    Unavailable
        The port is taken.
    """
    log = Log(config)
    page = Page(config, Store(config.queue_url, "operator"), log)

    async def run(stopping: asyncio.Event) -> None:
        async with page.listener() as listener:
            ready(listener.address)
            await stopping.wait()

    run_until_told(run)


async def _harden(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def _html(template: str, *, status: int = 200, **data: object) -> web.Response:
    notice = "Readings of this gateway are a research model's."
    text = render(template, notice=notice, **data)
    return web.Response(text=text, content_type="text/html", status=status)


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
