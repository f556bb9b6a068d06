"""The import contracts of pyproject.toml: planted wrong imports are seen, and no folder is left out."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tree import lay

ROOT = Path(__file__).resolve().parents[2]
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
FOLDERS = TOOL["setuptools"]["package-dir"]
CIRCLE = """
import graphlib, grimp
graph = grimp.build_graph("cxr_triton", cache_dir=None)
graphlib.TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()
"""
"""Unlike `acyclic_siblings` it counts what a folder's `__init__` imports."""


def house(folder: Path, planted: dict[str, str]) -> Path:
    """A copy of the source with lines added to files; the package tree laid out of it."""
    for name in FOLDERS.values():
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "phantom"))
    for path, line in planted.items():
        with (folder / path).open("a") as file:
            file.write(f"\n{line}\n")
    lay(folder, folder / "tree")
    return folder / "tree"


def run(tree: Path, *command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True, check=False)
    return " ".join((done.stdout + done.stderr).split())


def lint(tree: Path) -> str:
    main = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return run(tree, "-c", main, "--no-logo", "--no-cache", str(ROOT / "pyproject.toml"))


WRONG = {
    "cxr_triton/numbers.py": ("def late(): import cxr_triton.perf.load", "numbers -> cxr_triton.perf.load"),
    "export/graph.py": ("import cxr_triton.engines.rewrite", "export.graph -> cxr_triton.engines.rewrite"),
    "engines/rewrite.py": ("from cxr_triton.client import limits", "engines.rewrite -> cxr_triton.client.limits"),
    "triton_repo/adapter.py": ("import cxr_triton.perf.load", "triton_repo.adapter -> cxr_triton.perf.load"),
    "client/limits.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING: from cxr_triton.export.graph import GraphWriter",
        "client.limits -> cxr_triton.export.graph",
    ),
    "client/wire.py": ("import cxr_triton.engines.cuda", "client.wire -> cxr_triton.engines.cuda"),
    "engines/openvino/session.py": (
        "import cxr_triton.engines.tensorrt.session",
        "openvino.session -> cxr_triton.engines.tensorrt.session",
    ),
    "engines/tensorrt_llm/request.py": (
        "import cxr_triton.engines.openvino.session",
        "tensorrt_llm.request -> cxr_triton.engines.openvino.session",
    ),
    "perf/observer.py": ("import cxr_triton.doctor.check", "perf.observer -> cxr_triton.doctor.check"),
    "perf/summary.py": ("def late(): import cxr_triton.perf.stages", "No cycles are allowed in cxr_triton.perf."),
}
"""Imports that the drawing forbids, one of each kind, and what is said of each."""


def test_a_wrong_import_is_seen(tmp_path):
    said = lint(house(tmp_path / "as it is", {}))
    planted = lint(house(tmp_path / "planted", {path: line for path, (line, _) in WRONG.items()}))
    assert f"{len(TOOL['importlinter']['contracts'])} broken" in planted
    for _, words in WRONG.values():
        assert words in planted and words not in said


def test_no_file_is_in_a_circle_whatever_its_folder_s_init_imports(tmp_path):
    assert run(house(tmp_path / "as it is", {}), "-c", CIRCLE) == ""
    planted = {"perf/__init__.py": "import cxr_triton.perf.load", "perf/load.py": "import cxr_triton.perf"}
    assert "CycleError" in run(house(tmp_path / "planted", planted), "-c", CIRCLE)


def test_ruff_sees_a_name_with_an_underscore_of_another_folder(tmp_path):
    house(tmp_path, {"client/wire.py": "from cxr_triton.errors import _anything as anything"})
    said = run(
        tmp_path, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--select", "PLC2701", "client"
    )
    assert "`_anything` from external module `cxr_triton.errors` --> client/wire.py" in said


def private_names(folder: Path) -> list[str]:
    """Underscore names that files take from others, imported or as attributes; ruff leaves out those of one folder."""
    found = []
    for path in (path for name in FOLDERS.values() for path in (folder / name).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        ours = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("cxr_triton")]
        taken = {alias.name for node in ours for alias in node.names}
        bound = {alias.asname or alias.name for node in ours for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
                taken.add(node.attr)
        found += [f"{path.relative_to(folder)}: {name}" for name in sorted(taken) if re.match("_[^_]", name)]
    return found


def test_no_file_takes_a_name_with_an_underscore_from_another(tmp_path):
    assert not private_names(ROOT)
    (tmp_path / "cxr_triton").mkdir()
    (tmp_path / "cxr_triton" / "chat.py").write_text("from cxr_triton import reading\nreading._parse\n")
    assert private_names(tmp_path) == ["cxr_triton/chat.py: _parse"]


@pytest.mark.parametrize(("name", "folder"), FOLDERS.items())
def test_every_package_is_installed(name, folder):
    found = {path.parent.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("__init__.py")}
    names = {".".join([name, *path.parts]) for path in found}
    assert names <= set(TOOL["setuptools"]["packages"])


def test_every_room_of_an_engine_is_in_the_contract():
    contracts = TOOL["importlinter"]["contracts"]
    (layers,) = [c["layers"] for c in contracts if c.get("containers") == ["cxr_triton.engines"]]
    shared = {"runtime", "verify"}
    rooms = {path.parent.name for path in (ROOT / "engines").glob("*/__init__.py")} - shared
    assert rooms <= set(re.findall(r"\w+", " ".join(layers)))
