"""The tower in int8: its products against numpy, its engine against the gate."""

import dataclasses

import gate_case
import numpy as np
import onnx
import pytest
from gate_case import export_int4, judged
from onnx import TensorProto, helper

from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.onnxruntime import ENGINE, int8, tower
from cxr_triton.engines.onnxruntime.session import open_graph
from cxr_triton.engines.recipe import load_recipe
from cxr_triton.engines.rewrite import rewrite
from cxr_triton.errors import DeviceUnavailable

K, N = 96, 40
LAYER = "visual.blocks.0.mlp.up_proj.weight"
pytestmark = pytest.mark.skipif(
    not int8.is_exact(int8.cpu_features()), reason="this CPU saturates products of 8 bits: no int8 tower runs here"
)


def layer(folder, name, weight):
    """A graph of one layer, as `export` stores its weight, compiled."""
    path = folder / "vision.onnx"
    (folder / "vision.onnx.data").write_bytes(weight.tobytes())
    stored = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=weight.shape)
    stored.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "vision.onnx.data", "offset": 0, "length": weight.nbytes}.items():
        stored.external_data.add(key=key, value=str(value))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", name], ["y"], "product")],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "T", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "T", weight.shape[1]])],
        [stored],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    out = folder / "compiled"
    out.mkdir()
    rewrite(path, out / "vision.onnx", tower.quantize_blocks)
    return out / "vision.onnx"


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, K), np.float32) * np.float32(3)
    x[0, 3] = 0  # as padding may be
    x[1, 2, 5] = 1000  # one value of one token that is large, as towers have them
    return x, rng.standard_normal((K, N), np.float32)


def test_a_product_is_that_of_integers_rounded_by_token_and_by_channel(values, tmp_path):
    x, weight = values
    weight[:, 4] = 0
    actual = open_graph(layer(tmp_path, LAYER, weight), 1).run(None, {"x": x})[0]
    by_channel = np.abs(weight).max(0) / 127
    by_token = np.abs(x).max(-1, keepdims=True) / 127
    integers = [
        np.rint(v / np.where(scale, scale, 1)).astype(np.int64) for v, scale in ((x, by_token), (weight, by_channel))
    ]
    expected = integers[0] @ integers[1] * by_channel * by_token
    # A quotient next to a half may be rounded either way: one step of one of the K values.
    allowed = 1e-5 * np.abs(expected) + 1.01 * by_token * np.abs(weight).max(0)
    assert (np.abs(actual - expected) <= allowed).all()
    assert np.median(np.abs(actual - expected) / np.abs(expected).max(-1, keepdims=True).clip(1e-9)) < 1e-6
    assert not actual[0, 3].any() and not actual[..., 4].any()


def test_a_token_is_the_same_alone_and_among_others(values, tmp_path):
    x, weight = values
    session = open_graph(layer(tmp_path, LAYER, weight), 2)
    together = session.run(None, {"x": x})[0]
    for i, j in np.ndindex(x.shape[:2]):
        np.testing.assert_array_equal(session.run(None, {"x": x[i : i + 1, j : j + 1]})[0][0, 0], together[i, j])


def test_what_is_no_layer_of_a_block_stays_as_it_is(values, tmp_path):
    x, weight = values
    path = layer(tmp_path, "visual.merger.mlp.0.weight", weight)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["MatMul"]
    np.testing.assert_allclose(open_graph(path, 1).run(None, {"x": x})[0], x @ weight, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds a bundle of the demonstration model with the tower in int8, in as many variants as are asked for."""
    folder = tmp_path_factory.mktemp("int8")
    export = export_int4(folder / "export")
    return lambda name: build_bundle(export, folder / name, recipe=load_recipe("cpu-int4-vnni"))


@pytest.fixture(scope="module")
def good(built):
    return built("good")


@pytest.fixture(scope="module")
def reference():
    with gate_case.reference() as reference:
        yield reference


@pytest.mark.timeout(300)
def test_it_passes_the_gate_and_changes_no_label(good, reference, record_property):
    record = judged(good, reference, 12)
    found = {
        check["name"]: check["value"] for part in ("vision", "readings") for check in record["parts"][part]["checks"]
    }
    record_property("measured", {name: found[name] for name in ("vision_cosine", "vision_cosine_min", "vision_norm")})
    assert record["passed"] and found["label_iou"] == 1.0
    assert 1 - found["vision_cosine"] > 1e-9, "it is no tower in int8"


@pytest.mark.timeout(300)
def test_the_gate_refuses_a_wrong_scale(built, reference, monkeypatch):
    by_channel, spoiled = int8.by_channel, []

    def wrong(weight):
        values, scale = by_channel(weight)
        spoiled.append(len(spoiled))
        return values, scale * np.float32(1.25 if len(spoiled) <= 3 else 1)  # query, key and value of one block

    monkeypatch.setattr(int8, "by_channel", wrong)
    record = judged(built("spoiled"), reference, 8)
    assert spoiled and not record["parts"]["vision"]["passed"]


def test_a_cpu_that_saturates_is_refused(good, monkeypatch):
    monkeypatch.setattr(int8, "cpu_features", lambda: {"avx2", "avx512f"})
    monkeypatch.setattr(int8.platform, "machine", lambda: "x86_64")
    with pytest.raises(DeviceUnavailable, match=r"saturates.*recipe cpu-int4"):
        good.open_vision()
    (need,) = (need for need in ENGINE.needs(good, "vision") if need.is_met is False)
    assert "VNNI" in need.wanted and "cpu-int4" in need.remedy
    monkeypatch.setattr(int8, "cpu_features", lambda: {"avx2", "avx_vnni"})
    assert all(need.is_met for need in ENGINE.needs(good, "vision"))


def test_the_recipe_computes_what_the_tower_takes():
    recipe = load_recipe("cpu-int4-vnni")
    vision = recipe.memory()["vision_tower"]
    plain = dataclasses.replace(recipe, vision=dataclasses.replace(recipe.vision, precision="fp32"), thresholds={})
    assert 0.25 < vision / plain.memory()["vision_tower"] < 0.4
