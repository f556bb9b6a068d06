"""Products of 8-bit integers in a graph: weights rounded by output channel, activations by token, summed in int32.

A token's scale is its own, so that its result does not depend on what else is in the run, nor on a value that is large
in one token alone.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.cpu import Cpu
from cxr_triton.engines.interface import Need
from cxr_triton.engines.rewrite import Author, Weights, replace_nodes
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
    makers = {node.output[0]: make for node in graph.node if node.op_type == "MatMul" and (make := rounded(node))}
    author = _Integers(weights, graph, makers)
    for node in graph.node:
        author.write(node)
    replace_nodes(graph, author.nodes)


def _scale(largest: np.ndarray) -> np.ndarray:
    scale = largest.astype(np.float32) / np.float32(LARGEST)
    scale[scale == 0] = 1
    return scale


class _Integers(Author):
    """Author of the products and of what rounds their inputs, once for all that share one."""

    def __init__(self, weights: Weights, graph: GraphProto, makers: Mapping[str, Callable[[], Rounded]]):
        super().__init__(weights)
        self._makers = makers  # of weights, by the products that take them
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self._rounded: dict[str, tuple[str, str]] = {}  # input of a layer → as integers, scale by token
        self._scales: dict[str, str] = {}  # what is not scaled yet → scale by token
        self._one = weights.add("int8.one", lambda: np.array([1], np.float32))
        self._zero = weights.add("int8.zero", lambda: np.array([_ZERO], np.uint8))

    def write(self, old: NodeProto) -> None:
        """What comes in the place of a node."""
        if make := self._makers.get(old.output[0]):
            self._multiply(old, make)
            return
        if old.op_type == "Mul" and (scales := [self._scales[name] for name in old.input if name in self._scales]):
            (self._scales[old.output[0]],) = scales
        self.nodes.append(old)

    def _multiply(self, old: NodeProto, make: Callable[[], Rounded]) -> None:
        from onnx import helper

        x, weight = old.input
        if x not in self._rounded:
            self._rounded[x] = self._round(x)
        values, scale = self._rounded[x]
        scales: list[np.ndarray] = []  # small, and known once the integers are written

        def integers() -> np.ndarray:
            value, by_output = make()
            scales.append(by_output)
            return value

        inputs = [
            values,
            self.weights.add(f"{weight}.int8", integers),
            self._one,
            self.weights.add(f"{weight}.by_output", lambda: scales[-1] if scales else make()[1]),
            self._zero,
        ]
        (result,) = old.output
        waits = self._may_wait(result)
        product = result if waits else f"{result}.int8"
        self.nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [product], product, domain="com.microsoft"))
        if waits:
            self._scales[result] = scale
        else:
            self.node("Mul", product, scale, name=result)

    def _may_wait(self, result: str) -> bool:
        """Whether a product is only multiplied with something and then rounded, whatever scale its tokens have."""
        readers = self._readers[result]
        if [node.op_type for node in readers] != ["Mul"] or any(name in self._scales for name in readers[0].input):
            return False
        behind = self._readers[readers[0].output[0]]
        return bool(behind) and all(node.output[0] in self._makers for node in behind)

    def _round(self, x: str) -> tuple[str, str]:
        """fp32 [..., K] → uint8 [..., K] around 128, and the scale [..., 1] by which it comes back.

        A token's scale is that of an axis of `QuantizeLinear`, so that the values are read three times and not written
        in fp32 again: these passes take as long as the products.
        """
        node, ints = self.node, self.ints
        most = node("ReduceMax", x, ints(-1), name=f"{x}.most", keepdims=1)
        least = node("Neg", node("ReduceMin", x, ints(-1), name=f"{x}.least", keepdims=1), name=f"{x}.least_turned")
        step = self.weights.add("int8.step", lambda: np.array([1 / LARGEST], np.float32))
        scale = node("Mul", node("Max", most, least, name=f"{x}.largest"), step, name=f"{x}.step")
        scale = node(
            "Max", scale, self.weights.add("int8.least", lambda: np.array([_LEAST], np.float32)), name=f"{x}.scale"
        )
        tokens = node("Flatten", x, name=f"{x}.tokens", axis=-1)
        by_token = node("Reshape", scale, ints(-1), name=f"{x}.by_token")
        zeros = node("Expand", self._zero, node("Shape", by_token, name=f"{x}.count"), name=f"{x}.zeros")
        rounded = node("QuantizeLinear", tokens, by_token, zeros, name=f"{x}.rounded", axis=0)
        values = node("Reshape", rounded, node("Shape", x, name=f"{x}.shape"), name=f"{x}.int8")
        return values, node("Mul", scale, waiting, name=f"{x}.whole") if (waiting := self._scales.get(x)) else scale
