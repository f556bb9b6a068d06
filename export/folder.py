"""The decoder as the checkpoint itself, for engines that open one: weights, configs and tokenizer.

Byte for byte, but for int4 of modelopt, which those engines do not read: `pack_quantized` says as what.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from cxr_triton.errors import InvalidRequest
from cxr_triton.export.checkpoint import QUANT_CONFIG, Checkpoint
from cxr_triton.export.graph import QUANTIZED, Form, Precision
from cxr_triton.export.pack_quantized import write_pack_quantized
from cxr_triton.export.progress import bar
from cxr_triton.export.safetensors import read_header

FOLDER = "decoder"
PLAIN = ("fp32", "fp16", "bf16")
_PATTERNS = (
    *("config.json", "generation_config.json", "hf_quant_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.*", "preprocessor_config.json", "processor_config.json"),
)
_LINKED_BYTES = 64 << 20


def write_folder(checkpoint: Checkpoint, folder: str | Path, *, progress: bool | None = None) -> Path:
    """Copy what an engine reads of a checkpoint into `folder`, which is made.

    Parameters
    ----------
    checkpoint : Checkpoint
        Plain, or quantized as `cxr-triton quantize` writes it.
    folder : Path
    progress : bool, optional
        Show a bar on standard error; by default on a terminal.
    """
    folder = Path(folder)
    folder.mkdir()
    files = {path for pattern in _PATTERNS for path in checkpoint.folder.glob(pattern)}
    packs = checkpoint.quantization is not None and checkpoint.quantization.scheme == "int4-awq"
    if packs:
        files -= {checkpoint.folder / name for name in ("config.json", QUANT_CONFIG)}
    else:
        files |= checkpoint.weight_files
        if (index := checkpoint.folder / "model.safetensors.index.json").is_file():
            files.add(index)
    total = sum(path.stat().st_size for path in files) + packs * checkpoint.nbytes()
    with bar(total, "checkpoint", progress, unit="B", unit_scale=True) as shown:
        for path in sorted(files):
            shutil.copyfile(path, folder / path.name)
            shown.update(path.stat().st_size)
        if packs:
            write_pack_quantized(checkpoint, folder, shown.update)
    return folder


def decoder_bytes(folder: Path, *, tied: bool) -> int:
    """Bytes of the decoder's tensors in a folder of `write_folder`, less a table that tokens are only looked up in."""
    entries = {name: entry for path in folder.glob("*.safetensors") for name, entry in read_header(path).items()}
    skipped = ("visual.",) if tied else ("visual.", "embed_tokens.")
    return sum(entry.nbytes for name, entry in entries.items() if not any(part in name for part in skipped))


def take(source: Path, target: Path) -> None:
    """Copy a folder of `write_folder`; files of 64 MiB and more are hard links where the file system has them."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.stat().st_size >= _LINKED_BYTES:
            with contextlib.suppress(OSError):
                os.link(path, target / path.name)
                continue
        shutil.copyfile(path, target / path.name)


def _precision(weights: str, compute: str | None, head: str | None) -> Precision:
    """`weights` is what the engine computes in, or a quantized checkpoint's scheme; `compute` the vision tower's."""
    if weights not in (*PLAIN, *QUANTIZED) or head not in (None, "compute"):
        raise InvalidRequest(
            f"precision {weights} with head {head} was asked for; a checkpoint is taken as it is: choose "
            f"{', '.join(PLAIN)} for a plain one, {' or '.join(QUANTIZED)} for a quantized one, and no head"
        )
    tower = Precision.of(compute or (weights if weights in PLAIN else "fp32"))
    return Precision(weights, tower.compute, "compute")


FORM = Form(
    "checkpoint",
    _precision,
    lambda checkpoint, folder, _, __, progress: write_folder(checkpoint, folder / FOLDER, progress=progress),
    default="bf16",
    takes_adapter=True,
)
