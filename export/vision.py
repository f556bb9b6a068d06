"""Author of `vision.onnx`: the Qwen2.5-VL vision tower on 8x8-patch windows as a batch axis.

Standard operators of opset 20. Windowed blocks attend within `[B · W, 64]`, full blocks within `[B, W · 64]`: one
reshape between them, no mask of patches by patches, no index that depends on data. Inputs and outputs:
docs/architecture.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.graph import GraphWriter, Precision

OPSET = 20
NORM_EPSILON = 1e-6  # fixed in the model's code, not in its config
WINDOW_PATCHES, MERGE_UNIT, PATCH_VALUES = 64, 4, 588
# Added to the scores of patches that do not exist. Finite, because a window of the padding has no other patch and a
# softmax over -inf is NaN, which the full-attention blocks would spread.
_MASKED = np.float32(-1e30)


def write_vision(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    precision: str = "fp32",
    compute: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Write `vision.onnx` and `vision.onnx.data`.

    Parameters
    ----------
    checkpoint : Checkpoint
    folder : Path
        Made if absent.
    precision, compute : str
        See `Precision`. The tower's weights are never quantized: with int4 they have the compute type.
    progress : bool, optional
        Show a bar; by default on a terminal.

    Returns
    -------
    Path
        The `.onnx` file.
    """
    vision, chosen = checkpoint.vision, Precision.of(precision, compute)
    path = Path(folder) / "vision.onnx"
    with GraphWriter(path, OPSET, chosen, source_bytes=checkpoint.nbytes("visual."), progress=progress) as g:
        g.input("pixel_windows", TensorProto.UINT8, ["B", "W", WINDOW_PATCHES, PATCH_VALUES])
        g.input("patch_rows_cols", TensorProto.INT32, ["B", "W", WINDOW_PATCHES, 2])
        g.input("valid", TensorProto.BOOL, ["B", "W", WINDOW_PATCHES])
        g.input("merge_order", TensorProto.INT32, ["B", "T"])
        g.output("image_embeddings", g.kind, ["B", "T", vision.out_hidden_size])
        x = _embed(g, checkpoint)  # [B, W, 64, hidden] fp32
        cos, sin = _rotary(g, checkpoint)  # [B, W, 64, head_dim / 2]
        present, absent = g.constant("present", np.float32(0)), g.constant("absent", _MASKED)
        bias = g.node("Where", "valid", present, absent)
        # Where attention happens: its sequences [N, L], as (shape of one, cos, sin, key bias).
        windowed, full = (
            (
                n,
                length,
                g.node("Reshape", cos, g.ints(n, 1, length, vision.head_dim // 2)),
                g.node("Reshape", sin, g.ints(n, 1, length, vision.head_dim // 2)),
                g.node("Reshape", bias, g.ints(n, 1, 1, length)),
            )
            for n, length in ((-1, WINDOW_PATCHES), (0, -1))
        )
        for i in range(vision.depth):
            x = _block(g, checkpoint, i, x, full if i in vision.fullatt_block_indexes else windowed)
        _merge(g, checkpoint, x)
    return path


def _embed(g: GraphWriter, checkpoint: Checkpoint) -> str:
    """Normalize bytes and apply the patch kernel, both in fp32 up to the kernel's product."""
    config, vision = checkpoint.preprocessor, checkpoint.vision
    mean, std = (np.asarray(config[key], np.float64) for key in ("image_mean", "image_std"))
    scale = np.repeat(config.get("rescale_factor", 1 / 255) / std, PATCH_VALUES // 3).astype(np.float32)
    shift = np.repeat(-mean / std, PATCH_VALUES // 3).astype(np.float32)
    x = g.cast("pixel_windows", TensorProto.FLOAT)
    x = g.node("Add", g.node("Mul", x, g.constant("pixel_scale", scale)), g.constant("pixel_shift", shift))
    kernel = checkpoint.array("visual.patch_embed.proj.weight")  # [hidden, 3, 2, 14, 14]
    # A still fills both temporal frames with the same pixels.
    kernel = kernel.astype(np.float32).sum(2).reshape(vision.hidden_size, PATCH_VALUES)
    return g.to_fp32(g.linear(g.to_compute(x), "visual.patch_embed.proj.weight", kernel))


def _rotary(g: GraphWriter, checkpoint: Checkpoint) -> tuple[str, str]:
    """Cos and sin [B, W, 64, head_dim / 2], fp32: the first half of the frequencies turns with the row."""
    vision = checkpoint.vision
    half = vision.head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = (1 / np.float32(vision.rope_theta) ** exponents).astype(np.float32)
    places = g.cast("patch_rows_cols", TensorProto.FLOAT)
    axes = np.repeat(np.arange(2, dtype=np.int64), half // 2)
    places = g.node("Gather", places, g.constant("rotary_axes", axes), axis=3)
    angles = g.node("Mul", places, g.constant("rotary_frequencies", np.tile(frequencies, 2)))
    return g.node("Cos", angles), g.node("Sin", angles)


def _norm(g: GraphWriter, checkpoint: Checkpoint, name: str, x: str) -> str:
    """fp32 [.., hidden] → compute type [.., hidden]. RMSNormalization exists from opset 23 only."""
    square = g.node("Pow", x, g.constant("two", np.float32(2)))
    mean = g.node("ReduceMean", square, g.ints(-1), keepdims=1)
    root = g.node("Sqrt", g.node("Add", mean, g.constant("norm_epsilon", np.float32(NORM_EPSILON))))
    weight = g.vector(name, checkpoint.array(name), np.dtype(np.float32))
    return g.to_compute(g.node("Mul", g.node("Div", x, root), weight))


def _block(g: GraphWriter, checkpoint: Checkpoint, i: int, x: str, sequences: tuple) -> str:
    vision, prefix = checkpoint.vision, f"visual.blocks.{i}"
    n, length, cos, sin, bias = sequences

    def linear(y: str, name: str) -> str:
        weight, b = (checkpoint.array(f"{prefix}.{name}.{part}") for part in ("weight", "bias"))
        return g.linear(y, f"{prefix}.{name}.weight", weight, b)

    def heads(y: str, perm: list[int]) -> str:  # [B, W, 64, hidden] → [N, heads, L, head_dim]
        y = g.node("Reshape", y, g.ints(n, length, vision.num_heads, vision.head_dim))
        return g.node("Transpose", y, perm=perm)

    def rotate(y: str) -> str:
        a, b = g.node("Split", g.to_fp32(y), outputs=2, axis=-1, num_outputs=2)
        a, b = (
            g.node("Sub", g.node("Mul", a, cos), g.node("Mul", b, sin)),
            g.node("Add", g.node("Mul", b, cos), g.node("Mul", a, sin)),
        )
        return g.node("Concat", a, b, axis=-1)

    y = _norm(g, checkpoint, f"{prefix}.norm1.weight", x)
    query, key, value = g.node("Split", linear(y, "attn.qkv"), outputs=3, axis=-1, num_outputs=3)
    # Scaled before the product, which then stays in fp16's range.
    scale = g.constant("attention_scale", np.float32(vision.head_dim**-0.5))
    query = g.to_compute(g.node("Mul", rotate(heads(query, [0, 2, 1, 3])), scale))
    key = g.to_compute(g.node("Transpose", rotate(heads(key, [0, 2, 1, 3])), perm=[0, 1, 3, 2]))
    scores = g.node("Add", g.to_fp32(g.node("MatMul", query, key)), bias)
    weights = g.to_compute(g.node("Softmax", scores, axis=-1))
    y = g.node("MatMul", weights, heads(value, [0, 2, 1, 3]))
    y = g.node("Transpose", y, perm=[0, 2, 1, 3])
    y = g.node("Reshape", y, g.node("Shape", x))
    x = g.node("Add", x, g.to_fp32(linear(y, "attn.proj")))
    y = _norm(g, checkpoint, f"{prefix}.norm2.weight", x)
    gate = linear(y, "mlp.gate_proj")
    gate = g.node("Mul", gate, g.node("Sigmoid", gate))
    y = linear(g.node("Mul", gate, linear(y, "mlp.up_proj")), "mlp.down_proj")
    return g.node("Add", x, g.to_fp32(y))


def _merge(g: GraphWriter, checkpoint: Checkpoint, x: str) -> None:
    """2x2 patches to one token, tokens to raster order."""
    vision = checkpoint.vision
    y = _norm(g, checkpoint, "visual.merger.ln_q.weight", x)
    y = g.node("Reshape", y, g.ints(0, -1, MERGE_UNIT * vision.hidden_size))  # [B, W · 16, 4 · hidden]
    for index in (0, 2):
        name = f"visual.merger.mlp.{index}.weight"
        bias = checkpoint.array(f"visual.merger.mlp.{index}.bias")
        y = g.linear(y, name, checkpoint.array(name), bias)
        if index == 0:
            y = g.node("Gelu", y)
    order = g.node("Unsqueeze", g.cast("merge_order", TensorProto.INT64), g.ints(-1))
    g.node("GatherND", y, order, batch_dims=1, name="image_embeddings")
