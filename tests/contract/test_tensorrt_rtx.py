"""Engines built ahead of time by TensorRT-RTX on this CPU: whole, in the layers meant, with no weight held twice."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import onnx
import pytest

pytest.importorskip("tensorrt_rtx")

from bundles import write_export, write_tokenizer
from checkpoints import random_checkpoint
from click.testing import CliRunner

from cxr_triton.cli import main
from cxr_triton.engines import engine
from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.recipe import RECIPES, TEXT_3B, VISION_3B, load_recipe
from cxr_triton.engines.tensorrt import compiler as tensorrt
from cxr_triton.errors import BuildFailed, DeviceUnavailable, InvalidBundle, InvalidRequest
from cxr_triton.perf.shape import write_shape

LAYERS = 2
TYPES = {"bf16": "compute", "int4": "int4", "int4-awq": "int4", "fp8": "fp8"}
"""Precisions of the decoder, and the head of each; what is not float comes as a quantized checkpoint, int4 apart."""
TEXT = TEXT_3B | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "vocab_size": 4096,
    "num_attention_heads": 8,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
}
VISION = VISION_3B | {
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 256,
    "depth": 2,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 512,
}
PLAN_BYTES = 4 << 20
"""What a plan holds besides weights, for each profile: compiled code, which does not grow with the model's width."""


def recipe_for(precision, **changes):
    """rtx4090-int4 with another precision, and few slots."""
    base = load_recipe("rtx4090-int4")
    decoder = dataclasses.replace(base.decoder, precision=precision, head=TYPES[precision])
    return dataclasses.replace(base, decoder=decoder, slots=4, **changes)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Export folders by precision: bf16 graphs of one shape, made on demand."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    (root / "tokenizer").mkdir()
    write_tokenizer(root / "tokenizer", 512)
    (root / "tokenizer" / "chat_template.jinja").write_text("")

    def export(precision):
        if precision not in made:
            scheme = precision if precision in ("fp8", "int4-awq") else None
            source = write_shape(
                root / f"{precision}.checkpoint",
                root / "tokenizer",
                scheme=scheme,
                text_values=TEXT,
                vision_values=VISION,
            )
            made[precision] = write_export(
                root / precision, source, precision=precision, compute="bf16", head=TYPES[precision]
            )
        return made[precision]

    return export


@pytest.fixture(scope="module")
def built(exports, tmp_path_factory):
    """Bundles by precision, made on demand."""
    root, made = tmp_path_factory.mktemp("built"), {}

    def bundle(precision):
        if precision not in made:
            made[precision] = build_bundle(
                exports(precision), root / precision, recipe=recipe_for(precision), cache=root / "cache"
            )
        return made[precision]

    bundle.cache = root / "cache"
    return bundle


@pytest.mark.parametrize("precision", TYPES)
def test_both_engines_are_built_with_the_layers_meant(built, precision):
    bundle = built(precision)
    assert Bundle.open(bundle.path) == bundle
    assert (bundle.engine, bundle.vision_engine) == ("tensorrt-rtx", "tensorrt-rtx")
    assert bundle.precision == precision and bundle.manifest["compute_capabilities"] == ["8.9"]
    assert bundle.manifest["recipe"]["slots"] == 4
    names = {path.name for path in bundle.path.iterdir()}
    assert {"vision.plan", "decoder.plan"} <= names and not any(
        name.startswith(("vision.onnx", "decoder.onnx")) for name in names
    )
    layers = bundle.manifest["plans"]["decoder"]["layers"]
    assert layers["KV_CACHE_UPDATE"] == layers["ROTARY_EMBEDDING"] == 2 * LAYERS
    assert layers["ATTENTION_INPUT"] == layers["ATTENTION_OUTPUT"] == LAYERS and "SOFTMAX" not in layers
    quantized = {"bf16": 0, "int4": 7 * LAYERS + 1, "int4-awq": 7 * LAYERS + 1}
    if precision in quantized:
        assert layers.get("DEQUANTIZE", 0) == quantized[precision] and "QUANTIZE" not in layers
    else:  # every product has its weight, and an input that products of one layer may share
        assert layers["DEQUANTIZE"] - layers["QUANTIZE"] == 7 * LAYERS + 1
    assert bundle.manifest["plans"]["vision"]["layers"]["MATRIX_MULTIPLY"] >= 8


@pytest.mark.parametrize("precision", TYPES)
def test_no_weight_is_held_twice_or_in_a_wider_type(built, precision):
    for graph, plan in built(precision).manifest["plans"].items():
        assert plan["bytes"] == (built(precision).path / f"{graph}.plan").stat().st_size > plan["weights_bytes"] * 0.98
        assert plan["reported"]["weights_bytes"] <= 1.05 * plan["weights_bytes"]
        profiles = len(plan["reported"]["activation_bytes"])
        assert profiles == (2 if graph == "decoder" else 1)
        assert plan["bytes"] <= 1.05 * plan["weights_bytes"] + profiles * PLAN_BYTES


@pytest.mark.parametrize("precision", TYPES)
def test_the_recipe_computes_what_the_compiler_reports(built, precision):
    memory = recipe_for(precision).memory(TEXT, VISION)
    plans = built(precision).manifest["plans"]
    assert memory["vision_tower"] == pytest.approx(plans["vision"]["reported"]["weights_bytes"], rel=0.05)
    computed = sum(memory[part] for part in ("decoder_layers", "embedding", "head"))
    assert computed == pytest.approx(plans["decoder"]["reported"]["weights_bytes"], rel=0.05)
    longest = built(precision).geometry.max_sequence / recipe_for(precision).max_sequence
    assert memory["kv_cache"] * longest == plans["decoder"]["cache_bytes"]


def test_the_transformers_model_of_the_other_tests_builds_too(tmp_path):
    random_checkpoint(tmp_path / "checkpoint", dtype="bfloat16", layers=1, hidden=256)
    export = write_export(tmp_path / "export", tmp_path / "checkpoint", precision="int4", compute="bf16")
    bundle = build_bundle(export, tmp_path / "bundle", recipe=recipe_for("int4"))
    assert bundle.manifest["plans"]["decoder"]["layers"]["KV_CACHE_UPDATE"] == 2


def test_a_second_build_takes_plans_from_the_cache_and_a_damaged_one_is_built(built, exports, tmp_path, monkeypatch):
    first, compiled = built("int4"), Counter()

    def counting(room, graph, plan, *args, **kwargs):
        compiled[graph.stem] += 1
        plan.write_bytes(b"built again")
        return first.manifest["plans"][graph.stem]

    monkeypatch.setattr(tensorrt, "compile_graph", counting)
    again = build_bundle(exports("int4"), tmp_path / "again", recipe=recipe_for("int4"), cache=built.cache)
    assert again.digest == first.digest and not compiled
    cache = shutil.copytree(built.cache, tmp_path / "cache")
    for entry in cache.glob("??/*/plan"):
        data = bytearray(entry.read_bytes())
        data[len(data) // 2] ^= 1
        entry.write_bytes(data)
    damaged = build_bundle(exports("int4"), tmp_path / "damaged", recipe=recipe_for("int4"), cache=cache)
    assert compiled == {"vision": 1, "decoder": 1}
    assert (damaged.path / "decoder.plan").read_bytes() == b"built again"


@pytest.mark.parametrize("change", ["slots", "capability", "graph", "weights"])
def test_another_target_graph_or_weight_is_another_plan(built, exports, tmp_path, monkeypatch, change):
    built("int4")
    compiled = []

    def refuse(room, graph, *args, **kwargs):
        compiled.append(graph.stem)
        raise BuildFailed("not from the cache")

    monkeypatch.setattr(tensorrt, "compile_graph", refuse)
    recipe, export = recipe_for("int4"), Path(shutil.copytree(exports("int4"), tmp_path / "export"))
    if change == "slots":
        recipe = dataclasses.replace(recipe, slots=5)
    elif change == "capability":
        recipe = dataclasses.replace(recipe, compute_capability="8.6")
    elif change == "graph":
        model = onnx.load(export / "decoder.onnx", load_external_data=False)
        model.producer_version = "2"
        onnx.save(model, export / "decoder.onnx")
    else:
        data = bytearray((export / "decoder.onnx.data").read_bytes())
        data[-1] ^= 1
        (export / "decoder.onnx.data").write_bytes(data)
    with pytest.raises(BuildFailed):
        build_bundle(export, tmp_path / "bundle", recipe=recipe, cache=built.cache)
    assert compiled == (["vision"] if change == "capability" else ["decoder"])
    assert not (tmp_path / "bundle").exists()


def test_an_export_of_other_types_than_the_recipes_is_refused_with_the_command(exports, tmp_path):
    with pytest.raises(InvalidRequest, match=r"precision bf16.*asks for precision int4.*--compute bf16 --head int4"):
        build_bundle(exports("bf16"), tmp_path / "bundle", recipe=recipe_for("int4"))


def edited(exports, tmp_path, change):
    """A bf16 export whose decoder graph a function has changed."""
    export = Path(shutil.copytree(exports("bf16"), tmp_path / "export"))
    model = onnx.load(export / "decoder.onnx", load_external_data=False)
    change(model)
    onnx.save(model, export / "decoder.onnx")
    return export


def test_an_operator_that_the_parser_does_not_know_is_named_with_its_node(exports, tmp_path):
    def rename(model):
        node = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
        node.op_type, node.name = "Bogus", "the_node"

    with pytest.raises(
        BuildFailed, match=r"tensorrt-rtx 1\.\S+ refuses node the_node \(Bogus\) of decoder\.onnx.*; .*export again"
    ):
        build_bundle(edited(exports, tmp_path, rename), tmp_path / "bundle", recipe=recipe_for("bf16"))
    assert not list(tmp_path.glob(".bundle*"))


def test_weights_that_are_not_there_are_named(exports, tmp_path):
    export = edited(exports, tmp_path, lambda model: None)
    with open(export / "decoder.onnx.data", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(InvalidBundle, match=r"decoder\.onnx\.data has 5000 bytes.*export again"):
        build_bundle(export, tmp_path / "bundle", recipe=recipe_for("bf16"))
    ranges = tensorrt.shape_ranges("decoder", tensorrt_geometry(export), recipe_for("bf16"), 1)
    with pytest.raises(BuildFailed, match=r"cannot read the weights \S+ of decoder\.onnx; .*export again"):
        tensorrt.compile_graph(
            engine("tensorrt-rtx").library,
            export / "decoder.onnx",
            tmp_path / "decoder.plan",
            profiles=ranges,
            max_sequence=tensorrt_geometry(export).max_sequence,
            target=engine("tensorrt-rtx").library.target(recipe_for("bf16")),
        )


def test_attention_without_a_fused_kernel_is_refused_with_the_types_that_have_one(tmp_path):
    """So an engine that was built attends in fused kernels."""
    random_checkpoint(tmp_path / "checkpoint", layers=1, hidden=256)
    export = write_export(tmp_path / "export", tmp_path / "checkpoint", precision="fp32")
    geometry = tensorrt_geometry(export)
    recipe = recipe_for("bf16")
    with pytest.raises(BuildFailed, match=r"cannot build node Attention_\d+ \(Attention\).*--compute fp16 or bf16"):
        tensorrt.compile_graph(
            engine("tensorrt-rtx").library,
            export / "decoder.onnx",
            tmp_path / "plan",
            profiles=tensorrt.shape_ranges("decoder", geometry, recipe, 1),
            max_sequence=geometry.max_sequence,
            target=engine("tensorrt-rtx").library.target(recipe),
        )


def tensorrt_geometry(export):
    from cxr_triton.engines.geometry import Geometry

    return Geometry.from_json(json.loads((export / "export.json").read_text())["geometry"], "export.json")


def test_ctrl_c_stops_a_build_and_leaves_nothing(exports, tmp_path, monkeypatch):
    import tqdm

    class Interrupted(tqdm.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(tqdm, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_bundle(exports("bf16"), tmp_path / "bundle", recipe=recipe_for("bf16"), cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("*"))


def test_the_build_verb_says_what_it_built(exports, tmp_path):
    own = tmp_path / "own.yaml"
    text = (RECIPES / "rtx4090-int4.yaml").read_text()
    own.write_text(text.replace("int4-awq", "int4").replace("slots: 16", "slots: 4"))
    arguments = ["build", str(exports("int4")), "-o", str(tmp_path / "bundle"), "--recipe", str(own)]
    result = CliRunner().invoke(main, [*arguments, "--cache", str(tmp_path / "cache"), "--json", "-"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["engine"] == "tensorrt-rtx" and said["plans"]["decoder"]["bytes"] > 0 and said["container"] is None
    assert "of its weights" in result.stderr
    assert list((tmp_path / "cache").glob("??/*/entry.json"))


def has_gpu():
    try:
        from cxr_triton.engines.cuda import device

        device()
    except DeviceUnavailable:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_sessions_without_a_gpu_say_so(built):
    for opened in (lambda bundle: bundle.open_vision(), lambda bundle: bundle.open_decoder(slots=2)):
        with pytest.raises(
            DeviceUnavailable, match=r"no NVIDIA GPU can be used here \(.+\); .*or use a recipe for a CPU"
        ):
            opened(built("int4"))


def test_a_plan_of_another_version_is_refused_before_the_gpu_is_asked(built, tmp_path):
    path = Path(shutil.copytree(built("int4").path, tmp_path / "bundle"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["plans"]["vision"]["version"] = "1.0.0.1"
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidBundle, match=r"vision\.plan was built with tensorrt-rtx 1\.0\.0\.1, \S+ is installed"):
        Bundle.open(path).open_vision()


def test_tensorrt_is_refused_where_it_cannot_be_loaded_or_has_no_gpu(tmp_path):
    recipe = load_recipe("l4-int4")
    if has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceUnavailable, match=r"cannot be loaded|no NVIDIA GPU"):
        engine("tensorrt").library.load()
        engine("tensorrt").library.target(recipe)


@pytest.mark.parametrize(
    "container, version, matches",
    [
        ("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3", "10.14.1.48", True),
        ("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3", "10.14.1.48.post1", True),
        ("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3", "11.4.0.106", False),
        ("nvcr.io/nvidia/tritonserver:26.07-py3", "11.4.0.106", None),
        (None, "11.4.0.106", None),
    ],
)
def test_a_plan_says_whether_the_containers_tensorrt_takes_it(container, version, matches):
    found = tensorrt.container_match(container, version)
    assert found["matches"] is matches and version.removesuffix(".post1") in found["said"]


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no GPU")
def test_a_decode_step_on_a_gpu_gives_finite_logits(exports, tmp_path):
    import numpy as np

    from cxr_triton.engines.cuda import device

    recipe = recipe_for("int4", compute_capability=device().compute_capability)
    session = build_bundle(exports("int4"), tmp_path / "bundle", recipe=recipe).open_decoder(slots=2)
    ids, none = np.arange(1, 9), np.zeros((0, TEXT["hidden_size"]), np.float32)
    for slot in range(2):
        session.prefill(slot, ids, np.full(8, -1), none, np.tile(np.arange(8), (3, 1)), is_last=True)
    steps = [session.step(np.array([5, 5]), np.array([8 + i, 8 + i])).copy() for i in range(3)]
    assert all(np.isfinite(step).all() for step in steps)
    np.testing.assert_allclose(steps[2][0], steps[2][1], atol=1e-2)
