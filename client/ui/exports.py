"""A reading as a file: its JSON, the page of `read --html`, the DICOM structured report of `sr`."""

from __future__ import annotations

import json
from collections.abc import Callable

from aiohttp import web

from cxr_triton.client.conversation import turns_of
from cxr_triton.client.objects.results import encoded, result_objects
from cxr_triton.client.objects.source import source_header
from cxr_triton.client.objects.study import ObjectOptions
from cxr_triton.client.page import draw, reading_page
from cxr_triton.client.ui.decoders import Decoders
from cxr_triton.client.ui.refusal import Refusal
from cxr_triton.client.ui.sessions import READING, Asked, Sessions
from cxr_triton.errors import InvalidRequest
from cxr_triton.identity import sha256
from cxr_triton.reading import Reading


def as_json(asked: Asked) -> bytes:
    """READING."""
    return f"{json.dumps(json.loads(_reading(asked).to_json()), indent=2, ensure_ascii=False)}\n".encode()


def as_page(asked: Asked) -> bytes:
    """The self-contained page; raises as `cxr_triton.client.page.draw` does."""
    reading = _reading(asked)
    names = [picture.file_name or picture.name for picture in asked.pictures]
    pictures = draw([picture.data for picture in asked.pictures], reading, names=names)
    history = [turn for earlier in asked.turns for turn in turns_of(earlier)]
    return reading_page(reading, pictures, read_at=asked.read_at, history=history).encode()


def as_sr(asked: Asked) -> bytes:
    """The structured report of TID 1500; raises as `cxr_triton.client.objects.results.result_objects` does."""
    reading = _reading(asked)
    if not asked.is_complete or asked.read_at is None:
        raise InvalidRequest("a reading that was stopped becomes no report; ask again")
    if not asked.pictures or any(picture.facts["format"] != "dicom" for picture in asked.pictures):
        raise Refusal(
            InvalidRequest("a structured report belongs to a DICOM study, and not every picture is DICOM"),
            hint="Save the page or the JSON, or give the DICOM files.",
        )
    images = [picture.data for picture in asked.pictures]
    options = ObjectOptions(made_at=asked.read_at, digests=tuple(map(sha256, images)), scores=bool(reading.scores))
    sources = [source_header(image) for image in images]
    (report,) = result_objects(json.loads(reading.to_json()), sources, kinds=("findings_sr",), options=options)
    return encoded(report)


EXPORTS: dict[str, tuple[Callable[[Asked], bytes], str, str]] = {
    "json": (as_json, "application/json", "json"),
    "page": (as_page, "text/html", "html"),
    "sr": (as_sr, "application/dicom", "dcm"),
}
"""name: (what writes it, its type, how its file's name ends)"""


class Exports:
    """Gives readings out."""

    def __init__(self, sessions: Sessions, decoders: Decoders):
        self._sessions, self._decoders = sessions, decoders

    def add_routes(self, app: web.Application, under: str) -> None:
        """Routes below those of a session."""
        app.router.add_get(f"{under}/readings/{READING}/export", self._export, allow_head=False)

    async def _export(self, request: web.Request) -> web.Response:
        asked = self._sessions.of(request).reading(request.match_info["reading"])
        kind = request.query.get("as", "json")
        if kind not in EXPORTS:
            raise InvalidRequest(f"as: {kind[:20]!r} is none of {', '.join(EXPORTS)}; choose one of these")
        write, content_type, suffix = EXPORTS[kind]
        body = await self._decoders.beside(lambda: write(asked))
        headers = {"Content-Disposition": f'attachment; filename="reading-{asked.name}.{suffix}"'}
        return web.Response(body=body, content_type=content_type, headers=headers)


def _reading(asked: Asked) -> Reading:
    if asked.reading is None:
        raise Refusal(InvalidRequest("the reading is not written yet; wait for its end"), status=409)
    return asked.reading
