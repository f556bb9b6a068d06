"""vLLM behind the real Triton for long: readings in a row and at once, cancelled ones, memory, a killed engine.

`python tests/integration/vllm_endurance.py --json docs/results/vllm.json`, with vLLM's Python in CXR_VLLM_PYTHON.
The suite runs the same with smaller numbers (`test_vllm_serving.py`).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from cxr_triton.client.reader import Reader
from cxr_triton.errors import CxrError, Unavailable

SEEN_DEAD_S = 5
FREED_S = 60


def read(reader: Reader, images: list[bytes], number: int):
    """A whole reading of one of the images."""
    return reader.read(images[number % len(images)]).result()


def in_a_row(address: str, images: list[bytes], count: int) -> dict:
    """So many readings one after the other; each answer has to be what it was before for its image."""
    seconds, answers = [], {}
    with Reader(address) as reader:
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
    with Reader(address) as reader, concurrent.futures.ThreadPoolExecutor(count) as pool:
        readings = list(pool.map(lambda number: read(reader, images, number), range(count)))
    tokens = sum(reading.usage["completion_tokens"] for reading in readings)
    return {"readings": count, "tokens": tokens, "total_s": round(time.monotonic() - started, 1)}


def cancelled(address: str, images: list[bytes], count: int, longest_s: float, together: int = 8) -> dict:
    """So many readings whose callers leave after a random time; some are faster."""
    draw, outcomes = random.Random(7), {"cancelled": 0, "read": 0}

    def leave(number: int, wait_s: float) -> str:
        with Reader(address) as reader:
            stream = reader.read(images[number % len(images)])
            deadline = time.monotonic() + wait_s
            for _ in stream:
                if time.monotonic() > deadline:
                    stream.close()
                    return "cancelled"
        return "read"

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
            with Reader(address) as reader:
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


def main() -> None:
    """Run the long forms and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=32)
    arguments = parser.parse_args()
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
            steps = {"start_s": round(server.start_s, 1), "in_a_row": in_a_row(address, images, arguments.count)}
            before = resident_mib(server)
            steps["at_once"] = at_once(address, images, arguments.at_once)
            left = cancelled(address, images, arguments.count, steps["in_a_row"]["median_s"])
            steps["cancelled"] = left | {"freed_after_s": freed(raw)}
            steps["in_a_row_again"] = in_a_row(address, images, arguments.count)
            steps["resident_mib"] = {"before": before, "after": resident_mib(server)}
            server.check()
            steps["killed"] = kill_engine(server, address, images)
    record = {
        "schema": 1,
        "command": f"python tests/integration/vllm_endurance.py --count {arguments.count}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_average": os.getloadavg()[0],
        "versions": {name: metadata.version(name) for name in ("nvidia-pytriton", "numpy", "onnxruntime")},
        "model": "demonstration model, bf16, 16 slots",
        "measured": steps,
    }
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
