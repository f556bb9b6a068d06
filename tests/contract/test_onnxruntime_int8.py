"""The decoder in int4 and int8: who runs what, what the second graph holds, and what the gate says of it."""

import dataclasses
import shutil

import gate_case
import numpy as np
import onnx
import pytest
from bundles import build_int8, write_export
from checkpoints import random_checkpoint
from gate_case import export_int4, judged
from onnx import TensorProto, numpy_helper

from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.onnxruntime import int8
from cxr_triton.engines.onnxruntime.session import OrtGraph
from cxr_triton.engines.onnxruntime_int8 import ENGINE
from cxr_triton.engines.onnxruntime_int8.few import is_few
from cxr_triton.engines.onnxruntime_int8.session import Int8Graph
from cxr_triton.engines.recipe import load_recipe
from cxr_triton.engines.rewrite import step_bytes, unpack_int4
from cxr_triton.engines.runtime.judged import JudgedSession
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.session import EitherGraph, HostDecoder
from cxr_triton.engines.verify.engine_under_test import SLOTS
from cxr_triton.errors import DeviceUnavailable, InvalidRecipe
from cxr_triton.sampling import Sampling

pytestmark = pytest.mark.skipif(
    not int8.is_exact(int8.cpu_features()), reason="this CPU saturates products of 8 bits: no int8 decoder runs here"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    random_checkpoint(folder / "checkpoint", tied=False)
    return build_int8(write_export(folder / "export", folder / "checkpoint", precision="int4"), folder / "bundle")


def decoder(bundle, graph, slots=4):
    """One of its two graphs for everything."""
    return HostDecoder(bundle, graph(bundle, threads=1), slots=slots)


def prompt(slot, ids):
    hidden = np.zeros((0, 1), np.float32)
    return slot, ids, np.full(len(ids), -1), hidden, np.tile(np.arange(len(ids)), (3, 1))


def test_int4_is_unpacked_as_onnx_does():
    values = np.random.default_rng(0).integers(-8, 8, (6, 4)).astype(np.int8)
    packed = ((values.ravel()[0::2] & 15) | (values.ravel()[1::2] << 4)).astype(np.uint8)
    tensor = TensorProto(data_type=TensorProto.INT4, dims=values.shape, raw_data=packed.tobytes())
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), values)
    np.testing.assert_array_equal(unpack_int4(packed, 6, 4), values)


def test_blocks_are_rounded_to_the_nearest_step_of_their_channel():
    rng = np.random.default_rng(1)
    values = rng.integers(-8, 8, (256, 12)).astype(np.int8)
    scales = rng.uniform(0.01, 1, (2, 12)).astype(np.float32)
    values[:, 3], values[:128, 4] = 0, -8
    rounded, scale = int8.blocks_by_channel(values, scales)
    weight = values * np.repeat(scales, 128, axis=0).astype(np.float64)
    assert rounded.dtype == np.int8 and scale.dtype == np.float32 and np.abs(rounded.astype(int)).max() == 127
    assert (np.abs(rounded * scale.astype(np.float64) - weight) <= 0.5001 * scale).all()
    np.testing.assert_allclose(scale[scale != 1], np.abs(weight).max(0)[scale != 1] / 127, rtol=1e-6)
    assert scale[3] == 1 and not rounded[:, 3].any()


def test_up_to_three_new_tokens_run_in_int4_and_more_in_int8(bundle):
    """Bit by bit, on one cache: what each of the two graphs gives alone."""
    both, few, many = (
        bundle.open_decoder(slots=4, threads=1),
        decoder(bundle, OrtGraph),
        decoder(bundle, Int8Graph),
    )
    rng = np.random.default_rng(2)
    for slot in range(4):
        asked = prompt(slot, rng.integers(0, 256, 40))
        np.testing.assert_array_equal(*(each.prefill(*asked, is_last=True) for each in (both, many)))
        few.write_cache(slot, 0, both.read_cache(slot, 0, 40))

    def same(alone, call):
        np.testing.assert_array_equal(call(both), call(alone))
        for other in {few, many} - {alone}:
            for slot, held in enumerate(both.lengths[:4].tolist()):
                other.free(slot)
                other.write_cache(slot, 0, both.read_cache(slot, 0, held))

    for sequences, alone in ((1, few), (3, few), (4, many)):
        ids, positions = rng.integers(0, 256, sequences), both.lengths[:sequences].copy()
        same(alone, lambda session, ids=ids, positions=positions: session.step(ids, positions).copy())
    for sequences, tokens, alone in ((1, 3, few), (1, 4, many), (2, 2, many), (4, 3, many)):
        ids = rng.integers(0, 256, (sequences, tokens))
        positions = both.lengths[:sequences, None] + np.arange(tokens)
        same(alone, lambda session, ids=ids, positions=positions: session.check(ids, positions).copy())
    assert both.checks == 4


def test_what_is_scored_is_computed_in_int8_however_few_tokens_it_has(bundle):
    """Odds compare probabilities, so these must not come from two graphs."""
    both, many = bundle.open_decoder(slots=1, threads=1), decoder(bundle, Int8Graph, slots=1)
    rng = np.random.default_rng(5)
    asked = prompt(0, rng.integers(0, 256, 30))
    for each in (both, many):
        each.prefill(*asked, is_last=True)
    for tokens in (1, 2, 3, 5):
        ids, positions = rng.integers(0, 256, tokens), 30 + np.arange(tokens)
        np.testing.assert_array_equal(*(each.score(0, 30, ids, positions).copy() for each in (both, many)))


def test_the_gate_has_given_answers_written_by_both_graphs(bundle, monkeypatch):
    shapes, run = [], EitherGraph.run

    def seen(self, cache, rows, lengths, inputs):
        shapes.append(inputs["input_ids"].shape)
        return run(self, cache, rows, lengths, inputs)

    monkeypatch.setattr(EitherGraph, "run", seen)
    rng = np.random.default_rng(6)
    nothing = np.zeros((0, bundle.geometry.hidden), np.float32)
    asked = [
        Generation(
            input_ids=rng.integers(0, 256, 9),
            position_ids=np.tile(np.arange(9), (3, 1)),
            image_index=np.full(9, -1),
            image_embeddings=nothing,
            sampling=Sampling(max_new_tokens=1),
        )
        for _ in range(SLOTS)
    ]
    judged = JudgedSession(bundle, bundle.open_decoder(slots=SLOTS, threads=1))
    judged.forced(asked, [rng.integers(0, 256, 4) for _ in asked])
    assert not is_few(SLOTS - 1, 1) and {(SLOTS - 1, 1), (1, 1)} <= set(shapes)


def test_a_prompt_is_near_that_of_the_weights_which_int4_stands_for(bundle, tmp_path):
    """Not equal, as it is rounded once more; a step away, as the rounding of int4 itself is the larger one."""
    exact = onnx.load(bundle.path / "decoder.onnx", load_external_data=False)
    for attribute in (a for node in exact.graph.node for a in node.attribute if a.name == "accuracy_level"):
        attribute.i = 1  # activations in fp32
    shutil.copyfile(bundle.path / "decoder.onnx.data", tmp_path / "decoder.onnx.data")
    onnx.save(exact, tmp_path / "decoder.onnx")
    asked = prompt(0, np.random.default_rng(3).integers(0, 256, 60))
    expected = decoder(dataclasses.replace(bundle, path=tmp_path), OrtGraph).prefill(*asked, is_last=True)
    error = np.linalg.norm(decoder(bundle, Int8Graph).prefill(*asked, is_last=True) - expected)
    assert 0 < error < 0.05 * np.linalg.norm(expected)


def test_what_a_stream_gets_in_a_crowd_does_not_depend_on_the_others(bundle):
    """In crowds of an even number: integers are summed exactly in whatever rows, and the head takes rows in pairs."""
    rng = np.random.default_rng(4)
    prompts = [prompt(slot, rng.integers(0, 256, 20 + slot if slot < 4 else 150)) for slot in range(8)]
    given = []
    for together in (4, 8):
        session = bundle.open_decoder(slots=8, threads=1)
        for asked in prompts[:together]:
            session.prefill(*asked, is_last=True)
        ids = np.arange(together) + 50
        given.append([session.step(ids, session.lengths[:together].copy())[:4].copy() for _ in range(3)])
    np.testing.assert_array_equal(*given)


def test_the_second_graph_has_layers_of_its_own_and_shares_the_tables(bundle, tmp_path):
    """Of the folder that it lies in, wherever that is."""
    model = onnx.load(bundle.path / "decoder.int8.onnx", load_external_data=False)
    places = {tensor.name: {e.key: e.value for e in tensor.external_data} for tensor in model.graph.initializer}
    lies = {name: place.get("location") for name, place in places.items()}
    assert {lies[name] for name in lies if name.endswith(".int8")} == {"decoder.int8.onnx.data"}
    shared = {name for name, location in lies.items() if location == "decoder.onnx.data"}
    assert any("embed_tokens" in name for name in shared) and any("lm_head" in name for name in shared)
    moved = tmp_path / "moved"
    bundle.path.rename(moved)
    try:
        asked = prompt(0, np.arange(30))
        logits = Bundle.open(moved).open_decoder(slots=1, threads=1).prefill(*asked, is_last=True)
    finally:
        moved.rename(bundle.path)
    np.testing.assert_array_equal(logits, bundle.open_decoder(slots=1, threads=1).prefill(*asked, is_last=True))
    few, many = (step_bytes(bundle.path / name) for name in ("decoder.onnx", "decoder.int8.onnx"))
    assert [ENGINE.crowd_bytes(bundle, streams) for streams in (1, 3, 4, 8)] == [few, few, many, many] and many > few


def test_a_cpu_that_saturates_is_refused(bundle, monkeypatch):
    monkeypatch.setattr(int8, "cpu_features", lambda: {"avx2", "avx512f"})
    monkeypatch.setattr(int8.platform, "machine", lambda: "x86_64")
    with pytest.raises(DeviceUnavailable, match=r"prompts are in int8.*recipe cpu-int4"):
        bundle.open_decoder(slots=1)
    (need,) = (need for need in ENGINE.needs(bundle, "decoder") if need.is_met is False)
    assert "VNNI" in need.wanted and "cpu-int4" in need.remedy


def test_weights_that_are_not_int4_are_refused(tmp_path):
    recipe = load_recipe("cpu-int4-int8")
    with pytest.raises(InvalidRecipe, match=r"decoder\.precision: fp32 on onnxruntime-int8; choose int4 or int4-awq"):
        dataclasses.replace(
            recipe, decoder=dataclasses.replace(recipe.decoder, precision="fp32", head="compute"), thresholds={}
        )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds a bundle of the demonstration model, in as many variants as are asked for."""
    folder = tmp_path_factory.mktemp("demonstration")
    export = export_int4(folder / "export")
    return lambda name: build_bundle(export, folder / name, recipe=load_recipe("cpu-int4-int8"))


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
    rounded, seen = int8.blocks_by_channel, []

    def wrong(values, scales):
        integers, scale = rounded(values, scales)
        seen.append(len(seen))
        return integers, scale * np.float32(1.5 if len(seen) == 3 else 1)  # of one layer's part

    monkeypatch.setattr(int8, "blocks_by_channel", wrong)
    record = judged(built("spoiled"), reference, 8)
    assert len(seen) > 10 and not record["passed"]
