"""`AsyncReader`: readings from a served `cxr_reader`, streamed to asyncio code; the twin of `Reader`."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Sequence

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from cxr_triton import kserve
from cxr_triton.client import wire
from cxr_triton.client.limits import DEFAULT_TIMEOUTS, Clock, Timeouts, Tls
from cxr_triton.errors import Cancelled, CxrError, Unavailable
from cxr_triton.identity import sha256
from cxr_triton.reading import Reading


class AsyncReader:
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

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        model: str = "cxr_reader",
        max_message_mib: int = 256,
        tls: Tls | None = None,
    ):
        self.url, self.timeouts, self.model, self.max_message_mib = (
            wire.require_endpoint(url),
            timeouts,
            model,
            max_message_mib,
        )
        self._tls = tls
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    def read(
        self,
        images: wire.Image | Sequence[wire.Image] = (),
        *,
        task: str | None = None,
        prompt: str | None = None,
        mode: str | None = None,
        history: Sequence[dict] | None = None,
        variables: dict[str, str | list[str]] | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        identifiers: str | None = None,
    ) -> AsyncReadingStream:
        """One reading of one patient's pictures; see `Reader.read`."""
        request = {
            "task": task,
            "prompt": prompt,
            "mode": mode,
            "history": history,
            "variables": variables,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": stop,
            "identifiers": identifiers,
        }
        contents = wire.image_bytes(images)
        message = wire.infer_request(self.model, contents, request, self.max_message_mib)
        return AsyncReadingStream(self, message, [sha256(content) for content in contents])

    async def server_info(self) -> wire.ServerInfo:
        """What answers at the URL, once it is ready and serves the contract; see `Reader.server_info`."""
        model = await self._connect()
        try:
            server = await self._stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=self.timeouts.connect_s)
        except grpc.RpcError as error:
            raise wire.connect_error(error, self.url, self.model, self.timeouts) from None
        return wire.ServerInfo(server.name, server.version, model.name, tuple(model.versions))

    async def close(self) -> None:
        """Cancel what is under way and close the connection."""
        self._closed = True
        channel = self._channel
        self._release()
        if channel is not None:
            await channel.close()

    async def __aenter__(self) -> AsyncReader:
        return self

    async def __aexit__(self, *exc) -> None:
        await self.close()

    def _release(self) -> None:
        """Let go of the channel, which closes itself: at exit no loop waits for it."""
        self._closed, self._channel, self._stub, self._stream_infer = True, None, None, None

    def _open(self) -> None:
        """An asyncio channel belongs to the loop that is running when it is made, so it is made on first use."""
        options = kserve.channel_options(self.max_message_mib)
        if self._tls:
            self._channel = grpc.aio.secure_channel(self.url, self._tls.credentials(), options)
        else:
            self._channel = grpc.aio.insecure_channel(self.url, options)
        self._stub = GRPCInferenceServiceStub(self._channel)
        self._stream_infer = self._channel.unary_stream(kserve.STREAM_INFER, **kserve.STREAM_INFER_TYPES)
        kserve.at_exit(self, AsyncReader._release)

    async def _connect(self) -> pb.ModelMetadataResponse:
        """See `Reader._connect`."""
        if self._closed:
            raise RuntimeError("AsyncReader is closed; make a new one")
        if self._channel is None:
            self._open()
        ends = time.monotonic() + (self.timeouts.connect_s or float("inf"))
        for delay_s in wire.backoff_s():
            left_s = ends - time.monotonic()
            try:
                request = pb.ModelMetadataRequest(name=self.model)
                model = await self._stub.ModelMetadata(request, timeout=wire.rpc_timeout_s(left_s))
                wire.check_contract(model, self.url)
                return model
            except grpc.RpcError as error:
                failure = wire.connect_error(error, self.url, self.model, self.timeouts)
            if not isinstance(failure, Unavailable) or delay_s > left_s:
                raise failure
            await asyncio.sleep(delay_s)

    async def _start(self, request: pb.ModelInferRequest) -> grpc.aio.UnaryStreamCall:
        await self._connect()
        return self._stream_infer(request, timeout=self.timeouts.total_s)


class AsyncReadingStream:
    """Text of one reading as it comes; closing or dropping it, or cancelling the task that waits for it, cancels the
    request on the server at once. The twin of `ReadingStream`.

    Attributes
    ----------
    reading : Reading or None
        Complete once the iteration has ended.
    """

    def __init__(self, reader: AsyncReader, request: pb.ModelInferRequest, sent: Sequence[str]):
        self.reading: Reading | None = None
        self._reader = reader
        self._request: pb.ModelInferRequest | None = request
        self._sent = sent
        self._call: grpc.aio.UnaryStreamCall | None = None
        self._clock: Clock | None = None
        self._late = ""  # the limit that ran out
        self._ended = False

    @property
    def is_sent(self) -> bool:
        """The server was found, and the request is on its way."""
        return self._call is not None

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        """The next text, never empty; raises as `ReadingStream.__next__` does."""
        try:
            if self._call is None and not self._ended:
                request, self._request = self._request, None
                self._call = await self._reader._start(request)
                self._clock = Clock(self._reader.timeouts)
                kserve.at_exit(self, AsyncReadingStream._cancel)
                if self._ended:  # closed while it connected
                    self._cancel()
            while not self._ended:
                if delta := await self._receive():
                    return delta
        except BaseException as error:
            self._cancel()
            traceback.clear_frames(error.__traceback__)  # they would keep the call
            raise
        raise StopAsyncIteration

    async def result(self) -> Reading:
        """Read to the end and give the reading; raises as `ReadingStream.result` does."""
        async for _ in self:
            pass
        if self.reading is None:
            raise Cancelled(f"reading at {self._reader.url} was closed before its end; call read again")
        return self.reading

    async def close(self) -> None:
        """Cancel the request if it is still under way."""
        self._cancel()

    async def __aenter__(self) -> AsyncReadingStream:
        return self

    async def __aexit__(self, *exc) -> None:
        self._cancel()

    def __del__(self):
        self._cancel()

    def _cancel(self) -> None:
        self._ended, self._request = True, None
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    async def _receive(self) -> str:
        call, message, failure = self._call, grpc.aio.EOF, None
        due, limit = self._clock.next_limit()
        # Cancels the call, not the task that waits for it: a response that comes at the same moment is not lost.
        timer = asyncio.get_running_loop().call_later(due - time.monotonic(), self._expire, limit) if limit else None
        try:
            message = await call.read()
        except grpc.RpcError as error:
            failure = wire.stream_error(error, self._reader.url, self._reader.timeouts)
        except asyncio.CancelledError:
            if not call.cancelled() or asyncio.current_task().cancelling():
                raise
            failure = Cancelled(f"reading at {self._reader.url} was cancelled before its end")
        finally:
            if timer:
                timer.cancel()
        if message is grpc.aio.EOF:
            self._end(failure)
            return ""
        delta, reading = wire.parse_response(message)
        if reading:
            self.reading = wire.own_reading(reading, self._sent, self._reader.url)
        self._clock.heard(delta)
        return delta

    def _expire(self, limit: str) -> None:
        self._late = limit
        if self._call is not None:
            self._call.cancel()

    def _end(self, failure: CxrError | None) -> None:
        """See `ReadingStream._end`."""
        self._cancel()
        if self.reading is None:
            if self._late:
                raise wire.late(self._late, self._reader.timeouts, self._reader.url)
            raise failure or wire.no_reading(self._reader.url)
