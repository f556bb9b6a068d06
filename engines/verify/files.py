"""The gate's part `files`: everything around the weights is the checkpoint's and the named profile's."""

from __future__ import annotations

import dataclasses
import json

from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.verify.reference import Reference
from cxr_triton.engines.verify.trial import Judged, Trial
from cxr_triton.export.geometry import read_config
from cxr_triton.export.graph import QUANTIZED
from cxr_triton.profile import ModelProfile

EXACT_FILES = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json")


def judge(trial: Trial) -> Judged:
    """Tokenizer, template, configs, profile, geometry and weights, each a fact without a number."""
    bundle, reference = trial.bundle, trial.reference
    expected = reference.source.side_files()
    faults = {
        **{name: _other_bytes(bundle, name, expected[name]) for name in EXACT_FILES},
        "config.json": _other_config(bundle, expected["config.json"]),
        "profile.yaml": _other_profile(bundle.profile, reference.profile),
        "geometry": _other_geometry(bundle, reference),
        "weights": _other_weights(bundle, reference),
        "adapter": _other_adapter(bundle, reference),
    }
    return [{"name": name, "passed": fault is None, "said": fault} for name, fault in faults.items()], {}


def _other_bytes(bundle: Bundle, name: str, expected: bytes) -> str | None:
    return None if (bundle.path / name).read_bytes() == expected else "is not byte for byte the checkpoint's"


def _other_config(bundle: Bundle, expected: bytes) -> str | None:
    own = (bundle.path / "config.json").read_bytes()
    if own == expected:
        return None
    if bundle.precision in QUANTIZED:
        # A quantizer writes the config anew; what it describes has to stay.
        mine, its = json.loads(own), json.loads(expected)
        ids = ("image_token_id", "vision_start_token_id", "vision_end_token_id", "model_type")
        if read_config(mine) == read_config(its) and all(mine.get(key) == its.get(key) for key in ids):
            return None
    return "describes another model"


def _other_profile(profile: ModelProfile, expected: ModelProfile) -> str | None:
    own = dataclasses.asdict(profile)
    wanted = {**dataclasses.asdict(expected), "max_sequence": profile.max_sequence}
    differing = sorted(key for key in wanted if own[key] != wanted[key])
    return ", ".join(f"{key} is {own[key]!r:.60}, expected {wanted[key]!r:.60}" for key in differing) or None


def _other_geometry(bundle: Bundle, reference: Reference) -> str | None:
    source, text, profile = reference.source, reference.source.text, reference.profile
    wanted = {
        "hidden": text.hidden_size,
        "layers": text.num_hidden_layers,
        "kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "vocab": text.vocab_size,
        "window_budget": profile.window_budget,
        "token_budget": profile.token_budget,
        "image_token_id": source.image_token_id,
        "eos_token_ids": source.eos_token_ids,
        "vision_start_token_id": source.vision_start_token_id,
        "merge_size": source.vision.spatial_merge_size,
    }
    differing = [key for key, value in wanted.items() if getattr(bundle.geometry, key) != value]
    return f"{', '.join(differing)} differ from the checkpoint's" if differing else None


def _other_adapter(bundle: Bundle, reference: Reference) -> str | None:
    own = (bundle.manifest.get("adapter") or {}).get("files")
    expected = reference.adapter.files if reference.adapter else None
    return None if own == expected else "the engine has another LoRA adapter than the reference"


def _other_weights(bundle: Bundle, reference: Reference) -> str | None:
    """The bundle's source has to be the reference's checkpoint, or quantized from it."""
    source = bundle.manifest["source"]
    if bundle.precision in QUANTIZED:
        calibration = source.get("calibration")
        source = calibration.get("source") if isinstance(calibration, dict) else None
    files = source.get("files") if isinstance(source, dict) else None
    if not isinstance(files, dict) or not files:
        return "the manifest does not say from which weights the engine was made; export again"
    made, weights = (
        {name: digest for name, digest in digests.items() if name.endswith(".safetensors")}
        for digests in (files, reference.digests)
    )
    return None if made == weights else "the engine was made from other weights than the reference's"
