"""The house: one table lists the engines, each says all of itself in its own room, and nothing else names one."""

import io
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from cxr_triton.engines import DEFAULT, ROOMS, engine, engine_names, require_ability
from cxr_triton.engines.interface import ABILITIES, CpuEngine, Engine, GpuEngine
from cxr_triton.engines.recipe import load_recipe, recipe_names
from cxr_triton.errors import InvalidRequest
from cxr_triton.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("cxr_triton", "export", "engines", "triton_repo", "client", "evaluate", "archive", "perf", "doctor")
NAMED = re.compile(r"(?i)\b(onnxruntime|openvino|tensorrt(?:[-_]?(?:rtx|llm))?|vllm)\b")
MAY_NAME = {
    "engines/__init__.py": "the table",
    "export/forms.py": "the table of forms, one of which an engine takes",
    "perf/peers/": "other people's software, a module each",
    "perf/gpu_session/": "what travels to a GPU machine, and what is measured there",
}


def named_in(path: Path) -> set[str]:
    """Engines that a file names, in code and docstrings but not in comments, less those whose room it lies in."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
    text = " ".join(token.string for token in tokens if token.type != tokenize.COMMENT)
    place = str(path.relative_to(ROOT)).replace("_", "").replace("-", "")
    names = {name.lower().replace("_", "-") for name in NAMED.findall(text)}
    return {name for name in names if name.replace("-", "") not in place}


def test_no_two_test_files_have_one_name():
    """pytest imports them by it: the second would end a run of all of them."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_http_is_listened_to_in_one_place():
    """aiohttp bounds no connections; `client/listener.py` does."""
    files = (path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py"))
    listening = {
        str(path.relative_to(ROOT))
        for path in files
        if re.search(r"\b(AppRunner|TCPSite|run_app|create_server)\(", path.read_text("utf-8"))
    }
    assert listening == {"client/listener.py"}


def test_an_engine_is_named_in_its_room_only():
    files = [path for folder in PRODUCT for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    naming = {str(path.relative_to(ROOT)): names for path in files if (names := named_in(path))}
    strangers = {path: names for path, names in naming.items() if not path.startswith(tuple(MAY_NAME))}
    assert strangers == {}
    assert [place for place in MAY_NAME if not any(path.startswith(place) for path in naming)] == []


def test_a_name_is_found_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for text in ('x = "openvino"', "import onnxruntime", '"""Of TensorRT-LLM."""', "f'vllm {x}'", "tensorrt_rtx = 1"):
        (tmp_path / "file.py").write_text(text)
        assert named_in(tmp_path / "file.py"), text
    (tmp_path / "file.py").write_text("x = 1  # as openvino")
    assert not named_in(tmp_path / "file.py")
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "file.py").write_text("import openvino")
    assert not named_in(tmp_path / "openvino" / "file.py")


@pytest.mark.parametrize("name", ROOMS)
def test_every_row_of_the_table_is_a_whole_engine(name):
    each = engine(name)
    assert isinstance(each, Engine) and each.name == name and ROOMS[name].endswith(name.replace("-", "_"))
    assert "decoder" in each.graphs and set(each.graphs) <= {"vision", "decoder"}
    assert each.computes and set(each.abilities) <= set(ABILITIES)
    for graph in each.graphs:
        assert each.files(graph) and each.types(graph)
        assert all(file.startswith((f"{graph}.", f"{each.folder}/")) for file in each.files(graph))
    own = type(each)
    builds = own.compile is not Engine.compile or own.prepare is not Engine.prepare
    runs = own.open_decoder is not Engine.open_decoder or own.open_runtime is not Engine.open_runtime
    assert builds and runs and ("vision" not in each.graphs or own.open_vision is not Engine.open_vision)
    assert bool(each.products) == (own.product is not Engine.product)
    assert bool(each.backends) == bool(each.home)
    assert each.in_container == (own.commands is not Engine.commands)
    assert each.in_container or each.extra in EXTRAS


def test_the_packages_of_an_engine_are_those_of_its_extra():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ROOMS:
        each = engine(name)
        if not each.in_container:
            takes = [each.extra, *EXTRAS[each.extra].get("takes", ())]
            asked = {re.split(r"[\[<>=;! ]", requirement)[0] for extra in takes for requirement in extras[extra]}
            assert set(each.distributions) <= asked, name


def test_the_table_and_the_recipes_agree():
    recipes = [load_recipe(name) for name in recipe_names()]
    assert {recipe.decoder.compiler for recipe in recipes} <= set(engine_names())
    assert {recipe.vision.compiler for recipe in recipes} <= set(engine_names("vision"))
    for recipe in recipes:
        decoder = engine(recipe.decoder.compiler)
        assert recipe.decoder.compute in decoder.types("decoder")
        assert not isinstance(decoder, GpuEngine if recipe.gpu is None else CpuEngine)  # some run on both
        assert not decoder.in_container or recipe.container


def test_only_the_default_needs_no_recipe_and_it_stands_in_for_the_others():
    assert [name for name in ROOMS if not engine(name).needs_recipe] == [DEFAULT]
    assert engine(DEFAULT).graphs == ("vision", "decoder") and engine(DEFAULT).form == "onnx"


def test_an_unknown_engine_names_the_nearest_and_an_ability_those_that_have_it():
    with pytest.raises(InvalidRequest, match="did you mean 'tensorrt-rtx'"):
        engine("tensorrt_rtx")
    require_ability("onnxruntime", "batch_invariant")
    with pytest.raises(InvalidRequest, match="were asked for, openvino has none; use onnxruntime"):
        require_ability("openvino", "batch_invariant")
    for name in ROOMS:
        require_ability(name, "prefix_reuse")


def test_the_table_imports_no_engines_library():
    libraries = ("onnxruntime", "onnx", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "ml_dtypes", "numpy", "grpc")
    code = (
        "import sys; from cxr_triton.engines import ROOMS, engine; [engine(name) for name in ROOMS]; "
        f"print(*[name for name in {libraries} if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.split() == []


PAPER = """
import json, sys
from pathlib import Path
from cxr_triton.engines import ROOMS, engine
ROOMS["paper"] = "paper_engine"
from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.recipe import load_recipe
from cxr_triton.errors import CxrError
from cxr_triton.triton_repo.package import Settings, write_repository

export, folder = map(Path, sys.argv[1:])
recipe = load_recipe(folder / "paper.yaml")
bundle = build_bundle(export, folder / "bundle", recipe=recipe)
write_repository(bundle.path, folder / "repository", Settings(), unverified=True)
packaged = Bundle.open(folder / "repository" / "decoder" / "1" / "bundle")
runtime = engine(packaged.engine).open_runtime(packaged, {"slots": "9"}, "127.0.0.1:1")
said = {"engines": [bundle.vision_engine, bundle.engine], "versions": bundle.manifest["versions"]["paper"],
        "files": sorted(name for name in bundle.manifest["files"] if "/" in name), "shards": runtime.shards,
        "prompt_tables": recipe.memory()["prompt_tables"], "step": engine("paper").run_bytes(bundle, "decoder"),
        "config": (folder / "repository" / "decoder" / "config.pbtxt").read_text(), "refused": []}
for change in (lambda: (bundle.path / "paper" / "b.safetensors").write_bytes(b"changed!"),
               lambda: (bundle.path / "paper" / "more").write_bytes(b"")):
    change()
    try:
        Bundle.open(bundle.path)
    except CxrError as error:
        said["refused"].append(error.message)
print(json.dumps(said))
"""


def test_an_engine_of_another_kind_needs_nothing_but_its_room(tmp_path):
    """It opens a checkpoint itself, beside a tower of ours, and takes its own types, on a CPU here."""
    import yaml
    from bundles import write_export
    from checkpoints import random_checkpoint

    from cxr_triton.engines.recipe import RECIPES

    random_checkpoint(tmp_path / "checkpoint")
    export = write_export(tmp_path / "export", tmp_path / "checkpoint", precision="fp32")
    for name in ("decoder.onnx", "decoder.onnx.data"):
        (export / name).unlink()
    (export / "decoder").mkdir()
    for name, content in {"config.json": b"{}", "a.safetensors": b"weights", "b.safetensors": b"of paper"}.items():
        (export / "decoder" / name).write_bytes(content)
    exported = json.loads((export / "export.json").read_text())
    exported |= {"format": "checkpoint", "precision": "bf16", "head": "compute"}
    exported["geometry"]["compute"] = "fp32"
    (export / "export.json").write_text(json.dumps(exported))
    recipe = yaml.safe_load((RECIPES / "cpu-int4.yaml").read_text())
    recipe |= {"name": "paper", "memory_gib": 16, "thresholds": {"kl": 1.0}}
    recipe["decoder"] = {"compiler": "paper", "precision": "bf16", "compute": "fp32", "head": "compute", "kv": "bf16"}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(recipe))
    tests = str(ROOT / "tests")
    done = subprocess.run(
        [sys.executable, "-c", PAPER, str(export), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": tests},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["engines"], said["versions"]) == (["onnxruntime", "paper"], "1.0")
    assert said["files"] == ["paper/a.safetensors", "paper/b.safetensors", "paper/config.json"]
    assert (said["shards"], said["step"]) == (["a.safetensors", "b.safetensors"], 15)
    assert said["prompt_tables"] == 4 * 2048
    assert re.search(r'"sheets"\s+value \{\s+string_value: "2"', said["config"])
    assert "paper/b.safetensors" in said["refused"][0] and "paper/more" in said["refused"][1]
