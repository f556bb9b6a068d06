"""The distribution: one import package, no generic top-level name, a light domain."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "tritonclient",
    "grpc",
    "imagecodecs",
    "pydicom",
    "tokenizers",
    "PIL",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    # Built from what git tracks, so that a forgotten file shows here and build leftovers do not.
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out), str(source)]
    subprocess.run(pip, check=True)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_installs_one_import_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"cxr_triton"}


def test_wheel_holds_the_profiles_the_recipes_and_the_served_models(wheel):
    names = set(wheel.namelist())
    assert {"cxr_triton/profiles/nv-reason-cxr-3b.yaml", "cxr_triton/profiles/chexone.yaml"} <= names
    assert {"cxr_triton/engines/recipes/h100-fp8.yaml", "cxr_triton/engines/recipes/cpu-int4.yaml"} <= names
    for model in ("dicom_preprocess", "vision_encoder", "decoder", "report"):
        assert f"cxr_triton/triton_repo/{model}/1/model.py" in names


@pytest.mark.parametrize("module", ["profile", "request", "reading", "errors", "cli"])
def test_domain_imports_nothing_heavy(module):
    code = f"import sys, cxr_triton.{module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []
