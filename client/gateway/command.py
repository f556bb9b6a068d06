"""`cxr-triton gateway`: run a PACS gateway, and look after its queue."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING

import click

from cxr_triton.cli import EXIT_NOT_AS_ASKED, json_option, printable, trace_option, write_json
from cxr_triton.client.gateway.config import EXAMPLE, Config, load_config
from cxr_triton.errors import InvalidRequest

if TYPE_CHECKING:
    from cxr_triton.client.gateway.store import Store

OPEN = ("received", "grouped", "reading", "sending")
_FILE = click.Path(dir_okay=False)


def _config_option(command):
    return click.option(
        "--config",
        "config_path",
        type=_FILE,
        metavar="FILE",
        envvar="CXR_GATEWAY_CONFIG",
        help="The gateway's YAML file [default: gateway.yaml].",
    )(command)


@click.group(short_help="Run a PACS gateway: studies in, readings back as DICOM.", invoke_without_command=True)
@_config_option
@click.pass_context
def gateway(context: click.Context, config_path: str | None):
    """Take chest radiographs from a PACS or modality, have them read, and send the readings back as DICOM objects.

    Without a command it runs. Readings are for research only and never for diagnosis; every object says so.
    """
    context.obj = config_path
    if context.invoked_subcommand is None:
        context.invoke(run, config_path=None, trace_otlp=None)


def _load(context: click.Context, config_path: str | None) -> Config:
    return load_config(config_path or context.obj or "gateway.yaml")


@gateway.command()
@_config_option
@trace_option
@click.pass_context
def run(context: click.Context, config_path: str | None, trace_otlp: str | None):
    """Run until SIGTERM or Ctrl-C; the log goes to standard error, one JSON object a line."""
    from cxr_triton.client.gateway.service import serve

    serve(_load(context, config_path), trace_otlp)


@gateway.command()
def example():
    """Write a commented configuration to standard output."""
    click.echo(EXAMPLE.read_text("utf-8"), nl=False)


@gateway.command()
@_config_option
@click.argument("job", type=int, required=False)
@json_option
@click.pass_context
def status(context: click.Context, config_path: str | None, job: int | None, json_path: str | None):
    """What the queue holds; with a JOB its history and where its results are."""
    store = _open(_load(context, config_path))
    if job is None:
        result = store.status()
        lines = _status_lines(result)
    elif found := store.job(job):
        result = found
        lines = _job_lines(result)
    else:
        raise InvalidRequest(f"no job {job} in the queue; `gateway status` lists the dead letters")
    out = sys.stderr if json_path == "-" else sys.stdout
    for line in lines:
        click.echo(printable(line), out)
    write_json(result, json_path)


@gateway.command()
@_config_option
@click.argument("jobs", metavar="[JOB]...", type=int, nargs=-1)
@json_option
@click.pass_context
def retry(context: click.Context, config_path: str | None, jobs: tuple[int, ...], json_path: str | None):
    """Bring dead letters back to life: the JOBs named, or all of them.

    Exit status 3 when a JOB named was no dead letter.
    """
    revived = _open(_load(context, config_path)).retry(jobs)
    _tell("brought back to life", revived, jobs, json_path)


@gateway.command()
@_config_option
@click.argument("jobs", metavar="JOB...", type=int, nargs=-1, required=True)
@json_option
@click.pass_context
def drop(context: click.Context, config_path: str | None, jobs: tuple[int, ...], json_path: str | None):
    """Give JOBs up: they are not read, and what was not delivered of them is not.

    Exit status 3 when a JOB had ended already or never was.
    """
    dropped = _open(_load(context, config_path)).drop(jobs)
    _tell("dropped", dropped, jobs, json_path)


@gateway.command()
@_config_option
@click.option("--undo", is_flag=True, help="Take objects in again.")
@click.option("--timeout-s", type=click.FloatRange(0), metavar="S", help="Wait no longer than this.")
@json_option
@click.pass_context
def drain(context: click.Context, config_path: str | None, undo: bool, timeout_s: float | None, json_path: str | None):
    """Take nothing in any more, and wait until what is there is read and delivered.

    It holds for all gateways of the queue, and after a restart, until --undo. Exit status 3 when the time was up before
    the queue was empty.
    """
    from tqdm import tqdm

    store = _open(_load(context, config_path))
    store.set_draining(not undo)
    if undo:
        click.echo("taking in again", err=json_path == "-")
        write_json({"draining": False}, json_path)
        return
    left = first = _left(store)
    ends = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
    with tqdm(total=first, desc="drain", unit="job", disable=None) as bar:
        while left and time.monotonic() < ends:
            time.sleep(0.2)
            left = _left(store)
            bar.update(first - left - bar.n)
    click.echo(f"{left} jobs left" if left else "empty", err=json_path == "-")
    write_json({"draining": True, "left": left}, json_path)
    if left:
        sys.exit(EXIT_NOT_AS_ASKED)


@gateway.command()
@_config_option
@click.pass_context
def worklist(context: click.Context, config_path: str | None):
    """Serve the worklist page until SIGTERM or Ctrl-C: what came in, where it is, what failed and why; retry and drop.

    A process beside the gateway, over its queue; the section `worklist` of its file says where, and names the password.
    """
    from cxr_triton.client.gateway.worklist import serve

    serve(_load(context, config_path), lambda address: click.echo(f"worklist at {address}"))


def _open(config: Config) -> Store:
    from cxr_triton.client.gateway.store import Store

    return Store(config.queue_url, "operator")


def _left(store: Store) -> int:
    counts = store.counts()["jobs"]
    return sum(counts[state] for state in OPEN)


def _tell(what: str, done: list[int], asked: tuple[int, ...], json_path: str | None) -> None:
    click.echo(f"{len(done)} {what}", err=json_path == "-")
    write_json({"jobs": done}, json_path)
    if set(asked) - set(done):
        sys.exit(EXIT_NOT_AS_ASKED)


def _status_lines(result: dict):
    for name in ("jobs", "objects"):
        yield f"{name:<11} " + ", ".join(f"{count} {state}" for state, count in result[name].items())
    for destination, states in result["deliveries"].items():
        yield f"to {destination:<8} " + ", ".join(f"{count} {state}" for state, count in states.items())
    yield f"oldest open {result['oldest_open_s']:.0f} s" + (", draining" if result["draining"] else "")
    for one in result["gateways"]:
        yield f"gateway     {one['name']}, seen {one['seen_s_ago']:.0f} s ago"
    for letter in result["dead"]:
        yield f"dead        job {letter['job']}, {letter['attempts']} attempts: {letter['error']}"


def _job_lines(result: dict):
    yield f"job {result['id']}: {result['state']}, {len(result['inputs'])} images, {result['attempts']} attempts"
    if result["trace"]:
        yield f"trace {result['trace']}"
    for step in result["history"]:
        at = datetime.fromtimestamp(step["at"]).astimezone().isoformat(timespec="seconds")
        yield f"{at}  {step['gateway']:<12} {step['state']:<9} {step['note']}"
    for one in result["deliveries"]:
        yield f"to {one['destination']}: {one['kind']} {one['state']}" + (f", {one['error']}" if one["error"] else "")
