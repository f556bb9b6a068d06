"""Dialogues through both clients and the terminal, against an endpoint that answers what the test says."""

import asyncio
import contextlib
import dataclasses
import errno
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fake_server import FakeServer, empty_final, failure, pause, response
from PIL import Image
from tritonclient.utils import deserialize_bytes_tensor

from cxr_triton.cli import main
from cxr_triton.client import AsyncReader, Reader
from cxr_triton.errors import InvalidRequest, QueueFull, ReadingMismatch
from cxr_triton.identity import pixels_digest, sha256
from cxr_triton.reading import Reading, parse
from cxr_triton.request import MAX_TURNS


def drawn(shade: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.add.outer(np.arange(64), np.arange(48)).astype(np.uint8) + np.uint8(shade)).save(out, "PNG")
    return out.getvalue()


PICTURE, ANOTHER = drawn(90), drawn(91)
NOT_FOR_DIAGNOSIS = "Research only. Not for diagnosis."


def pixels_of(image: bytes) -> str:
    return pixels_digest(np.asarray(Image.open(io.BytesIO(image))))


def reading(prompt: str, text: str, *images: bytes) -> Reading:
    parsed = parse(text, grammar="think_answer", answer="text")
    facts = tuple({"identity": {"file_sha256": sha256(image), "pixels_sha256": pixels_of(image)}} for image in images)
    return Reading.of(parsed, task=None, prompt=prompt, model={"profile": "test"}, images=facts, notice="A double.")


def tensor(request, name) -> list[bytes]:
    names = [each.name for each in request.inputs]
    if name not in names:
        return []
    return deserialize_bytes_tensor(request.raw_input_contents[names.index(name)]).tolist()


def asked(request) -> dict:
    return json.loads(tensor(request, "REQUEST")[0])


def answering(*endings):
    """Answers each request with the number of its turn; an ending that is no None happens in place of that."""
    left = list(endings)

    def answer(request, context):
        ending = left.pop(0) if left else None
        if ending:
            yield from ending(context)
            return
        number = len(asked(request).get("history", [])) // 2 + 1
        text = f"<think> turn {number} </think>\n<answer> A{number} </answer>"
        prompt = asked(request).get("prompt") or f"task {asked(request).get('task')}"
        yield response(text)
        yield response("", reading(prompt, text, *tensor(request, "IMAGES")).to_json(), final=True)

    return answer


def refusing(context):
    yield failure("[QUEUE_FULL] 9 requests wait; retry later")
    yield empty_final()


def hanging(context):
    yield response("<think> I begin")
    pause(context, 30)


class Both:
    """A conversation through either client, as blocking code."""

    def __init__(self, kind, server, **options):
        self.runner = asyncio.Runner()
        self.reader = self.run(self.opened(kind, server.url))
        self.conversation = self.reader.open(PICTURE, **options)

    @staticmethod
    async def opened(kind, url):
        return kind(url)

    def run(self, result):
        return self.runner.run(result) if asyncio.iscoroutine(result) else result

    def ask(self, *args, **options) -> Reading:
        async def go(stream):
            return await stream.result()

        stream = self.conversation.ask(*args, **options)
        return stream.result() if isinstance(self.reader, Reader) else self.run(go(stream))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.run(self.reader.close())
        self.runner.close()


both = pytest.mark.parametrize("kind", [Reader, AsyncReader])


@both
def test_each_turn_takes_along_what_was_asked_and_answered(kind):
    with FakeServer(answering()) as server, Both(kind, server, temperature=0.0) as chat:
        chat.ask(task="findings", seed=4)
        answer = chat.ask("And the left side?").text
        assert chat.ask("Sure?", temperature=1.0).answer == "A3"
        requests = [asked(request) for request in server.requests]
        assert [tensor(request, "IMAGES") for request in server.requests] == [[PICTURE]] * 3
    assert "history" not in requests[0] and requests[0]["task"] == "findings" and requests[0]["seed"] == 4
    assert [turn["role"] for turn in requests[2]["history"]] == ["user", "assistant"] * 2
    assert requests[2]["history"][2:] == [
        {"role": "user", "content": "And the left side?"},
        {"role": "assistant", "content": answer},
    ]
    assert [request["temperature"] for request in requests] == [0.0, 0.0, 1.0]
    assert [each.answer for each in chat.conversation.turns] == ["A1", "A2", "A3"]


@both
def test_a_turn_that_fails_leaves_no_trace(kind):
    with FakeServer(answering(None, refusing)) as server, Both(kind, server) as chat:
        chat.ask("First?")
        with pytest.raises(QueueFull):
            chat.ask("Second?")
        assert chat.ask("Second again?").answer == "A2"
        assert len(asked(server.requests[-1])["history"]) == 2


def test_a_turn_that_is_closed_leaves_no_trace():
    with FakeServer(answering(None, hanging)) as server, Reader(server.url) as reader:
        chat = reader.open([PICTURE])
        chat.ask("First?").result()
        stream = chat.ask("Second?")
        next(stream)
        with pytest.raises(InvalidRequest, match="still under way"):
            chat.ask("Third?")
        stream.close()
        assert chat.ask("Second again?").result().answer == "A2"
        assert len(chat.turns) == 2


def test_a_conversation_of_full_length_is_refused_before_it_is_sent():
    turns = [reading(f"q{number}", "<think> a </think> <answer> b </answer>", PICTURE) for number in range(MAX_TURNS)]
    with FakeServer(answering()) as server, Reader(server.url) as reader:
        assert reader.open(PICTURE, follow=turns[: MAX_TURNS // 2]).ask("More?").result()
        with pytest.raises(InvalidRequest, match=r"17 turns, .*open a new one"):
            reader.open(PICTURE, follow=turns[: MAX_TURNS // 2 + 1]).ask("More?")
        assert len(server.requests) == 1


def test_another_patients_reading_is_not_followed():
    with Reader("127.0.0.1:1") as reader:
        mine = reading("q", "<think> a </think> <answer> b </answer>", PICTURE)
        assert reader.open(PICTURE, follow=[mine]).turns == (mine,)
        with pytest.raises(ReadingMismatch, match="turn 2"):
            reader.open(PICTURE, follow=[mine, reading("q", "", ANOTHER)])
        with pytest.raises(ReadingMismatch, match="does not say"):
            reader.open(PICTURE, follow=[dataclasses.replace(mine, images=({},))])


# ------------------------------------------------------------------------------------------------------ terminal


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "chest.png"
    path.write_bytes(PICTURE)
    return path


def chat(server, *arguments, lines):
    text = "".join(f"{line}\n" for line in lines)
    return CliRunner().invoke(main, ["chat", *map(str, arguments), "--url", server.url], input=text)


def test_lines_of_a_pipe_are_turns(picture, tmp_path):
    saved = tmp_path / "talk.json"
    with FakeServer(answering()) as server:
        lines = [
            "What is seen?",
            "",
            "/task vqa question='Which side?' options=L options=R",
            f"/save {saved}",
            "/new",
            "Again?",
        ]
        result = chat(server, picture, lines=lines)
        requests = [asked(request) for request in server.requests]
    assert result.exit_code == 0, result.output
    assert NOT_FOR_DIAGNOSIS in result.output and "turn 2" in result.output and "2 turns in" in result.output
    assert requests[1]["task"] == "vqa" and requests[1]["variables"] == {
        "question": "Which side?",
        "options": ["L", "R"],
    }
    assert "history" not in requests[2], "a new conversation"
    assert [each["prompt"] for each in json.loads(saved.read_text())] == ["What is seen?", "task vqa"]


def test_what_was_saved_goes_on_in_read(picture, tmp_path):
    saved, other = tmp_path / "talk.json", tmp_path / "other.png"
    other.write_bytes(ANOTHER)
    with FakeServer(answering()) as server:
        chat(server, picture, lines=["One?", "Two?", f"/save {saved}"])
        run = ["read", str(picture), "--url", server.url, "--follow", str(saved), "Provide differentials."]
        result = CliRunner().invoke(main, run)
        assert result.exit_code == 0, result.output
        assert asked(server.requests[-1])["prompt"] == "Provide differentials."
        assert [turn["content"] for turn in asked(server.requests[-1])["history"]][::2] == ["One?", "Two?"]
        refused = CliRunner().invoke(main, [run[0], str(other), *run[2:]])
        assert refused.exit_code == 1 and "READING_MISMATCH" in refused.output
        missing = CliRunner().invoke(main, ["read", str(picture), str(tmp_path / "no.png"), "--url", server.url])
        assert missing.exit_code == 2 and "does not exist" in missing.output
        assert len(server.requests) == 3


def test_mistakes_are_said_and_change_nothing(picture):
    lines = [
        "/tusk",
        "/task",
        "/task vqa question",
        "/new nothing.png",
        "/save",
        "/save x.json",
        "/task 'open",
        "Fine?",
    ]
    with FakeServer(answering(refusing)) as server:
        result = chat(server, picture, lines=[*lines, "And now?"])
    assert result.exit_code == 3, "one turn had no reading"
    for said in (
        "none of /task",
        "needs a name",
        "has no '='",
        "is no file",
        "one file name",
        "no turn yet",
        "close what",
        "QUEUE_FULL",
    ):
        assert said in result.output
    assert "turn 1" in result.output and len(server.requests) == 2


def test_new_with_a_file_that_cannot_be_read_goes_on_with_what_there_is(picture, monkeypatch):
    """As of a disk that fails in the middle: such an error names no file."""
    bad, read_bytes = picture.with_name("bad.png"), Path.read_bytes
    bad.touch()

    def fail(path):
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with FakeServer(answering()) as server:
        result = chat(server, picture, lines=["One?", f"/new {picture} {bad}", "Two?"])
        requests = [asked(request) for request in server.requests]
    assert result.exit_code == 3 and f"{bad}: cannot be read (Input/output error)" in result.output
    assert [turn["content"] for turn in requests[1]["history"]][::2] == ["One?"], "the conversation was not left"
    assert [tensor(request, "IMAGES") for request in server.requests] == [[PICTURE]] * 2


def test_each_turn_is_a_line_of_json(picture):
    with FakeServer(answering(None, refusing)) as server:
        result = chat(server, picture, "--json-lines", lines=["One?", "Two?"])
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert Reading.from_json(json.dumps(first)).answer == "A1" and second["error"]["code"] == "QUEUE_FULL"


def test_text_of_a_model_does_not_steer_the_terminal(picture):
    def steering(context):
        text = "<think> \x1b[2J\u202e </think> <answer> fine </answer>"
        yield response(text)
        yield response("", reading("q", text, PICTURE).to_json(), final=True)

    with FakeServer(answering(steering)) as server:
        result = chat(server, picture, "--json-lines", lines=["One?"])
    assert "\x1b" not in result.output and "\u202e" not in result.output


@pytest.mark.slow
def test_ctrl_c_stops_one_answer_and_at_the_prompt_it_leaves(picture):
    """On a terminal of its own, with a real signal."""
    with FakeServer(answering(None, hanging)) as server:
        ours, theirs = pty.openpty()
        command = "import sys; from cxr_triton.cli import main; main(sys.argv[1:])"
        arguments = [sys.executable, "-c", command, "chat", str(picture), "--url", server.url]
        child = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        screen = Screen(ours)
        screen.until("commands.", "> ")
        os.write(ours, b"One?\n")
        screen.until("turn 1", "\n> ")
        os.write(ours, b"Two?\n")
        screen.until("I begin")
        child.send_signal(signal.SIGINT)
        screen.until("stopped", "\n> ")
        assert server.cancelled.wait(60)
        os.write(ours, b"Three?\n")
        screen.until("turn 2", "\n> ")
        for _ in range(20):  # a signal just before readline waits is seen with the next key only
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1)
                break
        assert child.wait(1) == 130
        os.close(ours)


class Screen:
    """What a terminal has shown."""

    def __init__(self, descriptor):
        self._descriptor, self._text = descriptor, ""

    def until(self, *texts, seconds=60):
        """Read until the texts have come, one after the other."""
        ends = time.monotonic() + seconds
        for text in texts:
            while text not in self._text:
                assert time.monotonic() < ends, f"no {text!r} in {self._text!r}"
                if select.select([self._descriptor], [], [], 0.1)[0]:
                    self._text += os.read(self._descriptor, 65536).decode(errors="replace")
            self._text = self._text.partition(text)[2]
