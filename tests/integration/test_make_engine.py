"""`cxr-triton make-engine` on the demonstration model: killed at every stage, it goes on where it was."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_triton import phantom

pytest.importorskip("modelopt")

PHANTOM = Path(__file__).resolve().parent.parent / "phantom"
STAGES = ("quantized", "export", "bundle", "verification", "repository")
# This is about going on, not about accuracy: eight phantoms decide nothing.
RECIPE = """
name: resumed
memory_gib: 16
vision: {compiler: onnxruntime, precision: fp32}
decoder: {compiler: onnxruntime, precision: fp8, compute: fp32, head: compute, kv: fp32}
slots: 2
max_sequence: 1024
image_budget: 1
thresholds:
  {label_iou: 0.3, label_flips: 1, kl: 5, top1_agreement: 0.5, control_iou: 0.3, control_reaction: 1, reward_drop: 1,
   length_drift: 1, prose_f1: 0.1}
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    arguments = ["make-engine", PHANTOM / "checkpoint", "--profile", PHANTOM / "profile.yaml", "--recipe", recipe]
    arguments += ["--verify-images", phantoms(tmp_path / "images", 8), "--limit", 16]
    arguments += ["-o", out, "--json", tmp_path / "made.json"]
    for i, stage in enumerate(STAGES):
        process = run(arguments)
        lines = []
        for line in process.stderr:
            lines.append(line.strip())
            if line.startswith(f"{stage}: started"):
                process.send_signal(signal.SIGKILL)
                break
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, lines
        assert [line for line in lines if line.endswith(": as it was")] == [
            f"{s}: as it was" for s in STAGES[: max(i - 1, 0)]
        ]
        assert not (out / stage).exists(), "a stage that was killed left a folder under its name"
    made = finished(arguments, tmp_path / "made.json")
    assert [stage["stage"] for stage in made["stages"] if stage["cached"]] == list(STAGES[:-1])
    assert (out / "repository/cxr_reader/config.pbtxt").exists() and not list(out.glob(".*.*/"))
    again = finished(arguments, tmp_path / "made.json")
    assert all(stage["cached"] for stage in again["stages"]) and again["digest"] == made["digest"]
    assert again["seconds"] < 10

    recipe.write_text(RECIPE.replace("label_iou: 0.3", "label_iou: 1.01"))
    refused = run(arguments)
    _, errors = refused.communicate(timeout=600)
    assert refused.returncode == 1 and "NOT_VERIFIED" in errors and "verification.html" in errors
    assert "export: as it was" in errors
    assert not (out / "repository").exists(), "what was packaged before is not what the recipe asks for"


def phantoms(folder, count):
    folder.mkdir()
    random = np.random.default_rng(11)
    for i in range(count):
        Image.fromarray(phantom.draw(random).picture("mimic_jpg", phantom.PHOTOMETRICS[i % 2])).save(
            folder / f"{i}.png"
        )
    return folder


def run(arguments):
    code = "from cxr_triton.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(arguments, path):
    process = run(arguments)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return json.loads(path.read_text())
