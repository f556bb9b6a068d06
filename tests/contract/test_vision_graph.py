"""`vision.onnx` in ONNX Runtime against transformers, with the same random weights and the same 8-bit pictures."""

import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from checkpoints import random_checkpoint

from cxr_triton.engines.onnxruntime.tower import STEPS
from cxr_triton.engines.patches import drop_padding
from cxr_triton.engines.rewrite import rewrite
from cxr_triton.errors import BuildFailed
from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.graph import check
from cxr_triton.export.vision import write_vision
from cxr_triton.pixels.image import stack, windows

WINDOWS, TOKENS = 16, 256  # budget of 448 x 448 pixels
GRIDS = {  # merge units, rows x columns
    "square of whole windows": (8, 8),
    "fills the budget": (16, 16),
    "one unit": (1, 1),
    "tall": (16, 5),
    "wide": (3, 16),
    "strip": (1, 13),
    "edge windows on both sides": (9, 7),
    "one unit over a window": (5, 5),
    "edge window below": (6, 8),
    "typical radiograph": (15, 12),
}
RELATIVE = 1e-4  # of the largest output


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    return folder, random_checkpoint(folder / "checkpoint")


@pytest.fixture(scope="module")
def processor(reference):
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(reference[0] / "checkpoint")


@pytest.fixture(scope="module")
def exported(reference):
    folder, _ = reference
    path = write_vision(Checkpoint(folder / "checkpoint"), folder / "fp32")
    check(path)
    return path


def rewritten(exported, *steps):
    folder = exported.parent / "-".join(step.__name__ for step in steps)
    folder.mkdir(exist_ok=True)
    rewrite(exported, folder / "vision.onnx", *steps)
    return folder / "vision.onnx"


@pytest.fixture(scope="module", params=[(), (drop_padding,), STEPS], ids=["exported", "without padding", "compiled"])
def session(exported, request):
    path = rewritten(exported, *request.param) if request.param else exported
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def picture(units, seed=0):
    """A picture with structure at several scales, so that patches differ and no channel equals another."""
    random = np.random.default_rng(seed)
    rows, cols = 28 * units[0], 28 * units[1]
    y, x = np.mgrid[:rows, :cols]
    ramp = np.stack([y / rows, x / cols, (x + y) / (rows + cols)], -1)
    return (200 * ramp + 55 * random.random((rows, cols, 3))).astype(np.uint8)


def expected(model, processor, pixels):
    batch = processor(images=[pixels], do_resize=False, return_tensors="pt")
    with torch.no_grad():
        return model.model.visual(batch["pixel_values"].to(model.dtype), batch["image_grid_thw"]).pooler_output.float()


def feeds(*pictures, window_budget=WINDOWS, token_budget=TOKENS):
    return stack([windows(p, window_budget=window_budget, token_budget=token_budget) for p in pictures])


def relative_error(actual, reference):
    reference = np.asarray(reference)
    return np.abs(actual[: len(reference)] - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize("units", GRIDS.values(), ids=GRIDS.keys())
def test_embeddings_equal_transformers(reference, processor, session, units):
    pixels = picture(units)
    (embeddings,) = session.run(None, feeds(pixels))
    assert relative_error(embeddings[0], expected(reference[1], processor, pixels)) <= RELATIVE


@pytest.mark.parametrize("names", [list(GRIDS)[:4], list(GRIDS)[4:7], list(GRIDS)[7:]], ids=" + ".join)
def test_a_batch_of_mixed_grids_equals_each_alone(reference, processor, session, names):
    pictures = [picture(GRIDS[name], seed) for seed, name in enumerate(names)]
    (embeddings,) = session.run(None, feeds(*pictures))
    for row, pixels in zip(embeddings, pictures, strict=True):
        assert relative_error(row, expected(reference[1], processor, pixels)) <= RELATIVE


def test_padding_is_never_seen(session):
    pixels = picture((5, 3))
    clean = feeds(pixels)
    dirty = {name: value.copy() for name, value in clean.items()}
    dirty["pixel_windows"][~dirty["valid"]] = 255
    dirty["patch_rows_cols"][~dirty["valid"]] = 99
    outputs = [session.run(None, f)[0][0, :15] for f in (clean, dirty)]
    np.testing.assert_array_equal(*outputs)


def test_output_does_not_depend_on_the_budget(session):
    pixels = picture((5, 3))
    small, large = feeds(pixels, window_budget=2, token_budget=15), feeds(pixels)
    outputs = [session.run(None, f)[0][0, :15] for f in (small, large)]
    assert relative_error(*outputs) < 1e-6


@pytest.mark.parametrize("steps", [(drop_padding,), STEPS], ids=["without padding", "compiled"])
def test_padding_is_not_computed(exported, steps):
    """All linear layers of the blocks get the patches of the pictures, and no more rows."""
    path = rewritten(exported, *steps)
    model = onnx.load(path, load_external_data=False)
    layers = [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "MatMul" and any(name.startswith("visual.blocks.") for name in node.input)
    ]
    assert len(layers) >= 2 * 5
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in layers)
    onnx.save(model, path.with_name("watched.onnx"))
    inputs = feeds(picture((5, 5)), picture((9, 7)), window_budget=12)
    results = ort.InferenceSession(str(path.with_name("watched.onnx"))).run(layers, inputs)
    assert inputs["valid"].size == 2 * 12 * 64
    assert {result.shape[:-1] for result in results} == {(4 * (5 * 5 + 9 * 7),)}


def test_another_graph_is_refused_and_not_half_rewritten(exported, tmp_path):
    """Such as one in which the bytes no longer meet the constant that they were exported with."""
    model = onnx.load(exported, load_external_data=False)
    (scaled,) = (node for node in model.graph.node if "pixel_scale" in node.input)
    scaled.input[1] = "scale"
    (value,) = (tensor for tensor in model.graph.initializer if tensor.name == "pixel_scale")
    value.name = "scale"
    onnx.save(model, tmp_path / "vision.onnx")
    shutil.copy(exported.with_name("vision.onnx.data"), tmp_path)
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BuildFailed, match="export the checkpoint again"):
        rewrite(tmp_path / "vision.onnx", tmp_path / "bundle" / "vision.onnx", drop_padding)


def test_normalization_comes_from_the_checkpoint(reference, processor, tmp_path):
    folder, model = reference
    checkpoint = Checkpoint(folder / "checkpoint")
    checkpoint.preprocessor |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 128}
    session = ort.InferenceSession(str(write_vision(checkpoint, tmp_path)))
    pixels = picture((3, 6))
    other = type(processor)(**{**processor.to_dict(), **checkpoint.preprocessor})
    (embeddings,) = session.run(None, feeds(pixels))
    assert relative_error(embeddings[0], expected(model, other, pixels)) <= RELATIVE


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int4"])
def test_contract_and_standard_operators(reference, tmp_path, precision):
    path = write_vision(Checkpoint(reference[0] / "checkpoint"), tmp_path, precision=precision)
    check(path)
    model = onnx.load(path, load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""}

    def shape(value):
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    compute = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}.get(precision, 1)
    described = {v.name: (v.type.tensor_type.elem_type, shape(v)) for v in (*model.graph.input, *model.graph.output)}
    assert described == {
        "pixel_windows": (onnx.TensorProto.UINT8, ["B", "W", 64, 588]),
        "patch_rows_cols": (onnx.TensorProto.INT32, ["B", "W", 64, 2]),
        "valid": (onnx.TensorProto.BOOL, ["B", "W", 64]),
        "merge_order": (onnx.TensorProto.INT32, ["B", "T"]),
        "image_embeddings": (compute, ["B", "T", 128]),
    }


def test_int4_leaves_the_tower_in_the_compute_type(reference, exported, tmp_path):
    path = write_vision(Checkpoint(reference[0] / "checkpoint"), tmp_path, precision="int4")
    inputs = feeds(picture((6, 6)))
    outputs = [ort.InferenceSession(str(each)).run(None, inputs)[0] for each in (exported, path)]
    np.testing.assert_array_equal(*outputs)


def test_fp16_in_onnx_runtime(reference, processor, tmp_path):
    folder, model = reference
    path = write_vision(Checkpoint(folder / "checkpoint"), tmp_path, precision="fp16")
    pixels = picture((9, 7))
    (embeddings,) = ort.InferenceSession(str(path)).run(None, feeds(pixels))
    assert embeddings.dtype == np.float16
    assert relative_error(embeddings[0].astype(np.float32), expected(model, processor, pixels)) < 5e-3


def test_bf16_by_the_reference_evaluator(reference, processor, tmp_path):
    # ONNX Runtime has no bf16 MatMul on a CPU; ONNX's own evaluator computes every operator in the graph's types.
    from onnx.reference import ReferenceEvaluator

    folder, model = reference
    path = write_vision(Checkpoint(folder / "checkpoint"), tmp_path, precision="bf16")
    pixels = picture((3, 5))
    (embeddings,) = ReferenceEvaluator(str(path)).run(None, feeds(pixels, window_budget=2, token_budget=15))
    assert embeddings.dtype.name == "bfloat16"
    assert relative_error(embeddings[0].astype(np.float32), expected(model, processor, pixels)) < 5e-2
