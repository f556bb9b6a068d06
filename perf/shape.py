"""Write a random-weight checkpoint of the real 3B shape, so that speed and memory are measured without the weights.

Real config values, real file layout, bf16 or quantized as modelopt lays it out, deterministic, streamed; the text that
it generates means nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from cxr_triton.cli import Command
from cxr_triton.engines.recipe import TEXT_3B, VISION_3B
from cxr_triton.export.geometry import read_config, tensor_shapes
from cxr_triton.export.safetensors import header
from cxr_triton.extras import require

_Stored = tuple[tuple[int, ...], str]  # shape and type of a tensor
SHARD_BYTES = 4_000_000_000
GROUP = 128
ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
QUANTIZATION = {
    "fp8": {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "visual*"]}},
    "int4-awq": {
        "quantization": {"quant_algo": "W4A16_AWQ", "group_size": GROUP, "exclude_modules": ["lm_head", "visual*"]}
    },
}

TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
GENERATION = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "eos_token_id": [151645, 151643],
    "do_sample": True,
    "temperature": 1e-6,
    "repetition_penalty": 1.05,
}
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def write_shape(
    folder: Path,
    tokenizer: Path,
    *,
    nested: bool = False,
    scheme: str | None = None,
    seed: int = 0,
    text_values: dict = TEXT_3B,
    vision_values: dict = VISION_3B,
    normal: Callable[[int, int, float], np.ndarray] | None = None,
) -> Path:
    """Write the checkpoint folder, about 7.5 GB.

    Parameters
    ----------
    folder : Path
        Made if absent.
    tokenizer : Path
        Folder with the `tokenizer.json` and `chat_template.jinja` to copy.
    nested : bool
        The newer config with `text_config` and tensors `model.language_model.*`, instead of the flat one.
    scheme : {"fp8", "int4-awq"}, optional
        Linear layers of the decoder as a quantized checkpoint holds them, with made-up scales.
    seed : int
    text_values, vision_values : dict
        Config values; those of the 3B by default.
    normal : callable, optional
        Gives normal values, bf16 [rows, columns], for a number of both and their standard deviation, such as a GPU's.

    Returns
    -------
    Path
        `folder`.
    """
    require("ml_dtypes")
    folder.mkdir(parents=True, exist_ok=True)
    common = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **TOKENS}
    config = {**common, "tie_word_embeddings": True, "vision_config": vision_values}
    config |= (
        {"text_config": text_values, "dtype": "bfloat16"} if nested else {**text_values, "torch_dtype": "bfloat16"}
    )
    files = {"config": config, "generation_config": GENERATION, "preprocessor_config": PREPROCESSOR}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / name, folder / name)
    text, vision = read_config(config)
    shapes: dict[str, _Stored] = {}
    for ours, shape in tensor_shapes(text, vision, tied=True).items():
        name = _file_name(ours, nested=nested)
        if scheme and len(shape) == 2 and ours.startswith("language_model.") and ours.endswith("_proj.weight"):
            shapes |= _quantized(name, *shape, scheme)
        else:
            shapes[name] = shape, "BF16"
    if scheme:
        (folder / "hf_quant_config.json").write_text(json.dumps(QUANTIZATION[scheme], indent=2))
        (folder / "calibration.json").write_text(json.dumps({"head_input_amax": 16.0}))
    shards: list[dict[str, _Stored]] = [{}]
    for name, tensor in shapes.items():
        if sum(map(_nbytes, (*shards[-1].values(), tensor))) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    random = np.random.Generator(np.random.SFC64(seed))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        _write_shard(folder / file, shard, random, normal)
    total = sum(map(_nbytes, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def _file_name(ours: str, *, nested: bool) -> str:
    """A tensor's name in a file of this layout."""
    if nested:
        return f"model.{ours}"
    return ours if ours.startswith("visual.") else f"model.{ours.removeprefix('language_model.')}"


def _nbytes(tensor: _Stored) -> int:
    shape, kind = tensor
    return ITEM_BYTES[kind] * int(np.prod(shape))


def _quantized(name: str, n: int, k: int, scheme: str) -> dict[str, _Stored]:
    """Tensors of a layer [n, k] in modelopt's unified layout."""
    module = name.removesuffix(".weight")
    if scheme == "fp8":
        scale: _Stored = ((), "F32")
        return {name: ((n, k), "F8_E4M3"), f"{module}.weight_scale": scale, f"{module}.input_scale": scale}
    tensors: dict[str, _Stored] = {name: ((n // 2, k), "U8"), f"{module}.weight_scale": ((n, k // GROUP), "F32")}
    if module.endswith(("o_proj", "down_proj")):
        tensors[f"{module}.pre_quant_scale"] = ((k,), "BF16")
    return tensors


def _write_shard(path: Path, tensors: dict[str, _Stored], random: np.random.Generator, normal: Callable | None) -> None:
    with open(path, "wb") as file:
        file.write(header({name: (kind, shape, _nbytes((shape, kind))) for name, (shape, kind) in tensors.items()}))
        for name, (shape, kind) in tensors.items():
            for values in _values(name, shape, kind, random, normal):
                file.write(np.ascontiguousarray(values).view(np.uint8).data)


def _values(name: str, shape: tuple[int, ...], kind: str, random: np.random.Generator, normal: Callable | None):
    """Row chunks of a tensor: norms of 1, and weights that keep the variance of what passes through them."""
    import ml_dtypes

    if kind == "F32":
        yield np.full(max(1, int(np.prod(shape))), 2e-3, np.float32)
        return
    if len(shape) == 1:
        bias = name.endswith("bias")
        yield (np.zeros(shape, np.float32) if bias else np.ones(shape, np.float32)).astype(ml_dtypes.bfloat16)
        return
    fan_in = int(np.prod(shape[1:]))
    scale = np.float32(0.05 if "embed_tokens" in name else fan_in**-0.5)
    rows = max(1, (16 << 20) // fan_in)
    for start in range(0, shape[0], rows):
        size = (min(rows, shape[0] - start), *shape[1:])
        if kind == "U8":
            yield random.integers(0, 256, size, np.uint8)
            continue
        if normal and kind == "BF16":
            yield normal(size[0], fan_in, float(scale))
            continue
        values = random.standard_normal(size, np.float32)
        values *= np.float32(16) if kind == "F8_E4M3" else scale
        yield values.astype(ml_dtypes.float8_e4m3fn if kind == "F8_E4M3" else ml_dtypes.bfloat16)


@click.command(cls=Command, extra="local")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--nested", is_flag=True, help="Newer config and tensor names.")
@click.option("--scheme", type=click.Choice(list(QUANTIZATION)), help="Quantized; bf16 without.")
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, tokenizer: Path, nested: bool, scheme: str | None, seed: int):
    """Write a random checkpoint of the 3B shape to FOLDER, with the tokenizer files of another folder."""
    write_shape(folder, tokenizer, nested=nested, scheme=scheme, seed=seed)


if __name__ == "__main__":
    main()
