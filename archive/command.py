"""`cxr-triton archive`: read an archive through, into Parquet files."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from pathlib import Path

import click

from cxr_triton.cli import (
    EXIT_FAILED,
    EXIT_NOT_AS_ASKED,
    MODES,
    OUT_FILE,
    OUT_FOLDER,
    TASKS,
    access_options,
    json_option,
    printable,
    write_json,
)
from cxr_triton.files import write
from cxr_triton.identity import IDENTIFIERS

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
BUNDLE = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(short_help="Read an archive through, into Parquet files.")
@click.argument("source")
@click.option("-o", "--out", required=True, type=OUT_FOLDER, help="Folder of Parquet.")
@click.option("--url", "urls", multiple=True, help="gRPC endpoint of a server; several share the work.")
@click.option("--in-process", "bundle", type=BUNDLE, metavar="BUNDLE", help="Read with its engine, without a server.")
@click.option("--column", default="path", show_default=True, help="Of a Parquet manifest: the column of paths.")
@click.option("--web-token", type=FILE, metavar="FILE", help="Bearer token of the DICOMweb server.")
@click.option("--web-ca", type=FILE, metavar="PEM", help="Authorities that the DICOMweb server's certificate is of.")
@click.option("--task", shell_complete=TASKS, metavar="NAME", help="What to ask, a task of the served profile.")
@click.option("--prompt", metavar="TEXT", help="Ask this in place of a task.")
@click.option("--mode", shell_complete=MODES, metavar="NAME", help="How to answer, a mode of the served profile.")
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.")
@click.option(
    "--identifiers", type=click.Choice(IDENTIFIERS), default="hashed", envvar="CXR_IDENTIFIERS", show_default=True,
    show_envvar=True, help="How rows name paths and UIDs.",
)  # fmt: skip
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Readings under way at once.")
@click.option("--actors", type=click.IntRange(1), default=1, show_default=True, help="Processes that share them.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of an engine, of each actor.  [default: all]")
@click.option(
    "--timeout-s", type=click.FloatRange(0, min_open=True), default=600.0, show_default=True,
    help="Of one reading, and of waiting for a server that is full or away.",
)  # fmt: skip
@access_options
@click.option("--again", multiple=True, metavar="CODE", help="Drop rows with this error code and read their images.")
@click.option("--html", "html_path", type=OUT_FILE, metavar="OUT", help="Write a page about all rows.")
@json_option
def archive(
    *, source: str, out: Path, urls: tuple[str, ...], bundle: Path | None, column: str, web_token: Path | None,
    web_ca: Path | None, identifiers: str, concurrency: int, actors: int, threads: int | None, timeout_s: float,
    tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None, token_file: Path | None, again: tuple[str, ...],
    html_path: Path | None,
    json_path: str | None, **asked,
):  # fmt: skip
    """Read every image of SOURCE, and write a row of each into Parquet files in -o.

    SOURCE is a folder, a glob in quotes, a Parquet file with a column of paths, or the address of a DICOMweb query
    (https://HOST/ROOT/studies?… or …/instances?…). The work is done by Ray on this machine, or on the cluster that
    RAY_ADDRESS names. The same command goes on where it was stopped; no image is read twice. An image that cannot be
    read is a row with its error.

    Exit status 3 when an image has no reading; 1 when none has; 75 when the servers are out of reach or full, and the
    same command goes on.
    """
    from cxr_triton.archive.folder import opened
    from cxr_triton.archive.run import Run
    from cxr_triton.archive.source import source_of
    from cxr_triton.archive.summary import archive_page, summarize
    from cxr_triton.archive.worker import Task
    from cxr_triton.client.limits import Access

    if bool(urls) == bool(bundle):
        raise click.UsageError("give --url, once for each server, or --in-process, one of them")
    if asked["prompt"] is not None and asked["task"]:
        raise click.UsageError("--prompt asks in place of a task: give it without --task")
    token, ca = (str(path) if path else None for path in (web_token, web_ca))
    images = source_of(source, out, column=column, token_file=token, ca=ca)
    task = Task(
        urls=urls,
        bundle=str(bundle.resolve()) if bundle else None,
        access=Access.of(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file),
        timeout_s=timeout_s,
        slots=math.ceil(concurrency / actors),
        threads=threads or (bundle and max(1, (os.cpu_count() or 1) // actors)) or None,
        asked=asked,
        identifiers=identifiers,
        web=images.web,
    )
    _check_servers(task)
    header = {
        "source": {"kind": images.kind, "sha256": images.digest},
        "identifiers": identifiers,
        "request": asked,
    }
    with opened(out, header) as folder:
        if again:
            click.echo(f"{folder.forget(again)} rows dropped, to be read again", err=True)
        with _Bar() as bar:
            ran = Run(folder, task, _actors(task, actors), bar.add, bar.begins).over(images)
        folder.finish()
        summary = summarize(folder, ran)
    _say(summary, json_path)
    if html_path:
        write(html_path, archive_page(summary))
    write_json(summary, json_path)
    if summary["images"] > summary["readings"]:
        sys.exit(EXIT_NOT_AS_ASKED if summary["readings"] else EXIT_FAILED)


def _check_servers(task) -> None:
    """Refuse an address that is none before any work, and warn where pictures would travel in clear text."""
    from cxr_triton.client.address import leaves_machine, require_endpoint

    for url in task.urls:
        if leaves_machine(require_endpoint(url)) and not task.access.tls:
            click.echo(f"warning: the pictures travel unencrypted to {printable(url)}; use --tls-ca", err=True)


def _actors(task, count: int):
    from cxr_triton.archive.run import Actors

    if task.bundle is None:
        return Actors(count=count)
    from cxr_triton.archive.in_process import needs_gpu

    return Actors(count=count, cpus=task.threads, gpus=float(needs_gpu(task.bundle)))


class _Bar:
    """A bar of rate and time left, with what came of the images."""

    def __enter__(self):
        from tqdm import tqdm

        self._counted: Counter[str] = Counter()
        self._bar = tqdm(total=0, unit="image", disable=None, smoothing=0.05)
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()

    def begins(self, ran) -> None:
        click.echo(f"{ran.found} images, {ran.there} of them have a row", err=True)
        self._bar.total, self._bar.initial, self._bar.n = ran.found, ran.there, ran.there
        self._bar.refresh()

    def add(self, rows) -> None:
        self._counted.update(code for code in rows["error_code"].to_pylist() if code)
        self._bar.set_postfix(self._counted, refresh=False)
        self._bar.update(rows.num_rows)


def _say(summary: dict, json_path: str | None) -> None:
    def say(text: str) -> None:
        click.echo(printable(text), err=json_path == "-")

    for what in ("status", "errors"):
        for name, count in summary[what].items():
            say(f"{count:>8}  {name}")
    say(f"{summary['images']} images, {summary['readings']} readings in {summary['archive']}")
    click.secho(printable(summary["notice"]), fg="yellow", err=True)
