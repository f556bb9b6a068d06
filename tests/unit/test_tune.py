"""`tune`: who wins a race, what is tried, what is written, and that a repository is whole whatever happens."""

import errno
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from fake_session import FakeSession, Receiver, generation
from served import write_paper_bundle
from test_package import write_engine_bundle

from cxr_triton import cli, files
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.cpu import Cpu
from cxr_triton.errors import InternalError, InvalidBundle, InvalidRequest, Unavailable
from cxr_triton.perf import tune
from cxr_triton.perf.race import (
    IN_USE,
    LEAST_GAIN,
    MOST_ROUNDS,
    NO_FASTER,
    NO_TIME,
    OTHER,
    ROUNDS,
    SHORT_S,
    SLOWER,
    TAKEN,
    Lap,
    race,
)
from cxr_triton.triton_repo import tuned
from cxr_triton.triton_repo.integrity import differences, seal
from cxr_triton.triton_repo.occupied import alone, occupy
from cxr_triton.triton_repo.package import BUNDLE, Settings, write_repository

RECORD = {"schema": 1, "date": "2026-11-28T00:00:00+00:00", "versions": {}}
ELSEWHERE = {"model": "Z80", "flags": ["avx2"], "cores": 1}


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def raced(seconds: dict[int, list[float]], *, outputs=None, until_s=1e9):
    """A race of values whose laps take these seconds in turn (the last one over and over), the first in use."""
    clock, order = Clock(), []

    def run(value):
        taken = seconds[value]
        lap_s = taken[min(order.count(value), len(taken) - 1)]
        order.append(value)
        clock.now_s += lap_s
        return Lap(seconds=lap_s, output=(outputs or {}).get(value))

    holder, *rivals = seconds
    return race(holder, rivals, run, until_s=until_s, clock=clock), order


def verdicts(ended) -> dict[int, str]:
    return {entry.value: entry.verdict for entry in ended.entries}


@pytest.mark.parametrize(
    ("laps", "winner", "verdict"),
    [
        ({0: [10], 2: [9]}, 2, TAKEN),
        ({0: [10], 2: [10 * (1 - LEAST_GAIN / 2)]}, 0, NO_FASTER),
        ({0: [10], 2: [10.5]}, 0, NO_FASTER),
        ({0: [10], 2: [13]}, 0, SLOWER),
        ({0: [10, 14, 10], 2: [9, 12.6, 9]}, 2, TAKEN),  # the machine was slow in one round, for both
        ({0: [82.4, 110.2, 133.4], 2: [165.5, 172.3, 108.6]}, 0, SLOWER),  # seen on a busy machine, of the same
        ({0: [165.5, 172.3, 108.6], 2: [82.4, 110.2, 133.4]}, 0, NO_FASTER),  # engine and weights twice
        ({0: [10], 2: [13, 13, 9]}, 0, SLOWER),
        ({0: [10], 2: [13, 9, 9]}, 0, NO_FASTER),
        ({0: [10], 2: [9, 9, 9, 10]}, 0, NO_FASTER),  # it has to win twice
        ({0: [10], 2: [10.5, 9, 9]}, 2, TAKEN),  # one slow lap is the machine's, the median counts
    ],
)
def test_a_rival_wins_by_more_than_the_noise_only(laps, winner, verdict):
    ended, _ = raced(laps)
    assert (ended.winner, verdicts(ended)) == (winner, {0: IN_USE, 2: verdict})


def test_rounds_alternate_and_the_best_of_several_is_taken():
    ended, order = raced({0: [10], 1: [9], 2: [8]})
    assert order == [0, 1, 2, 2, 1, 0, 0, 1, 2, *[0, 2, 2, 0, 0, 2]]
    assert verdicts(ended) == {0: IN_USE, 1: NO_FASTER, 2: TAKEN}


def test_what_is_hopeless_is_not_measured_again():
    ended, order = raced({0: [10], 1: [20], 2: [9]})
    assert order.count(1) == 2 and ended.winner == 2


def test_what_is_as_fast_seldom_wins_by_chance():
    chance = random.Random(0)

    def run(value):
        return Lap(seconds=chance.lognormvariate(0, 0.05) + SHORT_S)

    clock = Clock()
    ended = [race(0, [1, 2, 3, 4], run, until_s=math.inf, clock=clock) for _ in range(500)]
    assert sum(each.winner != 0 for each in ended) <= 25


def test_a_faster_value_that_gives_something_else_is_not_taken():
    ended, order = raced({0: [10], 2: [1]}, outputs={0: [1, 2], 2: [1, 3]})
    assert verdicts(ended) == {0: IN_USE, 2: OTHER} and ended.winner == 0 and order == [0, 2]


def test_no_round_begins_that_would_not_end_in_time_and_fewer_than_three_decide_nothing():
    for until_s, rounds in ((0, 1), (37, 1), (38, 2), (56, 2), (57, 3), (113, 3), (114, 6)):
        ended, order = raced({0: [10], 2: [9]}, until_s=until_s)
        assert len(order) == 2 * rounds and (ended.winner == 2) is (rounds == 2 * ROUNDS)
        assert verdicts(ended)[2] == (TAKEN if rounds == 2 * ROUNDS else NO_TIME)
    assert raced({0: [10], 2: [9]}, until_s=-1)[1] == []


def test_short_laps_are_run_more_often():
    assert len(raced({0: [0.1], 2: [0.1]})[1]) == 2 * MOST_ROUNDS


# ------------------------------------------------------------------------------------------------------- what is tried


@pytest.fixture
def bundle(tmp_path):
    return write_paper_bundle(tmp_path / "bundle")


@pytest.fixture
def repository(bundle, tmp_path):
    write_repository(bundle, tmp_path / "repository", Settings(), unverified=True)
    return tmp_path / "repository"


class Engines:
    """In the place of processes: laps take what `costs` say of the settings, on a clock of their own."""

    def __init__(self, costs, load_s=1.0):
        self.costs, self.load_s, self.clock = costs, load_s, Clock()
        self.alive, self.most, self.calls = 0, 0, []

    def process(self, kind, cpus, *made):
        self.clock.now_s += self.load_s
        self.alive += 1
        self.most = max(self.most, self.alive)
        graph, threads = kind.__name__.removesuffix("Run").lower(), made[-1]

        def call(method, *given):
            if method == "embeddings":
                return np.zeros((4, 64), np.float32)
            lap = self.costs(graph, threads, *given)
            self.calls.append((graph, threads, *given))
            self.clock.now_s += lap.seconds
            return lap

        return SimpleNamespace(call=call, kill=lambda: setattr(self, "alive", self.alive - 1))


def tower(seconds, output="same"):
    return Lap(seconds=seconds, output=output)


def decoder(first_word_s, tokens_per_s, tokens=(1, 2)):
    reading_s = first_word_s + 255 / tokens_per_s
    facts = {"first_word_s": first_word_s, "tokens_per_s": tokens_per_s, "reading_s": reading_s}
    return Lap(seconds=reading_s, output=list(tokens), facts=facts)


@pytest.fixture
def tuning(bundle, monkeypatch):
    """Tunes the paper bundle over `Engines` of these costs, on a machine of eight cores."""

    def tuned_by(costs, *, load_s=1.0, settings=None, **plan):
        engines = Engines(costs, load_s)
        step = SimpleNamespace(
            input_ids=np.arange(300),
            image_index=np.full(300, -1),
            position_ids=np.tile(np.arange(300), (3, 1)),
            pixel_windows=np.zeros((1, 1, 64, 588), np.uint8),
            patch_rows_cols=np.zeros((1, 1, 64, 2), np.int32),
            valid=np.ones((1, 1, 64), bool),
            merge_order=np.zeros((1, 4), np.int32),
        )
        monkeypatch.setattr(tune, "Process", engines.process)
        monkeypatch.setattr(tune, "prepared", lambda bundle: step)
        monkeypatch.setattr(tune.os, "sched_getaffinity", lambda pid: set(range(8)))
        subject = tune.Subject.of(bundle)
        subject.settings.update(settings or {})
        made = tune.Tuning(subject, tune.Plan(**{"seconds": 1e6} | plan), clock=engines.clock)
        try:
            made.run()
        finally:
            assert engines.alive == 0, "a process was left"
        assert engines.most <= 2, "weights were in memory three times"
        return made, engines

    return tuned_by


def test_each_graph_gets_the_threads_that_are_fastest_for_it(tuning):
    """The tower likes all cores, a step a half of them; 0 leaves it to the engine."""

    def costs(graph, threads, *lap):
        if graph == "tower":
            return tower({0: 2.0, 8: 1.5}.get(threads, 3.0))
        return decoder(1.0, {0: 10, 8: 11, 4: 16, 2: 12, 1: 6}[threads])

    made, engines = tuning(costs)
    assert made.chosen == {
        "threads": 4, "prefill_chunk": 0, "slots": 4, "vision_threads": 8, "vision_batch": 8,
    }  # fmt: skip
    threads = [row for row in made.record()["measured"] if row["setting"] == "threads"]
    assert [(row["used"], row["taken"]) for row in threads] == [(0, 8), (8, 4), (4, 4)]
    assert not any(call[:2] == ("decoder", 1) for call in engines.calls), "fewer than what is slower was tried"
    assert json.loads(json.dumps(made.record()))["prompt_tokens"] == 300


@pytest.mark.parametrize("used", [0, 2])
def test_more_threads_that_are_slower_do_not_end_the_search(tuning, used):
    def costs(graph, threads, *lap):
        return tower(1.0) if graph == "tower" else decoder(1.0, {0: 10, 8: 5, 4: 16, 2: 10, 1: 6}[threads])

    assert tuning(costs, settings={"threads": used})[0].chosen["threads"] == 4


def test_the_pieces_of_a_prompt_are_chosen_by_the_first_word(tuning):
    def costs(graph, threads, *lap):
        return tower(1.0) if graph == "tower" else decoder({64: 3, 0: 2.5, 256: 2.1, 512: 1.9}[lap[0]], 10)

    assert tuning(costs)[0].chosen["prefill_chunk"] == 512
    assert tuning(costs, streams=2)[0].chosen["prefill_chunk"] == 0, "a longer piece pauses the other streams"
    slow = tuning(lambda graph, threads, *lap: tower(1.0) if graph == "tower" else decoder(30.0, 10))[1]
    assert {call[2] for call in slow.calls if call[0] == "decoder"} == {0, 64}, "256 tokens would pause for 25 s"


def test_tokens_that_are_others_keep_the_pieces_as_they_are(tuning):
    def costs(graph, threads, *lap):
        return tower(1.0) if graph == "tower" else decoder(1 if lap[0] else 2, 10, (1, 2 + lap[0]))

    made, _ = tuning(costs)
    assert made.chosen["prefill_chunk"] == 0
    (row,) = [row for row in made.measured if row["setting"] == "prefill_chunk"]
    assert {value["verdict"] for value in row["values"][1:]} == {OTHER}


def test_slots_and_batch_are_for_the_streams_that_are_asked_for(tuning):
    def costs(graph, threads, *lap):
        if graph == "tower":
            return tower({1: 1.0, 2: 0.8, 4: 0.9, 8: 0.9, 16: 0.9}[lap[0]])
        return decoder(1.0, 10 * lap[1] ** 0.5)

    assert tuning(costs, streams=1)[0].chosen["slots"] == 4
    made, engines = tuning(costs, streams=12)
    assert made.chosen["slots"] == 12 and made.chosen["vision_batch"] == 2
    assert {call[3] for call in engines.calls if call[0] == "decoder"} == {1, 4, 8, 12}


def test_slots_whose_cache_has_no_room_are_not_tried(tuning, monkeypatch):
    monkeypatch.setattr(tune, "memory_available", lambda: 2 * 8 * 4096 * 2 * 4)  # of 8 slots, twice
    made, _ = tuning(lambda graph, threads, *lap: tower(1) if graph == "tower" else decoder(1, lap[1]), streams=32)
    assert made.chosen["slots"] == 8


def test_a_second_session_is_opened_only_where_there_is_memory_and_time(tuning, bundle, monkeypatch):
    costs = lambda graph, threads, *lap: tower(1.0) if graph == "tower" else decoder(1.0, 10)  # noqa: E731
    made, engines = tuning(costs, seconds=5, load_s=10)
    assert engines.most == 1 and made.chosen == tune.Subject.of(bundle).settings
    assert {value["verdict"] for row in made.measured for value in row["values"][1:]} <= {NO_TIME}
    monkeypatch.setattr(tune, "memory_available", lambda: -1)
    made, engines = tuning(costs)
    assert engines.most == 1 and tune._NO_ROOM in str(made.measured)


def test_an_engine_that_dies_ends_it_and_leaves_no_process(tuning):
    def costs(graph, threads, *lap):
        if graph == "decoder" and threads == 8:
            raise InternalError("the engine's process ended with -9")
        return tower(1.0) if graph == "tower" else decoder(1.0, 10)

    with pytest.raises(InternalError, match="-9"):
        tuning(costs)


# ----------------------------------------------------------------------------------------------------- what is written


def test_settings_are_written_with_their_record_and_the_rest_stays(repository):
    weights = repository / BUNDLE / "decoder.onnx.data"
    model = repository / "report" / "1" / "model.py"
    model.chmod(0o600)
    before = {str(path.relative_to(repository)): path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    tuned.write_settings(
        repository, {"threads": 3, "vision_threads": 2, "vision_batch": 5}, RECORD | {"cpu": ELSEWHERE}
    )
    after = {str(path.relative_to(repository)): path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"tune.json", "repository.json", "decoder/config.pbtxt", "vision_encoder/config.pbtxt"}
    assert tuned.settings_of(repository) == {
        "threads": 3, "prefill_chunk": 0, "slots": 4, "vision_threads": 2, "vision_batch": 5,
    }  # fmt: skip
    assert model.stat().st_mode & 0o777 == 0o600 and weights.exists()
    assert differences(repository) == [] and tuned.record_of(repository)["cpu"] == ELSEWHERE
    Bundle.open(repository / BUNDLE)
    (repository / "tune.json").write_text("{}")
    assert differences(repository) == ["tune.json was changed"]


def test_the_runtime_takes_the_pieces_that_the_repository_says(repository, monkeypatch):
    """As the served model opens it, from what `tune` wrote."""
    tuned.write_settings(repository, {"prefill_chunk": 4, "slots": 3}, RECORD | {"cpu": ELSEWHERE})
    bundle = Bundle.open(repository / BUNDLE)
    sessions = []

    def opened(self, bundle, *, slots, threads, batch_invariant):
        sessions.append(FakeSession(slots=slots))
        return sessions[0]

    each = engine(bundle.engine)
    monkeypatch.setattr(type(each), "open_decoder", opened)
    with each.open_runtime(bundle, tuned.parameters_of(repository, "decoder"), "") as runtime:
        receiver = Receiver()
        runtime.submit(generation(range(10), 2), receiver)
        assert receiver.completion
    assert sessions[0].slots == 3
    assert [call[2] for call in sessions[0].calls if call[0] == "prefill"] == [4, 4, 2]


def test_package_takes_what_tune_says_of_a_bundle(bundle, tmp_path):
    subject = tune.Subject.of(bundle)
    chosen = dict.fromkeys(subject.settings, 16)
    words = tune.options(subject, chosen)
    done = CliRunner().invoke(
        cli.main, ["package", str(bundle), "-o", str(tmp_path / "r"), "--unverified", *words], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert tuned.settings_of(tmp_path / "r") == chosen
    assert tune.options(subject, subject.settings) == []
    write_repository(bundle, tmp_path / "plain", Settings(), unverified=True)
    assert tuned.settings_of(tmp_path / "plain") == subject.settings


def test_a_batch_that_a_request_does_not_fit_into_is_refused(bundle, tmp_path):
    with pytest.raises(InvalidRequest, match=r"vision_batch is 1, a request .* may have 2 images"):
        write_repository(bundle, tmp_path / "r", Settings(vision_batch=1), unverified=True)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("stage", ["copy", "seal"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_a_write_that_is_interrupted_leaves_the_repository_as_it_was(repository, monkeypatch, stage, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(tuned, {"copy": "take", "seal": "seal"}[stage], fail)
    with pytest.raises(error if isinstance(error, type) else OSError):
        tuned.write_settings(repository, {"threads": 3}, RECORD | {"cpu": ELSEWHERE})
    assert differences(repository) == [] and tuned.record_of(repository) is None
    assert sorted(path.name for path in repository.parent.iterdir()) == ["bundle", "repository"]


KILLED = """
import os, signal, sys
from pathlib import Path
from cxr_triton import files
replace = os.replace
def killed(source, target):
    replace(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = killed
with files.new_folder(Path(sys.argv[1]), replaces=True) as new:
    (new / "new").touch()
"""


def test_folders_change_places_at_once_so_that_a_kill_leaves_one_of_them(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_system_without_an_exchange_of_folders_puts_the_old_one_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with files.new_folder(tmp_path / "out", replaces=True) as new:
        (new / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    replace = os.replace
    interrupt = iter([False, True, False])

    def replaced(source, target):
        if next(interrupt):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", replaced)
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "out", replaces=True):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


# ------------------------------------------------------------------------------------------------------------ who may


def run(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def test_a_repository_is_tuned_by_one_and_served_by_many(repository):
    first, second = occupy(repository), occupy(repository)
    os.close(first)
    said = run("tune", repository)
    assert said.exit_code == 1 and "a server runs on it" in said.stderr and "[INVALID_REQUEST]" in said.stderr
    os.close(second)
    with alone(repository), pytest.raises(Unavailable, match="is being tuned"):
        occupy(repository)
    os.close(occupy(repository))


def test_a_repository_that_is_tuned_is_not_packaged_anew(repository, bundle):
    with alone(repository), pytest.raises(Unavailable, match="is being tuned"):
        write_repository(bundle, repository, Settings(), force=True, unverified=True)
    held = occupy(repository)  # a server may run on the old one, which it has open
    write_repository(bundle, repository, Settings(threads=5), force=True, unverified=True)
    os.close(held)
    assert tuned.settings_of(repository)["threads"] == 5


def test_a_link_to_a_repository_stays_one(repository, tmp_path, monkeypatch):
    (tmp_path / "current").symlink_to(repository)
    monkeypatch.setattr(tune.Tuning, "run", lambda self: self.chosen.update(threads=7))
    assert run("tune", tmp_path / "current").exit_code == 0
    assert (tmp_path / "current").is_symlink() and tuned.settings_of(repository)["threads"] == 7
    monkeypatch.chdir(repository)
    monkeypatch.setattr(tune.Tuning, "run", lambda self: self.chosen.update(threads=6))
    assert run("tune", ".").exit_code == 0 and tuned.settings_of(repository)["threads"] == 6


def test_a_repository_of_an_earlier_release_is_refused_before_anything_is_measured(repository):
    path = repository / "decoder" / "config.pbtxt"
    config = tuned._config(path.parent)
    del config.parameters["prefill_chunk"]
    path.write_text(str(config))
    seal(repository)
    done = run("tune", repository)
    assert done.exit_code == 1 and "earlier release" in done.stderr


def test_a_server_that_the_guard_started_has_the_repository(repository, tmp_path):
    """As in a container: the guard becomes the server."""
    program = tmp_path / "tritonserver"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    guard = [sys.executable, "-m", "cxr_triton.triton_repo.guard", str(program), f"--model-repository={repository}"]
    server = subprocess.Popen(guard)
    try:
        until_s = time.monotonic() + 60
        while "sleep" not in Path(f"/proc/{server.pid}/cmdline").read_text() and time.monotonic() < until_s:
            time.sleep(0.05)
        with pytest.raises(InvalidRequest, match="a server runs on it"), alone(repository):
            pass
    finally:
        server.kill()
        server.wait()
    with alone(repository):
        pass


@pytest.mark.parametrize("other", ["profile", "engine"])
def test_what_cannot_stand_beside_is_said_before_it_is_measured(bundle, tmp_path, monkeypatch, other):
    if other == "engine":
        beside, said = write_engine_bundle(tmp_path / "beside"), "is not measured on a CPU, so nothing is beside it"
    else:
        beside, said = (
            write_paper_bundle(tmp_path / "beside", max_sequence=2048),
            "of another shape; give one of random",
        )
        manifest = json.loads((beside / "manifest.json").read_text())
        manifest["geometry"]["layers"] = 2
        (beside / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(tune.Tuning, "run", lambda self: None)
    done = run("tune", bundle, "--beside", beside)
    assert done.exit_code == 1 and said in done.stderr, done.stderr


def test_what_cannot_be_tuned_is_said(repository, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, said in (
        (tmp_path / "empty", "holds no model 'cxr_reader'"),
        (write_engine_bundle(tmp_path / "engine"), "tensorrt and tensorrt-llm, are not tuned here"),
    ):
        done = run("tune", folder)
        assert done.exit_code == 1 and said in done.stderr, done.stderr
    (repository / "report" / "1" / "model.py").write_text("")
    assert "report/1/model.py was changed" in run("tune", repository).stderr
    for words in (["--streams", 0], ["--seconds", 0]):
        assert "[INVALID_REQUEST]" in run("tune", write_paper_bundle(tmp_path / words[0]), *words).stderr


def test_a_repository_that_cannot_be_exchanged_is_refused_before_anything_is_measured(repository, monkeypatch):
    monkeypatch.setattr(tune.Path, "is_mount", lambda path: True)
    assert "it is a mount point; tune the bundle" in run("tune", repository).stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt, InternalError("the engine's process ended with -9")])
def test_a_run_that_ends_early_keeps_what_was_measured_and_changes_nothing(repository, tmp_path, monkeypatch, error):
    def fail(self):
        self.chosen["threads"] = 7
        self.measured.append({"setting": "threads", "used": 0, "taken": 7, "values": [{"value": 7, "verdict": TAKEN}]})
        raise error

    monkeypatch.setattr(tune.Tuning, "run", fail)
    done = run("tune", repository, "--json", tmp_path / "out.json")
    assert done.exit_code == (130 if error is KeyboardInterrupt else 1) and "is as it was" in done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["measured"][0]["taken"] == 7 and result["written"] is False
    assert tuned.settings_of(repository)["threads"] == 0 and differences(repository) == []
    os.close(occupy(repository))


def test_what_was_measured_is_told_where_it_cannot_be_written(repository, tmp_path, monkeypatch):
    def full(subject, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tune.Tuning, "run", lambda self: self.chosen.update(threads=7))
    monkeypatch.setattr(tune, "save", full)
    done = run("tune", repository, "--json", tmp_path / "out.json")
    assert done.exit_code == 1 and "is as it was" in done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["chosen"]["threads"] == 7 and result["written"] is False


def test_another_bundle_that_fails_takes_nothing_of_what_was_measured(bundle, tmp_path, monkeypatch):
    def fail(self, folder, other):
        raise InternalError("the engine's process ended with -9")

    for name in ("_tower", "_decoder"):
        monkeypatch.setattr(tune.Tuning, name, lambda self: np.zeros((4, 64), np.float32))
    monkeypatch.setattr(tune, "prepared", lambda bundle: SimpleNamespace(input_ids=[]))
    monkeypatch.setattr(tune, "inputs", lambda step: ({}, 4))
    monkeypatch.setattr(tune, "prompt_of", lambda step: {})
    monkeypatch.setattr(tune.Tuning, "_beside", fail)
    made = tune.Tuning(tune.Subject.of(bundle), tune.Plan(), beside=[bundle])
    made.run()
    assert made.record()["beside"] == [{"bundle": bundle.name, "error": "the engine's process ended with -9"}]
    assert any("was not measured" in line for line in tune.lines(made.record()))


def test_a_dry_run_changes_nothing(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(tune.Tuning, "run", lambda self: self.chosen.update(threads=7))
    for words, threads in ((["--dry-run"], 0), ([], 7)):
        done = run("tune", repository, *words, "--json", tmp_path / "out.json")
        assert done.exit_code == 0, done.stderr
        assert json.loads((tmp_path / "out.json").read_text())["written"] is (threads == 7)
        assert tuned.settings_of(repository)["threads"] == threads
        assert (tuned.record_of(repository) is None) is (threads == 0)


# ---------------------------------------------------------------------------------------------------------- elsewhere


def test_only_what_speed_depends_on_makes_a_cpu_another():
    text = "processor : 0\nmodel name : Some CPU\nflags : fpu avx2 avx512_vnni\nprocessor : 1\nmodel name : Other\n"
    cpu = Cpu.of(text)
    assert (cpu.model, cpu.flags) == ("Some CPU", ("avx2", "avx512_vnni", "fpu"))
    assert Cpu.from_json(json.loads(json.dumps(cpu.to_json()))) == cpu
    record = RECORD | {"cpu": cpu.to_json()}
    assert tuned.differences(record, Cpu.of(text.replace("fpu ", "fpu newer_kernel "))) == []
    assert tuned.differences(record, Cpu.of(text.replace(" avx512_vnni", " amx_int8"))) == [
        "amx_int8 is new", "avx512_vnni is missing",
    ]  # fmt: skip
    (found,) = tuned.differences(record, Cpu.of(text.replace("Some CPU", "Newer CPU")))
    assert found == "the CPU is Newer CPU, it was Some CPU"
    assert Cpu.of("").flags == ()


def test_serving_says_when_a_repository_was_tuned_for_another_cpu(repository):
    assert tuned.complaint(repository) is None
    tuned.write_settings(repository, {}, RECORD | {"cpu": Cpu.here().to_json()})
    assert tuned.complaint(repository) is None
    tuned.write_settings(repository, {}, RECORD | {"cpu": ELSEWHERE})
    said = tuned.complaint(repository)
    assert "was tuned on Z80 with 1 core, 2026-11-28" in said and f"run `cxr-triton tune {repository}` again" in said


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', json.dumps(RECORD | {"cpu": {"model": 1}})])
def test_a_record_that_cannot_be_read_is_said(repository, text):
    (repository / "tune.json").write_text(text)
    with pytest.raises(InvalidBundle, match=r"tune\.json cannot be read; tune the repository again"):
        tuned.complaint(repository)
