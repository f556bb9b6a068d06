"""``POST /v1/chat/completions``: one reading, streamed or whole."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from aiohttp import web

from cxr_triton.client.aio import AsyncReader, AsyncReadingStream
from cxr_triton.client.door.bodies import is_plain, read
from cxr_triton.client.log import Log
from cxr_triton.client.openai.answer import Answer
from cxr_triton.client.openai.chat import ChatRequest
from cxr_triton.client.openai.metrics import Metrics
from cxr_triton.client.openai.refusal import Refusal
from cxr_triton.client.openai.settings import Settings
from cxr_triton.client.spans import Span
from cxr_triton.client.wire import FAILED
from cxr_triton.errors import CxrError, InternalError, InvalidRequest, QueueFull
from cxr_triton.profile import ModelProfile
from cxr_triton.reading import Reading
from cxr_triton.split import CONTENT, REASONING, Part, Splitter

TRACE_HEADER = "x-trace-id"
DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}


class Completions:
    """Handles completions; at most so many at once.

    A client that leaves ends its reading on the server: aiohttp cancels the handler, and that the stream.

    Parameters
    ----------
    profile : callable
        Gives the served profile.
    """

    def __init__(
        self,
        settings: Settings,
        reader: AsyncReader,
        profile: Callable[[], Awaitable[ModelProfile]],
        metrics: Metrics,
        log: Log,
    ):
        self._settings, self._reader, self._profile = settings, reader, profile
        self._metrics, self._log = metrics, log
        self.under_way = 0
        self._taking_in = 0  # bytes

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One completion; raises `Refusal` before the first byte of an answer, and none later."""
        trace = _Trace(request.headers.get("traceparent"))
        with self._told(trace), self._counted():
            profile = await self._profile()
            with self._room(request):
                chat = await asyncio.to_thread(ChatRequest.from_body, await self._body(request), profile)
                stream = self._reader.read(chat.images, **chat.asked, traceparent=str(trace.span.place))
            answer = Answer(profile.name, include_usage=chat.include_usage)
            completion, is_streamed = _Completion(stream, chat.grammar, answer), chat.stream
            trace.facts |= {"id": answer.id, "stream": is_streamed, "images": len(chat.images)}
            del chat  # and the pictures, which are sent with the stream's first step
            async with stream:
                with self._foreseen(answer.id):
                    await completion.begin()  # so that what is refused has its own status
                    self._metrics.first_text_s.observe(trace.elapsed_s)
                    if is_streamed:
                        return await self._stream(request, completion, trace)
                    body = await completion.whole()
                    trace.outcome = _complete(stream).status
                    return web.json_response(body, headers=trace.headers(answer))

    @contextlib.contextmanager
    def _foreseen(self, id: str) -> Iterator[None]:
        """Whatever else fails becomes an error of ours; the log tells its kind."""
        try:
            yield
        except (CxrError, _Gone):
            raise
        except Exception as error:
            self._log("request_failed", id=id, error=type(error).__name__)  # its text may quote the request
            raise InternalError(f"{FAILED}, where this is {id}") from error

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        if self.under_way >= self._settings.max_requests:
            raise QueueFull(
                f"{self.under_way} completions are under way, allowed {self._settings.max_requests}; send it later"
            )
        self.under_way += 1
        self._metrics.under_way.inc()
        try:
            yield
        finally:
            self.under_way -= 1
            self._metrics.under_way.dec()

    @contextlib.contextmanager
    def _room(self, request: web.Request) -> Iterator[None]:
        """Bodies lie in memory several times over, as text, as JSON and decoded, until they are packed to be sent."""
        most = self._settings.max_body_mib << 20
        size = min(request.content_length or most, most)
        if self._taking_in and self._taking_in + size > self._settings.max_bodies_mib << 20:
            raise QueueFull(
                f"{self._taking_in >> 20} MiB are on their way in, allowed {self._settings.max_bodies_mib} MiB; "
                "send it later"
            )
        self._taking_in += size
        try:
            yield
        finally:
            self._taking_in -= size

    @contextlib.contextmanager
    def _told(self, trace: _Trace) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            code = getattr(error, "code", "INTERNAL")
            trace.outcome = "CANCELLED" if isinstance(error, asyncio.CancelledError) else code
            if isinstance(error, CxrError):
                error = Refusal(error)
            if isinstance(error, Refusal):
                error.headers[TRACE_HEADER] = trace.facts["trace"]
            raise error from None
        finally:
            self._metrics.completions.labels(trace.outcome).inc()
            if not trace.outcome.isupper():
                self._metrics.completion_s.observe(trace.elapsed_s)
            self._log("completion", outcome=trace.outcome, ms=round(1e3 * trace.elapsed_s), **trace.facts)
            trace.span.set({"cxr.outcome": trace.outcome, "cxr.stream": trace.facts.get("stream")})
            trace.span.end(trace.outcome if trace.outcome.isupper() else None)

    async def _body(self, request: web.Request) -> bytearray:
        if not is_plain(request, "application/json"):
            raise Refusal(
                InvalidRequest("the body has to be plain JSON; send Content-Type: application/json"), status=415
            )
        most_mib = self._settings.max_body_mib
        too_large = f"the body is over {most_mib} MiB; send fewer or smaller images, or raise --max-body-mib"
        return await read(request, most_mib << 20, self._settings.body_s, too_large)

    async def _stream(self, request: web.Request, completion: _Completion, trace: _Trace) -> web.StreamResponse:
        response = web.StreamResponse(headers={**_STREAM_HEADERS, **trace.headers(completion.answer)})
        try:
            async with self._taken():
                await response.prepare(request)
            try:
                with self._foreseen(completion.answer.id):
                    async for chunk in completion.chunks():
                        await self._write(response, _event(chunk))
                    trace.outcome = _complete(completion.stream).status
                await self._write(response, DONE)
            except CxrError as error:
                trace.outcome = error.code
                await self._write(response, _event(Refusal(error).as_json()))
            async with self._taken():
                await response.write_eof()
        except _Gone:
            trace.outcome = "CANCELLED"
            self._log("client_gone")
            if request.transport:
                request.transport.abort()
        return response

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        async with self._taken():
            await response.write(data)

    @contextlib.asynccontextmanager
    async def _taken(self) -> AsyncIterator[None]:
        """Raises `_Gone` where the client does not take in time what is sent."""
        try:
            async with asyncio.timeout(self._settings.write_s):
                yield
        except (TimeoutError, ConnectionError):
            raise _Gone from None


class _Gone(Exception):
    """The client."""


class _Trace:
    """What is told of a completion, which a caller may have sent as a part of something."""

    def __init__(self, traceparent: str | None) -> None:
        self.outcome = "INTERNAL"
        self.span = Span("chat completion", traceparent, "SERVER")
        self.facts: dict[str, Any] = {"trace": self.span.place.trace_id}
        self._started_s = time.monotonic()

    def headers(self, answer: Answer) -> dict[str, str]:
        """By which an answer is found again."""
        return {"x-request-id": answer.id, TRACE_HEADER: self.facts["trace"]}

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s


class _Completion:
    """A reading as the parts of an answer."""

    def __init__(self, stream: AsyncReadingStream, grammar: str, answer: Answer):
        self.stream, self.answer = stream, answer
        self._splitter = Splitter(grammar)
        self._text = ""

    async def begin(self) -> None:
        """Send the request and wait for its first text."""
        self._text = await anext(self.stream, "")

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        texts = {REASONING: "", CONTENT: ""}
        async for part, text in self._parts():
            texts[part] += text
        return self.answer.whole(_complete(self.stream), texts[REASONING], texts[CONTENT])

    async def chunks(self):
        """The events of one that is."""
        yield self.answer.chunk({"role": "assistant", "content": ""})
        async for part, text in self._parts():
            yield self.answer.chunk({part: text})
        for chunk in self.answer.last_chunks(_complete(self.stream)):
            yield chunk

    async def _parts(self):
        for part in self._splitter.push(self._text):
            yield part
        async for text in self.stream:
            for part in self._splitter.push(text):
                yield part
        for part in self._last_parts(_complete(self.stream)):
            yield part

    def _last_parts(self, reading: Reading) -> Iterator[Part]:
        yield from self._splitter.finish()
        if not self._splitter.has_content and reading.finish_reason == "stop" and reading.answer:
            # Prose of a model that boxes its answers: only now is it known that no box comes.
            yield CONTENT, reading.answer


def _complete(stream: AsyncReadingStream) -> Reading:
    if stream.reading is None:
        raise InternalError("the server ended the stream without a reading; see its log")
    return stream.reading


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"
