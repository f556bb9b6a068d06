"""Small engine bundles around the random checkpoints: byte-level tokenizer, template, profile, both graphs."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints import END, IMAGE_TOKEN, VISION_END, VISION_START

from cxr_triton import __version__

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WINDOW_BUDGET, TOKEN_BUDGET, MAX_SEQUENCE = 16, 64, 1024


def write_tokenizer(folder: Path, vocab: int = 320) -> None:
    """One token for each byte, control tokens at the ids of `checkpoints`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = {
        IMAGE_TOKEN: "<|image_pad|>",
        VISION_START: "<|vision_start|>",
        VISION_END: "<|vision_end|>",
        END: "<|end|>",
        END + 1: "<|pad|>",
    }
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [f"<|unused_{index}|>" for index in range(len(letters), vocab)]
    for index, content in special.items():
        tokens[index] = content
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens[len(letters) :]])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_export(
    folder: Path, checkpoint: Path, *, precision: str = "fp32", compute: str | None = None, head: str | None = None
) -> Path:
    """An export folder of a checkpoint that `checkpoints.random_checkpoint` made."""
    import shutil

    from cxr_triton.export.checkpoint import Checkpoint
    from cxr_triton.export.decoder import write_decoder
    from cxr_triton.export.graph import Precision
    from cxr_triton.export.vision import write_vision
    from cxr_triton.profile import PROFILES

    source, chosen = Checkpoint(checkpoint), Precision.of(precision, compute, head)
    write_vision(source, folder, precision=precision, compute=compute, progress=False)
    write_decoder(source, folder, precision=precision, compute=compute, head=head, progress=False)
    write_tokenizer(folder, source.text.vocab_size)
    for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
        shutil.copy(checkpoint / name, folder / name)
    shutil.copy(PROFILES / "nv-reason-cxr-3b.yaml", folder / "profile.yaml")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    text = source.text
    geometry = {
        "hidden": text.hidden_size,
        "layers": text.num_hidden_layers,
        "kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "vocab": text.vocab_size,
        "window_budget": WINDOW_BUDGET,
        "token_budget": TOKEN_BUDGET,
        "max_sequence": MAX_SEQUENCE,
        "compute": chosen.compute,
        "image_token_id": source.image_token_id,
        "eos_token_ids": list(source.eos_token_ids),
        "vision_start_token_id": source.vision_start_token_id,
        "merge_size": source.vision.spatial_merge_size,
    }
    export = {
        "schema": 1,
        "precision": precision,
        "head": chosen.head,
        "geometry": geometry,
        "source": {"name": "random"},
        "versions": {"cxr_triton": __version__},
    }
    (folder / "export.json").write_text(json.dumps(export))
    return folder


def build_openvino(export: Path, out: Path, precision: str = "fp32", vision: str = "fp32"):
    """An openvino bundle of an export; `precision` as there, `vision` what its vision graph computes in."""
    return _build(export, out, precision, vision, "cpu-int4-openvino")


def build_mixed(export: Path, out: Path, precision: str = "fp32", vision: str = "fp32"):
    """A bundle whose decoder two engines run on one cache; otherwise as `build_openvino`."""
    return _build(export, out, precision, vision, "cpu-int4-mixed")


def build_int8(export: Path, out: Path):
    """A bundle of an export in int4 whose decoder runs in int4 and int8."""
    return _build(export, out, "int4", "fp32", "cpu-int4-int8")


def build_w4a8(export: Path, out: Path):
    """A bundle of an export in int4 whose products are those of the compiled library."""
    return _build(export, out, "int4", "fp32", "cpu-int4-w4a8")


def _build(export: Path, out: Path, precision: str, vision: str, recipe_name: str):
    from dataclasses import replace

    from cxr_triton.engines.build import build_bundle
    from cxr_triton.engines.recipe import load_recipe

    recipe = load_recipe(recipe_name)
    decoder = replace(recipe.decoder, precision=precision, head="int4" if precision == "int4" else "compute")
    recipe = replace(recipe, vision=replace(recipe.vision, precision=vision), decoder=decoder)
    return build_bundle(export, out, recipe=recipe)


def passing(bundle) -> dict:
    """A record as the gate writes one of a bundle that passes, though no gate has run."""
    from cxr_triton.engines.verify.record import PARTS, SCHEMA, subject

    part = {"passed": True, "error": None, "checks": [{"name": "paper", "passed": True}], "measured": {}}
    return {
        "schema": SCHEMA,
        "passed": True,
        "subject": subject(bundle.manifest),
        "made": "2026-11-22T00:00:00Z",
        "runtime": {"engine": "onnxruntime", "standin": None},
        "images": {"count": 8},
        "parts": {name: dict(part) for name in PARTS},
    }
