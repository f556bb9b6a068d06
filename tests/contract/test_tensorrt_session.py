"""TensorRT's compiler and sessions over a device of paper, in each generation of its interface.

The numbers are those that the ONNX Runtime sessions give, slot by slot.
"""

import dataclasses
import json
import sys

import fake_tensorrt
import numpy as np
import pytest
import tensorrt_api
from bundles import MAX_SEQUENCE, TOKEN_BUDGET, WINDOW_BUDGET, write_export
from checkpoints import random_checkpoint

from cxr_triton.engines import cuda, engine
from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.geometry import Geometry
from cxr_triton.engines.interface import PREFILL_TOKENS
from cxr_triton.engines.onnxruntime.session import OrtDecoder, OrtVision
from cxr_triton.engines.recipe import load_recipe
from cxr_triton.engines.tensorrt import compiler as tensorrt
from cxr_triton.engines.tensorrt import session as tensorrt_session
from cxr_triton.errors import BuildFailed, DeviceUnavailable, InvalidBundle, InvalidRequest

SLOTS, VOCAB = 3, 320
LIBRARIES = ("tensorrt-rtx 1.7.1.116", "tensorrt 10.15.1.29", "tensorrt 11.0.0.114", "tensorrt 11.4.0.106")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundle")
    random_checkpoint(root / "checkpoint", layers=2)
    return build_bundle(write_export(root / "export", root / "checkpoint"), root / "bundle")


@pytest.fixture(params=LIBRARIES)
def installed(request, tmp_path, monkeypatch):
    """Engine, library and device of paper, in place of TensorRT of a version."""
    name, version = request.param.split()
    device = fake_tensorrt.Cuda()
    library = fake_tensorrt.library(version, device)
    monkeypatch.setitem(sys.modules, engine(name).library.module, library)
    monkeypatch.setattr(cuda, "runtime", lambda: device)
    monkeypatch.setattr(tensorrt_session, "runtime", lambda: device)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return name, library, device


def compile_paper(bundle, folder, name, graph, **options):
    geometry = Geometry.from_json(bundle.manifest["geometry"], "")
    recipe = dataclasses.replace(load_recipe("rtx4090-int4"), slots=SLOTS, image_budget=2)
    return tensorrt.compile_graph(
        engine(name).library,
        # The exported graph: ONNX Runtime's own rewrite takes one sequence at a time.
        bundle.path.parent / "export" / f"{graph}.onnx",
        folder / f"{graph}.plan",
        profiles=tensorrt.shape_ranges(graph, geometry, recipe, 2),
        max_sequence=geometry.max_sequence,
        target=engine(name).library.target(recipe),
        progress=False,
        **options,
    )


@pytest.fixture
def paper(bundle, installed, tmp_path):
    """A plan bundle that runs `bundle`'s graphs on the fake device, and that device."""
    name, _, device = installed
    plans = {graph: compile_paper(bundle, tmp_path, name, graph) for graph in ("vision", "decoder")}
    manifest = bundle.manifest | {"engine": name, "vision_engine": name, "plans": plans}
    return Bundle(tmp_path, manifest, bundle.digest, Geometry.from_json(bundle.manifest["geometry"], "")), device


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
    reference, session = OrtDecoder(bundle, slots=SLOTS), paper[0].open_decoder(slots=SLOTS)
    for slot, (tokens, images) in enumerate(((9, 4), (PREFILL_TOKENS + 5, 40), (3, 0))):  # the second in two pieces
        given = prompt(rng, tokens, images)
        expected, actual = (each.prefill(slot, **given, is_last=True).copy() for each in (reference, session))
        np.testing.assert_allclose(actual, expected, atol=2e-4)
    for active in (3, 2, 3, 3, 1, 2):  # new, new, replayed, replayed, new, replayed
        ids, positions = rng.integers(0, VOCAB, active), reference.lengths[:active].copy()
        expected, actual = (each.step(ids, positions).copy() for each in (reference, session))
        np.testing.assert_allclose(actual, expected, atol=2e-4)
    np.testing.assert_array_equal(session.lengths, reference.lengths)
    assert paper[1].launched == 3


def test_an_engine_that_forbids_capture_is_launched_step_by_step(bundle, paper, caplog):
    paper[1].forbids_capture = True
    reference, session = OrtDecoder(bundle, slots=1), paper[0].open_decoder(slots=1)
    given = prompt(np.random.default_rng(4), 6)
    for each in (reference, session):
        each.prefill(0, **given, is_last=True)
    for token in range(3):
        expected, actual = (e.step(np.array([token]), np.array([6 + token])).copy() for e in (reference, session))
        np.testing.assert_allclose(actual, expected, atol=2e-4)
    is_asked = paper[0].engine == "tensorrt-rtx"  # before it is captured; TensorRT fails once
    assert (paper[1].launched, paper[1].captures) == (0, 0 if is_asked else 1)
    assert ("kernel by kernel" in caplog.text) != is_asked


def test_a_prompt_in_chunks_a_moved_slot_and_a_freed_one(bundle, paper):
    rng = np.random.default_rng(1)
    engines = OrtDecoder(bundle, slots=SLOTS), paper[0].open_decoder(slots=SLOTS)
    first, second = prompt(rng, 20, 6), prompt(rng, 12, 3)
    chunks = [slice(0, 8), slice(8, 16), slice(16, 20)]
    results = []
    for each in engines:
        each.prefill(0, **second, is_last=True)
        for chunk in chunks:
            logits = each.prefill(
                1,
                first["input_ids"][chunk],
                first["image_index"][chunk],
                first["image_embeddings"],
                first["position_ids"][:, chunk],
                is_last=chunk.stop == 20,
            )
            assert (logits is None) == (chunk.stop != 20)
        ended = logits.copy()
        each.move(1, 0)
        each.free(1)
        results.append((ended, each.step(np.array([5]), np.array([20])).copy(), list(each.lengths)))
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_more_slots_than_the_plan_has_are_refused(paper):
    with pytest.raises(InvalidRequest, match=r"9 slots.*takes 3"):
        paper[0].open_decoder(slots=9)
    with pytest.raises(InvalidRequest, match="batch-invariant"):
        paper[0].open_decoder(slots=2, batch_invariant=True)


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
    expected = OrtVision(bundle).encode(**feeds)
    actual = paper[0].open_vision().encode(**feeds)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_memory_is_given_back(paper):
    session = paper[0].open_decoder(slots=SLOTS)
    rows = 2 * 2 * 2 * 32 * MAX_SEQUENCE * 4  # layers, key and value, heads, width, positions, bytes
    assert sum(map(len, paper[1].memory.values())) > rows * SLOTS
    del session
    assert not paper[1].memory


def test_a_plan_for_another_card_or_a_damaged_one_is_refused(paper, tmp_path):
    paper[0].manifest["plans"]["vision"]["compute_capability"] = "12.0"
    with pytest.raises(
        DeviceUnavailable, match=r"vision\.plan was built for compute capability 12\.0.*Paper GPU with 8\.9"
    ):
        paper[0].open_vision()
    (tmp_path / "decoder.plan").write_bytes(b"damaged")
    with pytest.raises(InvalidBundle, match=r"tensorrt\S* cannot load decoder\.plan \(Serialization assertion"):
        paper[0].open_decoder(slots=1)


def test_a_plan_loads_where_the_same_tensorrt_was_packed_again(paper):
    paper[0].manifest["plans"]["vision"]["version"] += ".post1"
    paper[0].open_vision()


def test_a_driver_that_is_too_old_for_the_library_is_named(paper):
    paper[1].is_too_old = True
    with pytest.raises(DeviceUnavailable, match=r"does not start on this Paper GPU \(.+ 35\); update the GPU's driver"):
        paper[0].open_vision()


def test_networks_are_strongly_typed(paper):
    for graph in ("vision", "decoder"):
        assert json.loads((paper[0].path / f"{graph}.plan").read_text())["is_strongly_typed"]


@pytest.mark.parametrize("installed", LIBRARIES[1:], indirect=True)
@pytest.mark.parametrize("found", [None, b"times of Paper GPU", b"times of another card", b"damaged"])
def test_kernel_times_are_kept_and_those_of_another_card_give_way(bundle, installed, tmp_path, found):
    times = tmp_path / "cache" / "timing"
    if found is not None:
        times.parent.mkdir()
        times.write_bytes(found)
    compile_paper(bundle, tmp_path, installed[0], "vision", timing_cache=times)
    assert times.read_bytes() == b"times of Paper GPU"


@pytest.mark.parametrize("installed", ["tensorrt 10.14.1.48.post1"], indirect=True)
def test_the_tensorrt_beside_tensorrt_llm_compiles_the_vision_graph_only(bundle, installed, tmp_path):
    assert compile_paper(bundle, tmp_path, "tensorrt", "vision")["version"] == "10.14.1.48.post1"
    with pytest.raises(DeviceUnavailable, match=r"10\.14\.1\.48\.post1 is installed, 10\.15 is the least.*decoder"):
        compile_paper(bundle, tmp_path, "tensorrt", "decoder")


@pytest.mark.parametrize("installed", ["tensorrt 10.14.1.48.post1"], indirect=True)
def test_the_least_version_is_the_first_with_the_decoders_layers(bundle, installed, tmp_path, monkeypatch):
    monkeypatch.setattr(engine("tensorrt").library, "least_version", (10, 14))
    with pytest.raises(BuildFailed, match=r"refuses node \S+ \((RotaryEmbedding|TensorScatter)\) of decoder\.onnx"):
        compile_paper(bundle, tmp_path, "tensorrt", "decoder")


def test_a_major_version_that_is_not_known_is_refused(installed):
    name, library, _ = installed
    library.__version__ = "12.0.0.1"
    with pytest.raises(DeviceUnavailable, match=r"12\.0\.0\.1 is installed, (11|1)\.x is the last.*pip install"):
        engine(name).library.load()


@pytest.mark.parametrize("installed", LIBRARIES[:1], indirect=True)
def test_compiled_kernels_are_kept_for_the_next_start(paper, tmp_path):
    session = paper[0].open_decoder(slots=1)
    session.prefill(0, **prompt(np.random.default_rng(3), 4), is_last=True)
    session.step(np.array([1]), np.array([4]))
    (kept,) = (tmp_path / "cache" / "cxr-triton" / "kernels").iterdir()
    assert kept.read_bytes() == b"kernels" and json.dumps(kept.name)


REMOVED = {  # by TensorRT 11: NVIDIA's "Removed Python APIs and Replacements", as far as it concerns these classes
    "BuilderFlag": {"FP16", "INT8", "FP8", "BF16", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS"},
    "IBuilderConfig": {"int8_calibrator", "set_calibration_profile", "set_quantization_flag", "quantization_flags"},
    "ICudaEngine": {"device_memory_size", "get_device_memory_size_for_profile"},
    "NetworkDefinitionCreationFlag": {"EXPLICIT_BATCH"},
}


def test_what_tensorrt_11_removed_is_in_the_record_of_10_only():
    rtx, least, *newer = (tensorrt_api.read()[name.split()[1]] for name in LIBRARIES)
    for name, gone in REMOVED.items():
        assert gone <= least[name] and not any(gone & version[name] for version in (rtx, *newer))


def test_using_what_a_version_has_not_fails_in_the_fake():
    of_rtx, _, _, latest = (fake_tensorrt.library(name.split()[1], fake_tensorrt.Cuda()) for name in LIBRARIES)
    with pytest.raises(AttributeError):
        latest.BuilderFlag.FP16  # noqa: B018
    with pytest.raises(AttributeError):
        latest.ComputeCapability  # noqa: B018
    with pytest.raises(AttributeError):
        latest.IExecutionContext.is_stream_capturable  # noqa: B018
    with pytest.raises(AttributeError):
        latest.IBuilderConfig().num_compute_capabilities = 1
    of_rtx.IBuilderConfig().num_compute_capabilities = 1


def test_the_record_is_what_the_installed_bindings_have():
    module = pytest.importorskip("tensorrt_rtx")
    recorded = tensorrt_api.read().get(module.__version__)
    if recorded is None:
        pytest.skip(f"no record of {module.__version__}: run tests/tensorrt_api.py")
    assert {name: set(found) for name, found in tensorrt_api.names(module).items()} == recorded


def test_cache_rows_that_are_read_and_written_elsewhere_are_those_that_were_computed(bundle, paper):
    """As ONNX Runtime's session has them, and enough to go on from in another slot."""
    given = prompt(np.random.default_rng(5), 40, 6)
    results = []
    for each in (OrtDecoder(bundle, slots=SLOTS), paper[0].open_decoder(slots=SLOTS)):
        each.prefill(1, **given, is_last=True)
        rows = [each.read_cache(1, start, stop) for start, stop in ((0, 32), (32, 40))]
        assert rows[0].shape == (2 * bundle.geometry.layers, bundle.geometry.kv_heads, 32, bundle.geometry.head_dim)
        alone = each.step(np.array([0, 5]), np.array([0, 40]))[1].copy()
        each.free(0)
        each.write_cache(0, 0, rows[0])
        each.write_cache(0, 32, rows[1])
        assert each.lengths[0] == 40
        np.testing.assert_allclose(each.step(np.array([5]), np.array([40]))[0], alone, atol=1e-5)
        results.append(np.concatenate(rows, axis=2))
    np.testing.assert_allclose(results[1], results[0], atol=2e-4)
