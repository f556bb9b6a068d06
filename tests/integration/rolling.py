"""Rolling restarts of two servers behind the front door, while readings go on: none that was accepted may be lost.

    python tests/integration/rolling.py --restarts 50

Two `cxr-triton serve` of a small model of random weights, and clients that read through one door without a pause. In
turn each server gets SIGTERM, ends, and is started again. A reading is accepted once its server has said something of
it; one that was refused before is sent again. docs/results/front-door.json takes the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from front import FrontDoor
from front_door import RECORD
from ports import free_port
from reliability import provenance, set_section

from cxr_triton.client import Reader, Tls
from cxr_triton.errors import Cancelled, CxrError, QueueFull, Unavailable
from cxr_triton.triton_repo.drain import under_way

TOKENS = 1500
LIMIT_S = 60
IDLE_S = 10
"""A server is ended while it reads, or after so long without: the door may give all readings to the other one."""


class Served:
    """One `cxr-triton serve`, on ports that stay."""

    def __init__(self, repository: Path, folder: Path, name: str):
        self.port, self.metrics = free_port(), f"127.0.0.1:{free_port()}"
        self._errors, self._log = folder / f"{name}.err", folder / f"{name}.log"
        ports = ["--grpc-port", str(self.port), "--metrics-port", self.metrics.rpartition(":")[2]]
        main = [sys.executable, "-c", "from cxr_triton.cli import main; main()"]
        self._command = [
            *main,
            "serve",
            str(repository),
            *ports,
            "--log",
            str(self._log),
            "--drain-seconds",
            str(LIMIT_S),
        ]
        self._process: subprocess.Popen | None = None
        self.failed_starts = 0

    def start(self) -> None:
        """As a supervisor does, again where it fails: on busy cores Triton 2.51 ends now and then while it loads."""
        while not self._started():
            self.failed_starts += 1
            assert self.failed_starts < 20, self._errors.read_text() + self._log.read_text()[-3000:]

    def _started(self) -> bool:
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=errors, text=True)
        if self._process.stdout.readline().startswith("ready"):
            return True
        self._process.wait(60)
        self._process.stdout.close()
        return False

    def end(self) -> tuple[float, float, int]:
        """What was under way when it was asked to end, how long that took, and its status."""
        busy, began_s = under_way(self.metrics), time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(LIMIT_S + 60)
        self._process.stdout.close()
        return busy, time.monotonic() - began_s, status

    def kill(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(LIMIT_S + 60)


class Clients:
    """Threads that read through a door until the `with` block ends.

    Attributes
    ----------
    ended : Counter
        How readings ended: ``done``; ``refused`` (by a server that ends) and ``away`` (no server took it), both sent
        again; ``lost``.
    lost : list of str
    away : Counter
        What was said of those that no server took.
    """

    def __init__(self, door: FrontDoor, number: int):
        self._door = door
        self.ended: Counter[str] = Counter()
        self.lost: list[str] = []
        self.away: Counter[str] = Counter()
        self._over, self._counts = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(number)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)

    def _work(self, number: int) -> None:
        with Reader(self._door.url, tls=Tls(self._door.ca.cert), token_file=self._door.token_file) as reader:
            while not self._over.is_set():
                how, said = self._read(reader, f"hello {number}")
                with self._counts:
                    self.ended[how] += 1
                    if how == "lost":
                        self.lost.append(said)
                    elif how == "away":
                        self.away[said.replace(self._door.url, "DOOR")] += 1
                if how in ("refused", "away"):
                    self._over.wait(0.2)

    def _read(self, reader: Reader, prompt: str) -> tuple[str, str]:
        stream = reader.read((), prompt=prompt, max_new_tokens=TOKENS, temperature=0.0)
        try:
            for _ in stream:
                pass
            return "done", ""
        except CxrError as error:
            if isinstance(error, QueueFull) and "is ending" in error.message:
                return "refused", error.message
            if isinstance(error, Unavailable | Cancelled) and not stream._clock._is_heard:
                return "away", error.message
            return "lost", error.wire()


def roll(folder: Path, repository: Path, restarts: int, clients: int, seconds: float = math.inf) -> dict:
    """What came of readings and of restarts."""
    took_s, busy, statuses, ends_s = [], [], Counter(), time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        servers = [Served(repository, folder, name) for name in ("one", "two")]
        for server in servers:
            stack.callback(server.kill)
            server.start()
        door = stack.enter_context(FrontDoor(folder / "door", [f"127.0.0.1:{server.port}" for server in servers]))
        with Clients(door, clients) as at_work:
            for number in range(restarts):
                if time.monotonic() > ends_s:
                    break
                done = at_work.ended["done"]
                server = servers[number % 2]
                idle_s = time.monotonic() + IDLE_S
                while at_work.ended["done"] < done + clients or not (
                    under_way(server.metrics) or time.monotonic() > idle_s
                ):
                    time.sleep(0.02)
                was_busy, seconds, status = server.end()
                busy.append(was_busy)
                took_s.append(round(seconds, 1))
                statuses[str(status)] += 1
                server.start()
                line = f"{number + 1}: {was_busy:g} under way, ended in {seconds:.1f} s"
                print(line, dict(at_work.ended), at_work.lost[:2], flush=True)
        assert not door.errors() or "crit" not in door.errors(), door.errors()
    return {
        "restarts": len(took_s),
        "clients": clients,
        "tokens_a_reading": TOKENS,
        "readings": dict(sorted(at_work.ended.items())),
        "lost": at_work.ended["lost"],
        "how_lost": at_work.lost[:10],
        "how_away": dict(at_work.away),
        "under_way_at_sigterm": {"least": min(busy), "most": max(busy), "sum": sum(busy)},
        "seconds_to_end": {"least": min(took_s), "most": max(took_s)},
        "exit_status": dict(statuses),
        "starts_that_failed_and_were_repeated": sum(server.failed_starts for server in servers),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--restarts", type=int, default=50)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no restart later than this")
    given = parser.parse_args()
    from served import write_bundle

    from cxr_triton.triton_repo.package import Settings, write_repository

    command = f"python tests/integration/rolling.py --restarts {given.restarts} --clients {given.clients}"
    command += f" --seconds {given.seconds:g}" if given.seconds < math.inf else ""
    begun = provenance(command, ["grpcio", "nvidia-pytriton"], ["nginx-light"])
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_repository(write_bundle(folder), folder / "repository", Settings(threads=1), unverified=True)
        begun |= roll(folder, folder / "repository", given.restarts, given.clients, given.seconds)
    print(json.dumps(begun, indent=2))
    set_section("rolling_restarts", begun, RECORD)
    sys.exit(bool(begun["lost"]))


if __name__ == "__main__":
    main()
