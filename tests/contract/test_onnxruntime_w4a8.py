"""The compiled products of int4 by int8: beside their definition, with what they refuse, and in a decoder."""

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import gate_case
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from bundles import build_w4a8, write_export
from checkpoints import random_checkpoint
from gate_case import export_int4, judged
from onnx import TensorProto, helper, numpy_helper

from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.onnxruntime import ENGINE as ONNXRUNTIME
from cxr_triton.engines.onnxruntime import int8
from cxr_triton.engines.onnxruntime_w4a8 import ENGINE, compiler, library
from cxr_triton.engines.onnxruntime_w4a8.compiler import DOMAIN, pack_panels, pack_scales
from cxr_triton.engines.recipe import load_recipe
from cxr_triton.engines.rewrite import pack_int4
from cxr_triton.errors import DeviceUnavailable, InvalidRecipe

SOURCE = Path(library.__file__).parent
SIZES = [(64, 40, 32), (128, 16, 128), (2048, 100, 128), (4096, 33, 128), (256, 50, 8), (2304, 48, 48)]
"""K, N and block: panels that are not full, inputs beyond those that are unpacked at once, blocks of an odd width."""


class Product:
    """A random weight, what it stands for, and as the operator takes it."""

    def __init__(self, k, n, block, seed=0):
        rng = np.random.default_rng(seed)
        self.k, self.n, self.block = k, n, block
        self.values = rng.integers(-8, 8, (k, n)).astype(np.int8)
        self.scales = rng.uniform(0.1, 1, (k // block, n)).astype(np.float32)
        self.bias = rng.standard_normal(n, np.float32)
        signed = self.values.astype(np.uint8) & 15
        if n % 2:  # two outputs share a byte of ONNX's int4
            signed = np.pad(signed, ((0, 0), (0, 1)))
        self.by_column = pack_int4((signed[:, 0::2] | (signed[:, 1::2] << 4)).ravel(), k, signed.shape[1])[:n]
        self.packed, self.panel_scales = pack_panels(self.by_column), pack_scales(self.scales.T)

    def of(self, x):
        """As its definition has it: rows rounded block by block to 127 steps, in double precision."""
        blocks = x.reshape(len(x), -1, self.block)
        largest = np.abs(blocks).max(-1, keepdims=True)
        whole = np.rint(blocks * (np.float32(127) / largest))
        rounded = (whole.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)
        return rounded @ (self.values * np.repeat(self.scales, self.block, 0).astype(np.float64)) + self.bias

    def model(self, **changed):
        given = {"weights": self.packed, "scales": self.panel_scales, "bias": self.bias} | changed
        attributes = {"K": self.k, "N": self.n, "block_size": self.block, "gated": 0} | changed.get("attributes", {})
        names = ["x", *(name for name in ("weights", "scales", "bias") if given[name] is not None)]
        graph = helper.make_graph(
            [helper.make_node("W4A8MatMul", names, ["y"], domain=DOMAIN, **attributes)],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(given[name], name) for name in names[1:]],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def run(self, x, threads=2, **changed):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(library.require()))
        return ort.InferenceSession(self.model(**changed), options).run(None, {"x": x})[0]


@pytest.fixture
def rows():
    return lambda count, k: np.random.default_rng(count).standard_normal((count, k), np.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_product_is_that_of_its_definition(size, rows):
    product = Product(*size)
    for count in (1, 2, 3, 7, 8, 12, 13, 25, 40):
        x = rows(count, product.k)
        expected = product.of(x)
        np.testing.assert_allclose(product.run(x), expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("count", [1, 40])
def test_a_product_is_that_of_the_operator_in_whose_place_it_stands(count, rows):
    """`MatMulNBits` at accuracy 4, which rounds by the same blocks; as both are measured."""
    product, x = Product(256, 48, 32), rows(count, 256)
    sizes = {"K": 256, "N": 48, "bits": 4, "block_size": 32, "accuracy_level": 4}
    graph = helper.make_graph(
        [helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **sizes)],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(product.by_column.reshape(48, 8, 16), "w"),
            numpy_helper.from_array(np.ascontiguousarray(product.scales.T).ravel(), "s"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    (ours,), (theirs,) = (each.product(model, {"x": x}, "int4", 2)() for each in (ENGINE, ONNXRUNTIME))
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())


def test_a_row_is_the_same_bit_by_bit_whatever_others_and_threads_there_are(rows):
    product = Product(4096, 72, 128)
    x = rows(50, product.k)
    whole = product.run(x)
    for count in (1, 4, 12, 13, 24, 37):
        np.testing.assert_array_equal(product.run(x[:count], threads=1), whole[:count])
        np.testing.assert_array_equal(product.run(x[-count:]), whole[-count:])


def test_leading_dimensions_stay_and_no_row_is_none(rows):
    product = Product(64, 40, 32)
    x = rows(6, product.k)
    np.testing.assert_array_equal(product.run(x.reshape(2, 3, -1)), product.run(x).reshape(2, 3, -1))
    assert product.run(x[:0]).shape == (0, 40)
    np.testing.assert_allclose(product.run(x, bias=None) + product.bias, product.run(x), atol=1e-4)


class Gated:
    """Two products, of a gate and of what it gates, as one."""

    def __init__(self, k, n, block):
        self.parts = [Product(k, n, block, seed) for seed in (1, 2)]
        self.product = self.parts[0]
        in_turn = [np.stack(both, 1) for both in zip(*((p.packed, p.panel_scales) for p in self.parts), strict=True)]
        weights, scales = (both.reshape(-1, *both.shape[2:]) for both in in_turn)
        self.changed = {"weights": weights, "scales": scales, "bias": None, "attributes": {"gated": 1}}

    def of(self, x):
        gate, gated = (part.of(x) - part.bias for part in self.parts)
        with np.errstate(over="ignore"):
            return gate / (1 + np.exp(-gate)) * gated


@pytest.mark.parametrize("size", [(64, 40, 32), (2048, 100, 128), (4096, 16, 128)], ids=str)
def test_a_gated_product_is_silu_of_the_one_times_the_other(size, rows):
    product = Gated(*size)
    for count in (1, 5, 13, 40):
        x = rows(count, size[0])
        expected, seen = product.of(x), product.product.run(x, **product.changed)
        np.testing.assert_allclose(seen, expected, atol=1e-3 * np.abs(expected).max())
        np.testing.assert_array_equal(product.product.run(x[:1], **product.changed), seen[:1])


def test_a_gate_that_is_wide_open_or_shut_stays_finite(rows):
    product = Gated(64, 40, 32)
    x = np.stack([rows(1, 64)[0] * scale for scale in (1e-6, 1, 30, 1e4)])
    seen = product.product.run(x, **product.changed)
    np.testing.assert_allclose(seen, product.of(x), rtol=1e-3, atol=1e-12)
    x[2, 3] = np.nan
    assert np.isnan(product.product.run(x, **product.changed)).all(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_its_row_alone(value, count, rows):
    product = Product(256, 40, 128)
    x = rows(count, product.k)
    as_they_are = product.run(x)
    x[1, 130] = value
    seen = product.run(x)
    assert np.isnan(seen[1]).all(), "rounding hides none of it"
    np.testing.assert_array_equal(np.delete(seen, 1, 0), np.delete(as_they_are, 1, 0))


def test_zeros_and_the_smallest_values_give_the_bias():
    product = Product(256, 40, 128)
    x = np.zeros((2, product.k), np.float32)
    x[1] = 1e-40
    np.testing.assert_array_equal(product.run(x), np.tile(product.bias, (2, 1)))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"weights": np.zeros((3, 8, 16, 2), np.uint8)}, "not of K by N"),
        ({"scales": np.zeros((2, 2, 16), np.float32)}, "not of K by N"),
        ({"bias": np.zeros(39, np.float32)}, "bias is not of N"),
        ({"attributes": {"block_size": 24}}, "not what it multiplies"),
        ({"attributes": {"block_size": 4}}, "not what it multiplies"),
        ({"attributes": {"block_size": 0}}, "not what it multiplies"),
        ({"attributes": {"K": -64}}, "not what it multiplies"),
        ({"attributes": {"N": 1 << 62}}, "not what it multiplies"),
        ({"attributes": {"gated": 2}}, "not what it multiplies"),
        ({"attributes": {"gated": 1}}, "not of K by N"),
        ({"attributes": {"K": 96}}, "the last dimension of x is not K"),
    ],
    ids=str,
)
def test_a_damaged_graph_is_refused_and_reads_no_foreign_memory(changed, why, rows):
    with pytest.raises(Exception, match=why):
        Product(64, 40, 32).run(rows(3, 64), **changed)


class Matmul(ctypes.Structure):
    """`matmul` of matmul.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "block", "gated")),
        *((name, ctypes.c_void_p) for name in ("x", "weights", "scales", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("tiles", "tile_rows")),
        *((name, ctypes.c_void_p) for name in ("words", "steps", "shifts")),
        *((name, ctypes.c_int64) for name in ("tasks", "task_panels")),
    ]


@pytest.mark.skipif(not shutil.which("cc"), reason="a C compiler is needed")
def test_any_other_cpu_computes_the_same(tmp_path, rows):
    """What is written without this CPU's instructions, in a library of its own."""
    file = tmp_path / "portable.so"
    flags = ["-std=c11", "-O1", "-DPORTABLE", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", str(file), str(SOURCE / "matmul.c"), "-lm"], check=True)
    code = ctypes.CDLL(str(file))
    code.matmul_plan.restype = ctypes.c_size_t
    gated = Gated(128, 40, 32)
    for product, changed in [*((Product(*size), {}) for size in SIZES), (gated.product, gated.changed)]:
        held = {"weights": product.packed, "scales": product.panel_scales, "bias": product.bias} | changed
        for count in (1, 3, 13):
            x, y = rows(count, product.k), np.zeros((count, product.n), np.float32)
            pointers = {
                name: held[name].ctypes.data for name in ("weights", "scales", "bias") if held[name] is not None
            }
            work = Matmul(
                rows=count, inputs=product.k, outputs=product.n, block=product.block, gated=int(bool(changed)),
                x=x.ctypes.data, y=y.ctypes.data, **pointers,
            )  # fmt: skip
            memory = np.zeros(code.matmul_plan(ctypes.byref(work)) // 4, np.int32)
            code.matmul_place(ctypes.byref(work), ctypes.c_void_p(memory.ctypes.data))
            for tile in range(work.tiles):
                code.matmul_round(ctypes.byref(work), ctypes.c_int64(tile))
            for task in range(work.tasks):
                code.matmul_multiply(ctypes.byref(work), ctypes.c_int64(task))
            here = product.run(x, **changed)
            np.testing.assert_allclose(y, here, atol=1e-5 * np.abs(here).max())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("w4a8")
    random_checkpoint(folder / "checkpoint", tied=False)
    return write_export(folder / "export", folder / "checkpoint", precision="int4")


@pytest.fixture(scope="module")
def bundle(exported):
    return build_w4a8(exported, exported.parent / "bundle")


def test_every_product_of_a_decoder_is_one(bundle):
    graph = onnx.load(bundle.path / "decoder.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node if "MatMul" in node.op_type or node.op_type == "DequantizeLinear"]
    assert set(kinds) == {"W4A8MatMul"} and len(kinds) == 4 * bundle.geometry.layers + 1
    assert not [node for node in graph.node if node.op_type == "Sigmoid"], "what is gated leaves it multiplied"


def test_steps_beside_others_are_the_same_bits(bundle):
    """Of a stream alone and with three beside it, batch invariance asked for or not."""
    for invariant in (False, True):
        session = bundle.open_decoder(slots=4, threads=2, batch_invariant=invariant)
        assert session.checks == (0 if invariant else 1)
        rng = np.random.default_rng(1)
        prompts = [rng.integers(0, session.vocab, 20 + slot) for slot in range(4)]
        alone = []
        for slots in (1, 4):
            for slot in range(slots):
                session.free(slot)
                count = len(prompts[slot])
                nothing, text = np.zeros((0, session.hidden), np.float32), np.full(count, -1)
                session.prefill(slot, prompts[slot], text, nothing, np.tile(np.arange(count), (3, 1)), is_last=True)
            steps = [session.step(np.full(slots, 5), np.arange(20, 20 + slots) + step).copy() for step in range(3)]
            alone.append([logits[0] for logits in steps])
        np.testing.assert_array_equal(alone[0], alone[1])


def test_the_library_is_missed_where_it_is_needed(bundle, monkeypatch):
    assert ENGINE.is_installed and all(need.is_met for need in ENGINE.needs(bundle, "decoder"))
    monkeypatch.setattr(library, "EXTENSION_SUFFIXES", [".other"])
    assert not ENGINE.is_installed
    (missing,) = [need for need in ENGINE.needs(bundle, "decoder") if not need.is_met]
    assert "C compiler" in missing.remedy
    with pytest.raises(DeviceUnavailable, match="not compiled when cxr-triton was installed; install a C compiler"):
        Bundle.open(bundle.path).open_decoder(slots=1)


def test_weights_that_are_not_int4_are_refused():
    recipe = load_recipe("cpu-int4-w4a8")
    with pytest.raises(InvalidRecipe, match=r"decoder\.precision: fp32 on onnxruntime-w4a8; choose int4 or int4-awq"):
        dataclasses.replace(
            recipe, decoder=dataclasses.replace(recipe.decoder, precision="fp32", head="compute"), thresholds={}
        )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds a bundle of the demonstration model, in as many variants as are asked for."""
    if not int8.is_exact(int8.cpu_features()):
        pytest.skip(f"its tower is in int8: {int8.REMEDY}")
    folder = tmp_path_factory.mktemp("demonstration")
    export = export_int4(folder / "export")
    return lambda name: build_bundle(export, folder / name, recipe=load_recipe("cpu-int4-w4a8"))


@pytest.fixture(scope="module")
def reference():
    with gate_case.reference() as reference:
        yield reference


@pytest.mark.timeout(300)
def test_it_passes_the_gate_and_changes_no_label(built, reference):
    record = judged(built("good"), reference, 12)
    found = {check["name"]: check["value"] for check in record["parts"]["readings"]["checks"]}
    assert record["passed"] and found["label_iou"] == 1.0


@pytest.mark.timeout(300)
def test_the_gate_refuses_a_wrong_scale(built, reference, monkeypatch):
    packed, seen = compiler.pack_scales, []

    def wrong(scales):
        seen.append(len(seen))
        return packed(scales) * np.float32(1.5 if len(seen) == 3 else 1)  # of one layer's part

    monkeypatch.setattr(compiler, "pack_scales", wrong)
    record = judged(built("spoiled"), reference, 8)
    assert len(seen) > 10 and not record["passed"]
