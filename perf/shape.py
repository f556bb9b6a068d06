"""Write a random-weight checkpoint of the real 3B shape, so that speed and memory are measured without the weights.

Real config values, real file layout, bf16, deterministic, streamed; the text that it generates means nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import ml_dtypes
import numpy as np

from ..engines.recipe import TEXT_3B, VISION_3B
from ..export.checkpoint import read_config, tensor_shapes

SHARD_BYTES = 4_000_000_000

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
    seed: int = 0,
    text_values: dict = TEXT_3B,
    vision_values: dict = VISION_3B,
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
    seed : int
    text_values, vision_values : dict
        Config values; those of the 3B by default.

    Returns
    -------
    Path
        `folder`.
    """
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
    prefixes = (
        {"language_model.": "model.language_model.", "visual.": "model.visual."}
        if nested
        else {"language_model.": "model.", "visual.": "visual."}
    )
    shapes = {}
    for name, shape in tensor_shapes(text, vision, tied=True).items():
        part = name.split(".")[0] + "."
        shapes[prefixes[part] + name.removeprefix(part)] = shape
    shards: list[dict] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(int(np.prod(s)) for s in (*shards[-1].values(), shape)) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    random = np.random.Generator(np.random.SFC64(seed))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        _write_shard(folder / file, shard, random)
    total = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], random: np.random.Generator) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            for values in _values(name, shape, random):
                file.write(values.astype(ml_dtypes.bfloat16).view(np.uint8).data)


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator):
    """Row chunks of a tensor: norms of 1, and weights that keep the variance of what passes through them."""
    if len(shape) == 1:
        yield np.zeros(shape, np.float32) if name.endswith("bias") else np.ones(shape, np.float32)
        return
    fan_in = int(np.prod(shape[1:]))
    scale = np.float32(0.05 if "embed_tokens" in name else fan_in**-0.5)
    rows = max(1, (16 << 20) // fan_in)
    for start in range(0, shape[0], rows):
        values = random.standard_normal((min(rows, shape[0] - start), *shape[1:]), np.float32)
        values *= scale
        yield values


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--nested", is_flag=True, help="Newer config and tensor names.")
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, tokenizer: Path, nested: bool, seed: int):
    """Write a random checkpoint of the 3B shape to FOLDER, with the tokenizer files of another folder."""
    write_shape(folder, tokenizer, nested=nested, seed=seed)


if __name__ == "__main__":
    main()
