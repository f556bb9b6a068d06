"""A checkpoint becomes the folder that `cxr-triton build` takes: graphs, profile and `export.json`."""

from __future__ import annotations

import dataclasses
import json
from importlib import metadata
from pathlib import Path

from cxr_triton import __version__
from cxr_triton.errors import InvalidRequest, unknown_key
from cxr_triton.export.adapter import FOLDER as ADAPTER
from cxr_triton.export.adapter import MERGE, Adapter, named_adapter, write_adapter
from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.decoder import check_source
from cxr_triton.export.forms import FORMS
from cxr_triton.export.graph import QUANTIZED, Precision, check
from cxr_triton.export.source import Source, open_source
from cxr_triton.export.vision import write_vision
from cxr_triton.files import new_folder, require_new
from cxr_triton.profile import ModelProfile

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
    adapter: Path | None = None,
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
        See `Precision`. The precision is by default the scheme of a quantized checkpoint, of a plain one the form's.
    max_sequence : int, optional
        Tokens of prompt and answer; the profile's by default.
    revision : str, optional
        Of a hub id; by default the one that the profile's facts were taken from, if it is the profile's checkpoint.
    accept_licence : bool
        The user accepts the weights' non-commercial licence.
    form : str
        Of the decoder, see `FORMS`: a graph, or the folder ``decoder``. That is for a compiler that takes checkpoints,
        all bf16 but for its quantized linear layers, or the checkpoint itself for an engine that opens one. The vision
        tower is a graph in any case.
    adapter : Path, optional
        Folder of the LoRA adapter that the profile names; it goes into the folder ``adapter`` as it is.
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
    if form not in FORMS:
        raise InvalidRequest(unknown_key(form, FORMS, "form"))
    precision_of, default = FORMS[form].precision, FORMS[form].default
    precision_of(precision or default, compute, head)  # a wrong name is known before a checkpoint is fetched
    require_new(out)
    _require_takes_adapter(form, profile, adapter)
    opened = open_source(source, profile, revision=revision, accept_licence=accept_licence)
    checkpoint = opened.checkpoint
    held = checkpoint.quantization.scheme if checkpoint.quantization else default
    chosen = precision_of(precision or held, compute, head)
    check_source(checkpoint, chosen)
    lora = named_adapter(adapter, checkpoint, profile)
    if lora and chosen.weights in QUANTIZED:
        raise InvalidRequest(f"an adapter was given for weights in {chosen.weights}; {MERGE}, quantized")
    profile = _with_sequence(profile.merge_generation_config(checkpoint.generation), max_sequence, checkpoint)
    side_files = checkpoint.side_files()
    with new_folder(out) as partial:
        check(write_vision(checkpoint, partial, precision=chosen.compute, progress=progress))
        FORMS[form].write(checkpoint, partial, chosen, profile.max_sequence, progress)
        if lora:
            write_adapter(lora, partial / ADAPTER)
        for name, content in side_files.items():
            (partial / name).write_bytes(content)
        (partial / "profile.yaml").write_text(profile.to_yaml(), encoding="utf-8")
        export = _record(form, opened, profile, chosen, lora)
        (partial / "export.json").write_text(json.dumps(export, indent=1) + "\n", encoding="utf-8")
    return export


def _require_takes_adapter(form: str, profile: ModelProfile, adapter: Path | None) -> None:
    """Refuse an adapter, given or named, for a form that has no place for one."""
    if (adapter or profile.adapter) and not FORMS[form].takes_adapter:
        able = " or ".join(name for name, each in FORMS.items() if each.takes_adapter)
        name = profile.adapter.name if profile.adapter else adapter
        raise InvalidRequest(
            f"LoRA adapter {name} with --format {form}, which takes none; choose --format {able}, or {MERGE}, by a "
            "profile that names no adapter"
        )


def _with_sequence(profile: ModelProfile, max_sequence: int | None, checkpoint: Checkpoint) -> ModelProfile:
    profile = dataclasses.replace(profile, max_sequence=max_sequence or profile.max_sequence)
    if profile.max_sequence > checkpoint.text.max_position_embeddings:
        raise InvalidRequest(
            f"max_sequence is {profile.max_sequence}, the checkpoint allows at most "
            f"{checkpoint.text.max_position_embeddings} (max_position_embeddings); pass a smaller --max-sequence"
        )
    return profile


def _record(form: str, source: Source, profile: ModelProfile, precision: Precision, adapter: Adapter | None) -> dict:
    """`export.json`; of a quantized source with its calibration, and the scales of its float8 KV cache."""
    checkpoint, told, quantization = source.checkpoint, source.record(), {}
    if checkpoint.quantization:
        told["calibration"] = checkpoint.calibration or None
        facts = dataclasses.asdict(checkpoint.quantization)
        kv_scales = checkpoint.kv_scales()
        quantization = {"quantization": {**facts, "exclude": list(facts["exclude"]), "kv_scales": kv_scales}}
    return {
        "schema": SCHEMA,
        "format": form,
        "precision": precision.weights,
        "head": precision.head,
        "geometry": _geometry(checkpoint, profile, precision),
        "source": told,
        **({"adapter": adapter.record()} if adapter else {}),
        **quantization,
        "versions": {
            "cxr_triton": __version__,
            **{name: metadata.version(name) for name in ("onnx", "numpy", "ml_dtypes")},
        },
    }


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
