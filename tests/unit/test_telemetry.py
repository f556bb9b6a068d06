"""What a library would tell its maker: nothing, from any process of ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cxr_triton

ROOT = Path(__file__).resolve().parents[2]
SESSION = """
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto, helper
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
assert session.run(None, {"x": np.ones(1, np.float32)})[0] == 1
"""


def kept_after(home: Path, code: str) -> list[str]:
    """Names of the files that a process of a user without any leaves behind, outside a CI system."""
    known = {*cxr_triton.SILENT, "CI", "XDG_CACHE_HOME"}
    environment = {k: v for k, v in os.environ.items() if k not in known and not k.startswith(("GITHUB_", "TF_BUILD"))}
    subprocess.run(
        [sys.executable, "-c", code], env={**environment, "HOME": str(home)}, cwd=home, check=True, timeout=120
    )
    return [path.name for path in home.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_onnxruntime_makes_no_identifier_and_no_store_of_events(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "ours").mkdir()
    (tmp_path / "plain").mkdir()
    assert kept_after(tmp_path / "ours", "import cxr_triton" + SESSION) == []
    if not kept_after(tmp_path / "plain", SESSION):
        pytest.skip("this ONNX Runtime reports to nobody")


def test_what_a_user_said_stays(tmp_path):
    code = "import cxr_triton, os; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    environment = {name: value for name, value in os.environ.items() if name not in cxr_triton.SILENT}
    for said, printed in ({}, "1 0"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0 0"):
        run = [sys.executable, "-c", code]
        assert subprocess.check_output(run, env={**environment, **said}, text=True).strip() == printed


def test_containers_say_it_to_what_is_not_python():
    """Triton's own ONNX Runtime backend has no Python package to set it; Ray runs in none of these."""
    stage = (ROOT / "deploy/Dockerfile").read_text().split("\nFROM base AS", 1)[0]
    said = dict(re.findall(r"(\w+)=(\w+)", " ".join(re.findall(r"^ENV (.*)$", stage, re.MULTILINE))))
    assert {name: said.get(name) for name in cxr_triton.SILENT if "RAY" not in name} == {
        name: value for name, value in cxr_triton.SILENT.items() if "RAY" not in name
    }
