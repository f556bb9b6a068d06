"""Rewrites of the decoder graph for ONNX Runtime's CPU kernels; the function stays the same.

Weights stream from the export's data file to the bundle's, one tensor at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

_PAGE_BYTES = 4096  # ONNX Runtime maps tensors that begin on a page instead of reading them
_CHUNK_BYTES = 32 << 20


def compile_decoder(source: Path, target: Path) -> None:
    """Rewrite a decoder graph and its data file.

    Parameters
    ----------
    source : Path
        `decoder.onnx` of an export; its `.data` file lies beside it.
    target : Path
        `decoder.onnx` of the bundle.
    """
    import onnx

    model = onnx.load(source, load_external_data=False)
    group_queries(model.graph)
    packed = fuse_int4(model.graph)
    data = np.memmap(source.with_name(source.name + ".data"), np.uint8, "r")
    with open(target.with_name(target.name + ".data"), "wb") as file:
        for tensor in model.graph.initializer:
            if tensor.external_data:
                _write(tensor, data, file, packed)
    if packed:
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, target)


def group_queries(graph: GraphProto) -> None:
    """Attend with the queries of one KV head as further rows of its sequence.

    The kernel copies keys and values to every query head, and multiplies one query row at a time. Query heads
    h·G to h·G + G - 1 share KV head h, so [B, heads, S, D] is [B, kv_heads, G·S, D] without moving a byte.
    """
    from onnx import helper, numpy_helper

    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
    kv_heads, head_dim = shapes["past_key.0"][1], shapes["past_key.0"][3]
    heads = shapes["image_embeddings"][1] // head_dim
    for name, shape in (("grouped", [0, kv_heads, -1, head_dim]), ("ungrouped", [0, heads, -1, head_dim])):
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    nodes, masks = [], {}
    for node in graph.node:
        if node.op_type != "Attention":
            nodes.append(node)
            continue
        query, key, value, mask = node.input
        result, name = node.output[0], node.name
        if mask not in masks:
            masks[mask] = f"{mask}.grouped"
            nodes.append(helper.make_node("Concat", [mask] * (heads // kv_heads), [masks[mask]], masks[mask], axis=2))
        nodes.append(helper.make_node("Reshape", [query, "grouped"], [f"{name}.query"], f"{name}.query"))
        node.input[:] = [f"{name}.query", key, value, masks[mask]]
        node.output[:] = [f"{name}.result"]
        nodes.append(node)
        nodes.append(helper.make_node("Reshape", [f"{name}.result", "ungrouped"], [result], f"{name}.ungrouped"))
    _replace(graph, nodes)


def fuse_int4(graph: GraphProto) -> dict[str, int]:
    """`DequantizeLinear` of int4 blocks with the `MatMul` behind it becomes `MatMulNBits`.

    ONNX Runtime does the same when it opens a graph, but then holds the weights twice and takes seconds.

    Returns
    -------
    dict of str to int
        Initializers that have to be rewritten as the kernel reads them, and their block size; 0 marks scales.
    """
    from onnx import TensorProto, helper

    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT4}
    dequantized = {node.output[0]: node for node in graph.node if node.input[:1] and node.input[0] in weights}
    nodes, packed = [], {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in dequantized:
            weight, scale = dequantized[node.input[1]].input[:2]
            block = next(a.i for a in dequantized[node.input[1]].attribute if a.name == "block_size")
            k, n = weights[weight].dims
            packed |= {weight: block, scale: 0}
            sizes = {"K": k, "N": n, "bits": 4, "block_size": block}
            node = helper.make_node(
                "MatMulNBits",
                [node.input[0], weight, scale],
                node.output,
                node.name,
                domain="com.microsoft",
                accuracy_level=4,  # activations in int8 by blocks, products summed in int32
                **sizes,
            )
        if node.output[0] not in dequantized:
            nodes.append(node)
    _replace(graph, nodes)
    return packed


def pack_int4(packed: np.ndarray, k: int, n: int) -> np.ndarray:
    """ONNX int4 [k, n] as `MatMulNBits` reads it.

    Parameters
    ----------
    packed : (k * n / 2,) uint8 array
        Signed values row by row, the earlier one in the low half of a byte.
    k, n : int

    Returns
    -------
    (n, k / 2) uint8 array
        Values plus 8, column by column, the earlier one in the low half of a byte.
    """
    rows = packed.reshape(k, n // 2)
    result = np.empty((n, k // 2), np.uint8)
    step = max(2, _CHUNK_BYTES // n // 2 * 2)
    for start in range(0, k, step):
        upper, lower = rows[start : start + step : 2], rows[start + 1 : start + step : 2]
        span = slice(start // 2, start // 2 + len(upper))
        result[0::2, span] = ((upper & 0x0F) | (lower << 4)).T
        result[1::2, span] = ((upper >> 4) | (lower & 0xF0)).T
    result ^= 0x88  # two's complement to plus 8
    return result


def _write(tensor: TensorProto, data: np.ndarray, file, packed: dict[str, int]) -> None:
    """Copy one external tensor, in the kernel's order if `packed` says so, and point it to where it is now."""
    from onnx import TensorProto

    where = {entry.key: entry.value for entry in tensor.external_data}
    value = data[int(where["offset"]) :][: int(where["length"])]
    block = packed.get(tensor.name)
    if block:
        k, n = tensor.dims
        value = pack_int4(value, k, n)
        tensor.data_type = TensorProto.UINT8
        tensor.dims[:] = [n, k // block, block // 2]
    elif block == 0:
        value = value.view(np.float32).reshape(tensor.dims).T
        tensor.dims[:] = [value.size]
    file.write(b"\0" * (-file.tell() % _PAGE_BYTES))
    where["offset"] = str(file.tell())
    file.write(np.ascontiguousarray(value).data)
    del tensor.external_data[:]
    for key, text in where.items():
        tensor.external_data.add(key=key, value=text)


def _replace(graph: GraphProto, nodes: list[NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)
