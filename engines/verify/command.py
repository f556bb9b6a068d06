"""`cxr-triton verify`: a bundle against its checkpoint, a record into its manifest."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from cxr_triton.cli import (
    EXIT_FAILED,
    OUT_FILE,
    PROFILES,
    RECIPES,
    json_option,
    printable,
    say_next,
    write_json,
)
from cxr_triton.engines import DEFAULT
from cxr_triton.errors import InvalidRequest
from cxr_triton.extras import require
from cxr_triton.files import why_not_writable, write

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--checkpoint", required=True, type=FOLDER, help="The unquantized checkpoint: the reference.")
@click.option("--images", required=True, type=FOLDER, help="Folder of DICOM, PNG or JPEG files.")
@click.option(
    "--profile",
    shell_complete=PROFILES,
    metavar="NAME|YAML",
    help="Of the reference.  [default: the packaged one of the same name]",
)
@click.option(
    "--recipe",
    shell_complete=RECIPES,
    metavar="NAME|YAML",
    help="Takes its thresholds.  [default: those of the bundle's recipe]",
)
@click.option("--standin", type=FOLDER, help=f"{DEFAULT} bundle of the same export, for engines that cannot run here.")
@click.option("--quantized", type=FOLDER, help="The quantized checkpoint of an fp8 or int4-awq engine.")
@click.option("--request", "requests", type=FILE, multiple=True, metavar="JSON", help="What to ask; several in turn.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="So many of the images, drawn at random.")
@click.option("--seed", default=0, show_default=True, help="Of that draw.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--html", type=OUT_FILE, help="Write the readings as one HTML page.")
@json_option
def verify(
    bundle: Path,
    *,
    images: Path,
    profile: str | None,
    recipe: str | None,
    requests: tuple[Path, ...],
    html: Path | None,
    json_path: str | None,
    **options,
):
    """Hold the engines in BUNDLE against their checkpoint, and put the record into its manifest.

    The reference is the checkpoint in transformers (fp32 on a CPU, bf16 on a CUDA device), greedy, on the same images.
    Exit status 1 when the gate refuses the bundle; the record is written all the same, and `package` reads it.
    """
    from tqdm import tqdm

    from cxr_triton.engines.bundle import MANIFEST, Bundle
    from cxr_triton.engines.verify.gate import verify_bundle
    from cxr_triton.engines.verify.record import write_record
    from cxr_triton.profile import load_profile

    require("torch", "transformers")
    started_s = time.monotonic()
    if why := why_not_writable(bundle / MANIFEST) or why_not_writable(bundle):
        raise click.UsageError(f"the record goes into the bundle: {why}")
    opened = Bundle.open(bundle)
    files = sorted(path for path in images.iterdir() if path.is_file() and not path.name.startswith("."))
    asked = [_request(path) for path in requests] or [{}]
    with tqdm(unit="", disable=None, leave=False) as bar:

        def progress(what: str, done: int, total: int) -> None:
            if done == 0:
                bar.reset(total)
                bar.set_description(what)
            bar.update(done - bar.n)

        record = verify_bundle(
            opened,
            profile=load_profile(profile) if profile else None,
            images=files,
            thresholds=_thresholds(opened, recipe),
            requests=asked,
            progress=progress,
            **options,
        )
    record["seconds"] = round(time.monotonic() - started_s, 1)
    written = write_record(opened, record)
    for line in summary(record):
        click.echo(printable(line), err=json_path == "-")
    write_json({**record, "bundle": str(bundle), "digest": written.digest}, json_path)
    if html:
        from cxr_triton.engines.verify.page import verification_page

        write(html, verification_page(record))
    if not record["passed"]:
        raise SystemExit(EXIT_FAILED)
    say_next("package", bundle, "-o", "REPOSITORY")


def summary(record: dict) -> list[str]:
    """A line for each part, below it those of its checks that failed, and the verdict."""
    lines = []
    for name, part in record["parts"].items():
        lines.append(f"{name:<9} {'passed' if part['passed'] else 'REFUSED'}")
        if part["error"]:
            lines.append(f"          {printable(part['error'])}")
        for check in part["checks"]:
            if not check["passed"]:
                said = check.get("said") or describe(check)
                lines.append(f"          {check['name']}: {printable(said)}")
    runtime = record["runtime"]
    count, refused = record["images"]["count"], sum(record["images"].get("refused", {}).values())
    left_out = f" ({refused} left out)" if refused else ""
    engine = runtime.get("said") or f"run in {runtime['engine']}"
    lines.append(f"{'passed' if record['passed'] else 'REFUSED'}: {count} images{left_out}, {engine}")
    return lines


def describe(check: dict) -> str:
    """Measured against allowed."""
    value = "not a finite number" if check["value"] is None else f"{check['value']:.4g}"
    return f"{value}, {'at least' if check['at_least'] else 'at most'} {check['limit']:g} allowed"


def _request(path: Path) -> dict:
    try:
        request = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path.name} is not JSON ({error}); give a REQUEST object") from None
    if not isinstance(request, dict):
        raise InvalidRequest(f"{path.name} is a JSON {type(request).__name__}, must be a REQUEST object")
    return request


def _thresholds(bundle, recipe: str | None) -> dict | None:
    """Thresholds of the named recipe, else of the one that the bundle was built by."""
    if recipe is None:
        return (bundle.manifest.get("recipe") or {}).get("thresholds")
    from cxr_triton.engines.recipe import load_recipe

    return dict(load_recipe(recipe).thresholds)
