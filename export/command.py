"""`cxr-triton export` and `quantize`."""

from __future__ import annotations

import re
import time
import warnings
from pathlib import Path

import click

from cxr_triton.cli import OUT_FOLDER, PROFILES, json_option, printable, say_next, write_json
from cxr_triton.export.calibration import DEFAULT_LIMIT, PHANTOM_WARNING, REASONING_TOKENS
from cxr_triton.export.export import export_checkpoint
from cxr_triton.export.forms import FORMS
from cxr_triton.export.quantize import SCHEMES, quantize_checkpoint
from cxr_triton.export.source import licence_of
from cxr_triton.profile import ModelProfile, load_profile, profile_names

FORM = next(iter(FORMS))


def _source_options(function):
    function = click.option(
        "--profile",
        shell_complete=PROFILES,
        required=True,
        metavar="NAME|YAML",
        help=f"One of {', '.join(profile_names())}, or a file.",
    )(function)
    function = click.option("-o", "--out", required=True, type=OUT_FOLDER, help="New folder.")(function)
    return click.argument("checkpoint")(function)


def _run_options(function):
    progress = click.option(
        "--progress/--no-progress", default=None, help="Bars on standard error.  [default: on a terminal]"
    )
    accept = click.option("--accept-licence", is_flag=True, help="You accept the weights' non-commercial licence.")
    revision = click.option("--revision", help="Of a hub id.  [default: the profile's]")
    return revision(accept(progress(json_option(function))))


def _chosen(profile: str, checkpoint: str) -> ModelProfile:
    """The profile; says the licence of the weights."""
    chosen = load_profile(profile)
    licence = licence_of(checkpoint, chosen)
    click.echo(printable(f"licence of the weights: {licence.name} ({licence.stated})"), err=True)
    return chosen


def _tell(result: dict, out: Path, started_s: float, what: str, json_path: str | None) -> None:
    """Write the result with the folder's size and the time it took; `what` stands in its line between both."""
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    seconds = round(time.monotonic() - started_s, 1)
    if json_path != "-":
        click.echo(printable(f"{out}: {what}; {size / 1e9:.2f} GB in {seconds} s"))
    if commit := result["source"]["revision"]:
        click.echo(printable(f"of {result['source']['name']} at commit {commit}"), err=True)
    write_json(result | {"path": str(out), "bytes": size, "seconds": seconds}, json_path)


@click.command()
@_source_options
@click.option(
    "--format",
    "form",
    type=click.Choice(list(FORMS)),
    default=FORM,
    show_default=True,
    help="Decoder as a graph, as a checkpoint for trtllm-build, or as the checkpoint itself.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int4", "fp8", "int4-awq"]),
    help="Decoder weights; a quantized checkpoint has fp8 or int4-awq.  [default: what it has, or int4, or bf16]",
)
@click.option(
    "--compute",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="With quantized weights, and for the vision tower.  [default: fp32, for a CPU]",
)
@click.option(
    "--head",
    type=click.Choice(["int4", "fp8", "compute"]),
    help="Language head, with quantized weights.  [default: int4 with int4, else compute]",
)
@click.option(
    "--adapter",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the LoRA adapter that the profile names, as peft writes it; with --format checkpoint.",
)
@click.option("--max-sequence", type=click.IntRange(min=1), metavar="TOKENS", help="Prompt and answer together.")
@_run_options
def export(checkpoint: str, out: Path, profile: str, json_path: str | None, **options):
    """Write the vision and decoder graphs of CHECKPOINT, a folder or a hub id ORG/NAME.

    The weights stream: a 3B checkpoint takes about 1 GiB of memory.
    """
    chosen, started_s = _chosen(profile, checkpoint), time.monotonic()
    result = export_checkpoint(checkpoint, out, chosen, **options)
    compute = result["geometry"]["compute"]
    what = f"decoder {result['precision']}, head {result['head']}, compute and vision {compute}"
    _tell(result, out, started_s, what, json_path)
    say_next("build", out, *(["--recipe", "RECIPE"] if options["form"] != FORM else []), "-o", "BUNDLE")


@click.command()
@_source_options
@click.option(
    "--scheme",
    required=True,
    type=click.Choice(SCHEMES),
    help="Weights and inputs in float8, or weights in int4 blocks by AWQ.",
)
@click.option("--kv-fp8", is_flag=True, help="Calibrate scales for a KV cache in float8 too.")
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of DICOM, PNG or JPEG files.  [default: synthetic phantoms]",
)
@click.option(
    "--limit", type=click.IntRange(min=1), default=DEFAULT_LIMIT, show_default=True, help="Most images to take."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses and orders the images.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--reasoning-tokens",
    type=click.IntRange(min=0),
    default=REASONING_TOKENS,
    show_default=True,
    help="Tokens that a reasoning model writes to each prompt, to be calibrated on.",
)
@_run_options
def quantize(checkpoint: str, out: Path, profile: str, json_path: str | None, **options):
    """Quantize CHECKPOINT, a folder or a hub id ORG/NAME, with nvidia-modelopt.

    Writes a Hugging Face folder that `export` takes, with the record of its calibration in calibration.json.
    """
    chosen, started_s = _chosen(profile, checkpoint), time.monotonic()
    if options["images"] is None:
        click.echo(f"warning: {PHANTOM_WARNING}", err=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=re.escape(PHANTOM_WARNING))  # said above
        result = quantize_checkpoint(checkpoint, out, chosen, **options)
    images = result["images"]
    what = f"{result['scheme']}, calibrated on {images['count']} {images['kind']} and {result['tokens']} tokens"
    _tell(result, out, started_s, what, json_path)
    say_next("export", out, "--profile", profile, "-o", "EXPORT")
