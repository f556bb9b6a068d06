"""`AsyncReader`: readings from a served `cxr_reader`, streamed to asyncio code; the twin of `Reader`."""

from __future__ import annotations

import asyncio
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from cxr_triton import kserve
from cxr_triton.client import wire
from cxr_triton.client.base import Attempts, BaseReader, BaseStream, Calls, Sent
from cxr_triton.client.conversation import Conversation
from cxr_triton.client.spans import Span
from cxr_triton.errors import Cancelled
from cxr_triton.profile import ModelProfile
from cxr_triton.reading import Reading


class AsyncReader(BaseReader["AsyncReadingStream"]):
    """Asyncio client; one connection, any number of simultaneous readings in one event loop.

    Parameters and methods are those of `cxr_triton.client.Reader`.

    Examples
    --------
    >>> async with AsyncReader("127.0.0.1:8001") as reader:
    ...     stream = reader.read("chest.dcm")
    ...     async for delta in stream:
    ...         print(delta, end="", flush=True)
    ...     print(stream.reading.findings)
    """

    def __post_init__(self):
        super().__post_init__()
        self._streams: weakref.WeakSet[AsyncReadingStream] = weakref.WeakSet()
        self._leaving: set[asyncio.Task] = set()

    def open(
        self, images: wire.Image | Sequence[wire.Image] = (), *, follow: Sequence[Reading] = (), **options: Any
    ) -> Conversation[AsyncReadingStream]:
        """A dialogue about one patient's pictures; see `Reader.open`."""
        return Conversation(self, images, follow=follow, **options)

    async def server_info(self) -> wire.ServerInfo:
        """What answers at the URL, once it is ready and serves the contract; see `Reader.server_info`."""
        model = await self._connect()
        try:
            call = self._opened().server(pb.ServerMetadataRequest(), timeout=self.timeouts.connect_s)
            server = await self._answer(call)
        except grpc.RpcError as error:
            raise self._failure(error) from None
        return wire.ServerInfo(server.name, server.version, model.name, tuple(model.versions))

    async def profile(self) -> ModelProfile:
        """What the served model can be asked; see `Reader.profile`."""
        model = await self._connect()
        try:
            call = self._opened().config(pb.ModelConfigRequest(name=model.name), timeout=self.timeouts.connect_s)
            answer = await self._answer(call)
        except grpc.RpcError as error:
            raise self._failure(error) from None
        return wire.served_profile(answer, self.url)

    async def close(self) -> None:
        """Cancel what is under way and close the connection."""
        for stream in list(self._streams):
            await stream.close()
        await asyncio.gather(*self._leaving)
        if calls := self._release():
            await calls.channel.close()

    async def __aenter__(self) -> AsyncReader:
        return self

    async def __aexit__(self, *exc) -> None:
        await self.close()

    def _stream(self, request: Callable[[], Sent], span: Span) -> AsyncReadingStream:
        stream = AsyncReadingStream(self, request, span)
        self._streams.add(stream)
        return stream

    def _see_off(self, call: grpc.aio.UnaryStreamCall) -> None:
        """Cancel a call, from which nothing was heard, with its first response, as `Reader` does."""
        task = asyncio.get_running_loop().create_task(_cancelled_once_begun(call))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _opened(self) -> Calls:
        """An asyncio channel belongs to the loop that is running when it is made, so it is made on first use."""
        if self._calls is None and not self._closed:
            self._calls = self._open(grpc.aio)
            kserve.at_exit(self, AsyncReader._release)  # no loop waits for it there
        return super()._opened()

    async def _answer(self, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except asyncio.CancelledError:
            if not self._closed or _is_cancelled():
                raise
            raise self._closed_meanwhile() from None

    async def _connect(self) -> pb.ModelMetadataResponse:
        self._require_open()
        attempts = Attempts(self)
        while True:
            try:
                model = await self._answer(self._opened().model(attempts.request, timeout=attempts.timeout_s()))
            except grpc.RpcError as error:
                failure = self._failure(error)
            else:
                wire.check_contract(model, self.url)
                return model
            await asyncio.sleep(attempts.wait_s(failure))

    async def _start(self, request: pb.ModelInferRequest) -> grpc.aio.UnaryStreamCall:
        await self._connect()
        return self._opened().infer(request, timeout=self.timeouts.total_s)


class AsyncReadingStream(BaseStream):
    """Text of one reading as it comes; the twin of `ReadingStream`.

    Closing or dropping it, or cancelling the task that waits for it, cancels the request on the server.

    Attributes
    ----------
    reading : Reading or None
        Complete once the iteration has ended.
    """

    def __init__(self, reader: AsyncReader, request: Callable[[], Sent], span: Span):
        super().__init__(reader.url, reader.timeouts, request, span)
        self._reader = reader

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        """The next text, never empty; raises as `ReadingStream.__next__` does."""
        try:
            if self._call is None and not self._ended:
                request = await asyncio.to_thread(self._taken_request)
                if self._ended:
                    raise self._closed_early()
                self._follow(await self._reader._start(request))
            while not self._ended:
                if delta := await self._receive():
                    return delta
        except BaseException as error:
            self._failed(error)
            self._leave()
            traceback.clear_frames(error.__traceback__)  # they would keep the call
            raise
        raise StopAsyncIteration

    async def result(self) -> Reading:
        """Read to the end and give the reading; raises as `ReadingStream.result` does."""
        async for _ in self:
            pass
        return self._complete()

    async def close(self) -> None:
        """Cancel the request if it is still under way, as `ReadingStream.close` does."""
        self._left()
        self._leave()

    async def __aenter__(self) -> AsyncReadingStream:
        return self

    async def __aexit__(self, *exc) -> None:
        await self.close()

    def __del__(self):
        self._leave()

    def _leave(self) -> None:
        call = self._call
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            call = None
        if call is None or self._has_begun or self._waiting:
            self._cancel()
            return
        self._ended, self._call = True, None
        self._reader._see_off(call)

    async def _receive(self) -> str:
        call, message, failure = self._call, grpc.aio.EOF, None
        if call is None:  # closed by another task
            return ""
        due, limit = self._next_limit()
        # Cancels the call, not the task that waits for it: a response that comes at the same moment is not lost.
        timer = asyncio.get_running_loop().call_later(due - time.monotonic(), self._expire, limit) if limit else None
        self._waiting = True
        try:
            message = await call.read()
        except grpc.RpcError as error:
            failure = wire.stream_error(error, self._url, self._timeouts)
        except asyncio.CancelledError:
            if not call.cancelled() or _is_cancelled():
                raise
            failure = Cancelled(f"reading at {self._url} was cancelled before its end")
        finally:
            self._waiting = False
            if timer:
                timer.cancel()
        del call  # an error keeps this frame
        if message is grpc.aio.EOF:
            self._end(failure)
            return ""
        return self._heard(message)

    def _expire(self, limit: str) -> None:
        self._late = limit
        if self._call is not None:
            self._call.cancel()


async def _cancelled_once_begun(call: grpc.aio.UnaryStreamCall) -> None:
    try:
        await asyncio.wait_for(call.read(), wire.END_S)
    except (grpc.RpcError, TimeoutError, asyncio.CancelledError):
        pass
    finally:
        call.cancel()


def _is_cancelled() -> bool:
    """Whether the running task is cancelled, rather than a call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
