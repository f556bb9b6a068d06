"""The house: one table lists the engines, each says all of itself in its own room, and nothing else names one."""

import io
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
PRODUCT = ("cxr_triton", "export", "engines", "triton_repo", "client", "perf")
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
    assert isinstance(each, CpuEngine | GpuEngine)
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
            asked = {re.split(r"[\[<>=;! ]", requirement)[0] for requirement in extras[each.extra]}
            assert set(each.distributions) <= asked, name


def test_the_table_and_the_recipes_agree():
    recipes = [load_recipe(name) for name in recipe_names()]
    assert {recipe.decoder.compiler for recipe in recipes} <= set(engine_names())
    assert {recipe.vision.compiler for recipe in recipes} <= set(engine_names("vision"))
    for recipe in recipes:
        decoder = engine(recipe.decoder.compiler)
        assert recipe.decoder.compute in decoder.types("decoder")
        assert (recipe.gpu is None) == isinstance(decoder, CpuEngine)
        assert not decoder.in_container or recipe.container


def test_only_the_default_needs_no_recipe_and_it_stands_in_for_the_others():
    assert [name for name in ROOMS if not engine(name).needs_recipe] == [DEFAULT]
    assert engine(DEFAULT).graphs == ("vision", "decoder") and engine(DEFAULT).form == "onnx"


def test_an_unknown_engine_names_the_nearest_and_an_ability_those_that_have_it():
    with pytest.raises(InvalidRequest, match="did you mean 'tensorrt-rtx'"):
        engine("tensorrt_rtx")
    require_ability("onnxruntime", "batch_invariant")
    with pytest.raises(InvalidRequest, match="prefix reuse was asked for, openvino has none; use tensorrt-llm"):
        require_ability("openvino", "prefix_reuse")


def test_the_table_imports_no_engines_library():
    libraries = ("onnxruntime", "onnx", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "ml_dtypes", "numpy", "grpc")
    code = (
        "import sys; from cxr_triton.engines import ROOMS, engine; [engine(name) for name in ROOMS]; "
        f"print(*[name for name in {libraries} if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.split() == []
