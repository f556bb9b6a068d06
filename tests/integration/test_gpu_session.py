"""The GPU session's dry run on a CPU with a small model; loads that travel in pieces.

Steps parity and stack of the dry run take a minute more; docs/gpu-session.md has the command for all of them.
"""

import hashlib
import json
import sys

import numpy as np
import pytest
import qwen
from click.testing import CliRunner

from cxr_triton.perf import gpu_session


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return qwen.write_chat_files(tmp_path_factory.mktemp("qwen"))


def test_a_dry_run_finds_an_engine_that_agrees_and_measures_it(tokenizer, tmp_path):
    out = tmp_path / "out"
    command = ["run", str(out), "--tokenizer", str(tokenizer), "--dry-run", "--limit-s", "300", "--json", "-"]
    done = CliRunner().invoke(gpu_session.main, [*command, "--step", "runtime", "--step", "speed"])
    result = json.loads(done.stdout)
    assert {step: told["status"] for step, told in result["steps"].items()} == {"runtime": "done", "speed": "done"}
    assert done.exit_code == 0 and result == json.loads((out / "session.json").read_text())
    rows = {step: told["rows"] for step, told in result["steps"].items()}
    (runtime,) = rows["runtime"]
    assert runtime["agrees"] and runtime["logits_cosine"] > 0.9999
    told = {(row["what"], row.get("precision"), row.get("streams")): row for row in rows["speed"]}
    for precision in ("fp32", "int4"):
        for streams in (1, 2):
            step = told["decode step", precision, streams]
            assert step["tokens_per_s"] == pytest.approx(streams / step["seconds"]) and step["share"] > 0
    assert told["vision", "fp32", None]["images"] == 1 and told["prefill", "int4", None]["tokens"] == 350
    assert told["transformers eager", "bf16", None]["tokens_per_s"] > 0
    page = (out / "session.md").read_text()
    assert "Dry run" in page and "no GPU" in page and "| decode step |" in page


def test_a_step_that_takes_too_long_is_stopped_and_one_that_fails_says_so(tokenizer, tmp_path):
    common = ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--tokenizer", str(tokenizer), "--dry-run"]
    # A Python that imports anything takes longer than this.
    assert gpu_session._child("runtime", common, 0.01) == "stopped after 0 s"
    assert gpu_session._child("parity", common, 300) == "ended with 1"  # nothing was chosen to compare


def test_what_is_missing_is_said_before_anything_runs(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    command = ["run", str(tmp_path), "--tokenizer", str(tokenizer), "--dry-run", "--step", "parity", "--json", "-"]
    done = CliRunner().invoke(gpu_session.main, command)
    status = json.loads(done.stdout)["steps"]["parity"]["status"]
    assert done.exit_code == 3 and status.startswith("not run: imagecodecs (ModuleNotFoundError")
    listed = json.loads(CliRunner().invoke(gpu_session.main, ["parts", "--json", "-"]).stdout)["parts"]
    parts = {part["part"]: part for part in listed}
    assert parts["imagecodecs"]["present"] is None and parts["onnx"]["present"]


def test_a_row_is_kept_even_where_the_step_fails(tokenizer, tmp_path):
    session = gpu_session.Session(tmp_path / "out", tmp_path / "work", tokenizer, None, True)
    with session.noting("runtime", engine="x") as row:
        row["found"] = 1
        raise ValueError("the exact message")
    (kept,) = session.rows("runtime")
    assert kept["error"] == "ValueError: the exact message" and kept["found"] == 1 and not kept["ok"]


def test_files_travel_in_pieces_and_are_checked(tmp_path):
    rng, sent = np.random.default_rng(0), {}
    for name, size in (("a.whl", 2_500_000), ("b.whl", 1_200_000), ("c.whl", 10)):
        sent[name] = rng.bytes(size)
        (tmp_path / name).write_bytes(sent[name])
    files = [str(tmp_path / name) for name in sent]
    packed = CliRunner().invoke(gpu_session.main, ["pack", *files, "-o", str(tmp_path / "loads"), "--limit-mib", "1"])
    assert packed.exit_code == 0, packed.output
    loads = sorted((tmp_path / "loads").iterdir())
    assert len(loads) == 4
    for load in loads:
        assert sum(file.stat().st_size for file in load.iterdir() if file.name != "pieces.json") <= 1 << 20
    piece = next(file for file in loads[0].iterdir() if file.name != "pieces.json")
    whole = piece.read_bytes()
    piece.write_bytes(b"\0" * len(whole))
    there = tmp_path / "there"
    for load in reversed(loads):
        CliRunner().invoke(gpu_session.main, ["unpack", str(load), str(there)])
    assert not (there / "a.whl").exists() and (there / "b.whl").exists()  # a damaged piece is seen
    piece.write_bytes(whole)
    done = CliRunner().invoke(gpu_session.main, ["unpack", str(loads[0]), str(there)])
    assert "a.whl: complete" in done.output
    for name, data in sent.items():
        assert hashlib.sha256((there / name).read_bytes()).digest() == hashlib.sha256(data).digest()
