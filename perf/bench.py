"""A benchmark run: MLPerf's scenarios against a served `cxr_reader`, as one result (docs/bench.schema.json).

`single_stream`: one reading after the other; the 90th percentile of the latency. `offline`: everything at once;
readings per second. `server`: Poisson arrivals; the highest rate at which the 99th percentile of the latency keeps its
bound. `interactive`: the same with bounds for the first text and the time between tokens. Then a sweep over
concurrency, in which our driver and perf_analyzer take turns.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from cxr_triton.client import Reader, Timeouts
from cxr_triton.client.limits import NO_ACCESS, Access
from cxr_triton.errors import CxrError, InternalError, InvalidRequest, unknown_key
from cxr_triton.perf import perf_analyzer
from cxr_triton.perf.environment import Stolen, environment
from cxr_triton.perf.load import OVERLOAD, Load, offer, prompt_threads
from cxr_triton.perf.observer import MODEL, Observed, Observer
from cxr_triton.perf.perf_analyzer import PerfAnalyzer
from cxr_triton.perf.stages import waterfall
from cxr_triton.perf.summary import over_repeats
from cxr_triton.perf.workload import Workload

SCHEMA_VERSION = 1
METRICS = {"single_stream": "latency_ms.p90", "offline": "readings_per_s", "server": "rate_per_s"}
METRICS["interactive"] = METRICS["server"]
SCENARIOS = tuple(METRICS)
WIDTHS = (12, 10, 9, 9, 10, 9)
CHECKED = ("readings_per_s", "output_tokens_per_s", "latency_ms.p50", "latency_ms.p90", "ttft_ms.p50", "itl_ms.p50")
INTERRUPTED = "INTERRUPTED"
OFFERED_SHARES = (0.5, 0.7, 0.85)
"""Rates of `server` and `interactive` where none are given, in parts of what `offline` reached."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how often everything is measured.

    Attributes
    ----------
    scenarios : tuple of str
        Of `SCENARIOS`, and in their order.
    min_seconds, min_requests : float, int
        Both have to be reached by each repeat.
    repeats : int
        Of every point; with two or more there are confidence intervals.
    warm_up : int
        Requests before anything counts.
    offline_concurrency : int
        Requests under way in `offline`.
    rates_per_s : tuple of float
        For `server` and `interactive`, ascending; empty takes `OFFERED_SHARES`.
    concurrencies : tuple of int
        Of the sweep.
    latency_ms, ttft_ms, itl_ms : float
        Bounds of `server` (the first) and `interactive`.
    seed : int
        Of the arrivals.
    """

    scenarios: tuple[str, ...] = SCENARIOS
    min_seconds: float = 20.0
    min_requests: int = 20
    repeats: int = 3
    warm_up: int = 4
    offline_concurrency: int = 16
    rates_per_s: tuple[float, ...] = ()
    concurrencies: tuple[int, ...] = (1, 2, 4, 8)
    latency_ms: float = 12_000.0
    ttft_ms: float = 500.0
    itl_ms: float = 30.0
    seed: int = 0

    def __post_init__(self):
        for name in self.scenarios:
            if name not in SCENARIOS:
                raise InvalidRequest(unknown_key(name, SCENARIOS, "--scenario"))
        if list(self.rates_per_s) != sorted(self.rates_per_s) or min(self.rates_per_s, default=1) <= 0:
            raise InvalidRequest(f"rates {self.rates_per_s} have to be over 0 and ascend")
        for name in ("repeats", "min_requests", "warm_up", "offline_concurrency"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}, must be at least 1")

    @property
    def bounds(self) -> dict[str, dict[str, float]]:
        """Scenario to what its readings have to keep."""
        return {
            "server": {"latency_ms": self.latency_ms},
            "interactive": {"ttft_ms": self.ttft_ms, "itl_ms": self.itl_ms},
        }

    @property
    def runs(self) -> int:
        """Repeats in all, if no point is stopped."""
        rates = len(self.rates_per_s) or len(OFFERED_SHARES)
        points = sum(rates if METRICS[name] == "rate_per_s" else 1 for name in self.scenarios)
        return self.repeats * (points + len(self.concurrencies))


class Bench:
    """Runs a plan against one server.

    Parameters
    ----------
    workload : Workload
    plan : Plan
    observer : Observer
        Of a warm server.
    tool : PerfAnalyzer, optional
        Without it our driver sweeps alone.
    door : str and Access, optional
        Of the front door that the load goes through; the observer asks the server itself.
    timeout_s : float
        Limit of one request.
    on_run : callable
        Told about each repeat before it begins.
    """

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        observer: Observer,
        tool: PerfAnalyzer | None = None,
        *,
        door: tuple[str, Access] | None = None,
        timeout_s: float = 600.0,
        on_run: Callable[[str], None] = lambda what: None,
    ):
        self.workload, self.plan, self.observer, self.tool = workload, plan, observer, tool
        self.url, self._access = door or (observer.url, NO_ACCESS)
        self.timeout_s, self.on_run = timeout_s, on_run
        messages = [item.message(MODEL) for item in workload.items]
        self._offer = partial(offer, self.url, messages, timeout_s=timeout_s, access=self._access)
        self.ended_by: BaseException | None = None

    @contextlib.contextmanager
    def keeping(self, measured: Sized) -> Iterator[None]:
        """What ends the block ends the run, as `ended_by`; it is raised where nothing was measured yet."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if not measured:
                raise
            self.ended_by = error

    def run(self, command: Sequence[str]) -> dict:
        """Everything, as a result; what was measured until `ended_by`, if something ended it before its time.

        Raises
        ------
        CxrError, KeyboardInterrupt
            The first failure that is no overload, or Ctrl-C, before the first repeat had ended.
        """
        environment_, stolen = environment(), Stolen()
        with prompt_threads() as environment_["client_priority"]:
            pass  # asked only: each load has it for itself
        reading, server = self.warm_up()
        scenarios: list[dict] = []
        sweep: list[dict] = []
        try:
            self._measure(scenarios, sweep)
        except (Exception, KeyboardInterrupt) as error:
            if not scenarios and not sweep:
                raise
            self.ended_by = error
        workload = self.workload.as_json()
        self._count_prompts(workload, [*(p for s in scenarios for p in s["points"]), *sweep])
        return {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": list(command),
            "environment": {**environment_, "stolen_share": stolen.share()},
            "server": server,
            "workload": workload,
            "model": reading.model,
            "scenarios": scenarios,
            "sweep": sweep,
            "cross_check": cross_check(sweep),
            "roofline": [],
            "baselines": [],
            "notice": reading.notice,
            **ending(self.ended_by),
        }

    def _measure(self, scenarios: list[dict], sweep: list[dict]) -> None:
        """Fill both lists, until something ends the run."""
        for name in SCENARIOS:
            if name in self.plan.scenarios and not self.ended_by:
                scenarios.append(self.scenario(name, scenarios))
        for concurrency in self.plan.concurrencies:
            if not self.ended_by:
                sweep += self.sweep(concurrency)

    def warm_up(self):
        """A first reading, which names the model, and then what the plan wants; the reading, and the server."""
        item = self.workload.items[0]
        self.on_run("warm-up")
        observed = Observed(self.observer)
        timeouts = Timeouts(first_delta_s=None, idle_s=None, total_s=self.timeout_s)
        with Reader(self.url, timeouts=timeouts, max_message_mib=1024, **vars(self._access)) as reader:
            info = reader.server_info()
            reading = reader.read([image.data for image in item.images], **item.request).result()
        load = Load("concurrency", min(self.plan.warm_up, 4))
        records, failure = self._offer(load, min_seconds=0.0, min_requests=self.plan.warm_up, seed=0)
        if failure:
            raise failure
        observed.counted(1 + len(records))
        return reading, {"name": info.name, "version": info.version, "url": self.url, "models": {}}

    def scenario(self, name: str, before: Sequence[dict]) -> dict:
        """One entry of ``scenarios``; `before` are those that were measured already."""
        plan, bounds = self.plan, self.plan.bounds.get(name, {})
        if METRICS[name] == "rate_per_s":
            arrival = self.workload.spec.arrival
            loads = [Load("rate_per_s", rate, arrival) for rate in plan.rates_per_s or self._rates(before)]
        else:
            loads = [Load("concurrency", 1 if name == "single_stream" else plan.offline_concurrency)]
        points: list[dict] = []
        for load in loads:
            with self.keeping(points):
                points.append(self.point(name, load, bounds))
            if self.ended_by or (METRICS[name] == "rate_per_s" and not meets(points[-1], bounds)):
                break
        result = outcome(METRICS[name], points, bounds)
        if self.ended_by:
            why = "interrupted" if self._stopped == INTERRUPTED else f"ended by {self._stopped}"
            result |= {"valid": False, "why": why}
        return {
            "name": name,
            "driver": "open_loop",
            "bounds": bounds,
            "metric": METRICS[name],
            "points": points,
            "result": result,
        }

    def _rates(self, before: Sequence[dict]) -> list[float]:
        reached = next((s["result"]["value"] for s in before if s["name"] == "offline" and s["result"]["valid"]), None)
        if reached is None:
            raise InvalidRequest("no rates for server and interactive: give --rates, or measure offline too")
        return [float(f"{share * reached:.3g}") for share in OFFERED_SHARES]

    def point(self, name: str, load: Load, bounds: Mapping[str, float]) -> dict:
        """A load, `Plan.repeats` times by our driver."""
        runs: list = []
        stopped = None
        with self.keeping(runs):
            for repeat in range(self.plan.repeats):
                self.on_run(f"{name}, {load}")
                run, stopped = self._repeat(load, bounds, repeat)
                runs.append(run)
                if stopped:
                    break
        return point_of("open_loop", load, runs, stopped=self._stopped or stopped)

    def sweep(self, concurrency: int) -> list[dict]:
        """A concurrency by both drivers, turn by turn.

        Who goes first alternates: a machine that gets slower would favour the one that always does.
        """
        load, stopped, requests = Load("concurrency", concurrency), None, concurrency
        ours: list = []
        theirs: list = []
        with self.keeping(ours):
            for repeat in range(self.plan.repeats):
                self.on_run(f"sweep, {load}")
                if self.tool and repeat % 2:
                    theirs.append(self._perf_analyzer(self.tool, concurrency, requests))
                run, stopped = self._repeat(load, {}, repeat)
                ours.append(run)
                if stopped:
                    break
                requests = max(concurrency, math.ceil(run[0]["summary"]["readings_per_s"] * self.plan.min_seconds))
                if self.tool and not repeat % 2:
                    theirs.append(self._perf_analyzer(self.tool, concurrency, requests))
        points = [point_of("open_loop", load, ours, stopped=self._stopped or stopped)]
        if theirs:
            points.append(
                point_of("perf_analyzer", load, [run for run, _ in theirs], said=[said for _, said in theirs])
            )
        return points

    @property
    def _stopped(self) -> str | None:
        """``stopped`` of the point that was being measured when the run ended."""
        return ending(self.ended_by).get("error", {"code": INTERRUPTED})["code"] if self.ended_by else None

    def _repeat(self, load: Load, bounds: Mapping[str, float], repeat: int):
        """One repeat by our driver, and the code of the overload that ended it, if one did."""
        plan = self.plan
        seed = 1000 * plan.seed + repeat
        observed = Observed(self.observer)
        records, failure = self._offer(load, min_seconds=plan.min_seconds, min_requests=plan.min_requests, seed=seed)
        if failure and failure.code not in OVERLOAD:
            raise failure
        return (observed.repeat(records, bounds), records), failure.code if failure else None

    def _perf_analyzer(self, tool: PerfAnalyzer, concurrency: int, requests: int):
        """One repeat by perf_analyzer, and what it printed."""
        items = self.workload.items
        requests = min(max(requests, self.plan.min_requests), perf_analyzer.request_limit(items))
        observed = Observed(self.observer)
        records, said = perf_analyzer.run(
            tool,
            self.url,
            items,
            concurrency=concurrency,
            requests=requests,
            timeout_s=60 + math.ceil(requests / concurrency) * self.timeout_s,
            headers=self.observer.headers,
        )
        return (observed.repeat(records, {}), records), said

    @staticmethod
    def _count_prompts(workload: dict, points: Sequence[dict]) -> None:
        """Note how long the prompt of each item was, where it was read."""
        for point in points:
            for run in point["repeats"]:
                for index, tokens in zip(run["requests"]["item"], run["requests"]["prompt_tokens"], strict=True):
                    if index is not None and tokens is not None:
                        workload["items"][index]["prompt_tokens"] = tokens


def ending(error: BaseException | None) -> dict:
    """``interrupted`` or ``error`` of a result that something ended before its time."""
    if error is None:
        return {}
    if isinstance(error, KeyboardInterrupt):
        return {"interrupted": True}
    if not isinstance(error, CxrError):
        error = InternalError(f"{type(error).__name__}: {error}")
    return {"error": {"code": error.code, "message": error.message}}


def point_of(driver: str, load: Load, runs: Sequence, *, stopped: str | None = None, said: Sequence[dict] = ()) -> dict:
    """``point`` of the schema from its repeats, each with its records."""
    counted: dict[str, Counter] = {}
    for run, _ in runs:
        for model, numbers in run["triton"].items():
            counted.setdefault(model, Counter()).update(numbers)
    point = {
        "driver": driver,
        "load": load.as_json(),
        "repeats": [run for run, _ in runs],
        "summary": over_repeats([run["summary"] for run, _ in runs]),
        "waterfall": waterfall([record for _, records in runs for record in records], counted),
    }
    if stopped:
        point["stopped"] = stopped
    if said:
        latencies = {
            name: statistics.fmean(each["latency_ms"][name] for each in said) for name in said[0]["latency_ms"]
        }
        rates = [run["summary"]["requests"] / each["window_s"] for (run, _), each in zip(runs, said, strict=True)]
        point["perf_analyzer"] = {
            **said[0],
            "throughput_per_s": statistics.fmean(each["throughput_per_s"] for each in said),
            "window_s": statistics.fmean(each["window_s"] for each in said),
            "requests_per_window_s": statistics.fmean(rates),
            "latency_ms": latencies,
        }
    return point


def meets(point: Mapping, bounds: Mapping[str, float]) -> bool:
    """The 99th percentile of every bounded latency, meaned over the repeats, keeps its bound."""
    tails = {name: point["summary"][f"{name}.p99"]["mean"] for name in bounds}
    return "stopped" not in point and all(tails[name] is not None and tails[name] <= bounds[name] for name in bounds)


def outcome(metric: str, points: Sequence[Mapping], bounds: Mapping[str, float]) -> dict:
    """``result`` of a scenario."""
    if metric == "rate_per_s":
        kept = [point["load"]["value"] for point in points if meets(point, bounds)]
        said = ", ".join(f"p99 {name} {bound:g}" for name, bound in bounds.items())
        why = "" if kept else f"no rate kept its bounds ({said})"
        return {"value": max(kept, default=None), "low": None, "high": None, "valid": bool(kept), "why": why}
    (point,) = points
    measured, stopped = point["summary"][metric], point.get("stopped")
    why = f"stopped by {stopped}" if stopped else ""
    value, low, high = (measured[name] for name in ("mean", "low", "high"))
    return {"value": value, "low": low, "high": high, "valid": not stopped, "why": why}


def cross_check(sweep: Sequence[Mapping]) -> list[dict]:
    """Both drivers on the same load, and perf_analyzer's own numbers beside those of its export."""
    checks = []

    def check(at: float, metric: str, a: tuple[str, float], b: tuple[str, float]) -> None:
        named = {"concurrency": int(at), "metric": metric, "a": a[0], "b": b[0], "a_value": a[1], "b_value": b[1]}
        checks.append({**named, "relative_difference": a[1] / b[1] - 1})

    for theirs in (point for point in sweep if point["driver"] == "perf_analyzer"):
        at = theirs["load"]["value"]
        ours = next(p for p in sweep if p["driver"] == "open_loop" and p["load"]["value"] == at)
        printed, exported, measured = theirs["perf_analyzer"], theirs["summary"], ours["summary"]
        for name in ("mean", "p50", "p90", "p95", "p99"):
            value = exported[f"latency_ms.{name}"]["mean"]
            check(at, f"latency_ms.{name}", ("printed", printed["latency_ms"][name]), ("perf_analyzer", value))
        rate = printed["requests_per_window_s"]
        check(at, "requests in its window per s", ("printed", printed["throughput_per_s"]), ("perf_analyzer", rate))
        for name in CHECKED:
            check(at, name, ("open_loop", measured[name]["mean"]), ("perf_analyzer", exported[name]["mean"]))
    return checks


def served_models(repository: Path) -> dict[str, dict[str, str]]:
    """Parameters of each model of a repository: slots, threads and so on."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    models = {}
    for file in sorted(repository.glob("*/config.pbtxt")):
        config = text_format.Parse(file.read_text(), ModelConfig())
        parameters = {key: value.string_value for key, value in sorted(config.parameters.items())}
        instances = sum(group.count for group in config.instance_group)
        models[config.name] = parameters | ({"instances": str(instances)} if instances else {})
    return models


def table(result: Mapping) -> str:
    """The scenarios for a terminal."""
    heads = ("readings/s", "tokens/s", "p50 ms", "p99 ms", "TTFT p99", "ITL p99")
    lines = [
        f"{'scenario':<21}{'load':<22}" + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True))
    ]
    points = [(s["name"], p) for s in result["scenarios"] for p in s["points"]]
    for name, point in [*points, *((f"sweep {p['driver']}", p) for p in result["sweep"])]:
        mean = {key: interval["mean"] for key, interval in point["summary"].items()}
        load = Load(**point["load"])
        numbers = [mean["readings_per_s"], mean["output_tokens_per_s"]]
        numbers += [mean[key] for key in ("latency_ms.p50", "latency_ms.p99", "ttft_ms.p99", "itl_ms.p99")]
        cells = ["-" if number is None else f"{number:.{0 if number >= 100 else 2}f}" for number in numbers]
        line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
        lines.append(f"{name:<21}{load!s:<22}{line}" + (f"  {point['stopped']}" if "stopped" in point else ""))
    for scenario in result["scenarios"]:
        said = scenario["result"]
        value = "-" if said["value"] is None else f"{said['value']:.4g}"
        spread = f" ({said['low']:.4g} to {said['high']:.4g})" if said["low"] is not None else ""
        lines.append(
            f"{scenario['name']}: {scenario['metric']} {value}{spread}{'; ' if said['why'] else ''}{said['why']}"
        )
    return "\n".join(lines)
