"""The machine and the software that a result was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

from cxr_triton import __version__
from cxr_triton.engines import ROOMS, engine
from cxr_triton.engines.cpu import Cpu
from cxr_triton.perf.peers import PEERS, peer

LIBRARIES = ("numpy", "tritonclient", "grpcio", "nvidia-pytriton", "torch", "transformers")
"""Beside those of the engines and of the peers."""


def environment() -> dict:
    """What this runs on."""
    versions = {}
    of_engines = [name for each in map(engine, ROOMS) for name in each.distributions]
    of_peers = [name for each in map(peer, PEERS) for name in each.packages]
    for name in dict.fromkeys((*LIBRARIES, *of_engines, *of_peers)):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(_field("/proc/meminfo", "MemTotal").split()[0]) * 1024,
        "os": platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()),
        "python": platform.python_version(),
        "package": __version__,
        "revision": revision(),
        "versions": versions,
        "gpus": nvidia_smi("name", "memory.total", "driver_version", "power.limit", "compute_cap"),
        "load_average": os.getloadavg()[0],
    }


def memory_available() -> int:
    """Bytes that new work may take without swapping."""
    return int(_field("/proc/meminfo", "MemAvailable").split()[0]) * 1024


def cpu_name() -> str:
    """Of the first core."""
    return Cpu.here().model or platform.processor()


class Stolen:
    """Share of the cores' time that the hypervisor gave to others since this was made.

    A virtual machine's numbers are worth as much as this is small: what it took shows as latency of whatever ran.
    """

    def __init__(self):
        self._began_s, self._stolen_s = time.monotonic(), self._so_far_s()

    def share(self) -> float:
        """Between 0 and 1."""
        cores_s = (time.monotonic() - self._began_s) * (os.cpu_count() or 1)
        return (self._so_far_s() - self._stolen_s) / cores_s

    @staticmethod
    def _so_far_s() -> float:
        """`steal` of all cores since the system started, proc(5)."""
        return int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """Time that all cores together have worked since the system started, proc(5)."""
    user, nice, system, _, _, irq, softirq, *_ = Path("/proc/stat").read_text().split(maxsplit=10)[1:]
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")


def _field(file: str, name: str) -> str:
    lines = Path(file).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _said(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def revision() -> str | None:
    """The commit of the clone that this module lies in."""
    root = _said("git", "rev-parse", "--show-toplevel")
    if root is None or Path(root) / "perf" != Path(__file__).resolve().parent:
        return None
    changed = _said("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return f"{_said('git', 'rev-parse', '--short=12', 'HEAD')}{'+' if changed else ''}"


def nvidia_smi(*query: str) -> list[dict[str, str]]:
    """One entry a GPU, without units; none where there is no driver."""
    said = _said("nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader,nounits")
    return [dict(zip(query, line.split(", "), strict=True)) for line in (said or "").splitlines()]
