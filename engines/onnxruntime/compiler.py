"""Rewrites of the graphs for the kernels of ONNX Runtime and OpenVINO; the function stays the same.

Weights stream from the export's data file to the bundle's, a few tensors at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.rewrite import Weights, joined, pack_int4, replace_nodes, rewrite

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def compile_decoder(
    source: Path, target: Path, rewrite_attention: Callable[[GraphProto, Weights], None] | None = None
) -> None:
    """Rewrite a decoder graph and its data file.

    Parameters
    ----------
    source : Path
        `decoder.onnx` of an export; its `.data` file lies beside it.
    target : Path
        `decoder.onnx` of the bundle.
    rewrite_attention : callable, optional
        How the engine attends over the cache; `fuse_attention`, which is ONNX Runtime's, if None.
    """
    rewrite(source, target, rewrite_attention or fuse_attention, fuse_int4, merge_projections)


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
    for node in graph.node:
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


def fuse_int4(graph: GraphProto, weights: Weights) -> None:
    """`DequantizeLinear` of int4 blocks with the `MatMul` behind it becomes `MatMulNBits`.

    ONNX Runtime does the same when it opens a graph, but then holds the weights twice and takes seconds.
    """
    from onnx import TensorProto, helper

    def is_int4(name: str) -> bool:
        tensor = weights.tensor(name)
        return tensor is not None and tensor.data_type == TensorProto.INT4

    dequantized = {node.output[0]: node for node in graph.node if node.input and is_int4(node.input[0])}
    nodes = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in dequantized:
            weight, scale = dequantized[node.input[1]].input[:2]
            (block,) = (a.i for a in dequantized[node.input[1]].attribute if a.name == "block_size")
            k, n = weights.tensor(weight).dims
            stored = (n, k // block, block // 2)
            values = weights.add(
                f"{weight}.packed", lambda w=weight, k=k, n=n, s=stored: pack_int4(weights.value(w), k, n).reshape(s)
            )
            scales = weights.add(f"{scale}.packed", lambda s=scale: weights.value(s).T.ravel())
            node = helper.make_node(
                "MatMulNBits",
                [node.input[0], values, scales],
                node.output,
                node.name,
                domain="com.microsoft",
                K=k,
                N=n,
                bits=4,
                block_size=block,
                accuracy_level=4,  # activations in int8 by blocks, products summed in int32
            )
        if node.output[0] not in dequantized:
            nodes.append(node)
    replace_nodes(graph, nodes)


def merge_projections(graph: GraphProto, weights: Weights) -> None:
    """`MatMulNBits` nodes of one input become one: query, key and value, gate and up.

    The input is quantized once, and the threads meet once.
    """
    from onnx import helper

    siblings, consumers = defaultdict(list), defaultdict(list)
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            siblings[node.input[0]].append(node)
        for name in node.input:
            consumers[name].append(node)
    merged, gone = {}, set()
    for x, group in siblings.items():
        if len(group) == 1:
            continue
        sizes = [{a.name: a.i for a in node.attribute} for node in group]
        adds = [_bias(consumers[node.output[0]], weights) for node in group]
        inputs = [
            x,
            *(
                joined(weights, f"{x}.{part}", [node.input[i] for node in group])
                for i, part in ((1, "weights"), (2, "scales"))
            ),
        ]
        outputs = [node.output[0] for node in group]
        if all(adds):
            inputs += ["", "", joined(weights, f"{x}.bias", [bias for _, bias in adds])]
            outputs = [add.output[0] for add, _ in adds]
            gone |= {add.name for add, _ in adds}
        counts = [size["N"] for size in sizes]
        product = f"{x}.product"
        merged[group[0].name] = [
            helper.make_node(
                "MatMulNBits", inputs, [product], product, domain="com.microsoft", **sizes[0] | {"N": sum(counts)}
            ),
            helper.make_node(
                "Split",
                [product, weights.add(f"split_{'_'.join(map(str, counts))}", lambda c=counts: np.array(c))],
                outputs,
                f"{x}.split",
                axis=-1,
            ),
        ]
        gone |= {node.name for node in group}
    kept = [merged.get(node.name, [] if node.name in gone else [node]) for node in graph.node]
    replace_nodes(graph, [node for nodes in kept for node in nodes])


def _bias(nodes: list[NodeProto], weights: Weights) -> tuple[NodeProto, str] | None:
    """The `Add` of a bias that is all that follows a product, and the bias."""
    if len(nodes) == 1 and nodes[0].op_type == "Add" and nodes[0].input[1] in weights:
        return nodes[0], nodes[0].input[1]
    return None
