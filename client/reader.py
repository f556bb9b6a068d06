"""`Reader`: readings from a served `cxr_reader`, streamed to blocking code."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from cxr_triton import kserve
from cxr_triton.client import wire
from cxr_triton.client.base import Attempts, BaseReader, BaseStream, Sent
from cxr_triton.client.conversation import Conversation
from cxr_triton.client.spans import Span
from cxr_triton.profile import ModelProfile
from cxr_triton.reading import Reading


class Reader(BaseReader["ReadingStream"]):
    """Blocking client; one connection, any number of threads and simultaneous readings.

    Parameters
    ----------
    url : str
        Host and port of Triton's gRPC endpoint.
    timeouts : Timeouts
        Limits of each reading.
    model : str
        Name of the served ensemble.
    max_message_mib : int
        Largest request and response.
    tls : Tls, optional
        Encrypts the channel. Without it pictures travel in clear text, which is meant for the loopback interface.
    token_file : path, optional
        File with the bearer token that a front door asks for; read for each call. Off the loopback interface it is
        sent with `tls` only.

    Raises
    ------
    InvalidRequest
        `url` is no host and port, and the message says how to write it; or the token would travel unencrypted.
    InvalidConfig
        `token_file` holds no token.

    Examples
    --------
    >>> with Reader("127.0.0.1:8001") as reader:
    ...     stream = reader.read("chest.dcm")
    ...     for delta in stream:
    ...         print(delta, end="", flush=True)
    ...     print(stream.reading.findings)
    """

    def __post_init__(self):
        super().__post_init__()
        self._calls = self._open(grpc)
        self._watchdog = _Watchdog()
        self._escort = _Escort(self._watchdog)
        self._streams: weakref.WeakSet[ReadingStream] = weakref.WeakSet()
        kserve.at_exit(self, Reader._drop)

    def open(
        self, images: wire.Image | Sequence[wire.Image] = (), *, follow: Sequence[Reading] = (), **options: Any
    ) -> Conversation[ReadingStream]:
        """A dialogue about one patient's pictures: each turn takes along what was asked and answered before.

        Parameters, errors and an example: `cxr_triton.client.Conversation`.
        """
        return Conversation(self, images, follow=follow, **options)

    def server_info(self) -> wire.ServerInfo:
        """What answers at the URL, once it is ready and serves the contract.

        Raises
        ------
        Unavailable
            No ready server within `Timeouts.connect_s`.
        ServerMismatch
            The server has no such model, or its tensors are not those of the contract.
        Cancelled
            The reader was closed meanwhile.
        """
        model = self._connect()
        try:
            server = self._call(self._opened().server, pb.ServerMetadataRequest(), self.timeouts.connect_s)
        except grpc.RpcError as error:
            raise self._failure(error) from None
        return wire.ServerInfo(server.name, server.version, model.name, tuple(model.versions))

    def profile(self) -> ModelProfile:
        """What the served model can be asked: tasks, modes, limits, notice.

        Raises
        ------
        ServerMismatch
            The repository was packaged before it carried its profile, or by another release; else as `server_info`.
        """
        model = self._connect()
        try:
            answer = self._call(self._opened().config, pb.ModelConfigRequest(name=model.name), self.timeouts.connect_s)
        except grpc.RpcError as error:
            raise self._failure(error) from None
        return wire.served_profile(answer, self.url)

    def close(self) -> None:
        """Cancel what is under way and close the connection."""
        for stream in list(self._streams):
            stream.close()
        self._escort.close(wait=True)
        self._drop()

    def _drop(self) -> None:
        if calls := self._release():
            calls.channel.close()
        self._escort.close(wait=False)
        self._watchdog.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __del__(self):
        # Threads stand still while the interpreter ends, so nothing may wait for them; the connection ends by itself.
        if not getattr(self, "_closed", True) and not sys.is_finalizing():
            self._drop()

    def _stream(self, request: Callable[[], Sent], span: Span) -> ReadingStream:
        stream = ReadingStream(self, request, span)
        self._streams.add(stream)
        return stream

    def _call(self, rpc: Callable[..., Any], request: object, timeout_s: float | None) -> Any:
        try:
            return rpc(request, timeout=timeout_s)
        except ValueError:  # so gRPC says that its channel is closed
            raise self._closed_meanwhile() from None

    def _connect(self) -> pb.ModelMetadataResponse:
        self._require_open()
        attempts = Attempts(self)
        while True:
            try:
                model = self._call(self._opened().model, attempts.request, attempts.timeout_s())
            except grpc.RpcError as error:
                failure = self._failure(error)
            else:
                wire.check_contract(model, self.url)
                return model
            time.sleep(attempts.wait_s(failure))

    def _start(self, request: pb.ModelInferRequest) -> grpc.Call:
        self._connect()
        return self._call(self._opened().infer, request, self.timeouts.total_s)


class ReadingStream(BaseStream):
    """Text of one reading as it comes; closing or dropping it cancels the request on the server.

    Attributes
    ----------
    reading : Reading or None
        Complete once the iteration has ended.
    """

    def __init__(self, reader: Reader, request: Callable[[], Sent], span: Span):
        super().__init__(reader.url, reader.timeouts, request, span)
        self._reader = reader

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """The next text, never empty.

        Raises
        ------
        CxrError
            The server's refusal by its code; `DeadlineExceeded`, `Unavailable`, `ServerMismatch`, `ReadingMismatch` or
            `Cancelled` as the client finds them.
        """
        try:
            if self._call is None and not self._ended:
                self._follow(self._reader._start(self._taken_request()))
            while not self._ended:
                if delta := self._receive():
                    return delta
        except BaseException as error:
            self._failed(error)
            self._leave()
            traceback.clear_frames(error.__traceback__)  # they would keep the call
            raise
        raise StopIteration

    def result(self) -> Reading:
        """Read to the end and give the reading.

        Raises
        ------
        CxrError
            As the iteration does; `Cancelled` when the stream was closed before its end.
        """
        for _ in self:
            pass
        return self._complete()

    def close(self) -> None:
        """Cancel the request if it is still under way: at once, or within a second where nothing has come yet."""
        self._left()
        self._leave()

    def _leave(self) -> None:
        call = self._call
        if call is None or self._has_begun or self._waiting:
            self._cancel()
            return
        self._ended, self._call = True, None
        self._reader._escort.leave(call)

    def __enter__(self) -> ReadingStream:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __del__(self):
        if not sys.is_finalizing():
            self._leave()  # garbage collection may come in the middle of OpenTelemetry's work: the span stays untold

    def _receive(self) -> str:
        call, message, failure = self._call, None, None
        if call is None:  # closed by another thread
            return ""
        due, limit = self._next_limit()
        self._reader._watchdog.watch(call, due)
        self._waiting = True
        try:
            message = next(call, None)
        except grpc.RpcError as error:
            failure = wire.stream_error(error, self._url, self._timeouts)
        finally:
            self._waiting = False
            if self._reader._watchdog.forget(call):
                self._late = limit
        del call  # an error keeps this frame
        if message is None:
            self._end(failure)
            return ""
        return self._heard(message)


class _Watchdog:
    """Cancels calls whose next response is overdue: gRPC has no wait with a limit, and one thread serves all calls."""

    def __init__(self):
        self._changed = threading.Condition()
        self._due: dict[grpc.Call, float] = {}
        self._overdue: set[grpc.Call] = set()
        self._wakes = float("inf")
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, call: grpc.Call, due: float) -> None:
        """Cancel `call` at the monotonic time `due` unless `forget` comes first."""
        if due == float("inf"):
            return
        with self._changed:
            self._due[call] = due
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="cxr-reader-watchdog", daemon=True)
                self._thread.start()
            if due < self._wakes:
                self._changed.notify()

    def forget(self, call: grpc.Call) -> bool:
        """Stop watching `call`; whether it was overdue, even if a response came at the same moment."""
        with self._changed:
            self._due.pop(call, None)
            overdue = call in self._overdue
            self._overdue.discard(call)
            return overdue

    def close(self) -> None:
        """End its thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        thread = self._thread
        # One that an interrupt caught in its start is not alive yet, cannot be joined, and ends by `_closed`.
        if thread is not None and thread is not threading.current_thread() and thread.is_alive():
            thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                self._expire(now)
                self._wakes = min(self._due.values(), default=float("inf"))
                self._changed.wait(min(self._wakes - now, threading.TIMEOUT_MAX))

    def _expire(self, now: float) -> None:
        with self._changed:
            for call in [call for call, due in self._due.items() if due <= now]:
                del self._due[call]
                self._overdue.add(call)
                call.cancel()


class _Escort:
    """Sees calls off that their callers have left, in a thread of its own.

    Triton 2.51 keeps what belongs to a cancelled call for ever where the cancellation meets its beginning. So a call is
    cancelled only once the server has said something, or was silent for `wire.END_S`.
    """

    def __init__(self, watchdog: _Watchdog):
        self._watchdog = watchdog
        self._left: queue.SimpleQueue[tuple[grpc.Call, float] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def leave(self, call: grpc.Call) -> None:
        """Cancel `call`, from which nothing was heard, with its first response.

        Waits for nothing itself: garbage collection may bring it here in the middle of gRPC's own work.
        """
        self._left.put((call, time.monotonic() + wire.END_S))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cxr-reader-escort", daemon=True)
            self._thread.start()

    def close(self, *, wait: bool) -> None:
        """End its thread, after what was left so far."""
        self._left.put(None)
        if wait and self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while left := self._left.get():
            call, due = left
            self._watchdog.watch(call, due)
            with contextlib.suppress(grpc.RpcError):
                next(call, None)
            self._watchdog.forget(call)
            call.cancel()
            del left, call
