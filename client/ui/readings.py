"""Readings asked for, told line by line as they are written, stopped: ``/api/sessions/ID/readings``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from cxr_triton.client.aio import AsyncReadingStream
from cxr_triton.client.door.bodies import read
from cxr_triton.client.log import Log
from cxr_triton.client.objects.codes import presence
from cxr_triton.client.ui.refusal import Refusal
from cxr_triton.client.ui.servers import Server
from cxr_triton.client.ui.sessions import READING, Asked, Picture, Session, Sessions
from cxr_triton.client.ui.settings import Settings
from cxr_triton.client.wire import FAILED
from cxr_triton.errors import CxrError, InternalError, InvalidRequest, unknown_key
from cxr_triton.pixels.flags import DOUBTFUL
from cxr_triton.pixels.flags import FLAGS as IMAGE_FLAGS
from cxr_triton.profile import ModelProfile
from cxr_triton.reading import FLAGS as READING_FLAGS
from cxr_triton.reading import Reading, image_name, parse
from cxr_triton.request import ReadRequest
from cxr_triton.split import REASONING, Splitter

MOST_JSON = 256 * 1024
BEAT_S = 5.0
"""Longest silence towards the browser."""
_REQUEST = {
    "task": "task",
    "mode": "mode",
    "question": "prompt",
    "variables": "variables",
    "scores": "scores",
    "logprobs": "logprobs",
    "seed": "seed",
    "temperature": "temperature",
    "max_tokens": "max_new_tokens",
}
"""Keys of a body that are keys of the REQUEST."""
_KEYS = (*_REQUEST, "pictures", "follow", "server")
_STREAM_HEADERS = {"Content-Type": "application/x-ndjson; charset=utf-8", "X-Accel-Buffering": "no"}
Line = dict[str, Any]


class Readings:
    """Asks the servers, and tells the browser.

    A browser that leaves ends its reading on the server: aiohttp cancels the handler, and that the stream.
    """

    def __init__(self, settings: Settings, sessions: Sessions, servers: dict[str, Server], log: Log):
        self._settings, self._sessions, self._servers, self._log = settings, sessions, servers, log

    def add_routes(self, app: web.Application, under: str) -> None:
        """Routes below those of a session."""
        app.router.add_post(f"{under}/readings", self._ask)
        app.router.add_post(f"{under}/readings/{READING}/stop", self._stop)

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        session = self._sessions.of(request)
        trace = _Trace()
        with session.writing(), self._told(trace):
            body = _object(await read(request, MOST_JSON, self._settings.body_s))
            writing = await self._begun(session, body)
            trace.facts |= {"images": len(writing.asked.pictures), "turn": len(writing.asked.turns) + 1}
            trace.facts["trace"] = writing.stream.trace_id
            try:
                async with writing.stream:
                    return await self._stream(request, writing, trace)
            finally:
                session.drop(writing.asked)

    async def _begun(self, session: Session, body: Line) -> _Writing:
        """What is asked for, checked before anything is sent on."""
        for key in body:
            if key not in _KEYS:
                raise InvalidRequest(unknown_key(key[:60], _KEYS, "the request"))
        server = self._server(body.get("server"))
        pictures = _pictures(session, body.get("pictures", []))
        turns = _turns(session, body.get("follow"))
        _require_one_patient(pictures)
        profile = await server.profile()
        options = {_REQUEST[key]: value for key, value in body.items() if key in _REQUEST}
        images = [picture.data for picture in pictures]
        conversation = await asyncio.to_thread(server.reader.open, images, follow=turns)  # it takes their digests
        known = {**options, "history": conversation.history}
        checked = ReadRequest.from_json(json.dumps(known), profile)
        checked.messages(len(pictures))
        asked = session.ask(pictures, server, turns)
        return _Writing(session, asked, checked, profile, conversation.ask(**options))

    def _server(self, name: object) -> Server:
        if name is None:
            return next(iter(self._servers.values()))
        if not isinstance(name, str) or name not in self._servers:
            raise InvalidRequest(f"server: {name!r:.60} is none of {', '.join(self._servers)}; choose one of these")
        return self._servers[name]

    async def _stream(self, request: web.Request, writing: _Writing, trace: _Trace) -> web.StreamResponse:
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        trace.outcome = "CANCELLED"
        try:
            async with asyncio.timeout(self._settings.write_s):
                await response.prepare(request)
            async with contextlib.aclosing(self._foreseen(writing)) as lines:
                async for line in lines:
                    if line["type"] == "text":
                        trace.first_text()
                    trace.outcome = _outcome(line) or trace.outcome
                    async with asyncio.timeout(self._settings.write_s):
                        await response.write(_encoded(line))
            async with asyncio.timeout(self._settings.write_s):
                await response.write_eof()
        except (TimeoutError, ConnectionError):
            trace.outcome = "CANCELLED"
            if request.transport:
                request.transport.abort()
        return response

    async def _foreseen(self, writing: _Writing) -> AsyncGenerator[Line, None]:
        """Its lines; whatever else fails becomes the last one, and the log tells its kind."""
        try:
            async with contextlib.aclosing(writing.lines()) as lines:
                async for line in lines:
                    yield line
        except Exception as error:
            self._log("request_failed", error=type(error).__name__)  # its text may quote the request
            yield {"type": "error", **Refusal(InternalError(FAILED)).told}

    async def _stop(self, request: web.Request) -> web.Response:
        self._sessions.of(request).reading(request.match_info["reading"]).stopping.set()
        return web.Response(status=202)

    @contextlib.contextmanager
    def _told(self, trace: _Trace) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            is_gone = isinstance(error, asyncio.CancelledError)
            trace.outcome = "CANCELLED" if is_gone else getattr(error, "code", "INTERNAL")
            raise
        finally:
            self._log("reading", outcome=trace.outcome, ms=trace.elapsed_ms, **trace.facts)


class _Trace:
    """What is told of a reading."""

    def __init__(self) -> None:
        self.outcome = "INTERNAL"
        self.facts: dict[str, Any] = {}
        self._started_s = time.monotonic()

    @property
    def elapsed_ms(self) -> int:
        return round(1e3 * (time.monotonic() - self._started_s))

    def first_text(self) -> None:
        self.facts.setdefault("first_text_ms", self.elapsed_ms)


@dataclass(frozen=True)
class _Writing:
    """A reading while it is written, as lines of the answer."""

    session: Session
    asked: Asked
    checked: ReadRequest
    profile: ModelProfile
    stream: AsyncReadingStream

    async def lines(self) -> AsyncGenerator[Line, None]:
        """What the browser is told, in its order; a failure is the last line."""
        yield {"type": "started", "reading": self.asked.name}
        splitter, written = Splitter(self.checked.grammar), ""
        try:
            async with contextlib.aclosing(texts(self.stream, self.asked.stopping)) as heard:
                async for text in heard:
                    if text is None:
                        yield {"type": "waiting"}
                        continue
                    written += text
                    for part in splitter.push(text):
                        yield _text(*part)
            for part in splitter.finish():
                yield _text(*part)
            reading = self.stream.reading
            if reading is None and not self.asked.stopping.is_set():
                raise InternalError("the server ended the stream without a reading; see its log")
            if reading and not splitter.has_content and reading.finish_reason == "stop" and reading.answer:
                yield {"type": "text", "part": "answer", "text": reading.answer}  # no box came
            yield self._end("done", reading) if reading else self._end("stopped", self._stopped(written))
        except CxrError as error:
            yield {"type": "error", **Refusal(error).told}

    def _end(self, how: str, reading: Reading | None) -> Line:
        if reading is None:
            return {"type": how, "reading": None, "flags": [], "boxes": [], "presence": {}}
        self.session.complete(self.asked, reading)
        told = json.loads(reading.to_json())
        return {
            "type": how,
            "reading": told,
            "presence": {label: said.meaning.lower() for label, said in presence(told).items()},
            "flags": _flags(reading),
            "boxes": _boxes(reading, self.asked.pictures),
        }

    def _stopped(self, text: str) -> Reading | None:
        """What was written before the visitor stopped it; None before the first word."""
        if not text:
            return None
        images = tuple(picture.facts for picture in self.asked.pictures)
        parsed = parse(
            text,
            grammar=self.checked.grammar,
            answer=self.checked.answer,
            labels=self.profile.labels,
            finish_reason="cancelled",
            image_sizes=[(facts["rows"], facts["columns"]) for facts in images],
        )
        return Reading.of(
            parsed,
            task=self.checked.task,
            prompt=self.checked.text,
            model={"profile": self.profile.name, "title": self.profile.title},
            images=images,
            notice=self.profile.notice,
            guide=self.checked.guide,
        )


async def texts(stream: AsyncReadingStream, stopping: asyncio.Event) -> AsyncGenerator[str | None, None]:
    """Each text as it comes, None after `BEAT_S` without one; ends with the stream, or when told to stop."""

    async def heard() -> str:
        return await anext(stream, "")

    halt, step = asyncio.ensure_future(stopping.wait()), asyncio.ensure_future(heard())
    try:
        while True:
            await asyncio.wait({halt, step}, timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED)
            if step.done():
                if not (text := step.result()):
                    return
                step = asyncio.ensure_future(heard())
                yield text
            elif halt.done():
                return
            else:
                yield None
    finally:
        halt.cancel()
        step.cancel()
        await asyncio.wait({halt, step})
        if not step.cancelled():
            step.exception()  # nobody waits for it any more, and asyncio would log it


def shown_flags(flags: Iterable[str], where: str = "") -> list[dict[str, Any]]:
    """Flags of an image as the page shows them."""
    return [{"code": flag, "text": where + IMAGE_FLAGS.get(flag, flag), "doubtful": flag in DOUBTFUL} for flag in flags]


def _flags(reading: Reading) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = [
        {"code": flag, "text": READING_FLAGS.get(flag, flag), "doubtful": False} for flag in reading.flags
    ]
    for i, facts in enumerate(reading.images):
        where = f"{image_name(i, len(reading.images))}: " if len(reading.images) > 1 else ""
        told += shown_flags(facts.get("flags", ()), where)
    return told


def _boxes(reading: Reading, pictures: tuple[Picture, ...]) -> list[dict[str, Any]]:
    """In pixels of the pictures' PNGs, which have square pixels whatever the file's are."""
    told = []
    for box in reading.boxes:
        if box.image is None or box.image >= len(pictures):
            continue
        picture = pictures[box.image]
        (x0, x1), (y0, y1) = (
            sorted(min(max(percent, 0.0), 100.0) * side / 100 for percent in corners)
            for corners, side in ((box.percent[::2], picture.width), (box.percent[1::2], picture.height))
        )
        label = box.label or "unnamed"
        told.append({"label": label, "picture": picture.name, "x0": x0, "y0": y0, "x1": x1, "y1": y1})
    return told


def _object(body: bytearray) -> dict[str, Any]:
    """What is asked for, without what is null in it."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise InvalidRequest("the body is no JSON object; load the page again")
    return {key: value for key, value in data.items() if value is not None}


def _pictures(session: Session, names: object) -> tuple[Picture, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidRequest("pictures: expected a list of names of pictures")
    if len(set(names)) < len(names):
        raise InvalidRequest("pictures: one is named twice; choose each once")
    return tuple(session.picture(name) for name in names)


def _turns(session: Session, name: object) -> tuple[Reading, ...]:
    if name is None:
        return ()
    asked = session.reading(name if isinstance(name, str) else "")
    if asked.reading is None or not asked.is_complete:
        raise InvalidRequest("follow: the reading before was not written to its end; ask it again first")
    return (*asked.turns, asked.reading)


def _require_one_patient(pictures: tuple[Picture, ...]) -> None:
    known = {picture.patient for picture in pictures} - {""}
    if len(known) > 1:
        raise Refusal(
            InvalidRequest(f"the pictures are of {len(known)} different patients, by the Patient IDs in their files"),
            hint="A reading is of one patient: choose that patient's pictures only.",
        )


def _text(part: str, text: str) -> Line:
    return {"type": "text", "part": "reasoning" if part == REASONING else "answer", "text": text}


def _outcome(line: Line) -> str:
    """Of a last line."""
    if line["type"] == "done":
        return line["reading"]["status"]
    return {"stopped": "stopped", "error": line.get("code", "")}.get(line["type"], "")


def _encoded(line: Line) -> bytes:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
