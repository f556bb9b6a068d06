"""The gateway beside Orthanc: `python -m cxr_triton.perf.gateway [REPOSITORY]`.

Both store the same files, sent by DCMTK's `storescu` over the same number of associations, in alternating rounds of one
run; each answers success only for what is on the disk (Orthanc with its default, `SyncStorageArea`). The floor under
both is what writing and syncing the files takes. With a model repository the way from C-STORE to the report back in a
PACS is measured too, less the reading itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np
import yaml

from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.errors import InvalidRequest, Unavailable

SCHEMA = 1
ROWS, COLUMNS = 2000, 1760
"""Of the files that are sent: 7 MB each, as a computed radiograph of the chest has."""
FIRST_SEED = 60_000


def write_files(folder: Path, count: int) -> int:
    """Radiographs of real size, each a study of its own; their bytes."""
    from cxr_triton.phantom import Phantom
    from cxr_triton.phantom_file import write_dicom

    folder.mkdir(parents=True)
    noise = np.random.default_rng(FIRST_SEED).integers(0, 4096, (ROWS, COLUMNS), np.uint16)
    radiograph = Phantom(noise, 12, None, {}, {})
    return sum((folder / f"{i:04d}.dcm").write_bytes(write_dicom(radiograph)) for i in range(count))


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(command: list, log: Path, ready) -> Iterator[subprocess.Popen]:
    """A program until the block ends."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        ends = time.monotonic() + 60
        while not ready():
            if process.poll() is not None or time.monotonic() > ends:
                said = log.read_text(errors="replace")[-500:]
                raise Unavailable(f"{Path(str(command[0])).name} did not start: {said}")
            time.sleep(0.05)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    """Whether an HTTP server of this machine gives a page."""
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 -- the scheme is ours
            return True
    except OSError:
        return False


@contextlib.contextmanager
def orthanc(folder: Path) -> Iterator[tuple[int, str]]:
    """A fresh Orthanc; its DICOM port and its REST root."""
    program = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")
    if program is None:
        raise InvalidRequest("no Orthanc here; install it with `make debian`")
    folder.mkdir(parents=True)
    port, http = free_port(), free_port()
    config = {
        "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "DicomAet": "ORTHANC",
        "DicomPort": port, "HttpPort": http, "AuthenticationEnabled": False, "RemoteAccessAllowed": False,
        "DicomAlwaysAllowStore": True,
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(config))
    root = f"http://127.0.0.1:{http}"
    with running([program, str(folder / "orthanc.json")], folder / "log", lambda: answers(f"{root}/system")):
        yield port, root


@contextlib.contextmanager
def gateway(folder: Path, destination_port: int, triton: str, quiet_s: float) -> Iterator[tuple[int, str]]:
    """A fresh gateway; its DICOM port and the URL of its queue."""
    folder.mkdir(parents=True)
    port, web = free_port(), free_port()
    config = {
        "storage": str(folder / "storage"),
        "dicom": {"port": port},
        "web": {"port": web},
        "group": {"quiet_s": quiet_s, "max_wait_s": quiet_s},
        "read": {"url": triton},
        "destinations": [{"name": "pacs", "aet": "ORTHANC", "host": "127.0.0.1", "port": destination_port}],
    }
    (folder / "gateway.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", "from cxr_triton.cli import main; main()", "gateway"]
    command += ["--config", str(folder / "gateway.yaml")]
    with running(command, folder / "log", lambda: answers(f"http://127.0.0.1:{web}/health/ready")):
        yield port, f"sqlite:///{folder}/storage/queue.sqlite"


def store(folder: Path, port: int, aet: str, associations: int) -> float:
    """Seconds until every file of a folder was answered with success."""
    program = shutil.which("storescu")
    if program is None:
        raise InvalidRequest("no storescu here; install it with `make debian`")
    files = sorted(map(str, folder.iterdir()))
    shares = [files[i::associations] for i in range(associations)]
    started = time.monotonic()
    with ThreadPoolExecutor(associations) as pool:
        commands = [[program, "-aec", aet, "127.0.0.1", str(port), *share] for share in shares]
        for done in pool.map(lambda c: subprocess.run(c, capture_output=True, text=True, check=False), commands):
            if done.returncode:
                raise Unavailable(f"storescu to {aet}: {done.stderr[-300:]}")
    return time.monotonic() - started


def write_and_sync(folder: Path, to: Path) -> float:
    """Seconds to write the files once more, each synced: what no store can be faster than."""
    contents = [path.read_bytes() for path in sorted(folder.iterdir())]
    to.mkdir()
    started = time.monotonic()
    for i, content in enumerate(contents):
        with open(to / str(i), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return time.monotonic() - started


def throughput(folder: Path, *, count: int, rounds: int, associations: int) -> dict:
    """Objects a second of the gateway and of Orthanc, in alternating rounds on fresh stores."""
    seconds: dict[str, list[float]] = {"gateway": [], "orthanc": [], "disk": []}
    for i in range(rounds):
        files = folder / f"files-{i}"
        total = write_files(files, count)
        for name in ("gateway", "orthanc")[:: 1 if i % 2 == 0 else -1]:
            place = folder / f"{name}-{i}"
            # No reader answers here: the objects wait in the queue, so storing is all that is measured.
            context = orthanc(place) if name == "orthanc" else gateway(place, 1, "127.0.0.1:1", 3600.0)
            aet = "ORTHANC" if name == "orthanc" else "CXR_GATEWAY"
            with context as (port, _):
                seconds[name].append(store(files, port, aet, associations))
            shutil.rmtree(place)
        seconds["disk"].append(write_and_sync(files, folder / "disk"))
        shutil.rmtree(folder / "disk")
        shutil.rmtree(files)
    per_s = {name: [round(count / s, 2) for s in values] for name, values in seconds.items()}
    ratios = [g / o for g, o in zip(per_s["gateway"], per_s["orthanc"], strict=True)]
    return {
        "objects": count,
        "bytes_each": total // count,
        "associations": associations,
        "objects_per_s": per_s,
        "median_objects_per_s": {name: statistics.median(values) for name, values in per_s.items()},
        "gateway_to_orthanc": {"rounds": [round(r, 3) for r in ratios], "median": round(statistics.median(ratios), 3)},
    }


def turnaround(folder: Path, repository: Path, *, count: int) -> dict:
    """Seconds from the success of a C-STORE to the last report in a PACS, with and without the reading.

    One study at a time.
    """
    from cxr_triton import phantom, phantom_file
    from cxr_triton.client.gateway.store import Store
    from cxr_triton.triton_repo.serve import Server

    files = folder / "phantoms"
    files.mkdir()
    for i in range(count):
        drawn = phantom.draw(np.random.default_rng(FIRST_SEED + i))
        (files / f"{i}.dcm").write_bytes(phantom_file.write_dicom(drawn))
    with (
        Server(repository, grpc_port=0, metrics_port=0) as server,
        orthanc(folder / "pacs") as (pacs, _),
        gateway(folder / "gateway", pacs, server.grpc, 0.0) as (port, url),
    ):
        queue = Store(url, "perf")
        for i, file in enumerate(sorted(files.iterdir())):
            store_one = ["storescu", "-aec", "CXR_GATEWAY", "127.0.0.1", str(port), str(file)]
            subprocess.run(store_one, check=True, capture_output=True)
            ends = time.monotonic() + 300
            while queue.counts()["jobs"]["done"] <= i:
                if time.monotonic() > ends:
                    raise Unavailable(f"study {i} did not come back within 300 s: {queue.status()}")
                time.sleep(0.05)
        rows = [queue.times(job) for job in range(1, count + 1)]
        queue.close()
    whole = [row["delivered_at"] - row["first_at"] for row in rows]
    reading = [row["reading_s"] for row in rows]
    rest = [a - b for a, b in zip(whole, reading, strict=True)]
    parts = {"store_to_report_s": whole, "reading_s": reading, "store_to_report_less_reading_s": rest}
    return {
        "studies": count,
        **{
            name: {f"p{p}": round(float(np.percentile(values, p, method="inverted_cdf")), 3) for p in (50, 99)}
            for name, values in parts.items()
        },
    }


@click.command(cls=Command, extra="gateway")
@click.argument("repository", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--objects", default=40, show_default=True, type=click.IntRange(1), help="Files of each round.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--associations", default=2, show_default=True, type=click.IntRange(1), help="That send at once.")
@click.option("--studies", default=100, show_default=True, type=click.IntRange(1), help="Sent one after the other.")
@json_option
def main(repository: Path | None, *, objects: int, rounds: int, associations: int, studies: int, json_path: str | None):
    """Objects a second, stored and durable, of the gateway and of Orthanc.

    With a model REPOSITORY also the time from C-STORE to report.
    """
    load = os.getloadavg()[0]
    result = {"schema": SCHEMA, "date": datetime.now(UTC).isoformat(timespec="seconds"), "load_average_before": load}
    with tempfile.TemporaryDirectory(prefix="cxr-gateway-perf-") as name:
        result["throughput"] = throughput(Path(name), count=objects, rounds=rounds, associations=associations)
        if repository:
            result["turnaround"] = turnaround(Path(name), repository, count=studies)
    from cxr_triton.perf.environment import environment

    result["environment"] = environment()
    measured = {key: result[key] for key in ("throughput", "turnaround") if key in result}
    click.echo(json.dumps(measured, indent=2), err=True)
    write_json(result, json_path)


if __name__ == "__main__":
    main()
