"""OpenVINO, which uses the matrix units (AMX) of recent x86 CPUs: its graphs, and the sessions that run them.

A bundle holds the graphs in OpenVINO's own form, which it compiles for the CPU that it finds when they are opened.
OpenVINO is imported here only.
"""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.onnxruntime.compiler import compile_decoder
from cxr_triton.engines.rewrite import Weights, replace_nodes
from cxr_triton.errors import BuildFailed, DeviceUnavailable
from cxr_triton.extras import remedy

if TYPE_CHECKING:
    from onnx import GraphProto


def split_attention(graph: GraphProto, weights: Weights) -> None:
    """Attention over a cache that the graph only reads, and over the new tokens, whose keys and values it gives.

    OpenVINO has no operator that writes into its input. So ``present_key.i`` and ``present_value.i`` become
    [B, kv_heads, S, head_dim], the new tokens' own, which the session puts into the cache. Nothing of the cache's size
    is copied, neither for that nor for the query heads that share a key.
    """
    from onnx import helper

    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
    _, kv_heads, _, head_dim = shapes["past_key.0"]
    heads = shapes["image_embeddings"][1] // head_dim
    made_by = {name: node for node in graph.node for name in node.output}

    def ints(*values: int) -> str:
        return weights.add(f"int64_{'_'.join(map(str, values))}", lambda: np.array(values, np.int64))

    def scalar(name: str, value) -> str:
        return weights.add(name, lambda: value)

    zero, one = scalar("index_zero", np.array(0, np.int64)), scalar("index_one", np.array(1, np.int64))
    nodes = []

    def node(op: str, *inputs: str, name: str, **attributes) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    # Which cache positions [B, 1, 1, 1, C] and which new tokens [S, S] a new token sees, as a bias on its scores.
    size = node("Shape", "past_key.0", name="cache_size", start=2, end=3)
    count = node("Shape", "input_ids", name="new_count", start=1, end=2)
    held = node("Range", zero, node("Squeeze", size, name="cache_length"), one, name="cache_positions")
    new = node("Range", zero, node("Squeeze", count, name="new_length"), one, name="new_positions")
    written = node("Unsqueeze", "write_index", ints(1, 2, 3, 4), name="written")
    later = node("Unsqueeze", new, ints(1), name="new_rows")
    visible, hidden = scalar("visible", np.float32(0)), scalar("hidden", np.float32(-1e30))
    biases = (
        node("Where", node("Less", held, written, name="is_written"), visible, hidden, name="cache_bias"),
        node("Where", node("LessOrEqual", new, later, name="is_earlier"), visible, hidden, name="new_bias"),
    )
    grouped = ints(0, kv_heads, -1, head_dim)
    by_token = node("Concat", ints(0, kv_heads, heads // kv_heads), count, ints(-1), name="scores_by_token", axis=0)
    flat = node("Concat", ints(0, kv_heads, -1), node("Add", size, count, name="all_count"), name="flat", axis=0)
    scale = scalar("attention_scale", np.float32(head_dim**-0.5))

    for old in graph.node:
        if old.op_type == "TensorScatter":
            continue
        if old.op_type != "Attention":
            nodes.append(old)
            continue
        query, key, value = old.input[:3]
        writes = made_by[key], made_by[value]
        cached = [write.input[0] for write in writes]
        fresh = [node("Identity", write.input[1], name=write.output[0]) for write in writes]
        layer = old.name
        query = node("Mul", node("Reshape", query, grouped, name=f"{layer}.grouped"), scale, name=f"{layer}.scaled")
        scores = []
        for part, keys, bias in zip(("cache", "new"), (cached[0], fresh[0]), biases, strict=True):
            turned = node("Transpose", keys, name=f"{layer}.{part}_turned", perm=[0, 1, 3, 2])
            product = node("MatMul", query, turned, name=f"{layer}.{part}_product")
            product = node("Reshape", product, by_token, name=f"{layer}.{part}_by_token")
            scores.append(node("Add", product, bias, name=f"{layer}.{part}_scores"))
        shares = node("Softmax", node("Concat", *scores, name=f"{layer}.scores", axis=-1), name=f"{layer}.shares")
        shares = node("Reshape", shares, flat, name=f"{layer}.flat_shares")
        nodes.append(
            helper.make_node(
                "Split",
                [shares, node("Concat", size, count, name=f"{layer}.sizes", axis=0)],
                [f"{layer}.cache_shares", f"{layer}.new_shares"],
                f"{layer}.split",
                axis=-1,
            )
        )
        sums = [
            node("MatMul", f"{layer}.{part}_shares", values, name=f"{layer}.{part}_sum")
            for part, values in (("cache", cached[1]), ("new", fresh[1]))
        ]
        total = node("Add", *sums, name=f"{layer}.sum")
        whole = node("Concat", ints(0, heads), count, ints(head_dim), name=f"{layer}.whole", axis=0)
        nodes.append(helper.make_node("Reshape", [total, whole], old.output, layer))
    for value in graph.output:
        if value.name.startswith("present_"):
            value.type.tensor_type.shape.dim[2].dim_param = "S"
    replace_nodes(graph, nodes)


def compile_graph(source: Path, folder: Path, precision: str) -> str:
    """Write a graph of an export as OpenVINO's ``NAME.xml`` and ``NAME.bin``, and give OpenVINO's version.

    For bf16, fp32 weights are stored in fp16: a checkpoint's bf16 values come through exactly from 6e-5 up, and to 3e-8
    below.

    Parameters
    ----------
    source : Path
        ``vision.onnx`` or ``decoder.onnx`` of an export; its ``.data`` file lies beside it.
    folder : Path
    precision : {"fp32", "bf16"}
        What it will compute in.

    Raises
    ------
    DeviceUnavailable
        OpenVINO is not installed.
    BuildFailed
        OpenVINO does not take the graph.
    """
    openvino = load_library()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if source.stem == "decoder":
            rewritten = Path(scratch) / source.name
            compile_decoder(source, rewritten, split_attention)
            source = rewritten
        try:
            model = openvino.Core().read_model(source)
            openvino.save_model(model, folder / f"{source.stem}.xml", compress_to_fp16=precision == "bf16")
        except RuntimeError as error:
            raise BuildFailed(
                f"openvino does not take {source.name}: {' '.join(str(error).split())[-400:]}; name a recipe with "
                "another compiler"
            ) from None
    return metadata.version("openvino")


def load_library():
    """The module `openvino`.

    Raises
    ------
    DeviceUnavailable
        It is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise DeviceUnavailable(f"openvino does not load here ({error}); {remedy('openvino')}") from None
    return openvino
