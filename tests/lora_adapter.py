"""A LoRA adapter of random matrices in peft's layout, and the weights of a model with it by LoRA's definition."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 12
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/other",
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "target_modules": [module.partition(".")[2] for module in MODULES],
    "bias": "none",
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "modules_to_save": None,
    "rank_pattern": {},
}
PREFIX = "base_model.model.model.language_model.layers."


def write_random(folder: Path, checkpoint: Path, *, strength: float = 0.05, seed: int = 0, **config) -> Path:
    """Write matrices for `MODULES` of every layer into `folder`, which is made; `config` goes over `CONFIG`."""
    weights = load_file(checkpoint / "model.safetensors")
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in weights.items():
        layer, _, module = name.partition(".layers.")[2].removesuffix(".weight").partition(".")
        if "visual" in name or module not in MODULES:
            continue
        rows, columns = weight.shape
        tensors[f"{PREFIX}{layer}.{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw) / columns**0.5
        tensors[f"{PREFIX}{layer}.{module}.lora_B.weight"] = strength * torch.randn(rows, RANK, generator=draw)
    folder.mkdir(parents=True)
    save(folder, tensors, **config)
    return folder


def save(folder: Path, tensors: dict[str, torch.Tensor], **config) -> None:
    """Write an adapter's two files."""
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))


def merge(model, folder: Path, scale: float = ALPHA / RANK) -> None:
    """Add ``scale * B @ A`` to the weights of a model in transformers."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            module = model.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A")[0])
            module.weight.data += scale * tensors[name.replace("lora_A", "lora_B")] @ a
