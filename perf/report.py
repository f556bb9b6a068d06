"""Benchmark results for people and spreadsheets: one self-contained HTML page, and CSV.

Takes results as docs/bench.schema.json describes them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cxr_triton.numbers import change, duration, glued, in_unit, moment, number, percent, shortest
from cxr_triton.page import render
from cxr_triton.page.plot import Plot, waterfall

TIMELINE_REQUESTS = 48
_DISTRIBUTIONS = {"latency_ms": "End-to-end latency", "ttft_ms": "Time to first text", "itl_ms": "Time per token"}

Chart = tuple[str, Plot, Sequence[tuple[str, str]]]
"""Title, plot, and (name, style) of what is in it."""


def flat(point: Mapping) -> dict[str, object]:
    """Load and driver of a point, for a table."""
    return {"driver": point["driver"], "load_kind": point["load"]["kind"], "load": point["load"]["value"]}


def to_csv(result: Mapping) -> str:
    """One row for each repeat of each load point, with every number of its summary."""
    rows = []
    for name, point in _points(result):
        for index, repeat in enumerate(point["repeats"]):
            row = {"created": result["created"], "scenario": name, **flat(point), "repeat": index}
            for key, value in repeat["summary"].items():
                if key == "failed":
                    row[key] = sum(value.values())
                elif isinstance(value, Mapping):
                    row |= {f"{key}.{part}": number for part, number in value.items()}
                else:
                    row[key] = value
            rows.append(row)
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


def result_page(result: Mapping, other: Mapping | None = None, comparison: Mapping | None = None) -> str:
    """HTML of a result.

    Parameters
    ----------
    result : mapping
        As docs/bench.schema.json describes it.
    other : mapping, optional
        An earlier result, drawn beside it.
    comparison : mapping, optional
        What `cxr_triton.perf.compare.compare` says of `other` and `result`.

    Returns
    -------
    str
        The whole page.
    """
    model, machine = result["model"], result["environment"]
    parts = [f"{model['engine']}, {model['precision']}", f"{machine['cpu']}, {machine['cores']} cores"]
    gpus = ", ".join(str(gpu.get("name", "GPU")) for gpu in machine["gpus"])
    subtitle = " · ".join(parts) + (f", {gpus}" if gpus else "") + f" · {glued(moment(result['created']))}"
    return render(
        "benchmark.html",
        title=f"{model.get('title') or model['profile']}: {result['workload']['name']}",
        subtitle=subtitle,
        notice=result["notice"],
        comparison=comparison,
        compared=[_compared(metric) for metric in comparison["metrics"]] if comparison else [],
        ratios=_ratios(result["baselines"]),
        baselines=_baselines(result["baselines"]),
        scenarios=[row for scenario in result["scenarios"] for row in _scenario(scenario)],
        curve=_curve(result, other),
        percentiles=_percentiles(_swept(result)),
        waterfalls=[
            _waterfall(name, point) for name, point in _points(result) if point["waterfall"] and name != "sweep"
        ],
        timelines=[chart for scenario in result["scenarios"] for chart in _timeline(scenario)],
        timeline_requests=TIMELINE_REQUESTS,
        speeds=[(_name(row["stage"]), 0.0, row["share"], speed(row)) for row in result["roofline"]],
        roofline=_roofline(result["roofline"]),
        cross_check=[_cross_checked(check) for check in result.get("cross_check", [])],
        facts=_facts(result),
        images=_images(result["workload"]),
    )


def history_page(results: Sequence[Mapping]) -> str:
    """HTML of results over time, oldest first: each scenario's own number, and output tokens per second."""
    runs, series = [], dict[tuple[str, str], list[tuple[float, float]]]()
    for index, result in enumerate(results):
        runs.append(_run(index, result))
        for name, metric, value in headline(result):
            series.setdefault((f"{name}: {metric}", metric), []).append((index, value))
    charts: list[Chart] = []
    for (name, metric), values in series.items():
        known = dict(values)
        plot = Plot(list(known), [0, *known.values()], "run", metric, x_ticks=())
        plot.line(values, "one")
        for index, run in enumerate(runs):
            run[_name(name)] = in_unit(metric, known.get(index))
            if index in known:
                plot.dot(index, known[index], "one", title=f"{index}, {number(known[index])}")
        charts.append((name, plot, ()))
    notice = results[-1]["notice"] if results else ""
    subtitle = f"{len(results)} runs"
    return render("history.html", title="Benchmark history", subtitle=subtitle, notice=notice, series=charts, runs=runs)


def speed(row: Mapping) -> str:
    """An entry of `roofline` in words."""
    told = f"{number(100 * row['share'])} % of the {row['ceiling']['kind']} · {number(row['gb_per_s'])} GB/s"
    return told + (f" · {number(row['tflop_per_s'])} TFLOP/s" if row["flops"] else "")


def extras(result: Mapping) -> list[str]:
    """Roofline and baselines of a result for a terminal."""
    lines = [f"{row['stage']}: {speed(row)}" for row in result["roofline"]]
    for entry in result["baselines"]:
        ratio = entry["ratio_output_tokens_per_s"]
        told = entry.get("why") if ratio is None else f"{number(ratio)} x its output tokens per second"
        lines.append(f"beside {entry['name']}: {told}")
    return lines


def headline(result: Mapping) -> list[tuple[str, str, float]]:
    """(scenario, metric, value) of each scenario's own number, and of its output tokens per second."""
    told = []
    for scenario in result["scenarios"]:
        if scenario["result"]["value"] is not None:
            told.append((scenario["name"], scenario["metric"], scenario["result"]["value"]))
        rate = scenario["points"][-1]["summary"]["output_tokens_per_s"]["mean"]
        if rate is not None:
            told.append((scenario["name"], "output_tokens_per_s", rate))
    return told


def _points(result: Mapping) -> Iterable[tuple[str, Mapping]]:
    for scenario in result["scenarios"]:
        for point in scenario["points"]:
            yield scenario["name"], point
    for point in result["sweep"]:
        yield "sweep", point


def _swept(result: Mapping) -> list[Mapping]:
    """Points of the sweep by our own driver; those of the scenarios where there was no sweep."""
    own = [point for point in result["sweep"] if point["driver"] == "open_loop"]
    return own or result["sweep"] or [point for _, point in _points(result)]


def _load(point: Mapping) -> str:
    load = point["load"]
    return f"{shortest(load['value'], 3)}/s" if load["kind"] == "rate_per_s" else _streams(load["value"])


def _streams(count: float) -> str:
    return "1 stream" if count == 1 else f"{number(count)} streams"


def _name(stage: str) -> str:
    return stage.replace("_", " ")


def _mean(point: Mapping, metric: str) -> float | None:
    return (point["summary"].get(metric) or {}).get("mean")


def _means(point: Mapping, *metrics: str) -> list[float] | None:
    """Of all these metrics; None where one is not known."""
    means = [mean for metric in metrics if (mean := _mean(point, metric)) is not None]
    return means if len(means) == len(metrics) else None


def _compared(metric: Mapping) -> dict[str, object]:
    return {
        "load": f"{metric['scenario']}, {metric['load']}",
        "metric": metric["metric"],
        "before": in_unit(metric["metric"], metric["a"]),
        "now": in_unit(metric["metric"], metric["b"]),
        "change": change(metric["change"]),
        "p": "< 0.001" if metric["p"] < 0.0005 else f"{metric['p']:.3f}",
        "verdict": metric["verdict"],
    }


def _ratios(baselines: Sequence[Mapping]) -> list[tuple[str, float, float, str]]:
    ratios = [entry["ratio_output_tokens_per_s"] for entry in baselines]
    most = max([1.0, *(ratio or 0.0 for ratio in ratios)])
    return [
        (
            entry["name"],
            0.0,
            (ratio or 0.0) / most,
            entry.get("why", "not measured") if ratio is None else f"{number(ratio)} ×",
        )
        for entry, ratio in zip(baselines, ratios, strict=True)
    ]


def _baselines(baselines: Sequence[Mapping]) -> list[dict[str, object]]:
    """What every entry says in one word or number."""
    keys = dict.fromkeys(key for entry in baselines for key in entry)
    scalar = [key for key in keys if not any(isinstance(entry.get(key), list | Mapping) for entry in baselines)]
    return [{key: number(entry.get(key)) for key in ("name", *scalar)} for entry in baselines]


def _scenario(scenario: Mapping) -> Iterable[dict[str, object]]:
    metric, result = scenario["metric"], scenario["result"]
    ends = " to ".join(in_unit(metric, end) for end in (result["low"], result["high"]))
    last = {
        "metric": metric,
        "value": in_unit(metric, result["value"]),
        "95 % interval": ends if result["low"] is not None else number(None),
        "verdict": "valid" if result["valid"] else f"not valid: {result['why']}",
    }
    for point in scenario["points"]:
        told = last if point is scenario["points"][-1] else dict.fromkeys(last, "")
        yield {
            "scenario": scenario["name"],
            "load": _load(point),
            **{key: told[key] for key in ("metric", "value", "95 % interval")},
            "TTFT p50, p99": ", ".join(duration(_mean(point, f"ttft_ms.{p}")) for p in ("p50", "p99")),
            "token p50": duration(_mean(point, "itl_ms.p50")),
            "tokens/s": number(_mean(point, "output_tokens_per_s")),
            "readings/s": number(_mean(point, "readings_per_s")),
            "kept bounds": percent(_mean(point, "goodput_share")) if scenario["bounds"] else "no bounds",
            "failed": sum(sum(repeat["summary"]["failed"].values()) for repeat in point["repeats"]),
            "verdict": told["verdict"],
        }


def _time_unit(times_ms: Iterable[float]) -> tuple[float, str]:
    """What milliseconds are multiplied by for an axis, and the name of the unit that they are in then."""
    return (1e-3, "s") if max(times_ms) >= 10_000 else (1.0, "ms")


def _curve(result: Mapping, other: Mapping | None) -> list[Chart]:
    """Latency over throughput; only the loads of a sweep are joined, because those of scenarios are no series."""
    lines = []
    for name, each, color in [("this run", result, "one")] + ([("earlier run", other, "two")] if other else []):
        points = sorted(_swept(each), key=lambda point: point["load"]["value"])
        for p, style in (("p50", color), ("p99", f"{color} dashed")):
            known = [(_load(point), _means(point, "output_tokens_per_s", f"latency_ms.{p}")) for point in points]
            marks = [(load, means[0], means[1]) for load, means in known if means and all(means)]
            if marks:
                lines.append((f"{name}, {p}", style, bool(each["sweep"]), marks))
    if not lines:
        return []
    dots = [dot for *_, marks in lines for dot in marks]
    scale, unit = _time_unit(y for _, _, y in dots)
    plot = Plot(
        [0, *(x for _, x, _ in dots)], [0, *(scale * y for *_, y in dots)], "output tokens/s", f"latency, {unit}"
    )
    for name, style, is_series, marks in lines:
        if is_series:
            plot.line([(x, scale * y) for _, x, y in marks], style)
        for load, x, y in marks:
            plot.dot(x, scale * y, style, title=f"{name}: {load}, {number(x)}, {number(scale * y)}")
    return [("Each dot is a load", plot, [(name, style) for name, style, *_ in lines])]


def _percentiles(points: Sequence[Mapping]) -> list[Chart]:
    charts: list[Chart] = []
    key = [("p50", "one"), ("to p90", "area one pale"), ("to p99", "area one faint")]
    for metric, name in _DISTRIBUTIONS.items():
        told = [
            (x, point, _means(point, *(f"{metric}.{p}" for p in ("p50", "p90", "p99"))))
            for x, point in enumerate(points)
        ]
        known = [(x, _load(point), means) for x, point, means in told if means]
        if not known:
            continue
        highest = max(max(means) for *_, means in known)
        scale, unit = _time_unit([highest])
        labels = [(x, load) for x, load, _ in known]
        plot = Plot([-0.5, len(points) - 0.5], [0, scale * highest], "", unit, x_ticks=labels)
        for x, _, means in known:
            p50, p90, p99 = (scale * mean for mean in means)
            plot.box(x - 0.3, x + 0.3, p50, p99, "one faint")
            plot.box(x - 0.3, x + 0.3, p50, p90, "one pale")
            plot.line([(x - 0.3, p50), (x + 0.3, p50)], "one")
        charts.append((name, plot, key))
    return charts


def _waterfall(name: str, point: Mapping) -> tuple[str, str, list[tuple[str, float, float, str]]]:
    fall = point["waterfall"]
    words = f"{glued(duration(fall['end_to_end_ms']))} sent to last response; "
    words += (
        f"remainder {glued(percent(fall['remainder_share']))}, {'adds up' if fall['adds_up'] else 'does not add up'}"
    )
    if fall["decode_ms_per_token"] is not None:
        words += f"; {glued(duration(fall['decode_ms_per_token']))} of decode per token"
    total = max(fall["end_to_end_ms"], 1e-6)
    stages = waterfall(fall["stages_ms"], total, lambda ms: f"{duration(ms)} · {percent(ms / total)}")
    return f"{name}, {_load(point)}", words, stages


def _timeline(scenario: Mapping) -> Iterable[Chart]:
    point = scenario["points"][-1]
    requests = point["repeats"][0]["requests"]
    count = min(len(requests["end_s"]), TIMELINE_REQUESTS)
    if not count:
        return
    plot = Plot([0, max(requests["end_s"][:count])], [0, count], "seconds", "request", y_ticks=())
    columns = ("scheduled_s", "sent_s", "first_s", "end_s", "status", "tokens")
    rows = zip(range(count), *(requests[column] for column in columns), strict=False)
    for i, due, sent, first, end, status, tokens in rows:
        title = f"{status}, {tokens} tokens, {end - due:.3f} s"
        text = end if first is None else first
        for begin, until, style in (
            (due, sent, "wait"),
            (sent, text, "two"),
            (text, end, "bad" if status.isupper() else "one"),
        ):
            plot.box(begin, until, count - 1 - i + 0.14, count - 1 - i + 0.86, style, title=title)
    key = [("due, not sent", "area wait"), ("to first text", "area two"), ("text", "area one"), ("failed", "area bad")]
    yield f"{scenario['name']}, {_load(point)}", plot, key


def _roofline(rows: Sequence[Mapping]) -> list[Chart]:
    """Stages with arithmetic over their intensity."""
    computed = [row for row in rows if row["flops"]]
    copies = [row["ceiling"]["gb_per_s"] for row in rows if "gb_per_s" in row["ceiling"]]
    if not computed or not copies:
        return []
    tb_per_s = copies[0] / 1e3
    gemms = {row["ceiling"]["tflop_per_s"] for row in rows if "tflop_per_s" in row["ceiling"]}
    intensity = [row["flops"] / row["bytes"] for row in computed]
    top = max([*gemms, *(row["tflop_per_s"] for row in computed)])
    low, high = min(intensity) / 3, max([*intensity, top / tb_per_s]) * 3
    ys = [min(row["tflop_per_s"] for row in computed) / 3, top * 2]
    plot = Plot([low, high], ys, "FLOP per byte", "TFLOP/s", is_log=True)
    plot.line([(low, low * tb_per_s), (top / tb_per_s, top)], "soft dashed")
    for gemm in sorted(gemms):
        plot.line([(gemm / tb_per_s, gemm), (high, gemm)], "soft dashed")
    for row, x in sorted(zip(computed, intensity, strict=True), key=lambda each: -each[0]["tflop_per_s"]):
        name, y = _name(row["stage"]), row["tflop_per_s"]
        plot.dot(x, y, "one", title=f"{name} {number(x)}, {number(y)}", label=name)
    return [("Roofline", plot, [("stage", "one"), ("copy and matrix product, measured", "soft dashed")])]


def _cross_checked(check: Mapping) -> dict[str, object]:
    return {
        "load": _streams(check["concurrency"]),
        "metric": check["metric"],
        "a": f"{check['a']}: {in_unit(check['metric'], check['a_value'])}",
        "b": f"{check['b']}: {in_unit(check['metric'], check['b_value'])}",
        "a / b − 1": change(check["relative_difference"]),
    }


def _facts(result: Mapping) -> list[tuple[str, str]]:
    machine, server, workload = result["environment"], result["server"], result["workload"]
    return [
        ("command", " ".join(result["command"])),
        ("model", ", ".join(f"{key} {_listed(value)}" for key, value in result["model"].items() if value)),
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.1f} GiB"),
        ("load before", number(machine["load_average"])),
        ("priority of the client", machine.get("client_priority", "normal")),
        ("taken by the hypervisor", percent(machine["stolen_share"]) if "stolen_share" in machine else "unknown"),
        ("system", f"{machine['os']}, Python {machine['python']}"),
        ("cxr-triton", f"{machine['package']}, revision {machine['revision'] or 'unknown'}"),
        ("versions", ", ".join(f"{key} {value}" for key, value in machine["versions"].items())),
        ("server", f"{server['name']} {server['version']}"),
        ("workload", f"{workload['name']} v{workload['version']}, seed {workload['seed']}, {workload['arrival']}"),
        ("workload digest", workload["digest"]),
    ]


def _run(index: int, result: Mapping) -> dict[str, object]:
    model, workload = result["model"], result["workload"]
    return {
        "run": index,
        "created": moment(result["created"]),
        "revision": result["environment"]["revision"],
        "model": model.get("title") or model["profile"],
        "engine": f"{model['engine']} {model['precision']}",
        "workload": f"{workload['name']} v{workload['version']}",
    }


def _images(workload: Mapping) -> list[dict[str, object]]:
    return [
        {
            "request": index,
            "image": image["name"],
            "rows × columns": f"{image['rows']} × {image.get('columns')}" if image.get("rows") else None,
            "syntax": image.get("syntax"),
            "bits": image.get("bits_stored"),
            "bytes": number(image["bytes"]),
        }
        for index, item in enumerate(workload["items"])
        for image in item["images"]
    ]


def _listed(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value
