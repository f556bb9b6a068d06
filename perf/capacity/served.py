"""Stage times of a served bundle, and whether a simulation from them tells how it does under load.

`python -m cxr_triton.perf.capacity.served BUNDLE`. Each round measures the graphs by themselves, one reading after the
other through the server, the same beside a process that computes readings without the server, and then loads: several
readings at once, and Poisson arrivals. A round's stage times come from its first three parts alone; the simulation gets
the same arrivals and readings as the server did, and its numbers stand beside the server's.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click

from cxr_triton.cli import OUT_FILE, Command, json_option, write_json
from cxr_triton.config import build
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.serving import Settings
from cxr_triton.perf.bench import Observer
from cxr_triton.perf.capacity.alone import Alone
from cxr_triton.perf.capacity.compare import compared, figures, listed, ratios, scattered, show
from cxr_triton.perf.capacity.machine import chunk_tokens
from cxr_triton.perf.capacity.simulate import PARTS, means
from cxr_triton.perf.capacity.stages import SCHEMA_VERSION, Curve, Machine, Stages
from cxr_triton.perf.environment import Stolen, busy_s, environment
from cxr_triton.perf.load import OVERLOAD, Load, offer
from cxr_triton.perf.observer import MODEL, Observed
from cxr_triton.perf.process import Process
from cxr_triton.perf.served import serving
from cxr_triton.perf.stages import STAGES, triton_times
from cxr_triton.perf.summary import Record, summarize
from cxr_triton.perf.workload import Workload, load_workload
from cxr_triton.triton_repo.package import VISION_BATCH, write_repository

SHARES = (0.5, 0.7)
"""Poisson rates, in parts of what the server gave with the most readings under way."""
CHUNK_TOKENS, CHUNK_MS = 8, 30.0


@dataclass(frozen=True)
class Offered:
    """A load that a server was under.

    Attributes
    ----------
    records : list of Record
    processor_ms : mapping
        Process to processor time of a reading, the client's too.
    triton_ms : mapping
        What Triton counted of a reading, as `cxr_triton.perf.stages.triton_times` names it.
    others_share : float
        Of the cores' time, what programs that have no part in this took meanwhile.
    resident_mib : int
        Of the server's processes.
    """

    records: list[Record]
    processor_ms: Mapping[str, float]
    triton_ms: Mapping[str, float]
    others_share: float
    resident_mib: int

    def mean(self, *stages: str) -> float:
        """Milliseconds of stages together, of the mean reading."""
        return statistics.fmean(sum(record.stages_ms[stage] for stage in stages) for record in self.records)

    def as_json(self) -> dict:
        """What a record keeps of it."""
        done = [record for record in self.records if record.stages_ms]
        each = {part: [sum(r.stages_ms[name] for name in names) for r in done] for part, names in PARTS.items()}
        return {
            **figures(summarize(self.records, {})),
            "refused": sum(record.failed for record in self.records),
            "processor_ms": sum(self.processor_ms.values()),
            "processes_ms": self.processor_ms,
            "stages_ms": means(each),
            "triton_ms": self.triton_ms,
            "others_share": self.others_share,
        }


class Served:
    """A server of the bundle on this machine, and the load on it.

    Parameters
    ----------
    observer : Observer
    workload : Workload
    """

    def __init__(self, observer: Observer, workload: Workload):
        self._observer = observer
        self._messages = [item.message(MODEL) for item in workload.items]

    def offer(self, load: Load, seconds: float, seed: int = 0) -> Offered:
        """Offer a load; raises what a request failed with, unless a queue was full: that ends the load."""
        observed = Observed(self._observer)
        before, busy, began_s = self._observer.processor_s(), busy_s(), time.monotonic()
        records, failure = offer(
            self._observer.url, self._messages, load, min_seconds=seconds, min_requests=4, seed=seed
        )
        if failure and failure.code not in OVERLOAD:
            raise failure
        after, cores_s = self._observer.processor_s(), (time.monotonic() - began_s) * (os.cpu_count() or 1)
        taken = {name: total - before.get(name, 0.0) for name, total in after.items()}
        others_s = busy_s() - busy - sum(taken.values())
        resident = self._observer.resident_bytes()
        return Offered(
            records,
            {name: 1e3 * seconds / len(records) for name, seconds in taken.items()},
            triton_times(observed.counted(len(records)), 0.0),
            max(0.0, others_s / cores_s),
            round(sum(size for name, size in resident.items() if name != "client") / 2**20),
        )


def stages_of(curves: Mapping[str, list[dict]], one: Offered, workload: Workload, facts: Mapping) -> dict:
    """Costs of a reading: the graphs' by themselves, and whatever else one at a time took through the server.

    The processes of preprocessing and tower are busy for as long as Triton says, the decoder's thread with a prompt for
    as long as the reading says. What the decoder's process took beside its graph is of the tokens, as far as it had the
    time. Of all other processor time, transport and report take a core for as long as they last, and the responses what
    is left.
    """
    of_stages = ("dicom_preprocess", "decoding child", "vision_encoder", "decoder")
    processes = {name: one.processor_ms.get(name, 0.0) for name in of_stages}
    preprocess_cpu_ms = processes["dicom_preprocess"] + processes["decoding child"]
    preprocess_ms = max(one.mean("image_decode", "preprocess"), one.triton_ms["preprocess_compute"])
    step, tower = curves["step"][0], curves["tower"][0]
    tower_ms = max(tower["ms"], one.triton_ms["vision_compute"])
    tower_cpu_ms = max(tower["cpu_ms"], processes["vision_encoder"])
    steps = statistics.fmean((record.tokens or 1) - 1 for record in one.records)
    token_ms = max(0.0, one.mean("decode") / steps - step["ms"])
    chunk = facts["machine"]["prefill_chunk"]
    prompts = [_prompt_cost(curves["prefill"], record.prompt_tokens or 1, chunk) for record in one.records]
    alone_ms, prefill_cpu_ms = (statistics.fmean(column) for column in zip(*prompts, strict=True))
    prefill_ms = max(alone_ms, one.mean("prefill") - token_ms)
    graph_cpu_ms = prefill_cpu_ms + steps * step["cpu_ms"]
    token_cpu_ms = min(token_ms, max(0.0, processes["decoder"] - graph_cpu_ms) / (steps + 1))
    known_cpu_ms = preprocess_cpu_ms + tower_cpu_ms + graph_cpu_ms + (steps + 1) * token_cpu_ms
    chunks = steps / chunk_tokens(build(Machine, facts["machine"], "machine"), (step["ms"] + token_ms) / 1e3)
    rest_cpu_ms = max(0.0, sum(one.processor_ms.values()) - known_cpu_ms)
    report_ms = one.mean("report")
    staged_ms = preprocess_ms + tower_ms + prefill_ms + token_ms + one.mean("decode") + report_ms
    transport_ms = max(0.0, one.mean(*STAGES, "remainder") - staged_ms)
    between_ms = transport_ms + 2 * report_ms  # the first text goes out by itself
    share = min(1.0, rest_cpu_ms / between_ms) if between_ms else 0.0
    chunk_cpu_ms = (rest_cpu_ms - share * between_ms) / chunks
    scale = preprocess_ms / one.mean("image_decode", "preprocess")
    return {
        "readings": _kinds(one, workload, facts["image_tokens"], scale, preprocess_cpu_ms / preprocess_ms),
        "transport": _cost(transport_ms, share * transport_ms),
        "tower": _slowed(curves["tower"], tower_ms / tower["ms"], tower_cpu_ms / tower["cpu_ms"]),
        "prefill": _slowed(curves["prefill"], prefill_ms / alone_ms, 1.0),
        "step": {"on": "cores", "points": curves["step"]},
        "token": _cost(token_ms, token_cpu_ms),
        "chunk": _cost(max(one.processor_ms.get("report", 0.0) / chunks, 1e-3), chunk_cpu_ms),
        "report": _cost(report_ms, share * report_ms),
    }


def _slowed(points: Sequence[Mapping], by: float, cpu_by: float) -> dict:
    slowed = [{**p, "ms": round(p["ms"] * by, 4), "cpu_ms": round(p["cpu_ms"] * cpu_by, 4)} for p in points]
    return {"on": "cores", "points": slowed}


def _cost(ms: float, cpu_ms: float) -> dict:
    return {"ms": round(ms, 4), "cpu_ms": round(cpu_ms, 4)}


def _prompt_cost(points: Sequence[Mapping], tokens: int, chunk: int) -> tuple[float, float]:
    """Milliseconds of wall and of processor of a whole prompt, piece by piece."""
    curve = build(Curve, {"on": "cores", "points": list(points)}, "prefill")
    pieces = [min(chunk, tokens - at) for at in range(0, tokens, chunk)]
    costs = [curve.cost(piece) for piece in pieces]
    return 1e3 * sum(ms for ms, _ in costs), 1e3 * sum(cpu for _, cpu in costs)


def _kinds(one: Offered, workload: Workload, image_tokens: Sequence[int], scale: float, cpu_share: float) -> list[dict]:
    """The workload's items, each with the mean of its readings; `scale` is of their preprocessing."""
    kinds = []
    for index, item in enumerate(workload.items):
        of_item = [record for record in one.records if record.item == index] or one.records
        ms = scale * statistics.fmean(r.stages_ms["image_decode"] + r.stages_ms["preprocess"] for r in of_item)
        kinds.append(
            {
                "bytes": sum(len(image.data) for image in item.images),
                "preprocess_ms": round(ms, 4),
                "preprocess_cpu_ms": round(ms * cpu_share, 4),
                "image_tokens": image_tokens[index],
                "prompt_tokens": round(statistics.fmean(r.prompt_tokens or 1 for r in of_item)),
                "answer_tokens": round(statistics.fmean(r.tokens or 1 for r in of_item)),
            }
        )
    return kinds


class Study:
    """Rounds of stage times and loads on one server.

    Parameters
    ----------
    bundle : Path
    workload : Workload
    settings : Settings
        Of the server; nothing is kept between readings, so that each one is computed.
    concurrencies : sequence of int
    seconds : float
        Of each load.
    kept : mapping
        Bytes that a reading leaves, for the file of stage times.
    """

    def __init__(
        self,
        bundle: Path,
        workload: Workload,
        settings: Settings,
        *,
        concurrencies: Sequence[int],
        seconds: float,
        kept: Mapping[str, int],
    ):
        self.bundle, self.workload, self.settings, self.kept = bundle, workload, settings, kept
        self.concurrencies, self.seconds = concurrencies, seconds
        self.rates: list[float] = []
        self.about: dict = {}
        self.opened = Bundle.open(bundle, verify=False)

    def run(self, rounds: int) -> tuple[dict, dict]:
        """The record of all rounds, and the stage times of the middle one by its readings per second of one stream.

        What a crowd is like is the median of all rounds.
        """
        stolen = Stolen()
        self.about = {
            "command": ["python", "-m", "cxr_triton.perf.capacity.served", *sys.argv[1:]],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
        }
        items = [([image.data for image in item.images], item.request) for item in self.workload.items]
        cpus = sorted(os.sched_getaffinity(0))
        with tempfile.TemporaryDirectory() as folder:
            repository = Path(folder) / "repository"
            write_repository(self.bundle, repository, self.settings, unverified=True)
            alone = Process(Alone, cpus, str(self.bundle), self.settings.slots, self.settings.threads, items)
            with serving(repository, 300.0) as observer:
                served = Served(observer, self.workload)
                served.offer(Load("concurrency", 1), 2.0)  # warms up
                most = served.offer(Load("concurrency", max(self.concurrencies)), self.seconds).as_json()
                self.rates = [float(f"{share * most['readings_per_s']:.3g}") for share in SHARES]
                each = [self._round(alone, served, number) for number in range(1, rounds + 1)]
            alone.end()
        files = [one["stages"] for one in each]
        speeds = [one["one_stream"]["readings_per_s"] for one in each]
        middle = sorted(range(rounds), key=speeds.__getitem__)[rounds // 2]
        value = statistics.median(file["machine"]["scattered"] for file in files)
        after = {"load_average_after": os.getloadavg()[0], "stolen_share": stolen.share()}
        record = {
            "schema_version": SCHEMA_VERSION,
            **self.about,
            "environment": {**self.about["environment"], **after},
            "engine": self.opened.engine,
            "workload": {"name": self.workload.spec.name, "digest": self.workload.digest},
            "settings": vars(self.settings),
            "seconds_each": self.seconds,
            "ratio": ratios(each),
            "rounds": each,
        }
        return record, {**files[middle], "machine": {**files[middle]["machine"], "scattered": value}}

    def _round(self, alone: Process, served: Served, number: int) -> dict:
        facts, busy, began_s = alone.call("facts"), busy_s(), time.monotonic()
        curves = alone.call("measure", (1, 2, 4, VISION_BATCH))
        others_s = busy_s() - busy - curves.pop("processor_s")
        others_share = max(0.0, others_s / ((time.monotonic() - began_s) * (os.cpu_count() or 1)))
        one = served.offer(Load("concurrency", 1), self.seconds)
        beside, wanted = self._beside(alone, served, one)
        facts["machine"] = self._machine(facts["prefill_chunk"])
        file = self._file(facts["machine"], stages_of(curves, one, self.workload, facts), one.resident_mib)
        value = scattered(build(Stages, file, "round"), wanted, beside.others_share)
        file["machine"] = {**facts["machine"], "scattered": value}
        stages = build(Stages, file, "round")
        loads = [Load("concurrency", n) for n in self.concurrencies] + [Load("rate_per_s", r) for r in self.rates]
        if number % 2 == 0:
            loads.reverse()  # a machine that gets slower would favour what always comes first
        points = []
        for load in loads:
            measured = served.offer(load, self.seconds, number).as_json()
            points.append(compared(stages, load, measured, self.seconds, number))
        told = one.as_json()
        click.echo(f"round {number}: one stream {told['readings_per_s']:.2f}/s, scattered {value}", err=True)
        for point in points:
            click.echo(f"  {Load(**point['load'])}: {_said(point)}", err=True)
        return {
            "alone": curves,
            "alone_others_share": others_share,
            "one_stream": told,
            "one_stream_beside": {**beside.as_json(), "wanted_share": wanted},
            "scattered": value,
            "points": points,
            "stages": file,
        }

    def _beside(self, alone: Process, served: Served, one: Offered) -> tuple[Offered, float]:
        """One reading at a time while a process computes some by itself; what that wants, of all cores' time."""
        tokens = round(statistics.fmean(record.tokens or 1 for record in one.records))
        busy, began_s = busy_s(), time.monotonic()
        alone.call("read", self.seconds / 4, tokens)
        wanted = (busy_s() - busy) / ((time.monotonic() - began_s) * (os.cpu_count() or 1))
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(alone.call, "read", self.seconds + 1, tokens)
            beside = served.offer(Load("concurrency", 1), self.seconds)
            reading.result()
        return beside, wanted

    def _machine(self, prefill_chunk: int) -> dict:
        return {
            "cores": len(os.sched_getaffinity(0)),
            "preprocess_instances": self.settings.preprocess_instances,
            "slots": self.settings.slots,
            "queue_size": self.settings.queue_size,
            "vision_batch": VISION_BATCH,
            "prefill_chunk": prefill_chunk,
            "chunk_tokens": CHUNK_TOKENS,
            "chunk_ms": CHUNK_MS,
        }

    def _file(self, machine: Mapping, costs: Mapping, resident_mib: int) -> dict:
        """A file of stage times."""
        made = self.about["environment"]
        return {
            "schema_version": SCHEMA_VERSION,
            "title": f"{self.workload.spec.name} on {self.opened.engine}, {self.opened.precision}",
            "date": self.about["date"],
            "command": " ".join(self.about["command"]),
            "environment": {key: str(made.get(key)) for key in ("cpu", "cores", "os", "python", "revision")},
            "versions": made.get("versions") or {"cxr-triton": "unknown"},
            "machine": machine,
            **costs,
            "kept": {**self.kept, "memory_mib": resident_mib},
        }


def _said(point: Mapping) -> str:
    if point["ratio"]:
        return listed(point["ratio"])
    refused, after = point["simulated"]["refused"], point["measured"]["requests"]
    return f"a full queue ended it after {after} readings, in the simulation {refused} are refused"


def bytes_kept(record: Path | None) -> dict[str, int]:
    """Bytes that a reading leaves, of a record such as docs/results/capacity-kept.json; 0 without one."""
    if record is None:
        return dict.fromkeys(("answer_bytes", "row_bytes", "gateway_bytes"), 0)
    measured = json.loads(record.read_text("utf-8"))
    gateway = sum(size for name, size in measured["gateway"]["each"].items() if name != "objects")
    answer = measured["archive"]["text_bytes"] + measured["archive"]["reading_bytes"]
    of_row = measured["archive"]["row_bytes"]
    return {"answer_bytes": round(answer), "row_bytes": round(of_row), "gateway_bytes": round(gateway)}


@click.command(cls=Command, extra="perf")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--workload", default="phantom", show_default=True, help="A bundled workload, or the path of a YAML file."
)
@click.option("--slots", default=4, show_default=True)
@click.option("--threads", default=0, show_default=True, help="CPU threads of each graph; 0 takes all cores.")
@click.option("--preprocess-instances", default=2, show_default=True)
@click.option(
    "--concurrency", "concurrencies", multiple=True, type=click.IntRange(1), default=(1, 2, 4, 8), show_default=True
)
@click.option("--seconds", default=8.0, show_default=True, help="Of each load.")
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--kept",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What readings leave, measured; none by default.",
)
@click.option(
    "--stages", "stages_path", type=OUT_FILE, help="Write the stage times for `python -m cxr_triton.perf.capacity`."
)
@json_option
def main(*, bundle, workload, slots, threads, preprocess_instances, rounds, kept, stages_path, json_path, **loads):
    """Stage times of BUNDLE, served on this machine, and a simulation from them beside the server under load."""
    settings = Settings(
        slots=slots,
        threads=threads,
        preprocess_instances=preprocess_instances,
        prefix_reuse=False,
        prefix_cache_mib=0,
        drafts=False,
        draft_index_mib=0,
        picture_cache_mib=0,
    )
    study = Study(bundle, load_workload(workload), settings, **loads, kept=bytes_kept(kept))
    record, stages = study.run(rounds)
    show(record)
    write_json(record, json_path)
    if stages_path:
        write_json(stages, str(stages_path))


if __name__ == "__main__":
    main()
