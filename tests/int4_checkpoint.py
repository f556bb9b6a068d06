"""A checkpoint in modelopt's int4 layout, rounded to the nearest, and the weights that it stands for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

GROUP = 128
FOLDED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # their smoothing is in the norm before


def write_int4(source: Path, folder: Path, *, smoothing: float = 0.3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write `source`'s decoder in int4 into `folder`; gives the effective weights, by names of the file.

    `o_proj` and `down_proj` get a made-up scale of their input, log-normal with the deviation `smoothing`.
    """
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    rng, stored, effective = np.random.default_rng(seed), {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored[name] = effective[name] = tensor
        module = name.removesuffix(".weight")
        if "visual" in name or not module.endswith("_proj"):
            continue
        weight = tensor.float().numpy()
        smooth = np.ones(weight.shape[1], np.float32)
        if not module.endswith(FOLDED):
            smooth = np.exp(smoothing * rng.standard_normal(weight.shape[1])).astype(np.float32)
            stored[f"{module}.pre_quant_scale"] = torch.from_numpy(smooth).bfloat16()
            smooth = stored[f"{module}.pre_quant_scale"].float().numpy()
        blocks = (weight / smooth).reshape(len(weight), -1, GROUP)
        scales = np.maximum(np.abs(blocks).max(2) / 7, 1e-8).astype(np.float32)
        values = np.clip(np.rint(blocks / scales[..., None]), -8, 7).astype(np.int8)
        effective[name] = torch.from_numpy((values * scales[..., None]).reshape(weight.shape) * smooth)
        flat = values.reshape(weight.shape).view(np.uint8) & 15
        stored[name] = torch.from_numpy(flat[0::2] | flat[1::2] << 4)
        stored[f"{module}.weight_scale"] = torch.from_numpy(scales)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_algo": "W4A16_AWQ", "group_size": GROUP, "exclude_modules": ["lm_head", "*visual*"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return effective
