"""What `Reader` and `AsyncReader` have in common: their settings, the request, and what responses make of a stream."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from cxr_triton import kserve
from cxr_triton.client import wire
from cxr_triton.client.address import require_endpoint
from cxr_triton.client.limits import DEFAULT_TIMEOUTS, Access, Clock, Timeouts, Tls
from cxr_triton.client.spans import Span, code_of
from cxr_triton.errors import Cancelled, CxrError, Unavailable
from cxr_triton.identity import sha256
from cxr_triton.reading import Reading

Stream = TypeVar("Stream", bound="BaseStream")
Sent = tuple[pb.ModelInferRequest, list[str]]
"""A request, and SHA-256 of each of its images. It takes long to make of large ones."""


class Calls(NamedTuple):
    """A channel and what is called over it."""

    channel: Any
    server: Callable[..., Any]
    model: Callable[..., Any]
    config: Callable[..., Any]
    infer: Callable[..., Any]


@dataclass(eq=False)
class BaseReader(Generic[Stream]):
    """Settings of a connection, described in `Reader`, and the readings asked for over it."""

    url: str = "127.0.0.1:8001"
    _: KW_ONLY
    timeouts: Timeouts = DEFAULT_TIMEOUTS
    model: str = "cxr_reader"
    max_message_mib: int = 256
    tls: Tls | None = None
    token_file: str | os.PathLike | None = None

    def __post_init__(self):
        require_endpoint(self.url)
        self._access = Access(self.tls, self.token_file)
        self._access.require_private(self.url)
        self._closed = False
        self._calls: Calls | None = None

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
        guide: str | dict | None = None,
        logprobs: bool | None = None,
        scores: bool | None = None,
        traceparent: str | None = None,
    ) -> Stream:
        """One reading of one patient's pictures; what is None is left to the server's profile.

        Parameters
        ----------
        images : bytes, path, or a sequence of these
            DICOM Part 10, PNG or JPEG; prior first, current last; none for a text-only task. Paths are read here.
        task, prompt, mode, history, variables, max_new_tokens, temperature, top_p, repetition_penalty, seed, stop,
        identifiers, logprobs, scores, guide
            Keys of the request, see `cxr_triton.request.ReadRequest`.
        traceparent : str, optional
            What the reading is a part of, as W3C's Trace Context has it. Left out, or not of that form, it is a part of
            the caller's active span of OpenTelemetry, or else a trace of its own. What OpenTelemetry records of it
            begins here.

        Returns
        -------
        ReadingStream or AsyncReadingStream
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
            "guide": guide,
            "logprobs": logprobs,
            "scores": scores,
        }
        contents = wire.image_bytes(images)
        wire.require_size(contents, self.max_message_mib)
        asked = json.loads(json.dumps(request))  # as it is now
        span = Span("read", traceparent, "CLIENT", {"server.address": self.url, "cxr.images": len(contents)})

        def made() -> Sent:
            message = wire.infer_request(self.model, contents, asked, self.max_message_mib)
            message.id = str(span.place)  # which every model on its way gets
            return message, [sha256(content) for content in contents]

        return self._stream(made, span)

    def _stream(self, request: Callable[[], Sent], span: Span) -> Stream:
        raise NotImplementedError

    def _open(self, library: Any) -> Calls:
        """A channel of `grpc` or `grpc.aio`."""
        options = kserve.channel_options(self.max_message_mib)
        channel = self._access.channel(library, self.url, options)
        stub = GRPCInferenceServiceStub(channel)
        infer = channel.unary_stream(kserve.STREAM_INFER, **kserve.STREAM_INFER_TYPES)
        return Calls(channel, *map(self._let_in, (stub.ServerMetadata, stub.ModelMetadata, stub.ModelConfig, infer)))

    def _let_in(self, rpc: Callable[..., Any]) -> Callable[..., Any]:
        """`rpc` with the credentials of the moment that it is called at."""
        metadata = self._access.metadata

        def call(request: object, timeout: float | None = None) -> Any:
            # For those on the way that see headers: the front door, and Triton's own spans.
            trace = [("traceparent", request.id)] if isinstance(request, pb.ModelInferRequest) else []
            return rpc(request, timeout=timeout, metadata=[*metadata(), *trace])

        return call

    def _opened(self) -> Calls:
        if self._calls is None:
            raise self._closed_meanwhile()
        return self._calls

    def _release(self) -> Calls | None:
        """Close to new calls; gives the channel, which closes itself once nobody holds it."""
        self._closed = True
        calls, self._calls = self._calls, None
        return calls

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{type(self).__name__} is closed; make a new one")

    def _failure(self, error: grpc.RpcError) -> CxrError:
        return wire.connect_error(error, self.url, self.model, self.timeouts)

    def _closed_meanwhile(self) -> Cancelled:
        return Cancelled(f"the reader of {self.url} was closed before the server answered; make a new one")


class Attempts:
    """Asking for a model's tensors until the server answers: connection, readiness and contract in one call.

    Only this call is ever repeated, so a reading never runs twice.
    """

    def __init__(self, reader: BaseReader):
        self.request = pb.ModelMetadataRequest(name=reader.model)
        self._ends = time.monotonic() + (reader.timeouts.connect_s or float("inf"))
        self._waits_s = wire.backoff_s()

    def timeout_s(self) -> float | None:
        """What is left for the next attempt, as gRPC takes it: positive, and None without limit."""
        return None if self._ends == float("inf") else max(self._ends - time.monotonic(), 0.001)

    def wait_s(self, failure: CxrError) -> float:
        """How long to wait after a failed attempt; raises `failure` where another would not help or is too late."""
        wait_s = next(self._waits_s)
        if not isinstance(failure, Unavailable) or time.monotonic() + wait_s > self._ends:
            raise failure
        return wait_s


class BaseStream:
    """The state of one reading as it comes.

    Attributes
    ----------
    reading : Reading or None
        Complete once the iteration has ended.
    """

    def __init__(self, url: str, timeouts: Timeouts, request: Callable[[], Sent], span: Span):
        self.reading: Reading | None = None
        self._url, self._timeouts = url, timeouts
        self._request: Callable[[], Sent] | None = request
        self._sent: list[str] = []
        self._span = span
        self._call: grpc.Call | None = None
        self._was_sent = False
        self._clock = Clock(timeouts)
        self._late = ""  # the limit that ran out
        self._failure: CxrError | None = None  # what the last response said
        self._has_begun = False  # the server has said something
        self._waiting = False  # for a response
        self._ended = False

    @property
    def trace_id(self) -> str:
        """Of this reading, before it is there too."""
        return self._span.place.trace_id

    @property
    def is_sent(self) -> bool:
        """The server was found, and the request is on its way."""
        return self._call is not None

    @property
    def is_over(self) -> bool:
        """Nothing comes any more: the reading is complete, or the stream failed or was closed."""
        return self._ended

    def _taken_request(self) -> pb.ModelInferRequest:
        """Made now; may be called in another thread than the rest."""
        made, self._request = self._request, None
        if made is None:
            raise self._closed_early()
        request, self._sent = made()
        return request

    def _closed_early(self) -> Cancelled:
        return Cancelled(f"reading at {self._url} was closed before its end; call read again")

    def _follow(self, call: grpc.Call) -> None:
        """The request is on its way."""
        self._call, self._was_sent = call, True
        self._clock.start()
        kserve.at_exit(self, BaseStream._cancel)
        if self._ended:  # closed while it connected
            self._cancel()

    def _cancel(self) -> None:
        self._ended, self._request = True, None
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def _heard(self, message: pb.ModelStreamInferResponse) -> str:
        """Text of a response. A failure is kept for the end of the stream: cancelling it there makes Triton leak."""
        self._has_begun = True
        try:
            delta, reading = wire.parse_response(message)
            if reading:
                self.reading = wire.own_reading(reading, self._sent, self._url, self.trace_id)
                self._span.read(self.reading)
        except CxrError as failure:
            self._failure = self._failure or failure
            return ""
        self._clock.heard(delta)
        return delta

    def _next_limit(self) -> tuple[float, str]:
        """When the next response is due, and by which limit; a stream that has said its last is given `wire.END_S`."""
        if self.reading is None and self._failure is None:
            return self._clock.next_limit()
        return time.monotonic() + wire.END_S, "end"

    def _end(self, failure: CxrError | None) -> None:
        """The stream is over; how matters only while the reading is not complete."""
        was_closed = self._ended
        self._cancel()
        if was_closed:
            raise self._closed_early()
        if self._failure:
            raise self._failure
        if self.reading is None:
            if self._late:
                raise wire.late(self._late, self._timeouts, self._url)
            raise failure or wire.no_reading(self._url)
        self._span.end()

    def _failed(self, error: BaseException) -> None:
        """It will give no reading."""
        self._span.end(code_of(error))
        if isinstance(error, CxrError) and self._was_sent:
            error.of_trace(self.trace_id)

    def _left(self) -> None:
        """The caller has closed it."""
        self._span.end(None if self.reading else Cancelled.code)

    def _complete(self) -> Reading:
        if self.reading is None:
            raise self._closed_early()
        return self.reading
