"""Thousands of `cxr-triton read` as processes of their own, more at a time than there are cores: every one has to exit.

    python tests/integration/exit_load.py --failing 5000 --good 500 --parallel 8 --seconds 900 --json OUT

The failing ones are refused by the server, broken off by it, or run into their time limit, in turn; each hundredth
finds no server. One that has not exited --patience-s after its start counts as hung and is killed; the status is 1
then, as it is when one ends with another status than it has to. Each process takes a third of a second of processor
time or more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fake_server import FakeServer, failure, pause, response

from cxr_triton.reading import Reading, parse

READING = Reading.of(
    parse("<think> a </think>\n<answer> b </answer>", grammar="think_answer", answer="text"),
    task="findings",
    prompt="",
    model={"profile": "none"},
    notice="A test double answered. Research only, never for diagnosis.",
).to_json()
FAILING = {"refused": 1, "broken": 1, "late": 1}
STATUS = {**FAILING, "good": 0, "unreachable": 75}


def answer(request, context):
    prompt = request.raw_input_contents[1]
    if b"refused" in prompt:
        yield failure("[INVALID_REQUEST] the script said so")
        return
    yield response("text")
    if b"broken" in prompt:
        context.abort(grpc.StatusCode.INTERNAL, "the script said so")
    if b"late" in prompt:
        pause(context, 30)
    yield response("", READING, final=True)


def plan(failing: int, good: int) -> list[str]:
    """Ways for the calls to go, the good ones spread among the others."""
    ways = list(FAILING)
    order = ["unreachable" if i % 100 == 99 else ways[i % len(ways)] for i in range(failing)]
    for i in range(good):
        order.insert(i * (failing + good) // good, "good")
    return order


def call(url: str, way: str, patience_s: float) -> str:
    """Run one process; its way with what came of it."""
    url, limit = ("127.0.0.1:9" if way == "unreachable" else url), ("0.3" if way == "late" else "60")
    command = [sys.executable, "-c", "from cxr_triton.cli import main; main()", "read", "--prompt", way]
    process = subprocess.Popen(
        [*command, "--url", url, "--timeout-s", limit], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _, errors = process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"{way}: hung"
    if process.returncode != STATUS[way]:
        print(errors.decode(errors="replace"), file=sys.stderr)
        return f"{way}: status {process.returncode}"
    return f"{way}: exited"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--failing", type=int, default=5000)
    parser.add_argument("--good", type=int, default=500)
    parser.add_argument("--parallel", type=int, default=4 * (os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no process later than this")
    parser.add_argument("--patience-s", type=float, default=120)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    started_s = time.monotonic()

    def run(way: str) -> str | None:
        return call(server.url, way, given.patience_s) if time.monotonic() < started_s + given.seconds else None

    with FakeServer(answer) as server, ThreadPoolExecutor(given.parallel) as pool:
        outcomes = Counter(filter(None, pool.map(run, plan(given.failing, given.good))))
    result = {"outcomes": dict(sorted(outcomes.items())), "seconds": round(time.monotonic() - started_s, 1)}
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(any(not outcome.endswith("exited") for outcome in outcomes))


if __name__ == "__main__":
    main()
