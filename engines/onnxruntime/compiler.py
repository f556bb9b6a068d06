"""Rewrites of the decoder for the kernels of ONNX Runtime on a CPU; the function stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.rewrite import Weights, fuse_int4, merge_projections, replace_nodes, rewrite

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def compile_decoder(source: Path, target: Path) -> None:
    """Rewrite a decoder graph and its data file.

    Parameters
    ----------
    source : Path
        `decoder.onnx` of an export; its `.data` file lies beside it.
    target : Path
        `decoder.onnx` of the bundle.
    """
    rewrite(source, target, fuse_attention, fuse_int4, merge_projections)


def fuse_attention(graph: GraphProto, weights: Weights) -> None:
    """Cache writes, causal mask and `Attention` of a layer become one `GroupQueryAttention`.

    It reads only the positions in use, does not copy keys and values to every query head, and takes projections as
    they come, [B, S, heads · D], so that nothing is transposed. More than one token at a time needs a batch of one.
    """
    from onnx import TensorProto, helper

    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
    _, kv_heads, _, head_dim = shapes["past_key.0"]
    heads = shapes["image_embeddings"][1] // head_dim
    made_by = {node.output[0]: node for node in graph.node}
    used_by = {name: node for node in graph.node for name in node.input}  # one of them

    def projected(name: str, count: int) -> tuple[str, list[NodeProto]]:
        """A head tensor as it was before it was split into heads, with the nodes that still change it."""
        node = made_by[name]
        if node.op_type == "Reshape":
            return node.input[0], []
        source, nodes = projected(node.input[1 if node.op_type == "TensorScatter" else 0], count)
        if node.op_type in ("Transpose", "TensorScatter"):
            return source, nodes
        flat = helper.make_node(node.op_type, [source, *node.input[1:]], [f"{name}.flat"], f"{node.name}.flat")
        flat.attribute.extend(node.attribute)
        if node.op_type == "RotaryEmbedding":
            flat.attribute.append(helper.make_attribute("num_heads", count))
        return flat.output[0], [*nodes, flat]

    one = weights.add("int32_one", lambda: np.array(1, np.int32))
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["new_tokens"], "new_tokens", start=1, end=2),
        helper.make_node("Add", ["write_index", "new_tokens"], ["lengths"], "lengths"),
        helper.make_node("Cast", ["lengths"], ["lengths_int32"], "lengths_int32", to=TensorProto.INT32),
        helper.make_node("Sub", ["lengths_int32", one], ["last_index"], "last_index"),
        helper.make_node("ReduceMax", ["lengths_int32"], ["longest"], "longest", keepdims=0),
    ]
    rejoined = set()  # heads put side by side again, as the fused node gives them
    for old in graph.node:
        node = old
        if node.op_type == "TensorScatter" or node.output[0] in rejoined:
            continue
        if node.op_type == "Attention":
            inputs = []
            for name, count in zip(node.input[:3], (heads, kv_heads, kv_heads), strict=True):
                source, changes = projected(name, count)
                inputs.append(source)
                nodes += changes
            caches = [made_by[name] for name in node.input[1:3]]
            inputs += [cache.input[0] for cache in caches]
            result = used_by[used_by[node.output[0]].output[0]].output[0]  # of Transpose and Reshape
            rejoined.add(result)
            node = helper.make_node(
                "GroupQueryAttention",
                [*inputs, "last_index", "longest"],
                [result, *(cache.output[0] for cache in caches)],
                node.name,
                domain="com.microsoft",
                num_heads=heads,
                kv_num_heads=kv_heads,
                scale=head_dim**-0.5,
            )
        nodes.append(node)
    replace_nodes(graph, nodes)
