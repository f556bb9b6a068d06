"""Is the load client fast and exact enough? Too heavy for the suite, which has small versions of it.

    python tests/integration/bench_harness.py [--repository DIR] --json docs/results/bench-harness.json

Requests of 8 MB with 300 responses: how many a second the client completes against a server that does next to nothing
(`instant_server.py`, in another process), beside how many a real Triton takes whose model does no work, turn by turn,
the best turn of either. Then what the client could offer Triton by its processor time on one core, and with
--repository what a served reader takes of radiographs. Timestamps are held against the server's own, on the same clock.
"""

from __future__ import annotations

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
from cxr_triton.perf import load
from cxr_triton.perf.environment import environment
from cxr_triton.perf.summary import distribution, summarize
from cxr_triton.perf.workload import arrivals, load_workload
from cxr_triton.triton_repo.serve import Server

PORTS = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
SCRIPT = {"responses": 100, "first_ms": 100, "gap_ms": 10}
SCRIPT_S = 1.1
HEAVY = {"image_bytes": 8 << 20, "responses": 300}
STREAMS = (1, 4, 8, 16)
ROUNDS = 4


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
    late = {"instant server": [], "instant server, from when it was due": [], "triton": []}
    server_late = []
    requests = max(streams, int(streams * seconds / ROUNDS / SCRIPT_S))
    with InstantServer(**SCRIPT) as instant:
        for _ in range(ROUNDS):
            ours = scripted.timestamps_ms(instant.url, SCRIPT, streams=streams, requests=requests)
            late["instant server"] += ours["late"]
            late["instant server, from when it was due"] += map(
                sum, zip(ours["late"], ours["server_late"], strict=True)
            )
            server_late += ours["server_late"]
            late["triton"] += scripted.timestamps_ms(triton, SCRIPT, streams=streams, requests=requests)["late"]
    return {
        "streams": streams,
        **SCRIPT,
        "error_ms": {name: distribution(errors) for name, errors in late.items()},
        "instant_server_late_ms": distribution(server_late),
    }


@click.command()
@click.option("--repository", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Of a served reader.")
@click.option("--seconds", default=20.0, show_default=True, help="Of each measurement.")
@json_option
def main(repository: Path | None, seconds: float, json_path: str | None):
    """Measure the load client."""
    result = {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", *sys.argv],
        "environment": environment(),
        "timestamps": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        with Server(scripted.write_repository(Path(folder) / "repository"), **PORTS) as server:
            result["overhead"] = overhead(server.grpc, seconds)
            for streams in STREAMS:
                result["timestamps"].append(timestamps(server.grpc, streams, seconds))
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
            click.echo(
                f"{measured['streams']} streams, {server}: p50 {error['p50']:.2f}, p99 {error['p99']:.2f} ms late"
            )
    click.echo(f"open loop: sent p99 {result['lateness_ms']['p99']:.2f} ms after it was due")
    if repository:
        reader = result["reader"]
        click.echo(f"served reader: {reader['readings_per_s']:.1f}/s, client {reader['ratio']:.1f} x")
    write_json(result, json_path)


if __name__ == "__main__":
    main()
