"""`cxr-triton export`: a checkpoint becomes the folder that `cxr-triton build` takes (docs/architecture.md)."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click

from cxr_triton import __version__
from cxr_triton.cli import OUT_FOLDER, PROFILES, json_option, say_next, write_json
from cxr_triton.errors import InvalidRequest, LicenceNotAccepted, UnsupportedCheckpoint
from cxr_triton.export.checkpoint import Checkpoint, hub_id, locate
from cxr_triton.export.decoder import check_source, write_decoder
from cxr_triton.export.graph import Precision, check
from cxr_triton.export.tensorrt_llm import write_tensorrt_llm
from cxr_triton.export.vision import write_vision
from cxr_triton.files import new_folder, require_new
from cxr_triton.profile import CheckpointShape, Licence, ModelProfile, load_profile, profile_names

SCHEMA = 1


def export_checkpoint(
    source: str,
    out: Path,
    profile: ModelProfile,
    *,
    precision: str | None = None,
    compute: str | None = None,
    head: str | None = None,
    max_sequence: int | None = None,
    revision: str | None = None,
    accept_licence: bool = False,
    form: str = "onnx",
    progress: bool | None = None,
) -> dict:
    """Write an export folder; it appears complete or not at all.

    Parameters
    ----------
    source : str
        Checkpoint folder or hub id; a quantized one comes from `cxr-triton quantize`.
    out : Path
        Must not exist, or be an empty folder.
    profile : ModelProfile
        Written beside the graphs, with the checkpoint's repetition penalty and `max_sequence`.
    precision, compute, head : str
        See `Precision`. The precision is by default the scheme of a quantized checkpoint, int4 of a plain one.
    max_sequence : int, optional
        Tokens of prompt and answer; the profile's by default.
    revision : str, optional
        Of a hub id; by default the one that the profile's facts were taken from, if it is the profile's checkpoint.
    accept_licence : bool
        The user accepts the weights' non-commercial licence.
    form : {"onnx", "tensorrt-llm"}
        Of the decoder: a graph, or the folder ``decoder`` for `trtllm-build`, which then is all bf16 but for its
        quantized linear layers. The vision tower is a graph in any case.
    progress : bool, optional
        Show bars on standard error; by default on a terminal.

    Returns
    -------
    dict
        What `export.json` holds.

    Raises
    ------
    LicenceNotAccepted, UnsupportedCheckpoint, InvalidRequest, InvalidProfile
    """
    if form == "tensorrt-llm":
        if compute not in (None, "bf16") or head not in (None, "compute"):
            raise InvalidRequest(
                f"compute {compute} with head {head} was asked for; TensorRT-LLM's decoder has bf16 for both, leave "
                "them out"
            )
        compute, head = "bf16", "compute"
    Precision.of(precision or "int4", compute, head)  # a wrong name is known before a checkpoint is fetched
    require_new(out)
    licence = require_licence(source, profile, accept_licence)
    folder, commit = located(source, profile, revision)
    checkpoint = Checkpoint(folder)
    require_fit(source, checkpoint, profile)
    precision = precision or (checkpoint.quantization.scheme if checkpoint.quantization else "int4")
    chosen = Precision.of(precision, compute, head)
    check_source(checkpoint, chosen)
    profile = profile.merge_generation_config(checkpoint.generation)
    profile = dataclasses.replace(profile, max_sequence=max_sequence or profile.max_sequence)
    if profile.max_sequence > checkpoint.text.max_position_embeddings:
        raise InvalidRequest(
            f"max_sequence is {profile.max_sequence}, the checkpoint allows at most "
            f"{checkpoint.text.max_position_embeddings} (max_position_embeddings); pass a smaller --max-sequence"
        )
    side_files = checkpoint.side_files()
    with new_folder(out) as partial:
        check(write_vision(checkpoint, partial, precision=precision, compute=compute, progress=progress))
        if form == "tensorrt-llm":
            write_tensorrt_llm(
                checkpoint,
                partial / "decoder",
                precision=precision,
                max_position_embeddings=profile.max_sequence,
                progress=progress,
            )
        else:
            check(
                write_decoder(checkpoint, partial, precision=precision, compute=compute, head=head, progress=progress)
            )
        for name, content in side_files.items():
            (partial / name).write_bytes(content)
        (partial / "profile.yaml").write_text(profile.to_yaml(), encoding="utf-8")
        export = {
            "schema": SCHEMA,
            "format": form,
            "precision": chosen.weights,
            "head": chosen.head,
            "geometry": _geometry(checkpoint, profile, chosen),
            "source": {
                "name": source if commit else folder.resolve().name,
                "revision": commit,
                "files": checkpoint.digests(),
                "licence": {**dataclasses.asdict(licence), "accepted": accept_licence},
                **({"calibration": checkpoint.calibration or None} if checkpoint.quantization else {}),
            },
            **_quantization(checkpoint),
            "versions": {
                "cxr_triton": __version__,
                **{name: metadata.version(name) for name in ("onnx", "numpy", "ml_dtypes")},
            },
        }
        (partial / "export.json").write_text(json.dumps(export, indent=1) + "\n", encoding="utf-8")
    return export


def _quantization(checkpoint: Checkpoint) -> dict:
    """What `export.json` says of a quantized source, with the scales of its float8 KV cache."""
    if checkpoint.quantization is None:
        return {}
    facts = dataclasses.asdict(checkpoint.quantization)
    return {"quantization": {**facts, "exclude": list(facts["exclude"]), "kv_scales": checkpoint.kv_scales()}}


def require_licence(source: str, profile: ModelProfile, accepted: bool) -> Licence:
    """The licence of the weights; raises `LicenceNotAccepted` where the user has to accept it and did not."""
    licence = licence_of(source, profile)
    if licence.non_commercial and not accepted:
        raise LicenceNotAccepted(
            f"the weights of {source} are under {licence.name} ({licence.stated}), for non-commercial research only; "
            "read the licence, then pass --accept-licence"
        )
    return licence


def located(source: str, profile: ModelProfile, revision: str | None = None) -> tuple[Path, str | None]:
    """`locate`, by default at the revision of the profile's checkpoint."""
    return locate(source, profile.revision if revision is None and source == profile.checkpoint_id else revision)


def licence_of(source: str, profile: ModelProfile) -> Licence:
    """The licence of the weights: that of the bundled profile made for them, else that of the profile in use."""
    return (_made_for(source) or profile).licence


def require_fit(source: str, checkpoint: Checkpoint, profile: ModelProfile) -> None:
    """Refuse a checkpoint that is not one of the profile's.

    Raises
    ------
    UnsupportedCheckpoint
        It is the hub's for another bundled profile, or its sizes or special tokens differ; names all of it.
    """
    made_for, wrong = _made_for(source), []
    if made_for and made_for.checkpoint_id != profile.checkpoint_id:
        wrong.append(f"it is {made_for.checkpoint_id}, the profile is of {profile.checkpoint_id}")
    if profile.checkpoint:
        wrong += [
            f"{what} is {here}, of the profile {there}"
            for what, here, there in _compared(checkpoint, profile.checkpoint)
            if here != there
        ]
    if wrong:
        raise UnsupportedCheckpoint(
            f"{source} is no checkpoint of profile {profile.name}: {'; '.join(wrong)}; give the profile made for it, "
            "or one of your own whose `checkpoint` says what it looks like"
        )


def _compared(checkpoint: Checkpoint, shape: CheckpointShape) -> Iterator[tuple[str, int | str, int]]:
    """What a profile states, as (name, of the checkpoint, of the profile)."""
    for part in ("text", "vision"):
        for name, size in vars(getattr(shape, part)).items():
            yield f"{part} {name}", getattr(getattr(checkpoint, part), name), size
    ids = checkpoint.token_ids()
    of_config = {"<|image_pad|>": checkpoint.image_token_id, "<|vision_start|>": checkpoint.vision_start_token_id}
    for token, number in shape.tokens.items():
        yield f"token {token}", ids.get(token, "absent"), number
        yield f"token {token} in config.json", of_config.get(token, number), number


def _made_for(source: str) -> ModelProfile | None:
    """The bundled profile of a hub repository."""
    repository = hub_id(source)
    return next((p for p in map(load_profile, profile_names()) if p.checkpoint_id == repository), None)


def _geometry(checkpoint: Checkpoint, profile: ModelProfile, precision: Precision) -> dict:
    text = checkpoint.text
    return {
        "hidden": text.hidden_size,
        "layers": text.num_hidden_layers,
        "kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "vocab": text.vocab_size,
        "window_budget": profile.window_budget,
        "token_budget": profile.token_budget,
        "max_sequence": profile.max_sequence,
        "compute": precision.compute,
        "image_token_id": checkpoint.image_token_id,
        "eos_token_ids": list(checkpoint.eos_token_ids),
        "vision_start_token_id": checkpoint.vision_start_token_id,
        "merge_size": checkpoint.vision.spatial_merge_size,
    }


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=OUT_FOLDER, help="New folder.")
@click.option(
    "--profile",
    shell_complete=PROFILES,
    required=True,
    metavar="NAME|YAML",
    help=f"One of {', '.join(profile_names())}, or a file.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", "tensorrt-llm"]),
    default="onnx",
    show_default=True,
    help="Decoder as a graph, or as a checkpoint for trtllm-build.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int4", "fp8", "int4-awq"]),
    help="Decoder weights; a quantized checkpoint has fp8 or int4-awq.  [default: what it has, or int4]",
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
@click.option("--max-sequence", type=click.IntRange(min=1), metavar="TOKENS", help="Prompt and answer together.")
@click.option("--revision", help="Of a hub id.  [default: the profile's]")
@click.option("--accept-licence", is_flag=True, help="You accept the weights' non-commercial licence.")
@click.option("--progress/--no-progress", default=None, help="Bars on standard error.  [default: on a terminal]")
@json_option
def export(checkpoint, out, profile, json_path, **options):
    """Write the vision and decoder graphs of CHECKPOINT, a folder or a hub id ORG/NAME.

    The weights stream: a 3B checkpoint takes about 1 GiB of memory.
    """
    chosen = load_profile(profile)
    licence = licence_of(checkpoint, chosen)
    click.echo(f"licence of the weights: {licence.name} ({licence.stated})", err=True)
    start = time.monotonic()
    result = export_checkpoint(checkpoint, out, chosen, **options)
    result |= {
        "path": str(out),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        "seconds": round(time.monotonic() - start, 1),
    }
    if json_path != "-":
        click.echo(
            f"{out}: decoder {result['precision']}, head {result['head']}, compute and vision "
            f"{result['geometry']['compute']}; {result['bytes'] / 1e9:.2f} GB in {result['seconds']} s"
        )
    write_json(result, json_path)
    say_next("build", out, *(["--recipe", "RECIPE"] if options["form"] != "onnx" else []), "-o", "BUNDLE")
