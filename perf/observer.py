"""What a server counts and takes, read before and after a repeat: Triton's statistics, metrics, GPUs, memory."""

from __future__ import annotations

import contextlib
import os
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cxr_triton.engines.secret import SECRET
from cxr_triton.errors import Unavailable
from cxr_triton.perf.environment import nvidia_smi
from cxr_triton.perf.summary import Record, columns, summarize
from cxr_triton.triton_repo.guard import statistics_header

MODEL = "cxr_reader"
PARTS = ("queue", "compute_input", "compute_infer", "compute_output")
SETTLE_S = 10.0
GPU_COUNTERS = ("utilization.gpu", "memory.used", "power.draw", "clocks.sm", "temperature.gpu")


class Observer:
    """What the server counts and takes, read before and after a repeat.

    Parameters
    ----------
    url : str
        Its gRPC endpoint.
    metrics : str, optional
        ``HOST:PORT`` of its metrics.
    pids : callable, optional
        Gives its processes where they are on this machine.
    secret : str, optional
        The server's, which opens its statistics.
    """

    def __init__(
        self,
        url: str,
        metrics: str | None = None,
        pids: Callable[[], Sequence[int]] | None = None,
        secret: str | None = None,
    ):
        self.url, self._metrics, self._pids = url, metrics, pids or (lambda: ())
        self.headers = [statistics_header(secret)] if secret else []

    def triton(self) -> dict[str, dict[str, float]]:
        """Model to what Triton has counted so far."""
        import grpc
        from tritonclient.grpc.service_pb2 import ModelStatisticsRequest
        from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

        try:
            with grpc.insecure_channel(self.url) as channel:
                stub = GRPCInferenceServiceStub(channel)
                statistics = stub.ModelStatistics(ModelStatisticsRequest(), timeout=30, metadata=self.headers)
        except grpc.RpcError as error:
            if "restricted" in (error.details() or ""):
                raise Unavailable(
                    f"{self.url} does not say what it counted without its secret; start it with {SECRET} in its "
                    "environment and measure it with the same"
                ) from None
            raise Unavailable(f"{self.url} does not say what it counted ({error.code().name}); see its log") from None
        counts = {}
        for model in statistics.model_stats:
            counted = model.inference_stats
            counts[model.name] = {
                "requests": counted.success.count,
                "executions": model.execution_count,
                "failed": counted.fail.count,
                "request_ms": counted.success.ns / 1e6,
                **{f"{part}_ms": getattr(counted, part).ns / 1e6 for part in PARTS},
            }
        return counts

    def metrics(self) -> dict[str, float]:
        """Our own metrics, labels added up, and the counters of each GPU."""
        totals: dict[str, float] = defaultdict(float)
        if self._metrics:
            for line in self._page(f"http://{self._metrics}/metrics"):
                if line.startswith("cxr_"):
                    name, _, value = line.rpartition(" ")
                    totals[name.partition("{")[0]] += float(value)
        for index, gpu in enumerate(nvidia_smi(*GPU_COUNTERS)):
            for name, value in gpu.items():
                with contextlib.suppress(ValueError):  # [N/A]
                    totals[f"gpu{index}.{name}"] = float(value)
        return dict(totals)

    @staticmethod
    def _page(url: str) -> list[str]:
        try:
            with urllib.request.urlopen(url, timeout=30) as page:  # noqa: S310 -- the scheme is ours
                return page.read().decode().splitlines()
        except OSError as error:
            raise Unavailable(f"{url} cannot be read ({error}); see the server's log, or leave --metrics out") from None

    def resident_bytes(self) -> dict[str, int]:
        """Process to resident memory: this client, and the server's where they are known."""
        return self._by_process(_resident)

    def processor_s(self) -> dict[str, float]:
        """Process to the processor time that it has had so far, of all its threads; children that ended count too."""
        totals = self._by_process(_processor_s)
        ended_s = sum(_processor_s(pid, of_children=True) for pid in self._pids())
        return totals | {"decoding child": totals.get("decoding child", 0.0) + ended_s}

    def _by_process(self, of: Callable[[int | str], float]) -> dict:
        totals = defaultdict(int, client=of("self"))
        for pid in self._pids():
            totals[_process_name(pid)] += of(pid)
        return dict(totals)


def _resident(pid: int | str) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # it has ended
        return 0


def _processor_s(pid: int | str, *, of_children: bool = False) -> float:
    """User and system time of a process, or of its children that it has waited for, proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0.0
    first = 13 if of_children else 11
    return (int(fields[first]) + int(fields[first + 1])) / os.sysconf("SC_CLK_TCK")


def _process_name(pid: int) -> str:
    """The model of a Python backend's process, ``decoding child``, or the program's name."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return "ended"
    if command[0].endswith("_stub"):
        return Path(command[1]).parts[-3]
    return "tritonserver" if command[0].endswith("tritonserver") else "decoding child"


class Observed:
    """What the server counts from here to `repeat`."""

    def __init__(self, observer: Observer):
        self._observer = observer
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self._triton, self._metrics = observer.triton(), observer.metrics()

    def counted(self, requests: int) -> dict[str, dict[str, float]]:
        """``triton`` of the schema, once all requests are in it: Triton counts one after its last response has gone."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            after = self._observer.triton()
            counted = {
                model: {name: value - self._triton.get(model, {}).get(name, 0) for name, value in numbers.items()}
                for model, numbers in after.items()
            }
            if counted[MODEL]["requests"] + counted[MODEL]["failed"] >= requests or time.monotonic() > deadline_s:
                return counted
            time.sleep(0.02)

    def repeat(self, records: Sequence[Record], bounds: Mapping[str, float]) -> dict:
        """``repeat`` of the schema."""
        triton, metrics = self.counted(len(records)), self._observer.metrics()
        return {
            "started": self.started,
            "summary": summarize(records, bounds),
            "requests": columns(records),
            "triton": triton,
            "metrics": {name: [self._metrics.get(name, 0.0), value] for name, value in metrics.items()},
            "resident_bytes": self._observer.resident_bytes(),
        }
