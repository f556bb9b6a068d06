"""Step `stack`: DICOM in, text out, through Triton, by the project's own benchmark."""

from __future__ import annotations

import json
import subprocess
import sys

from cxr_triton.perf.gpu_session.session import CPU, GPU, Session


def stack(session: Session) -> None:
    """DICOM in, text out, through Triton: one stream and a sweep, by the project's own benchmark."""
    scale, precision = list(session.scales.values())[-1], session.precisions[-1]
    with session.noting("stack", scale=scale.name, precision=precision) as row:
        # A CPU serves the bundle of the CPU's engine: the GPU's has no session that the server could open.
        bundle = session.bundle(scale, precision, CPU if session.is_dry else GPU)
        repository, result = session.work / "repository", session.out / "bench.json"
        slots = "2" if session.is_dry else "32"
        _cxr_triton("package", str(bundle.path), "-o", str(repository), "--unverified", "--force", "--slots", slots)
        sizes = ["--seconds", "1", "--requests", "2", "--repeats", "1", "--warm-up", "1", "--sweep", "2"]
        full = ["--seconds", "8", "--repeats", "1", "--sweep", "1,8,32"]
        _cxr_triton(
            "bench", "run", str(repository), "--workload", "short" if session.is_dry else "nv-reason",
            "--scenario", "single_stream", "--perf-analyzer", "none", *(sizes if session.is_dry else full),
            "--json", str(result), "--html", str(session.out / "bench.html"),
        )  # fmt: skip
        measured = json.loads(result.read_text())
        (point,) = measured["scenarios"][0]["points"]
        for name in ("ttft_ms.p50", "ttft_ms.p99", "itl_ms.p50", "latency_ms.p90", "output_tokens_per_s"):
            row[name] = point["summary"][name]["mean"]
        row["stages_ms"] = point["waterfall"]["stages_ms"]
        row["sweep"] = {
            f"{each['load']['value']:g}": each["summary"]["output_tokens_per_s"]["mean"] for each in measured["sweep"]
        }


def _cxr_triton(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from cxr_triton.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"cxr-triton {arguments[0]} ended with {done.returncode}: {done.stderr[-1500:]}")
