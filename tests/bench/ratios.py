"""What `make bench` measured, small: `python tests/bench/ratios.py PYTEST_BENCHMARK_JSON RESULT_JSON`.

Median milliseconds of every measurement, and within a group the others' over ours.
"""

import json
import os
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "imagecodecs",
    "numpy",
    "pillow",
    "pydicom",
    "pylibjpeg",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "transformers",
)


def ratios(measured: dict) -> dict:
    """Groups of `pytest-benchmark`'s JSON with their medians and ratios; who and where is left out."""
    groups: dict[str, dict[str, dict]] = defaultdict(dict)
    for entry in measured["benchmarks"]:
        name = entry["name"].rpartition("[")[2].rstrip("]") if "[" in entry["name"] else entry["name"]
        parts = [part for part in name.split("-") if part in ("cxr_triton", "pydicom")]
        who = parts[0] if parts else ("cxr_triton" if not entry["name"].endswith("transformers") else "transformers")
        stats = entry["stats"]
        groups[entry["group"]][who] = {
            "median_ms": round(1e3 * stats["median"], 4),
            "min_ms": round(1e3 * stats["min"], 4),
            "iqr_ms": round(1e3 * stats["iqr"], 4),
            "rounds": stats["rounds"],
        }
    table = {}
    for group, rows in groups.items():
        ours = rows.get("cxr_triton")
        table[group] = dict(rows)
        for who, row in rows.items():
            if ours and who != "cxr_triton":
                table[group][f"ratio_to_{who}"] = round(row["median_ms"] / ours["median_ms"], 2)
    return {
        "schema": 1,
        "date": measured["datetime"],
        "cpu": measured["machine_info"]["cpu"].get("brand_raw"),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "groups": table,
    }


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    result = ratios(json.loads(source.read_text()))
    target.write_text(json.dumps(result, indent=1) + "\n")
    for group, rows in result["groups"].items():
        ours = rows.get("cxr_triton", {}).get("median_ms")
        told = ", ".join(f"{key.removeprefix('ratio_to_')} {value} x" for key, value in rows.items() if "ratio" in key)
        print(f"{group}: {ours} ms{f'; {told} as long' if told else ''}")
