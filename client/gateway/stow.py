"""STOW-RS as a way in."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from cxr_triton.client.gateway.dimse import OUT_OF_RESOURCES
from cxr_triton.client.gateway.intake import REFUSALS, Intake, Mismatch, status_of
from cxr_triton.errors import InvalidImage, LimitExceeded
from cxr_triton.pixels.dicom import Identity

STOW_IDLE_S = 30.0
"""How long a STOW-RS client may say nothing in the middle of a request."""
_CHUNK = 1 << 18


async def stow(request: web.Request, intake: Intake, token: str | None) -> web.Response:
    """STOW-RS (PS3.18 10.5): multipart/related of application/dicom; answers in the DICOM JSON model.

    200 when all instances are durable and queued, 202 when some are, 409 when none is, 507 when there was no room.
    """
    given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
    if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        return web.json_response({"error": "token missing or wrong"}, status=401)
    if request.content_type != "multipart/related":
        return web.json_response({"error": f"{request.content_type} is not multipart/related"}, status=415)
    study = request.match_info.get("study")

    def expect(identity: Identity) -> None:
        if study and identity.study != study:
            raise Mismatch("the object is of another study than the address")

    stored: list[dict] = []
    reasons: list[int] = []
    try:
        parts = await request.multipart()
        while (part := await asyncio.wait_for(parts.next(), STOW_IDLE_S)) is not None:
            try:
                identity = await _take(part, intake, request.remote or "", expect)
                stored.append({"00081150": _element("UI", identity.sop_class),
                               "00081155": _element("UI", identity.sop_instance)})  # fmt: skip
            except TimeoutError:
                raise
            except REFUSALS as error:
                reasons.append(status_of(error))
    except TimeoutError:
        return web.json_response({"error": f"nothing came for {STOW_IDLE_S:g} s"}, status=408)
    except (ValueError, HttpProcessingError, RecursionError) as error:  # parts in parts, too deep
        return web.json_response({"error": f"not multipart/related: {type(error).__name__}"}, status=400)
    return _answer(stored, reasons)


async def _take(
    part: MultipartReader | BodyPartReader, intake: Intake, source: str, expect: Callable[[Identity], None]
) -> Identity:
    """Write a part to a file of its own as it comes, and take it in."""
    kind = part.headers.get("Content-Type", "application/dicom").split(";")[0].strip()
    if kind != "application/dicom" or isinstance(part, MultipartReader):
        raise InvalidImage("part is not application/dicom")
    await asyncio.to_thread(intake.require_room)
    with intake.new_file() as file:
        size = 0
        while chunk := await asyncio.wait_for(part.read_chunk(_CHUNK), STOW_IDLE_S):
            size += len(chunk)
            if size > intake.max_bytes:
                raise LimitExceeded(f"object is over {intake.max_bytes} bytes; send a smaller one")
            file.write(chunk)
        return await asyncio.to_thread(intake.take, file, "stow", source, expect)


def _answer(stored: list[dict], reasons: list[int]) -> web.Response:
    answer = {}
    if stored:
        answer["00081199"] = {"vr": "SQ", "Value": stored}
    if reasons:
        answer["00081198"] = {"vr": "SQ", "Value": [{"00081197": _element("US", reason)} for reason in reasons]}
    if stored:
        status = 202 if reasons else 200
    elif OUT_OF_RESOURCES in reasons:
        status = 507
    else:
        status = 409 if reasons else 400
    return web.json_response(answer, status=status, content_type="application/dicom+json")


def _element(vr: str, value: str | int) -> dict:
    return {"vr": vr, "Value": [value]}
