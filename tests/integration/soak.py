"""Soak of a served model: requests of chosen kinds for minutes, and what they leave in the server's processes.

    python tests/integration/soak.py --minutes 10 --clients 8 --mix all --json OUT

``--mix each`` runs every kind on a server of its own. A kind is called flat when the lines through its samples, but for
the first quarter, rise by less than --flat-mb and --flat-descriptors for 1,000 requests. The status is 1 when a request
ended otherwise than it has to; a server that dies is started again and counted. Latency is also given for the requests
during which other processes, and others on the host, took less than a tenth of a core: what they take is no growth.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import platform
import random
import re
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import click
import grpc
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gateway_peers import phantom_dicom, phantom_repository
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from cxr_triton.client.reader import Reader
from cxr_triton.errors import Cancelled, CxrError, Unavailable
from cxr_triton.triton_repo.serve import Server


class Requests:
    """The kinds of request by name: each takes a reader and a random generator, and gives what came of it."""

    def __init__(self, seed: int):
        from PIL import Image

        self.dicom = [phantom_dicom(seed + i) for i in range(8)]
        self.png = []
        for i in range(4):
            levels = np.random.default_rng(seed + i).integers(0, 256, (9, 9), np.uint8)
            picture = Image.fromarray(levels).resize((512, 512), Image.Resampling.BICUBIC)
            with io.BytesIO() as file:
                picture.save(file, "PNG")
                self.png.append(file.getvalue())
        self.kinds: dict[str, Callable[[Reader, random.Random], str]] = {
            "dicom": lambda reader, rng: read(reader, rng.choice(self.dicom)),
            "png": lambda reader, rng: read(reader, rng.choice(self.png), prompt="Describe.", max_new_tokens=16),
            "two": lambda reader, rng: read(reader, rng.sample(self.dicom, 2), prompt="Compare.", max_new_tokens=32),
            "text": lambda reader, rng: read(reader, (), prompt="Say something.", max_new_tokens=16),
            "long": lambda reader, rng: read(reader, rng.choice(self.dicom), temperature=1.5, seed=rng.getrandbits(30)),
            "bad-file": self.bad_file,
            "bad-request": self.bad_request,
            "follow-up": self.follow_up,
            "cancelled": self.cancelled,
            "reconnect": self.reconnect,
            "refused-reconnect": self.refused_reconnect,
            "stranger": stranger,
            "ping": lambda reader, rng: reader.server_info().name and "answered",
        }

    def bad_file(self, reader: Reader, rng: random.Random) -> str:
        """A file that is cut, has bytes changed, or is nothing."""
        file = rng.choice(self.dicom)
        cut = file[: rng.randrange(200, len(file) // 2)]
        return refused(reader, rng.choice([cut, rng.randbytes(1000), b"\0" * len(file)]))

    def bad_request(self, reader: Reader, rng: random.Random) -> str:
        """A request that the server refuses: too many pictures, no such task, a value out of range."""
        file = rng.choice(self.dicom)
        images, asked = rng.choice(
            [
                ([file] * 3, {}),
                (file, {"task": "no-such-task"}),
                (file, {"temperature": -1.0}),
                ((), {"task": "findings"}),
            ]
        )
        return refused(reader, images, **asked)

    def follow_up(self, reader: Reader, rng: random.Random) -> str:
        """A reading, and a question about it."""
        file = rng.choice(self.dicom)
        first = reader.read(file).result()
        turns = [{"role": "user", "content": first.prompt}, {"role": "assistant", "content": first.text}]
        return read(reader, file, prompt="Provide differentials.", history=turns, max_new_tokens=32)

    def cancelled(self, reader: Reader, rng: random.Random) -> str:
        """A reading that is closed before or while its text comes."""
        stream = reader.read(rng.choice(self.dicom), temperature=1.5, seed=rng.getrandbits(30))
        wait_s = rng.choice([0.0, rng.uniform(0, 0.3), rng.uniform(0, 3)])
        threading.Timer(wait_s, stream.close).start()
        with contextlib.suppress(Cancelled):
            for _ in stream:
                if wait_s == 0.0:
                    stream.close()
        return "cancelled" if stream.reading is None else "was faster"

    def reconnect(self, reader: Reader, rng: random.Random) -> str:
        """A text-only reading over a connection of its own."""
        with Reader(reader.url) as own:
            return read(own, (), prompt="Say something.", max_new_tokens=4)

    def refused_reconnect(self, reader: Reader, rng: random.Random) -> str:
        """A bad request over a connection of its own."""
        with Reader(reader.url) as own:
            return self.bad_request(own, rng)


def read(reader: Reader, images, **asked) -> str:
    """A whole reading."""
    reader.read(images, **asked).result()
    return "read"


def refused(reader: Reader, images, **asked) -> str:
    """A reading that has to be refused by a code of the pipeline."""
    try:
        reader.read(images, **asked).result()
    except Unavailable:
        raise
    except CxrError as error:
        return f"refused {error.code}"
    return "read"


def stranger(reader: Reader, rng: random.Random) -> str:
    """STOPs that name nobody's stream, sent to `decoder` itself, of which some are cancelled on their way."""
    request = pb.ModelInferRequest(model_name="decoder")
    request.inputs.add(name="STOP", datatype="BYTES", shape=[1])
    asked = []
    for _ in range(rng.randint(1, 5)):
        name = str(uuid.UUID(int=rng.getrandbits(128))).encode()
        each = pb.ModelInferRequest()
        each.CopyFrom(request)
        each.raw_input_contents.append(len(name).to_bytes(4, "little") + name)
        asked.append(each)
    with grpc.insecure_channel(reader.url) as channel:
        call = GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(asked), timeout=30)
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, 0.02))
            call.cancel()
            return "cancelled"
        try:
            list(call)
        except grpc.RpcError as error:
            raise Unavailable(f"a STOP ended as {error.code()}") from None
    return "answered"


def process_name(pid: int) -> str | None:
    """``tritonserver``, or the name of the model whose process this is; None for any other, as a decoding child."""
    command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    if command[0].endswith("tritonserver"):
        return "tritonserver"
    return f"{Path(command[1]).parts[-3]} {pid}" if command[0].endswith("_stub") else None


@dataclass
class Sample:
    """The counters of one process at one time."""

    requests: int
    at_s: float
    rss_mb: float
    pss_mb: float
    descriptors: int
    threads: int


def sample(pid: int, requests: int, at_s: float) -> Sample:
    """Counters of a process out of ``/proc``."""
    folder = Path(f"/proc/{pid}")
    rollup = dict(re.findall(r"^(\w+): +(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE))
    return Sample(
        requests,
        round(at_s, 1),
        int(rollup["Rss"]) / 1e3,
        int(rollup["Pss"]) / 1e3,
        len(os.listdir(folder / "fd")),
        len(os.listdir(folder / "task")),
    )


QUIET_CORES = 0.1


class Others:
    """The processor time that went to others than this process and its children, half second by half second."""

    def __init__(self) -> None:
        self._ended: list[float] = []
        self._cores: list[float] = []

    def watch(self, over: threading.Event) -> None:
        """Note it until `over` is set."""
        at, busy, own = time.monotonic(), _busy(), _own()
        while not over.wait(0.5):
            before, (at, busy, own) = (at, busy, own), (time.monotonic(), _busy(), _own())
            self._ended.append(at)
            self._cores.append((busy - before[1] - (own - before[2])) / (at - before[0]))

    def quiet(self, begun: float, ended: float) -> bool:
        """Whether others took less than `QUIET_CORES` at any moment between two."""
        first, last = np.searchsorted(self._ended, [begun, ended])
        return last < len(self._ended) and max(self._cores[first : last + 1]) < QUIET_CORES


def _busy() -> float:
    """Seconds that all cores worked, for this machine or for its host's others."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def _own() -> float:
    """Seconds of work of this process and its children, living and gone."""
    total, this = 0.0, psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


@dataclass
class Tally:
    """What the requests of a run came to."""

    outcomes: Counter = field(default_factory=Counter)
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))  # ended at, took
    samples: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    crashes: list[dict] = field(default_factory=list)
    others: Others = field(default_factory=Others)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())

    def count(self, kind: str, outcome: str, seconds: float) -> None:
        with self.lock:
            self.outcomes[f"{kind}: {outcome}"] += 1
            self.seconds[kind].append((time.monotonic(), seconds))


class Soak:
    """Clients that send requests of some kinds to one server, and what is seen of its processes meanwhile."""

    def __init__(
        self, repository: Path, requests: Requests, kinds: list[str], *, clients: int, seed: int, pause_s: float = 0.0
    ):
        self._repository, self._kinds, self._clients, self._seed = repository, kinds, clients, seed
        self._pause_s = pause_s
        self._requests = requests
        self.tally = Tally()
        self._over = threading.Event()
        self._url = ""

    def run(self, seconds: float, every_s: float) -> Tally:
        """Send until the time is over; a server that dies is started again."""
        begins = time.monotonic()
        threads: list[threading.Thread] = []
        while time.monotonic() < begins + seconds:
            with self._server() as server:
                self._url = server.grpc
                if not threads:
                    threads = [threading.Thread(target=self._client, args=(i,)) for i in range(self._clients)]
                    threads.append(threading.Thread(target=self.tally.others.watch, args=(self._over,)))
                    for thread in threads:
                        thread.start()
                    begins = time.monotonic()  # what the first start takes does not count
                self._watch(server, begins, begins + seconds, every_s)
                if time.monotonic() >= begins + seconds:
                    self._over.set()
                    for thread in threads:
                        thread.join()
        return self.tally

    def _server(self) -> Server:
        log = self._repository.parent / f"soak-{os.getpid()}-{'-'.join(self._kinds)}.log"
        return Server(self._repository, grpc_port=0, http_port=0, metrics_port=0, log=log)

    def _watch(self, server: Server, begins: float, ends: float, every_s: float) -> None:
        names = {pid: name for pid in server.pids if (name := process_name(pid))}
        if self.tally.crashes:
            names = {pid: f"{name} after crash {len(self.tally.crashes)}" for pid, name in names.items()}
        while (now := time.monotonic()) < ends:
            try:
                server.check()
                for pid, name in names.items():
                    self.tally.samples[name].append(sample(pid, self.tally.requests, now - begins))
            except (CxrError, OSError) as error:
                crash = {"requests": self.tally.requests, "cancelled": self._cancelled(), "error": str(error)[:500]}
                self.tally.crashes.append(crash)
                print(f"{now - begins:6.1f} s  {crash}", file=sys.stderr, flush=True)
                return
            time.sleep(every_s)

    def _cancelled(self) -> int:
        return self.tally.outcomes["cancelled: cancelled"]

    def _client(self, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        reader, url = None, ""
        while not self._over.is_set():
            if url != self._url:
                if reader:
                    reader.close()
                url = self._url
                reader = Reader(url)
            kind = rng.choice(self._kinds)
            started = time.monotonic()
            try:
                outcome = self._requests.kinds[kind](reader, rng)
            except CxrError as error:
                outcome = f"failed {error.code}"
                time.sleep(0.2)
            self.tally.count(kind, outcome, time.monotonic() - started)
            if self._pause_s:
                self._over.wait(rng.expovariate(1 / self._pause_s))
        reader.close()


def slope(samples: list[Sample], value: str) -> float:
    """How much a counter rises for 1,000 requests, by the line of least squares through all but the first quarter."""
    late = samples[len(samples) // 4 :]
    requests = np.array([each.requests for each in late], float)
    if len(late) < 3 or np.ptp(requests) == 0:
        return float("nan")
    return 1000 * float(np.polyfit(requests, [getattr(each, value) for each in late], 1)[0])


def latencies(seconds: list[float]) -> dict[str, float]:
    """Median and tails, in seconds."""
    return {f"p{at}": round(float(np.percentile(seconds, at)), 3) for at in (50, 95, 99)}


def by_quarter(seconds: list[tuple[float, float]]) -> list[float]:
    """Median of what requests took in each quarter of a run, by when they ended."""
    ended, took = np.array(seconds).T
    quarter = np.minimum(4 * (ended - ended.min()) / max(np.ptp(ended), 1e-9), 3).astype(int)
    return [round(float(np.median(took[quarter == i])), 3) for i in range(4) if (quarter == i).any()]


def undisturbed(tally: Tally) -> dict:
    """Of the requests during which others took next to nothing: how many, and what they took, for each quarter."""
    begins, ends = (pick(at for seconds in tally.seconds.values() for at, _ in seconds) for pick in (min, max))
    quarters = [begins + (ends - begins) * i / 4 for i in range(4)] + [math.inf]
    said = {}
    for kind, seconds in sorted(tally.seconds.items()):
        took = [
            [s for at, s in seconds if low <= at < high and tally.others.quiet(at - s, at)]
            for low, high in pairwise(quarters)
        ]
        said[kind] = [{"requests": len(each), **(latencies(each) if each else {})} for each in took]
    return said


def summary(tally: Tally, flat_mb: float, flat_descriptors: float) -> dict:
    """What is written of a run."""
    processes = {}
    for name, samples in tally.samples.items():
        first, last = samples[0], samples[-1]
        rises = {value: slope(samples, value) for value in ("rss_mb", "pss_mb", "descriptors", "threads")}
        processes[name] = {
            "first": vars(first),
            "last": vars(last),
            "rises_for_1000_requests": {value: round(rise, 2) for value, rise in rises.items()},
            "flat": rises["rss_mb"] < flat_mb and rises["descriptors"] < flat_descriptors,
            "samples": [list(vars(each).values()) for each in samples],
        }
    latency = {kind: latencies([took for _, took in seconds]) for kind, seconds in sorted(tally.seconds.items())}
    return {
        "requests": tally.requests,
        "outcomes": dict(sorted(tally.outcomes.items())),
        "latency_s": latency,
        "undisturbed_latency_s_by_quarter": undisturbed(tally),
        "latency_s_p50_by_quarter": {kind: by_quarter(seconds) for kind, seconds in sorted(tally.seconds.items())},
        "crashes": tally.crashes,
        "processes": processes,
    }


def say(name: str, result: dict) -> None:
    """One line for each process of a run."""
    print(f"{name}: {result['requests']} requests, {len(result['crashes'])} crashes, {result['outcomes']}")
    for process, seen in result["processes"].items():
        first, last, rise = seen["first"], seen["last"], seen["rises_for_1000_requests"]
        print(
            f"  {'flat ' if seen['flat'] else 'RISES'} {process}: {first['rss_mb']:.0f} to {last['rss_mb']:.0f} MB "
            f"({rise['rss_mb']:+.1f} for 1,000), descriptors {first['descriptors']} to {last['descriptors']} "
            f"({rise['descriptors']:+.1f}), threads {first['threads']} to {last['threads']}",
            flush=True,
        )


@click.command(help=__doc__)
@click.option("--minutes", default=10.0, show_default=True, help="Of each run.")
@click.option("--clients", default=8, show_default=True, help="Readings at the same time.")
@click.option(
    "--mix", default="all", show_default=True, help="all; each, which runs all kinds one by one; or KIND,KIND."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--every-s", default=2.0, show_default=True, help="Between two samples.")
@click.option("--pause-s", default=0.0, show_default=True, help="Mean pause of a client between two requests.")
@click.option("--flat-mb", default=5.0, show_default=True)
@click.option("--flat-descriptors", default=1.0, show_default=True)
@click.option("--repository", type=click.Path(exists=True, path_type=Path), help="[default: the demonstration model]")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(minutes, clients, mix, seed, every_s, pause_s, flat_mb, flat_descriptors, repository, json_path):
    requests = Requests(seed)
    names = list(requests.kinds)
    runs = {"all": {"all": names}, "each": {name: [name] for name in names}}.get(mix) or {mix: mix.split(",")}
    if unknown := {kind for kinds in runs.values() for kind in kinds} - set(names):
        raise click.BadParameter(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    results = {}
    with tempfile.TemporaryDirectory(prefix="cxr-soak-") as folder:
        repository = repository or phantom_repository(Path(folder))
        for name, kinds in runs.items():
            soak = Soak(repository, requests, kinds, clients=clients, seed=seed, pause_s=pause_s)
            tally = soak.run(60 * minutes, every_s)
            results[name] = summary(tally, flat_mb, flat_descriptors)
            say(name, results[name])
    record = {
        "command": f"python {' '.join(sys.argv)}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average_15_min": os.getloadavg()[2],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "environment": {
            name: os.environ[name] for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES") if name in os.environ
        },
        "runs": results,
    }
    if json_path:
        json_path.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(any("failed" in outcome for result in results.values() for outcome in result["outcomes"]))


if __name__ == "__main__":
    main()
