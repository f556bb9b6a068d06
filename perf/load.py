"""Open-loop and closed-loop load on a served `cxr_reader`, from one process over gRPC.

Open loop: every request has a time at which it is due, whatever the server does, and latencies count from it. What can
wait is left out of the measured time: requests are serialized before, responses are parsed after, and the garbage
collector pauses meanwhile. Each request under way has a thread that blocks on its stream: nothing lies between gRPC and
the clock, and a response costs half of what it costs in an event loop. Where the system allows it this process has
real-time priority meanwhile: a server on the same cores would keep a response waiting for its time by milliseconds.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import grpc
import grpc.experimental
from tritonclient.grpc import service_pb2 as pb

from cxr_triton import kserve
from cxr_triton.client import wire
from cxr_triton.client.limits import NO_ACCESS, Access, Timeouts
from cxr_triton.errors import CxrError, Unavailable
from cxr_triton.perf.stages import stages_of
from cxr_triton.perf.summary import Record
from cxr_triton.perf.workload import arrivals

OVERLOAD = ("QUEUE_FULL", "DEADLINE_EXCEEDED")
"""Errors that a load may be too high for; every other one is a fault."""


@contextmanager
def prompt_threads() -> Iterator[str]:
    """All threads of this process, gRPC's too, at the lowest real-time priority meanwhile, if the system allows it.

    What they start meanwhile has it too: processes keep it.

    Yields
    ------
    str
        The priority that they have: ``real-time`` or ``normal``.
    """
    try:
        before, priority = os.sched_getscheduler(0), os.sched_getparam(0)
        started_so = before in (os.SCHED_FIFO, os.SCHED_RR)
        if not started_so:
            _schedule_threads(os.SCHED_FIFO, os.sched_param(1))
    except (AttributeError, OSError):  # another system than Linux, or not permitted
        yield "normal"
        return
    try:
        yield "real-time"
    finally:
        if not started_so:
            _schedule_threads(before, priority)


def _schedule_threads(policy: int, priority: os.sched_param) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setscheduler(int(thread), policy, priority)


@dataclass(frozen=True)
class Load:
    """How requests are offered.

    Attributes
    ----------
    kind : {"concurrency", "rate_per_s"}
        So many requests under way at any time (closed loop), or so many due per second (open loop).
    value : float
    arrival : str
        Of an open loop: ``poisson`` or ``constant``.
    """

    kind: str
    value: float
    arrival: str = "poisson"

    def as_json(self) -> dict:
        """``load`` of the schema."""
        arrival = {"arrival": self.arrival} if self.kind == "rate_per_s" else {}
        return {"kind": self.kind, "value": self.value, **arrival}

    def __str__(self) -> str:
        return f"{self.value:.3g}/s {self.arrival}" if self.kind == "rate_per_s" else f"concurrency {self.value:g}"


def offer(
    url: str,
    messages: Sequence[bytes],
    load: Load,
    *,
    min_seconds: float,
    min_requests: int,
    seed: int = 0,
    timeout_s: float = 600.0,
    access: Access = NO_ACCESS,
) -> tuple[list[Record], CxrError | None]:
    """Offer a load until both minima are reached, and wait for what is under way.

    Parameters
    ----------
    url : str
        Host and port of Triton's gRPC endpoint.
    messages : sequence of bytes
        Serialized requests, sent in order, again and again.
    load : Load
    min_seconds, min_requests : float, int
        No request is due later than both allow.
    seed : int
        Of the arrivals.
    timeout_s : float
        Limit of one request.
    access : Access
        How the endpoint lets a client in.

    Returns
    -------
    list of Record
        One for each request that was sent.
    CxrError or None
        The first failure; it ends the load early.
    """
    run = _Run(url, messages, load, min_seconds, min_requests, seed, timeout_s, access)
    run.run()
    exchanges = sorted(run.exchanges, key=lambda exchange: exchange.scheduled_s)
    return [record(exchange) for exchange in exchanges], run.failure


@dataclass
class _Exchange:
    """One request as it was seen: everything to make a `Record` of, later."""

    item: int
    scheduled_s: float
    sent_s: float
    arrived_s: list[float]
    responses: list[bytes]
    end_s: float = 0.0
    error: CxrError | None = None


@dataclass
class _Run:
    url: str
    messages: Sequence[bytes]
    load: Load
    min_seconds: float
    min_requests: int
    seed: int = 0
    timeout_s: float = 600.0
    access: Access = NO_ACCESS

    def __post_init__(self):
        timeout_s = self.timeout_s
        self.access.require_private(self.url)
        self._metadata = self.access.metadata()
        self.timeouts = Timeouts(connect_s=min(5.0, timeout_s), first_delta_s=None, idle_s=None, total_s=timeout_s)
        self.exchanges: list[_Exchange] = []
        self.failure: CxrError | None = None
        self._fault: Exception | None = None
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._leading, self._idle = threading.Lock(), threading.Semaphore(0)
        self._turns = itertools.count()
        is_open = self.load.kind == "rate_per_s"
        self._due = arrivals(self.load.arrival, self.load.value, [self.seed]) if is_open else None
        self._at_first = 1 if is_open else int(self.load.value)

    def run(self) -> None:
        """Fill `exchanges`; gRPC runs in threads only, because Ctrl-C would break its state."""
        try:
            self._connect_and_offer()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they would keep the channel
            raise
        finally:  # what was under way was cancelled with the channel
            self._ended.set()
            self._join()
            gc.collect()  # a call that ended with an error may lie in a circle, and none may outlive this
        if self._fault:
            raise self._fault

    def _connect_and_offer(self) -> None:
        options = [*kserve.channel_options(1024), (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)]
        with self.access.channel(grpc, self.url, options) as channel:
            if not self._is_ready(channel):
                raise Unavailable(
                    f"no server at {self.url} within {self.timeouts.connect_s:g} s; start one or give its gRPC port"
                )
            self._infer = channel.unary_stream(kserve.STREAM_INFER)
            self._offer()

    def _is_ready(self, channel: grpc.Channel) -> bool:
        with suppress(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(self.timeouts.connect_s)
            return True
        return False

    def _offer(self) -> None:
        gc.collect()
        gc.disable()
        try:
            with prompt_threads():
                self.began_s = time.monotonic()
                for _ in range(self._at_first):
                    self._start()
                self._join()
        finally:
            gc.enable()

    def _join(self) -> None:
        for thread in self._threads:  # grows meanwhile
            while thread.is_alive():
                thread.join(0.2)

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="cxr-load", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _now(self) -> float:
        return time.monotonic() - self.began_s

    def _work(self) -> None:
        """One request after the other, until none is due any more."""
        try:
            while turn := self._turn():
                self._send(*turn)
                self._idle.release()
        except Exception as error:
            self._fault = error
            self._ended.set()

    def _turn(self) -> tuple[int, float] | None:
        """Number of the next request and when it is due, at that time; None after the last.

        In an open loop one thread leads: it sees to a follower, sleeps until its request is due, and lets the follower
        lead.
        """
        if self._due is None:
            turn, now_s = next(self._turns), self._now()
            ended = self._ended.is_set() or (turn >= self.min_requests and now_s >= self.min_seconds)
            return None if ended else (turn, now_s)
        with self._leading:
            turn, due_s = next(self._turns), next(self._due)
            if self._ended.is_set() or (due_s >= self.min_seconds and turn >= self.min_requests):
                return None
            if not self._idle.acquire(blocking=False):
                self._start()
            return None if self._ended.wait(max(0.0, due_s - self._now())) else (turn, due_s)

    def _send(self, turn: int, scheduled_s: float) -> None:
        exchange = _Exchange(turn % len(self.messages), scheduled_s, self._now(), [], [])
        self.exchanges.append(exchange)
        try:
            for response in self._infer(
                self.messages[exchange.item], timeout=self.timeouts.total_s, metadata=self._metadata
            ):
                exchange.arrived_s.append(self._now())
                exchange.responses.append(response)
        except grpc.RpcError as error:
            self._fail(exchange, wire.stream_error(error, self.url, self.timeouts))
        exchange.end_s = self._now()
        if not exchange.error:
            self._check(exchange)

    def _check(self, exchange: _Exchange) -> None:
        """Look for the reading, or the error in its place, at once: a load that fails has to end."""
        try:
            # Triton may send an empty response after the last one.
            ends = [wire.parse_response(pb.ModelStreamInferResponse.FromString(r)) for r in exchange.responses[-2:]]
        except CxrError as error:
            self._fail(exchange, error)
            return
        if not any(reading for _, reading in ends):
            self._fail(exchange, wire.no_reading(self.url))

    def _fail(self, exchange: _Exchange, error: CxrError) -> None:
        exchange.error = error
        self.failure = self.failure or error
        self._ended.set()


def record(exchange: _Exchange) -> Record:
    """What a request took, out of its responses."""
    deltas_s: list[float] = []
    end_s, reading = exchange.end_s, {}
    if not exchange.error:
        for at_s, response in zip(exchange.arrived_s, exchange.responses, strict=True):
            delta, text = wire.parse_response(pb.ModelStreamInferResponse.FromString(response))
            if delta:
                deltas_s.append(at_s)
            if text:
                reading, end_s = json.loads(text), at_s
    made = Record(exchange.item, exchange.scheduled_s, exchange.sent_s, end_s, deltas_s, status="")
    if exchange.error:
        made.status = exchange.error.code
        return made
    return with_reading(made, reading)


def with_reading(made: Record, reading: dict) -> Record:
    """Status, lengths and stages of a record, from the READING (as JSON) that ended it."""
    made.status = reading["status"]
    made.prompt_tokens, made.tokens = reading["usage"]["prompt_tokens"], reading["usage"]["completion_tokens"]
    made.stages_ms = stages_of(reading["timings_ms"], made.sent_s, made.deltas_s, made.end_s)
    return made
