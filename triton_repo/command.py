"""`cxr-triton package`, `serve`, `demo` and `make-engine`."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cxr_triton.cli import (
    EXIT_NOT_AS_ASKED,
    OUT_FILE,
    OUT_FOLDER,
    PROFILES,
    RECIPES,
    Waiting,
    call,
    json_option,
    printable,
    say_next,
    trace_option,
    write_json,
)
from cxr_triton.errors import InternalError, InvalidBundle
from cxr_triton.extras import require

if TYPE_CHECKING:
    from cxr_triton.triton_repo.serve import Server

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _options(given: tuple[str, ...]) -> dict[str, str]:
    """``NAME=VALUE`` by name."""
    if wrong := [text for text in given if not all(text.partition("="))]:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=VALUE")
    return dict(text.split("=", 1) for text in given)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=OUT_FOLDER, help="Folder of the repository; must be new or empty.")
@click.option(
    "--slots",
    type=int,
    help="Readings that decode at the same time.  [default: 4, or all that the engine is for]",
)
@click.option("--preprocess-instances", default=2, show_default=True, help="Processes that decode images.")
@click.option("--threads", default=0, help="CPU threads of each graph.  [default: all cores]")
@click.option("--vision-threads", type=int, help="Of the tower alone.  [default: as --threads]")
@click.option(
    "--prefill-chunk", default=0, help="Prompt tokens of one run of the decoder.  [default: the engine's, 128]"
)
@click.option(
    "--vision-batch",
    type=int,
    help="Most images in one run of the tower.  [default: 8, or as many as a request may have]",
)
@click.option("--queue-size", default=64, show_default=True, help="Requests that may wait before each step.")
@click.option("--batch-invariant", is_flag=True, help="Readings never depend on what else runs; int4 alone is slower.")
@click.option(
    "--prefix-reuse/--no-prefix-reuse",
    default=None,
    help="Compute the beginning that prompts share once.  [default: on a CPU]",
)
@click.option("--prefix-cache-mib", default=512, show_default=True, help="Memory for such beginnings; 0: none.")
@click.option(
    "--drafts/--no-drafts",
    default=None,
    help="Guess tokens from earlier answers and check several in a step.  [default: where the engine can]",
)
@click.option("--draft-index-mib", default=16, show_default=True, help="Memory for earlier answers; 0: no drafts.")
@click.option("--picture-cache-mib", default=256, show_default=True, help="Memory for embeddings of pictures; 0: none.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    callback=lambda _, __, given: _options(given),
    help="What only the bundle's engine has, see docs/decoder-engines.md; may be given more than once.",
)
@click.option("--force", is_flag=True, help="Replace an older repository.")
@click.option("--unverified", is_flag=True, help="Take a bundle that did not pass `verify`; the repository says so.")
@json_option
def package(bundle: Path, out: Path, force: bool, unverified: bool, json_path: str | None, **settings):
    """Write a Triton model repository from BUNDLE, which has to have passed `verify`.

    It holds everything it needs and may be moved. Files of 64 MiB and more take no room of their own where the file
    system can share or link them.
    """
    from cxr_triton.triton_repo.package import BUNDLE, ENSEMBLE, VERIFICATION, Settings, write_repository

    packaged = write_repository(bundle, out, Settings(**settings), force=force, unverified=unverified)
    verification, said = (out / ENSEMBLE / "1" / VERIFICATION).read_text().splitlines()[:2]
    click.echo(
        printable(f"{out}: {packaged.profile.name}, {packaged.precision}, digest {packaged.digest[:12]}"),
        err=json_path == "-",
    )
    click.secho(printable(said), fg=None if verification == "passed" else "yellow", err=True)
    result = {
        "repository": str(out),
        "models": sorted(path.parent.name for path in out.glob("*/config.pbtxt")),
        "bundle": BUNDLE,
        "digest": packaged.digest,
        "profile": packaged.profile.name,
        "precision": packaged.precision,
        "verification": verification,
        "settings": settings,
    }
    write_json(result, json_path)
    say_next("serve", out)


@click.command()
@click.argument("repository", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--grpc-port", default=8001, show_default=True, help="0 takes a free one, here and below.")
@click.option("--http-port", type=int, help="Health and metadata by HTTP too, which no reading needs.  [default: none]")
@click.option("--metrics-port", default=8002, show_default=True)
@click.option("--ready-timeout-s", default=300.0, show_default=True, help="From start to the end of the warm-up.")
@click.option(
    "--shm-mib",
    default=128,
    show_default=True,
    help="Shared memory of each model process; has to hold all images of a request.",
)
@click.option(
    "--renew-mib",
    default=1024,
    show_default=True,
    help="Start the server again when it has grown by so much and no reading is under way, and at twice that in any "
    "case; 0 never does.",
)
@click.option(
    "--drain-seconds",
    "drain_s",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Longest wait for readings under way before it ends; new ones get QUEUE_FULL meanwhile.",
)
@click.option("--log", type=OUT_FILE, help="Log file.  [default: REPOSITORY.log]")
@click.option("--modified", is_flag=True, help="Serve your own edits of REPOSITORY; says what they are.")
@trace_option
@json_option
def serve(repository: Path, json_path: str | None, renew_mib: int, drain_s: float, **options):
    """Run the pip-installed Triton on REPOSITORY, on 127.0.0.1, until SIGTERM or SIGINT.

    A signal lets readings under way end (--drain-seconds) and refuses new ones; a second one ends at once.

    A REPOSITORY that is not as `package` wrote it is refused, file by file.

    Ready means that a reading went through the whole ensemble. Ends with status 75 when the server or the process of a
    model dies, so that a supervisor can start it anew: Triton does not.
    """
    from cxr_triton.triton_repo.integrity import differences
    from cxr_triton.triton_repo.renew import Renewal
    from cxr_triton.triton_repo.serve import Server
    from cxr_triton.triton_repo.tuned import complaint, record_of

    require("grpc", "tritonclient")
    for difference in differences(repository) if options["modified"] else ():
        click.secho(printable(f"modified: {difference}"), fg="yellow", err=True)
    try:
        record, elsewhere = record_of(repository), complaint(repository)
    except InvalidBundle as error:
        if not options["modified"]:
            raise
        record, elsewhere = None, error.message
    if elsewhere:
        click.secho(printable(elsewhere), fg="yellow", err=True)
    stopping: list[bool] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: _stop(stopping, number))
    server = Server(repository, **options)
    try:
        with Waiting("starting the server") as waiting:
            server.start(lambda what: setattr(waiting, "what", what))
        result = {
            "status": "ready",
            "repository": str(server.repository),
            "grpc": server.grpc,
            "http": server.http,
            "metrics": server.metrics,
            "pid": server.pid,
            "pids": server.pids,
            "log": str(server.log),
            "start_s": round(server.start_s, 3),
            "starts": server.starts,
            "warm_up_ms": round(server.warm_up_ms, 1),
            "tuned": {"date": record["date"], "for_this_cpu": elsewhere is None} if record else None,
        }
        write_json(result, json_path)  # before the line, which is what a supervisor waits for
        click.echo(
            f"ready: gRPC {server.grpc}, {f'HTTP {server.http}, ' * bool(server.http)}metrics {server.metrics}, "
            f"log {server.log}; "
            f"started in {server.start_s:.1f} s{f' at the {server.starts}. try' * (server.starts > 1)}, "
            f"first reading {server.warm_up_ms / 1e3:.1f} s",
            err=json_path == "-",
        )
        renewal = Renewal(server, renew_mib, drain_s)
        while True:
            server.check()
            if renewal.is_due():
                click.echo(f"renewing the server, which has grown by {renewal.grown_mib:.0f} MiB", err=True)
                renewal.renew()
                click.echo(f"ready again: process {server.pid}", err=True)
            time.sleep(0.5)
    except _Stopped as stopped:
        click.echo(f"stopping on {stopped}", err=True)
        if server.is_up and drain_s:
            _drain(server, drain_s, stopping)
    finally:
        stopping.append(True)  # a further signal does not keep the server from being cleared away
        server.stop()


def _drain(server: Server, drain_s: float, stopping: list) -> None:
    """Let readings under way end; a further signal ends the wait."""
    stopping.clear()
    try:
        if not server.drain(drain_s):
            click.echo(f"readings were under way after {drain_s:g} s, and are lost: --drain-seconds", err=True)
    except _Stopped as again:
        click.echo(f"stopping at once on another {again}", err=True)


class _Stopped(BaseException):
    """A signal asked the server to end."""


def _stop(stopping: list, number: int) -> None:
    if not stopping:
        stopping.append(True)
        raise _Stopped(signal.Signals(number).name)


@click.command()
@click.option(
    "-o",
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default="build/demo",
    show_default=True,
    help="Folder for all of it; made if it is not there.",
)
@json_option
def demo(folder: Path, json_path: str | None):
    """Export, build, package, serve and read on this CPU, with the demonstration model.

    Reads a public chest radiograph and a synthetic phantom, and leaves both readings as JSON and as HTML pages. The
    model knows nothing about people: what it says of the radiograph is meaningless.
    """
    from cxr_triton.triton_repo.demo import run

    with contextlib.redirect_stdout(sys.stderr if json_path == "-" else sys.stdout):
        result = run(folder)
    write_json(result, json_path)


@click.command("make-engine")
@click.argument("checkpoint")
@click.option(
    "--recipe",
    shell_complete=RECIPES,
    required=True,
    metavar="NAME|YAML",
    help="Target; `cxr-triton recipes` lists them.",
)
@click.option(
    "--profile",
    shell_complete=PROFILES,
    required=True,
    metavar="NAME|YAML",
    help="Model; `cxr-triton profiles` lists them.",
)
@click.option("-o", "--out", required=True, type=OUT_FOLDER, help="Folder for all of it; made if it is not there.")
@click.option("--revision", help="Of a hub id.  [default: the profile's, or that of the run before]")
@click.option("--images", type=FOLDER, help="Radiographs to calibrate and to verify on.  [default: synthetic phantoms]")
@click.option("--verify-images", type=FOLDER, help="Others to verify on.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Most images to take of each.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), help="Folder of compiled plans.")
@click.option(
    "--adapter", type=FOLDER, help="LoRA adapter that the profile names, where the recipe's engine takes one."
)
@click.option("--unverified", is_flag=True, help="Package without the gate; the repository says so.")
@click.option(
    "--evaluate", type=FILE, metavar="YAML", help="Labelled data to measure the engine on, before it is packaged."
)
@click.option("--against", type=FILE, metavar="RESULT", help="Of `evaluate` on the same data: be no worse than that.")
@click.option("--accept-licence", is_flag=True, help="You accept the weights' non-commercial licence.")
@click.option("--print", "only_print", is_flag=True, help="Of a recipe built in a container: show `docker run` only.")
@json_option
def make_engine(
    checkpoint: str, json_path: str | None, only_print: bool, evaluate: Path | None, against: Path | None, **options
):
    """Make a served engine of CHECKPOINT, a folder or a hub id ORG/NAME, for the target of a recipe.

    Quantizes, exports, builds, verifies and packages. With --evaluate it is also measured on labelled data: an engine
    that is less right than the recipe's `accuracy` or --against allow is not packaged. A run that was stopped goes on
    where it was; a second run does only what has changed. Some recipes are built in their container, on its GPU:
    --print shows how.
    """
    from cxr_triton.engines import engine
    from cxr_triton.engines.recipe import load_recipe
    from cxr_triton.triton_repo import make_engine as library

    if only_print:
        if evaluate:
            raise click.UsageError("--evaluate measures on this machine, not in a container: leave it out with --print")
        if not engine(load_recipe(options["recipe"]).decoder.compiler).in_container:
            raise click.UsageError("--print is for recipes that are built in a container, see `cxr-triton recipes`")
        line = library.in_container(checkpoint, **options)
        click.echo(printable(line), err=json_path == "-")
        write_json({"docker": line}, json_path)
        return
    if against and not evaluate:
        raise click.UsageError("--against is for --evaluate: give both")
    evaluation = library.Evaluation(evaluate, against, _judge(evaluate, against)) if evaluate else None
    started_s = time.monotonic()
    result = library.make_engine(
        checkpoint, **options, evaluation=evaluation, say=lambda line: click.echo(printable(line), err=True)
    )
    result["seconds"] = round(time.monotonic() - started_s, 1)
    line = f"{result['repository']}: {result['recipe']}, digest {result['digest'][:12]}"
    click.echo(printable(line), err=json_path == "-")
    write_json(result, json_path)
    say_next("serve", result["repository"])


def _judge(data: Path, against: Path | None):
    """What evaluates a repository: another verb, because it stands above this one."""

    def judge(repository: Path, out: Path, limits: dict[str, float]) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "record.json"
            held: list[str | Path] = ["--against", against] if against else []
            for name, limit in limits.items():
                held += ["--limit", f"{name}={limit}"]
            _asked("run", data, repository, "-o", out)
            _asked("judge", out, *held, "--json", record)
            return json.loads(record.read_text())

    return judge


def _asked(*words: str | Path) -> None:
    """A verb of `evaluate`, which may find that something is not as asked: the record says what."""
    if (status := call("evaluate", *words)) not in (0, EXIT_NOT_AS_ASKED):
        raise InternalError(f"cxr-triton evaluate {words[0]} ended with status {status}; see what it said before")
