"""Each vLLM recipe, from a quantized checkpoint to a bundle that its engine would open: no GPU is needed for that."""

import json

import pytest
from bundles import write_tokenizer
from served import PROFILE, TEMPLATE

from cxr_triton.engines import engine
from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.recipe import TEXT_3B, VISION_3B, load_recipe, recipe_names
from cxr_triton.engines.vllm.options import arguments
from cxr_triton.export.export import export_checkpoint
from cxr_triton.perf.shape import write_shape
from cxr_triton.profile import load_profile

TEXT = TEXT_3B | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 640}
TEXT |= {"num_attention_heads": 4, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
VISION = VISION_3B | {"hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "depth": 2}
VISION |= {"out_hidden_size": 256, "fullatt_block_indexes": [1]}
ON_GPUS = sorted(name for name in recipe_names() if name.endswith("-vllm") and load_recipe(name).gpu)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Gives the export of a scheme, made once."""
    folder, made = tmp_path_factory.mktemp("exports"), {}
    (folder / "profile.yaml").write_text(PROFILE)
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    profile = load_profile(folder / "profile.yaml")

    def of(scheme):
        if scheme not in made:
            values = {"text_values": TEXT, "vision_values": VISION}
            checkpoint = write_shape(folder / f"{scheme}-checkpoint", folder / "tokenizer", scheme=scheme, **values)
            options = {"precision": scheme, "compute": "bf16", "form": "checkpoint"}
            export_checkpoint(str(checkpoint), folder / scheme, profile, accept_licence=True, progress=False, **options)
            made[scheme] = folder / scheme
        return made[scheme]

    return of


def test_there_is_one_for_each_card_that_was_asked_for():
    assert ON_GPUS == ["a100-int4-vllm", "h100-fp8-vllm", "h200-fp8-vllm", "l40s-fp8-vllm", "rtx4090-int4-vllm"]


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_recipe_becomes_a_bundle(tmp_path, exported, name):
    recipe = load_recipe(name)
    bundle = build_bundle(exported(recipe.decoder.precision), tmp_path / "bundle", recipe=recipe)
    opened = Bundle.open(bundle.path)
    assert opened.manifest["recipe"]["name"] == name and (opened.path / "vision.onnx").is_file()
    asked = arguments(opened, recipe.slots, {})
    assert asked["dtype"] == "bfloat16" and asked["max_num_seqs"] == recipe.slots and not asked["enforce_eager"]
    config = json.loads((opened.path / "vllm" / "config.json").read_text())
    if recipe.decoder.precision == "fp8":
        assert (opened.path / "vllm" / "hf_quant_config.json").is_file()
    else:
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    parts = recipe.memory(TEXT, VISION)
    computed = parts["decoder_layers"] + parts["embedding"]
    assert engine(opened.engine).run_bytes(opened, "decoder") == pytest.approx(computed, rel=0.05)
