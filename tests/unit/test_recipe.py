"""Recipes: every bundled one holds together and fits its card; what does not is refused by the key."""

import json
from importlib import metadata

import pytest
import yaml
from click.testing import CliRunner

from cxr_triton.cli import main
from cxr_triton.engines.cpu import Cpu
from cxr_triton.engines.onnxruntime_w4a8 import library
from cxr_triton.engines.recipe import GIB, RECIPES, TEXT_3B, VISION_3B, Recipe, choices, load_recipe, recipe_names
from cxr_triton.engines.verify.thresholds import THRESHOLDS
from cxr_triton.errors import InvalidRecipe

ASKED_FOR = {"h100-fp8", "h200-fp8", "h100-int4", "a100-int4", "l40s-fp8", "l4-int4", "rtx4090-int4", "rtx5090-fp8"}
ASKED_FOR |= {"h100-fp8-trtllm", "l40s-fp8-trtllm", "a100-int4-trtllm"}
ASKED_FOR |= {"h100-fp8-vllm", "h200-fp8-vllm", "l40s-fp8-vllm", "a100-int4-vllm", "rtx4090-int4-vllm", "cpu-bf16-vllm"}


def written(tmp_path, change, base="rtx4090-int4"):
    """A recipe file of the user's own: a bundled one with a change."""
    data = yaml.safe_load((RECIPES / f"{base}.yaml").read_text())
    change(data)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_the_recipes_that_were_asked_for_are_there():
    assert {*ASKED_FOR, "cpu-int4", "cpu-int4-openvino"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_bundled_recipe_is_valid_and_says_what_its_name_says(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert name.split("-")[1] in recipe.decoder.precision
    assert set(recipe.thresholds) <= set(THRESHOLDS)
    if recipe.decoder.precision != "bf16":
        assert recipe.thresholds["label_iou"] == (0.97 if recipe.decoder.precision == "fp8" else 0.95)
    memory = recipe.memory()
    assert memory["total"] < memory["card"] == recipe.memory_gib * GIB
    assert Recipe.__dataclass_params__.frozen


def test_vllm_holds_one_layer_of_int4_plain():
    plain, other = load_recipe("a100-int4-vllm").memory(), load_recipe("a100-int4-trtllm").memory()
    values = TEXT_3B["hidden_size"] ** 2 * TEXT_3B["num_hidden_layers"]
    assert plain["decoder_layers"] - other["decoder_layers"] == values * 2 - (values // 2 + values // 128 * 2)


def test_int8_beside_int4_is_two_of_it_more():
    both, one = (load_recipe(name).memory() for name in ("cpu-int4-int8", "cpu-int4-vnni"))
    layers = (TEXT_3B["hidden_size"], TEXT_3B["intermediate_size"], TEXT_3B["num_hidden_layers"])
    mlp = 3 * layers[0] * layers[1] * layers[2]  # most of them, a byte each
    assert mlp < both["decoder_layers"] - one["decoder_layers"] < 1.3 * mlp


def test_two_engines_hold_the_decoder_twice(tmp_path):
    """What both pack: layers, and the head, which may be the table of embeddings."""

    def memory(head, compiler):
        def changed(data):
            data["decoder"] |= {"head": head, "compiler": compiler}
            data["memory_gib"] = 10

        return load_recipe(written(tmp_path, changed, "cpu-int4-mixed")).memory()

    for head in ("int4", "compute"):
        mixed, one = (memory(head, compiler) for compiler in ("onnxruntime-openvino", "onnxruntime"))
        twice = ("decoder_layers", "head") if head == "int4" else ("decoder_layers", "embedding")
        more = {part: 2 * one[part] for part in twice}
        assert mixed == one | more | {part: mixed[part] for part in ("activations", "total")}
        scores = mixed["activations"] - one["activations"]
        assert mixed["total"] - one["total"] == sum(one[part] for part in twice) + scores


def test_attention_by_products_holds_scores_and_a_copy_of_the_cache():
    split, fused = (load_recipe(f"cpu-int4{name}").memory() for name in ("-openvino", ""))
    more = split["activations"] - fused["activations"]
    assert more > split["kv_cache"] // load_recipe("cpu-int4-openvino").slots
    assert more > TEXT_3B["num_attention_heads"] * 512 * 4096 * 4 * 2


def test_the_head_is_packed_by_both_graphs_of_int4_and_int8():
    both, one = (load_recipe(name).memory() for name in ("cpu-int4-int8", "cpu-int4-vnni"))
    assert both["head"] == 2 * one["head"] and both["decoder_layers"] == 3 * one["decoder_layers"]


def test_a_file_of_the_users_own_works(tmp_path):
    recipe = load_recipe(written(tmp_path, lambda data: data.update(slots=3, name="mine")))
    assert (recipe.name, recipe.slots) == ("mine", 3)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d.update(slot=4), r"unknown key 'slot'.*'slots'"),
        (lambda d: d["decoder"].update(precison="fp8"), r"'precison' in own\.yaml\.decoder.*'precision'"),
        (lambda d: d.pop("slots"), r"slots: is missing"),
        (lambda d: d.update(slots="4"), r"slots: is '4' \(str\)"),
        (lambda d: d.update(slots=True), r"slots: is True \(bool\)"),
        (lambda d: d.update(slots=0), r"slots: 0 is outside"),
        (lambda d: d.update(memory_gib=float("nan")), r"memory_gib"),
        (lambda d: d["decoder"].update(compiler="tensorrt_rtx"), r"compiler: 'tensorrt_rtx' is none of"),
        (lambda d: d["vision"].update(precision="fp16"), r"vision\.precision: fp16 is not decoder\.compute bf16"),
        (lambda d: d["decoder"].update(kv="fp8"), r"decoder\.kv: fp8"),
        (lambda d: d["decoder"].update(precision="bf16"), r"bf16 weights compute in bf16 with head int4"),
        (lambda d: d.update(compute_capability="9.0"), r"tensorrt-rtx builds for .*8\.9.*use tensorrt"),
        (lambda d: d.update(compute_capability=8.9), r"compute_capability: is 8\.9 \(float\), expected str"),
        (lambda d: d.update(compute_capability="7.5"), r"7\.5 has no bf16"),
        (lambda d: (d.update(compute_capability="8.6"), d["decoder"].update(precision="fp8")), r"8\.6 has no fp8"),
        (lambda d: d.update(gpu=None), r"needs both"),
        (lambda d: d["thresholds"].update(label_iuo=0.9), r"'label_iuo'.*'label_iou'"),
        (lambda d: d.update(thresholds={"kl": "small"}), r"thresholds\.kl"),
        (lambda d: d.update(name="My recipe"), r"name: 'My recipe'"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(tmp_path, change, words):
    with pytest.raises(InvalidRecipe, match=words):
        load_recipe(written(tmp_path, change))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda d: d["vision"].update(compiler="tensorrt-rtx"),
            r"vision\.compiler: tensorrt-rtx beside a tensorrt-llm",
        ),
        (lambda d: d["vision"].update(compiler="tensorrt-llm"), r"compiler: 'tensorrt-llm' is none of"),
        (lambda d: d.pop("container"), r"container: None is not known.*26\.07-trtllm-python-py3"),
        (lambda d: d.update(container="nvcr.io/nvidia/tritonserver:26.08-trtllm-python-py3"), r"26\.08.*not known"),
        (lambda d: d["decoder"].update(head="fp8"), r"compute bf16 with head fp8"),
        (lambda d: d["decoder"].update(precision="int4"), r"int4 would be rounded by trtllm-build"),
        (lambda d: d["decoder"].update(precision="int4-awq", kv="fp8"), r"decoder\.kv: fp8 with int4-awq weights"),
        (lambda d: d["decoder"].update(kv_share=0.015), r"kv_share: 0\.015 leaves 3932 tokens.*4096.*0\.0156"),
        (lambda d: d["decoder"].update(kv_share=1.5), r"kv_share: 1\.5 is outside"),
        (lambda d: d["decoder"].update(compiler="tensorrt", kv_share=0.5), r"tensorrt has no paged KV cache"),
    ],
)
def test_what_tensorrt_llm_does_not_take_is_named(tmp_path, change, words):
    with pytest.raises(InvalidRecipe, match=words):
        load_recipe(written(tmp_path, change, "h100-fp8-trtllm"))


def test_a_share_of_the_paged_cache_and_fp8_in_it_save_memory(tmp_path):
    whole = load_recipe("h100-fp8-trtllm")
    halved = load_recipe(written(tmp_path, lambda d: d["decoder"].update(kv_share=0.25, kv="fp8"), "h100-fp8-trtllm"))
    assert (whole.kv_tokens, halved.kv_tokens) == (64 * 4096, 16 * 4096)
    assert whole.memory()["kv_cache"] == 36_864 * 64 * 4096  # bytes a token, reference of TensorRT-LLM 1.6
    assert halved.memory()["kv_cache"] == 18_432 * 16 * 4096
    assert whole.memory()["total"] - halved.memory()["total"] == whole.memory()["kv_cache"] * 7 // 8


def test_tensorrt_llm_keeps_image_rows_and_rotary_tables_of_every_stream():
    memory = load_recipe("h100-fp8-trtllm").memory()
    assert memory["prompt_tables"] == 64 * (4 * 333 * 2048 * 2 + 4096 * 128 * 4)  # CheXOne's four images
    assert load_recipe("h100-fp8").memory()["prompt_tables"] == 0


def test_a_cpu_computes_in_fp32_only(tmp_path):
    def to_bf16(data):
        data["vision"]["precision"] = data["decoder"]["compute"] = data["decoder"]["kv"] = "bf16"

    with pytest.raises(InvalidRecipe, match="on a CPU compute in fp32"):
        load_recipe(written(tmp_path, to_bf16, "cpu-int4"))


def set_to(part, **values):
    return lambda data: data[part].update(values)


def test_openvino_alone_may_run_the_vision_graph_in_bf16_beside_a_decoder_in_fp32(tmp_path):
    assert load_recipe("cpu-int4-openvino").vision.precision == "bf16"
    with pytest.raises(InvalidRecipe, match=r"vision\.precision: bf16 is not decoder\.compute fp32"):
        load_recipe(written(tmp_path, set_to("vision", precision="bf16"), "cpu-int4"))
    assert load_recipe(written(tmp_path, set_to("decoder", compiler="onnxruntime"), "cpu-int4-openvino"))
    with pytest.raises(InvalidRecipe, match="fp8 on openvino"):
        load_recipe(written(tmp_path, set_to("decoder", precision="fp8", head="compute"), "cpu-int4-openvino"))


def test_a_recipe_that_does_not_fit_its_card_names_what_takes_most(tmp_path):
    with pytest.raises(InvalidRecipe, match=r"GeForce RTX 4090 gives 23 GiB; kv_cache takes 36\.0 GiB: lower slots"):
        load_recipe(written(tmp_path, lambda data: data.update(slots=256)))


@pytest.mark.parametrize("text", ["", "- a", "a: [", "\0", "slots: 1"])
def test_a_file_that_is_no_recipe_is_an_error_and_nothing_worse(tmp_path, text):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InvalidRecipe, match=r"own\.yaml"):
        load_recipe(tmp_path / "own.yaml")


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(InvalidRecipe, match="did you mean 'h100-fp8'"):
        load_recipe("h100_fp8")
    with pytest.raises(InvalidRecipe, match="no recipe file"):
        load_recipe("nowhere/h100.yaml")


@pytest.mark.parametrize("scheme, head", [(None, "compute"), ("fp8", "fp8"), ("int4-awq", "int4")])
def test_computed_weights_are_those_of_the_graphs(tmp_path, scheme, head):
    """On a small model, whose norms and biases weigh more than the 3B's."""
    from cxr_triton.engines.tensorrt.compiler import weights_bytes
    from cxr_triton.export.checkpoint import Checkpoint
    from cxr_triton.export.decoder import write_decoder
    from cxr_triton.export.vision import write_vision
    from cxr_triton.perf.shape import write_shape

    onnx = pytest.importorskip("onnx")
    text = TEXT_3B | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "vocab_size": 4096}
    text |= {"num_attention_heads": 8, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
    vision = VISION_3B | {"hidden_size": 128, "num_heads": 4, "intermediate_size": 256, "depth": 2}
    vision |= {"out_hidden_size": 512, "fullatt_block_indexes": [1]}
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    folder = write_shape(tmp_path / "shape", tmp_path, scheme=scheme, text_values=text, vision_values=vision)
    checkpoint, precision = Checkpoint(folder), scheme or "bf16"
    graphs = (
        write_vision(checkpoint, tmp_path, precision=precision, compute="bf16", progress=False),
        write_decoder(checkpoint, tmp_path, precision=precision, compute="bf16", head=head, progress=False),
    )

    def retyped(data):
        data["decoder"].update(precision=precision, head=head)

    memory = load_recipe(written(tmp_path, retyped)).memory(text, vision)
    weights = [weights_bytes(onnx.load(graph, load_external_data=False)) for graph in graphs]
    assert memory["vision_tower"] == pytest.approx(weights[0], rel=0.02)
    assert sum(memory[part] for part in ("decoder_layers", "embedding", "head")) == pytest.approx(weights[1], rel=0.02)


def test_the_kv_cache_is_layers_times_heads_times_slots():
    memory = load_recipe("l4-int4").memory()
    assert memory["kv_cache"] == 36 * 2 * 2 * 128 * 2 * 4096 * 16


def test_the_verb_lists_recipes_with_their_memory():
    listed = CliRunner().invoke(main, ["recipes"])
    assert listed.exit_code == 0, listed.output
    assert all(name in listed.stdout for name in recipe_names())
    one = CliRunner().invoke(main, ["recipes", "h100-fp8", "--json", "-"])
    result = json.loads(one.stdout)
    assert result["compute_capability"] == "9.0" and result["memory"] == load_recipe("h100-fp8").memory()
    wrong = CliRunner().invoke(main, ["recipes", "h100-fp9"])
    assert wrong.exit_code == 1 and "[INVALID_RECIPE]" in wrong.stderr


def processor(*flags):
    return Cpu(model="Some CPU", flags=flags, cores=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "lacks", "name"),
    [
        ((), [], "cpu-int4"),
        (("avx2",), [], "cpu-int4"),
        (("avx_vnni",), [], "cpu-int4"),
        (("avx2", "avx512_vnni"), [], "cpu-int4-w4a8"),
        (("avx2", "avx512_vnni"), ["compiled"], "cpu-int4-int8"),
        (("avx512_vnni", "amx_int8", "amx_bf16"), [], "cpu-int4-int8"),
        (("avx512_vnni", "amx_int8"), ["openvino"], "cpu-int4-int8"),
        (("amx_bf16",), [], "cpu-int4"),
    ],
)
def test_a_processor_gets_the_recipe_that_was_the_fastest_on_its_kind(monkeypatch, flags, lacks, name):
    if "compiled" in lacks:
        monkeypatch.setattr(library, "path", lambda: None)
    if "openvino" in lacks:
        there = metadata.version

        def version(of):
            if of == "openvino":
                raise metadata.PackageNotFoundError(of)
            return there(of)

        monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(Cpu, "here", classmethod(lambda cls: processor(*flags)))
    assert load_recipe("cpu") == load_recipe(name)
    assert f"cpu is {name} on this processor" in CliRunner().invoke(main, ["recipes"]).stdout


def test_every_processor_gets_a_recipe_for_a_cpu():
    assert {choice.recipe for choice in choices()} <= set(recipe_names()) and not choices()[-1].has
    assert all(load_recipe(choice.recipe).gpu is None for choice in choices())
    assert len({load_recipe(choice.recipe).decoder.precision for choice in choices()}) == 1, (
        "one export for all of them"
    )
