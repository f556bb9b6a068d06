"""The second graph of a decoder: layers in int8, rounded from int4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.attention import split_attention
from cxr_triton.engines.onnxruntime import int8
from cxr_triton.engines.rewrite import Weights, fuse_int4, int4_weights, rewrite, unpack_int4

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def compile_int8(source: Path, target: Path, beside: Path) -> None:
    """Rewrite a decoder graph with int4 weights.

    Parameters
    ----------
    source : Path
        `decoder.onnx` of an export; its `.data` file lies beside it.
    target : Path
        Of the bundle.
    beside : Path
        The graph in int4 in the same folder, which has the embedding table and the head.
    """
    rewrite(source, target, split_attention, quantize_layers, fuse_int4, beside=beside)


def quantize_layers(graph: GraphProto, weights: Weights) -> None:
    """`MatMul` with an int4 weight of a layer becomes a product of 8-bit integers; the head, of few rows, stays."""
    found = int4_weights(graph, weights)

    def rounded(node: NodeProto) -> Callable[[], int8.Rounded] | None:
        made = found.get(node.input[1])
        if made is None or ".layers." not in made.input[0]:
            return None
        name, scale = made.input[:2]
        k, n = weights.exported[name].dims

        def make() -> int8.Rounded:
            values = unpack_int4(weights.value(name), k, n)
            return int8.blocks_by_channel(values, np.asarray(weights.value(scale), np.float32))

        return make

    int8.quantize_products(graph, weights, rounded)
