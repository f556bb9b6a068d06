"""The tower in int8.

What is large and takes rounding well is rounded: the linear layers of the blocks, 95 % of the tower's work. The patch
kernel, the merger, norms and attention stay in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_triton.engines.onnxruntime import int8
from cxr_triton.engines.rewrite import Weights, rewrite

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def compile_tower(source: Path, target: Path) -> None:
    """Rewrite a vision graph in fp32 and its data file.

    Parameters
    ----------
    source : Path
        `vision.onnx` of an export; its `.data` file lies beside it.
    target : Path
        `vision.onnx` of the bundle.
    """
    rewrite(source, target, quantize_blocks)


def quantize_blocks(graph: GraphProto, weights: Weights) -> None:
    """`MatMul` with a weight of a block becomes a product of 8-bit integers."""

    def rounded(node: NodeProto) -> Callable[[], int8.Rounded] | None:
        name = node.input[1]
        if name not in weights.exported or not name.startswith("visual.blocks."):
            return None
        return lambda: int8.by_channel(weights.value(name))

    int8.quantize_products(graph, weights, rounded)
