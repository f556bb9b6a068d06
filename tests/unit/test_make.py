"""`make test` over a stand-in of Python, which notes how it is called."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = r"""#!/bin/sh
case "$*" in *pytest*) ;; *) exit 0 ;; esac
printf '%s\t' "$@" >> calls; echo >> calls
exit {status}
"""


@pytest.fixture
def made(tmp_path):
    def run(status: int, options: str = ""):
        """How `make test` ended, and how pytest was called."""
        binaries = tmp_path / "venv" / "bin"
        binaries.mkdir(parents=True)
        for name in ("python", "ruff"):
            (binaries / name).write_text(PYTHON.format(status=status))
            (binaries / name).chmod(0o755)
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        (tmp_path / "vllm").mkdir()
        for there in ("venv/.test", "vllm/.installed"):
            (tmp_path / there).touch()
        given = ["VENV=venv", "VLLM=vllm", "AXE=venv/.test", "DEBIAN_PACKAGES=", f"PYTEST_OPTIONS={options}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        ended = subprocess.run(
            ["make", "test", *given], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        return ended, [line.split("\t")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]

    return run


@pytest.mark.parametrize("status", [0, 1, 5])
def test_it_ends_as_the_tests_do_which_are_all_and_get_the_options(made, status):
    options = "-m 'not quick' -k \"serve or read\""
    ended, (call,) = made(status, options)
    assert (ended.returncode == 0) == (status == 0), ended.stderr
    asked = shlex.split(options)
    assert call[-len(asked) :] == asked and "-n" in call
    assert not any(word.startswith(("--ignore", "--deselect", "tests")) for word in call)


@pytest.mark.parametrize("status", [0, 1])
def test_vllm_is_installed_though_what_drafts_by_suffixes_need_is_not_built(tmp_path, status):
    script = tmp_path / "deploy" / "vllm-cpu.sh"
    script.parent.mkdir()
    script.write_text(
        '#!/bin/sh\nmkdir -p "$1/bin"; ln -sf /bin/true "$1/bin/python"; echo "$1 $SUFFIX" >> calls; '
        f'[ -z "$SUFFIX" ] || exit {status}\n'
    )
    script.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for _ in range(2):  # the second finds it done
        made = subprocess.run(
            ["make", "vllm", "VLLM=here"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert made.returncode == 0, made.stderr
        assert (tmp_path / "here/.installed").exists()
        again = ["here "] if status else []  # it has to import still
        assert (tmp_path / "calls").read_text().splitlines() == ["here ", "here 1", *again]
    script.write_text("#!/bin/sh\nexit 1\n")
    again = subprocess.run(
        ["make", "vllm", "VLLM=other"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 0 and "could not install: vLLM" in again.stdout
    assert not (tmp_path / "other/.installed").exists()


@pytest.mark.slow
def test_what_a_file_wrote_is_gone_before_the_next_unless_its_test_failed(tmp_path):
    """Engines of all files together fill a small disk."""
    (tmp_path / "test_first.py").write_text(
        "import pytest\n"
        "@pytest.fixture(scope='module')\n"
        "def engine(tmp_path_factory):\n"
        "    folder = tmp_path_factory.mktemp('engine')\n"
        "    (folder / 'weights').touch()\n"
        "    return folder\n"
        "def test_passes(engine, tmp_path): (tmp_path / 'passed').touch()\n"
        "def test_fails(engine, tmp_path, lasting):\n"
        "    (tmp_path / 'failed').touch()\n"
        "    (lasting / 'kept').touch()\n"
        "    assert False\n"
    )
    (tmp_path / "test_second.py").write_text(
        "def test_finds(tmp_path_factory):\n"
        "    base = tmp_path_factory.getbasetemp()\n"
        "    found = {path.name for path in base.rglob('*') if path.is_file()}\n"
        "    assert found == {'failed', 'kept'}, found\n"
    )
    files, base = [str(path) for path in sorted(tmp_path.iterdir())], tmp_path / "base"
    options = ["-p", "conftest", "-c", str(ROOT / "pyproject.toml"), "--basetemp", str(base)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "1 failed, 2 passed" in ended.stdout, ended.stdout + ended.stderr
