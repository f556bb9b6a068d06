"""What `make bench` measured, as a record: `python tests/bench/ratios.py PYTEST_BENCHMARK_JSON RESULT_JSON`.

Milliseconds of every measurement, and the others' over ours: of the medians, and of the best rounds. Of a syntax also
for all its pictures one after the other, each at its own median, with the range of the pictures' ratios.
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


def milliseconds(seconds: list[float]) -> dict:
    names = ("best_ms", "p25_ms", "p50_ms", "p75_ms")
    return {name: round(1e3 * s, 4) for name, s in zip(names, np.percentile(seconds, (0, 25, 50, 75)), strict=True)}


def row(entry: dict) -> dict:
    """One measurement of `pytest-benchmark`'s JSON."""
    extra = entry["extra_info"]
    ours = milliseconds(entry["stats"]["data"])
    made = {"rounds": entry["stats"]["rounds"], "stolen_share": round(extra["stolen_share"], 4), "cxr_triton": ours}
    for name, seconds in extra["others_s"].items():
        made[name] = theirs = milliseconds(seconds)
        made[f"ratio_p50_{name}"] = round(theirs["p50_ms"] / ours["p50_ms"], 2)
        made[f"ratio_best_{name}"] = round(theirs["best_ms"] / ours["best_ms"], 2)
    if "pydicom" in extra:
        made["pydicom"] = extra["pydicom"]
    return made


def total(rows: list[dict]) -> dict:
    """Several pictures of one syntax, which pydicom decodes."""
    ours_ms, theirs_ms = (sum(row[who]["p50_ms"] for row in rows) for who in ("cxr_triton", "pydicom"))
    ratios = [row["ratio_p50_pydicom"] for row in rows]
    return {
        "pictures": len(rows),
        "stolen_share": max(row["stolen_share"] for row in rows),
        "cxr_triton": {"p50_ms": round(ours_ms, 4)},
        "pydicom": {"p50_ms": round(theirs_ms, 4)},
        "ratio_p50_pydicom": round(theirs_ms / ours_ms, 2),
        "range_pydicom": [min(ratios), max(ratios)],
    }


def groups(entries: list[dict]) -> dict:
    """The syntaxes of several pictures, then every measurement."""
    rows = {entry["group"]: row(entry) for entry in entries}
    syntaxes: dict[str, list[dict]] = {}
    for entry in entries:
        syntax = entry["extra_info"].get("syntax")
        if syntax and entry["extra_info"]["others_s"]:
            syntaxes.setdefault(syntax, []).append(rows[entry["group"]])
    return {f"decode {syntax}": total(of) for syntax, of in syntaxes.items() if len(of) > 1} | rows


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
        "groups": groups(measured["benchmarks"]),
    }


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    result = record(json.loads(source.read_text()))
    target.write_text(json.dumps(result, indent=2) + "\n")
    for group, measured in result["groups"].items():
        told = "".join(f"; {key[10:]} {value} x as long" for key, value in measured.items() if "ratio_p50" in key)
        print(f"{group}: {measured['cxr_triton']['p50_ms']} ms{told}")
