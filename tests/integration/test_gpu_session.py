"""The GPU session's dry run on a CPU with a small model; loads that travel in pieces.

Steps parity and stack of the dry run take minutes more; docs/gpu-session.md has the command for all of them.
"""

import hashlib
import json
import struct
import sys
import zipfile

import numpy as np
import pytest
import qwen
from click.testing import CliRunner

from cxr_triton.perf.gpu_session.command import main
from cxr_triton.perf.gpu_session.loads import keep_capability
from cxr_triton.perf.gpu_session.run import child
from cxr_triton.perf.gpu_session.session import Session


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return qwen.write_chat_files(tmp_path_factory.mktemp("qwen"))


def test_a_dry_run_finds_an_engine_that_agrees_and_measures_it(tokenizer, tmp_path):
    out = tmp_path / "out"
    command = ["run", str(out), "--tokenizer", str(tokenizer), "--dry-run", "--limit-s", "300", "--json", "-"]
    steps = [part for step in ("prepare", "providers", "speed") for part in ("--step", step)]
    done = CliRunner().invoke(main, [*command, *steps])
    result = json.loads(done.stdout)
    assert {told["status"] for told in result["steps"].values()} == {"done"} and len(result["steps"]) == 3
    assert done.exit_code == 0 and result == json.loads((out / "session.json").read_text())
    rows = {step: told["rows"] for step, told in result["steps"].items()}
    for row, least in zip(rows["providers"], (0.9999, 0.999), strict=True):
        assert row["engine"] == "onnxruntime-cuda" and row["agrees"] and row["logits_cosine"] > least
    told = {(row["what"], row.get("precision"), row.get("streams")): row for row in rows["speed"]}
    for precision in ("fp32", "int4"):
        for streams in (1, 8):
            step = told["decode step", precision, streams]
            assert step["tokens_per_s"] == pytest.approx(streams / step["seconds"]) and step["share"] > 0
    assert told["tower", "fp32", None]["images"] == 1 and told["prefill", "int4", None]["tokens"] == 350
    first = told["first token", "fp32", None]
    assert first["seconds"] == pytest.approx(first["tower_s"] + first["prefill_s"])
    assert told["transformers", "bf16", None]["version"]
    page = (out / "session.md").read_text()
    assert "Dry run" in page and "no GPU" in page and "| decode step |" in page


def test_a_step_that_takes_too_long_is_stopped(tokenizer, tmp_path):
    session = Session(tmp_path, tmp_path / "work", tokenizer, True)
    # A Python that imports anything takes longer than this.
    assert child("providers", session, 0.01) == "stopped after 0 s"


def test_what_is_missing_is_said_before_anything_runs(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    command = ["run", str(tmp_path), "--tokenizer", str(tokenizer), "--dry-run", "--step", "stack", "--json", "-"]
    done = CliRunner().invoke(main, command)
    status = json.loads(done.stdout)["steps"]["stack"]["status"]
    assert done.exit_code == 3 and status.startswith("not run: imagecodecs (ModuleNotFoundError")
    listed = json.loads(CliRunner().invoke(main, ["parts", "--json", "-"]).stdout)["parts"]
    parts = {part["part"]: part for part in listed}
    assert parts["imagecodecs"]["present"] is None and parts["onnx"]["present"]


def test_a_row_is_kept_even_where_the_step_fails(tokenizer, tmp_path):
    session = Session(tmp_path / "out", tmp_path / "work", tokenizer, True)
    with session.noting("providers", engine="x") as row:
        row["found"] = 1
        raise ValueError("the exact message")
    (kept,) = session.rows("providers")
    assert kept["error"] == "ValueError: the exact message" and kept["found"] == 1 and not kept["ok"]


def test_files_travel_in_pieces_and_are_checked(tmp_path):
    rng, sent = np.random.default_rng(0), {}
    for name, size in (("a.whl", 2_500_000), ("b.whl", 1_200_000), ("c.whl", 10)):
        sent[name] = rng.bytes(size)
        (tmp_path / name).write_bytes(sent[name])
    files = [str(tmp_path / name) for name in sent]
    packed = CliRunner().invoke(main, ["pack", *files, "-o", str(tmp_path / "loads"), "--limit-mib", "1"])
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
        CliRunner().invoke(main, ["unpack", str(load), str(there)])
    assert not (there / "a.whl").exists() and (there / "b.whl").exists()  # a damaged piece is seen
    piece.write_bytes(whole)
    done = CliRunner().invoke(main, ["unpack", str(loads[0]), str(there)])
    assert "a.whl: complete" in done.output
    for name, data in sent.items():
        assert hashlib.sha256((there / name).read_bytes()).digest() == hashlib.sha256(data).digest()


def fatbin(*entries: tuple[int, bytes]) -> bytes:
    """A group of kernels as NVIDIA's tools lay it out, with a code for each compute capability."""
    body = b""
    for capability, code in entries:
        head = struct.pack("<HHIQ", 2, 0x101, 64, len(code)).ljust(28, b"\0") + struct.pack("<I", capability)
        body += head.ljust(64, b"\0") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_a_wheel_travels_with_the_kernels_of_one_gpu(tmp_path):
    rng = np.random.default_rng(0)
    codes = {capability: rng.bytes(4000) for capability in (80, 90, 120)}
    only_old = fatbin((75, codes[80]))
    noise = b"\x7fELF" + rng.bytes(500) + struct.pack("<I", 0xBA55ED50)  # the magic number by chance
    library = noise + fatbin(*codes.items()) + only_old + b"end"
    kept = keep_capability(library, 90)
    assert len(kept) == len(library) and kept.startswith(noise) and kept.endswith(only_old + b"end")
    assert codes[90] in kept and codes[120] not in kept and kept.count(codes[80]) == 1
    for capability in codes:  # by which the driver finds its own
        assert kept.count(struct.pack("<I", capability)) >= library.count(struct.pack("<I", capability)) - 1
    wheel = tmp_path / "engine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.mkdir("engine")
        archive.writestr("engine/lib.so.1", library)
        archive.writestr("engine/__init__.py", "x = 1\n")
    loads, there = tmp_path / "loads", tmp_path / "there"
    command = ["pack", str(wheel), "-o", str(loads), "--capability", "9.0", "--limit-mib", "1"]
    assert CliRunner().invoke(main, command).exit_code == 0
    done = CliRunner().invoke(main, ["unpack", str(loads / "load-0"), str(there)])
    assert "complete" in done.output, done.output
    assert (there / "engine" / "lib.so.1").read_bytes() == kept
    assert (there / "engine" / "__init__.py").read_text() == "x = 1\n"
