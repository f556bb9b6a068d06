"""Readings through one or several servers, event by event: who waits, for how long, and what is in use."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cxr_triton.errors import InvalidRequest
from cxr_triton.perf.capacity.machine import RESOURCES, Reading, Replica, on_cores
from cxr_triton.perf.capacity.stages import Cost, Stages
from cxr_triton.perf.summary import Record, distribution, summarize

PARTS = {
    "preprocess": ("transport", "image_decode", "preprocess"),
    "vision": ("vision",),
    "prefill": ("queue", "prefill"),
    "decode": ("decode",),
    "report": ("report",),
}
"""Of a reading, one after the other, and the stages of `cxr_triton.perf.stages` that each is."""


def means(of_readings: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Mean and 95th percentile of each part, of readings' milliseconds."""
    each = {part: distribution(values) for part, values in of_readings.items()}
    return {part: {"mean": told["mean"], "p95": told["p95"]} for part, told in each.items()}


@dataclass
class Outcome:
    """What became of the readings.

    Attributes
    ----------
    readings : list of Reading
        In the order of arrival, without those of the warm-up.
    seconds : float
        From the first of them to the last arrival.
    use : dict of str to float
        Share of ``cores``, ``card``, ``report`` and ``slots`` in use meanwhile, over all servers.
    began_s : float
        When the first of them came.
    core_s : float
        Seconds of cores from the first of them until all were done.
    """

    readings: list[Reading]
    seconds: float
    use: dict[str, float]
    began_s: float
    core_s: float

    @property
    def refused(self) -> dict[str, int]:
        """Stage to how many readings its full queue refused."""
        return dict(Counter(reading.refused_by for reading in self.readings if reading.refused_by))

    @property
    def records(self) -> list[Record]:
        """The readings as a benchmark has them; what was refused has the status ``QUEUE_FULL``."""
        return [
            Record(
                reading.number,
                reading.arrived_s - self.began_s,
                reading.arrived_s - self.began_s,
                reading.end_s - self.began_s,
                [] if math.isnan(reading.first_s) else [reading.first_s - self.began_s],
                "QUEUE_FULL" if reading.refused_by else "ok",
                reading.prompt_tokens,
                reading.kind.answer_tokens,
            )
            for reading in self.readings
        ]

    @property
    def stages_ms(self) -> dict[str, dict[str, float]]:
        """Mean and 95th percentile of each of `PARTS`, with what was waited for it."""
        done = [reading for reading in self.readings if not reading.refused_by]
        ends = [(reading.arrived_s, *reading.passed_s, reading.end_s) for reading in done]
        columns = zip(*([1e3 * (to - since) for since, to in itertools.pairwise(each)] for each in ends), strict=True)
        return means(dict(zip(PARTS, columns, strict=True)))

    def summary(self) -> dict:
        """Rates and distributions as `bench run` has them, with ``waiting_ms``, ``use`` and ``refused``."""
        told = summarize(self.records, {})
        waits = [1e3 * reading.waited_s for reading in self.readings if not reading.refused_by]
        kept = ("requests", "readings_per_s", "output_tokens_per_s", "latency_ms", "ttft_ms")
        return {
            **{name: told[name] for name in kept},
            "waiting_ms": distribution(waits),
            "use": self.use,
            "refused": self.refused,
        }


class _Run:
    """The servers' clocks as one, and who gets a reading: the server with the fewest under way."""

    def __init__(self, stages: Stages, replicas: int, pictures: int, chance: int = 0):
        self.stages, self.pictures = stages, pictures
        self.ended: list[Reading] = []
        self.replicas = [Replica(stages, self.ended.append, chance + i) for i in range(replicas)]
        self._next: list[tuple[float, int]] = []  # heap, with entries that are not true any more
        self._true = [math.inf] * replicas
        self._numbers = itertools.count()

    def arrive(self, at_s: float) -> Reading:
        """A reading comes."""
        self.advance(at_s)
        number = next(self._numbers)
        kinds = self.stages.readings
        reading = Reading(kinds[number % len(kinds)], self.pictures, number, at_s)
        index = min(range(len(self.replicas)), key=lambda i: self.replicas[i].under_way)
        replica = self.replicas[index]
        replica.advance(at_s)
        replica.arrive(reading)
        self._note(index)
        return reading

    def _note(self, index: int) -> None:
        self._true[index] = next_s = self.replicas[index].shared.next_s
        if next_s < math.inf:
            heapq.heappush(self._next, (next_s, index))

    @property
    def next_s(self) -> float:
        """When something ends next; infinite when nothing runs."""
        while self._next and self._next[0][0] != self._true[self._next[0][1]]:
            heapq.heappop(self._next)
        return self._next[0][0] if self._next else math.inf

    def advance(self, to_s: float) -> None:
        """Let all pass that ends until then."""
        while (next_s := self.next_s) <= to_s and next_s < math.inf:
            index = heapq.heappop(self._next)[1]
            self._true[index] = math.inf
            self.replicas[index].advance(next_s)
            self._note(index)

    def used(self, at_s: float) -> list[float]:
        """Seconds of each resource and, last, of the slots in use so far."""
        for index, replica in enumerate(self.replicas):
            replica.advance(at_s)
            self._note(index)
        each = [[replica.shared.used_s[r] for replica in self.replicas] for r in range(len(RESOURCES))]
        return [*map(sum, each), sum(replica.slots_s for replica in self.replicas)]


def simulate(
    stages: Stages,
    *,
    replicas: int = 1,
    arrivals: Iterable[float] | None = None,
    concurrency: int = 0,
    readings: int,
    min_seconds: float = 0.0,
    warm_up: int = 0,
    pictures: int = 1,
    chance: int = 0,
) -> Outcome:
    """Send readings until both minima are reached, as `bench run` does, and wait for what is under way.

    Parameters
    ----------
    stages : Stages
    replicas : int
        Servers; a reading goes to the one with the fewest under way.
    arrivals : iterable of float, optional
        Seconds at which readings arrive, ascending and without end: an open loop.
    concurrency : int
        Without `arrivals`: readings under way at any time, in all.
    readings, min_seconds : int, float
        Of the part that counts.
    warm_up : int
        Readings before.
    pictures : int
        Of each reading.
    chance : int
        Seed of where pieces go that stay on a core.

    Raises
    ------
    InvalidRequest
        A closed loop overflows a queue.
    """
    run = _Run(stages, replicas, pictures, chance)
    made: list[Reading] = []
    send = _open(run, iter(arrivals)) if arrivals is not None else _closed(run, concurrency)
    began_s, before, at_s = 0.0, run.used(0.0), 0.0
    for at_s in send:
        if len(made) == warm_up:
            began_s, before = at_s, run.used(at_s)
        if len(made) >= warm_up + readings and at_s - began_s >= min_seconds:
            break
        made.append(run.arrive(at_s))
    seconds, after = at_s - began_s, run.used(at_s)
    run.advance(math.inf)
    core_s = sum(replica.shared.used_s[0] for replica in run.replicas) - before[0]
    return Outcome(made[warm_up:], seconds, _shares(stages, replicas, seconds, before, after), began_s, core_s)


def share_beside(stages: Stages, piece: Cost, seconds: float) -> float:
    """What a process that computes one piece after the other gets of the cores beside one reading at a time.

    Over what it would take alone, for so many seconds.
    """
    run, took = _Run(stages, 1, 1), itertools.count()

    def begin() -> None:
        next(took)
        run.replicas[0].shared.add(*on_cores(piece.ms, piece.cpu_ms), begin)

    begin()
    for at_s in _closed(run, 1):
        if at_s >= seconds:
            break
        run.arrive(at_s)
    return (next(took) - 1) * piece.ms / 1e3 / at_s


def _open(run: _Run, arrivals: Iterator[float]) -> Iterator[float]:
    for at_s in arrivals:
        run.advance(at_s)
        yield at_s


def _closed(run: _Run, concurrency: int) -> Iterator[float]:
    """The time of each arrival: `concurrency` at the start, then one where another ended."""
    yield from itertools.repeat(0.0, concurrency)
    while True:
        while not run.ended:
            run.advance(run.next_s)
        if (ended := run.ended.pop(0)).refused_by:
            raise InvalidRequest(
                f"{concurrency} readings at once are more than the queues take ({ended.refused_by} refused one); "
                "lower that, or raise machine.queue_size"
            )
        yield ended.end_s


def _shares(stages: Stages, replicas: int, seconds: float, before: list[float], after: list[float]) -> dict[str, float]:
    machine = stages.machine
    capacities = {"cores": machine.cores, "card": machine.cards, "report": 1, "slots": machine.slots}
    return {
        name: (to - since) / (seconds * replicas * most) if seconds and most else 0.0
        for (name, most), since, to in zip(capacities.items(), before, after, strict=True)
    }
