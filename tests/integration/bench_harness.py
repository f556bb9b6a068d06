"""Is the load client fast and exact enough? Too heavy for the suite, which has small versions of it.

    python tests/integration/bench_harness.py [--repository DIR] --json docs/results/bench-harness.json

Requests of 8 MB with 300 responses: how many a second the client completes against a server that does next to nothing
(`instant_server.py`, in another process), beside how many a real Triton takes whose model does no work, turn by turn,
the best turn of either. Then what the client could offer Triton by its processor time on one core, and with
--repository what a served reader takes of radiographs. Timestamps are held against the server's own, on the same clock.
Our driver and perf_analyzer ask, turn by turn, a Triton whose answers take a fixed time. The client and the instant
server have real-time priority where the system allows it. The record says whether they had, and how much of each turn
the hypervisor gave to others, which shows as errors too.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))

import scripted
from instant_server import InstantServer

from cxr_triton.cli import json_option, write_json
from cxr_triton.perf import load, perf_analyzer
from cxr_triton.perf.environment import Stolen, environment
from cxr_triton.perf.summary import distribution, summarize
from cxr_triton.perf.workload import arrivals, load_workload
from cxr_triton.triton_repo.serve import Server

PORTS = {"grpc_port": 0, "metrics_port": 0}
SCRIPT = {"responses": 100, "first_ms": 100, "gap_ms": 10}
SCRIPT_S = 1.1
HEAVY = {"image_bytes": 8 << 20, "responses": 300}
STREAMS = (1, 4, 8, 16)
PACED = {"responses": 20, "first_ms": 40, "gap_ms": 20}
PACED_S = 0.42
ROUNDS = 4
LEFT_ALONE = 0.005
"""Most of the cores' time that the hypervisor may have given to others in a turn; then there are more turns."""


def overhead(triton: str, seconds: float) -> dict:
    """The client against both servers, turn by turn."""
    turns = {"client": [], "triton": []}
    with InstantServer(responses=HEAVY["responses"]) as instant:
        for _ in range(ROUNDS):
            for concurrency in (1, 2, 4):
                for name, url in (("client", instant.url), ("triton", triton)):
                    turn = scripted.overhead(url, **HEAVY, concurrency=concurrency, seconds=seconds / ROUNDS)
                    turns[name].append(turn)
    best = {name: max(measured, key=lambda turn: turn["per_s"]) for name, measured in turns.items()}
    cpu_s = statistics.median(turn["client_cpu_s_per_request"] for turn in turns["triton"])
    return {
        **HEAVY,
        "client": best["client"],
        "triton": best["triton"],
        "ratio": best["client"]["per_s"] / best["triton"]["per_s"],
        "client_cpu_s_per_triton_request": cpu_s,
        "ratio_by_cpu": 1 / cpu_s / best["triton"]["per_s"],
        "turns": turns,
    }


def timestamps(triton: str, streams: int, seconds: float) -> dict:
    """Errors of the client's timestamps, turn by turn against both servers."""
    requests = max(streams, int(streams * seconds / ROUNDS / SCRIPT_S))
    turns = []
    with InstantServer(**SCRIPT) as instant:
        while len(turns) < 2 * ROUNDS or (len(turns) < 8 * ROUNDS and len(left_alone(turns)) < 2 * ROUNDS):
            stolen = Stolen()
            ours = scripted.timestamps_ms(instant.url, SCRIPT, streams=streams, requests=requests)
            late = {
                "instant server": ours["late"],
                "instant server, from when it was due": list(map(sum, zip(*ours.values(), strict=True))),
            }
            turns.append((stolen.share(), late))
            stolen = Stolen()
            ours = scripted.timestamps_ms(triton, SCRIPT, streams=streams, requests=requests)
            turns.append((stolen.share(), {"triton": ours["late"]}))
    return {
        "streams": streams,
        **SCRIPT,
        "error_ms": errors(turns),
        "error_ms_left_alone": errors(left_alone(turns)),
        "turns": [
            {"server": name, "stolen_share": share, "p99_ms": distribution(late)["p99"]}
            for share, each in turns
            for name, late in each.items()
        ],
    }


def left_alone(turns: list[tuple[float, dict]]) -> list[tuple[float, dict]]:
    return [turn for turn in turns if turn[0] <= LEFT_ALONE]


def errors(turns: list[tuple[float, dict[str, list[float]]]]) -> dict:
    """Of all turns together, for each server."""
    late = {}
    for _, each in turns:
        for name, values in each.items():
            late[name] = late.get(name, []) + values
    return {name: distribution(values) for name, values in late.items()}


def drivers(triton: str, concurrency: int, seconds: float) -> dict:
    """Our driver and perf_analyzer on the same load, with answers that take a fixed time."""
    tool, asked = perf_analyzer.find(), scripted.workload(1 << 20, **PACED)
    messages = [item.message("cxr_reader") for item in asked.items]
    requests = max(concurrency, int(concurrency * seconds / ROUNDS / PACED_S))
    turns = {"ours": [], "perf_analyzer": []}
    for turn in range(ROUNDS):
        for name in list(turns)[:: 1 if turn % 2 else -1]:
            before = cpu_s()
            if name == "ours":
                records = [
                    load.record(exchange)
                    for exchange in scripted.offered(triton, messages, concurrency, requests=requests).exchanges
                ]
            else:
                timeout_s = 60 + 10 * seconds
                records, _ = perf_analyzer.run(
                    tool, triton, asked.items, concurrency=concurrency, requests=requests, timeout_s=timeout_s
                )
            summary = summarize(records, {})
            turns[name].append(
                {
                    "requests": len(records),
                    "readings_per_s": summary["readings_per_s"],
                    "latency_p50_ms": summary["latency_ms"]["p50"],
                    "ttft_p50_ms": summary["ttft_ms"]["p50"],
                    "itl_p50_ms": summary["itl_ms"]["p50"],
                    "cpu_s_per_request": (cpu_s() - before) / len(records),
                }
            )
    medians = {
        name: {key: statistics.median(turn[key] for turn in measured) for key in measured[0]}
        for name, measured in turns.items()
    }
    ours, theirs = medians.values()
    return {
        "concurrency": concurrency,
        **PACED,
        **medians,
        "relative_difference": {key: ours[key] / theirs[key] - 1 for key in ours if key != "requests"},
    }


def cpu_s() -> float:
    """Processor time of this process and of the children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@click.command()
@click.option("--repository", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Of a served reader.")
@click.option("--seconds", default=20.0, show_default=True, help="Of each measurement.")
@json_option
def main(repository: Path | None, seconds: float, json_path: str | None):
    """Measure the load client."""
    environment_ = environment()
    with load.prompt_threads() as environment_["client_priority"]:
        pass  # asked only: each load has it for itself
    result = {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", *sys.argv],
        "environment": environment_,
        "timestamps": [],
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(scripted.write_repository(Path(folder) / "repository"), **PORTS) as server,
    ):
        result["overhead"] = overhead(server.grpc, seconds)
        for streams in STREAMS:
            result["timestamps"].append(timestamps(server.grpc, streams, seconds))
        result["drivers"] = [drivers(server.grpc, concurrency, seconds) for concurrency in (1, 4, 8)]
        messages = [item.message("cxr_reader") for item in scripted.workload(1 << 10, **SCRIPT).items]
        open_loop = load.Load("rate_per_s", 5.0, "poisson")
        records, _ = load.offer(server.grpc, messages, open_loop, min_seconds=seconds, min_requests=5)
        due = list(islice(arrivals("poisson", 5.0, [0]), len(records)))
        assert [record.scheduled_s for record in records] == due
        result["lateness_ms"] = summarize(records, {})["lateness_ms"]
    if repository:
        with Server(repository, **PORTS) as server:
            messages = [item.message("cxr_reader") for item in load_workload("radiograph").items]
            crowd = load.Load("concurrency", 8)
            load.offer(server.grpc, messages, crowd, min_seconds=0, min_requests=8)
            records, failure = load.offer(server.grpc, messages, crowd, min_seconds=seconds, min_requests=16)
            if failure:
                raise failure
            taken = summarize(records, {})["readings_per_s"]
        offered = result["overhead"]["client"]["per_s"]
        result["reader"] = {"workload": "radiograph", "readings_per_s": taken, "ratio": offered / taken}
    cost = result["overhead"]
    click.echo(
        f"8 MB and 300 responses: the client completed {cost['client']['per_s']:.1f}/s, Triton "
        f"{cost['triton']['per_s']:.1f}/s, {cost['ratio']:.1f} x; by the client's processor time "
        f"{cost['ratio_by_cpu']:.1f} x"
    )
    for measured in result["timestamps"]:
        for server, error in measured["error_ms"].items():
            alone = measured["error_ms_left_alone"].get(server)
            click.echo(
                f"{measured['streams']} streams, {server}: p50 {error['p50']:.2f}, p99 {error['p99']:.2f} ms late"
                + (f"; left alone {alone['p50']:.2f}, {alone['p99']:.2f} ms ({alone['n']} texts)" if alone else "")
            )
    for compared in result["drivers"]:
        by = compared["relative_difference"]
        click.echo(
            f"{compared['concurrency']} at once, ours over perf_analyzer: readings/s {by['readings_per_s']:+.2%}, "
            f"latency {by['latency_p50_ms']:+.2%}, first text {by['ttft_p50_ms']:+.2%}, "
            f"processor time {by['cpu_s_per_request']:+.0%}"
        )
    click.echo(f"open loop: sent p99 {result['lateness_ms']['p99']:.2f} ms after it was due")
    if repository:
        reader = result["reader"]
        click.echo(f"served reader: {reader['readings_per_s']:.1f}/s, client {reader['ratio']:.1f} x")
    write_json(result, json_path)


if __name__ == "__main__":
    main()
