"""The decoder's products as the compiled library computes them; the function stays the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr_triton.engines.onnxruntime.compiler import fuse_attention
from cxr_triton.engines.rewrite import Weights, fuse_int4, merge_projections, replace_nodes, rewrite

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

DOMAIN = "cxr_triton"
PANEL = 16
"""Outputs whose weights lie side by side; see `matmul.h`."""
MOST_GATED_INPUTS = 4096
"""Of a product whose results are gated at once; see `matmul_takes`."""
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
    """`MatMulNBits` becomes `W4A8MatMul`, whose weights are never packed again: they stay mapped from their file.

    A gate, and what it gates, are computed side by side and multiplied before they leave the registers.
    """
    from onnx import helper

    gates = dict(_gates(graph))

    def packed(name: str, parts: int, inputs: int) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            values = weights.value(name).reshape(parts, -1, inputs // 2)
            return _in_turn([pack_panels(part) for part in values])

        return make

    def by_panel(name: str, parts: int, blocks: int) -> Callable[[], np.ndarray]:
        return lambda: _in_turn([pack_scales(part) for part in weights.value(name).reshape(parts, -1, blocks)])

    nodes = []
    for old in graph.node:
        node = old
        if node.op_type == "MatMulNBits":
            sizes = {a.name: a.i for a in node.attribute}
            x, weight, scale, *rest = node.input
            gated = gates.get(node.output[0])
            parts = 2 if gated else 1
            inputs = [
                x,
                weights.add(f"{weight}.panels", packed(weight, parts, sizes["K"])),
                weights.add(f"{scale}.panels", by_panel(scale, parts, sizes["K"] // sizes["block_size"])),
                *rest[2:],  # behind zero points and an order, which it has not, the bias
            ]
            kept: dict[str, Any] = {
                "K": sizes["K"], "N": sizes["N"] // parts, "block_size": sizes["block_size"], "gated": parts - 1,
            }  # fmt: skip
            result = gated or node.output[0]
            node = helper.make_node("W4A8MatMul", inputs, [result], old.name, domain=DOMAIN, **kept)
        if node.op_type == "W4A8MatMul" or node.output[0] not in gates.values():
            nodes.append(node)
    replace_nodes(graph, nodes)


def _gates(graph: GraphProto) -> Iterator[tuple[str, str]]:
    """Products of a gate and what it gates, each with the name of silu(gate) * gated, the only reader of both."""
    made_by = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    for sigmoid in graph.node:
        split = made_by.get(sigmoid.input[0]) if sigmoid.op_type == "Sigmoid" else None
        if split is None or split.op_type != "Split" or sigmoid.input[0] != split.output[0] or len(split.output) != 2:
            continue
        gate, gated = split.output
        silus = [node for node in readers[gate] if set(node.input) == {gate, sigmoid.output[0]}]
        lasts = [node for node in readers[gated] if silus and set(node.input) == {gated, silus[0].output[0]}]
        product = made_by[split.input[0]]
        if (
            [node.op_type for node in (*silus, *lasts)] == ["Mul", "Mul"]
            and len(readers[gate]) == 2
            and readers[sigmoid.output[0]] == silus
            and readers[silus[0].output[0]] == readers[gated] == lasts
            and product.op_type == "MatMulNBits"
            and len(product.input) == 3  # no bias
            and all(a.i <= MOST_GATED_INPUTS for a in product.attribute if a.name == "K")
        ):
            yield product.output[0], lasts[0].output[0]


def _in_turn(parts: list[np.ndarray]) -> np.ndarray:
    """Panels of parts of one size, one of each in turn."""
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


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
