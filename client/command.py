"""`cxr-triton read`: stream one reading to the terminal, then show, store and draw its result."""

from __future__ import annotations

import datetime
import json
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from cxr_triton.cli import (
    EXIT_FAILED,
    EXIT_NOT_AS_ASKED,
    MODES,
    OUT_FILE,
    OUT_FOLDER,
    TASKS,
    Waiting,
    access_options,
    json_option,
    printable,
    trace_option,
    write_json,
)
from cxr_triton.client import otlp
from cxr_triton.client.address import leaves_machine
from cxr_triton.client.conversation import turns_of
from cxr_triton.client.folder import DICOMDIR, Row, files_in, read_folder
from cxr_triton.client.limits import Access, Timeouts
from cxr_triton.client.page import decode_rate, draw, reading_page
from cxr_triton.client.reader import Reader, ReadingStream
from cxr_triton.errors import CxrError, InvalidRequest, ServerMismatch
from cxr_triton.files import write
from cxr_triton.guide import MODE_GUIDES
from cxr_triton.identity import IDENTIFIERS, require_same_images
from cxr_triton.numbers import duration
from cxr_triton.pixels.flags import FLAGS as IMAGE_FLAGS
from cxr_triton.pixels.sandbox import identify
from cxr_triton.reading import FLAGS as READING_FLAGS
from cxr_triton.reading import NOT_FOR_DIAGNOSIS, STATUSES, Reading

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def connection(command):
    """Options of a verb that reads through a server; `connect` takes their values."""
    options = (
        click.option(
            "--url", default="127.0.0.1:8001", show_default=True, help="Host and port of Triton's gRPC endpoint."
        ),
        click.option(
            "--timeout-s",
            type=click.FloatRange(0, min_open=True),
            default=600,
            show_default=True,
            metavar="S",
            help="Longest wait for the whole reading.",
        ),
        access_options,
        trace_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def connect(
    images: Sequence[bytes] | Path,
    *,
    url: str,
    timeout_s: float,
    trace_otlp: str | None,
    **access: Path | None,
) -> Reader:
    """A reader at `url`; warns where `images` would travel in clear text, and sends spans where it is told to."""
    otlp.start(trace_otlp, "read", lambda said: click.echo(f"warning: {printable(said)}", err=True))
    let_in = Access.of(**access)
    reader = Reader(url, timeouts=Timeouts(first_delta_s=None, total_s=timeout_s), **vars(let_in))
    if images and not let_in.tls and leaves_machine(url):
        click.echo(f"warning: the pictures travel unencrypted to {printable(url)}; use --tls-ca", err=True)
    return reader


unchecked_reading_option = click.option(
    "--unchecked-reading",
    is_flag=True,
    help="Take a reading that does not say which images it is of, as older servers wrote them.",
)


def require_readings_of(
    files: Sequence[Path], images: Sequence[bytes], readings: Sequence[tuple[str, Reading]], *, unchecked_reading: bool
) -> None:
    """Refuse stored readings, each after the name of its file, that are not of `files`; `images` are their contents.

    Raises
    ------
    ReadingMismatch
        See `cxr_triton.identity.require_same_images`.
    """
    are_known = any("identity" in facts for _, reading in readings for facts in reading.images)
    given = identify(images) if are_known else [{} for _ in images]
    names = [file.name for file in files]
    for stored, reading in readings:
        changed = require_same_images(
            reading.images, given, names=names, reading=stored, unchecked_reading=unchecked_reading
        )
        for name in changed:
            message = (
                f"warning: {name} has other bytes than the file of {stored}; its UIDs and stored pixels are the same"
            )
            click.echo(printable(message), err=True)


@click.command(short_help="Read radiographs through a running server.")
@click.argument("files", metavar="[FILE|FOLDER]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--follow",
    metavar="READING.json",
    type=FILE,
    help="Go on from what --json wrote about the same FILEs; the last argument may then be what to ask.",
)
@click.option(
    "--task",
    shell_complete=TASKS,
    metavar="NAME",
    help="What to ask, a task of the served profile; its default task if left out.",
)
@click.option("--prompt", metavar="TEXT", help="Ask this in place of a task.")
@click.option("--mode", shell_complete=MODES, metavar="NAME", help="How to answer, a mode of the served profile.")
@click.option(
    "--var",
    "variables",
    metavar="KEY=VALUE",
    multiple=True,
    help="Value of a placeholder of the task's prompt; a KEY given more than once becomes lettered options.",
)
@click.option(
    "--history",
    metavar="FILE.json",
    multiple=True,
    type=FILE,
    help="Earlier turns, oldest file first: a list of {role, content}, or what --json or chat's /save wrote about the "
    "same FILEs.",
)
@unchecked_reading_option
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), metavar="T", help="0 takes the likeliest token each time.")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Makes an answer with a temperature repeatable.")
@click.option(
    "--identifiers",
    type=click.Choice(IDENTIFIERS),
    envvar="CXR_IDENTIFIERS",
    show_envvar=True,
    help="How the reading names its images' UIDs; plain if left out. Hashed also keeps file name and date off --html.",
)
@click.option(
    "--guide",
    metavar="none|answer|FILE.json",
    help="Hold what is read by machines to its grammar while it is written, or the answer to the JSON schema in FILE.",
)
@click.option(
    "--logprobs", is_flag=True, help="Have the reading say how likely the model found each token; --html shades."
)
@click.option("--scores", is_flag=True, help="Have the reading say how sure the model is of each label or option.")
@connection
@click.option("-o", "--out", type=OUT_FOLDER, help="Folder of the readings of a FOLDER; made if it is not there.")
@click.option(
    "--html",
    "html_path",
    type=OUT_FILE,
    metavar="OUT",
    help="Write one self-contained page with the pictures, the reasoning and everything around it.",
)
@json_option
def read(
    *, files, follow, task, prompt, mode, variables, history, unchecked_reading, max_new_tokens, temperature, seed,
    identifiers, guide, logprobs, scores, out, html_path, json_path, **server,
):  # fmt: skip
    """Read one patient's radiographs and stream the model's reasoning.

    FILEs are DICOM Part 10, PNG or JPEG. Several are one request with several pictures: prior first, current last. Only
    their contents are sent.

    A FOLDER, or the DICOMDIR in it, is read image by image, with those in the folders below. Each reading is written to
    -o under the image's name as it comes, and --json gets the table. A second run reads what is missing or has changed.
    Exit status 3 when an image has no reading or one that is not well formed; 1 when none has any.

    Exit status: 0 when the reading is well formed; 3 when it is malformed, truncated, out of vocabulary or of a
    doubtful image (it is shown and written all the same); 1 when there is no reading; 75 when there is none because the
    server is busy or out of reach; 2 for wrong usage; 130 after Ctrl-C, which also cancels the request on the server.
    """
    if follow and prompt is None and not task:
        files, prompt = _told_apart(files)
    _require_there(files)
    if prompt is not None and (task or variables):
        raise click.UsageError("--prompt asks in place of a task: give it without --task and --var")
    options = {
        "task": task,
        "prompt": prompt,
        "mode": mode,
        "variables": _variables(variables) or None,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "identifiers": identifiers,
        "guide": _guide(guide),
        "logprobs": logprobs or None,
        "scores": scores or None,
    }
    if any(file.is_dir() or file.name == DICOMDIR for file in files):
        if len(files) > 1 or history or follow or html_path or not out:
            raise click.UsageError("a folder is read alone, with -o FOLDER, and without --history, --follow and --html")
        _read_folder(files[0] if files[0].is_dir() else files[0].parent, out, options, server, json_path)
        return
    if out:
        raise click.UsageError("-o is for the readings of a FOLDER; use --json and --html for that of FILEs")
    images = [file.read_bytes() for file in files]
    turns, readings = _history((*history, follow) if follow else history)
    require_readings_of(files, images, readings, unchecked_reading=unchecked_reading)
    out = sys.stderr if json_path == "-" else sys.stdout

    def show(delta: str) -> None:
        click.echo(click.style(printable(delta), dim=True) if out.isatty() else printable(delta), out, nl=False)

    reading = received(connect(images, **server), files, images, show, history=turns or None, **options)
    read_at = datetime.datetime.now().astimezone()
    click.echo("\n", out)
    for line in summary(reading):
        click.echo(printable(line), out)
    write_json(json.loads(reading.to_json()), json_path)
    if html_path:
        names = [file.name for file in files] if identifiers != "hashed" else ()
        pictures = draw(images, reading, names=names, unchecked_reading=unchecked_reading)
        write(html_path, reading_page(reading, pictures, read_at=read_at, history=turns))
    if reading.status != "ok":
        sys.exit(EXIT_NOT_AS_ASKED)


def _told_apart(arguments: Sequence[Path]) -> tuple[Sequence[Path], str | None]:
    """The files among the arguments, and what is asked: the last one, if it is no file."""
    *files, last = arguments or [Path()]
    return (arguments, None) if not files or last.exists() else (files, str(last))


def _require_there(files: Sequence[Path]) -> None:
    for file in files:
        if not file.exists():
            raise click.BadParameter(f"Path {str(file)!r} does not exist.", param_hint="'[FILE|FOLDER]...'")


def _read_folder(folder: Path, out: Path, options: dict, server: dict, json_path: str | None) -> None:
    """Read the images of a folder, a line for each on standard error, then the table."""
    files, is_warned = files_in(folder, out), False
    rows: list[Row] = []

    def ask(file: Path, data: bytes) -> Reading:
        nonlocal is_warned
        reader, is_warned = connect([] if is_warned else [data], **server), True
        return received(reader, [file], [data], **options)

    def is_asked(reading: Reading) -> bool:
        has_scores = "scores" in reading.timings_ms or reading.finish_reason != "stop"  # none are of a cut answer
        return (
            options["task"] in (None, reading.task)
            and (not options["logprobs"] or bool(reading.token_logprobs))
            and (not options["scores"] or has_scores)
        )

    for number, row in enumerate(read_folder(folder, files, out, is_asked, ask), 1):
        rows.append(row)
        said = f"{row.status}{', was there' if row.was_there else ''}{f': {row.said}' if row.said else ''}"
        click.echo(printable(f"[{number}/{len(files)}] {row.file}: {said}"), err=True)
    images = [row for row in rows if row.status != "NO_IMAGE"]
    if not images:
        raise InvalidRequest(f"{folder} holds no DICOM, PNG or JPEG file; give a folder of radiographs")
    to = sys.stderr if json_path == "-" else sys.stdout
    widths = [max(len(printable(getattr(row, name))) for row in images) for name in ("file", "status")]
    for row in images:
        line = f"{row.file:<{widths[0]}}  {row.status:<{widths[1]}}  {', '.join(row.labels)}"
        click.echo(printable(line).rstrip(), to)
    readings = [row.reading for row in images if row.reading]
    well_formed = sum(reading.status == "ok" for reading in readings)
    click.echo(f"{len(images)} images, {len(readings)} readings, {well_formed} of them well formed, in {out}", to)
    for notice in dict.fromkeys([NOT_FOR_DIAGNOSIS, *(reading.notice for reading in readings)]):
        click.echo(printable(notice), to)
    write_json({"out": str(out), "images": [row.as_json() for row in rows]}, json_path)
    if not readings:
        sys.exit(EXIT_FAILED)
    if well_formed < len(images):
        sys.exit(EXIT_NOT_AS_ASKED)


def received(
    reader: Reader,
    files: Sequence[Path],
    images: Sequence[bytes],
    show: Callable[[str], None] = lambda delta: None,
    **request: Any,
) -> Reading:
    """The reading of `images`, which `files` hold; as `answered`, and `reader` is closed at the end."""
    with reader:
        return answered(reader.read(images, **request), reader.url, files, show)


def answered(stream: ReadingStream, url: str, files: Sequence[Path], show: Callable[[str], None]) -> Reading:
    """The reading that a stream gives; each text is shown as it comes.

    A thread receives it, so that Ctrl-C never interrupts gRPC, whose state that breaks; it cancels the request on the
    server. Errors are about `files`.
    """
    texts: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

    def receive() -> None:
        try:
            for text in stream:
                texts.put(text)
            texts.put(None)
        except BaseException as error:
            texts.put(error)

    with Waiting("") as waiting:
        thread = threading.Thread(target=receive, name="cxr-received", daemon=True)
        thread.start()
        try:
            while True:
                what = "".join(file.name for file in files[-1:]) or "the request"
                waiting.what = f"reading {what}" if stream.is_sent else f"connecting to {url}"
                try:
                    text = texts.get(timeout=0.2)  # a signal just before a wait does not end it
                except queue.Empty:
                    continue
                if text is None:
                    return stream.result()
                if isinstance(text, CxrError):
                    raise text.reworded(in_options(text.message, files)) from None
                if isinstance(text, BaseException):
                    raise text
                waiting.end()
                show(text)
        finally:
            stream.close()
            thread.join()


_OPTIONS = (
    (r"REQUEST\.variables\.(\w+)", r"--var \1"),
    (r"REQUEST\.variables", "--var"),
    (r"REQUEST\.(task|prompt|mode|history|seed|temperature|identifiers|guide|logprobs|scores)", r"--\1"),
    (r"REQUEST\.max_new_tokens", "--max-new-tokens"),
    (r"\bIMAGES: (\d+) given", r"FILE: \1 given"),
    (r"\bREQUEST\b", "the request"),
    (r"\b(?:Timeouts\.)?total_s\b", "--timeout-s"),
)


def in_options(message: str, files: Sequence[Path] = ()) -> str:
    """An error of server or client about `files` in the words of the command line."""
    for number, file in enumerate(files):
        message = message.replace(f"IMAGES[{number}]", file.name)
    for word, option in _OPTIONS:
        message = re.sub(word, option, message)
    return message


def _guide(given: str | None) -> str | dict | None:
    """Of the request: a word, or the schema that a file holds."""
    if given is None or given in MODE_GUIDES:
        return given
    try:
        if isinstance(schema := json.loads(Path(given).read_bytes()), dict):
            return {"json_schema": schema}
        said = "it holds no object"
    except (OSError, ValueError, RecursionError) as error:
        said = str(error)
    raise click.BadParameter(f"{given} is neither none nor answer nor a JSON schema: {said}", param_hint="--guide")


def _variables(pairs: tuple[str, ...]) -> dict[str, str | list[str]]:
    values: dict[str, str | list[str]] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} has no '='; write KEY=VALUE", param_hint="--var")
        if key not in values:
            values[key] = value
        else:
            values[key] = [*([values[key]] if isinstance(values[key], str) else values[key]), value]
    return values


def _history(files: tuple[Path, ...]) -> tuple[list[dict], list[tuple[str, Reading]]]:
    """The turns of all files, and the readings among them after their names."""
    turns, readings = [], []
    for file in files:
        try:
            data = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{file.name} of --history is not JSON: {error}; give turns or a reading") from None
        several = data if isinstance(data, list) else [data]
        if all(isinstance(each, dict) and "role" not in each for each in several):
            told = [stored_reading(file.name, json.dumps(each)) for each in several]
            readings += [(file.name, reading) for reading in told]
            data = [turn for reading in told for turn in turns_of(reading)]
        if not (isinstance(data, list) and all(isinstance(turn, dict) for turn in data)):
            raise InvalidRequest(
                f"{file.name} of --history is no list of turns and no reading; give turns or a reading"
            )
        turns += data
    return turns, readings


def stored_reading(name: str, text: str | bytes) -> Reading:
    """A reading that `read --json` wrote into a file of that name; raises `InvalidRequest` where it is none."""
    try:
        return Reading.from_json(text)
    except ServerMismatch as error:
        said = error.message.removeprefix("READING: ").replace(
            "use a client of the server's version", "give what `cxr-triton read --json` wrote"
        )
        raise InvalidRequest(f"{name}: {said}") from None


def summary(reading: Reading) -> Iterator[str]:
    """The lines under a streamed text, for people."""
    for name, lines in _summary(reading):
        for i, line in enumerate(lines):
            yield f"{'' if i else name:<9} {line}"


_HELD = {
    "answer": ["the answer was held to its grammar while it was written"],
    "json_schema": ["the answer was held to a JSON schema while it was written"],
}


def _summary(reading: Reading) -> Iterator[tuple[str, list[str]]]:
    """Rows of the table under the streamed text: a name and its lines."""
    yield "Status", [STATUSES.get(reading.status, reading.status), *_HELD.get(reading.guide, [])]
    labels = [finding.label for finding in reading.findings]
    labels += [f"{label} (not in the vocabulary)" for label in reading.unknown_labels]
    if labels:
        yield "Findings", labels
    elif reading.options:
        yield "Answer", [", ".join(reading.options)]
    elif reading.answer and not reading.boxes:
        yield "Answer", reading.answer.splitlines()
    if reading.scores:
        ranked = sorted(reading.scores.items(), key=lambda pair: -pair[1])
        yield "Scores", [f"{score:+8.1f}  {name}" for name, score in ranked] + ["Log-odds, not calibrated."]
    if reading.boxes:
        yield (
            "Boxes",
            [
                f"{box.label or 'unnamed'}: {' '.join(f'{v:g}' for v in box.percent)} %"
                + (f", {' '.join(f'{v:.0f}' for v in box.pixels)} px" if box.pixels else "")
                for box in reading.boxes
            ],
        )
    flags = [READING_FLAGS.get(flag, flag) for flag in reading.flags]
    for i, facts in enumerate(reading.images, 1):
        where = f"image {i}: " if len(reading.images) > 1 else ""
        flags += [where + IMAGE_FLAGS.get(flag, flag) for flag in facts.get("flags", ())]
    if flags:
        yield "Flags", flags
    model = reading.model
    parts = [model.get("title") or model.get("profile"), model.get("engine"), model.get("precision")]
    yield "Model", [", ".join(str(part) for part in parts if part)]
    times = [f"{name} {duration(reading.timings_ms[key])}" for key, name in _TIMES.items() if key in reading.timings_ms]
    if rate := decode_rate(reading):
        times.append(f"{reading.usage['completion_tokens']} tokens at {rate:.1f}/s")
    if times:
        yield "Time", [", ".join(times)]
    yield "Notice", [NOT_FOR_DIAGNOSIS, *reading.notice.splitlines()]


_TIMES = {"total": "total", "first_token": "first token", "vision": "vision", "prefill": "prefill", "decode": "decode"}
