"""`cxr-triton evaluate`: accuracy of a served reader on labelled data."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from cxr_triton.cli import (
    EXIT_FAILED,
    EXIT_NOT_AS_ASKED,
    MODES,
    OUT_FILE,
    TASKS,
    Waiting,
    access_options,
    json_option,
    names,
    printable,
    write_json,
)
from cxr_triton.files import write

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


class _Evaluate(click.Group):
    """A group whose `run` needs not be written."""

    def parse_args(self, ctx, args):
        if args and args[0] not in {*self.commands, "-h", "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Evaluate)
def evaluate():
    """Measure a served reader's accuracy on labelled data.

    `cxr-triton evaluate DATA …` is `cxr-triton evaluate run DATA …`.
    """


@evaluate.command()
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.argument("repository", required=False, type=FOLDER)
@click.option("--url", help="gRPC endpoint of a server that runs already, in place of REPOSITORY.")
@click.option("--archive", type=FOLDER, help="Take what `cxr-triton archive` read, in place of REPOSITORY.")
@click.option(
    "-o", "--out", required=True, type=OUT_FILE, metavar="RESULT", help="JSON Lines: a header, then the rows."
)
@click.option(
    "--format",
    "format_",
    metavar="NAME",
    shell_complete=names("cxr_triton.evaluate.adapters:format_names"),
    help="How DATA is published: chexpert, nih, mimic-cxr, vindr-cxr, padchest, questions, ms-cxr, table.",
)
@click.option("--kind", help="What is asked: labels, options, boxes or report.  [default: the format's first]")
@click.option("--split", help="As the data set names it.  [default: test]")
@click.option("--uncertain", help="What an uncertain label counts as: zeros, ones or ignore.  [default: ignore]")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Most studies, drawn by the seed.  [default: all]")
@click.option(
    "--seed", type=click.IntRange(0), help="Of the studies that are drawn, and of sampled tokens.  [default: 0]"
)
@click.option("--task", shell_complete=TASKS, metavar="NAME", help="What to ask, a task of the served profile.")
@click.option("--prompt", metavar="TEXT", help="Ask this in place of a task; {question} and {options} are filled in.")
@click.option("--mode", shell_complete=MODES, metavar="NAME", help="How to answer, a mode of the served profile.")
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.")
@click.option(
    "--scores", is_flag=True, default=None, help="Ask how sure the model is of each label or option, for AUROC."
)
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Studies under way at once.")
@click.option(
    "--timeout-s", type=click.FloatRange(0, min_open=True), default=600.0, show_default=True, help="Of one reading."
)
@click.option("--ready-timeout-s", default=600.0, show_default=True, help="For REPOSITORY to be loaded and warm.")
@access_options
@click.option("--restart", is_flag=True, help="Throw away what an earlier run left of RESULT.")
@json_option
def run(
    *, data: Path, repository: Path | None, url: str | None, archive: Path | None, out: Path, format_: str | None,
    concurrency: int, timeout_s: float, ready_timeout_s: float, tls_ca: Path | None, tls_cert: Path | None,
    tls_key: Path | None, token_file: Path | None, restart: bool, json_path: str | None, **asked,
):  # fmt: skip
    """Read all studies of DATA, and write what was answered beside what is known.

    DATA is a YAML file that describes a data set, or with --format the data set itself. It is read by REPOSITORY, which
    is served for it on free ports of this machine, or by the server at --url; or --archive has its readings already.
    Every row is on the disk at once; the same command goes on where it was stopped. A study that cannot be read is a
    row with its error.

    Exit status 3 when a study could not be read; 1 when none could; 75 when the server is out of reach, and the same
    command goes on.
    """
    from cxr_triton.client.address import leaves_machine, require_endpoint
    from cxr_triton.client.limits import Access
    from cxr_triton.evaluate import rows
    from cxr_triton.evaluate.config import load_data
    from cxr_triton.evaluate.run import Server, counts, opened

    if sum(map(bool, (url, repository, archive))) != 1:
        raise click.UsageError("give REPOSITORY, --url or --archive, one of them")
    access = Access.of(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
    if url and not access.tls and leaves_machine(require_endpoint(url)):
        click.echo(f"warning: the pictures travel unencrypted to {printable(url)}; use --tls-ca", err=True)
    with opened(load_data(data, format=format_, **asked), out, restart=restart) as evaluation:
        _say_what_was_met(evaluation.header)
        if not evaluation.is_complete:
            with _served(repository, url or str(archive), ready_timeout_s) as endpoint:
                limits = {"concurrency": concurrency, "timeout_s": timeout_s}
                _run(evaluation, Server(url=endpoint, access=access, archive=archive, **limits))
    result = rows.read(out)
    counted = counts(iter(result))
    said = ", ".join(f"{number} {name}" for name, number in counted.items())
    click.echo(printable(f"{out}: {len(result)} studies: {said}"), err=json_path == "-")
    click.secho(printable(result.header.notice), fg="yellow", err=True)
    write_json(
        {
            "result": str(out),
            "digest": rows.timeless_digest(out),
            "rows": counted,
            "header": dataclasses.asdict(result.header),
        },
        json_path,
    )
    if counted.get("error") == len(result):
        sys.exit(EXIT_FAILED)
    if counted.get("error"):
        sys.exit(EXIT_NOT_AS_ASKED)


@evaluate.command()
@click.argument("result", type=FILE)
@click.option(
    "--limit", "limits", multiple=True, metavar="MEASURE=VALUE", help="Least value; most, of `ece` and `brier`."
)
@click.option("--against", type=FILE, metavar="RESULT", help="On the same data; must not be worse than that.")
@json_option
def judge(result: Path, limits: tuple[str, ...], against: Path | None, json_path: str | None):
    """Say whether RESULT is right enough.

    Exit status 3 when it is not: a measure misses its limit, or it is shown to be worse than --against.
    """
    from cxr_triton.evaluate.accuracy import record

    told = record(result, dict(_limit(text) for text in limits), against)
    for check in told["checks"]:
        how = "passed" if check["passed"] else "failed"
        click.echo(
            printable(f"{check['name']} {check['value']}, limit {check['limit']:g}: {how}"), err=json_path == "-"
        )
    if against:
        click.echo(f"beside {printable(str(against))}: {told['verdict']}", err=json_path == "-")
    write_json(told, json_path)
    if not told["passed"]:
        sys.exit(EXIT_NOT_AS_ASKED)


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no MEASURE=VALUE such as f1_macro=0.7", param_hint="--limit") from None


def _say_what_was_met(header) -> None:
    """The mapping, and what is not plain in the data set."""
    facts = header.data
    click.echo(
        printable(f"{facts['name']}, {facts['split']}: {facts['studies']} studies, {facts['images']} pictures"),
        err=True,
    )
    for theirs, ours in sorted(header.mapping.items(), key=lambda pair: (pair[1] is None, pair)):
        if theirs != ours:
            click.echo(printable(f"label {theirs}: {ours or 'without a place, not judged'}"), err=True)
    for what, number in header.counted.items():
        click.echo(printable(f"{number} x {what}"), err=True)


@contextlib.contextmanager
def _served(repository: Path | None, url: str | None, ready_timeout_s: float) -> Iterator[str]:
    if repository is None:
        yield str(url)
        return
    from cxr_triton.triton_repo.serve import Server

    server = Server(repository, grpc_port=0, metrics_port=0, ready_timeout_s=ready_timeout_s)
    with Waiting("starting the server") as waiting, server as up:
        waiting.end()
        yield up.grpc


def _run(evaluation, server) -> None:
    """With a bar of rate and time left, and how many were not well read."""
    from tqdm import tqdm

    counted: Counter[str] = Counter()
    with tqdm(total=len(evaluation.dataset), unit="study", disable=None, smoothing=0.05) as bar:

        def resumed(number: int) -> None:
            bar.initial = bar.n = number
            bar.refresh()

        def tell(row) -> None:
            if row.status != "ok":
                counted[row.code] += 1
                bar.set_postfix(counted, refresh=False)
            bar.update()

        evaluation.run(server, tell, resumed)


@evaluate.command()
@click.argument("result", type=FILE)
@click.option("--against", type=FILE, metavar="RESULT", help="Another engine's result on the same data.")
@click.option(
    "--margin", type=click.FloatRange(0, 1), default=0.02, show_default=True, help="Loss that is put up with."
)
@click.option(
    "--images", type=FOLDER, metavar="FOLDER", help="Of the data set: the page shows pictures of what went wrong."
)
@click.option("--identifiers", is_flag=True, help="Name the studies and patients of the worst cases.")
@click.option("--resamples", type=click.IntRange(100), default=1000, show_default=True, help="Of the intervals.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the resamples.")
@click.option("--html", "html_path", type=OUT_FILE, help="Write it as a page.")
@click.option("--csv", "csv_path", type=OUT_FILE, help="Write every measure, label and group as a row.")
@json_option
def measure(
    *, result: Path, against: Path | None, images: Path | None, html_path: Path | None, csv_path: Path | None,
    json_path: str | None, **options,
):  # fmt: skip
    """Measure what was answered: a table with 95 % intervals, and a page.

    RESULT is what `cxr-triton evaluate run` wrote. Neither a server nor the data set is asked again. The page and the
    tables hold no identifier of a patient unless --identifiers asks for them; pictures, and reports that are known, are
    shown as they are.

    Exit status 3 when it is less accurate than --against by more than the margin.
    """
    from cxr_triton.evaluate.report import measured
    from cxr_triton.evaluate.summary import to_csv

    report = measured(result, against, **options)
    for line in report.lines():
        click.echo(printable(line), err=json_path == "-")
    click.secho(printable(report.summary["notice"]), fg="yellow", err=True)
    if html_path:
        write(html_path, report.page(images))
    if csv_path:
        write(csv_path, to_csv(report.summary))
    write_json(report.summary, json_path)
    if (report.summary["comparison"] or {}).get("verdict") == "worse":
        sys.exit(EXIT_NOT_AS_ASKED)
