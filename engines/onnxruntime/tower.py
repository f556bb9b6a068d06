"""The tower for the kernels of ONNX Runtime on a CPU, in fp32 or int8.

In int8, what is large and takes rounding well is rounded: the linear layers of the blocks, 95 % of the tower's work.
The patch kernel, the merger, norms and attention stay in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.onnxruntime import int8
from cxr_triton.engines.patches import drop_padding
from cxr_triton.engines.rewrite import Author, Weights, replace_nodes, rewrite

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def compile_tower(source: Path, target: Path, precision: str) -> None:
    """Rewrite a vision graph in fp32 and its data file.

    Parameters
    ----------
    source : Path
        `vision.onnx` of an export; its `.data` file lies beside it.
    target : Path
        `vision.onnx` of the bundle.
    precision : {"fp32", "int8"}
    """
    rewrite(source, target, *STEPS, *((quantize_blocks,) if precision == "int8" else ()))


def fuse_rotations(graph: GraphProto, weights: Weights) -> None:
    """Queries and keys are turned as rows, by one node each, before they are put into sequences.

    They come from products of their own, so that nobody has to cut them out of one result.
    """
    made_by = {name: node for node in graph.node for name in node.output}
    reader = {name: node for node in graph.node for name in node.input}  # one of them
    author = _Rotations(weights, made_by)
    for old in graph.node:
        if old.op_type == "Split" and len(old.output) == 3:
            heads, head_dim = weights.value(reader[old.output[0]].input[1])[-2:]
            author.project(old, int(heads), int(heads * head_dim))
        elif old.op_type == "Concat" and made_by[old.input[0]].op_type == "Sub":
            half = made_by[made_by[made_by[old.input[0]].input[0]].input[0]]
            author.node("Identity", half.input[0], name=old.output[0])  # it is turned already
        else:
            author.nodes.append(old)
    replace_nodes(graph, author.nodes)


class _Rotations(Author):
    def __init__(self, weights: Weights, made_by: dict[str, NodeProto]):
        super().__init__(weights)
        self._made_by = made_by
        self._angles = [name for name, node in made_by.items() if node.op_type in ("Cos", "Sin")]

    def project(self, split: NodeProto, heads: int, width: int) -> None:
        """Query, key and value come in the place of the node that split them, under the names of its results."""
        rows, sequences = self._made_by[split.input[0]].input
        product, bias = self._made_by[rows].input
        x, weight = self._made_by[product].input
        for part, result in enumerate(split.output):
            y = self.node("MatMul", x, self._third(weight, part), name=f"{result}.product")
            y = self.node("Add", y, self._third(bias, part), name=f"{result}.biased")
            if part < 2:
                y = self._turned(y, heads, width, result)
            self.node("Gather", y, sequences, name=result)

    def _turned(self, rows: str, heads: int, width: int, name: str) -> str:
        """Rows [N, width] of which each is at a place of its own, as many as there are angles."""
        sequence = self.node("Unsqueeze", rows, self.ints(0), name=f"{name}.sequence")
        options = {"domain": "com.microsoft", "num_heads": heads}
        first = self.ints(0)
        turned = self.node("RotaryEmbedding", sequence, first, *self._angles, name=f"{name}.turned", **options)
        return self.node("Reshape", turned, self.ints(-1, width), name=f"{name}.turned_rows")

    def _third(self, name: str, part: int) -> str:
        """The columns of a weight, or the values of a bias, that make query, key or value."""
        return self.weights.add(f"{name}.{part}", lambda: np.split(self.weights.value(name), 3, axis=-1)[part])


def fuse_norms(graph: GraphProto, weights: Weights) -> None:
    """Bias and residual that are added to a layer's result, and the norm of the sum, become one node."""
    from onnx import helper

    made_by = {name: node for node in graph.node for name in node.output}
    scaled = [node for node in graph.node if node.op_type == "Mul" and node.input[0] in made_by]
    norms = {made_by[node.input[0]].input[0]: node for node in scaled if made_by[node.input[0]].op_type == "Div"}
    epsilon = weights.value("norm_epsilon").item()
    nodes, gone = [], {norms[name].output[0] for name in norms if made_by[name].op_type == "Add"}
    for node in graph.node:
        if node.op_type == "Add" and (norm := norms.get(node.output[0])):
            residual, biased = node.input[0], made_by[node.input[1]]
            inputs = [residual, biased.input[0], norm.input[1], biased.input[1]]
            outputs = [norm.output[0], "", "", node.output[0]]
            name, options = f"{node.name}.norm", {"domain": "com.microsoft", "epsilon": epsilon}
            nodes.append(helper.make_node("SkipSimplifiedLayerNormalization", inputs, outputs, name, **options))
        elif node.output[0] not in gone:
            nodes.append(node)
    replace_nodes(graph, nodes)


def quantize_blocks(graph: GraphProto, weights: Weights) -> None:
    """`MatMul` with a weight of a block becomes a product of 8-bit integers."""

    def rounded(node: NodeProto) -> Callable[[], int8.Rounded] | None:
        name = node.input[1]
        if name not in weights or not name.startswith("visual.blocks."):
            return None
        return lambda: int8.by_channel(weights.value(name))

    int8.quantize_products(graph, weights, rounded)


STEPS = (drop_padding, fuse_rotations, fuse_norms)
"""Of a rewrite for ONNX Runtime, whatever the precision."""
