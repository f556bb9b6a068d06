"""A small random model as an engine bundle that the served ensemble can run: pictures, chat, all budgets small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bundles import write_tokenizer
from checkpoints import random_checkpoint

from cxr_triton import __version__

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}<|end|>\n{% endfor %}assistant:"
)
PROFILE = """\
extends: nv-reason-cxr-3b
name: random
title: Random weights
min_pixels: 12544
max_pixels: 50176
max_aspect_ratio: 2.0
max_images: 2
max_sequence: 1024
decoding:
  max_new_tokens: 256
tasks:
  compare:
    prompt: Compare the two radiographs.
    answer: text
    description: Two images.
    min_images: 2
    max_images: 2
  quiz:
    prompt: Name the lobes of the right lung.
    answer: text
    description: No image.
    min_images: 0
    max_images: 0
"""


def write_bundle(folder: Path) -> Path:
    """Checkpoint, export and bundle in a folder; the path of the bundle."""
    from cxr_triton.engines.bundle import build_bundle
    from cxr_triton.export.checkpoint import Checkpoint
    from cxr_triton.export.decoder import write_decoder
    from cxr_triton.export.vision import write_vision
    from cxr_triton.profile import load_profile

    checkpoint, export = folder / "checkpoint", folder / "export"
    random_checkpoint(checkpoint)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    write_tokenizer(checkpoint)
    (folder / "profile.yaml").write_text(PROFILE)
    profile = load_profile(folder / "profile.yaml")
    source = Checkpoint(checkpoint)
    write_vision(source, export, progress=False)
    write_decoder(source, export, progress=False)
    names = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json")
    for name in (*names, "chat_template.jinja"):
        shutil.copy(checkpoint / name, export / name)
    (export / "profile.yaml").write_text(profile.to_yaml())
    geometry = {
        "hidden": source.text.hidden_size,
        "layers": source.text.num_hidden_layers,
        "kv_heads": source.text.num_key_value_heads,
        "head_dim": source.text.head_dim,
        "vocab": source.text.vocab_size,
        "window_budget": profile.window_budget,
        "token_budget": profile.token_budget,
        "max_sequence": profile.max_sequence,
        "compute": "fp32",
        "image_token_id": source.image_token_id,
        "eos_token_ids": list(source.eos_token_ids),
        "vision_start_token_id": source.vision_start_token_id,
        "merge_size": source.vision.spatial_merge_size,
    }
    manifest = {
        "schema": 1,
        "precision": "fp32",
        "geometry": geometry,
        "source": {"name": "random"},
        "versions": {"cxr_triton": __version__},
    }
    (export / "export.json").write_text(json.dumps(manifest))
    return build_bundle(export, folder / "bundle").path
