"""A result cut to a record for docs/results: `python tests/bench/record.py RESULT_JSON RECORD_JSON`.

It keeps what pages cite and `bench compare` reads: of a repeat what its scenario is about, of the sweep the means, of a
number five digits. Single requests, counters and the workload's items are what `cxr-triton bench run` makes again.
"""

import json
import sys
from pathlib import Path

from cxr_triton.perf.compare import METRICS


def record(result: dict) -> dict:
    """`result` as docs/bench.schema.json has it; of another record the numbers are rounded."""
    for scenario in result.get("scenarios", ()):
        for point in scenario["points"]:
            summaries = [deciding(repeat["summary"], METRICS[scenario["name"]]) for repeat in point["repeats"]]
            point["repeats"] = [{"summary": summary, "requests": {"end_s": []}} for summary in summaries]
    for point in result.get("sweep", ()):
        point["repeats"] = []
        point["summary"] = {name: {"mean": interval["mean"]} for name, interval in point["summary"].items()}
    if "workload" in result:
        result["workload"]["items"] = []
    return rounded(result)


def deciding(summary: dict, metrics: tuple[str, ...]) -> dict:
    """What `bench compare` tests, and what failed."""
    kept = {"failed": summary["failed"]}
    for name, _, statistic in (metric.partition(".") for metric in metrics):
        kept[name] = {statistic: summary[name][statistic]} if statistic else summary[name]
    return kept


def rounded(value):
    """Numbers to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(of) for key, of in value.items()}
    return [rounded(of) for of in value] if isinstance(value, list) else value


def text(value, indent: str = "") -> str:
    """JSON in which whatever fits stands on one line."""
    short = json.dumps(value, ensure_ascii=False)
    if len(indent + short) <= 300 or not isinstance(value, dict | list):
        return short
    inner = indent + " "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {text(of, inner)}" for key, of in value.items()]
    else:
        lines = [inner + text(of, inner) for of in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    joined = ",\n".join(lines)
    return f"{start}\n{joined}\n{indent}{end}"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(text(record(json.loads(source.read_text("utf-8")))) + "\n", "utf-8")
