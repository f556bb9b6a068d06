"""Rewrite a graph and its data file step by step, without holding the weights in memory; steps that engines share.

Weights stream from the export's data file to the bundle's, a few tensors at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

_PAGE_BYTES = 4096  # tensors that begin on a page are mapped instead of read
_CHUNK_BYTES = 32 << 20
_INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape inference reads them


def rewrite(
    source: Path,
    target: Path,
    *steps: Callable[[GraphProto, Weights], None],
    opset: int | None = None,
    beside: Path | None = None,
) -> None:
    """Write what `steps` make, one after the other, of a graph, with the data that it then uses beside it.

    `opset` is the version of the standard operators that the steps use; the graph's own if None. What a graph in the
    target's folder, `beside`, made of the same source has in its data file under the same name is not written again.
    """
    import onnx

    model = onnx.load(source, load_external_data=False)
    weights = Weights(model.graph, source.with_name(source.name + ".data"))
    for step in steps:
        step(model.graph, weights)
    with open(target.with_name(target.name + ".data"), "wb") as file:
        weights.write(file, target.name + ".data", _stored(beside) if beside else {})
    for domain in sorted({node.domain for node in model.graph.node} - {known.domain for known in model.opset_import}):
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    if opset:
        model.opset_import[0].version = opset
    onnx.save(model, target)


def _stored(graph: Path) -> dict[str, TensorProto]:
    """Initializers of a graph that lie in its data file, by name."""
    import onnx

    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    return {tensor.name: tensor for tensor in tensors if tensor.external_data}


class Weights:
    """Initializers of a graph; what replaces them is made when it is written, one at a time.

    Parameters
    ----------
    graph : GraphProto
    data : Path
        External data file of the graph.

    Attributes
    ----------
    exported : dict of str to TensorProto
        Initializers as the export wrote them, by name.
    """

    def __init__(self, graph: GraphProto, data: Path):
        self._graph = graph
        self._data = np.memmap(data, np.uint8, "r")
        self._values: dict[str, Callable[[], np.ndarray]] = {}  # made by a rewrite
        self.exported = {tensor.name: tensor for tensor in graph.initializer}

    def __contains__(self, name: str) -> bool:
        return name in self.exported or name in self._values

    def value(self, name: str) -> np.ndarray:
        """Values of an initializer; bytes where they are packed or in float8."""
        if name in self._values:
            return self._values[name]()
        from onnx import TensorProto, helper, numpy_helper

        tensor = self.exported[name]
        if not tensor.external_data:
            return numpy_helper.to_array(tensor)
        where = {entry.key: entry.value for entry in tensor.external_data}
        value = self._data[int(where["offset"]) :][: int(where["length"])]
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            return value
        return value.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tensor.dims)

    def add(self, name: str, make: Callable[[], np.ndarray]) -> str:
        """A new initializer, of whatever `make` gives when it is written."""
        self._values.setdefault(name, make)
        return name

    def write(self, file, location: str, stored: Mapping[str, TensorProto]) -> None:
        """Put all initializers that the graph uses into `file`, and what `add` brought into the graph.

        Those of the names in `stored` lie elsewhere.
        """
        from onnx import TensorProto, numpy_helper

        used = {name for node in self._graph.node for name in node.input}
        tensors = [tensor for name, tensor in self.exported.items() if name in used]
        tensors += [TensorProto(name=name) for name in self._values if name in used]
        del self._graph.initializer[:]
        for tensor in tensors:
            if tensor.name in stored:
                self._graph.initializer.append(stored[tensor.name])
                continue
            value = np.ascontiguousarray(self.value(tensor.name))
            if tensor.name in self._values:
                described = numpy_helper.from_array(value[:0], tensor.name)
                tensor.data_type, tensor.dims[:] = described.data_type, value.shape
            if value.nbytes > _INLINE_BYTES:
                file.write(b"\0" * (-file.tell() % _PAGE_BYTES))
                facts = {"location": location, "offset": file.tell(), "length": value.nbytes}
                file.write(value.view(np.uint8).data)  # numpy has no buffers of bf16
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                del tensor.external_data[:]
                for key, fact in facts.items():
                    tensor.external_data.add(key=key, value=str(fact))
            elif tensor.name in self._values:
                tensor.raw_data = value.tobytes()
            self._graph.initializer.append(tensor)


def joined(weights: Weights, name: str, parts: list[str], axis: int = 0) -> str:
    """A new initializer: others side by side."""
    return weights.add(name, lambda: np.concatenate([weights.value(part) for part in parts], axis))


def unpack_int4(packed: np.ndarray, k: int, n: int) -> np.ndarray:
    """ONNX int4 [k, n] as int8 of this shape; see `pack_int4` for `packed`."""
    values = np.empty((packed.size, 2), np.int8)
    values[:, 0] = (packed << 4).view(np.int8) >> 4
    values[:, 1] = packed.view(np.int8) >> 4
    return values.reshape(k, n)


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


class Author:
    """Writes nodes, and the small constants that they need.

    Attributes
    ----------
    nodes : list of NodeProto
    weights : Weights
    """

    def __init__(self, weights: Weights):
        self.nodes: list[NodeProto] = []
        self.weights = weights

    def node(self, op: str, *inputs: str, name: str, **attributes) -> str:
        """A node of a standard operator, whose one result has its name."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def ints(self, *values: int) -> str:
        """A constant [len(values)] in int64."""
        return self.weights.add(f"int64_{'_'.join(map(str, values))}", lambda: np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        """A constant without axes, in int64."""
        return self.weights.add(f"int64_scalar_{value}", lambda: np.array(value, np.int64))


def replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    """Give a graph the nodes, less those whose result nobody reads."""
    needed, live = {value.name for value in graph.output}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            live.append(node)
    nodes = live[::-1]
    del graph.node[:]
    graph.node.extend(nodes)


def int4_weights(graph: GraphProto, weights: Weights) -> dict[str, NodeProto]:
    """`DequantizeLinear` nodes of int4 blocks, by what they give; their inputs are values and scales."""
    from onnx import TensorProto

    def is_int4(name: str) -> bool:
        return name in weights.exported and weights.exported[name].data_type == TensorProto.INT4

    return {node.output[0]: node for node in graph.node if node.input and is_int4(node.input[0])}


def fuse_int4(graph: GraphProto, weights: Weights) -> None:
    """`DequantizeLinear` of int4 blocks with the `MatMul` behind it becomes `MatMulNBits`.

    An engine that does the same when it opens a graph then holds the weights twice and takes seconds.
    """
    from onnx import helper

    def packed(name: str, k: int, n: int, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
        return lambda: pack_int4(weights.value(name), k, n).reshape(shape)

    def by_column(name: str) -> Callable[[], np.ndarray]:
        return lambda: np.ravel(weights.value(name), "F")

    dequantized = int4_weights(graph, weights)
    nodes = []
    for old in graph.node:
        node = old
        if node.op_type == "MatMul" and node.input[1] in dequantized:
            weight, scale = dequantized[node.input[1]].input[:2]
            (block,) = (a.i for a in dequantized[node.input[1]].attribute if a.name == "block_size")
            k, n = weights.exported[weight].dims
            values = weights.add(f"{weight}.packed", packed(weight, k, n, (n, k // block, block // 2)))
            scales = weights.add(f"{scale}.packed", by_column(scale))
            inputs = [old.input[0], values, scales]
            # Accuracy 4: activations in int8 by blocks, products summed in int32.
            sizes: dict[str, Any] = {"K": k, "N": n, "bits": 4, "block_size": block, "accuracy_level": 4}
            node = helper.make_node("MatMulNBits", inputs, old.output, old.name, domain="com.microsoft", **sizes)
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
        sizes: list[dict[str, Any]] = [{a.name: a.i for a in node.attribute} for node in group]
        adds = [found for node in group if (found := _bias(consumers[node.output[0]], weights))]
        parts = ((1, "weights"), (2, "scales"))
        inputs = [x, *(joined(weights, f"{x}.{part}", [node.input[i] for node in group]) for i, part in parts)]
        outputs = [node.output[0] for node in group]
        if len(adds) == len(group):
            inputs += ["", "", joined(weights, f"{x}.bias", [bias for _, bias in adds])]
            outputs = [add.output[0] for add, _ in adds]
            gone |= {add.name for add, _ in adds}
        counts, product = np.array([size["N"] for size in sizes]), f"{x}.product"
        whole = sizes[0] | {"N": int(counts.sum())}
        split = weights.add(f"split_{'_'.join(map(str, counts))}", counts.copy)
        merged[group[0].name] = [
            helper.make_node("MatMulNBits", inputs, [product], product, domain="com.microsoft", **whole),
            helper.make_node("Split", [product, split], outputs, f"{x}.split", axis=-1),
        ]
        gone |= {node.name for node in group}
    kept = [merged.get(node.name, [] if node.name in gone else [node]) for node in graph.node]
    replace_nodes(graph, [node for nodes in kept for node in nodes])


def _bias(nodes: list[NodeProto], weights: Weights) -> tuple[NodeProto, str] | None:
    """The `Add` of a bias that is all that follows a product, and the bias."""
    if len(nodes) == 1 and nodes[0].op_type == "Add" and nodes[0].input[1] in weights:
        return nodes[0], nodes[0].input[1]
    return None


def step_bytes(graph: Path) -> int:
    """Weights that one run of a graph reads: all but the tables of which it takes a row."""
    import onnx

    model = onnx.load(graph, load_external_data=False).graph
    gathered = {node.input[0] for node in model.node if node.op_type == "Gather"}
    whole = {name for node in model.node if node.op_type != "Gather" for name in node.input}
    lengths = {
        tensor.name: int(entry.value)
        for tensor in model.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    }
    return sum(length for name, length in lengths.items() if name in whole or name not in gathered)
