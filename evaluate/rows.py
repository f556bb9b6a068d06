"""What an evaluation writes down, as JSON Lines: a header, then one row for each study.

A result is text that other programs can read: its first line is a `Header`, every other one a `Row`, in the order of
the data set (`Row.number`). A study that could not be read is a row with an error; none is left out. But for the keys
named ``times``, two runs of the same engine on the same data are the same bytes.

Everything that a measure needs stands in the rows: nothing is asked twice, and a result can be measured again later.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cxr_triton.errors import InvalidRequest
from cxr_triton.files import writing

VERSION = 1
KINDS = ("labels", "options", "boxes", "report")
"""What is asked and known of a study: label sets, letters of a closed question, boxes, or text."""
STATUSES = ("ok", "flagged", "error")
POLICIES = ("zeros", "ones", "ignore")
"""What an uncertain label counts as: absent, present, or neither (None)."""
GROUPS = ("view", "sex", "age_band", "portable", "source")
"""Of `Row.groups`, those that adapters fill by themselves; a data set may have more."""
MISSING_FILE, BAD_TRUTH = NOT_ASKED = ("MISSING_FILE", "BAD_TRUTH")
"""Codes of rows that say nothing of an engine: the data set lacks the picture, or what is known of it."""
TIMES = "times"
"""The one key, of header and rows, whose values differ between two runs of the same."""

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2"""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box, known or answered.

    Attributes
    ----------
    label : str or None
    corners : tuple of float
        x1, y1, x2, y2, in order, in `unit`.
    unit : str
        ``pixels`` of the original image, as `cxr_triton.reading.Box.pixels`, wherever the image's size is known; else
        ``percent`` of its width and height. Both sides of a row have the same unit.
    image : int
        Index in `Row.images`.
    reader : str or None
        Who drew it, where the data set names several readers.
    """

    label: str | None
    corners: Corners
    unit: str = "pixels"
    image: int = 0
    reader: str | None = None


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the data set says of a study; of a kind's fields those that are given.

    Attributes
    ----------
    labels : dict of str to (1, 0 or None)
        Each of `Header.labels`: present, absent, or not known (not labelled, or uncertain and ignored), by the header's
        policy. Empty where the kind is another.
    options : tuple of str
        Letters, ``Yes`` or ``No``.
    boxes : tuple of Box
        None of a label that `labels` has as present means that it was not drawn. With kind ``boxes``, no box means that
        there is none to find.
    text : str or None
        A reference report.
    readers : dict of str to dict
        Labels by reader, where there are several: what `labels` were made of.
    """

    labels: dict[str, int | None] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    text: str | None = None
    readers: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the reading says.

    Attributes
    ----------
    labels : dict of str to (1, 0 or None), or None
        Each of `Header.labels`. None, the whole of it, where the answer lists none that could be read (malformed, cut
        off), which is not the same as a list of none. A single None: its question was not answered.
    unknown_labels : tuple of str
        Listed, and none of the vocabulary.
    options : tuple of str
        Letters, ``Yes`` or ``No``.
    boxes : tuple of Box
    text : str or None
        The answer without its reasoning: a report where the kind is ``report``.
    whole : str
        The model's text, untouched; those of several questions after each other.
    scores : dict of str to float, or None
        How sure the model is of each label or option, 0 to 1, where the server says it.
    """

    labels: dict[str, int | None] | None = None
    unknown_labels: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    text: str | None = None
    whole: str = ""
    scores: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One study.

    Attributes
    ----------
    number : int
        Place in the data set, from 0. With the same data digest, the same number is the same study.
    study : str
        The data set's name of it; unique.
    patient : str
        First 16 hexadecimal digits of the SHA-256 of the data set's name, a line feed and the patient's; of the study's
        where it names no patient. Rows with the same value are not independent. A guess of the name can be checked
        against it: it is no protection of private data.
    groups : dict of str to str
        Of `GROUPS` and the data set's own; a group without a value is left out.
    images : tuple of str
        Paths as the data set writes them.
    kind : str
        Of `KINDS`.
    truth : Truth
    answer : Answer or None
        None of an error.
    status : str
        ``ok``; ``flagged``: there is an answer, and `code` says what to doubt in it; ``error``: there is none.
    code : str
        Of `cxr_triton.reading.STATUSES` when flagged (``malformed``, ``truncated``, ``out_of_vocabulary``,
        ``doubtful_image``); of `cxr_triton.errors.CODES`, or ``MISSING_FILE``, of an error; else empty.
    said : str
        The error's message.
    flags : tuple of str
        Of the reading and its images.
    prompt_tokens, completion_tokens : int
        Of all its questions.
    times : dict of str to float
        ``asked_ms``: from the request to the reading; the reading's own stages.
    """

    number: int
    study: str
    patient: str
    groups: dict[str, str] = field(default_factory=dict)
    images: tuple[str, ...]
    kind: str
    truth: Truth
    answer: Answer | None
    status: str
    code: str = ""
    said: str = ""
    flags: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    times: dict[str, float] = field(default_factory=dict)

    @property
    def truncated(self) -> bool:
        """The token limit came before the end of the answer."""
        return self.code == "truncated"

    @property
    def malformed(self) -> bool:
        """A part of the expected form is missing."""
        return self.code == "malformed"

    @property
    def out_of_vocabulary(self) -> bool:
        """The answer lists labels that are none of the model's."""
        return self.code == "out_of_vocabulary"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a result is of.

    Attributes
    ----------
    version : int
        Of this form.
    kind : str
        Of `KINDS`; that of every row.
    data : dict
        ``name``, ``format``, ``split``, ``studies`` (rows in the result), ``patients``, ``images``, ``digest``
        (``sha256:`` of what is asked and known, in order; see `data_digest`), and ``pictures`` (``sha256:`` of the
        images' bytes, in order).
    labels : tuple of str
        The vocabulary of truth and answers, in the order of every row's.
    uncertain, blank : str
        Of `POLICIES`: what an uncertain label, and one that the data set leaves empty, count as.
    readers : str or None
        How several readers become one truth: ``any``, ``majority`` or ``all``.
    mapping : dict of str to (str or None)
        The data set's labels to ours; None of one that maps to nothing.
    counted : dict of str to int
        What was met in the data set and is not plain, by what it is: ``label without a place: Hernia``,
        ``missing file``, ….
    request : dict
        ``task``, ``prompt``, ``mode``, ``max_new_tokens``, ``temperature``, ``top_p``, ``repetition_penalty``, as
        asked; None is the profile's default. ``sent``: the first question as the model got it.
    seed : int
        Of everything drawn: the study's sample, and sampled tokens.
    model : dict
        As the readings say: profile, revision, engine, precision, bundle digest. Empty where there was no reading.
    versions : dict of str to str
        ``cxr-triton``, ``python``, the server's name to its version.
    notice : str
        Show it wherever a reading is shown.
    times : dict of str to (str or float)
        ``began`` and ``ended`` (ISO 8601, UTC), ``read_s`` (wall time over all runs that the result took), ``runs``.
    """

    version: int = VERSION
    kind: str
    data: dict[str, typing.Any]
    labels: tuple[str, ...] = ()
    uncertain: str = "ignore"
    blank: str = "ignore"
    readers: str | None = None
    mapping: dict[str, str | None] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    request: dict[str, typing.Any] = field(default_factory=dict)
    seed: int = 0
    model: dict[str, typing.Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notice: str = ""
    times: dict[str, typing.Any] = field(default_factory=dict)


Line = Header | Row


def line_of(line: Line) -> str:
    """A header or row as its line, without the line feed."""
    return json.dumps(dataclasses.asdict(line), ensure_ascii=False, allow_nan=False)


def row_of(text: str | bytes, where: str = "row") -> Row:
    """A row from its line; raises `InvalidRequest`, which names `where`."""
    return _made(Row, text, where)


def header_of(text: str | bytes, where: str = "header") -> Header:
    """A header from its line; raises `InvalidRequest`, which names `where`."""
    header = _made(Header, text, where)
    if header.version != VERSION:
        raise InvalidRequest(f"{where}: version {header.version}, this release reads {VERSION}; install the writer's")
    return header


@dataclass(frozen=True)
class Result:
    """A result on a disk. Iterating gives its rows, in order and one at a time, as often as asked.

    Raises
    ------
    InvalidRequest
        While iterating: a line is no row, or one is missing or too many.
    """

    path: Path
    header: Header

    def __iter__(self) -> Iterator[Row]:
        count = 0
        with open(self.path, encoding="utf-8") as lines:
            next(lines)
            for count, text in enumerate(lines, 1):
                yield row_of(text, f"{self.path}:{count + 1}")
        if count != len(self):
            raise InvalidRequest(f"{self.path}: has {count} rows, its header says {len(self)}; evaluate again")

    def __len__(self) -> int:
        return self.header.data["studies"]


def read(path: str | Path) -> Result:
    """A result that `write` wrote; only its header is read.

    Raises
    ------
    InvalidRequest
        The file holds no result; says what to give.
    OSError
        It cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as lines:
        first = lines.readline(1 << 24)
    return Result(path, header_of(first, f"{path}:1"))


def write(path: str | Path, header: Header, rows: Iterable[Row | str]) -> None:
    """Write a result whole or not at all, as rows come; text is taken for a row's line as it is."""
    with writing(Path(path)) as file:
        file.write(f"{line_of(header)}\n".encode())
        for row in rows:
            file.write(f"{row if isinstance(row, str) else line_of(row)}\n".encode())


def timeless_digest(path: str | Path) -> str:
    """``sha256:`` of a result without its ``times``: the same for two runs of the same engine on the same data."""
    digest = hashlib.sha256()
    with open(path, encoding="utf-8") as lines:
        for text in lines:
            digest.update(json.dumps({k: v for k, v in json.loads(text).items() if k != TIMES}).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


T = typing.TypeVar("T")


def _made(cls: type[T], text: str | bytes, where: str) -> T:
    try:
        return _typed(cls, json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidRequest(
            f"{where}: is no {cls.__name__.lower()} of a result: {type(error).__name__} {error}; "
            "give what `cxr-triton evaluate -o` wrote"
        ) from None


@functools.cache
def _hints(cls: type) -> dict[str, typing.Any]:
    return typing.get_type_hints(cls)


def _typed(kind: typing.Any, value: typing.Any) -> typing.Any:
    """JSON's `value` as a field of type `kind`: lists become tuples, objects the dataclass that they are of."""
    args = typing.get_args(kind)
    if type(None) in args:
        if value is None:
            return None
        kind = args[0]
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return kind(**{f.name: _typed(_hints(kind)[f.name], value[f.name]) for f in dataclasses.fields(kind)})
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        of_each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_typed(each, item) for each, item in zip(of_each, value, strict=True))
    if origin is dict:
        return {key: _typed(inner[1], item) for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is not typing.Any and type(value) is not kind:
        raise TypeError(f"{value!r:.60} is no {kind.__name__}")
    return value
