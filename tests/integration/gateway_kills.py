"""What a fault run kills with SIGKILL, when, how each comes back, and how long it took until work went on."""

from __future__ import annotations

import bisect
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from cxr_triton.client.gateway.schema import deliveries, history

AWAY_S = (0.0, 5.0)
"""How long a victim stays dead, at least and at most; its start comes on top."""
PAUSE_S = (0.0, 0.5)
"""From the moment that a kill is due to the kill, so that it does not keep step with the queue."""
TOGETHER = 0.15
"""Share of the kills that come at the same moment as another one."""


@dataclass
class Victim:
    """Something that is killed in one or more ways, by the kind that is counted, and started again."""

    name: str
    ends: dict[str, Callable[[], object]]
    start: Callable[[], object]
    is_alive: Callable[[], bool]
    is_away: bool = False


@dataclass
class Outage:
    """From a kill, or a death that nobody asked for, until the victim ran again; seconds since the epoch."""

    kind: str
    victim: str
    at: float
    back_at: float = 0.0


def schedule(rng: random.Random, counts: dict[str, int]) -> list[tuple[float, str]]:
    """Kinds to kill in a random order, each with the progress of the run, 0 to 1, at which it is due."""
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    rng.shuffle(kinds)
    moments = sorted(rng.uniform(0.02, 0.95) for _ in kinds)
    for i in range(1, len(moments)):
        if rng.random() < TOGETHER:
            moments[i] = moments[i - 1]
    return list(zip(moments, kinds, strict=True))


@dataclass
class Reaper:
    """Kills what is due, and has everything that is dead started again; a thread for each outage."""

    victims: Sequence[Victim]
    due: list[tuple[float, str]]
    rng: random.Random
    say: Callable[[str], None]
    outages: list[Outage] = field(default_factory=list)
    died: list[Outage] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _failures: list[BaseException] = field(default_factory=list)

    def step(self, progress: float) -> None:
        """Kill what is due at this progress and not away; start again what died by itself."""
        if self._failures:
            raise self._failures[0]
        for victim in self.victims:
            if not victim.is_away and not victim.is_alive():
                self._begin(victim, "died", None, 0.0, 0.0)
        waiting = []
        while self.due and self.due[0][0] <= progress:
            moment, kind = self.due.pop(0)
            there = [victim for victim in self.victims if kind in victim.ends and not victim.is_away]
            if there:
                victim = self.rng.choice(there)
                # those of one moment wait as long, so that they die together
                pause_s = random.Random(moment).uniform(*PAUSE_S)
                self._begin(victim, kind, victim.ends[kind], pause_s, self.rng.uniform(*AWAY_S))
            else:
                waiting.append((moment, kind))
        self.due[:0] = waiting

    def is_quiet(self) -> bool:
        """Nothing is due, and nothing away."""
        return not self.due and not any(victim.is_away for victim in self.victims)

    def wait(self) -> None:
        """For the outages under way."""
        for thread in self._threads:
            thread.join()

    def _begin(self, victim: Victim, kind: str, end: Callable | None, pause_s: float, away_s: float) -> None:
        victim.is_away = True
        thread = threading.Thread(target=self._outage, args=(victim, kind, end, pause_s, away_s))
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]
        thread.start()

    def _outage(self, victim: Victim, kind: str, end: Callable | None, pause_s: float, away_s: float) -> None:
        try:
            time.sleep(pause_s)
            outage = Outage(kind, victim.name, time.time())
            (self.outages if end else self.died).append(outage)
            if end:
                end()
            time.sleep(away_s)
            victim.start()
            outage.back_at = time.time()
            what = f"killed ({kind})" if end else "died by itself"
            self.say(
                f"{victim.name} {what}, back after {outage.back_at - outage.at:.1f} s; {len(self.due)} kills to go"
            )
        except BaseException as error:
            self._failures.append(error)
        finally:
            victim.is_away = False


class Progress:
    """What the queue's database tells of when work went on."""

    def __init__(self, url: str):
        with sa.create_engine(url).connect() as c:
            stored = c.execute(sa.select(deliveries.c.sent_at, deliveries.c.destination)).all()
            steps = c.execute(sa.select(history.c.at, history.c.gateway, history.c.state)).all()
        self._stored = sorted(row.sent_at for row in stored if row.sent_at)
        self._steps: dict[str, list[float]] = {"database": sorted(row.at for row in steps)}
        self._steps["triton"] = sorted(row.at for row in steps if row.state == "sending")
        for row in sorted(steps):
            self._steps.setdefault(row.gateway, []).append(row.at)
        for row in sorted(row for row in stored if row.sent_at):
            self._steps.setdefault(row.destination, []).append(row.sent_at)

    def next_result_s(self, outage: Outage) -> float | None:
        """From an outage's begin to the next result that any destination stored."""
        return _until_next(self._stored, outage.at, outage.at)

    def work_s(self, outage: Outage) -> float | None:
        """From an outage's begin to the first work that its victim did after it was back.

        Of Triton a reading, of a gateway or the database a step of a job, of a destination a stored result.
        """
        return _until_next(self._steps.get(outage.victim, []), outage.at, outage.back_at)


def _until_next(times: list[float], since: float, after: float) -> float | None:
    i = bisect.bisect_right(times, after)
    return times[i] - since if i < len(times) else None


def quantiles(seconds: Sequence[float | None]) -> dict[str, float | int]:
    """Number, median, 99th percentile by nearest rank, and largest, in seconds."""
    known = sorted(value for value in seconds if value is not None)
    if not known:
        return {"n": 0}
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {"n": len(known)} | {name: round(known[math.ceil(q * len(known)) - 1], 2) for name, q in shares.items()}


def overlapping(outages: Sequence[Outage]) -> int:
    """Outages that began during another one."""
    return sum(any(o.at <= one.at <= o.back_at for o in outages if o is not one) for one in outages)


def recovery(outages: Sequence[Outage], progress: Progress) -> dict:
    """Outages by kind: how many, and the times from their begin until work went on."""
    kinds = Counter(outage.kind for outage in outages)
    return {
        "kill_to_next_stored_result_s": quantiles([progress.next_result_s(outage) for outage in outages]),
        "kill_to_first_work_of_the_killed_s": {
            kind: quantiles([progress.work_s(outage) for outage in outages if outage.kind == kind]) for kind in kinds
        },
    }
