"""STOW-RS as a way in."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from cxr_triton.client.gateway.dimse import OUT_OF_RESOURCES
from cxr_triton.client.gateway.doors import Web
from cxr_triton.client.gateway.intake import REFUSALS, Intake, Mismatch, status_of
from cxr_triton.errors import InvalidImage, LimitExceeded
from cxr_triton.pixels.dicom import Identity

_CHUNK = 1 << 18
T = TypeVar("T")


class _Clock:
    """What a request's body may take: `idle_s` for each piece, `total_s` altogether."""

    def __init__(self, settings: Web):
        self._idle_s, self._ends = settings.idle_s, time.monotonic() + settings.total_s
        self.limits = f"each piece has {settings.idle_s:g} s, all of it {settings.total_s:g} s"

    async def within(self, piece: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wait_for(piece, max(0.001, min(self._idle_s, self._ends - time.monotonic())))


async def stow(request: web.Request, intake: Intake, token: str | None, settings: Web) -> web.Response:
    """STOW-RS (PS3.18 10.5): multipart/related of application/dicom; answers in the DICOM JSON model.

    200 when all instances are durable and queued, 202 when some are, 409 when none is, 507 when there was no room, 408
    when the body came too slowly: its parts that were whole are queued all the same.
    """
    if refusal := _refusal(request, token):
        return refusal
    study, traceparent = request.match_info.get("study"), request.headers.get("traceparent")
    clock = _Clock(settings)

    def expect(identity: Identity) -> None:
        if study and identity.study != study:
            raise Mismatch("the object is of another study than the address")

    stored: list[dict] = []
    reasons: list[int] = []
    try:
        parts = await request.multipart()
        while (part := await clock.within(parts.next())) is not None:
            if isinstance(part, MultipartReader):
                raise ValueError("a multipart in a multipart")
            try:
                identity = await _take(part, intake, request.remote or "", expect, clock, traceparent=traceparent)
                stored.append({"00081150": _element("UI", identity.sop_class),
                               "00081155": _element("UI", identity.sop_instance)})  # fmt: skip
            except TimeoutError:
                raise
            except REFUSALS as error:
                reasons.append(status_of(error))
    except TimeoutError:
        return web.json_response({"error": f"the body was not there in time; {clock.limits}"}, status=408)
    except (ValueError, HttpProcessingError, RecursionError) as error:
        return web.json_response({"error": f"not multipart/related: {type(error).__name__}"}, status=400)
    return _answer(stored, reasons)


def _refusal(request: web.Request, token: str | None) -> web.Response | None:
    """What is wrong with the head of a request."""
    given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
    if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        return web.json_response({"error": "token missing or wrong"}, status=401)
    if request.content_type != "multipart/related":
        return web.json_response({"error": f"{request.content_type} is not multipart/related"}, status=415)
    if request.headers.get("Content-Encoding", "identity") != "identity":
        return web.json_response({"error": "a compressed body is not taken; send it as it is"}, status=415)
    return None


async def _take(
    part: BodyPartReader,
    intake: Intake,
    source: str,
    expect: Callable[[Identity], None],
    clock: _Clock,
    *,
    traceparent: str | None,
) -> Identity:
    """Write a part to a file of its own as it comes, and take it in."""
    kind = part.headers.get("Content-Type", "application/dicom").split(";")[0].strip()
    if kind != "application/dicom":
        raise InvalidImage("part is not application/dicom")
    await asyncio.to_thread(intake.require_room)
    with intake.new_file() as file:
        size = 0
        while chunk := await clock.within(part.read_chunk(_CHUNK)):
            size += len(chunk)
            if size > intake.max_bytes:
                raise LimitExceeded(f"object is over {intake.max_bytes} bytes; send a smaller one")
            file.write(chunk)
        return await asyncio.to_thread(intake.take, file, "stow", source, expect, traceparent=traceparent)


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
