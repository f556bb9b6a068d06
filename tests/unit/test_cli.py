"""The command line: how every verb fails, and what `read` prints, writes and ends with."""

import base64
import contextlib
import datetime
import io
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cxr_triton import cli
from cxr_triton.errors import CODES
from cxr_triton.reading import Reading, parse
from cxr_triton.sandbox import identify

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fake_server import FakeServer, failure, pause, response

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


def run(*args, **kwargs):
    return CliRunner().invoke(cli.main, [str(arg) for arg in args], **kwargs)


def started(*args, **kwargs) -> subprocess.Popen:
    code = "from cxr_triton.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], **kwargs)


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


def test_an_unknown_verb_names_the_nearest():
    result = run("raed")
    assert result.exit_code == 2 and "did you mean 'read'?" in result.output


def test_a_missing_extra_names_the_install_command():
    code = "import sys; sys.modules['grpc'] = None; from cxr_triton.cli import main; main(['read', 'x'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 1
    assert cli.remedy("client") in out.stderr and "Traceback" not in out.stderr


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


def test_read_flushes_every_delta(png):
    printed = threading.Event()

    def answer(request, context):
        yield response("first")
        # The server only goes on once the client's output showed the first delta.
        if printed.wait(10):
            yield response("second", reading().to_json(), final=True)

    with FakeServer(answer) as server:
        process = started("read", png, "--url", server.url, stdout=subprocess.PIPE)
        assert process.stdout.read(5) == b"first"
        printed.set()
        assert process.stdout.read(6) == b"second"
        process.communicate(timeout=10)
        assert process.returncode == 0


def test_reasoning_is_dim_on_a_terminal_and_plain_elsewhere(png):
    with FakeServer(answering(reading())) as server:
        assert "\x1b" not in run("read", png, "--url", server.url).stdout
        leader, follower = pty.openpty()
        process = started("read", png, "--url", server.url, stdout=follower)
        process.wait(20)
        os.close(follower)
        shown = os.read(leader, 1 << 16).decode()
        os.close(leader)
    assert shown.startswith("\x1b[2m<think>") and "\x1b[0m" in shown


def test_text_of_a_server_cannot_steer_the_terminal(png):
    hostile = reading(f"<think> {ESCAPES} </think><answer> {ESCAPES}, Cardiomegaly </answer>", notice=ESCAPES)
    with FakeServer(answering(hostile)) as server:
        result = run("read", png, "--url", server.url)
    assert result.exit_code == 3
    assert not set(result.stdout) & STEERING
    assert r"\x1b[2J" in result.stdout and r"\u202eevil" in result.stdout


def test_json_goes_to_a_file_or_alone_to_standard_output(png, tmp_path):
    path = tmp_path / "new" / "reading.json"
    with FakeServer(answering(reading())) as server:
        assert run("read", png, "--url", server.url, "--json", path).exit_code == 0
        result = run("read", png, "--url", server.url, "--json", "-")
    assert Reading.from_json(path.read_text()) == reading()
    assert json.loads(result.stdout) == json.loads(reading().to_json())
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


def test_no_reading_ends_with_1_and_no_server_with_75(png):
    with FakeServer(lambda request, context: iter([failure("[NOT_A_RADIOGRAPH] is a CT")])) as server:
        result = run("read", png, "--url", server.url)
        assert (result.exit_code, result.stderr) == (1, "error: [NOT_A_RADIOGRAPH] is a CT\n")
    result = run("read", png, "--url", server.url)
    assert result.exit_code == 75 and "[UNAVAILABLE]" in result.stderr


def test_ctrl_c_cancels_on_the_server_and_ends_with_130(png):
    def answer(request, context):
        yield response("text")
        pause(context, 20)

    with FakeServer(answer) as server:
        process = started("read", png, "--url", server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout.read(4) == b"text"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 130 and errors == b"interrupted\n"
        assert server.cancelled.wait(10)


def test_the_time_limit_cancels_on_the_server(png):
    def answer(request, context):
        pause(context, 20)
        yield response()

    with FakeServer(answer) as server:
        result = run("read", png, "--url", server.url, "--timeout-s", 0.3)
        assert result.exit_code == 1 and "[DEADLINE_EXCEEDED]" in result.stderr and "0.3 s" in result.stderr
        assert server.cancelled.wait(10)


def test_options_become_the_request(png, tmp_path):
    turns, earlier, other = tmp_path / "turns.json", tmp_path / "earlier.json", tmp_path / "prior.png"
    turns.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
    Image.linear_gradient("L").save(other)
    facts = [{"identity": identity} for identity in identify([other.read_bytes(), png.read_bytes()])]
    earlier.write_text(reading(images=facts).to_json())
    with FakeServer(answering(reading())) as server:
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
        }
        images = server.requests[-1].raw_input_contents[0]
        assert images.index(other.read_bytes()) < images.index(png.read_bytes())


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--var", "novalue"], 2, "KEY=VALUE"),
        (["--timeout-s", "0"], 2, "timeout-s"),
        (["no-such-file.dcm"], 2, "no-such-file.dcm"),
        (["--history", "bad.json"], 1, "[INVALID_REQUEST] bad.json"),
        (["--history", "text.json"], 1, "[INVALID_REQUEST] text.json"),
        (["--history", "other.json"], 1, "[SERVER_MISMATCH]"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_sent(tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("text.json").write_text('"text"')
    Path("other.json").write_text("{}")
    with FakeServer(answering(reading())) as server:
        result = run("read", "--url", server.url, *args)
        assert result.exit_code == code and message in result.stderr
        assert server.requests == []


def test_a_distant_server_without_encryption_is_warned_of(png):
    with FakeServer(answering(reading())) as server:
        assert "unencrypted" not in run("read", png, "--url", server.url).stderr
    with FakeServer(answering(reading()), host="127.0.0.2") as server:
        assert "unencrypted to 127.0.0.2" in run("read", png, "--url", server.url).stderr


def test_html_shows_picture_file_name_time_and_conversation(png, tmp_path):
    out, turns = tmp_path / "new" / "page.html", tmp_path / "turns.json"
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
