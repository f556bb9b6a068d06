"""`python -m cxr_triton.perf.capacity STAGES.json`: what it takes on paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from cxr_triton.cli import Command, json_option, printable, write_json
from cxr_triton.numbers import duration, number, percent
from cxr_triton.perf.capacity.plan import HOURS, Demand, for_archive, for_studies
from cxr_triton.perf.capacity.stages import load_stages


def _hours(context, parameter, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(",")) if value else HOURS
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of 24 numbers such as 1,1,2,…") from None


@click.command(cls=Command, extra="perf")
@click.argument("stages", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--studies-per-day", type=click.FloatRange(1, 1e13), help="Servers for so many studies.")
@click.option("--pictures-per-study", default=1, show_default=True, type=click.IntRange(1, 16))
@click.option("--target-p95-s", default=60.0, show_default=True, type=click.FloatRange(1e-3, 1e6), help="To a reading.")
@click.option("--hours", default="", callback=_hours, help="24 weights of the day.  [default: a hospital's, assumed]")
@click.option("--archive", type=click.FloatRange(1, 1e12), help="Servers for an archive of so many pictures.")
@click.option("--days", default=30.0, show_default=True, type=click.FloatRange(1e-3, 1e5), help="For the archive.")
@click.option("--readings", default=20_000, show_default=True, type=click.IntRange(100, 10**7), help="To simulate.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the arrivals.")
@json_option
def main(
    *, stages: Path, studies_per_day, pictures_per_study, target_p95_s, hours, archive, days, readings, seed, json_path
):
    """Servers, cards, cores, network and storage for a load, by simulation from the stage times in STAGES.

    The weights that it would serve are for research only, and no reading is for diagnosis.
    """
    if (studies_per_day is None) == (archive is None):
        raise click.UsageError("give one of --studies-per-day and --archive")
    times = load_stages(stages)
    if archive is not None:
        result = for_archive(times, archive, days)
    else:
        asked = {"pictures": pictures_per_study, "target_p95_s": target_p95_s, "hours": hours}
        demand = Demand(studies_per_day=studies_per_day, **asked, readings=readings, seed=seed)
        result = for_studies(times, demand)
    for line in table(result):
        click.echo(printable(line), err=json_path == "-")
    write_json(result, json_path)


def table(result: Mapping) -> list[str]:
    """A result as lines for a terminal."""
    rows = [("stage times", f"{result['stages']['title']}, {result['stages']['date']}")]
    rows += [("servers", _of(result["servers"])), ("cards, cores", f"{_of(result['cards'])}, {_of(result['cores'])}")]
    memory = result["memory_mib"]
    rows.append(("memory", "not measured" if memory is None else f"{number(memory / 1024)} GiB"))
    rows.append(("one server at most", f"{number(result['one_server_at_most_per_s'])} readings/s"))
    rows += _of_studies(result) if "busiest_hour" in result else _of_archive(result)
    network = result["network"]
    said = f"{number(network['in_mbit_per_s'])} Mbit/s in, {number(network['out_mbit_per_s'])} Mbit/s out"
    rows.append(("network", said))
    rows += [(name.replace("_bytes", "").replace("_", " "), size(value)) for name, value in result["storage"].items()]
    return [f"{name:<22}{value}" for name, value in rows] + [f"not measured: {said}" for said in result["assumed"]]


def _of_studies(result: Mapping) -> list[tuple[str, str]]:
    told = result["busiest_hour"]
    rows = [("busiest hour", f"{number(result['busiest_hour_per_s'])} studies/s")]
    for name, key in (
        ("to the reading", "latency_ms"),
        ("to the first word", "ttft_ms"),
        ("of it waiting", "waiting_ms"),
    ):
        rows.append((name, f"p50 {duration(told[key]['p50'])}, p95 {duration(told[key]['p95'])}"))
    rows.append(("in use", _use(told["use"])))
    if fewer := result["one_server_fewer"]:
        refused = sum(fewer["refused"].values())
        rows.append(("one server fewer", f"p95 {duration(fewer['latency_ms']['p95'])}, {refused} refused"))
    return rows


def _of_archive(result: Mapping) -> list[tuple[str, str]]:
    return [("days", number(result["days"])), ("in use", _use(result["each_server"]["use"]))]


def _use(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {percent(share)}" for name, share in shares.items() if share)


def _of(count: int) -> str:
    return f"{count:,}"


def size(value: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} PB"
