"""Memory of the reading room over many readings, in sessions that come and go.

    python tests/integration/ui_memory.py build/demo/repository --json docs/results/ui.json

Each session sends a phantom of its own, has it read ten times and ends. Of `cxr-triton ui` and its decoding processes
the resident memory, threads and descriptors are told after each hundred readings.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import click
import numpy as np
import psutil

from cxr_triton import phantom
from cxr_triton.cli import json_option, write_json
from cxr_triton.perf.environment import environment
from cxr_triton.phantom_file import write_dicom
from cxr_triton.triton_repo.serve import Server

PER_SESSION = 10


@contextlib.contextmanager
def reading_room(url: str):
    """`cxr-triton ui` as a process, and its host and port."""
    command = [sys.executable, "-c", "from cxr_triton.cli import main; main()", "ui", "--url", url, "--port", "0"]
    command += ["--json", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            address = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")["address"]
            yield psutil.Process(process.pid), urlsplit(address).netloc
        finally:
            process.terminate()


def ask(door: str, path: str, body: bytes, kind: str = "application/json") -> bytes:
    connection = http.client.HTTPConnection(door, timeout=600)
    connection.request("POST", path, body, {"Content-Type": kind})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    if answer.status >= 300:
        raise click.ClickException(f"{path} answers {answer.status}: {data[:500]!r}")
    return data


def session(door: str, picture: bytes) -> None:
    """Open, read, end."""
    path = "/api/sessions/" + json.loads(ask(door, "/api/sessions", b"{}"))["session"]
    name = json.loads(ask(door, path + "/pictures", picture, "application/octet-stream"))["picture"]
    for _ in range(PER_SESSION):
        lines = ask(door, path + "/readings", json.dumps({"pictures": [name]}).encode()).splitlines()
        if json.loads(lines[-1])["type"] != "done":
            raise click.ClickException(f"a reading ended with {lines[-1][:500]!r}")
    ask(door, path + "/end", b"")


def held(process: psutil.Process) -> dict[str, float]:
    """By the process; by its decoders together."""
    return {
        "resident_mib": round(process.memory_info().rss / 2**20, 1),
        "decoders_mib": round(sum(child.memory_info().rss for child in process.children(recursive=True)) / 2**20, 1),
        "threads": process.num_threads(),
        "descriptors": process.num_fds(),
    }


@click.command(help=__doc__)
@click.argument("repository", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--readings", default=500, show_default=True)
@json_option
def main(repository, readings, json_path):
    rng, marks, began_s = np.random.default_rng(0), [], time.monotonic()
    with (
        Server(repository, grpc_port=0, metrics_port=0) as server,
        reading_room(server.grpc) as (process, door),
    ):
        for done in range(PER_SESSION, readings + 1, PER_SESSION):
            session(door, write_dicom(phantom.draw(rng)))
            if done % 100 == 0:
                marks.append({"readings": done, **held(process)})
                click.echo(json.dumps(marks[-1]), err=True)
    result = {
        "schema": 1,
        "command": ["python", *sys.argv],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "seconds": round(time.monotonic() - began_s, 1),
        "sessions": readings // PER_SESSION,
        "marks": marks,
    }
    write_json(result, json_path)


if __name__ == "__main__":
    main()
