"""A LoRA adapter as peft writes it: read without torch or peft, checked against the checkpoint that it belongs to.

An adapter adds ``scale * B @ A`` to weights of linear layers (arXiv 2106.09685). One that does so, and nothing else, in
the language model is taken. All else that peft knows is refused, also what it may come to know.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxr_triton.errors import InvalidRequest, UnsupportedCheckpoint
from cxr_triton.export.checkpoint import DTYPES, Checkpoint
from cxr_triton.export.geometry import tensor_shapes
from cxr_triton.export.safetensors import Entry, read_header
from cxr_triton.profile import ModelProfile

FOLDER = "adapter"
"""Of an export and of a bundle."""
CONFIG, WEIGHTS = FILES = ("adapter_config.json", "adapter_model.safetensors")
MAX_RANK = 512
MERGE = "merge it into the checkpoint and export that, see docs/decoder-engines.md#lora-adapters"
"""What is to be done with an adapter that is not taken."""

_CONFIG_BYTES = 1 << 20
_TENSOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others change the weights beneath
# Keys that say nothing of what is computed, or that are read here; another one has to be empty.
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"})
_SILENT = frozenset(
    (
        *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
        *("megatron_core", "qalora_group_size", "eva_config"),
    )
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that fits a checkpoint.

    Attributes
    ----------
    name : str
    folder : Path
    rank : int
    scale : float
        What the product of both matrices is multiplied by: alpha / r, or alpha / sqrt(r) with rank stabilization.
    files : dict of str to str
        SHA-256 of `FILES`.
    """

    name: str
    folder: Path
    rank: int
    scale: float
    files: dict[str, str]
    _pairs: Mapping[str, tuple[Entry, Entry]]

    def record(self) -> dict:
        """``adapter`` of an export and of a manifest: name, rank and digests of its files."""
        return {"name": self.name, "rank": self.rank, "files": self.files}

    def deltas(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name of each weight of `Checkpoint` that it changes, and what it adds: (N, K) float32."""
        for name, (a, b) in self._pairs.items():
            yield name, np.float32(self.scale) * (_values(b) @ _values(a))


def read_adapter(folder: str | Path, checkpoint: Checkpoint, name: str) -> Adapter:
    """Read and check an adapter.

    Parameters
    ----------
    folder : path
        Holds `adapter_config.json` and `adapter_model.safetensors`; nothing else is read.
    checkpoint : Checkpoint
        What it was trained on.
    name : str
        What it is called.

    Raises
    ------
    UnsupportedCheckpoint
        A file is missing or damaged; its weights are of other shapes, of other layers than linear ones of the language
        model's, or not finite; or the config asks for more than LoRA.
    """
    folder = Path(folder)
    rank, scale = _strength(_config(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        raise UnsupportedCheckpoint(
            f"{folder} has no {WEIGHTS}; give the folder that peft's save_pretrained wrote, with safetensors: pickles "
            "(.bin, .pt) are not read"
        )
    pairs = _pairs(read_header(folder / WEIGHTS), rank, checkpoint)
    files = {}
    for each in FILES:
        with open(folder / each, "rb") as file:
            files[each] = hashlib.file_digest(file, "sha256").hexdigest()
    return Adapter(name, folder, rank, scale, files, pairs)


def named_adapter(folder: str | Path | None, checkpoint: Checkpoint, profile: ModelProfile) -> Adapter | None:
    """The adapter that a profile names; None of a profile that names none.

    Raises
    ------
    InvalidRequest
        One of the two, folder and name, is missing; or the adapter is another than the profile's digest says.
    UnsupportedCheckpoint
        As `read_adapter`.
    """
    named = profile.adapter
    if folder is None:
        if named:
            raise InvalidRequest(
                f"profile {profile.name} reads with the LoRA adapter {named.name}; give its folder with --adapter"
            )
        return None
    if named is None:
        raise InvalidRequest(
            f"profile {profile.name} names no adapter, and readings with one are another model's; give a profile of "
            f"your own that says `extends: {profile.name}` and `adapter: {{name: {_suggested(Path(folder))}}}`"
        )
    adapter = read_adapter(folder, checkpoint, named.name)
    if named.sha256 not in (None, adapter.files[WEIGHTS]):
        raise InvalidRequest(
            f"{WEIGHTS} in {folder} has SHA-256 {adapter.files[WEIGHTS]}, profile {profile.name} names {named.sha256}; "
            "give the adapter that the profile is of"
        )
    return adapter


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Copy its files into `folder`, which is made."""
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(adapter.folder / name, folder / name)


def _suggested(folder: Path) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("-._") or "NAME"


def _config(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            raw = file.read(_CONFIG_BYTES + 1)
        config = json.loads(raw) if len(raw) <= _CONFIG_BYTES else None
    except FileNotFoundError:
        raise UnsupportedCheckpoint(
            f"{path} does not exist; give the folder that peft's save_pretrained wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedCheckpoint(f"{path} is not readable JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict):
        raise UnsupportedCheckpoint(
            f"{path} is no JSON object of at most {_CONFIG_BYTES} bytes; save the adapter again"
        )
    faults = [f"{key} {config[key]!r:.60}" for key in sorted({*config} - _READ - _SILENT) if config[key]]
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type {config.get('peft_type')!r:.60}")
    if config.get("bias", "none") != "none":
        faults.append(f"bias {config['bias']!r:.60}")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        faults.append(f"init_lora_weights {config['init_lora_weights']!r:.60}")
    if faults:
        raise UnsupportedCheckpoint(f"{path} has {', '.join(faults)}; plain LoRA is taken: {MERGE}")
    return config


def _strength(config: dict) -> tuple[int, float]:
    """Rank and scale."""
    rank, is_stable = config.get("r"), config.get("use_rslora") or False
    alpha: Any = config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise UnsupportedCheckpoint(
            f"{CONFIG} has r {rank!r:.40}, from 1 to {MAX_RANK} is taken; save the adapter again"
        )
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not 0 < alpha < math.inf or not isinstance(is_stable, bool):
        raise UnsupportedCheckpoint(
            f"{CONFIG} has lora_alpha {alpha!r:.40} and use_rslora {is_stable!r:.40}; a positive number and true or "
            "false are needed"
        )
    return rank, alpha / (math.sqrt(rank) if is_stable else rank)


def _pairs(entries: Mapping[str, Entry], rank: int, checkpoint: Checkpoint) -> dict[str, tuple[Entry, Entry]]:
    """Matrices A and B by the weight that they change."""
    shapes = tensor_shapes(checkpoint.text, checkpoint.vision, checkpoint.tied)
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        weight, part = _weight(name)
        if not (weight.startswith("language_model.layers.") and weight.endswith("_proj.weight") and weight in shapes):
            raise UnsupportedCheckpoint(
                f"{WEIGHTS} holds {name:.160}, which is no LoRA matrix of a linear layer of this checkpoint's language "
                f"model; {MERGE}"
            )
        rows, columns = shapes[weight]
        wanted = (rank, columns) if part == "A" else (rows, rank)
        if entry.shape != wanted or entry.dtype not in DTYPES:
            raise UnsupportedCheckpoint(
                f"{name:.160} in {WEIGHTS} is {entry.dtype} {list(entry.shape)}, this checkpoint and rank {rank} call "
                f"for {', '.join(DTYPES)} {list(wanted)}; give the adapter of this checkpoint"
            )
        if not np.isfinite(_values(entry)).all():
            raise UnsupportedCheckpoint(f"{name:.160} in {WEIGHTS} holds values that are not finite; save it again")
        if part in (parts := found.setdefault(weight, {})):
            raise UnsupportedCheckpoint(f"{WEIGHTS} has matrix {part} of {weight} twice; save the adapter again")
        parts[part] = entry
    if halves := [weight for weight, parts in found.items() if len(parts) < 2]:
        raise UnsupportedCheckpoint(f"{WEIGHTS} has one matrix of two for {halves[0]}; save the adapter again")
    if not found:
        raise UnsupportedCheckpoint(f"{WEIGHTS} holds no matrix; save the adapter again")
    return {weight: (parts["A"], parts["B"]) for weight, parts in found.items()}


def _weight(name: str) -> tuple[str, str]:
    """The weight, by our name, that a tensor belongs to, and which matrix it is; empty where it is none."""
    matched = _TENSOR.fullmatch(name.removeprefix("base_model.model."))
    if matched is None:
        return "", ""
    module, part = matched.groups()
    for theirs in ("model.language_model.", "model."):
        if module.startswith(theirs):
            return f"language_model.{module.removeprefix(theirs)}.weight", part
    return "", ""


def _values(entry: Entry) -> np.ndarray:
    mapped = np.memmap(entry.path, np.uint8, "r", entry.offset, (entry.nbytes,))
    return mapped.view(DTYPES[entry.dtype]).reshape(entry.shape).astype(np.float32)
