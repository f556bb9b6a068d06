"""Is the load client fast and exact enough? Against a real Triton whose model does no work: too heavy for the suite.

    python tests/integration/bench_harness.py [--repository DIR] --json docs/results/bench-harness.json

What the client could offer is one core's time over its processor time for a request of 8 MB and 300 responses. It is
held against what that server takes and, with --repository, against what the served reader takes of radiographs.
Timestamps are held against the server's own, on the same clock.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))

import scripted

from cxr_triton.cli import json_option, write_json
from cxr_triton.perf import load
from cxr_triton.perf.environment import environment
from cxr_triton.perf.summary import distribution, summarize
from cxr_triton.perf.workload import arrivals, load_workload
from cxr_triton.triton_repo.serve import Server

PORTS = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
SCRIPT = {"responses": 100, "first_ms": 100, "gap_ms": 10}


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
        "overhead": [],
        "timestamps": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        with Server(scripted.write_repository(Path(folder) / "repository"), **PORTS) as server:
            for concurrency in (1, 2, 4):
                measured = scripted.overhead(
                    server.grpc, image_bytes=8 << 20, responses=300, concurrency=concurrency, seconds=seconds
                )
                result["overhead"].append(measured)
            for streams in (1, 4, 16):
                requests = max(streams, int(streams * seconds / 1.1))  # a script takes 1.1 s
                errors = scripted.timestamp_errors_ms(server.grpc, SCRIPT, streams=streams, requests=requests)
                result["timestamps"].append({"streams": streams, **SCRIPT, "error_ms": distribution(errors)})
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
        offered = min(measured["client_could_offer_per_s"] for measured in result["overhead"])
        result["reader"] = {"workload": "radiograph", "readings_per_s": taken, "ratio": offered / taken}
    for measured in result["overhead"]:
        click.echo(
            f"{measured['concurrency']} at once: served {measured['served_per_s']:.1f}/s, client could offer "
            f"{measured['client_could_offer_per_s']:.1f}/s, {measured['ratio']:.1f} x"
        )
    for measured in result["timestamps"]:
        error = measured["error_ms"]
        click.echo(
            f"{measured['streams']} streams: timestamp p50 {error['p50']:.2f} ms, p99 {error['p99']:.2f} ms late"
        )
    click.echo(f"open loop: sent p99 {result['lateness_ms']['p99']:.2f} ms after it was due")
    if repository:
        reader = result["reader"]
        click.echo(f"served reader: {reader['readings_per_s']:.1f}/s, client could offer {reader['ratio']:.1f} x")
    write_json(result, json_path)


if __name__ == "__main__":
    main()
