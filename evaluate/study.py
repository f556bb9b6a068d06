"""What an adapter gives: a study as its data set describes it, and where the adapter reads it from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.config import Data
from cxr_triton.evaluate.rows import Box

UNCERTAIN = -1
"""Of `Found`: the data set says that it does not know."""
Found = dict[str, int | None]
"""A data set's own label to 1, 0, `UNCERTAIN`, or None where the data set leaves it empty."""
AGE_BANDS = ((18, "0-17"), (40, "18-39"), (65, "40-64"), (80, "65-79"), (200, "80+"))
SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm", ".dicom")
FRONTAL = ("PA", "AP", "AP_HORIZONTAL", "FRONTAL")


@dataclass(frozen=True, kw_only=True)
class Image:
    """A picture of a study: its path below the data set's folder, and its view in capitals, empty if not said."""

    path: str
    view: str = ""

    @property
    def is_frontal(self) -> bool:
        """Not known to be of another view."""
        return self.view in FRONTAL or not self.view


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as its data set describes it, before mapping and policies.

    Attributes
    ----------
    name : str
        Unique in the data set.
    patient : str
        As the data set names the patient; empty where it does not.
    images : tuple of Image
    groups : dict of str to str
        See `cxr_triton.evaluate.rows.Row`; without empty values.
    found : dict
        By the data set's own labels. Of a format whose lists are complete only what is listed.
    readers : dict of str to dict
        `found` of each reader, in place of `found`.
    options : tuple of str
        Letters, ``Yes`` or ``No`` that are right.
    boxes : tuple of Box
    text : str or None
    variables : dict
        What the question is about, by the names of a prompt's placeholders: ``question``, ``options``, ``disease``,
        ``phrase``.
    fault : str
        Why it cannot be asked or judged; it becomes a row with an error.
    """

    name: str
    patient: str = ""
    images: tuple[Image, ...]
    groups: dict[str, str] = field(default_factory=dict)
    found: Found = field(default_factory=dict)
    readers: dict[str, Found] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    text: str | None = None
    variables: dict[str, str | list[str]] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Source:
    """What an adapter reads from.

    Attributes
    ----------
    data : Data
    counted : Counter
        Of what is not plain, by what it is; see `cxr_triton.evaluate.rows.Header`.
    """

    data: Data
    counted: Counter[str] = field(default_factory=Counter)

    @property
    def root(self) -> Path:
        """The data set's folder."""
        return self.data.folder

    def file(self, *names: str) -> Path:
        """The first of `names`, which may be patterns, that is in the folder, packed or not.

        Raises
        ------
        InvalidRequest
            None of them is there; names them.
        """
        for name in names:
            for path in sorted(self.root.glob(name)) + sorted(self.root.glob(f"{name}.gz")):
                if path.is_file():
                    return path
        raise InvalidRequest(
            f"{self.root}: has no {' or '.join(names)}, which format {self.data.format} of split {self.data.split} "
            "needs; give the folder that the data set was unpacked into, or another split"
        )

    def image(self, path: str, *folders: str, view: str = "") -> Image:
        """A picture at `path` below one of `folders`, with its own suffix, the chosen one, or another known one.

        Of one that is in no place the first is taken: that it is missing becomes a row.
        """
        given = Path(path)
        suffix = self.data.suffix
        names = [given.with_suffix(suffix)] if suffix else [given, *(given.with_suffix(s) for s in SUFFIXES)]
        places = [Path(folder) / name for name in names for folder in folders or ("",)]
        found = next((place for place in places if (self.root / place).is_file()), places[0])
        return Image(path=found.as_posix(), view=view.upper())


def groups(**values: str | None) -> dict[str, str]:
    """Groups without those that have no value; an ``age`` becomes its band."""
    age = values.pop("age", None)
    said = {name: value.strip() for name, value in values.items() if value and value.strip()}
    return said | ({"age_band": band} if (band := age_band(age or "")) else {})


def age_band(age: str) -> str:
    """Band of an age in years, as ``58``, ``58.0`` or ``058Y`` say it; empty where it is none."""
    digits = age.strip().upper().removesuffix("Y").lstrip("0") or "0" * bool(age.strip())
    try:
        years = float(digits)
    except ValueError:
        return ""
    return next((name for below, name in AGE_BANDS if 0 <= years < below), "")


def sex(value: str) -> str:
    """``F``, ``M`` or empty, of a word or letter."""
    return value.strip()[:1].upper() if value.strip()[:1].upper() in ("F", "M") else ""


def value_of(text: str) -> int | None:
    """A label's cell: 1, 0, `UNCERTAIN`, None if empty.

    Raises
    ------
    InvalidRequest
        It is another number, or none.
    """
    if not text.strip():
        return None
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if number not in (1.0, 0.0, -1.0):
        raise InvalidRequest(f"a label is {text!r:.40}, expected 1, 0, -1 or nothing")
    return int(number)


Studies = Iterator[Study]
