"""`make-engine --evaluate`: how right the engine is on labelled data decides whether it is packaged."""

import json
from pathlib import Path

import evaluate
import layouts
import pytest
import yaml
from click.testing import CliRunner

from cxr_triton.cli import main
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.verify.record import require_accurate, subject, write_record
from cxr_triton.errors import InvalidRequest, NotVerified
from cxr_triton.evaluate import rows
from cxr_triton.triton_repo.package import BUNDLE, Settings, write_repository

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"
RECIPE = """
name: judged
memory_gib: 16
vision: {compiler: onnxruntime, precision: fp32}
decoder: {compiler: onnxruntime, precision: fp32, compute: fp32, head: compute, kv: fp32}
slots: 2
max_sequence: 1024
image_budget: 1
"""


@pytest.mark.triton
def test_an_engine_that_is_not_right_enough_is_not_packaged(tmp_path):
    pytest.importorskip("pytriton")
    keys = layouts.write(tmp_path / "data", "nih", "png", evaluate.held_out(6))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"path": "data", **keys}))
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    command = ["make-engine", PHANTOM / "checkpoint", "--profile", PHANTOM / "profile.yaml", "--recipe", recipe]
    command += ["-o", out, "--unverified", "--evaluate", tmp_path / "data.yaml"]

    def made(accuracy, *more):
        recipe.write_text(f"{RECIPE}accuracy: {json.dumps(accuracy)}\n" if accuracy else RECIPE)
        return CliRunner().invoke(main, [*map(str, command), *map(str, more), "--json", str(tmp_path / "made.json")])

    nothing = made({})
    assert nothing.exit_code == 1 and "has no limit of accuracy" in nothing.stderr and not out.exists()

    right = made({"exact_match": 0.5})
    assert right.exit_code == 0, right.output
    told = json.loads((tmp_path / "made.json").read_text())
    assert [stage["stage"] for stage in told["stages"]] == ["export", "bundle", "trial", "accuracy", "repository"]
    assert told["accuracy"]["passed"] and told["accuracy"]["data"]["studies"] == 6
    kept = require_accurate(Bundle.open(out / "repository" / BUNDLE))
    assert kept and kept["checks"][0]["name"] == "exact_match" and kept["engine"] == "onnxruntime"
    (result,) = (out / "evaluation").glob("*.jsonl")
    assert len(rows.read(result)) == 6

    wrong = made({"exact_match": 1.01}, "--against", result)
    assert wrong.exit_code == 1 and "NOT_VERIFIED" in wrong.stderr and "least 1.01" in wrong.stderr
    assert not (out / "repository").exists()
    bundle = Bundle.open(out / "bundle")
    with pytest.raises(NotVerified, match="not right enough on labelled data: exact_match"):
        require_accurate(bundle)
    with pytest.raises(InvalidRequest, match="not about the bundle"):
        write_record(bundle, {"subject": "another"}, "accuracy")
    write_record(bundle, {"subject": subject(bundle.manifest), "passed": False, "verdict": "worse"}, "accuracy")
    with pytest.raises(NotVerified, match="worse than the engine"):
        require_accurate(Bundle.open(out / "bundle"))
    write_repository(out / "bundle", tmp_path / "anyway", Settings(), unverified=True)
    assert (tmp_path / "anyway" / "cxr_reader" / "1" / "VERIFICATION").read_text().startswith("unverified")
