"""Files in, pictures out: ``/api/sessions/ID/pictures``."""

from __future__ import annotations

import asyncio
import re
import unicodedata
from urllib.parse import unquote

from aiohttp import web

from cxr_triton.client.door.bodies import read
from cxr_triton.client.log import Log
from cxr_triton.client.ui.decoders import MODEL, Decoders, presets
from cxr_triton.client.ui.readings import shown_flags
from cxr_triton.client.ui.refusal import Refusal
from cxr_triton.client.ui.servers import Server
from cxr_triton.client.ui.sessions import PICTURE, Picture, Session, Sessions
from cxr_triton.client.ui.settings import Settings
from cxr_triton.errors import Cancelled, CxrError, InvalidRequest

MOST_NAME = 120


class Pictures:
    """Takes files in, shows them, lets them go."""

    def __init__(self, settings: Settings, sessions: Sessions, decoders: Decoders, servers: list[Server], log: Log):
        self._settings, self._sessions, self._decoders = settings, sessions, decoders
        self._servers, self._log = servers, log

    def add_routes(self, app: web.Application, under: str) -> None:
        """Routes below those of a session."""
        app.router.add_post(f"{under}/pictures", self._add)
        app.router.add_get(f"{under}/pictures/{PICTURE}.png", self._show, allow_head=False)
        app.router.add_delete(f"{under}/pictures/{PICTURE}", self._remove)

    async def _add(self, request: web.Request) -> web.Response:
        outcome, size = "INTERNAL", 0
        try:
            picture, is_of_all = await self._taken(request)
            outcome, size = "ok", len(picture.data)
        except (CxrError, Refusal) as error:
            outcome = error.code
            raise
        except (asyncio.CancelledError, ConnectionError):
            outcome = Cancelled.code
            raise
        finally:
            self._log("picture", outcome=outcome, bytes=size)
        facts = picture.facts
        told = {
            "picture": picture.name,
            "name": picture.file_name,
            "kind": facts["format"],
            "width": picture.width,
            "height": picture.height,
            "presets": presets(picture, is_of_all),
            "view": None if facts["view"] == "unknown" else facts["view"],
            "flags": shown_flags(facts["flags"]),
        }
        return web.json_response(told, status=201)

    async def _taken(self, request: web.Request) -> tuple[Picture, bool]:
        """A picture drawn as the first server's model sees it, and whether the others' do too."""
        session, most = self._sessions.of(request), self._decoders.most_bytes
        with self._sessions.room(session, min(request.content_length or most, most)):
            data = bytes(await read(request, most, self._settings.body_s))
            profiles = await asyncio.gather(*(server.known() for server in self._servers))
            profile, is_of_all = profiles[0], len({each.pixel_preset if each else None for each in profiles}) == 1
            picture = await self._decoders.look(data, file_name(request.headers.get("X-File-Name", "")), profile)
        self._sessions.require_room(session, picture.bytes)
        session.keep(picture)
        return picture, is_of_all and profile is not None

    async def _show(self, request: web.Request) -> web.Response:
        session = self._sessions.of(request)
        picture, preset = session.picture(request.match_info["picture"]), request.query.get("preset", MODEL)
        if preset not in picture.presets:
            raise InvalidRequest(f"preset is {preset[:20]!r}; ask for {', '.join(picture.presets)}")
        png = picture.pngs.get(preset)
        if png is None:
            png = await self._decoders.draw(picture, preset)
            if picture.name in session.pictures and preset not in picture.pngs:
                self._remember(session, picture, preset, png)
        return web.Response(body=png, content_type="image/png")

    def _remember(self, session: Session, picture: Picture, preset: str, png: bytes) -> None:
        """Keep what was drawn where there is room for it."""
        try:
            self._sessions.require_room(session, len(png))
        except CxrError:
            return
        picture.pngs[preset] = png

    async def _remove(self, request: web.Request) -> web.Response:
        self._sessions.of(request).remove(request.match_info["picture"])
        return web.Response(status=204)


def file_name(given: str) -> str:
    """The last part of a name that a browser says, percent-encoded, without what steers a page or a terminal."""
    name = re.split(r"[/\\]", unquote(given[: 12 * MOST_NAME], errors="replace"))[-1]
    return "".join(c for c in name if unicodedata.category(c)[0] != "C")[:MOST_NAME].strip()
