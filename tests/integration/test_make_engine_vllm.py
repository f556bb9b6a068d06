"""`cxr-triton make-engine` with a vLLM recipe for a GPU, on a machine that has none: all but the engine's own run."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from test_make_engine import phantoms

from cxr_triton.cli import main
from cxr_triton.engines import recipe as recipes
from cxr_triton.engines.vllm.layout import INTERPRETER

pytest.importorskip("modelopt")

PHANTOM = Path(__file__).resolve().parent.parent / "phantom"
# This is about the way, not about accuracy: eight phantoms decide nothing.
LOOSE = {"label_iou": 0.3, "label_flips": 1, "kl": 5, "top1_agreement": 0.5, "control_iou": 0.3, "control_reaction": 1}
LOOSE |= {"reward_drop": 1, "length_drift": 1, "prose_f1": 0.1}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small take longer on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_gpus_recipe_is_quantized_built_judged_by_its_stand_in_and_packaged(tmp_path, monkeypatch):
    monkeypatch.setenv(INTERPRETER, str(tmp_path / "none"))  # whatever this machine has, its engine is not run
    recipe = yaml.safe_load((Path(recipes.__file__).parent / "recipes/a100-int4-vllm.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"thresholds": LOOSE, "max_sequence": 1024}))
    arguments = ["make-engine", PHANTOM / "checkpoint", "--profile", PHANTOM / "profile.yaml", "--limit", 16]
    arguments += ["--recipe", tmp_path / "recipe.yaml", "--verify-images", phantoms(tmp_path / "images", 8)]
    done = CliRunner().invoke(
        main, [*map(str, arguments), "-o", str(tmp_path / "out"), "--json", str(tmp_path / "json")]
    )
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "json").read_text())
    stages = ["quantized", "export", "bundle", "standin-export", "standin", "verification", "repository"]
    assert [stage["stage"] for stage in made["stages"]] == stages and made["verified"]
    bundle = tmp_path / "out/repository/decoder/1/bundle"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["engine"], manifest["precision"]) == ("vllm", "int4-awq")
    assert manifest["verification"]["runtime"]["engine"] == "onnxruntime"
    assert "vllm cannot be run here" in manifest["verification"]["runtime"]["said"]
    config = json.loads((bundle / "vllm/config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
