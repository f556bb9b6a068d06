"""What `make bench` measured, as a record: `python tests/bench/ratios.py PYTEST_BENCHMARK_JSON RESULT_JSON`.

Milliseconds of every measurement, and the others' over ours: of the medians, and of the best rounds.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

from cxr_triton.perf.environment import environment

PACKAGES = (
    *("imagecodecs", "pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle"),
    *("pillow", "opencv-python-headless", "torchvision"),
)


def milliseconds(low_s: float, p25_s: float, p50_s: float, p75_s: float) -> dict:
    times = {"best_ms": low_s, "p25_ms": p25_s, "p50_ms": p50_s, "p75_ms": p75_s}
    return {name: round(1e3 * seconds, 4) for name, seconds in times.items()}


def row(entry: dict) -> dict:
    """One measurement of `pytest-benchmark`'s JSON."""
    stats, extra = entry["stats"], entry["extra_info"]
    ours = milliseconds(stats["min"], stats["q1"], stats["median"], stats["q3"])
    made = {"rounds": stats["rounds"], "cxr_triton": ours}
    for name, seconds in extra["others_s"].items():
        theirs = milliseconds(*np.percentile(seconds, (0, 25, 50, 75)))
        made[name] = theirs
        made[f"ratio_p50_{name}"] = round(theirs["p50_ms"] / ours["p50_ms"], 2)
        made[f"ratio_best_{name}"] = round(theirs["best_ms"] / ours["best_ms"], 2)
    if "pydicom" in extra:
        made["pydicom"] = extra["pydicom"]
    return made


def record(measured: dict) -> dict:
    """All of it; who and where is left out."""
    described = environment()
    described["versions"] |= {
        name: metadata.version(name) for name in PACKAGES if any(metadata.distributions(name=name))
    }
    return {
        "schema": 1,
        "created": measured["datetime"],
        "command": ["make", "bench"],
        "environment": described,
        "groups": {entry["group"]: row(entry) for entry in measured["benchmarks"]},
    }


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    result = record(json.loads(source.read_text()))
    target.write_text(json.dumps(result, indent=2) + "\n")
    for group, measured in result["groups"].items():
        told = "".join(f"; {key[10:]} {value} x as long" for key, value in measured.items() if "ratio_p50" in key)
        print(f"{group}: {measured['cxr_triton']['p50_ms']} ms{told}")
