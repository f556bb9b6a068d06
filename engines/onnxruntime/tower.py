"""The tower in int8: weights rounded by output channel, activations by token, products summed in int32.

What is large and takes rounding well is rounded: the linear layers of the blocks, 95 % of the tower's work. The patch
kernel, the merger, norms and attention stay in fp32. A token's scale is its own, so that its embedding does not depend
on what else is in the picture or the batch, nor on a value that is large in one token alone.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.cpu import Cpu
from cxr_triton.engines.rewrite import Weights, replace_nodes, rewrite
from cxr_triton.errors import DeviceUnavailable

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

EXACT_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Of x86 CPUs, as Linux names them, that sum products of 8 bits in 32; others saturate sums of two at 16."""
REMEDY = "use a CPU with AVX-512 VNNI, AVX-VNNI or AMX, or build with the recipe cpu-int4"
LARGEST = 127
_ZERO = 128  # of activations, which the kernels want without sign
_LEAST = np.float32(1e-30)  # scale of a token of zeros


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


def cpu_features() -> set[str]:
    """Of this machine's CPU, as Linux names them; none where it lists none."""
    return set(Cpu.here().flags)


def require_exact() -> None:
    """Refuse a CPU that would give other numbers; raises `DeviceUnavailable`."""
    if not is_exact(cpu_features()):
        raise DeviceUnavailable(f"the tower is in int8, whose sums this CPU saturates at 16 bits; {REMEDY}")


def is_exact(features: set[str]) -> bool:
    """Whether a CPU with these features computes what the graph says."""
    return platform.machine() not in ("x86_64", "AMD64") or not features.isdisjoint(EXACT_FEATURES)


def quantize_blocks(graph: GraphProto, weights: Weights) -> None:
    """`MatMul` with a weight of a block becomes a product of 8-bit integers, scaled back to fp32."""
    nodes: list[NodeProto] = []
    quantized: dict[str, tuple[str, str]] = {}  # input of a layer → as integers, scale by token
    for node in graph.node:
        if node.op_type != "MatMul" or not _is_of_block(node.input[1], weights):
            nodes.append(node)
            continue
        x, weight = node.input
        if x not in quantized:
            quantized[x] = _quantize(x, weights, nodes)
        nodes += _product(*quantized[x], weight, weights, node)
    replace_nodes(graph, nodes)


def by_channel(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight [K, N] in int8 [K, N], and the fp32 scale [N] of each output."""
    scale = np.abs(weight).max(0).astype(np.float32) / np.float32(LARGEST)
    scale[scale == 0] = 1
    return np.rint(weight / scale).astype(np.int8), scale


def _is_of_block(name: str, weights: Weights) -> bool:
    return name in weights.exported and name.startswith("visual.blocks.")


def _quantize(x: str, weights: Weights, nodes: list[NodeProto]) -> tuple[str, str]:
    """fp32 [..., K] → uint8 [..., K] around 128, and the scale [..., 1] by which it comes back."""
    from onnx import TensorProto, helper

    def constant(name: str, value) -> str:
        return weights.add(f"int8.{name}", lambda: np.atleast_1d(value))

    def add(kind: str, *inputs: str, **attributes) -> str:
        output = f"{x}.int8.{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [output], output, **attributes))
        return output

    largest = add("ReduceMax", add("Abs", x), constant("last", np.array([-1], np.int64)), keepdims=1)
    scale = add("Max", add("Mul", largest, constant("step", np.float32(1 / LARGEST))), constant("least", _LEAST))
    places = add("Add", add("Div", x, scale), constant("middle", np.float32(_ZERO)))
    return add("Cast", add("Round", places), to=TensorProto.UINT8), scale


def _product(values: str, scale: str, weight: str, weights: Weights, node: NodeProto) -> list[NodeProto]:
    from onnx import helper

    def stored(part: int) -> Callable[[], np.ndarray]:
        return lambda: by_channel(weights.value(weight))[part]

    inputs = [
        values,
        weights.add(f"{weight}.int8", stored(0)),
        weights.add("int8.one", lambda: np.ones(1, np.float32)),
        weights.add(f"{weight}.scale", stored(1)),
        weights.add("int8.zero", lambda: np.full(1, _ZERO, np.uint8)),
    ]
    product = f"{node.output[0]}.int8"
    return [
        helper.make_node("MatMulIntegerToFloat", inputs, [product], product, domain="com.microsoft"),
        helper.make_node("Mul", [product, scale], node.output, node.name),
    ]
