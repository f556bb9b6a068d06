"""Bundles beside peers: whose turn it is, what the rows say, and what happens to who cannot run."""

import json
import os
import re
import shutil
import sys
import venv
from dataclasses import replace
from pathlib import Path

import fake_peers
import numpy as np
import pytest
from click.testing import CliRunner

from cxr_triton.engines.cpu import Cpu
from cxr_triton.errors import InternalError, InvalidRequest
from cxr_triton.perf import beside, peers
from cxr_triton.perf.beside import Entrant, Plan, measure
from cxr_triton.perf.beside_page import page, table
from cxr_triton.perf.peers.genai import Genai
from cxr_triton.perf.peers.llama_cpp import Converter
from cxr_triton.perf.peers.peer import told
from cxr_triton.perf.process import Process
from cxr_triton.perf.roofline import peaks

PLAN = Plan(prompt=10, tokens=4, streams=(1, 4, 8), flops=2e9, vocab=400, profile=None, items=[])
PEAKS = {"read_bytes_per_s": 2e7, "int8_ops_per_s": 1e11, "int8_instruction": "AMX", "why": ""}


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    monkeypatch.setattr(beside, "peaks", lambda: PEAKS)
    monkeypatch.setattr(beside, "environment", lambda: {"cpu": "one"})


def entrant(kind, folder: Path = Path()) -> Entrant:
    return Entrant(kind.title, kind.title, kind, folder, dict.fromkeys((1, 4, 8), kind.step_bytes(folder)))


def asked(*kinds, folder: Path, rounds: int = 1) -> tuple[dict, list[dict]]:
    written: list[dict] = []
    chosen = [entrant(kind, folder) for kind in kinds]

    def keep(so_far: dict) -> None:
        written.append(json.loads(json.dumps(so_far)))

    return measure(chosen, PLAN, rounds=rounds, on_round=keep), written


@pytest.mark.slow
def test_each_is_loaded_in_its_turn_of_each_round_when_the_one_before_has_ended(tmp_path):
    result, written = asked(fake_peers.Fake, fake_peers.Other, folder=tmp_path, rounds=2)
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    began = [each for each in log if "began" in each]
    assert [each["began"] for each in began] == ["fake", "other", "fake", "other"]
    assert [each["alive"] for each in began] == [[], [], [], []] and len({each["pid"] for each in log}) == 4
    writes = [(each["streams"], each["lengths"], each["tokens"]) for each in log if "streams" in each]
    assert writes == [(1, [10], 2), (1, [10], 4), (4, [10], 4), (8, [10], 4)] * 4
    assert sum("read" in each for each in log) == 4  # two in each round of the one that gets pictures
    assert [so_far["rounds"] for so_far in written] == [1, 2] and written[-1] == json.loads(json.dumps(result))
    assert all(len(each["rows"]["load_s"]["rounds"]) == 2 for each in result["peers"])


@pytest.mark.slow
def test_what_fails_is_said_in_its_rows_and_costs_no_other_number(tmp_path):
    result, _ = asked(fake_peers.Failing, fake_peers.Fake, folder=tmp_path, rounds=2)
    failing, fake = (each["rows"] for each in result["peers"])
    assert failing["decode_tokens_per_s_4"]["value"] == 32 and len(failing["load_s"]["rounds"]) == 1
    for key in ("decode_tokens_per_s_8", "first_word_s", "peak_resident_bytes"):
        assert failing[key] == {"value": None, "why": "Foreign: no room for 8"}
    assert len(fake["first_word_s"]["rounds"]) == 2
    assert "- failing: Foreign: no room for 8" in table(result).splitlines()


@pytest.mark.slow
def test_a_whole_report_is_asked_for_and_a_new_recorded_one_in_each_round_of_who_guesses(tmp_path):
    texts = [[1] * 5, [2] * 5, [3] * 4]
    plan = replace(PLAN, streams=(1,), report=5, texts=texts)
    chosen = [entrant(kind, tmp_path) for kind in (fake_peers.Guessing, fake_peers.Fake, fake_peers.Other)]
    result = measure(chosen, plan, rounds=3, on_round=lambda _: None)
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [each["guess"] for each in log if "guess" in each] == [texts[1], texts[0], texts[1]]  # whole ones alone
    assert [each["read"] for each in log if "read" in each] == [1, 1, 5, 5, 1, 1, 5] * 3
    guessing, plain, other = (each["rows"] for each in result["peers"])
    assert guessing["report_s"]["value"] == 1.25 and guessing["guessed_report_s"]["rounds"] == [0.75] * 3
    assert plain["report_s"]["of_first"] == 1 and plain["guessed_report_s"]["why"] == beside.NO_GUESSES
    assert other["report_s"] == {"value": None, "why": beside.NO_PICTURE}
    assert (result["report_tokens"], result["reports"]) == (5, beside.REPORTS)
    head, _, *lines = table(result).splitlines()
    assert [cell.strip() for cell in head.split("|")[-5:-1]] == [
        "first word, picture",
        "report",
        "report, guessing",
        "peak memory",
    ]
    assert [line.split("|")[-4:-2] for line in lines[:3]] == [
        [" 1.25 s ", " 0.750 s "],
        [" 1.25 s ", " – "],
        [" – ", " – "],
    ]
    shown = page({**result, "environment": {"cpu": "one", "cores": 2, "versions": {}}})
    assert "<h2>A recorded report, guessing tokens</h2>" in shown


def test_recorded_reports_have_to_be_two_and_one_of_them_long_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(beside.Bundle, "open", lambda path, verify: None)
    for lengths in ((3,), (2, 2), ()):
        monkeypatch.setattr(beside, "texts_of", lambda *_, lengths=lengths: [[7] * length for length in lengths])
        with pytest.raises(InvalidRequest, match=r"two texts are needed, one of them of the 3 tokens of --report"):
            beside.plan_of(tmp_path, prompt=4, tokens=2, report=3, texts=tmp_path / "texts.json")
    command = [str(tmp_path), "--checkpoint", str(tmp_path), "--texts", __file__]
    done = CliRunner().invoke(beside.main, command)
    assert done.exit_code == 2 and "--texts needs --report" in done.output


def turn_of(entrant: Entrant, plan: Plan, seed: int) -> dict:
    """A round in which everything takes `seed` times as long, and the memory is that of the others."""
    slow = seed * (2 if entrant.kind is fake_peers.Other else 1)
    streams = {str(n): {"first_s": slow * 0.5, "tokens_per_s": 8.0 * n / slow} for n in plan.streams}
    first = 2.0 * slow if entrant.kind.scope == "reading" else None
    return {"load_s": slow, "streams": streams, "first_word_s": first, "peak_resident_bytes": 2**30, "stolen_share": 0}


def test_rows_are_medians_with_their_share_of_what_the_machine_reaches(monkeypatch):
    monkeypatch.setattr(beside, "turn", turn_of)
    result, _ = asked(fake_peers.Fake, fake_peers.Other, folder=Path(), rounds=3)
    ours, other = (each["rows"] for each in result["peers"])
    prompt = ours["prompt_tokens_per_s"]
    assert (prompt["value"], prompt["rounds"], prompt["of_first"]) == (10, [20, 10, pytest.approx(20 / 3)], 1)
    assert (prompt["top_per_s"], prompt["share_of_int8_peak"]) == (pytest.approx(0.002), pytest.approx(0.02))
    crowd = ours["decode_tokens_per_s_8"]  # 4 steps a second, each of 1 MB
    assert (crowd["value"], crowd["gb_per_s"]) == (32, pytest.approx(0.004))
    assert crowd["share_of_read_bandwidth"] == pytest.approx(0.2)
    assert other["decode_tokens_per_s_8"]["of_first"] == 0.5 and other["load_s"]["of_first"] == 2
    assert other["first_word_s"] == {"value": None, "why": beside.NO_PICTURE}
    lines = table(result).splitlines()
    assert lines[2].startswith("| fake | 2 s | 10 tok/s, 0.00200 TOP/s (2%) |") and lines[2].endswith(
        "| 4 s | 1.0 GiB |"
    )
    assert f"- other: {beside.NO_PICTURE}" in lines
    assert "read 0.0200 GB/s, int8 100 GOP/s by AMX" in lines


def test_a_page_has_a_bar_for_each_and_says_why_one_is_missing(monkeypatch):
    monkeypatch.setattr(beside, "turn", turn_of)
    monkeypatch.setattr(beside, "environment", lambda: {"cpu": "one <b>", "cores": 2, "versions": {"numpy": "1"}})
    result, _ = asked(fake_peers.Fake, fake_peers.Other, folder=Path(), rounds=1)
    shown = page(result)
    assert "Decoding, 8 at once" in shown and "more is better" in shown and "one &lt;b&gt;, 2 cores" in shown
    section = shown.split("<h2>Decoding, 4 at once</h2>")[1].split("</section>")[0]
    assert re.findall(r"width:([\d.]+)%", section) == ["100.00", "50.00"]
    assert f"<li>other: {beside.NO_PICTURE}</li>" in shown and "not for diagnosis" in shown.lower()


def test_speeds_are_those_of_streams_that_all_write():
    assert told(1.0, [[2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 6.0]]) == {"first_s": 2.0, "tokens_per_s": 2.0}
    assert told(1.0, [[2.0, 3.0], [4.0, 5.0]]) == {"first_s": 3.0, "tokens_per_s": None}


def test_without_peaks_there_are_speeds_but_no_shares(monkeypatch):
    monkeypatch.setattr(beside, "turn", turn_of)
    monkeypatch.setattr(beside, "peaks", lambda: dict.fromkeys(PEAKS) | {"why": "no compiler"})
    result, _ = asked(fake_peers.Fake, folder=Path())
    assert result["ceilings"]["why"] == "no compiler"
    assert result["peers"][0]["rows"]["decode_tokens_per_s_1"]["share_of_read_bandwidth"] is None
    assert "8 tok/s, 0.00800 GB/s |" in table(result)


def test_who_is_not_there_or_takes_nothing_of_the_checkpoint_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_LLAMA_CPP_PYTHON", "/no/such/python")
    monkeypatch.setattr(beside, "kind_of", lambda name: Nested if name == "genai" else peers.kind_of(name))
    chosen = beside.entrants([], tmp_path, ["llama-cpp-q4-0", "genai"], tmp_path)
    assert chosen[0].why == (
        "llama-cpp-python is not installed in /no/such/python, which CXR_LLAMA_CPP_PYTHON names or may name"
    )
    assert chosen[1].why.startswith("it takes nothing of this checkpoint: ") and "nested config" in chosen[1].why
    result = measure(chosen, PLAN, rounds=1, on_round=lambda _: None)
    for each, expected in zip(result["peers"], chosen, strict=True):
        assert {row["value"] for row in each["rows"].values()} == {None}
        assert each["rows"]["load_s"]["why"] == expected.why and each["turns"] == []


class Nested(Genai):
    """One that is installed."""

    packages = ("numpy",)

    @classmethod
    def prepare(cls, checkpoint: Path, work: Path) -> Path:
        (checkpoint / "config.json").write_text('{"text_config": {}}')
        return super().prepare(checkpoint, work)


def test_the_command_prints_the_table_and_writes_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "turn", turn_of)
    monkeypatch.setattr(beside, "plan_of", lambda folder, **_: PLAN)
    monkeypatch.setattr(beside, "entrants", lambda *_: [entrant(fake_peers.Fake), entrant(fake_peers.Other)])
    for out in (str(tmp_path / "out.json"), "-"):
        command = [str(tmp_path), "--checkpoint", str(tmp_path), "--rounds", "2", "--json", out]
        done = CliRunner().invoke(beside.main, command, catch_exceptions=False)
        assert done.exit_code == 0 and "| other | 3 s |" in done.output
        written = json.loads(done.stdout if out == "-" else Path(out).read_text())
        assert [each["name"] for each in written["peers"]] == ["fake", "other"] and written["rounds"] == 2
        assert written["ceilings"]["rounds"] == [PEAKS, PEAKS] and written["environment"] == {"cpu": "one"}


LIBRARY = """
class Model:
    def __init__(self, folder): pass
class GeneratorParams:
    def __init__(self, model): pass
    def set_search_options(self, **options): self.options = options
class Generator:
    def __init__(self, model, parameters):
        self.left = parameters.options["max_length"]
        self.batch = parameters.options["batch_size"]
    def append_tokens(self, ids):
        assert ids.shape[0] == self.batch
        self.left -= ids.shape[1]
    def generate_next_token(self):
        self.left -= 1
        assert self.left > 0
"""


@pytest.fixture
def other_python(tmp_path) -> str:
    """A Python that has numpy and a library, and none of our other packages."""
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    numpy = Path(np.__file__).parent
    for found in (numpy, *numpy.parent.glob("numpy.libs")):
        (packages / found.name).symlink_to(found)
    (packages / "onnxruntime_genai.py").write_text(LIBRARY)
    return str(tmp_path / "venv" / "bin" / "python")


@pytest.mark.slow
def test_a_peer_that_only_decodes_runs_in_a_python_without_our_packages(tmp_path, other_python, monkeypatch):
    monkeypatch.setenv(Genai.variable, other_python)
    (tmp_path / "genai_config.json").write_text('{"model": {"vocab_size": 9}}')
    assert Genai.missing().startswith("onnxruntime-genai is not installed in ")
    process = peers.start(Genai, tmp_path, None, [])
    try:
        took = process.call("write", [[1, 2, 3], [4, 5, 6]], 4)
        assert took["first_s"] > 0 and took["tokens_per_s"] > 0
        assert process.end()["peak_resident_bytes"] > 1 << 20
    finally:
        process.kill()
    with pytest.raises(ModuleNotFoundError, match="llama_cpp"):
        Process(Converter, [0], python=other_python).call("convert", str(tmp_path), str(tmp_path / "out"), "Q4_0")


def test_peaks_are_unknown_without_a_compiler_that_works(monkeypatch):
    monkeypatch.setenv("CC", "/no/such/cc")
    assert peaks()["why"] == "/no/such/cc does not run (No such file or directory); install a C compiler"
    monkeypatch.setenv("CC", f"{sys.executable} -c 'import sys; sys.exit(\"no VNNI\")'")
    assert peaks()["read_bytes_per_s"] is None and "ends with 1: no VNNI" in peaks()["why"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_peaks_are_of_the_fastest_instruction_that_the_processor_has():
    features = Cpu.here().flags
    instructions = (("amx_int8", "AMX"), ("avx512_vnni", "AVX-512 VNNI"), ("avx_vnni", "AVX-VNNI"))
    fastest = next((name for flag, name in instructions if flag in features), None)
    told = peaks()
    assert told["read_bytes_per_s"] > 1e8
    assert told["int8_instruction"] == fastest and bool(told["int8_ops_per_s"]) == bool(fastest) == (not told["why"])


def test_what_fails_is_closed_before_anybody_is_told(tmp_path):
    """Else a server that a peer started would compute beside the next one."""
    process = Process(fake_peers.Failing, sorted(os.sched_getaffinity(0)), str(tmp_path), None, [])
    try:
        with pytest.raises(InternalError, match="no room for 8"):
            process.call("write", [[1]] * 8, 1)
        assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["closed"] == "failing"
    finally:
        process.kill()


def test_a_process_that_does_not_load_has_ended_when_that_is_said(tmp_path):
    with pytest.raises(InternalError, match="no weights"):
        Process(fake_peers.Unready, sorted(os.sched_getaffinity(0)), str(tmp_path), None, [])
    assert not Path(f"/proc/{json.loads((tmp_path / 'log').read_text())['pid']}").exists()
