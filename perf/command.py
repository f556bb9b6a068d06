"""`cxr-triton bench run`, `compare` and `history`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cxr_triton.cli import (
    EXIT_INTERRUPTED,
    EXIT_NOT_AS_ASKED,
    OUT_FILE,
    access_options,
    json_option,
    printable,
    say_next,
    write_json,
)
from cxr_triton.errors import CxrError
from cxr_triton.files import write
from cxr_triton.perf.compare import ALPHA, MIN_CHANGE
from cxr_triton.perf.peers import PEERS

if TYPE_CHECKING:
    from cxr_triton.client.limits import Access

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_RESULT = click.Path(exists=True, dir_okay=False, path_type=Path)
_html_option = click.option("--html", "html_path", type=OUT_FILE, help="Write it as a page too.")


@click.group()
def bench():
    """Measure a served reader, and compare measurements."""


def _door(through: str | None, **access: Path | None) -> tuple[str, Access] | None:
    """The front door of `--through`, and how it lets us in."""
    from cxr_triton.client.address import require_endpoint
    from cxr_triton.client.limits import Access

    let_in = Access.of(**access)
    if not through:
        if any(access.values()):
            raise click.UsageError("--tls-ca, --tls-cert, --tls-key and --token-file are for --through: give it too")
        return None
    let_in.require_private(require_endpoint(through))
    return through, let_in


@click.command()
@click.argument("folder", metavar="REPOSITORY|BUNDLE", type=_FOLDER)
@click.option("--seconds", default=180.0, show_default=True, help="Time for it; loading and a measurement are not cut.")
@click.option("--streams", default=1, show_default=True, help="Readings at once that it shall be fastest for.")
@click.option(
    "--beside",
    multiple=True,
    type=_FOLDER,
    metavar="BUNDLE",
    help="Another engine's or precision's bundle of the same profile: say how fast it would be. May be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Measure, and change nothing.")
@json_option
def tune(folder: Path, *, seconds: float, streams: int, beside: tuple[Path, ...], dry_run: bool, json_path: str | None):
    """Find the settings with which this machine serves a repository fastest, and write them into it.

    Threads, pieces of a prompt, slots and the tower's batch are measured on the bundle's own graphs, in alternating
    rounds. A setting changes only where it wins by more than the noise and gives the same tokens. Of a BUNDLE, which
    has no settings, it says what to package it with. The repository must not be served meanwhile; it stays as it was
    until the end.
    """
    from tqdm import tqdm

    from cxr_triton.engines.bundle import MANIFEST
    from cxr_triton.perf.tune import Plan, Subject, Tuning, lines, options, save
    from cxr_triton.triton_repo.occupied import alone

    began_s, folder = time.monotonic(), folder.resolve()
    with contextlib.ExitStack() as stack:
        if not (folder / MANIFEST).is_file():
            stack.enter_context(alone(folder))
        subject = Subject.of(folder)
        bar = stack.enter_context(tqdm(total=round(seconds), unit="s", disable=None, leave=False))

        def say(what: str) -> None:
            bar.n = min(round(seconds), round(time.monotonic() - began_s))
            bar.set_description(what)

        tuning = Tuning(subject, Plan(seconds=seconds, streams=streams), beside=beside, say=say)
        error: BaseException | None = None
        try:
            tuning.run()
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        bar.close()
        is_written = bool(subject.repository) and not dry_run and error is None
        record = tuning.record()
        try:
            if is_written:
                save(subject, record)
        except (CxrError, OSError) as raised:  # what was measured is told all the same
            error, is_written = raised, False
    result = record | {"folder": str(folder), "written": is_written}
    click.echo(printable("\n".join(lines(result))), err=json_path == "-")
    write_json(result, json_path)
    if error:
        click.echo(f"ended before its time: {printable(str(folder))} is as it was", err=True)
        raise error
    if subject.repository:
        say_next("serve", folder)
    else:
        say_next("package", folder, "-o", "REPOSITORY", *options(subject, tuning.chosen))


def _numbers(kind):
    def convert(context, parameter, value: str):
        try:
            return tuple(kind(part) for part in value.split(",") if part.strip())
        except ValueError:
            raise click.BadParameter(f"{value!r} is no list of numbers such as 1,2,4") from None

    return convert


@bench.command()
@click.argument("repository", required=False, type=_FOLDER)
@click.option("--url", help="gRPC endpoint of a server that runs already, in place of REPOSITORY.")
@click.option("--metrics", metavar="HOST:PORT", help="Metrics of the server at --url.")
@click.option("--through", metavar="HOST:PORT", help="Send the load through this front door; --url stays the server's.")
@access_options
@click.option(
    "--workload", default="phantom", show_default=True, help="A bundled workload, or the path of a YAML file."
)
@click.option("--images", type=_FOLDER, help="Folder of images to use instead.")
@click.option("--scenario", "scenarios", multiple=True, help="Only this; may be repeated.  [default: all four]")
@click.option("--seconds", "min_seconds", default=20.0, show_default=True, help="Least duration of a repeat.")
@click.option("--requests", "min_requests", default=20, show_default=True, help="Fewest requests of a repeat.")
@click.option("--repeats", default=3, show_default=True, help="Of each load; two or more give confidence intervals.")
@click.option("--warm-up", default=4, show_default=True, help="Requests before anything counts.")
@click.option("--offline-concurrency", default=16, show_default=True, help="Requests under way in offline.")
@click.option(
    "--rates",
    "rates_per_s",
    default="",
    callback=_numbers(float),
    help="Readings per second of server and interactive, ascending.  [default: 0.5, 0.7 and 0.85 of offline]",
)
@click.option(
    "--sweep",
    "concurrencies",
    default="1,2,4,8",
    show_default=True,
    callback=_numbers(int),
    help="Concurrencies; '' for none.",
)
@click.option("--latency-ms", default=12_000.0, show_default=True, help="Bound of server, 99th percentile.")
@click.option("--ttft-ms", default=500.0, show_default=True, help="Bound of interactive, 99th percentile.")
@click.option("--itl-ms", default=30.0, show_default=True, help="Bound of interactive, 99th percentile.")
@click.option(
    "--perf-analyzer",
    "tool",
    default="find",
    show_default=True,
    metavar="find|none|PATH",
    help="Second driver of the sweep; find looks for it and downloads it if need be.",
)
@click.option(
    "--baseline",
    "baseline",
    multiple=True,
    metavar="NAME=CHECKPOINT",
    help=f"Beside REPOSITORY: {', '.join(PEERS)}, with the checkpoint's folder; may be repeated.",
)
@click.option("--baseline-rounds", default=3, show_default=True, help="Requests that each baseline takes in turn.")
@click.option("--ready-timeout-s", default=600.0, show_default=True, help="For REPOSITORY to be loaded and warm.")
@click.option("--timeout-s", default=600.0, show_default=True, help="Limit of one request.")
@click.option("--seed", default=0, show_default=True, help="Of the arrivals.")
@click.option("--csv", "csv_path", type=OUT_FILE, help="Write the requests and summaries as CSV.")
@click.option("--html", "html_path", type=OUT_FILE, help="Write the report page.")
@json_option
def run(
    *,
    repository: Path | None,
    url: str | None,
    metrics: str | None,
    through: str | None,
    workload: str,
    images: Path | None,
    scenarios: tuple[str, ...],
    tool: str,
    baseline: tuple[str, ...],
    baseline_rounds: int,
    ready_timeout_s: float,
    timeout_s: float,
    csv_path: Path | None,
    html_path: Path | None,
    json_path: str | None,
    **planned,
):
    """Measure REPOSITORY, which is served for it on free ports of this machine, or the server at --url.

    Four scenarios in MLPerf's words, then a sweep over concurrency by our client and by perf_analyzer in turn. Ends
    with an error at the first request that fails for another reason than overload. An error and Ctrl-C, which ends with
    status 130, keep the repeats that were measured. The server at --url has to have the CXR_TRITON_SECRET of this
    command's environment. With --through the load goes through a front door, by our client alone.
    """
    from cxr_triton.client.address import require_endpoint
    from cxr_triton.engines.secret import SECRET
    from cxr_triton.perf import peers, served
    from cxr_triton.perf.bench import SCENARIOS, Observer, Plan, table
    from cxr_triton.perf.perf_analyzer import chosen
    from cxr_triton.perf.report import extras, result_page, to_csv
    from cxr_triton.perf.workload import load_workload

    server: contextlib.AbstractContextManager[Observer]
    if repository and not url:
        server = served.serving(repository, ready_timeout_s)
    elif url and not repository:
        require_endpoint(url)
        server = contextlib.nullcontext(Observer(url, metrics, secret=os.environ.get(SECRET)))
    else:
        raise click.UsageError("give REPOSITORY or --url, one of them")
    beside = peers.parse(baseline)
    if beside and not repository:
        raise click.UsageError("--baseline runs on the server's own cores: give REPOSITORY, not --url")
    door = _door(through, **{name: planned.pop(name) for name in ("tls_ca", "tls_cert", "tls_key", "token_file")})
    plan = Plan(scenarios=scenarios or SCENARIOS, **planned)
    analyzer = chosen(tool) if plan.concurrencies and not through else None
    drawn = load_workload(workload, images=images)
    with server as observer:
        result, error = served.measure(
            observer,
            drawn,
            plan,
            repository=repository,
            tool=analyzer,
            door=door,
            beside=beside,
            rounds=baseline_rounds,
            timeout_s=timeout_s,
            command=["cxr-triton", *sys.argv[1:]],
        )
    click.echo(printable("\n".join([table(result), *extras(result)])), err=json_path == "-")
    click.secho(printable(result["notice"]), fg="yellow", err=True)
    write_json(result, json_path)
    for path, text in ((csv_path, to_csv), (html_path, result_page)):
        if path:
            write(path, text(result))
    if isinstance(error, KeyboardInterrupt):
        click.echo("interrupted: the result has what was measured until then", err=True)
        sys.exit(EXIT_INTERRUPTED)
    if error:
        click.echo("ended before its time: the result has what was measured until then", err=True)
        raise error


@bench.command()
@click.argument("a", type=_RESULT)
@click.argument("b", type=_RESULT)
@click.option("--alpha", type=click.FloatRange(0, 0.5, min_open=True), default=ALPHA, show_default=True)
@click.option("--min-change", type=click.FloatRange(0), default=MIN_CHANGE, show_default=True)
@_html_option
@json_option
def compare(a: Path, b: Path, *, alpha: float, min_change: float, html_path: Path | None, json_path: str | None):
    """Hold result B against the earlier result A.

    Exit status 3 if B is worse: by at least MIN_CHANGE, and shown by the repeats at level ALPHA.
    """
    from cxr_triton.perf.compare import compare, load_result
    from cxr_triton.perf.report import number, result_page

    earlier, now = load_result(a), load_result(b)
    told = compare(earlier, now, alpha=alpha, min_change=min_change)
    to_stderr = json_path == "-"
    for entry in told["metrics"]:
        click.echo(
            printable(
                f"{entry['scenario']}, {entry['load']}: {entry['metric']} {number(entry['a'])} -> {number(entry['b'])} "
                f"({100 * entry['change']:+.1f} %, p {entry['p']:.3f}): {entry['verdict']}"
            ),
            err=to_stderr,
        )
    for difference in told["differences"]:
        click.echo(f"differs: {printable(difference)}", err=to_stderr)
    click.echo(told["verdict"], err=to_stderr)
    write_json(told, json_path)
    if html_path:
        write(html_path, result_page(now, earlier, told))
    if told["verdict"] == "worse":
        click.get_current_context().exit(EXIT_NOT_AS_ASKED)


@bench.command()
@click.argument("folder", type=_FOLDER)
@_html_option
@json_option
def history(folder: Path, html_path: Path | None, json_path: str | None):
    """List the results in FOLDER, oldest first."""
    from cxr_triton.perf.compare import SCHEMA_VERSION, history, identity
    from cxr_triton.perf.report import headline, history_page, number

    results = history(folder)
    rows = []
    for result in results:
        told = [{"scenario": s, "metric": m, "value": value} for s, m, value in headline(result)]
        rows.append({"file": result["file"], **identity(result), "headline": told})
        values = ", ".join(f"{entry['scenario']} {entry['metric']} {number(entry['value'])}" for entry in told)
        click.echo(
            printable(f"{result['created']} {result['environment']['revision'] or ''} {result['file']}: {values}"),
            err=json_path == "-",
        )
    write_json({"schema_version": SCHEMA_VERSION, "results": rows}, json_path)
    if html_path:
        write(html_path, history_page(results))
