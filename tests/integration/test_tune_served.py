"""A repository that was tuned for real, and served: its settings are the server's, and another CPU is told."""

import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from bundles import build_openvino
from click.testing import CliRunner

from cxr_triton import cli
from cxr_triton.client import Reader
from cxr_triton.perf.race import IN_USE, ROUNDS, TAKEN
from cxr_triton.triton_repo.integrity import differences
from cxr_triton.triton_repo.package import Settings, write_repository
from cxr_triton.triton_repo.tuned import record_of, settings_of, write_settings

TOKENS = 150
SERVE = "from cxr_triton.cli import main; main()"


@pytest.fixture(scope="module")
def repository(served_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("tuned") / "repository"
    write_repository(served_bundle, path, Settings(preprocess_instances=1, drafts=False), unverified=True)
    return path


def test_what_was_measured_is_written_and_another_engine_is_told(served_bundle, repository, tmp_path):
    beside = served_bundle
    if importlib.util.find_spec("openvino"):
        beside = build_openvino(served_bundle.parent / "export", tmp_path / "beside").path
    before = settings_of(repository)
    words = ["tune", repository, "--seconds", 6, "--streams", 2, "--beside", beside, "--json", tmp_path / "out.json"]
    done = CliRunner().invoke(cli.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    result, record = json.loads((tmp_path / "out.json").read_text()), record_of(repository)
    assert record == {key: value for key, value in result.items() if key not in ("folder", "written")}
    chosen = dict(before)
    for row in result["measured"]:
        assert row["values"][0]["value"] == row["used"] == chosen[row["setting"]]
        assert row["values"][0]["verdict"] == IN_USE and all(s > 0 for s in row["values"][0].get("seconds", ()))
        taken = [value for value in row["values"] if value["verdict"] == TAKEN]
        assert row["taken"] == (taken[0]["value"] if taken else row["used"])
        assert all(value["rounds"] >= ROUNDS and value["of_used"] < 1 for value in taken)
        chosen[row["setting"]] = row["taken"]
    assert {"threads", "vision_threads", "prefill_chunk"} <= {row["setting"] for row in result["measured"]}
    assert settings_of(repository) == record["chosen"] == chosen and differences(repository) == []
    (told,) = result["beside"]
    laps = [[told[part][which]["seconds"] for part in ("tower", "decoder")] for which in (0, 1)]
    ours, theirs = ([picture + text for picture, text in zip(*each, strict=False)] for each in laps)
    assert told["reading_s"] == [statistics.median(ours), statistics.median(theirs)] and len(ours) >= ROUNDS
    assert told["of_ours"] == statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    assert f"beside ({told['recipe']})" in done.output or beside is served_bundle


@pytest.mark.triton
def test_the_server_has_the_settings_and_says_when_they_are_of_another_cpu(repository):
    pytest.importorskip("pytriton")
    elsewhere = {"model": "Z80", "flags": [], "cores": 1}
    record = {"schema": 1, "date": "2026-11-28T00:00:00+00:00", "versions": {}, "cpu": elsewhere}
    write_settings(repository, {"slots": 1, "threads": 1, "prefill_chunk": 16}, record)
    words = ["serve", str(repository), "--grpc-port", "0", "--metrics-port", "0", "--drain-seconds", "0"]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        ready = server.stdout.readline()
        assert ready.startswith("ready: "), server.communicate()[1]
        address, metrics = re.search(r"gRPC (\S+), metrics (\S+),", ready).groups()
        with Reader(address) as reader:
            made, expected = steps_of_four(reader, metrics)
            assert made == expected > 0, "two streams shared a step: there were two slots"
        in_use = CliRunner().invoke(cli.main, ["tune", str(repository)])
        assert in_use.exit_code == 1 and "a server runs on it" in in_use.stderr
    finally:
        server.terminate()
        said = server.communicate(timeout=60)[1]
    assert "was tuned on Z80 with 1 core, 2026-11-28; here the CPU is" in said


def steps(metrics: str) -> int:
    """Decode steps that the server made."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=60) as answer:
        return int(re.search(r"^cxr_decoder_steps_total\S* (\d+)", answer.read().decode(), re.MULTILINE)[1])


def steps_of_four(reader, metrics: str) -> tuple[int, int]:
    """Steps that four answers at once took, and those that they take one after the other: the first token is free."""
    before = steps(metrics)
    with ThreadPoolExecutor(4) as pool:
        asked = [{"prompt": f"{i}", "max_new_tokens": TOKENS, "temperature": 0.0} for i in range(4)]
        answers = [
            reading.usage["completion_tokens"]
            for reading in pool.map(lambda one: reader.read((), **one).result(), asked)
        ]
    expected, until_s = sum(answers) - len(answers), time.monotonic() + 60  # a step is counted when its text was sent
    while (made := steps(metrics) - before) < expected and time.monotonic() < until_s:
        time.sleep(0.1)
    return made, expected
