"""Triton's own perf_analyzer as a closed-loop driver: found or installed, run, and its export turned into records.

Of a decoupled model perf_analyzer prints the time to the first response only. Its profile export holds the time and the
content of every response, so time to first text, inter-token latency, output tokens per second and goodput are computed
here, as for our own driver.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cxr_triton.errors import InternalError, InvalidRequest, Unavailable
from cxr_triton.perf.load import prompt_threads, with_reading
from cxr_triton.perf.summary import Record
from cxr_triton.perf.workload import Item, input_data

VERSION = "2.51.0"
"""Of the wheel that holds the binary; the same release as the pip-installed Triton."""
WHEEL = "tritonclient"  # its manylinux wheels hold perf_analyzer
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
"""What the binary needs beyond a plain system, and under which name the wheel nvidia-pytriton brings it."""
EXPORT_BYTES = 512 << 20
"""Most request bytes of one run: perf_analyzer keeps every request in memory and writes it to its export."""
REMEDY = (
    f"`pip download --no-deps --only-binary :all: --platform manylinux1_x86_64 {WHEEL}=={VERSION}` on a machine with a "
    "package index, unzip perf_analyzer out of the wheel, and name it with --perf-analyzer PATH; or leave it out with "
    "--perf-analyzer none"
)
_INPUTS, _AFTER = b'"request_inputs":{', b'},"response_timestamps":'  # a quote inside a value is escaped
_ASKED = re.compile(rb'"REQUEST":("(?:[^"\\]|\\.)*")', re.DOTALL)


@dataclass(frozen=True)
class PerfAnalyzer:
    """A perf_analyzer that runs on this machine.

    Attributes
    ----------
    path : Path
    environment : dict
        For its process.
    version : str
        As it names itself.
    """

    path: Path
    environment: dict[str, str]
    version: str

    @classmethod
    def at(cls, path: Path) -> PerfAnalyzer:
        """The binary at a path.

        Raises
        ------
        Unavailable
            It does not run here; the message says which library is missing.
        """
        folders = [str(path.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders))}
        try:
            done = subprocess.run(
                [path, "--version"], env=environment, capture_output=True, text=True, timeout=60, check=False
            )
        except OSError as error:
            raise Unavailable(f"perf_analyzer at {path} does not start ({error.strerror}); {REMEDY}") from None
        said = done.stdout + done.stderr
        if not (found := re.search(r"Version (\S+)", said)):
            wrong = " ".join(said.split())[:300]
            raise Unavailable(
                f"perf_analyzer at {path} does not run: {wrong}; install libb64 and the CUDA 12 runtime library "
                "(Debian: libb64-0d; PyPI: nvidia-cuda-runtime-cu12) or nvidia-pytriton, which brings both"
            )
        return cls(path, environment, found[1])


def find(cache: Path | None = None) -> PerfAnalyzer:
    """perf_analyzer from the search path, from the cache, or installed into it.

    Parameters
    ----------
    cache : path, optional
        ``~/.cache/cxr-triton/perf_analyzer`` by default.

    Raises
    ------
    Unavailable
        It is not here and could not be installed; the message says how to bring it.
    """
    if on_path := shutil.which("perf_analyzer"):
        return PerfAnalyzer.at(Path(on_path))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (cache or root / "cxr-triton" / "perf_analyzer") / VERSION
    if not (folder / "perf_analyzer").is_file():
        install(folder)
    return PerfAnalyzer.at(folder / "perf_analyzer")


def chosen(tool: str) -> PerfAnalyzer | None:
    """What ``--perf-analyzer`` says: ``find`` as `find`, ``none``, or the path of a binary."""
    if tool == "none":
        return None
    return find() if tool == "find" else PerfAnalyzer.at(Path(tool).resolve())


def install(folder: Path) -> None:
    """Put perf_analyzer and the libraries that it needs into a folder, out of wheels."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--platform", "manylinux1_x86_64", "--dest", scratch, f"{WHEEL}=={VERSION}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"no perf_analyzer here, and its download took over 600 s; {REMEDY}") from None
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            wrong = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise Unavailable(f"no perf_analyzer here, and it could not be downloaded ({wrong}); {REMEDY}")
        new = Path(scratch) / "new"
        new.mkdir()
        with zipfile.ZipFile(wheels[0]) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith("/bin/perf_analyzer"))
            (new / "perf_analyzer").write_bytes(wheel.read(name))
        (new / "perf_analyzer").chmod(0o755)
        for name, library in _libraries().items():
            shutil.copyfile(library, new / name)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def _libraries() -> dict[str, Path]:
    """The libraries out of nvidia-pytriton; none without it, then the system's have to do."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent.parent / "nvidia_pytriton.libs"
    found = {name: next(folder.glob(pattern), None) for name, pattern in LIBRARIES.items()}
    return {name: path for name, path in found.items() if path}


def request_limit(items: Sequence[Item]) -> int:
    """Most requests of one run, see `EXPORT_BYTES`."""
    mean = sum(len(image.data) for item in items for image in item.images) / len(items)
    return max(1, int(EXPORT_BYTES / max(mean, 1)))


def run(
    tool: PerfAnalyzer,
    url: str,
    items: Sequence[Item],
    *,
    concurrency: int,
    requests: int,
    timeout_s: float,
    headers: Sequence[tuple[str, str]] = (),
) -> tuple[list[Record], dict]:
    """One closed-loop run of the workload's items, in order, again and again.

    Parameters
    ----------
    tool : PerfAnalyzer
    url : str
        Host and port of Triton's gRPC endpoint.
    items : sequence of Item
    concurrency, requests : int
        Requests under way at any time, and in all.
    timeout_s : float
        For the whole run.
    headers : sequence of (str, str)
        Metadata of its calls; they open the statistics and stay out of the result.

    Returns
    -------
    list of Record
    dict
        ``perf_analyzer`` of the schema: what it printed itself.

    Raises
    ------
    InternalError
        It failed; the message quotes it.
    """
    if requests > request_limit(items):
        raise InvalidRequest(
            f"{requests} requests for perf_analyzer, allowed {request_limit(items)} of this size: it keeps them all in "
            "memory; ask for fewer or for smaller images"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "input.json").write_text(json.dumps(input_data(items)))
        arguments = ["-m", "cxr_reader", "-u", url, "-i", "grpc", "--streaming", "--async"]
        arguments += ["--input-data", "input.json", "--request-count", str(requests)]
        arguments += ["--concurrency-range", str(concurrency), "--max-threads", str(min(concurrency, 16))]
        arguments += ["--profile-export-file", "export.json", "-f", "report.csv", "--verbose-csv"]
        try:
            with prompt_threads():  # as our own driver
                done = subprocess.run(
                    [tool.path, *arguments, *(f"-H{name}:{value}" for name, value in headers)],
                    cwd=folder,
                    env=tool.environment,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=timeout_s,
                    check=False,
                )
        except subprocess.TimeoutExpired:
            raise InternalError(f"perf_analyzer did not end within {timeout_s:g} s; see the server's log") from None
        if done.returncode or not (folder / "export.json").is_file():
            wrong = " ".join((done.stderr or done.stdout).split())[-400:]
            raise InternalError(f"perf_analyzer failed with status {done.returncode}: {wrong}")
        printed = read_report(folder / "report.csv")
        records, window_s = read_export(folder / "export.json", items)
    if failed := sum(record.failed for record in records):
        raise InternalError(
            f"{failed} of perf_analyzer's {len(records)} requests ended without a reading; see the server's log"
        )
    said = {"command": ["perf_analyzer", *arguments], "version": tool.version, "window_s": window_s, **printed}
    return records, said


def read_report(path: Path) -> dict:
    """Throughput and latencies that perf_analyzer computed; of a decoupled model to the first response."""
    with path.open(newline="") as file:
        row = next(csv.DictReader(file))
    columns = {"mean": "Avg latency", **{f"p{p}": f"p{p} latency" for p in (50, 90, 95, 99)}}
    return {
        "throughput_per_s": float(row["Inferences/Second"]),
        "latency_ms": {name: float(row[column]) / 1e3 for name, column in columns.items()},
    }


def read_export(path: Path, items: Sequence[Item]) -> tuple[list[Record], float]:
    """Records of a profile export, and the seconds of the window that perf_analyzer divides by.

    The window ends up to a second after the last response. An export is no JSON as it stands: the bytes of BYTES
    tensors are written as they are, and requests are copied into it whole. So their images are cut out, and each text
    is read as the bytes that it is.
    """
    asked = {json.dumps(item.request).encode(): index for index, item in enumerate(items)}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        small = b"".join(_without_images(whole))
    experiment = json.loads(small.decode("latin-1"), strict=False)["experiments"][0]
    requests = sorted(experiment["requests"], key=lambda request: request["timestamp"])
    began_ns = requests[0]["timestamp"] if requests else 0
    records = []
    for request in requests:
        at_s = [(ns - began_ns) / 1e9 for ns in request["response_timestamps"]]
        outputs = request["response_outputs"]
        sent_s = (request["timestamp"] - began_ns) / 1e9
        deltas_s = [t for t, output in zip(at_s, outputs, strict=True) if output.get("DELTA")]
        index = asked.get(request["request_inputs"]["REQUEST"].encode("latin-1"))
        made = Record(index, sent_s, sent_s, at_s[-1] if at_s else sent_s, deltas_s, status="INTERNAL")
        for t, output in zip(at_s, outputs, strict=True):
            if text := output.get("READING"):
                made.end_s = t
                with_reading(made, json.loads(text.encode("latin-1")))
        records.append(made)
    first_ns, last_ns = experiment["window_boundaries"]
    return records, (last_ns - first_ns) / 1e9


def _without_images(whole: mmap.mmap) -> Iterator[bytes]:
    """The export with REQUEST alone left of every request's inputs."""
    copied = 0
    while (start := whole.find(_INPUTS, copied)) >= 0:
        start += len(_INPUTS)
        end = whole.find(_AFTER, start)
        yield whole[copied:start]
        request = _ASKED.search(whole, start, end)
        yield request[0] if request else b'"REQUEST":""'
        copied = end
    yield whole[copied:]
