"""Open-loop and closed-loop load on a served `cxr_reader`, from one asyncio process over gRPC.

Open loop: every request has a time at which it is due, whatever the server does, and latencies count from it. What can
wait is left out of the measured time: requests are serialized before, responses are parsed after, and the garbage
collector pauses meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc
from tritonclient.grpc import service_pb2 as pb

from cxr_triton.client import wire
from cxr_triton.client.limits import Timeouts
from cxr_triton.errors import CxrError, Unavailable
from cxr_triton.perf.stages import stages_of
from cxr_triton.perf.summary import Record
from cxr_triton.perf.workload import arrivals

TIMER_S = 0.002
OVERLOAD = ("QUEUE_FULL", "DEADLINE_EXCEEDED")
"""Errors that a load may be too high for; every other one is a fault."""


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
    on_done: Callable[[], None] = lambda: None,
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
    on_done : callable
        Called after each request.

    Returns
    -------
    list of Record
        One for each request that was sent.
    CxrError or None
        The first failure; it ends the load early.
    """
    return asyncio.run(_Run(url, messages, timeout_s, on_done).run(load, min_seconds, min_requests, seed))


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


class _Run:
    def __init__(self, url: str, messages: Sequence[bytes], timeout_s: float, on_done: Callable[[], None]):
        self.url, self.messages = url, messages
        self.timeouts = Timeouts(connect_s=min(5.0, timeout_s), first_delta_s=None, idle_s=None, total_s=timeout_s)
        self.on_done = on_done
        self.exchanges: list[_Exchange] = []
        self.failure: CxrError | None = None

    async def run(self, load: Load, min_seconds: float, min_requests: int, seed: int):
        async with grpc.aio.insecure_channel(self.url, wire.channel_options(1024)) as channel:
            try:
                await asyncio.wait_for(channel.channel_ready(), self.timeouts.connect_s)
            except TimeoutError:
                raise Unavailable(
                    f"no server at {self.url} within {self.timeouts.connect_s:g} s; start one or give its gRPC port"
                ) from None
            self._infer = channel.unary_stream(wire.STREAM_INFER)
            gc.collect()
            gc.disable()
            try:
                self._began_s = time.monotonic()
                if load.kind == "rate_per_s":
                    await self._open_loop(arrivals(load.arrival, load.value, [seed]), min_seconds, min_requests)
                else:
                    turns = itertools.count()
                    workers = (self._closed_loop(turns, min_seconds, min_requests) for _ in range(int(load.value)))
                    await asyncio.gather(*workers)
            finally:
                gc.enable()
        return [record(exchange) for exchange in self.exchanges], self.failure

    def _now(self) -> float:
        return time.monotonic() - self._began_s

    async def _open_loop(self, due: Iterator[float], min_seconds: float, min_requests: int) -> None:
        tasks = []
        for turn, scheduled_s in enumerate(due):
            if self.failure or (scheduled_s >= min_seconds and turn >= min_requests):
                break
            await self._until(scheduled_s)
            tasks.append(asyncio.create_task(self._send(turn % len(self.messages), scheduled_s)))
        await asyncio.gather(*tasks)

    async def _until(self, due_s: float) -> None:
        """Wait; the last `TIMER_S` actively, because the event loop's timers are late by a millisecond or two."""
        if (wait_s := due_s - self._now() - TIMER_S) > 0:
            await asyncio.sleep(wait_s)
        while self._now() < due_s:
            await asyncio.sleep(0)

    async def _closed_loop(self, turns: Iterator[int], min_seconds: float, min_requests: int) -> None:
        """One of the requests that are always under way."""
        while not self.failure:
            turn = next(turns)
            if turn >= min_requests and self._now() >= min_seconds:
                return
            await self._send(turn % len(self.messages), self._now())

    async def _send(self, item: int, scheduled_s: float) -> None:
        exchange = _Exchange(item, scheduled_s, self._now(), [], [])
        self.exchanges.append(exchange)
        call = self._infer(self.messages[item], timeout=self.timeouts.total_s)
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                exchange.arrived_s.append(self._now())
                exchange.responses.append(response)
        except grpc.RpcError as error:
            self._fail(exchange, wire.stream_error(error, self.url, self.timeouts))
        exchange.end_s = self._now()
        if not exchange.error:
            self._check(exchange)
        self.on_done()

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


def record(exchange: _Exchange) -> Record:
    """What a request took, out of its responses."""
    deltas_s, end_s, reading = [], exchange.end_s, None
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
