"""What `cxr-triton evaluate` is worth, on phantoms: ``python tests/integration/evaluation.py --json RESULT``.

Three parts against one served demonstration model. `tables`: the same phantoms in three layouts and two kinds of file,
and in transformers. `kills`: a run that is killed at random and goes on. `cost`: wall time, processor time and memory
beside a plain client with the same number of readings under way.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click
import yaml

ROOT = Path(__file__).resolve().parents[2]
PHANTOM = ROOT / "tests" / "phantom"
sys.path[:0] = [str(PHANTOM)]

import evaluate  # noqa: E402
import layouts  # noqa: E402

from cxr_triton.cli import json_option, write_json  # noqa: E402
from cxr_triton.client import Reader  # noqa: E402
from cxr_triton.evaluate import rows  # noqa: E402
from cxr_triton.evaluate.config import Data  # noqa: E402
from cxr_triton.evaluate.journal import JOURNAL, work_folder  # noqa: E402
from cxr_triton.evaluate.run import Server as Asked  # noqa: E402
from cxr_triton.evaluate.run import opened  # noqa: E402
from cxr_triton.perf.environment import Stolen, environment  # noqa: E402
from cxr_triton.profile import load_profile  # noqa: E402
from cxr_triton.triton_repo.serve import Server  # noqa: E402

PROGRAM = [sys.executable, "-c", "from cxr_triton.cli import main; main(prog_name='cxr-triton')"]


def repository(folder: Path) -> Path:
    """The demonstration model in fp32."""
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.triton_repo.package import Settings, write_repository

    profile = load_profile(PHANTOM / "profile.yaml")
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", profile, precision="fp32", progress=False)
    bundle = build_bundle(folder / "export", folder / "bundle")
    write_repository(bundle.path, folder / "repository", Settings(threads=1, batch_invariant=True), unverified=True)
    return folder / "repository"


def write_data(folder: Path, layout: str, kind: str, phantoms) -> Path:
    """The path of its DATA.yaml."""
    place = folder / f"{layout}-{kind}"
    keys = layouts.write(place, layout, kind, phantoms)
    path = folder / f"{place.name}.yaml"
    path.write_text(yaml.safe_dump({"path": place.name, **keys}))
    return path


def command(data: Path, out: Path, url: str, concurrency: int) -> list[str]:
    return [*PROGRAM, "evaluate", str(data), "--url", url, "-o", str(out), "--concurrency", str(concurrency)]


def tables(folder: Path, url: str, count: int, concurrency: int) -> dict:
    """Scores by layout and kind, and whether all of them are the same table."""
    from cxr_triton.pixels import image

    phantoms = evaluate.held_out(count)
    drawn = [frozenset(each.labels) for each in phantoms]
    found, seen = {}, set()
    for layout in ("nih", "chexpert", "vindr-cxr"):
        for kind in layouts.SUFFIXES:
            out = folder / f"{layout}-{kind}.jsonl"
            subprocess.run(command(write_data(folder, layout, kind, phantoms), out, url, concurrency), check=True)
            table = [(row.truth.labels, row.answer.labels, row.answer.whole) for row in rows.read(out)]
            said = [frozenset(k for k, v in labels.items() if v) for _, labels, _ in table]
            assert [frozenset(k for k, v in labels.items() if v) for labels, _, _ in table] == drawn
            found[f"{layout}, {kind}"] = evaluate.score(said, drawn)
            seen.add(json.dumps(table, sort_keys=True))
    profile = load_profile(PHANTOM / "profile.yaml")
    budget = {"min_pixels": profile.min_pixels, "max_pixels": profile.max_pixels}
    pictures = [each.picture("mimic_jpg", evaluate.variant(i)[1]) for i, each in enumerate(phantoms)]
    answers = evaluate.Reference().read([image.resize(p, image.target_size(*p.shape, **budget)) for p in pictures])
    expected = [evaluate.labels_of(answer, profile) for answer in answers]
    return {
        "phantoms": count,
        "different_tables": len(seen),
        "served": found,
        "transformers": evaluate.score(expected, drawn),
        "same_label_sets_as_transformers": sum(a == b for a, b in zip(said, expected, strict=True)),
    }


def kills(folder: Path, url: str, concurrency: int, times: int, seed: int) -> dict:
    """A run over what `tables` read, killed once it has so many rows; whether its result is that of the run at once."""
    out, once, count = folder / "killed.jsonl", folder / "nih-dicom.jsonl", len(rows.read(folder / "nih-dicom.jsonl"))
    journal, killed = work_folder(out) / JOURNAL, []
    for number in sorted(random.Random(seed).sample(range(1, count), times)):
        process = subprocess.Popen(command(folder / "nih-dicom.yaml", out, url, concurrency), stderr=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b'{"row"') < number):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        killed.append(journal.read_bytes().count(b'{"row"'))
    subprocess.run(command(folder / "nih-dicom.yaml", out, url, concurrency), check=True, stderr=subprocess.DEVNULL)
    return {
        "killed_with_rows": killed,
        "runs": rows.read(out).header.times["runs"],
        "rows": len(rows.read(out)),
        "same_but_for_times": rows.timeless_digest(out) == rows.timeless_digest(once),
    }


@contextmanager
def memory(pid: int, period_s: float = 0.5) -> Iterator[list[tuple[float, float]]]:
    """Resident memory of a process in MiB over time, while the block lasts."""
    samples: list[tuple[float, float]] = []
    ended, began = threading.Event(), time.monotonic()

    def sample() -> None:
        while not ended.wait(period_s):
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                return
            samples.append((time.monotonic() - began, pages * os.sysconf("SC_PAGE_SIZE") / 2**20))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield samples
    ended.set()
    thread.join()


def plainly(url: str, paths: list[Path], concurrency: int) -> tuple[float, float]:
    """Wall and processor seconds of a plain client."""
    began, before = time.monotonic(), time.process_time()
    with Reader(url) as reader, ThreadPoolExecutor(concurrency) as pool:
        for reading in pool.map(lambda path: reader.read(path, identifiers="hashed").result(), paths):
            assert reading.findings
    return time.monotonic() - began, time.process_time() - before


def evaluated(url: str, table: Path, out: Path, concurrency: int) -> tuple[float, float]:
    """Wall and processor seconds of an evaluation from its table to its result."""
    began, before = time.monotonic(), time.process_time()
    data = Data(path=str(table), format="table", labels=layouts.LABELS)
    with opened(data, out) as evaluation:
        evaluation.run(Asked(url=url, concurrency=concurrency))
    return time.monotonic() - began, time.process_time() - before


def cost(folder: Path, url: str, count: int, concurrency: int, blocks: int = 8) -> dict:
    """The same pictures by a plain client and by an evaluation, block by block in turn; then memory of a whole run."""
    phantoms = evaluate.held_out(count)
    data = write_data(folder, "chexpert", "dicom", phantoms)
    root = folder / "chexpert-dicom"
    paths = sorted(root.rglob("*.dcm"))[:count]
    turns: list[dict[str, tuple[float, float]]] = []
    for block, first in enumerate(range(0, count, count // blocks)):
        chosen = range(first, min(first + count // blocks, count))
        table = root / f"block-{block}.csv"
        lines = [f"{i},{paths[i].relative_to(root)},{';'.join(phantoms[i].labels)}" for i in chosen]
        table.write_text("\n".join(["study,image,labels", *lines]))
        ways = {
            "plain": lambda chosen=chosen: plainly(url, [paths[i] for i in chosen], concurrency),
            "evaluate": lambda table=table: evaluated(url, table, table.with_suffix(".jsonl"), concurrency),
        }
        turns.append({name: ways[name]() for name in (sorted(ways) if block % 2 else sorted(ways, reverse=True))})
    walls = {name: [turn[name][0] for turn in turns] for name in ("plain", "evaluate")}
    process = subprocess.Popen(command(data, folder / "cost.jsonl", url, concurrency), stderr=subprocess.DEVNULL)
    with memory(process.pid) as samples:
        assert process.wait() == 0
    reading = samples[len(samples) // 5 :]  # imports are over
    half = len(reading) // 2
    return {
        "readings_each": count,
        "concurrency": concurrency,
        "blocks": len(turns),
        "wall_s": {name: round(sum(each), 2) for name, each in walls.items()},
        "cpu_s": {name: round(sum(turn[name][1] for turn in turns), 2) for name in walls},
        "ratio_of_wall_time": round(sum(walls["evaluate"]) / sum(walls["plain"]), 4),
        "ratio_of_wall_time_median_block": round(
            statistics.median(e / p for e, p in zip(walls["evaluate"], walls["plain"], strict=True)), 4
        ),
        "ratio_of_wall_time_blocks": [round(e / p, 3) for e, p in zip(walls["evaluate"], walls["plain"], strict=True)],
        "mib_max_of_first_half": round(max(mib for _, mib in reading[:half]), 1),
        "mib_max_of_second_half": round(max(mib for _, mib in reading[half:]), 1),
        "mib": [round(mib, 1) for _, mib in samples[:: max(1, len(samples) // 20)]],
    }


PARTS = ("tables", "kills", "cost")


@click.command()
@click.option("--count", default=300, show_default=True, help="Phantoms of `tables` and `kills`.")
@click.option("--cost-count", default=2000, show_default=True)
@click.option("--concurrency", default=8, show_default=True)
@click.option("--times", default=10, show_default=True, help="Kills.")
@click.option("--seed", default=0, show_default=True, help="Of the kills.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only this, beside what --json has.")
@json_option
def main(
    count: int, cost_count: int, concurrency: int, times: int, seed: int, parts: tuple[str, ...], json_path: str | None
):
    """Measure `cxr-triton evaluate`."""
    before = json.loads(Path(json_path).read_bytes()) if parts and json_path and Path(json_path).exists() else {}
    result: dict = {"schema": 1, **{part: before[part] for part in PARTS if part in before}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = {
            "tables": lambda url: tables(folder, url, count, concurrency),
            "kills": lambda url: kills(folder, url, concurrency, times, seed),
            "cost": lambda url: cost(folder, url, cost_count, concurrency),
        }
        with Server(repository(folder), grpc_port=0, metrics_port=0, ready_timeout_s=300) as server:
            for part in parts or PARTS:
                stolen, facts = Stolen(), environment()
                created = datetime.now(UTC).isoformat(timespec="seconds")
                measured = ways[part](server.grpc)
                facts["stolen_share"] = stolen.share()
                result[part] = {"created": created, "command": ["python", *sys.argv], "environment": facts, **measured}
                click.echo(json.dumps({part: measured}), err=True)
    write_json(result, json_path)


if __name__ == "__main__":
    main()
