"""What a number of studies a day, or an archive, takes: servers, cards, cores, network, storage, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cxr_triton.errors import InvalidRequest
from cxr_triton.perf.capacity.simulate import Outcome, simulate
from cxr_triton.perf.capacity.stages import Stages
from cxr_triton.perf.workload import arrivals

SCHEMA_VERSION = 1
DAY_S = 86_400.0
HOURS = (
    1.5,
    1.3,
    1.2,
    1.3,
    1.8,
    2.5,
    3.5,
    5.0,
    7.5,
    8.8,
    9.2,
    8.8,
    7.2,
    7.0,
    7.0,
    6.5,
    5.2,
    4.0,
    3.2,
    2.6,
    2.2,
    1.9,
    1.6,
    1.5,
)
"""Shares of a hospital's day, from midnight on: assumed, not measured."""
CELL = 16
"""Servers that are simulated together at most; more of them are groups, of which one is simulated with its share."""
WARM_UP = 0.2
MOST_SHARE = 0.9
"""Of what a server reads at most; over it a queue grows so slowly that minutes do not show it."""
MOST_REPLICAS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What is asked for.

    Attributes
    ----------
    studies_per_day : float
    pictures : int
        Of a study; they are one reading.
    target_p95_s : float
        From a study's arrival to its reading.
    hours : sequence of float
        Weight of each hour of the day.
    readings : int
        That are simulated for each number of servers.
    seed : int
    """

    studies_per_day: float
    pictures: int = 1
    target_p95_s: float = 60.0
    hours: Sequence[float] = HOURS
    readings: int = 20_000
    seed: int = 0

    def __post_init__(self):
        if not all(map(math.isfinite, (self.studies_per_day, self.target_p95_s, *self.hours))):
            raise InvalidRequest("studies_per_day, target_p95_s and hours have to be finite numbers")
        if len(self.hours) != 24 or min(self.hours) < 0 or not 0 < sum(self.hours) < math.inf:
            raise InvalidRequest(f"hours has {len(self.hours)} numbers; give 24 weights, none under 0, not all 0")

    @property
    def mean_per_s(self) -> float:
        """Over the day."""
        return self.studies_per_day / DAY_S

    @property
    def busiest_per_s(self) -> float:
        """In the busiest hour."""
        return self.mean_per_s * 24 * max(self.hours) / sum(self.hours)


def for_studies(stages: Stages, demand: Demand) -> dict:
    """The fewest servers that keep the target in the busiest hour, and what goes with them.

    The busiest hour is held for as long as the readings take, a fifth of them before anything counts.

    Raises
    ------
    InvalidRequest
        One reading alone takes longer than the target, or no number of servers under a million keeps it.
    """
    alone = simulate(stages, concurrency=1, readings=len(stages.readings), pictures=demand.pictures).summary()
    alone_s = alone["latency_ms"]["p95"] / 1e3
    if alone_s > demand.target_p95_s:
        raise InvalidRequest(
            f"one reading alone takes {alone_s:.3g} s, the target is {demand.target_p95_s:.3g} s; no number of servers "
            "makes that shorter: raise --target-p95-s"
        )
    most_per_s = saturated(stages, demand.pictures)["readings_per_s"]
    tried: dict[int, Outcome] = {}

    def keeps(replicas: int) -> bool:
        outcome = tried[replicas] = busiest_hour(stages, demand, replicas)
        done = [r.end_s - r.arrived_s for r in outcome.readings if not r.refused_by]
        return not outcome.refused and percentile_95(done) <= demand.target_p95_s

    replicas = fewest(keeps, math.ceil(demand.busiest_per_s / (MOST_SHARE * most_per_s)))
    summary = tried[replicas].summary()
    if replicas > 1 and replicas - 1 not in tried:
        keeps(replicas - 1)
    fewer = tried.get(replicas - 1)
    return {
        "schema_version": SCHEMA_VERSION,
        **described(stages),
        "asked": {
            "studies_per_day": demand.studies_per_day,
            "pictures_per_study": demand.pictures,
            "target_p95_s": demand.target_p95_s,
            "hours": list(demand.hours),
            "simulated_readings": demand.readings,
            "seed": demand.seed,
        },
        "busiest_hour_per_s": demand.busiest_per_s,
        "one_server_at_most_per_s": most_per_s,
        "alone_p95_s": alone_s,
        **hardware(stages, replicas),
        "busiest_hour": summary,
        "one_server_fewer": fewer and fewer.summary(),
        "mean_use": {name: use * demand.mean_per_s / demand.busiest_per_s for name, use in summary["use"].items()},
        "network": network(stages, demand.busiest_per_s, demand.pictures),
        "storage": storage(stages, demand.studies_per_day, demand.pictures),
    }


def for_archive(stages: Stages, pictures: float, days: float) -> dict:
    """The servers that read an archive's pictures within so many days, each kept busy.

    Raises
    ------
    InvalidRequest
        It would take a million servers or more.
    """
    if not (math.isfinite(pictures) and math.isfinite(days)):
        raise InvalidRequest("pictures and days have to be finite numbers")
    summary = saturated(stages, 1)
    each = summary["readings_per_s"]
    replicas = math.ceil(pictures / (days * DAY_S * each))
    if replicas >= MOST_REPLICAS:
        raise InvalidRequest(f"that takes {replicas:,} servers; give it more --days")
    return {
        "schema_version": SCHEMA_VERSION,
        **described(stages),
        "asked": {"archive_pictures": pictures, "days": days},
        "one_server_at_most_per_s": each,
        **hardware(stages, replicas),
        "days": pictures / (replicas * each * DAY_S),
        "each_server": summary,
        "network": network(stages, replicas * each, 1),
        "storage": {
            "pictures_bytes": pictures * mean_bytes(stages),
            "rows_bytes": pictures * stages.kept.row_bytes,
        },
    }


def saturated(stages: Stages, pictures: int) -> dict:
    """A server with as many readings under way as keep all of its stages busy; its queues take them all.

    Raises
    ------
    InvalidRequest
        A reading takes no time.
    """
    machine = stages.machine
    concurrency = 2 * machine.slots + machine.preprocess_instances + machine.vision_batch
    stages = replace(stages, machine=replace(machine, queue_size=max(machine.queue_size, concurrency)))
    readings = max(1000, 20 * concurrency)
    outcome = simulate(stages, concurrency=concurrency, readings=readings, warm_up=4 * concurrency, pictures=pictures)
    if not outcome.seconds:
        raise InvalidRequest("a reading takes no time by these stage times; give the ms of at least one stage")
    return outcome.summary() | {"concurrency": concurrency, "readings_per_s": readings / outcome.seconds}


def busiest_hour(stages: Stages, demand: Demand, replicas: int) -> Outcome:
    """So many servers at the rate of the busiest hour, or one group of them with its share of it."""
    group = replicas // math.ceil(replicas / CELL)
    due = arrivals("poisson", demand.busiest_per_s * group / replicas, [demand.seed])
    return simulate(
        stages,
        replicas=group,
        arrivals=due,
        readings=demand.readings,
        warm_up=round(WARM_UP * demand.readings),
        pictures=demand.pictures,
    )


def fewest(keeps: Callable[[int], bool], least: int) -> int:
    """The fewest servers, from `least` on, that keep what is asked, if more never do worse."""
    low, high, step = least - 1, least, 1
    while high < MOST_REPLICAS and not keeps(high):
        low, high, step = high, high + step, 2 * step
    if high >= MOST_REPLICAS:
        raise InvalidRequest(f"that takes {high:,} servers or more; ask for fewer studies, or raise --target-p95-s")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def percentile_95(seconds: Sequence[float]) -> float:
    """The 95th percentile; infinite of nothing."""
    import numpy as np

    return float(np.percentile(seconds, 95)) if len(seconds) else math.inf


def mean_bytes(stages: Stages) -> float:
    """Of a picture's file."""
    return sum(kind.bytes for kind in stages.readings) / len(stages.readings)


def described(stages: Stages) -> dict:
    """Which stage times it rests on, and what of them was not measured."""
    return {
        "stages": {name: getattr(stages, name) for name in ("title", "date", "command", "environment", "versions")}
        | {"sources": list(stages.sources)},
        "assumed": list(stages.assumed),
    }


def hardware(stages: Stages, replicas: int) -> dict:
    """Servers, and all that they have together."""
    machine, kept = stages.machine, stages.kept
    return {
        "servers": replicas,
        "cards": replicas * machine.cards,
        "cores": replicas * machine.cores,
        "memory_mib": None if kept.memory_mib is None else replicas * kept.memory_mib,
        "card_memory_mib": None if kept.card_memory_mib is None else replicas * kept.card_memory_mib,
    }


def network(stages: Stages, readings_per_s: float, pictures: int) -> dict:
    """Megabits per second into and out of the servers; a gateway before them takes in and gives out as much again."""
    into = readings_per_s * pictures * mean_bytes(stages)
    return {
        "in_bytes_per_reading": pictures * mean_bytes(stages),
        "in_mbit_per_s": 8e-6 * into,
        "out_mbit_per_s": 8e-6 * readings_per_s * stages.kept.answer_bytes,
    }


def storage(stages: Stages, studies_per_day: float, pictures: int) -> dict:
    """Bytes that a day leaves: pictures, while a gateway keeps them, and what stays."""
    return {
        "pictures_bytes_per_day": studies_per_day * pictures * mean_bytes(stages),
        "gateway_bytes_per_day": studies_per_day * stages.kept.gateway_bytes,
        "rows_bytes_per_day": studies_per_day * stages.kept.row_bytes,
    }
