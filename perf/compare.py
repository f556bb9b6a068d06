"""`cxr-triton bench compare` and `bench history`: two results held against each other, and a folder of them over time.

A difference counts where the repeats of the two runs show it: Welch's t-test of their means, one-sided in the direction
of the change and corrected for the number of metrics (Holm), and a change of a least size. What the machine did between
the two runs is in no repeat: runs that decide something belong side by side, on a quiet machine.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from cxr_triton.errors import InvalidRequest

SCHEMA_VERSION = 1
ALPHA = 0.05
MIN_CHANGE = 0.05
METRICS = {
    "single_stream": ("latency_ms.p90",),
    "offline": ("readings_per_s",),
    "server": ("latency_ms.p99",),
    "interactive": ("ttft_ms.p99", "itl_ms.p99"),
}
"""What each scenario is about; these decide."""


def load_result(path: Path) -> dict:
    """A benchmark result from its file.

    Raises
    ------
    InvalidRequest
        The file is not JSON, or no result of this schema.
    """
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{path.name} cannot be read as JSON ({error}); give what `bench run --json` wrote"
        ) from None
    version = result.get("schema_version") if isinstance(result, dict) else None
    if version != SCHEMA_VERSION or not isinstance(result.get("scenarios"), list):
        raise InvalidRequest(
            f"{path.name} has schema_version {version!r}, results have {SCHEMA_VERSION}; give what `bench run --json` "
            "wrote"
        )
    return result


def compare(a: Mapping, b: Mapping, *, alpha: float = ALPHA, min_change: float = MIN_CHANGE) -> dict:
    """Whether `b` is faster or slower than `a`.

    Parameters
    ----------
    a, b : mapping
        Results as docs/bench.schema.json describes them, of the same workload.
    alpha : float
        Probability of calling any metric changed, in the direction in which it moved, when nothing changed.
    min_change : float
        Least relative change of a mean that counts.

    Returns
    -------
    dict
        ``verdict``: ``worse`` if any metric is, else ``better`` if any is, else ``no difference shown``; ``metrics``:
        scenario, load, metric, a, b (means over repeats), change, p, verdict; ``differences`` of what ran where.

    Raises
    ------
    InvalidRequest
        The workloads differ, no load is in both, or one of them was run only once.
    """
    if a["workload"]["digest"] != b["workload"]["digest"]:
        raise InvalidRequest(
            f"the results are of different requests: workloads {a['workload']['name']!r} v{a['workload']['version']} "
            f"and {b['workload']['name']!r} v{b['workload']['version']} have different digests; run both with one"
        )
    metrics = list(_paired(a, b))
    if not metrics:
        raise InvalidRequest(
            "no scenario of the results has a load in common; run both with the same scenarios and rates"
        )
    for scenario, _, _, *values in metrics:
        if (fewest := min(map(len, values))) < 2:
            raise InvalidRequest(
                f"{scenario} ran {fewest} time in one of the results, a test needs 2 at least; run with --repeats 3"
            )
    told = [_tell(*metric) for metric in metrics]
    # Holm: the smallest p against alpha / m, the next against alpha / (m - 1), until one fails
    for rank, entry in enumerate(sorted(told, key=lambda entry: entry["p"])):
        if entry["p"] > alpha / (len(told) - rank):
            break
        if abs(entry["change"]) >= min_change:
            is_slower = (entry["change"] > 0) != entry["metric"].endswith("_per_s")
            entry["verdict"] = "worse" if is_slower else "better"
    verdicts = {entry["verdict"] for entry in told}
    verdict = next((name for name in ("worse", "better") if name in verdicts), "no difference shown")
    return {
        "schema_version": SCHEMA_VERSION,
        "a": identity(a),
        "b": identity(b),
        "alpha": alpha,
        "min_change": min_change,
        "differences": _differences(a, b),
        "metrics": told,
        "verdict": verdict,
    }


def _paired(a: Mapping, b: Mapping):
    """Scenario, load, metric and its values over the repeats of both, at the highest load that both have."""
    theirs = {scenario["name"]: scenario for scenario in b["scenarios"]}
    for scenario in a["scenarios"]:
        other = theirs.get(scenario["name"])
        if other is None:
            continue
        loads = {_load(point): point for point in other["points"]}
        common = [point for point in scenario["points"] if _load(point) in loads]
        if not common:
            continue
        mine = max(common, key=lambda point: point["load"]["value"])
        for metric in METRICS[scenario["name"]]:
            values = [_values(point, metric) for point in (mine, loads[_load(mine)])]
            if all(values):
                yield scenario["name"], _load(mine), metric, *values


def _load(point: Mapping) -> str:
    load = point["load"]
    if load["kind"] == "concurrency":
        return f"{point['driver']}, concurrency {load['value']:g}"
    return f"{point['driver']}, {load['value']:g}/s {load.get('arrival', '')}".strip()


def _values(point: Mapping, metric: str) -> list[float]:
    """One value a repeat; empty if any repeat has none."""
    name, _, statistic = metric.partition(".")
    found = [repeat["summary"][name] for repeat in point["repeats"]]
    found = [value[statistic] if statistic else value for value in found]
    return [] if None in found else found


def _tell(scenario: str, load: str, metric: str, x: Sequence[float], y: Sequence[float]) -> dict:
    import numpy as np
    from scipy.stats import ttest_ind

    means = [float(np.mean(values)) for values in (x, y)]
    change = means[1] / means[0] - 1 if means[0] else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # repeats without spread are dealt with below
        p = float(ttest_ind(y, x, equal_var=False, alternative="greater" if change > 0 else "less").pvalue)
    if math.isnan(p):
        p = 0.0 if change else 1.0
    return {
        "scenario": scenario,
        "load": load,
        "metric": metric,
        "a": means[0],
        "b": means[1],
        "change": change,
        "p": p,
        "repeats": [len(x), len(y)],
        "verdict": "no difference shown",
    }


def identity(result: Mapping) -> dict:
    """When a result was made, of which revision, and what was served."""
    model = result["model"]
    return {
        "created": result["created"],
        "revision": result["environment"]["revision"],
        "model": model.get("title") or model["profile"],
        "engine": model["engine"],
        "precision": model["precision"],
        "bundle": model["bundle"],
    }


def _differences(a: Mapping, b: Mapping) -> list[str]:
    """What else is not the same, so that a change is not put down to the wrong cause."""
    found: list[tuple] = []
    for part, keys in (
        (
            "environment",
            ("cpu", "cores", "memory_bytes", "os", "python", "package", "revision", "gpus", "client_priority"),
        ),
        ("model", ("profile", "engine", "precision", "bundle")),
        ("server", ("version",)),
    ):
        found += [(f"{part}.{key}", a[part].get(key), b[part].get(key)) for key in keys]
    ours, theirs = a["environment"]["versions"], b["environment"]["versions"]
    found += [(name, ours.get(name), theirs.get(name)) for name in sorted(ours.keys() | theirs.keys())]
    return [f"{name}: {x} and {y}" for name, x, y in found if x != y]


def history(folder: Path) -> list[dict]:
    """The results in a folder and below it, oldest first; other JSON files are left out.

    Raises
    ------
    InvalidRequest
        There is none.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            found.append(load_result(path) | {"file": path.name})
        except InvalidRequest:
            continue
    if not found:
        raise InvalidRequest(f"{folder} holds no benchmark result; write some there with `bench run --json`")
    return sorted(found, key=lambda result: result["created"])
