"""An archive under faults: driver and actors are killed at random, two Ray nodes share the work, and how fast it is.

    python tests/integration/archive_kills.py --json docs/results/archive.json
    python tests/integration/archive_kills.py --parts beside_bench --repository build/demo/repository

The last holds it against `bench` on a machine that does nothing else. The others ask a double that takes its time for a
reading and remembers which files it was sent.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import click
import psutil
import pydicom
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "phantom"))

import evaluate
from cores import apart, cores_options
from fake_server import FakeServer, failure, response

from cxr_triton import phantom_file
from cxr_triton.engines.secret import SECRET
from cxr_triton.identity import sha256
from cxr_triton.perf.environment import cpu_name
from cxr_triton.reading import Reading, parse

PROGRAM = [sys.executable, "-c", "from cxr_triton.cli import main; main()"]
ACTOR = "MapWorker(MapBatches(Worker))"
SYNTAXES = ("jpeg_ls", "jpeg_2000", "rle", "jpeg_lossless")
BASES = 40
LABELS = ("Pleural Effusion", "No Finding")


def write_files(folder: Path, count: int) -> None:
    """DICOM phantoms, each with UIDs of its own; every fiftieth is cut off, every hundredth is no image."""
    folder.mkdir()
    bases = [
        phantom_file.write_dicom(phantom, syntax=SYNTAXES[i % len(SYNTAXES)], seed=f"base {i}")
        for i, phantom in enumerate(evaluate.held_out(BASES))
    ]
    uids = [pydicom.dcmread(io.BytesIO(base), stop_before_pixels=True).SOPInstanceUID.encode() for base in bases]
    for n in range(count):
        uid = uids[n % BASES]
        data = bases[n % BASES].replace(uid, uid[:-14] + f"{n:014}".encode())
        if n % 100 == 99:
            data = f"note {n}".encode()
        elif n % 50 == 49:
            data = data[: len(data) // 2]
        place = folder / f"{n // 500:02}"
        place.mkdir(exist_ok=True)
        (place / f"{n:05}.dcm").write_bytes(data)


class Double(FakeServer):
    """Answers after a while; refuses what is cut off, as its size tells; counts each file's requests."""

    def __init__(self, reading_s: float, cut: set[str]):
        self.reading_s, self.cut, self.seen = reading_s, cut, Counter()
        super().__init__(self.respond)

    def respond(self, request, context):
        tensors = dict(zip([tensor.name for tensor in request.inputs], request.raw_input_contents, strict=True))
        digest = sha256(tensors["IMAGES"][4:])
        self.seen[digest] += 1
        time.sleep(self.reading_s)
        if digest in self.cut:
            yield failure("[INVALID_IMAGE] the file ends early; send the complete original file")
            return
        reading = Reading.of(
            parse("Pleural Effusion", grammar="plain", answer="labels", labels=LABELS),
            task=None,
            prompt="Find.",
            model={"profile": "double", "bundle": "0" * 64},
            images=({"rows": 1, "columns": 1, "flags": [], "identity": {"file_sha256": digest}},),
            usage={"prompt_tokens": 100, "completion_tokens": 500},
            timings_ms={"total": 1e3 * self.reading_s},
            notice="A test double answered; never for diagnosis.",
        )
        yield response("", reading.to_json(), final=True)


def archive(source: Path, out: Path, *options: object, **environment: str) -> subprocess.Popen:
    command = [*PROGRAM, "archive", str(source), "-o", str(out), "--identifiers", "plain", *map(str, options)]
    return subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, **environment}
    )


def actors_of(driver: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if ACTOR in " ".join(process.cmdline()):
                found.append(process)
    return found


class Memory:
    """Resident memory of driver and actors, four times a second, beside the number of readings."""

    def __init__(self, server: FakeServer):
        self.server, self.samples, self.driver = server, [], None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(0.25)
            with contextlib.suppress(psutil.Error, TypeError, ValueError):  # not begun, or gone
                driver = psutil.Process(self.driver)
                rss = [driver.memory_info().rss, max(p.memory_info().rss for p in actors_of(driver))]
                self.samples.append((sum(self.server.seen.values()), *(each >> 20 for each in rss)))

    def at(self, shares: tuple[float, ...]) -> list[dict]:
        last = self.samples[-1][0]
        near = [min(self.samples, key=lambda s, share=share: abs(s[0] - share * last)) for share in shares]
        return [dict(zip(("readings", "driver_mib", "actor_mib"), sample, strict=True)) for sample in near]


def with_kills(source: Path, out: Path, server: Double, kills: int, options: list, seed: int) -> dict:
    """Run until it is through, and kill driver or an actor whenever so many readings were asked for."""
    draw = random.Random(seed)
    total = sum(1 for path in source.rglob("*.dcm"))
    due = sorted(draw.sample(range(total // 50, total - total // 50), kills))
    killed, began_s, drivers, memory = Counter(), time.monotonic(), 1, Memory(server)
    driver = archive(source, out, *options)
    while driver.poll() is None or driver.returncode < 0:
        memory.driver = driver.pid
        if driver.poll() is not None:
            driver, drivers = archive(source, out, *options), drivers + 1
            continue
        if due and sum(server.seen.values()) >= due[0]:
            whom, found = draw.choice(("driver", "actor", "actor")), actors_of(psutil.Process(driver.pid))
            if found:
                due.pop(0)
                os.kill(driver.pid if whom == "driver" else draw.choice(found).pid, signal.SIGKILL)
                killed[whom] += 1
                driver.wait() if whom == "driver" else time.sleep(0.5)
        time.sleep(0.05)
    most = {name: max(sample[i] for sample in memory.samples) for i, name in ((1, "driver"), (2, "actor"))}
    seconds = round(time.monotonic() - began_s, 1)
    return {
        "killed": dict(killed), "drivers": drivers, "status": driver.returncode, "seconds": seconds, "most_mib": most,
    }  # fmt: skip


def faults(source: Path, work: Path, args) -> dict:
    cut, there = expected(source)
    with Double(args.reading_ms / 1e3, cut) as server:
        options = ["--url", server.url, "--actors", 2, "--concurrency", args.concurrency]
        told = with_kills(source, work / "kills", server, args.kills, options, args.seed)
        asked = sum(server.seen.values())
    rows = parquet.read_table(work / "kills").to_pylist()
    names = Counter(row["image"] for row in rows)
    found = {row["image"]: row["error_code"] for row in rows}
    images = sum(code != "NO_IMAGE" for code in there.values())
    told |= {
        "files": len(there), "rows": len(rows), "files_without_a_row": len(there.keys() - names.keys()),
        "files_with_two_rows": sum(count > 1 for count in names.values()),
        "errors_as_expected": found == there, "errors": dict(Counter(code for code in found.values() if code)),
        "asked_again": asked - images,
    }  # fmt: skip
    assert told["status"] == 3 and found == there and set(names.values()) == {1}, told
    return told


def expected(source: Path) -> tuple[set[str], dict[str, str | None]]:
    """Digests of the files that are cut off, and the code of each file."""
    cut, there = set(), {}
    for path in sorted(source.rglob("*.dcm")):
        n, code = int(path.stem), None
        if n % 100 == 99:
            code = "NO_IMAGE"
        elif n % 50 == 49:
            code = "INVALID_IMAGE"
            cut.add(sha256(path.read_bytes()))
        there[path.relative_to(source).as_posix()] = code
    return cut, there


def steady(source: Path, work: Path, args) -> dict:
    """A run that nobody disturbs: its memory, and how fast it is; the double's Python takes its part of the cores."""
    cut, there = expected(source)
    with Double(args.reading_ms / 1e3, cut) as server:
        memory = Memory(server)
        driver = archive(source, work / "steady", "--url", server.url, "--concurrency", args.concurrency)
        memory.driver = driver.pid
        driver.wait()
    rate = pace(work / "steady", ("INVALID_IMAGE", None))
    shares = (0.1, 0.25, 0.5, 0.75, 1.0)
    return {"files": len(there), "memory": memory.at(shares), "readings_per_s": round(rate, 2)}


def pace(out: Path, codes: tuple) -> float:
    """Rows a second of the last three quarters: Ray and its actors start before."""
    rows = parquet.read_table(out, columns=["read_at", "error_code"]).to_pylist()
    times = sorted(row["read_at"].timestamp() for row in rows if row["error_code"] in codes)
    times = times[len(times) // 4 :]
    return (len(times) - 1) / (times[-1] - times[0])


def nodes(source: Path, work: Path, args) -> dict:
    """Two Ray nodes, a process tree each, on this machine."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64, RAY_USAGE_STATS_ENABLED="0")
    from ray.cluster_utils import Cluster

    cut, there = expected(source)
    each = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False})
    cluster.add_node(**each)
    report = work / "nodes.json"
    try:
        with Double(args.reading_ms / 1e3, cut) as server:
            options = ["--url", server.url, "--actors", 2, "--concurrency", args.concurrency, "--json", report]
            archive(source, work / "nodes", *options, RAY_ADDRESS=cluster.address).wait()
            asked = server.seen
    finally:
        cluster.shutdown()
    told = json.loads(report.read_text())
    assert told["images"] == len(there) and set(asked.values()) == {1} and len(told["run"]["nodes"]) == 2, told["run"]
    return {"files": len(there), "rows_of_each_node": told["run"]["nodes"]}


def beside_bench(source: Path, work: Path, args) -> dict:
    """Readings a second of `bench` offline and of an archive, in turn, at one concurrency and of the same images."""
    from cxr_triton.triton_repo.serve import Server

    chosen = work / "chosen"
    chosen.mkdir()
    for path in [p for p in sorted(source.rglob("*.dcm")) if (int(p.stem) + 1) % 50]:
        shutil.copy(path, chosen)
    count = sum(1 for _ in chosen.iterdir())
    limit, asked, rounds = (), [], []
    if args.tokens:
        limit = ("--task", "findings", "--max-new-tokens", args.tokens)
        output = dict.fromkeys(("median", "p95", "max"), args.tokens)
        workload = {"name": "pace", "version": 1, "images": {"phantoms": 1}, "count": count,
                    "requests": [{"task": "findings", "output": output}]}  # fmt: skip
        (work / "pace.yaml").write_text(json.dumps(workload))  # JSON is YAML
        asked = ["--workload", str(work / "pace.yaml")]
    with (
        apart(args.server_cores, args.client_cores) as begin,
        Server(args.repository, grpc_port=0, metrics_port=0, ready_timeout_s=600) as server,
    ):
        begin()
        for n in range(args.rounds):
            options = ["--url", server.grpc, "--concurrency", args.concurrency, *limit]
            archive(chosen, work / f"pace-{n}", *options).wait()
            bench = work / "bench.json"
            command = [*PROGRAM, "bench", "run", "--url", server.grpc, "--metrics", server.metrics,
                       "--images", str(chosen), "--scenario", "offline", "--offline-concurrency", str(args.concurrency),
                       "--sweep", "", "--repeats", "1", "--seconds", "1", "--requests", str(count),
                       "--perf-analyzer", "none", "--json", str(bench), *asked]  # fmt: skip
            subprocess.run(command, check=True, env={**os.environ, SECRET: server.secret})
            (offline,) = json.loads(bench.read_text())["scenarios"]
            best = offline["points"][0]["repeats"][0]["summary"]["readings_per_s"]
            rate = pace(work / f"pace-{n}", (None,))
            rounds.append({"archive": round(rate, 3), "bench": best, "ratio": round(rate / best, 3)})
    return {
        "files": count, "concurrency": args.concurrency, "tokens": args.tokens,
        "server_cores": _listed(args.server_cores), "client_cores": _listed(args.client_cores),
        "load_average": os.getloadavg()[0], "rounds": rounds,
    }  # fmt: skip


def _listed(cores: set[int] | None) -> list[int] | None:
    return cores and sorted(cores)


PARTS = {"faults": faults, "steady": steady, "two_nodes": nodes, "beside_bench": beside_bench}


@click.command(help=__doc__)
@click.option("--files", default=5000, show_default=True, help="Of faults.")
@click.option("--kills", default=15, show_default=True)
@click.option("--steady-files", default=2000, show_default=True)
@click.option("--node-files", default=400, show_default=True)
@click.option("--pace-files", default=120, show_default=True, help="Of beside_bench.")
@click.option("--rounds", default=2, show_default=True, help="Of beside_bench.")
@click.option("--tokens", type=int, help="Limit of an answer of beside_bench.  [default: the model ends it]")
@cores_options
@click.option("--concurrency", default=6, show_default=True)
@click.option("--reading-ms", default=100.0, show_default=True, help="What the double takes.")
@click.option("--parts", default="faults,steady,two_nodes", show_default=True, help=", ".join(PARTS))
@click.option("--repository", type=click.Path(path_type=Path), help="Of beside_bench.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", type=click.Path(path_type=Path))
def main(**options) -> None:
    args = SimpleNamespace(**options)
    result = {
        "command": " ".join(["python", "tests/integration/archive_kills.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": sys.version.split()[0],
                    **{name: metadata.version(name) for name in ("ray", "pyarrow", "numpy", "grpcio")}},
    }  # fmt: skip
    counts = {faults: args.files, steady: args.steady_files, nodes: args.node_files, beside_bench: args.pace_files}
    with tempfile.TemporaryDirectory(prefix="cxr-archive-") as folder:
        for name in args.parts.split(","):
            part = PARTS[name]
            source = Path(folder) / f"{name}-in"
            write_files(source, counts[part])
            result[name] = part(source, Path(folder), args)
            print(name, json.dumps(result[name]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
