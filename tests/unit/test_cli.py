"""The command line: how every verb fails, and what `read` prints, writes and ends with."""

import base64
import contextlib
import datetime
import http.server
import io
import itertools
import json
import os
import pty
import re
import resource
import signal
import socketserver
import subprocess
import sys
import threading
import types
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from fake_server import FakeServer, failure, pause, response
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cxr_triton import cli, extras
from cxr_triton.client.address import is_loopback
from cxr_triton.errors import CODES
from cxr_triton.pixels.sandbox import identify
from cxr_triton.reading import Reading, parse

TEXT = "<think> The heart is large. </think>\n<answer> Cardiomegaly </answer>"
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\r\x00"
STEERING = set("\x1b\x07\x9b\u202e\r\x00")


def reading(text=TEXT, **changes) -> Reading:
    facts = {
        "task": "findings",
        "prompt": "Find abnormalities and support devices.",
        "model": {"profile": "test", "engine": "none", "precision": "fp32"},
        "images": ({"rows": 64, "columns": 48, "preset": "as_is", "flags": ["lossy"]},),
        "usage": {"completion_tokens": 11},
        "timings_ms": {"decode": 2000.0, "total": 2500.0},
        "notice": "A test double answered.",
    }
    finish_reason = changes.pop("finish_reason", "stop")
    parsed = parse(text, grammar="think_answer", answer="labels", labels=("Cardiomegaly",), finish_reason=finish_reason)
    return Reading.of(parsed, **{**facts, **changes})


def answering(reading: Reading, *deltas: str):
    def answer(request, context):
        for delta in deltas or (reading.text,):
            yield response(delta)
        yield response("", reading.to_json(), final=True)

    return answer


@pytest.fixture
def png(tmp_path) -> Path:
    path = tmp_path / "DOE^JANE.png"
    ramp = np.add.outer(np.arange(64), np.arange(48)).astype(np.uint8)
    Image.fromarray(ramp).save(path)
    return path


def untraced(text: str) -> str:
    """Without the ids of its readings, of which no two are alike."""
    return re.sub(r"\b[0-9a-f]{32}\b", "", text)


def run(*args, **kwargs):
    return CliRunner().invoke(cli.main, [str(arg) for arg in args], **kwargs)


def started(*args, **kwargs) -> subprocess.Popen:
    code = "from cxr_triton.cli import main; main()"
    return subprocess.Popen([sys.executable, "-X", "faulthandler", "-c", code, *map(str, args)], **kwargs)


def ended(process: subprocess.Popen, timeout_s: float = 60.0) -> bytes:
    """What a process that has to end by now said on standard error; one that does not end says where it stands."""
    try:
        return process.communicate(timeout=timeout_s)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        pytest.fail(f"it did not end: {process.communicate()[1].decode(errors='replace')}")


def test_help_costs_little_and_imports_no_verb():
    code = (
        "import sys; from cxr_triton.cli import main; main(['--help'], standalone_mode=False);"
        "print(*[m for m in ('numpy', 'grpc', 'yaml', 'cxr_triton.client') if m in sys.modules], file=sys.stderr)"
    )
    costs = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert out.stderr.split() == []
    assert all(verb in out.stdout for verb in cli.VERBS)
    # Processor time, because other work may share the cores.
    assert min(costs) < 0.5


def commands(command=cli.main, path=()):
    """Every command after its words, the root left out."""
    if path:
        yield pytest.param(path, command, id=" ".join(path))
    for name in command.list_commands(None) if isinstance(command, click.Group) else ():
        yield from commands(command.get_command(click.Context(command), name), (*path, name))


@pytest.mark.parametrize(("path", "command"), list(commands()))
def test_every_help_is_asked_alike_and_has_examples_of_what_there_is(path, command):
    from cxr_triton.command import task_names
    from cxr_triton.profile import profile_names

    shown = run(*path, "-h")
    assert shown.exit_code == 0 and shown.output == run(*path, "--help").output
    examples = [line.split() for line in shown.output.partition("Example")[2].splitlines()[1:]]
    assert examples
    known = {"--task": task_names(), "--profile": profile_names()}
    for words in examples:
        assert words[: 1 + len(path)] == ["cxr-triton", *path]
        inner = command
        if isinstance(command, click.Group) and (found := command.commands.get(words[1 + len(path)])):
            inner = found
        options = {option for parameter in inner.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options
        for option, value in itertools.pairwise(words):
            assert value in known.get(option, [value])


def test_a_verb_that_is_called_by_itself_knows_the_same_help():
    """click keeps the options of a command's first help, whoever asks next."""
    verb = cli.main.get_command(None, "profiles")
    verb._help_option = None
    assert [CliRunner().invoke(verb, [option]).exit_code for option in ("--help", "-h")] == [0, 0]


@pytest.mark.parametrize("args", [["--nope"], ["read", "--nope"], ["bench", "run", "--repeats", "x"], ["gateway", "x"]])
def test_wrong_usage_is_said_as_every_other_error(args):
    result = run(*args)
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith("error: ")
    assert "Usage: " in result.stderr and "Error:" not in result.stderr


def test_a_failure_without_a_code_is_said_as_every_other_error(failing):
    failing(click.ClickException("what"))
    assert run("fail").stderr == "error: what\n"


@pytest.mark.parametrize(
    ("words", "among"),
    [
        ("read --task fin", "findings"),
        ("read --mode re", "reasoning"),
        ("sr --task fin", "findings"),
        ("export --profile che", "chexone"),
        ("quantize --profile che", "chexone"),
        ("verify --profile che", "chexone"),
        ("make-engine --recipe h100", "h100-fp8"),
        ("build --recipe h100", "h100-fp8"),
        ("recipes h100", "h100-fp8"),
        ("tasks che", "chexone"),
        ("ta", "tasks"),
    ],
)
def test_the_shell_completes_names(monkeypatch, words, among):
    given = f"cxr-triton {words}".split()
    monkeypatch.setenv("COMP_WORDS", " ".join(given))
    monkeypatch.setenv("COMP_CWORD", str(len(given) - 1))
    result = CliRunner().invoke(
        cli.main, prog_name="cxr-triton", complete_var="C", env={"C": "bash_complete"}, standalone_mode=True
    )
    assert f"plain,{among}" in result.output.splitlines()


def test_profiles_and_tasks_are_listed():
    from cxr_triton.profile import load_profile, profile_names

    listed = json.loads(run("profiles", "--json", "-").stdout)["profiles"]
    assert [profile["name"] for profile in listed] == list(profile_names())
    tasks = json.loads(run("tasks", "--json", "-").stdout)["tasks"]
    for profile in map(load_profile, profile_names()):
        mine = {task["name"]: task for task in tasks if task["profile"] == profile.name}
        assert list(mine) == list(profile.tasks) and mine[profile.default_task]["default"]
        assert all(mine[name]["variables"] == list(task.placeholders) for name, task in profile.tasks.items())
    shown = run("tasks", "chexone").stdout
    assert "findings*" in shown and "KEY question" in shown and "nv-reason" not in shown
    assert "did you mean 'chexone'" in run("tasks", "chexon").stderr


def test_an_unknown_verb_names_the_nearest():
    result = run("raed")
    assert result.exit_code == 2 and "did you mean 'read'?" in result.output


def test_an_unknown_verb_that_is_near_to_none_gets_them_all():
    result = run("wxyz")
    assert result.exit_code == 2 and "did you mean" not in result.output and "read, " in result.output


def test_a_missing_extra_names_the_install_command():
    code = "import sys; sys.modules['grpc'] = None; from cxr_triton.cli import main; main(['read', 'x'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 1
    assert extras.remedy("client") in out.stderr and "Traceback" not in out.stderr


@pytest.fixture
def failing(monkeypatch):
    """Install a verb `fail` that raises what it is given."""

    def install(error):
        def fail():
            raise error

        module = types.ModuleType("failing_verb")
        module.verb = click.command("fail")(fail)
        monkeypatch.setitem(sys.modules, "failing_verb", module)
        monkeypatch.setitem(cli.VERBS, "fail", ("failing_verb:verb", "local", "Fail."))

    return install


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_error_is_one_line_with_its_code(failing, code):
    failing(CODES[code]("what,\nwhere" + ESCAPES))
    result = run("fail")
    assert result.exit_code == (75 if code in ("QUEUE_FULL", "UNAVAILABLE") else 1)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: [{code}] what, where")
    assert not set(result.stderr) & STEERING


def test_a_bug_is_one_line_and_a_traceback_only_on_request(failing, monkeypatch):
    failing(ZeroDivisionError("division by zero"))
    result = run("fail")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "[INTERNAL] ZeroDivisionError" in result.stderr and "CXR_TRITON_DEBUG=1" in result.stderr
    monkeypatch.setenv("CXR_TRITON_DEBUG", "1")
    assert isinstance(run("fail").exception, ZeroDivisionError)


def test_a_file_that_cannot_be_written_is_one_line(failing):
    failing(PermissionError(13, "Permission denied", "/x/y"))
    result = run("fail")
    assert result.exit_code == 1 and "Permission denied: /x/y" in result.stderr and result.stderr.count("\n") == 1


def test_an_interrupted_verb_ends_with_130(failing):
    failing(KeyboardInterrupt())
    assert run("fail").exit_code == 130


def test_read_prints_the_text_then_what_was_read(png):
    with FakeServer(answering(reading(), TEXT[:9], TEXT[9:])) as server:
        result = run("read", png, "--url", server.url)
    assert result.exit_code == 0
    streamed, table = result.stdout.split("\n\n", 1)
    assert streamed == TEXT
    rows = {line[:9].strip(): line[9:].strip() for line in table.splitlines() if line[:9].strip()}
    assert rows["Status"] == "well formed" and rows["Findings"] == "Cardiomegaly"
    assert rows["Flags"] == "lossy compression"
    assert "5.0/s" in rows["Time"]
    assert rows["Notice"] == "Research only. Not for diagnosis." and "A test double answered." in table


def test_read_prints_scores_with_what_they_are(png):
    with FakeServer(answering(reading(scores={"Edema": -3.25, "Cardiomegaly": 8.0}))) as server:
        table = run("read", png, "--url", server.url, "--scores").stdout.split("\n\n", 1)[1]
    lines = [line[10:] for line in table.splitlines()]
    start = lines.index("    +8.0  Cardiomegaly")
    assert lines[start : start + 3] == ["    +8.0  Cardiomegaly", "    -3.2  Edema", "Log-odds, not calibrated."]


def test_read_flushes_every_delta(png):
    printed = threading.Event()

    def answer(request, context):
        yield response("first")
        # The server only goes on once the client's output showed the first delta.
        if printed.wait(60):
            yield response("second", reading().to_json(), final=True)

    with FakeServer(answer) as server:
        process = started("read", png, "--url", server.url, stdout=subprocess.PIPE)
        assert process.stdout.read(5) == b"first"
        printed.set()
        assert process.stdout.read(6) == b"second"
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_reasoning_is_dim_on_a_terminal_and_plain_elsewhere(png):
    with FakeServer(answering(reading())) as server:
        assert "\x1b" not in run("read", png, "--url", server.url).stdout
        leader, follower = pty.openpty()
        process = started("read", png, "--url", server.url, stdout=follower)
        process.wait(60)
        os.close(follower)
        shown = os.read(leader, 1 << 16).decode()
        os.close(leader)
    assert shown.startswith("\x1b[2m<think>") and "\x1b[0m" in shown


def test_a_terminal_shows_what_is_waited_for_until_the_first_text(png):
    leader, follower = pty.openpty()
    shown = b""

    def answer(request, context):
        nonlocal shown
        while b"reading DOE^JANE.png, " not in shown:  # goes on once the line is there
            shown += os.read(leader, 1 << 12)
        yield response(TEXT, reading().to_json(), final=True)

    with FakeServer(answer) as server:
        process = started("read", png, "--url", server.url, stderr=follower, stdout=subprocess.PIPE)
        out, _ = process.communicate(timeout=60)
    os.close(follower)
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(leader, 1 << 12):
            shown += data
    os.close(leader)
    assert process.returncode == 0 and TEXT in out.decode()
    assert shown.endswith(b"\r\x1b[K") and b" s\r\x1b[K" in shown


def test_text_of_a_server_cannot_steer_the_terminal(png):
    hostile = reading(f"<think> {ESCAPES} </think><answer> {ESCAPES}, Cardiomegaly </answer>", notice=ESCAPES)
    with FakeServer(answering(hostile)) as server:
        result = run("read", png, "--url", server.url)
    assert result.exit_code == 3
    assert not set(result.stdout) & STEERING
    assert r"\x1b[2J" in result.stdout and r"\u202eevil" in result.stdout


def test_json_of_a_server_s_text_cannot_either_and_is_the_same_json(png, tmp_path):
    hostile = reading(
        f"<think> {ESCAPES}\U000e0041é胸 </think><answer> {ESCAPES}, Cardiomegaly </answer>", notice=ESCAPES
    )
    with FakeServer(answering(hostile)) as server:
        result = run("read", png, "--url", server.url, "--json", "-")
        run("read", png, "--url", server.url, "--json", tmp_path / "reading.json")
    assert not set(result.output) & STEERING and "\U000e0041" not in result.stdout and "é胸" in result.stdout
    assert Reading.from_json(result.stdout) == hostile
    again = untraced((tmp_path / "reading.json").read_text())
    assert again == untraced(result.stdout) != result.stdout, "which may be shown by cat"


def test_text_of_a_profile_and_of_a_file_s_name_cannot_steer_the_terminal(tmp_path):
    profile = tmp_path / "mine.yaml"
    tasks = {"quiz": {"prompt": "x", "answer": "text", "description": ESCAPES}}
    licence = {"name": ESCAPES, "stated": ESCAPES, "non_commercial": False}
    said = {"extends": "chexone", "title": ESCAPES, "tasks": tasks, "licence": licence}
    profile.write_text(json.dumps(said))  # JSON is YAML
    for words in (
        ("tasks", profile),
        ("tasks", profile, "--json", "-"),
        ("export", tmp_path, "-o", tmp_path / "out", "--profile", profile),
        ("read", tmp_path / ESCAPES.replace("\0", "")),
        ("serve", tmp_path / ESCAPES.replace("\0", "")),
        ("build", tmp_path, "-o", tmp_path / "out", "--recipe", ESCAPES.replace("\0", "")),
    ):
        result = run(*words)
        assert result.output and not set(result.output) & STEERING, words


def test_json_goes_to_a_file_or_alone_to_standard_output(png, tmp_path):
    path = tmp_path / "reading.json"
    with FakeServer(answering(reading())) as server:
        assert run("read", png, "--url", server.url, "--json", path).exit_code == 0
        result = run("read", png, "--url", server.url, "--json", "-")
    assert Reading.from_json(path.read_text()) == reading()
    assert json.loads(untraced(result.stdout)) == {**json.loads(reading().to_json()), "trace_id": ""}
    assert TEXT in result.stderr and "Notice" in result.stderr


@pytest.mark.parametrize(
    ("text", "finish_reason", "status"),
    [(TEXT, "length", "truncated"), ("nothing", "stop", "malformed"), (TEXT.replace("Card", "Kard"), "stop", "out of")],
)
def test_a_reading_that_is_not_as_asked_is_shown_written_and_ends_with_3(png, tmp_path, text, finish_reason, status):
    path = tmp_path / "reading.json"
    with FakeServer(answering(reading(text, finish_reason=finish_reason))) as server:
        result = run("read", png, "--url", server.url, "--json", path)
    assert result.exit_code == 3 and status in result.stdout
    assert Reading.from_json(path.read_text()).text == text


@pytest.mark.slow
def test_no_reading_ends_with_1_and_no_server_with_75(png):
    with FakeServer(lambda request, context: iter([failure("[NOT_A_RADIOGRAPH] is a CT")])) as server:
        result = run("read", png, "--url", server.url)
        assert (result.exit_code, untraced(result.stderr)) == (1, "error: [NOT_A_RADIOGRAPH] is a CT (trace )\n")
    result = run("read", png, "--url", server.url)
    assert result.exit_code == 75 and "[UNAVAILABLE]" in result.stderr


def test_ctrl_c_cancels_on_the_server_and_ends_with_130(png):
    def answer(request, context):
        yield response("text")
        pause(context, 60)

    with FakeServer(answer) as server:
        process = started("read", png, "--url", server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout.read(4) == b"text"
        process.send_signal(signal.SIGINT)
        errors = ended(process)
        assert process.returncode == 130 and errors == b"interrupted\n"
        assert server.cancelled.wait(60)


def test_the_time_limit_cancels_on_the_server(png):
    def answer(request, context):
        pause(context, 60)
        yield response()

    with FakeServer(answer) as server:
        result = run("read", png, "--url", server.url, "--timeout-s", 0.3)
        assert result.exit_code == 1 and "[DEADLINE_EXCEEDED]" in result.stderr and "0.3 s" in result.stderr
        assert server.cancelled.wait(60)


def test_options_become_the_request(png, tmp_path):
    turns, earlier, other = tmp_path / "turns.json", tmp_path / "earlier.json", tmp_path / "prior.png"
    turns.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
    Image.linear_gradient("L").save(other)
    facts = [{"identity": identity} for identity in identify([other.read_bytes(), png.read_bytes()])]
    earlier.write_text(reading(images=facts).to_json())
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "string"}')
    with FakeServer(answering(reading(guide="json_schema"))) as server:
        options = ["--task", "vqa", "--mode", "instruct", "--var", "question=Which?", "--var", "options=A=1"]
        options += ["--var", "options=B", "--history", turns, "--history", earlier, "--max-new-tokens", 7]
        result = run(
            "read",
            other,
            png,
            "--url",
            server.url,
            *options,
            "--temperature",
            0.5,
            "--seed",
            3,
            "--identifiers",
            "hashed",
            "--guide",
            schema,
            "--logprobs",
            "--scores",
        )
        assert result.exit_code == 0
        assert server.asked == {
            "task": "vqa",
            "mode": "instruct",
            "variables": {"question": "Which?", "options": ["A=1", "B"]},
            "history": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": reading().prompt},
                {"role": "assistant", "content": TEXT},
            ],
            "max_new_tokens": 7,
            "temperature": 0.5,
            "seed": 3,
            "identifiers": "hashed",
            "guide": {"json_schema": {"type": "string"}},
            "logprobs": True,
            "scores": True,
        }
        assert "held to a JSON schema while it was written" in result.output
        assert run("read", png, "--url", server.url, "--guide", "answer").exit_code == 0
        assert server.asked["guide"] == "answer"
        images = server.requests[-2].raw_input_contents[0]
        assert images.index(other.read_bytes()) < images.index(png.read_bytes())


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--var", "novalue"], 2, "KEY=VALUE"),
        (["--guide", "answers"], 2, "neither none nor answer nor a JSON schema"),
        (["--guide", "bad.json"], 2, "neither none nor answer nor a JSON schema"),
        (["--guide", "text.json"], 2, "neither none nor answer nor a JSON schema"),
        (["--timeout-s", "0"], 2, "timeout-s"),
        (["no-such-file.dcm"], 2, "no-such-file.dcm"),
        (["--history", "bad.json"], 1, "[INVALID_REQUEST] bad.json"),
        (["--history", "text.json"], 1, "[INVALID_REQUEST] text.json"),
        (["--history", "other.json"], 1, "[INVALID_REQUEST] other.json: is not a reading"),
        (["--history", "deep.json"], 1, "[INVALID_REQUEST] deep.json"),
        (["--history", "numbers.json"], 1, "[INVALID_REQUEST] numbers.json"),
        (["--history", "image.json"], 1, "[INVALID_REQUEST] image.json"),
        (["--prompt", "Which?", "--task", "findings"], 2, "--prompt"),
        (["--prompt", "Which?", "--var", "a=b"], 2, "--prompt"),
        (["--url", "localhost"], 1, "localhost:8001"),
        (["--url", "http://localhost:8000/v2"], 1, "give host and port, localhost:8001"),
        (["--url", "https://host"], 1, "give host and port, host:8001"),
        (["--url", "localhost:70000"], 1, "no port from 1 to 65535"),
        (["--url", "localhost:grpc"], 1, "no port from 1 to 65535"),
        (["--url", "::1"], 1, "[::1]:8001"),
        (["--url", "[::1]"], 1, "[::1]:8001"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_sent(tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("text.json").write_text('"text"')
    Path("other.json").write_text("{}")
    Path("deep.json").write_text("[" * 100_000)
    Path("numbers.json").write_text("[1, 2]")
    Path("image.json").write_bytes(b"\x89PNG\r\n\x1a\n")
    with FakeServer(answering(reading())) as server:
        result = run("read", "--url", server.url, *args)
        assert result.exit_code == code and message in result.stderr
        assert server.requests == []


@pytest.mark.slow
def test_a_server_of_http_is_told_from_one_that_is_not_there():
    with socketserver.TCPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        result = run("read", "--prompt", "Which?", "--url", f"127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert result.exit_code == 75 and "does not speak gRPC" in result.stderr and "8001" in result.stderr


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("REQUEST.history: is empty, but task 'x' continues", "--history: is empty, but task 'x' continues"),
        ("REQUEST.history[1].role: is 'user'", "--history[1].role: is 'user'"),
        ("REQUEST.variables.question: is missing", "--var question: is missing"),
        ("unknown key 'a' in REQUEST.variables of task 'x'", "unknown key 'a' in --var of task 'x'"),
        ("IMAGES: 3 given, task 'x' takes 1", "FILE: 3 given, task 'x' takes 1"),
        ("IMAGES[0]: file is text", "DOE^JANE.png: file is text"),
        ("REQUEST: 9 bytes, allowed 5", "the request: 9 bytes, allowed 5"),
    ],
)
def test_a_servers_words_are_those_of_the_command_line(png, said, shown):
    with FakeServer(lambda request, context: iter([failure(f"[INVALID_REQUEST] {said}")])) as server:
        assert untraced(run("read", png, "--url", server.url).stderr) == f"error: [INVALID_REQUEST] {shown} (trace )\n"


def test_every_option_of_a_request_is_told_by_its_name():
    from cxr_triton.client.command import in_options, read
    from cxr_triton.request import _KEYS

    options = {option for parameter in read.params for option in parameter.opts}
    named = {in_options(f"REQUEST.{key}") for key in _KEYS}
    assert named <= options | {f"the request.{key}" for key in ("top_p", "repetition_penalty", "stop")}


def test_a_distant_server_without_encryption_is_warned_of(png, monkeypatch):
    with FakeServer(answering(reading())) as server:
        assert "unencrypted" not in run("read", png, "--url", server.url).stderr
        monkeypatch.setattr("cxr_triton.client.address.LOOPBACK", ())  # as if this address were another machine's
        assert f"unencrypted to {server.url}" in run("read", png, "--url", server.url).stderr


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.0.1", "localhost", "::1", "[::1]", "::ffff:127.0.0.1")),
        *((host, False) for host in ("", "0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "localhost.example")),
    ],
)
def test_loopback_is_this_machine_alone(host, is_here):
    assert is_loopback(host) == is_here


def test_html_shows_picture_file_name_time_and_conversation(png, tmp_path):
    out, turns = tmp_path / "page.html", tmp_path / "turns.json"
    turns.write_text(json.dumps([{"role": "user", "content": "Earlier?"}, {"role": "assistant", "content": "Yes."}]))
    facts = [{**reading().images[0], "identity": identity} for identity in identify([png.read_bytes()])]
    with FakeServer(answering(reading(images=facts))) as server:
        options = ["--url", server.url, "--html", out, "--history", turns]
        assert run("read", png, *options).exit_code == 0
        page = out.read_text()
        assert run("read", png, *options, "--identifiers", "hashed").exit_code == 0
    assert png.name in page and "Cardiomegaly" in page and "Not for diagnosis" in page
    assert png.name not in out.read_text()
    assert "Earlier?" in page and "Yes." in page
    (read_at,) = re.findall(r'<time datetime="([^"]+)">', page)
    age = datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(read_at)
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=5)

    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert np.array_equal(np.asarray(shown), np.asarray(Image.open(png)))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_json_says_what_it_was_given_and_keeps_short_lists_in_a_line(value):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.write_json({"value": value, "times": [0.5, -1e-07, None, "ok"]}, "-")
    assert json.loads(out.getvalue()) == {"value": value, "times": [0.5, -1e-07, None, "ok"]}
    assert '"times": [0.5, -1e-07, null, "ok"]' in out.getvalue()
