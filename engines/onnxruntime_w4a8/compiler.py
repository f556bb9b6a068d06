"""The decoder's products as the compiled library computes them; the function stays the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.onnxruntime.compiler import fuse_attention
from cxr_triton.engines.rewrite import Weights, fuse_int4, merge_projections, replace_nodes, rewrite

if TYPE_CHECKING:
    from onnx import GraphProto

DOMAIN = "cxr_triton"
PANEL = 16
"""Outputs whose weights lie side by side; see `matmul.h`."""
_WORD = 4
_ZERO = 0x88  # two weights of 0
_PANELS_AT_ONCE = 64


def compile_w4a8(source: Path, target: Path) -> None:
    """Rewrite a decoder graph with int4 weights, and its data file.

    Parameters
    ----------
    source : Path
        `decoder.onnx` of an export; its `.data` file lies beside it.
    target : Path
        `decoder.onnx` of the bundle.
    """
    rewrite(source, target, fuse_attention, fuse_int4, merge_projections, use_panels)


def use_panels(graph: GraphProto, weights: Weights) -> None:
    """`MatMulNBits` becomes `W4A8MatMul`, whose weights are never packed again: they stay mapped from their file."""
    from onnx import helper

    def packed(name: str, inputs: int) -> Callable[[], np.ndarray]:
        return lambda: pack_panels(weights.value(name).reshape(-1, inputs // 2))

    def by_panel(name: str, blocks: int) -> Callable[[], np.ndarray]:
        return lambda: pack_scales(weights.value(name).reshape(-1, blocks))

    nodes = []
    for old in graph.node:
        node = old
        if node.op_type == "MatMulNBits":
            sizes = {a.name: a.i for a in node.attribute}
            x, weight, scale, *rest = node.input
            inputs = [
                x,
                weights.add(f"{weight}.panels", packed(weight, sizes["K"])),
                weights.add(f"{scale}.panels", by_panel(scale, sizes["K"] // sizes["block_size"])),
                *rest[2:],  # behind zero points and an order, which it has not, the bias
            ]
            kept = {name: sizes[name] for name in ("K", "N", "block_size")}
            node = helper.make_node("W4A8MatMul", inputs, old.output, old.name, domain=DOMAIN, **kept)
        nodes.append(node)
    replace_nodes(graph, nodes)


def pack_panels(packed: np.ndarray) -> np.ndarray:
    """int4 as `MatMulNBits` reads it, as `W4A8MatMul` does.

    Parameters
    ----------
    packed : (N, K / 2) uint8 array
        See `pack_int4`.

    Returns
    -------
    (ceil(N / 16), K / 8, 16, 4) uint8 array
        Of 8 inputs the first 4 in the low halves of bytes.
    """
    outputs, half = packed.shape
    count = -(-outputs // PANEL)
    result = np.empty((count, half // _WORD, PANEL, _WORD), np.uint8)
    for start in range(0, count, _PANELS_AT_ONCE):
        part = packed[start * PANEL : (start + _PANELS_AT_ONCE) * PANEL]
        panels = np.full((-(-len(part) // PANEL) * PANEL, half), _ZERO, np.uint8)
        panels[: len(part)] = part
        halves = np.stack([panels & 0x0F, panels >> 4], axis=-1)  # inputs one after the other
        words = halves.reshape(-1, PANEL, half // _WORD, 2, _WORD).transpose(0, 2, 3, 1, 4)
        result[start : start + len(words)] = words[:, :, 0] | words[:, :, 1] << 4
    return result


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """Scales (N, K / block) of blocks as `W4A8MatMul` reads them, (ceil(N / 16), K / block, 16) float32."""
    outputs, blocks = scales.shape
    padded = np.zeros((-(-outputs // PANEL) * PANEL, blocks), np.float32)
    padded[:outputs] = scales
    return np.ascontiguousarray(padded.reshape(-1, PANEL, blocks).transpose(0, 2, 1))
