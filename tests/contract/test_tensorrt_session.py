"""TensorRT sessions over a device of paper: the same numbers as the ONNX Runtime sessions give, slot by slot."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fake_tensorrt
from bundles import MAX_SEQUENCE, TOKEN_BUDGET, WINDOW_BUDGET, write_export
from checkpoints import random_checkpoint

from cxr_triton.engines import cuda, tensorrt_session
from cxr_triton.engines.bundle import Bundle, Geometry, build_bundle
from cxr_triton.engines.recipe import PREFILL_TOKENS, load_recipe
from cxr_triton.engines.session import DecoderSession, VisionSession, open_decoder, open_vision
from cxr_triton.engines.tensorrt import shape_ranges
from cxr_triton.errors import DeviceUnavailable, InvalidBundle, InvalidRequest

SLOTS, VOCAB = 3, 320


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundle")
    random_checkpoint(root / "checkpoint", layers=2)
    return build_bundle(write_export(root / "export", root / "checkpoint"), root / "bundle")


@pytest.fixture
def paper(bundle, tmp_path, monkeypatch):
    """A plan bundle that runs `bundle`'s graphs on the fake device, and that device."""
    device, graphs = fake_tensorrt.Cuda(), {}
    geometry = Geometry.from_json(bundle.manifest["geometry"], "")
    recipe = dataclasses.replace(load_recipe("rtx4090-int4"), slots=SLOTS, image_budget=2)
    plans = {}
    for graph in ("vision", "decoder"):
        (tmp_path / f"{graph}.plan").write_bytes(graph.encode())
        # The exported graph: ONNX Runtime's own rewrite takes one sequence at a time.
        graphs[graph.encode()] = (
            bundle.path.parent / "export" / f"{graph}.onnx",
            shape_ranges(graph, geometry, recipe, 2),
        )
        plans[graph] = {"version": fake_tensorrt.VERSION, "compute_capability": "8.9"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "runtime", lambda: device)
    monkeypatch.setattr(tensorrt_session, "runtime", lambda: device)
    monkeypatch.setattr(tensorrt_session, "load_library", lambda engine: fake_tensorrt.library(device, graphs))
    # The graph's cache length is free here; a plan's is max_sequence.
    manifest = bundle.manifest | {"engine": "tensorrt-rtx", "vision_engine": "tensorrt-rtx", "plans": plans}
    return Bundle(tmp_path, manifest, bundle.digest, geometry), device


def prompt(rng, tokens, images=0):
    index = np.full(tokens, -1)
    index[1 : 1 + images] = np.arange(images)
    return {
        "input_ids": rng.integers(0, VOCAB, tokens),
        "image_index": index,
        "image_embeddings": rng.standard_normal((images, 128)).astype(np.float32),
        "position_ids": np.tile(np.arange(tokens), (3, 1)),
    }


def test_prefill_and_steps_of_several_slots_are_those_of_onnx_runtime(bundle, paper):
    rng = np.random.default_rng(0)
    reference, session = DecoderSession(bundle, slots=SLOTS), open_decoder(paper[0], slots=SLOTS)
    for slot, (tokens, images) in enumerate(((9, 4), (PREFILL_TOKENS + 5, 40), (3, 0))):  # the second in two pieces
        given = prompt(rng, tokens, images)
        expected, actual = (engine.prefill(slot, **given, is_last=True).copy() for engine in (reference, session))
        np.testing.assert_allclose(actual, expected, atol=2e-4)
    for active in (3, 2, 3, 3, 1, 2):  # new, new, replayed, replayed, new, replayed
        ids, positions = rng.integers(0, VOCAB, active), reference.lengths[:active].copy()
        expected, actual = (engine.step(ids, positions).copy() for engine in (reference, session))
        np.testing.assert_allclose(actual, expected, atol=2e-4)
    np.testing.assert_array_equal(session.lengths, reference.lengths)
    assert paper[1].launched == 3


def test_a_prompt_in_chunks_a_moved_slot_and_a_freed_one(bundle, paper):
    rng = np.random.default_rng(1)
    engines = DecoderSession(bundle, slots=SLOTS), open_decoder(paper[0], slots=SLOTS)
    first, second = prompt(rng, 20, 6), prompt(rng, 12, 3)
    chunks = [slice(0, 8), slice(8, 16), slice(16, 20)]
    results = []
    for engine in engines:
        engine.prefill(0, **second, is_last=True)
        for chunk in chunks:
            logits = engine.prefill(
                1,
                first["input_ids"][chunk],
                first["image_index"][chunk],
                first["image_embeddings"],
                first["position_ids"][:, chunk],
                is_last=chunk.stop == 20,
            )
            assert (logits is None) == (chunk.stop != 20)
        ended = logits.copy()
        engine.move(1, 0)
        engine.free(1)
        results.append((ended, engine.step(np.array([5]), np.array([20])).copy(), list(engine.lengths)))
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_more_slots_than_the_plan_has_are_refused(paper):
    with pytest.raises(InvalidRequest, match=r"9 slots.*takes 3"):
        open_decoder(paper[0], slots=9)
    with pytest.raises(InvalidRequest, match="batch-invariant"):
        open_decoder(paper[0], slots=2, batch_invariant=True)


def test_images_beyond_the_plans_batch_are_encoded_in_turns(bundle, paper):
    rng, images = np.random.default_rng(2), 5
    valid = np.zeros((images, WINDOW_BUDGET, 64), bool)
    valid[:, :4] = True
    feeds = {
        "pixel_windows": rng.integers(0, 256, (images, WINDOW_BUDGET, 64, 588), np.uint8),
        "patch_rows_cols": rng.integers(0, 16, (images, WINDOW_BUDGET, 64, 2), np.int32),
        "valid": valid,
        "merge_order": np.tile(np.arange(TOKEN_BUDGET, dtype=np.int32), (images, 1)),
    }
    expected = VisionSession(bundle).encode(**feeds)
    actual = open_vision(paper[0]).encode(**feeds)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_memory_is_given_back(paper):
    session = open_decoder(paper[0], slots=SLOTS)
    rows = 2 * 2 * 2 * 32 * MAX_SEQUENCE * 4  # layers, key and value, heads, width, positions, bytes
    assert sum(map(len, paper[1].memory.values())) > rows * SLOTS
    del session
    assert not paper[1].memory


def test_a_plan_for_another_card_or_a_damaged_one_is_refused(paper, tmp_path):
    paper[0].manifest["plans"]["vision"]["compute_capability"] = "12.0"
    with pytest.raises(
        DeviceUnavailable, match=r"vision\.plan was built for compute capability 12\.0.*Paper GPU with 8\.9"
    ):
        open_vision(paper[0])
    (tmp_path / "decoder.plan").write_bytes(b"damaged")
    with pytest.raises(InvalidBundle, match=r"tensorrt-rtx cannot load decoder\.plan"):
        open_decoder(paper[0], slots=1)


def test_compiled_kernels_are_kept_for_the_next_start(paper, tmp_path):
    session = open_decoder(paper[0], slots=1)
    session.prefill(0, **prompt(np.random.default_rng(3), 4), is_last=True)
    session.step(np.array([1]), np.array([4]))
    (kept,) = (tmp_path / "cache" / "cxr-triton" / "kernels").iterdir()
    assert kept.read_bytes() == b"kernels" and json.dumps(kept.name)
