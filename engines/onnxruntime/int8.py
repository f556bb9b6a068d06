"""Products of 8-bit integers in a graph: weights rounded by output channel, activations by token, summed in int32.

A token's scale is its own, so that its result does not depend on what else is in the run, nor on a value that is large
in one token alone.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.cpu import Cpu
from cxr_triton.engines.interface import Need
from cxr_triton.engines.rewrite import Weights, replace_nodes
from cxr_triton.errors import DeviceUnavailable

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

EXACT_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Of x86 CPUs, as Linux names them, that sum products of 8 bits in 32; others saturate sums of two at 16."""
REMEDY = "use a CPU with AVX-512 VNNI, AVX-VNNI or AMX, or build with the recipe cpu-int4"
LARGEST = 127
Rounded = tuple[np.ndarray, np.ndarray]
"""A weight in int8 [K, N], and the fp32 scale [N] of each output."""
_ZERO = 128  # of activations, which the kernels want without sign
_LEAST = np.float32(1e-30)  # scale of a token of zeros


def cpu_features() -> set[str]:
    """Of this machine's CPU, as Linux names them; none where it lists none."""
    return set(Cpu.here().flags)


def is_exact(features: set[str]) -> bool:
    """Whether a CPU with these features computes what such a graph says."""
    return platform.machine() not in ("x86_64", "AMD64") or not features.isdisjoint(EXACT_FEATURES)


def require_exact(what: str) -> None:
    """Refuse a CPU that would give other numbers; raises `DeviceUnavailable`."""
    if not is_exact(cpu_features()):
        raise DeviceUnavailable(f"{what} in int8, whose sums this CPU saturates at 16 bits; {REMEDY}")


def need() -> Need:
    """Such a CPU, as `Engine.needs` tells it."""
    is_met = is_exact(cpu_features())
    return Need(
        what="8-bit products",
        found="summed in 32 bits" if is_met else "saturated at 16 bits",
        wanted="AVX-512 VNNI, AVX-VNNI or AMX",
        is_met=is_met,
        remedy=REMEDY,
    )


def by_channel(weight: np.ndarray) -> Rounded:
    """A weight [K, N] rounded to int8."""
    scale = _scale(np.abs(weight).max(0))
    return np.rint(weight / scale).astype(np.int8), scale


def blocks_by_channel(values: np.ndarray, scales: np.ndarray) -> Rounded:
    """A weight of blocks, each with a scale, rounded to int8 once more.

    Parameters
    ----------
    values : (K, N) int8 array
        Integers of the blocks.
    scales : (K / block, N) float32 array
    """
    blocks = values.reshape(len(scales), -1, values.shape[1])
    largest = np.maximum(blocks.max(1), -blocks.min(1).astype(np.int16))
    scale = _scale((largest * np.abs(scales)).max(0))
    rounded = np.empty(blocks.shape, np.int8)
    for block, ratio, target in zip(blocks, scales / scale, rounded, strict=True):
        target[:] = np.rint(block * ratio)
    return rounded.reshape(values.shape), scale


def quantize_products(
    graph: GraphProto, weights: Weights, rounded: Callable[[NodeProto], Callable[[], Rounded] | None]
) -> None:
    """Have each `MatMul` of which `rounded` gives a weight multiply integers, scaled back to fp32."""
    nodes: list[NodeProto] = []
    quantized: dict[str, tuple[str, str]] = {}  # input of a layer → as integers, scale by token
    for node in graph.node:
        make = rounded(node) if node.op_type == "MatMul" else None
        if make is None:
            nodes.append(node)
            continue
        x = node.input[0]
        if x not in quantized:
            quantized[x] = _quantize(x, weights, nodes)
        nodes += _product(quantized[x], make, weights, node)
    replace_nodes(graph, nodes)


def _scale(largest: np.ndarray) -> np.ndarray:
    scale = largest.astype(np.float32) / np.float32(LARGEST)
    scale[scale == 0] = 1
    return scale


def _quantize(x: str, weights: Weights, nodes: list[NodeProto]) -> tuple[str, str]:
    """fp32 [..., K] → uint8 [..., K] around 128, and the scale [..., 1] by which it comes back."""
    from onnx import helper

    def constant(name: str, value) -> str:
        return weights.add(f"int8.{name}", lambda: np.atleast_1d(value))

    def add(kind: str, *inputs: str, **attributes) -> str:
        output = f"{x}.int8.{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [output], output, **attributes))
        return output

    largest = add("ReduceMax", add("Abs", x), constant("last", np.int64(-1)), keepdims=1)
    scale = add("Max", add("Mul", largest, constant("step", np.float32(1 / LARGEST))), constant("least", _LEAST))
    steps = add("Div", x, scale)
    return add("QuantizeLinear", steps, constant("one", np.float32(1)), constant("zero", np.uint8(_ZERO))), scale


def _product(x: tuple[str, str], make: Callable[[], Rounded], weights: Weights, node: NodeProto) -> list[NodeProto]:
    """What comes in the place of a `MatMul`, for what `_quantize` made of its input."""
    from onnx import helper

    (values, scale), weight = x, node.input[1]
    scales: list[np.ndarray] = []  # small, and known once the integers are written

    def integers() -> np.ndarray:
        value, by_output = make()
        scales.append(by_output)
        return value

    inputs = [
        values,
        weights.add(f"{weight}.int8", integers),
        "int8.one",
        weights.add(f"{weight}.by_output", lambda: scales[-1] if scales else make()[1]),
        "int8.zero",
    ]
    product = f"{node.output[0]}.int8"
    return [
        helper.make_node("MatMulIntegerToFloat", inputs, [product], product, domain="com.microsoft"),
        helper.make_node("Mul", [product, scale], node.output, node.name),
    ]
