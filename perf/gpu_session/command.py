"""`python -m cxr_triton.perf.gpu_session`."""

from __future__ import annotations

from pathlib import Path

import click

from cxr_triton.cli import EXIT_NOT_AS_ASKED, Group, json_option, write_json
from cxr_triton.perf.gpu_session import loads
from cxr_triton.perf.gpu_session.machine import PARTS, check
from cxr_triton.perf.gpu_session.run import SCHEMA, STEPS
from cxr_triton.perf.gpu_session.run import run as run_steps
from cxr_triton.perf.gpu_session.session import Session


@click.group(cls=Group, extra="rtx")
def main():
    """Run and prepare a session on a GPU machine."""


@main.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="Models.  [default: OUT/work]")
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with tokenizer.json and chat_template.jinja of the models.",
)
@click.option("--step", "steps", multiple=True, type=click.Choice(list(STEPS)), help="Only this; may be repeated.")
@click.option("--limit-s", type=click.IntRange(1), help="For each step.  [default: its own]")
@click.option("--dry-run", "is_dry", is_flag=True, help="On a CPU, with a small model.")
@json_option
def run(
    out: Path,
    *,
    work: Path | None,
    tokenizer: Path,
    steps: tuple[str, ...],
    limit_s: int | None,
    is_dry: bool,
    json_path: str | None,
):
    """Check the machine, run the steps, and write OUT/session.json and OUT/session.md.

    A step whose parts are missing is left out, and the result says which. Exit status 3 if a step did not succeed.
    """
    result = run_steps(Session(out, work or out / "work", tokenizer, is_dry), steps or list(STEPS), limit_s)
    write_json(result, json_path)
    if any(told["status"] != "done" for told in result["steps"].values()):
        click.get_current_context().exit(EXIT_NOT_AS_ASKED)


def _session_options(function):
    """Folders of a session that runs already."""
    for name in ("out", "work", "tokenizer"):
        function = click.option(f"--{name}", type=click.Path(path_type=Path), required=True)(function)
    return click.option("--dry-run", "is_dry", is_flag=True)(function)


@main.command(hidden=True)
@click.argument("name", type=click.Choice(list(STEPS)))
@_session_options
def step(name: str, **options):
    """One step, in this process."""
    STEPS[name][1](Session(**options))


@main.command(hidden=True)
@click.argument("scale")
@click.argument("precision")
@_session_options
def bundle(scale: str, precision: str, **options):
    """Make what the steps need of one model."""
    session = Session(**options)
    session.bundle(session.scales[scale], precision)


@main.command()
@json_option
def parts(json_path):
    """What the steps need, with sizes, and what is here."""
    checked = check(is_dry=False)
    rows = []
    for name, (_, steps, mib) in PARTS.items():
        here = checked["present"].get(name)
        rows.append({"part": name, "mib": mib, "steps": steps.split(), "present": here})
        size = "on such machines" if mib is None else f"{mib} MiB"
        state = f"present, {here}" if name in checked["present"] else "missing"
        click.echo(f"{name:<28}{size:<18}{state:<24}{steps}", err=json_path == "-")
    write_json({"schema": SCHEMA, "parts": rows}, json_path)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--limit-mib", default=48, show_default=True, help="Largest load.")
@click.option("--capability", metavar="9.0", help="Repack wheels with the kernels of this compute capability only.")
@json_option
def pack(files: tuple[Path, ...], out: Path, limit_mib: int, capability: str | None, json_path: str | None):
    """Split FILES into loads of a least size that travel one by one: OUT/load-N, each with a list of its pieces."""
    packed = loads.pack(files, out, limit_mib << 20, int(capability.replace(".", "")) if capability else None)
    for number, pieces in enumerate(packed):
        click.echo(f"load-{number}: {sum(piece['bytes'] for piece in pieces) / 2**20:.1f} MiB", err=json_path == "-")
    named = [[piece["piece"] for piece in pieces] for pieces in packed]
    write_json({"schema": loads.SCHEMA, "loads": named}, json_path)


@main.command()
@click.argument("load", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
def unpack(load: Path, target: Path):
    """Put the pieces of LOAD where they belong in TARGET; a complete file is checked, a .tar.xz unpacked there."""
    for name, is_whole in loads.unpack(load, target):
        click.echo(f"{name}: {'complete' if is_whole else 'not whole yet'}")
