"""What a record of a server under load says, and the simulation of the same loads beside it.

`python -m cxr_triton.perf.capacity.compare RECORD` simulates a record's loads again, from the stage times that each
round measured, and writes the record with what is simulated now.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click

from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.config import build
from cxr_triton.errors import InvalidRequest
from cxr_triton.perf.capacity.simulate import share_beside, simulate
from cxr_triton.perf.capacity.stages import Cost, Stages, load_stages
from cxr_triton.perf.environment import revision
from cxr_triton.perf.load import Load
from cxr_triton.perf.workload import arrivals

COMPARED = ("readings_per_s", "latency_ms.p50", "latency_ms.p95", "ttft_ms.p50")
QUIET = 0.05
"""Share of the cores' time that other programs may take for a comparison to count."""
DRAWS = 5
"""Chance has a part in what is simulated, so each load is simulated so often, and the median counts."""
_READINGS, _HALVINGS = 1500, 7
"""Of one stream that a crowd is simulated for, and of the range in which `scattered` is looked for."""


def figures(summary: Mapping) -> dict:
    """Of a summary, what is compared."""
    split = {name: name.partition(".") for name in COMPARED}
    values = {name: summary[metric][of] if of else summary[metric] for name, (metric, _, of) in split.items()}
    return {"requests": summary["requests"], **values}


def scattered(stages: Stages, wanted: float, got: float) -> float:
    """`Machine.scattered` with which a process beside one stream gets as much of the cores as was measured.

    Parameters
    ----------
    stages : Stages
    wanted, got : float
        Of all cores' time, what the process takes alone, and beside one stream of readings.
    """
    stages = replace(stages, machine=replace(stages.machine, scattered=0.0))  # which may hold an answer already
    reading_ms = simulate(stages, concurrency=1, readings=len(stages.readings)).summary()["latency_ms"]["mean"]
    piece = Cost(ms=reading_ms, cpu_ms=wanted * stages.machine.cores * reading_ms)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = replace(stages, machine=replace(stages.machine, scattered=middle))
        if share_beside(tried, piece, _READINGS * reading_ms / 1e3) > got / wanted:
            low = middle
        else:
            high = middle
    return round(low, 2)


def simulated(stages: Stages, load: Load, seconds: float, seed: int) -> dict:
    """Of a load as the server got it: `figures`, `processor_ms`, `stages_ms` and what was in use; medians."""
    told: dict = _medians([_drawn(stages, load, seconds, seed, chance) for chance in range(DRAWS)])
    return told


def _medians(values: Sequence):
    """Of each number in what has the same keys."""
    if isinstance(values[0], Mapping):
        return {key: _medians([each[key] for each in values]) for key in values[0]}
    return statistics.median(values)


def _drawn(stages: Stages, load: Load, seconds: float, seed: int, chance: int) -> dict:
    least: dict = {"readings": 4, "min_seconds": seconds, "chance": chance}
    if load.kind == "concurrency":
        outcome = simulate(stages, concurrency=int(load.value), **least)
    else:
        outcome = simulate(stages, arrivals=arrivals(load.arrival, load.value, [seed]), **least)
    took = {"processor_ms": 1e3 * outcome.core_s / len(outcome.readings), "stages_ms": outcome.stages_ms}
    return {**figures(outcome.summary()), **took, "refused": sum(outcome.refused.values()), "use": outcome.use}


def compared(stages: Stages, load: Load, measured: Mapping, seconds: float, seed: int) -> dict:
    """A point of a record: the load, what was measured and what is simulated, and the one over the other."""
    told = simulated(stages, load, seconds, seed)
    whole = not measured["refused"]  # what a full queue ended is of another length
    ratio = {name: told[name] / measured[name] for name in (*COMPARED, "processor_ms") if whole}
    return {"load": load.as_json(), "measured": measured, "simulated": told, "ratio": ratio}


def ratios(rounds: Sequence[Mapping]) -> list[dict]:
    """Simulated over measured of each load: median, least and most of the rounds in which nothing else ran.

    A load that a full queue ended is none of them; ``refused`` says how many rounds it ended.
    """
    loads: dict[str, list[dict]] = {}
    for each in rounds:
        stages_disturbed = max(each["one_stream"]["others_share"], each["alone_others_share"])
        for point in each["points"]:
            disturbed = max(stages_disturbed, point["measured"]["others_share"])
            quiet = loads.setdefault(json.dumps(point["load"]), [])
            quiet += [point] if disturbed <= QUIET else []
    return [{"load": json.loads(load), **_told(points)} for load, points in loads.items()]


def _told(points: Sequence[Mapping]) -> dict:
    whole = [point for point in points if point["ratio"]]
    return {"rounds": len(whole), "refused": len(points) - len(whole), **_spread(whole)}


def _spread(points: Sequence[Mapping]) -> dict:
    return {
        name: {
            "median": statistics.median(point["ratio"][name] for point in points),
            "range": [bound(point["ratio"][name] for point in points) for bound in (min, max)],
        }
        for name in (points[0]["ratio"] if points else ())
    }


def listed(ratio: Mapping[str, float]) -> str:
    """A line of ratios."""
    return "simulated / measured " + ", ".join(f"{name} {value:.3f}" for name, value in ratio.items())


def show(record: Mapping) -> None:
    """Print the medians of a record."""
    for point in record["ratio"]:
        medians = {name: value["median"] for name, value in point.items() if isinstance(value, dict) and name != "load"}
        told = listed(medians) if medians else f"refused, or other programs took over {QUIET:.0%} each time"
        click.echo(f"{Load(**point['load'])}, {point['rounds']} rounds: {told}")


def again(record: Mapping, stages: Stages | None = None) -> dict:
    """A record with its loads simulated anew, from stage times of each of its rounds, or from these.

    What a crowd is like comes from each round's own stream beside a process.

    Raises
    ------
    InvalidRequest
        It is no such record, or a round has no stage times and none are given.
    """
    rounds = []
    if not isinstance(record, Mapping) or not {"rounds", "seconds_each"} <= record.keys():
        raise InvalidRequest(
            "this is no record of `python -m cxr_triton.perf.capacity.served`; give the file of its --json"
        )
    for number, each in enumerate(record["rounds"], 1):
        if stages is None and "stages" not in each:
            raise InvalidRequest(f"round {number} of the record has no stage times; give its file of them by --stages")
        beside = each["one_stream_beside"]
        times = stages or build(Stages, each["stages"], f"round {number}")
        value = scattered(times, beside["wanted_share"], beside["others_share"])
        times = replace(times, machine=replace(times.machine, scattered=value))
        points = [
            compared(times, Load(**point["load"]), point["measured"], record["seconds_each"], number)
            for point in each["points"]
        ]
        rounds.append({**each, "scattered": value, "points": points})
    return {**record, "ratio": ratios(rounds), "rounds": rounds}


@click.command(cls=Command, extra="perf")
@click.argument("record", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--stages",
    "stages_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Stage times of all rounds, for a RECORD that has none.",
)
@json_option
def main(*, record, stages_path, json_path):
    """Simulate the loads of RECORD again, which `perf.capacity.served` wrote, and set them beside what it measured."""
    try:
        read = json.loads(record.read_text("utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{record.name} is not readable as JSON: {error}") from None
    told = again(read, load_stages(stages_path) if stages_path else None)
    now = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "revision": revision()}
    told["simulated_again"] = {
        "command": [sys.executable.rpartition("/")[2], "-m", __spec__.name, *sys.argv[1:]],
        **now,
    }
    click.echo(f"scattered: {', '.join(str(each['scattered']) for each in told['rounds'])}", err=json_path == "-")
    show(told)
    write_json(told, json_path)


if __name__ == "__main__":
    main()
