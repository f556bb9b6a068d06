"""The distribution: one import package, no generic top-level name, a light domain."""

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "tests" / "phantom" / "checkpoint"
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


README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
BY_NEWEST_PIP = ("cuda", "export", "quantize", "test")  # an older one downloads their gigabytes
WITHOUT_SERVER = ("client", "objects", "gateway", "openai", "serve", "trace")
WITH_SERVER = ("3.11", "3.12")
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
RESOLVE_S = 400
"""A hang, such as a numpy that is compiled, and not slowness, ends here."""


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


@pytest.mark.slow
def test_wheel_installs_one_import_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"cxr_triton"}


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_folders_and_the_demonstration_model(wheel):
    names = set(wheel.namelist())
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
        listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, check=True, capture_output=True, text=True)
        tracked = {path for path in listed.stdout.split() if (ROOT / path).is_file()}
        assert {package.replace(".", "/") + path.removeprefix(folder) for path in tracked} <= names
    assert {"cxr_triton/triton_repo/phantom/profile.yaml"} <= names
    assert "cxr_triton/engines/onnxruntime_w4a8/products.abi3.so" in names, "compiled"
    assert {f"cxr_triton/triton_repo/phantom/checkpoint/{path.name}" for path in CHECKPOINT.iterdir()} <= names


def test_git_ignores_what_the_documents_commands_write_and_no_source():
    guides = [README, *(path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md"))]
    typed = "\n".join(re.findall(r"^    .*$", "\n".join(guides), re.MULTILINE))
    written = set(re.findall(r"(?:-o|--html|--json|>) ([\w.-]+/?)(?=\s|$)", typed))
    written = {name for name in written if not name.isupper()}  # OUT is for the reader to fill in
    assert {"graphs/", "engine/", "reading.json", "gateway.yaml"} <= written
    asked = subprocess.run(["git", "check-ignore", *written], cwd=ROOT, check=False, capture_output=True, text=True)
    assert set(asked.stdout.split()) == written
    ignored = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert not subprocess.run(ignored, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", ["profile", "request", "reading", "errors", "cli"])
def test_domain_imports_nothing_heavy(module):
    code = f"import sys, cxr_triton.{module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []


@functools.cache
def python_of(version: str) -> str | None:
    """A Python of that version here, in the path or under pyenv; None without one."""
    if version == HERE:
        return sys.executable
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    return str(installed[-1]) if installed else shutil.which(f"python{version}")


@pytest.fixture(scope="module")
def pip_of(tmp_path_factory):
    """pip of a new environment: the one that comes with a Python, or the newest, which need not download to resolve."""

    @functools.cache
    def pip(version: str, newest: bool) -> list[str]:
        if python_of(version) is None:
            pytest.skip(f"no Python {version} here")
        folder = tmp_path_factory.mktemp("venv")
        subprocess.run([python_of(version), "-m", "venv", str(folder)], check=True)
        command = [str(folder / "bin" / "python"), "-m", "pip"]
        tried = subprocess.run(
            [
                *command,
                "--retries",
                "1",
                "--timeout",
                "15",
                "install",
                *(["--upgrade", "pip"] if newest else ["click"]),
            ],
            capture_output=True,
            text=True,
        )
        if tried.returncode:
            pytest.skip(f"the package index cannot be reached: {tried.stderr.strip().splitlines()[-1]}")
        return command

    return pip


def resolved(pip: list[str], wheel: zipfile.ZipFile, extra: str, *options: str) -> dict[str, str]:
    """Version of each distribution that `pip install WHEEL[extra]` would install."""
    command = [*pip, "install", "--dry-run", "--ignore-installed", *options, f"{wheel.filename}[{extra}]"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=RESOLVE_S)
    if "special placeholder package which downloads a real wheel" in out.stdout + out.stderr:
        pytest.skip("NVIDIA's own index, which holds TensorRT's libraries, cannot be reached")
    assert out.returncode == 0, out.stderr[-2000:]
    (line,) = re.findall(r"^Would install (.*)", out.stdout, re.MULTILINE)
    return dict(item.lower().replace("_", "-").rsplit("-", 1) for item in line.split())


def check(version: str, extra: str, wheel, pip_of) -> None:
    """By the pip that came with the Python, or by the newest."""
    newest = extra in BY_NEWEST_PIP
    found = resolved(pip_of(version, newest), wheel, extra, *["--use-feature=fast-deps"] * newest)
    if extra not in WITHOUT_SERVER:
        assert (found.get("nvidia-pytriton") == "0.7.0") == (version in WITH_SERVER)
        assert found["numpy"].startswith("1.") == (version in WITH_SERVER)
    if extra == "quantize":
        assert "requests" in found


def some(cases, often):
    """All cases where CXR_TRITON_RESOLVE=all; resolving takes half a minute each."""
    everything = os.environ.get("CXR_TRITON_RESOLVE") == "all"
    skipped = pytest.mark.skipif(not everything, reason="set CXR_TRITON_RESOLVE=all")
    return [case if case in often else pytest.param(*case, marks=skipped) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("extra",), some([(extra,) for extra in EXTRAS], [(e,) for e in ("test", "quantize", "cuda")]))
def test_pip_resolves_every_extra(wheel, pip_of, extra):
    check(HERE, extra, wheel, pip_of)


OTHERS = itertools.product(sorted({"3.11", "3.12", "3.13"} - {HERE}), ["local", "openvino", "perf", "quantize", "test"])


@pytest.mark.slow
@pytest.mark.parametrize(("version", "extra"), some(OTHERS, (("3.12", "perf"), ("3.13", "local"))))
def test_pip_resolves_on_the_other_pythons(wheel, pip_of, version, extra):
    check(version, extra, wheel, pip_of)


def test_a_jinja2_whose_sandbox_leaks_is_not_let_in():
    """CVE-2025-27516: up to 3.1.5 a template reaches Python by ``|attr('format')``."""
    (jinja2,) = (r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "jinja2")
    assert jinja2.specifier.contains("3.1.6") and not jinja2.specifier.contains("3.1.5")
