"""A checkpoint that modelopt quantized to int4 (AWQ), as `compressed-tensors` stores one: `pack-quantized`.

Layers become eight values to an int32 with bfloat16 scales. That layout has no place for AWQ's scale of a layer's
input: that of `down_proj` goes into the rows of `up_proj` before it, exactly, since nothing but a product lies between;
a layer whose scale has no such place (`o_proj`: several of its columns have one row before them) is stored plain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from cxr_triton.export.checkpoint import Checkpoint, Int4Weight
from cxr_triton.export.geometry import tensor_shapes
from cxr_triton.export.safetensors import header

FILE = "model.safetensors"
_BF16 = np.dtype(ml_dtypes.bfloat16)
_KINDS = {_BF16: "BF16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
_KINDS |= {np.dtype(np.int32): "I32", np.dtype(np.int64): "I64"}
_Tensor = tuple[np.dtype, tuple[int, ...], Callable[[], np.ndarray]]  # type, shape, and what gives the values


def write_pack_quantized(checkpoint: Checkpoint, folder: Path, on_bytes: Callable[[int], object]) -> None:
    """Write weights and `config.json` into a folder that holds the checkpoint's other files.

    Parameters
    ----------
    checkpoint : Checkpoint
        Of the scheme ``int4-awq``.
    folder : Path
    on_bytes : callable
        Told how many bytes each tensor took.
    """
    tensors: dict[str, _Tensor] = {}
    plain = ["lm_head", "re:.*visual.*"]
    for name in tensor_shapes(checkpoint.text, checkpoint.vision, checkpoint.tied):
        weight, module = checkpoint.weight(name), name.removesuffix(".weight")
        if not isinstance(weight, Int4Weight):
            values = checkpoint.array(name)
            tensors[name] = values.dtype, values.shape, partial(checkpoint.array, name)
        elif weight.pre_quant_scale is None or _goes_before(checkpoint, module):
            tensors |= _packed(name, weight, _rows(checkpoint, module))
        else:
            tensors[name] = _BF16, shape_of(weight), partial(_plain, weight, weight.pre_quant_scale)
            plain.append("re:.*" + re.escape(module.removeprefix("language_model.")))
    _write(folder / FILE, tensors, on_bytes)
    config = json.loads((checkpoint.folder / "config.json").read_text("utf-8"))
    group = checkpoint.quantization.group_size if checkpoint.quantization else None
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": plain,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _goes_before(checkpoint: Checkpoint, module: str) -> bool:
    """Whether a quantized layer takes over the scale of this one's input."""
    path, _, last = module.rpartition(".")
    return last == "down_proj" and isinstance(checkpoint.weight(f"{path}.up_proj.weight"), Int4Weight)


def _rows(checkpoint: Checkpoint, module: str) -> np.ndarray | None:
    """What the rows of a layer take over from the one after it, if anything."""
    if not module.endswith("up_proj"):
        return None
    after = checkpoint.weight(module.replace("up_proj", "down_proj") + ".weight")
    return after.pre_quant_scale if isinstance(after, Int4Weight) else None


def _packed(name: str, weight: Int4Weight, rows: np.ndarray | None) -> dict[str, _Tensor]:
    """The three tensors of a layer [N, K]."""
    n, k = shape_of(weight)
    return {
        f"{name}_packed": (np.dtype(np.int32), (n, k // 8), lambda: pack(values_of(weight))),
        f"{name}_scale": (_BF16, weight.scales.shape, partial(_scales, weight, rows)),
        f"{name}_shape": (np.dtype(np.int64), (2,), lambda: np.array([n, k])),
    }


def _scales(weight: Int4Weight, rows: np.ndarray | None) -> np.ndarray:
    scales = weight.scales.astype(np.float32)
    return (scales if rows is None else scales * rows.astype(np.float32)[:, None]).astype(_BF16)


def shape_of(weight: Int4Weight) -> tuple[int, int]:
    """N and K."""
    return 2 * weight.packed.shape[0], weight.packed.shape[1]


def values_of(weight: Int4Weight) -> np.ndarray:
    """Signed values, (N, K) int8."""
    signed = weight.packed.view(np.int8)
    return np.stack([(signed << 4) >> 4, signed >> 4], axis=1).reshape(-1, signed.shape[1])


def pack(signed: np.ndarray) -> np.ndarray:
    """Eight values from -8 to 7 along K to an int32, the first in the lowest bits, each with 8 added: (N, K / 8)."""
    nibbles = (signed + 8).astype(np.uint8)
    return np.ascontiguousarray(nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view("<i4")


def _plain(weight: Int4Weight, smooth: np.ndarray) -> np.ndarray:
    scales = np.repeat(weight.scales.astype(np.float32), shape_of(weight)[1] // weight.scales.shape[1], axis=1)
    return (values_of(weight) * scales * smooth.astype(np.float32)).astype(_BF16)


def _write(path: Path, tensors: dict[str, _Tensor], on_bytes: Callable[[int], object]) -> None:
    sizes = {name: int(np.prod(shape)) * kind.itemsize for name, (kind, shape, _) in tensors.items()}
    named = {_file_name(name): (_KINDS[kind], shape, sizes[name]) for name, (kind, shape, _) in tensors.items()}
    with open(path, "wb") as file:
        file.write(header(named))
        for name, (_, _, make) in tensors.items():
            file.write(np.ascontiguousarray(make()).view(np.uint8).data)
            on_bytes(sizes[name])


def _file_name(name: str) -> str:
    """As the newer layout has it, which takes both kinds of config."""
    return name if name.startswith("lm_head.") else f"model.{name}"
