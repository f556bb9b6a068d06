"""Benchmark results for people and spreadsheets: one self-contained HTML page, and CSV.

The page has no script, no font and no request to anywhere; its charts are inline SVG. It takes results as
docs/bench.schema.json describes them.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from cxr_triton.cli import printable
from cxr_triton.client.page import NOT_FOR_DIAGNOSIS, document
from cxr_triton.numbers import change, duration, glued, moment, number, percent, shortest

STAGES = ("image_decode", "preprocess", "vision", "queue", "prefill", "decode", "report", "transport")
TIMELINE_REQUESTS = 48
_WIDTH, _HEIGHT = 440, 260  # of a chart, in units that are pixels on a desktop
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 22, 46
_LETTER = 6.4  # width of one at 11 px, and a part of the space between two labels
_DISTRIBUTIONS = {"latency_ms": "End-to-end latency", "ttft_ms": "Time to first text", "itl_ms": "Time per token"}


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
    model, workload, machine = result["model"], result["workload"], result["environment"]
    title = f"{model.get('title') or model['profile']}: {workload['name']}"
    subtitle = f"{model['engine']}, {model['precision']} · {machine['cpu']}, {machine['cores']} cores"
    gpus = ", ".join(str(gpu.get("name", "GPU")) for gpu in machine["gpus"])
    sections = [
        _comparison(comparison) if comparison else "",
        _baselines(result["baselines"]),
        _scenarios(result["scenarios"]),
        _curve(result, other),
        _bands(result),
        _waterfalls(result),
        _timeline(result),
        _roofline(result["roofline"]),
        _cross_check(result.get("cross_check", [])),
        _facts(result),
    ]
    made = glued(moment(result["created"]))
    return _page(title, f"{subtitle}{f', {gpus}' if gpus else ''} · {made}", result["notice"], sections)


def history_page(results: Sequence[Mapping]) -> str:
    """HTML of results over time, oldest first: each scenario's own number, and output tokens per second."""
    series: dict[str, list[tuple[int, float]]] = {}
    units: dict[str, str] = {}
    for index, result in enumerate(results):
        for name, metric, value in headline(result):
            series.setdefault(f"{name}: {metric}", []).append((index, value))
            units[f"{name}: {metric}"] = metric
    charts = ""
    for name, values in series.items():
        chart = _Chart(
            [index for index, _ in values], [0, *(value for _, value in values)], "run", units[name], x_ticks=False
        )
        chart.line(values, "one", dots=True)
        charts += _figure(name, chart.svg())
    header = ("run", "created", "revision", "model", "engine", "workload", *series)
    rows = []
    for index, result in enumerate(results):
        told = {name: dict(values).get(index) for name, values in series.items()}
        model = result["model"]
        rows.append(
            (
                index,
                moment(result["created"]),
                result["environment"]["revision"],
                model.get("title") or model["profile"],
                f"{model['engine']} {model['precision']}",
                f"{result['workload']['name']} v{result['workload']['version']}",
                *(_told(units[name], value) for name, value in told.items()),
            )
        )
    sections = [_section("Over time", f'<div class="charts">{charts}</div>'), _section("Runs", _table(header, rows))]
    notice = results[-1]["notice"] if results else ""
    return _page("Benchmark history", f"{len(results)} runs", notice, sections)


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
    return f"{_digits(load['value'])}/s" if load["kind"] == "rate_per_s" else _streams(load["value"])


def _digits(rate: float) -> str:
    """Three digits without noughts at the end: loads are often chosen."""
    return shortest(float(f"{rate:.3g}"))


def _streams(count: float) -> str:
    return "1 stream" if count == 1 else f"{number(count)} streams"


def _told(metric: str, value: float | None) -> str:
    """A value of a metric, with the unit that the metric's name says."""
    return duration(value) if value is not None and re.search(r"_ms\b", metric) else number(value)


def _baselines(baselines: Sequence[Mapping]) -> str:
    if not baselines:
        return ""
    most = max([entry["ratio_output_tokens_per_s"] or 0.0 for entry in baselines] + [1.0])
    bars = []
    for entry in baselines:
        ratio = entry["ratio_output_tokens_per_s"]
        told = f"{number(ratio)} ×" if ratio is not None else entry.get("why", "not measured")
        bars.append((entry["name"], 0.0, (ratio or 0.0) / most, told))
    keys = [key for key in dict.fromkeys(key for entry in baselines for key in entry) if key not in ("rounds", "name")]
    scalar = [key for key in keys if not any(isinstance(entry.get(key), list | Mapping) for entry in baselines)]
    table = _table(("name", *scalar), [(e["name"], *(number(e.get(key)) for key in scalar)) for e in baselines])
    words = "Output tokens per second of this server divided by each baseline's: same run, images, prompts and lengths."
    body = f"<p>{words}</p>{_bars(bars)}<details><summary>numbers</summary>{table}</details>"
    return _section("Beside what one would use instead", body)


def _scenarios(scenarios: Sequence[Mapping]) -> str:
    header = (
        "scenario", "load", "metric", "value", "95 % interval", "TTFT p50, p99", "token p50", "tokens/s", "readings/s",
        "kept bounds", "failed", "verdict",
    )  # fmt: skip
    rows = []
    for scenario in scenarios:
        for i, point in enumerate(scenario["points"]):
            summary, result = point["summary"], scenario["result"]
            is_last = i == len(scenario["points"]) - 1
            metric, ends = scenario["metric"], (result["low"], result["high"])
            low_high = " to ".join(_told(metric, end) for end in ends) if result["low"] is not None else "—"
            failed = sum(sum(repeat["summary"]["failed"].values()) for repeat in point["repeats"])
            rows.append(
                (
                    scenario["name"],
                    _load(point),
                    metric if is_last else "",
                    _told(metric, result["value"]) if is_last else "",
                    low_high if is_last else "",
                    ", ".join(_ms(summary.get(f"ttft_ms.{p}")) for p in ("p50", "p99")),
                    _ms(summary.get("itl_ms.p50")),
                    number(_mean(summary.get("output_tokens_per_s"))),
                    number(_mean(summary.get("readings_per_s"))),
                    _share(summary.get("goodput_share")) if scenario["bounds"] else "no bounds",
                    failed,
                    ("valid" if result["valid"] else f"not valid: {result['why']}") if is_last else "",
                )
            )
    return _section("Scenarios", _table(header, rows)) if rows else ""


def _mean(interval: Mapping | None) -> float | None:
    return interval["mean"] if interval else None


def _ms(interval: Mapping | None) -> str:
    mean = _mean(interval)
    return "—" if mean is None else duration(mean)


def _share(interval: Mapping | None) -> str:
    mean = _mean(interval)
    return "—" if mean is None else percent(mean)


def _curve(result: Mapping, other: Mapping | None) -> str:
    """Latency over throughput; only the loads of a sweep are joined, because those of scenarios are no series."""
    drawn = [("this run", result)] + ([("earlier run", other)] if other else [])
    lines = []
    for (name, each), color in zip(drawn, ("one", "two"), strict=False):
        points = sorted(_swept(each), key=lambda point: point["load"]["value"])
        for p, style in (("p50", ""), ("p99", "dashed")):
            known = [
                (
                    _mean(point["summary"]["output_tokens_per_s"]),
                    _mean(point["summary"].get(f"latency_ms.{p}")),
                    _load(point),
                )
                for point in points
            ]
            known = [entry for entry in known if entry[0] and entry[1]]
            if known:
                lines.append((f"{name}, {p}", known, color, style, bool(each["sweep"])))
    if not lines:
        return ""
    scale, unit = _time_unit([y for _, known, *_ in lines for _, y, _ in known])
    chart = _Chart(
        [0, *(x for _, known, *_ in lines for x, _, _ in known)],
        [0, *(scale * y for _, known, *_ in lines for _, y, _ in known)],
        "output tokens/s",
        f"latency, {unit}",
    )
    for name, known, color, style, is_series in lines:
        points, titles = [(x, scale * y) for x, y, _ in known], [f"{name}: {load}" for _, _, load in known]
        chart.line(points, color, style, is_drawn=is_series, dots=True, titles=titles)
    key = _key([(name, f"{color} {style}") for name, _, color, style, _ in lines])
    return _section(
        "Latency and throughput", f'<div class="charts">{_figure("Each dot is a load", chart.svg(), key)}</div>'
    )


def _time_unit(times_ms: Sequence[float]) -> tuple[float, str]:
    """What milliseconds are multiplied by for an axis, and the name of the unit that they are in then."""
    return (1e-3, "s") if max(times_ms) >= 10_000 else (1.0, "ms")


def _bands(result: Mapping) -> str:
    points, charts = _swept(result), ""
    for metric, name in _DISTRIBUTIONS.items():
        known = [
            (index, point, [_mean(point["summary"].get(f"{metric}.{p}")) for p in ("p50", "p90", "p99")])
            for index, point in enumerate(points)
        ]
        known = [entry for entry in known if None not in entry[2]]
        if not known:
            continue
        labels = {index: _load(point) for index, point, _ in known}
        scale, unit = _time_unit([v for _, _, values in known for v in values])
        highest = scale * max(v for _, _, values in known for v in values)
        chart = _Chart([-0.5, len(points) - 0.5], [0, highest], "", unit, x_labels=labels)
        for x, _, values in known:
            p50, p90, p99 = (scale * value for value in values)
            for high, color in ((p99, "one faint"), (p90, "one")):
                chart.area([(x - 0.3, p50, high), (x + 0.3, p50, high)], color)
            chart.line([(x - 0.3, p50), (x + 0.3, p50)], "one")
        charts += _figure(
            name, chart.svg(), _key([("p50", "one"), ("to p90", "one area"), ("to p99", "one faint area")])
        )
    return _section("Percentiles over load", f'<div class="charts">{charts}</div>') if charts else ""


def _waterfalls(result: Mapping) -> str:
    blocks = ""
    for name, point in _points(result):
        fall = point["waterfall"]
        if not fall or name == "sweep":
            continue
        total, at, bars = max(fall["end_to_end_ms"], 1e-6), 0.0, []
        for stage in (*STAGES, *(stage for stage in fall["stages_ms"] if stage not in STAGES)):
            if stage in fall["stages_ms"]:
                ms = fall["stages_ms"][stage]
                told = f"{duration(ms)} · {percent(ms / total)}"
                bars.append((_name(stage), at / total, ms / total, told))
                at += ms
        adds = "adds up" if fall["adds_up"] else "does not add up"
        words = f"{glued(duration(fall['end_to_end_ms']))} sent to last response; "
        words += f"remainder {glued(percent(fall['remainder_share']))}, {adds}"
        per_token = fall["decode_ms_per_token"]
        if per_token is not None:
            words += f"; {glued(duration(per_token))} of decode per token"
        blocks += f"<h3>{_text(name)}, {_text(_load(point))}</h3><p>{words}</p>{_bars(bars)}"
    return _section("Where the time goes: the mean request", blocks) if blocks else ""


def _timeline(result: Mapping) -> str:
    charts = ""
    for scenario in result["scenarios"]:
        requests = scenario["points"][-1]["repeats"][0]["requests"]
        count = min(len(requests["end_s"]), TIMELINE_REQUESTS)
        if not count:
            continue
        chart = _Chart([0, max(requests["end_s"][:count])], [0, count], "seconds", "request", y_ticks=False)
        for i in range(count):
            due, sent, end = (requests[key][i] for key in ("scheduled_s", "sent_s", "end_s"))
            first = requests["first_s"][i] if requests["first_s"][i] is not None else end
            y, failed = count - 1 - i, requests["status"][i].isupper()
            title = f"{requests['status'][i]}, {requests['tokens'][i]} tokens, {end - due:.3f} s"
            chart.bar(due, sent, y, "wait", title)
            chart.bar(sent, first, y, "two", title)
            chart.bar(first, end, y, "bad" if failed else "one", title)
        key = _key(
            [
                ("due, not sent", "wait bar"),
                ("to first text", "two bar"),
                ("text", "one bar"),
                ("failed", "bad bar"),
            ]
        )
        charts += _figure(f"{scenario['name']}, {_load(scenario['points'][-1])}", chart.svg(), key)
    words = f"<p>The first {TIMELINE_REQUESTS} requests of a repeat.</p>"
    return _section("Timeline", f'{words}<div class="charts">{charts}</div>') if charts else ""


def _roofline(rows: Sequence[Mapping]) -> str:
    """Share of the least possible time; stages with arithmetic also over their intensity."""
    if not rows:
        return ""
    bars = []
    for row in rows:
        bars.append((_name(row["stage"]), 0.0, row["share"], speed(row)))
    return _section(
        "Distance to the hardware",
        "<p>The least time that the stage's bytes, or its operations, need on this machine over the time it took. "
        "Ceilings were measured in the same run: a large copy, and a large matrix product.</p>"
        f'{_bars(bars)}<div class="charts">{_roofline_chart(rows)}</div>',
    )


def _roofline_chart(rows: Sequence[Mapping]) -> str:
    computed = [row for row in rows if row["flops"]]
    copies = [row["ceiling"]["gb_per_s"] for row in rows if "gb_per_s" in row["ceiling"]]
    if not computed or not copies:
        return ""
    gemms = {row["ceiling"]["kind"]: row["ceiling"]["tflop_per_s"] for row in rows if "tflop_per_s" in row["ceiling"]}
    intensity = [row["flops"] / row["bytes"] for row in computed]
    top = max([*gemms.values(), *(row["tflop_per_s"] for row in computed)])
    low, high = min(intensity) / 3, max([*intensity, top * 1e3 / copies[0]]) * 3
    chart = _Chart(
        [low, high], [min(row["tflop_per_s"] for row in computed) / 3, top * 2], "FLOP per byte", "TFLOP/s", is_log=True
    )
    knee = top * 1e3 / copies[0]
    chart.line([(low, low * copies[0] / 1e3), (knee, top)], "soft", "dashed")
    for kind, speed in gemms.items():
        chart.line([(speed * 1e3 / copies[0], speed), (high, speed)], "soft", "dashed", titles=[kind] * 2)
    for row, x in sorted(zip(computed, intensity, strict=True), key=lambda each: -each[0]["tflop_per_s"]):
        chart.dot(x, row["tflop_per_s"], "one", _name(row["stage"]))
    return _figure(
        "Roofline", chart.svg(), _key([("stage", "one"), ("copy and matrix product, measured", "soft dashed")])
    )


def _cross_check(checks: Sequence[Mapping]) -> str:
    rows = [
        (
            _streams(check["concurrency"]),
            check["metric"],
            f"{check['a']}: {_told(check['metric'], check['a_value'])}",
            f"{check['b']}: {_told(check['metric'], check['b_value'])}",
            change(check["relative_difference"]),
        )
        for check in checks
    ]
    return _section("Two clients on one load", _table(("load", "metric", "a", "b", "a / b − 1"), rows)) if rows else ""


def _comparison(comparison: Mapping) -> str:
    rows = [
        (
            f"{each['scenario']}, {each['load']}",
            each["metric"],
            _told(each["metric"], each["a"]),
            _told(each["metric"], each["b"]),
            change(each["change"]),
            "< 0.001" if each["p"] < 0.0005 else f"{each['p']:.3f}",
            each["verdict"],
        )
        for each in comparison["metrics"]
    ]
    header = ("load", "metric", "before", "now", "change", "p", "verdict")
    return _section(f"Against the earlier run: {comparison['verdict']}", _table(header, rows))


def _facts(result: Mapping) -> str:
    machine, server, workload = result["environment"], result["server"], result["workload"]
    pairs = [
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
    images = []
    for index, item in enumerate(workload["items"]):
        for image in item["images"]:
            size = f"{image.get('rows')} × {image.get('columns')}" if image.get("rows") else "—"
            facts = image.get("syntax"), image.get("bits_stored"), number(image["bytes"])
            images.append((index, image["name"], size, *facts))
    table = _table(("request", "image", "rows × columns", "syntax", "bits", "bytes"), images)
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs)
    body = f'<dl class="pairs">{rows}</dl><details><summary>images</summary>{table}</details>'
    return _section("What was measured", body)


# ------------------------------------------------------------------------------------------------------------- charts


class _Chart:
    """Axes over the range of all values, and marks on them."""

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        x_name: str,
        y_name: str,
        *,
        is_log: bool = False,
        x_ticks: bool = True,
        y_ticks: bool = True,
        x_labels: Mapping[float, str] | None = None,
    ):
        self._is_log = is_log
        ends = [(min(values), max(values)) for values in (xs, ys)]
        (self._x, self._y) = (tuple(map(math.log10, end)) if is_log else _widen(*end) for end in ends)
        self._marks: list[str] = []
        self._labels: list[tuple[float, float, float]] = []
        for kind, (low, high), wanted in (("x", self._x, x_ticks), ("y", self._y, y_ticks)):
            labels = x_labels if kind == "x" and x_labels else None
            at = labels or ({tick: shortest(10**tick if is_log else tick) for tick in _ticks(low, high, is_log)})
            rows = _rows(labels) if labels else 1
            for i, (tick, label) in enumerate(at.items() if wanted else ()):
                self._tick(kind, tick, label, i % rows)
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        self._marks.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
        self._marks.append(f'<text class="name" x="{right}" y="{_HEIGHT - 6}" text-anchor="end">{_text(x_name)}</text>')
        self._marks.append(f'<text class="name" x="2" y="{_TOP - 11}">{_text(y_name)}</text>')

    def _scale(self, kind: str, value: float, is_scaled: bool = False) -> float:
        low, high = self._x if kind == "x" else self._y
        value = math.log10(value) if self._is_log and not is_scaled else value
        share = (value - low) / ((high - low) or 1.0)
        if kind == "x":
            return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def _tick(self, kind: str, tick: float, label: str, row: int) -> None:
        at = self._scale(kind, tick, is_scaled=True)
        if kind == "x":
            y = _HEIGHT - _BOTTOM + 15 + 12 * row
            text = f'<text x="{at:.1f}" y="{y}" text-anchor="middle">{_text(label)}</text>'
        else:
            text = f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>'
            text += f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_text(label)}</text>'
        self._marks.append(text)

    def _point(self, x: float, y: float) -> str:
        return f"{self._scale('x', x):.1f} {self._scale('y', y):.1f}"

    def line(
        self,
        points: Sequence[tuple[float, float]],
        color: str,
        style: str = "",
        *,
        is_drawn: bool = True,
        dots: bool = False,
        titles: Sequence[str] = (),
    ) -> None:
        if is_drawn:
            path = "L".join(self._point(x, y) for x, y in points)
            self._marks.append(f'<path class="line {color} {style}" d="M{path}"/>')
        for i, (x, y) in enumerate(points) if dots else ():
            self.dot(x, y, f"{color} {style}", f"{titles[i]}, " if titles else "", is_labelled=False)

    def dot(self, x: float, y: float, color: str, label: str, *, is_labelled: bool = True) -> None:
        at = f'cx="{self._scale("x", x):.1f}" cy="{self._scale("y", y):.1f}"'
        title = f"<title>{_text(label)}{' ' if is_labelled else ''}{number(x)}, {number(y)}</title>"
        self._marks.append(f'<circle class="dot {color}" {at} r="3.5">{title}</circle>')
        if is_labelled:
            left = self._scale("x", x) > _WIDTH * 0.65
            x_text, end = self._scale("x", x) + (-7 if left else 7), "end" if left else "start"
            y_text = self._scale("y", y) + 4
            width = _LETTER * len(label)
            while any(abs(x_text - other) < width + wide and abs(y_text - at) < 12 for other, at, wide in self._labels):
                y_text += 1
            self._labels.append((x_text, y_text, width))
            self._marks.append(f'<text x="{x_text:.1f}" y="{y_text:.1f}" text-anchor="{end}">{_text(label)}</text>')

    def area(self, points: Sequence[tuple[float, float, float]], color: str) -> None:
        """Between a lower and an upper value at each x."""
        up = "L".join(self._point(x, high) for x, _, high in points)
        down = "L".join(self._point(x, low) for x, low, _ in reversed(points))
        self._marks.append(f'<path class="area {color}" d="M{up}L{down}Z"/>')

    def bar(self, begin: float, end: float, y: float, color: str, title: str) -> None:
        left, right = self._scale("x", begin), self._scale("x", end)
        top, bottom = self._scale("y", y + 0.86), self._scale("y", y + 0.14)
        size = f'width="{max(right - left, 0.3):.2f}" height="{bottom - top:.2f}"'
        self._marks.append(
            f'<rect class="area {color}" x="{left:.2f}" y="{top:.2f}" {size}><title>{_text(title)}</title></rect>'
        )

    def svg(self) -> str:
        return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(self._marks)}</svg>'


def _rows(labels: Mapping[float, str]) -> int:
    """In how many lines labels have to stand in turn so that none runs into another; they are that many or fewer."""
    room = (_WIDTH - _LEFT - _RIGHT) / len(labels)
    return min(math.ceil(_LETTER * max(map(len, labels.values())) / room), len(labels), 3)


def _widen(low: float, high: float) -> tuple[float, float]:
    return (low, high * 1.06) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Four or so round numbers, or whole powers of ten."""
    if is_log:
        return [float(power) for power in range(math.ceil(low), math.floor(high) + 1)]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


# --------------------------------------------------------------------------------------------------------------- HTML


def _name(stage: str) -> str:
    return stage.replace("_", " ")


def _listed(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _text(value: object) -> str:
    """Anything from a server or a file, harmless in HTML."""
    return escape(printable(str("—" if value is None else value)))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>"


def _figure(title: str, svg: str, key: str = "") -> str:
    return f"<figure><figcaption>{_text(title)}</figcaption>{svg}{key}</figure>"


def _key(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><b class="{style}"></b>{_text(name)}</li>' for name, style in entries)
    return f'<ul class="key">{items}</ul>'


def _bars(rows: Iterable[tuple[str, float, float, str]]) -> str:
    """Name, begin and length as shares of the width, and what is said beside the bar."""
    body = ""
    for name, begin, length, told in rows:
        width = 100 * min(max(length, 0.003), 1.0)
        left = min(max(100 * begin, 0.0), 100 - width)
        bar = f'<i style="margin-left:{left:.2f}%;width:{width:.2f}%"></i>'
        body += f"<div><dt>{_text(name)}</dt><dd>{bar}</dd><dd>{_text(told)}</dd></div>"
    return f'<dl class="bars">{body}</dl>'


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{_text(value)}</td>' for value in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _page(title: str, subtitle: str, notice: str, sections: Sequence[str]) -> str:
    body = f"""\
<header>
<h1>{_text(title)}</h1>
<p>{_text(subtitle)}</p>
</header>
<aside role="note"><strong>{_text(NOT_FOR_DIAGNOSIS)}</strong> {_text(notice)}</aside>
<main>
{"".join(sections)}
</main>
"""
    return document(title, _STYLE, body)


_STYLE = """
:root {
  --page: #f4f5f6; --card: #fff; --ink: #16191d; --soft: #5c6670; --line: #dde1e5; --one: #2f74b5; --two: #c9772b;
  --bad: #b3382c; --wait: #b9c1c9; --notice: #7a4b00; --notice-bg: #fff2d6; --notice-line: #eac071;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1114; --card: #171b20; --ink: #e6e9ec; --soft: #97a2ad; --line: #2a3138; --one: #5da2e0; --two: #e39a55;
    --bad: #f0796c; --wait: #4a545e; --notice: #ffd58a; --notice-bg: #2f2410; --notice-line: #6b4f1a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1280px; padding: 16px 20px 40px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 1.35rem; font-weight: 650; margin: 0; line-height: 1.25; overflow-wrap: anywhere; }
h2 {
  font-size: .78rem; font-weight: 650; text-transform: uppercase; letter-spacing: .07em; color: var(--soft);
  margin: 0 0 12px;
}
h3 { font-size: .95rem; font-weight: 620; margin: 16px 0 2px; }
p { margin: 0 0 .8em; color: var(--soft); overflow-wrap: anywhere; }
header p { margin: 4px 0 12px; }
aside {
  background: var(--notice-bg); color: var(--notice); border: 1px solid var(--notice-line); border-radius: 8px;
  padding: 8px 14px; font-size: .92rem; margin-bottom: 16px;
}
main { display: grid; grid-template-columns: minmax(0, 1fr); gap: 16px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 16px; }
figure { margin: 0; min-width: 0; max-width: 480px; }
figcaption { font-weight: 600; font-size: .9rem; margin-bottom: 4px; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); }
svg text { paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg .name { font-size: 11px; fill: var(--ink); }
.axis { fill: none; stroke: var(--soft); stroke-width: 1; }
.grid { fill: none; stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke-width: 2; }
.dashed { stroke-dasharray: 5 4; }
.line.one { stroke: var(--one); } .line.two { stroke: var(--two); } .line.soft { stroke: var(--soft); }
.dot.one, .area.one { fill: var(--one); } .dot.two, .area.two { fill: var(--two); }
.dot.dashed { fill: var(--card); stroke-width: 2; stroke-dasharray: none; }
.dot.dashed.one { stroke: var(--one); } .dot.dashed.two { stroke: var(--two); }
.area.bad { fill: var(--bad); } .area.wait { fill: var(--wait); }
path.area { fill-opacity: .34; } path.area.faint { fill-opacity: .16; }
.key {
  display: flex; flex-wrap: wrap; gap: 2px 14px; list-style: none; margin: 4px 0 0; padding: 0; font-size: .8rem;
}
.key li { color: var(--soft); }
.key b { display: inline-block; width: 16px; height: 3px; margin-right: 6px; vertical-align: middle; }
.key :is(.area, .bar) { height: 10px; }
.key .soft { background: var(--soft); } .key .one { background: var(--one); } .key .two { background: var(--two); }
.key .bad { background: var(--bad); } .key .wait { background: var(--wait); }
.key .dashed { mask: linear-gradient(90deg, #000 60%, transparent 0) 0 0 / 6px 100%; }
.key .one.area { opacity: .5; } .key .one.faint { opacity: .25; }
.bars {
  display: grid; grid-template-columns: max-content minmax(0, 1fr) max-content; gap: 5px 12px; margin: 0 0 12px;
  font-size: .9rem; align-items: center;
}
.bars div { display: contents; }
.bars dt { color: var(--soft); overflow-wrap: anywhere; }
.bars dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: 11px; border-radius: 2px; background: var(--one); }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--soft); text-align: left; vertical-align: bottom; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child td { border: 0; }
.pairs {
  display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; margin: 0 0 10px; font-size: .9rem;
}
.pairs dt { color: var(--soft); }
.pairs dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); }
footer { color: var(--soft); font-size: .82rem; margin-top: 14px; }
@media (max-width: 620px) {
  body { padding: 12px 10px 28px; }
  section { padding: 12px; }
  .bars { display: block; }
  .bars div { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; margin-bottom: 8px; }
  .bars dd { margin-left: auto; }
  .bars dd:first-of-type { order: 1; flex: 0 0 100%; }
  .pairs { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .pairs dd { margin-bottom: 6px; }
}
"""
