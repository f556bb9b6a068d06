"""Bytes that readings leave: `python tests/integration/kept.py BUNDLE --json docs/results/capacity-kept.json`.

Of a served demonstration model: the readings as JSON and as an archive's Parquet rows, what a gateway keeps of a study
beside its pictures, and the memory of an archive's driver for each image that it has a key of.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

from cxr_triton import phantom, phantom_file
from cxr_triton.archive.folder import opened
from cxr_triton.archive.item import Item
from cxr_triton.archive.rows import key_of, packed, read_row, unpacked
from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.client import Reader
from cxr_triton.client.gateway.store import Store
from cxr_triton.engines.serving import Settings
from cxr_triton.perf.environment import environment
from cxr_triton.perf.gateway import gateway, orthanc
from cxr_triton.perf.process import resident_bytes
from cxr_triton.triton_repo.package import write_repository
from cxr_triton.triton_repo.serve import Server

FIRST_SEED, UNIT, KEYS = 70_000, 100, 2_000_000


def written(folder: Path, count: int) -> list[Path]:
    """Phantoms as files, each a study of its own."""
    folder.mkdir()
    files = []
    for i in range(count):
        files.append(folder / f"{i:05d}.dcm")
        files[-1].write_bytes(phantom_file.write_dicom(phantom.draw(np.random.default_rng(FIRST_SEED + i))))
    return files


def rows(url: str, files: list[Path], out: Path) -> dict:
    """Bytes of a reading as JSON and of a row in gathered Parquet files."""
    header = {"source": "phantoms", "identifiers": "hashed", "request": {}}
    json_bytes = text_bytes = 0
    with Reader(url) as reader, opened(out, header) as folder:
        for at in range(0, len(files), UNIT):
            unit = []
            for file in files[at : at + UNIT]:
                data = file.read_bytes()
                reading = reader.read([data], identifiers="hashed").result()
                json_bytes += len(reading.to_json())
                text_bytes += len(reading.text.encode())
                item = Item(f"archive/{file.name}", str(file))
                facts = {"data": data, "identifiers": "hashed", "asked_ms": 80.0 + at, "server": "triton 2.51.0"}
                unit.append(read_row(item, reading, **facts))
            folder.add(unpacked(packed(unit)))
        folder.gather()
    parquet = sum(file.stat().st_size for file in out.rglob("*.parquet"))
    count = len(files)
    return {
        "readings": count,
        "text_bytes": text_bytes / count,
        "reading_bytes": json_bytes / count,
        "row_bytes": parquet / count,
    }


def studies(url: str, files: list[Path], folder: Path) -> dict:
    """Bytes of a study in a gateway's storage, by the folder or file that they lie in."""
    with orthanc(folder / "pacs") as (pacs, _), gateway(folder / "gateway", pacs, url, 0.0) as (port, database):
        queue = Store(database, "perf")
        for done, file in enumerate(files):
            command = ["storescu", "-aec", "CXR_GATEWAY", "127.0.0.1", str(port), str(file)]
            subprocess.run(command, check=True, capture_output=True)
            ends_s = time.monotonic() + 120
            while queue.counts()["jobs"]["done"] <= done:
                if time.monotonic() > ends_s:
                    raise SystemExit(f"study {done} did not come back: {queue.status()}")
                time.sleep(0.05)
        queue.close()
    storage = folder / "gateway" / "storage"
    sizes: dict[str, float] = {}
    for path in (path for path in storage.rglob("*") if path.is_file()):
        name = path.relative_to(storage).parts[0]
        sizes[name] = sizes.get(name, 0.0) + path.stat().st_size / len(files)
    return {"studies": len(files), "picture_bytes": sum(f.stat().st_size for f in files) / len(files), "each": sizes}


def driver_bytes() -> float:
    """Resident memory of an archive's driver for each image that it has seen."""
    before = resident_bytes("VmRSS")
    seen = {key_of(f"archive/folder/{i:09d}.dcm") for i in range(KEYS)}
    return (resident_bytes("VmRSS") - before) / len(seen)


@click.command(cls=Command, extra="test")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--readings", default=1000, show_default=True, type=click.IntRange(1))
@click.option("--studies", "of_gateway", default=100, show_default=True, type=click.IntRange(1))
@json_option
def main(bundle, readings, of_gateway, json_path):
    """What readings of BUNDLE, the demonstration model, leave."""
    result = {
        "schema": 1,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "driver_bytes_per_image": driver_bytes(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = written(folder / "files", readings)
        write_repository(bundle, folder / "repository", Settings(), unverified=True)
        with Server(folder / "repository", grpc_port=0, metrics_port=0) as server:
            result["archive"] = rows(server.grpc, files, folder / "rows")
            result["gateway"] = studies(server.grpc, files[:of_gateway], folder)
    for part in ("driver_bytes_per_image", "archive", "gateway"):
        click.echo(f"{part}: {result[part]}")
    write_json(result, json_path)


if __name__ == "__main__":
    main()
