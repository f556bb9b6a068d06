"""Products of a 3B decoder's layers in int4, by the compiled library beside ONNX Runtime: part of `make bench`.

As many of a kind as no cache holds, one after the other, so that a row waits for memory as in a step.
"""

import functools
import os

import numpy as np
import pytest
from bench_stages import measure
from onnx import TensorProto, helper, numpy_helper

from cxr_triton.engines import engine

KINDS = {"query, key and value": (2048, 2560), "gate and up": (2048, 22016), "down": (11008, 2048)}
"""K and N."""
BLOCK = 128
BYTES = 200e6
ROUNDS = 11


@functools.lru_cache(1)
def products(k: int, n: int) -> bytes:
    """Of one input with several weights; a column of each result leaves the graph."""
    count, rng = max(1, int(BYTES / (k * n / 2))), np.random.default_rng(0)
    tensors = [numpy_helper.from_array(np.array([value], np.int64), name) for name, value in (("zero", 0), ("one", 1))]
    nodes = []
    sizes = {"K": k, "N": n, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    for i in range(count):
        weights = rng.integers(0, 256, (n, k // BLOCK, BLOCK // 2), np.uint8)
        scales = rng.random(n * k // BLOCK, np.float32)
        tensors += [numpy_helper.from_array(weights, f"w{i}"), numpy_helper.from_array(scales, f"s{i}")]
        nodes += [
            helper.make_node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", **sizes),
            helper.make_node("Slice", [f"y{i}", "zero", "one", "one"], [f"z{i}"]),
        ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(f"z{i}", TensorProto.FLOAT, None) for i in range(count)],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("rows", (1, 4, 16, 64, 320))
def test_products(benchmark, kind, rows):
    k, n = KINDS[kind]
    x = np.random.default_rng(1).standard_normal((rows, k), np.float32)
    threads = len(os.sched_getaffinity(0))
    ours, theirs = (
        engine(name).product(products(k, n), {"x": x}, "int4", threads) for name in ("onnxruntime-w4a8", "onnxruntime")
    )
    measure(benchmark, f"{kind}, {rows} rows", ours, {"onnxruntime": theirs}, ROUNDS)
