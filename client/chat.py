"""`cxr-triton chat`: a dialogue about one patient's radiographs in the terminal."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from cxr_triton.cli import EXIT_NOT_AS_ASKED, MODES, printable, printable_json
from cxr_triton.client.command import FILE, answered, connect, connection, in_options, summary
from cxr_triton.client.conversation import Conversation
from cxr_triton.client.reader import Reader, ReadingStream
from cxr_triton.errors import CxrError, InvalidRequest
from cxr_triton.files import write
from cxr_triton.profile import load_profile, profile_names
from cxr_triton.reading import NOT_FOR_DIAGNOSIS

HELP = {
    "/task NAME [KEY=VALUE]...": "ask a task of the served profile, such as /task vqa question='Which side?'",
    "/tasks": "what the known profiles can be asked",
    "/new [FILE]...": "begin again, with the same pictures or with others",
    "/save FILE.json": "write the turns so far, for --history of `read`",
    "/help": "this list",
    "/quit": "leave; Ctrl-D too",
}
"""What a line that begins with a slash does; Ctrl-C stops the answer that is coming, and no other."""


class _Leave(Exception):
    """The user has had enough."""


class Chat:
    """The dialogue: a line in, what it asks for done.

    Parameters
    ----------
    reader : Reader
    files : sequence of Path
        The pictures.
    options : dict
        Of every turn, as `Reader.read` takes them.
    as_json : bool
        A READING, or ``{"error": …}``, a line for each turn on standard output; everything else on standard error.

    Attributes
    ----------
    failed : bool
        A turn had no reading, or one that is not well formed.
    """

    def __init__(self, reader: Reader, files: Sequence[Path], options: dict, *, as_json: bool):
        self._reader, self._options, self._as_json = reader, options, as_json
        self._out = sys.stderr if as_json else sys.stdout
        self.failed = False
        self._commands: dict[str, Callable[[list[str]], None]] = {
            "task": self._task,
            "tasks": self._tasks,
            "new": self._new,
            "save": self._save,
            "help": self._help,
            "quit": self._quit,
        }
        self._begin(files)

    def _begin(self, files: Sequence[Path]) -> None:
        images = [_content(file) for file in files]
        self._conversation: Conversation[ReadingStream] = self._reader.open(images, **self._options)
        self._files = list(files)

    def take(self, line: str) -> None:
        """Do what a line asks for; its errors are said, and change nothing."""
        line = line.strip()
        if not line:
            return
        try:
            if line.startswith("/"):
                self._command(line[1:])
            else:
                self._ask(prompt=line)
        except CxrError as error:
            self.failed = True
            trace = f" (trace {error.trace_id})" if error.trace_id else ""
            said = f"[{error.code}] {in_options(error.message, self._files)}{trace}"
            click.echo(printable(f"error: {said}"), err=True)
            if self._as_json:
                told = {"code": error.code, "message": error.message}
                click.echo(json.dumps({"error": told | ({"trace_id": error.trace_id} if error.trace_id else {})}))

    def _command(self, line: str) -> None:
        try:
            name, *words = shlex.split(line) or [""]
        except ValueError as error:
            raise InvalidRequest(f"/{line[:60]}: {error}; close what is quoted") from None
        if name not in self._commands:
            raise InvalidRequest(f"/{name[:60]} is none of {', '.join('/' + each for each in self._commands)}")
        self._commands[name](words)

    def _ask(self, **asked) -> None:
        def show(delta: str) -> None:
            text = printable(delta)
            click.echo(click.style(text, dim=True) if self._out.isatty() else text, self._out, nl=False)

        stream = self._conversation.ask(**asked)
        try:
            reading = answered(stream, self._reader.url, self._files, show)
        except KeyboardInterrupt:
            click.echo("\nstopped; the conversation is as it was before", self._out)
            return
        click.echo("\n", self._out)
        for text in summary(reading):
            click.echo(printable(text), self._out)
        self.failed |= reading.status != "ok"
        if self._as_json:
            click.echo(json.dumps(json.loads(reading.to_json())))

    def _task(self, words: list[str]) -> None:
        if not words:
            raise InvalidRequest("/task needs a name; /tasks lists them")
        name, *pairs = words
        if wrong := [pair for pair in pairs if "=" not in pair]:
            raise InvalidRequest(f"/task {name}: {wrong[0][:60]!r} has no '='; write KEY=VALUE")
        variables: dict[str, str | list[str]] = {}
        for key, value in (pair.split("=", 1) for pair in pairs):
            before = variables.get(key)
            variables[key] = value if before is None else [*([before] if isinstance(before, str) else before), value]
        self._ask(task=name, variables=variables or None)

    def _tasks(self, words: list[str]) -> None:
        turns = self._conversation.turns
        served = turns[-1].model.get("profile") if turns else None
        for name in [served] if served in profile_names() else profile_names():
            for task, each in load_profile(name).tasks.items():
                click.echo(printable(f"{name:<18} {task:<24} {each.description}"), self._out)

    def _new(self, words: list[str]) -> None:
        files = [Path(word) for word in words] or self._files
        for file in files:
            if not file.is_file():
                raise InvalidRequest(f"/new: {file} is no file; name radiographs")
        self._begin(files)
        click.echo(printable(f"a new conversation about {_named(files)}"), self._out)

    def _save(self, words: list[str]) -> None:
        if len(words) != 1:
            raise InvalidRequest("/save needs one file name")
        readings = [json.loads(reading.to_json()) for reading in self._conversation.turns]
        if not readings:
            raise InvalidRequest("/save: there is no turn yet; ask something first")
        try:
            write(Path(words[0]), printable_json(readings) + "\n")
        except OSError as error:
            raise InvalidRequest(f"/save: {words[0]} cannot be written ({error.strerror})") from None
        click.echo(printable(f"{len(readings)} turns in {words[0]}"), self._out)

    def _help(self, words: list[str]) -> None:
        for command, meaning in HELP.items():
            click.echo(f"{command:<26} {meaning}", self._out)

    def _quit(self, words: list[str]) -> None:
        raise _Leave


@click.command(short_help="Talk about radiographs with a running server.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE)
@click.option("--mode", shell_complete=MODES, metavar="NAME", help="How to answer, a mode of the served profile.")
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), metavar="T", help="0 takes the likeliest token each time.")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Makes an answer with a temperature repeatable.")
@connection
@click.option(
    "--json-lines",
    "as_json",
    is_flag=True,
    help="One READING a line on standard output; what people read goes elsewhere.",
)
def chat(*, files, mode, max_new_tokens, temperature, seed, as_json, **server):
    """Ask about one patient's radiographs, one question after the other; earlier turns go along.

    FILEs are DICOM Part 10, PNG or JPEG: prior first, current last. A line is a question, or a command that begins with
    a slash; /help lists them. Ctrl-C stops the answer that is coming. Lines may also come from a file or a pipe.

    Exit status: 0; 3 when a turn had no reading, or one that is not well formed; 130 after Ctrl-C at the prompt.
    """
    options = {"mode": mode, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    images = [file.read_bytes() for file in files]
    with connect(images, **server) as reader:
        dialogue = Chat(reader, files, options, as_json=as_json)
        out = sys.stderr if as_json else sys.stdout
        click.echo(f"{NOT_FOR_DIAGNOSIS} {printable(_named(files))}; /help lists the commands.", out)
        try:
            for line in _lines(out):
                dialogue.take(line)
        except _Leave:
            pass
    if dialogue.failed and not sys.stdin.isatty():
        sys.exit(EXIT_NOT_AS_ASKED)


def _lines(out) -> Iterator[str]:
    """What is typed, with the line editing that Python has, or comes through a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  # input() then has it

    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo("", out)
            return


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{file}: cannot be read ({error.strerror}); name radiographs") from None


def _named(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)
