"""A folder of radiographs, one reading for each image: written as it comes, so that a second run goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_triton.errors import DeadlineExceeded, InternalError, InvalidImage, ServerMismatch
from cxr_triton.files import write
from cxr_triton.identity import sha256
from cxr_triton.pixels.filetype import kind_of, may_be_image
from cxr_triton.reading import Reading

DICOMDIR = "DICOMDIR"


@dataclass(frozen=True)
class Row:
    """What became of a file.

    Attributes
    ----------
    file : str
        Relative to the folder.
    status : str
        Of the reading; the error's code where there is none, ``NO_IMAGE`` of a file that is none.
    path : Path or None
        Of the reading.
    was_there : bool
        An earlier run wrote it.
    """

    file: str
    status: str
    said: str = ""
    path: Path | None = None
    reading: Reading | None = None
    was_there: bool = False

    @property
    def labels(self) -> list[str]:
        """Of the findings, in the reading's order."""
        return [finding.label for finding in self.reading.findings] if self.reading else []

    def as_json(self) -> dict[str, Any]:
        """The row of ``read --json``."""
        return {
            "file": self.file,
            "status": self.status,
            "reading": str(self.path) if self.path else None,
            "labels": self.labels,
            "said": self.said,
            "was_there": self.was_there,
        }


def files_in(folder: Path, out: Path) -> list[Path]:
    """Every file in a folder and those below it, but for hidden ones, a DICOMDIR, and what is in `out`."""
    out = out.resolve()
    is_apart = out == folder.resolve()
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name != DICOMDIR
        and (is_apart or out not in path.resolve().parents)
    ]


def read_folder(
    folder: Path,
    files: list[Path],
    out: Path,
    is_asked: Callable[[Reading], bool],
    ask: Callable[[Path, bytes], Reading],
) -> Iterator[Row]:
    """Read each file that is an image; a refused one does not keep the others from being read.

    Parameters
    ----------
    files : list of Path
        Of `files_in`.
    out : Path
        Gets ``NAME.json`` of each, in the same folders; one that is there already, about the same bytes, is not read
        again where it has what is asked for.
    is_asked : callable
        Says whether a reading has that.
    ask : callable
        Gives the reading of a file and its contents.

    Raises
    ------
    CxrError
        What no other file would fare better with: a server out of reach, an unknown task.
    OSError
        A reading cannot be written; those before it stay.
    """
    for file in files:
        name = str(file.relative_to(folder))
        path = out / f"{name}.json"
        try:
            data = file.read_bytes()
        except OSError as error:
            yield Row(name, "UNREADABLE", error.strerror or str(error))
            continue
        if not may_be_image(data):
            yield Row(name, "NO_IMAGE", kind_of(data))
            continue
        if (earlier := _earlier(path, data, is_asked)) is not None:
            yield Row(name, earlier.status, path=path, reading=earlier, was_there=True)
            continue
        try:
            reading = ask(file, data)
        except (InvalidImage, DeadlineExceeded, InternalError) as error:
            yield Row(name, error.code, error.message)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, reading.to_json() + "\n")
        yield Row(name, reading.status, path=path, reading=reading)


def _earlier(path: Path, data: bytes, is_asked: Callable[[Reading], bool]) -> Reading | None:
    """The reading that lies there, if it is of these bytes and has what is asked for."""
    try:
        reading = Reading.from_json(path.read_bytes())
    except (OSError, ServerMismatch):
        return None
    digests = [facts.get("identity", {}).get("file_sha256") for facts in reading.images]
    return reading if digests == [sha256(data)] and is_asked(reading) else None
