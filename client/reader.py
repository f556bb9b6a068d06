"""`Reader`: readings from a served `cxr_reader`, streamed to blocking code."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from cxr_triton import kserve
from cxr_triton.client import wire
from cxr_triton.client.limits import DEFAULT_TIMEOUTS, Clock, Timeouts, Tls
from cxr_triton.errors import Cancelled, CxrError, Unavailable
from cxr_triton.identity import sha256
from cxr_triton.reading import Reading


class Reader:
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

    Raises
    ------
    InvalidRequest
        `url` is no host and port; the message says how to write it.

    Examples
    --------
    >>> with Reader("127.0.0.1:8001") as reader:
    ...     stream = reader.read("chest.dcm")
    ...     for delta in stream:
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
        options = kserve.channel_options(max_message_mib)
        if tls:
            channel = grpc.secure_channel(url, tls.credentials(), options)
        else:
            channel = grpc.insecure_channel(url, options)
        self._channel: grpc.Channel | None = channel
        self._stub = GRPCInferenceServiceStub(channel)
        self._stream_infer = channel.unary_stream(kserve.STREAM_INFER, **kserve.STREAM_INFER_TYPES)
        self._watchdog = _Watchdog()
        self._closed = False
        kserve.at_exit(self, Reader.close)

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
    ) -> ReadingStream:
        """One reading of one patient's pictures; what is None is left to the server's profile.

        Parameters
        ----------
        images : bytes, path, or a sequence of these
            DICOM Part 10, PNG or JPEG; prior first, current last; none for a text-only task. Paths are read here.
        task, prompt, mode, history, variables, max_new_tokens, temperature, top_p, repetition_penalty, seed, stop,
        identifiers
            Keys of the request, see `cxr_triton.request.ReadRequest`.

        Returns
        -------
        ReadingStream
            Sends the request when its iteration starts.

        Raises
        ------
        OSError
            A path cannot be read.
        LimitExceeded
            The images are larger than `max_message_mib`.
        """
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
        return ReadingStream(self, message, [sha256(content) for content in contents])

    def server_info(self) -> wire.ServerInfo:
        """What answers at the URL, once it is ready and serves the contract.

        Raises
        ------
        Unavailable
            No ready server within `Timeouts.connect_s`.
        ServerMismatch
            The server has no such model, or its tensors are not those of the contract.
        """
        model = self._connect()
        try:
            server = self._stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=self.timeouts.connect_s)
        except grpc.RpcError as error:
            raise wire.connect_error(error, self.url, self.model, self.timeouts) from None
        return wire.ServerInfo(server.name, server.version, model.name, tuple(model.versions))

    def close(self) -> None:
        """Cancel what is under way and close the connection."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        self._watchdog.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __del__(self):
        # Threads stand still while the interpreter ends, so nothing may wait for them; the connection ends by itself.
        if not getattr(self, "_closed", True) and not sys.is_finalizing():
            self.close()

    def _connect(self) -> pb.ModelMetadataResponse:
        """Ask for the model's tensors until the server answers: connection, readiness and contract in one call.

        Only this call is ever repeated, so a reading never runs twice.
        """
        if self._closed:
            raise RuntimeError("Reader is closed; make a new one")
        ends = time.monotonic() + (self.timeouts.connect_s or float("inf"))
        for delay_s in wire.backoff_s():
            left_s = ends - time.monotonic()
            try:
                request = pb.ModelMetadataRequest(name=self.model)
                model = self._stub.ModelMetadata(request, timeout=wire.rpc_timeout_s(left_s))
                wire.check_contract(model, self.url)
                return model
            except grpc.RpcError as error:
                failure = wire.connect_error(error, self.url, self.model, self.timeouts)
            if not isinstance(failure, Unavailable) or delay_s > left_s:
                raise failure
            time.sleep(delay_s)

    def _start(self, request: pb.ModelInferRequest) -> grpc.Call:
        self._connect()
        return self._stream_infer(request, timeout=self.timeouts.total_s)


class ReadingStream:
    """Text of one reading as it comes; closing or dropping it cancels the request on the server at once.

    Attributes
    ----------
    reading : Reading or None
        Complete once the iteration has ended.
    """

    def __init__(self, reader: Reader, request: pb.ModelInferRequest, sent: Sequence[str]):
        self.reading: Reading | None = None
        self._reader = reader
        self._request: pb.ModelInferRequest | None = request
        self._sent = sent
        self._call: grpc.Call | None = None
        self._clock: Clock | None = None
        self._late = ""  # the limit that ran out
        self._ended = False

    @property
    def is_sent(self) -> bool:
        """The server was found, and the request is on its way."""
        return self._call is not None

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
                request, self._request = self._request, None
                self._call = self._reader._start(request)
                self._clock = Clock(self._reader.timeouts)
                kserve.at_exit(self, ReadingStream.close)
                if self._ended:  # closed while it connected
                    self.close()
            while not self._ended:
                if delta := self._receive():
                    return delta
        except BaseException as error:
            self.close()
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
        if self.reading is None:
            raise Cancelled(f"reading at {self._reader.url} was closed before its end; call read again")
        return self.reading

    def close(self) -> None:
        """Cancel the request if it is still under way."""
        self._ended, self._request = True, None
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def __enter__(self) -> ReadingStream:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __del__(self):
        if not sys.is_finalizing():
            self.close()

    def _receive(self) -> str:
        call, message, failure = self._call, None, None
        if call is None:  # closed by another thread
            return ""
        due, limit = self._clock.next_limit()
        self._reader._watchdog.watch(call, due)
        try:
            message = next(call, None)
        except grpc.RpcError as error:
            failure = wire.stream_error(error, self._reader.url, self._reader.timeouts)
        finally:
            if self._reader._watchdog.forget(call):
                self._late = limit
        if message is None:
            self._end(failure)
            return ""
        delta, reading = wire.parse_response(message)
        if reading:
            self.reading = wire.own_reading(reading, self._sent, self._reader.url)
        self._clock.heard(delta)
        return delta

    def _end(self, failure: CxrError | None) -> None:
        """The stream is over; how matters only while the reading is not complete."""
        self.close()
        if self.reading is None:
            if self._late:
                raise wire.late(self._late, self._reader.timeouts, self._reader.url)
            raise failure or wire.no_reading(self._reader.url)


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
