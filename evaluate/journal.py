"""A result while it comes about: every row is on the disk at once, and a run that was stopped goes on.

Beside RESULT lies a folder ``.RESULT.work`` until the result is whole. Its journal has a line for each run and each
row; one that a crash cut off is dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import shutil
import threading
from array import array
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.rows import Header, Row, line_of, read, write

JOURNAL = "journal.jsonl"
NOT_YET = 2**64 - 1


def work_folder(out: Path) -> Path:
    """Where the journal of a result lies."""
    return out.parent / f".{out.name}.work"


def is_begun(out: Path) -> bool:
    """Whether a run has begun that is not finished."""
    return (work_folder(out) / JOURNAL).is_file()


def identity(header: Header) -> dict[str, Any]:
    """What of a header has to be the same for a run to go on with a result."""
    request = {key: value for key, value in header.request.items() if key != "sent"}
    data = {key: value for key, value in header.data.items() if key != "pictures"}
    same = ("version", "kind", "labels", "uncertain", "blank", "readers", "mapping", "seed")
    facts = {name: getattr(header, name) for name in same}
    return json.loads(json.dumps({**facts, "data": data, "request": request}))


class Journal:
    """The journal of one result; as a context it holds the file open.

    Parameters
    ----------
    out : Path
        Of the result.
    header : Header
        Without what only readings tell.

    Attributes
    ----------
    done : int
        Rows that are there.
    model : dict
        Of the readings so far; empty before the first.

    Raises
    ------
    InvalidRequest
        Another evaluation was begun there; says what differs.
    """

    def __init__(self, out: Path, header: Header):
        self.out, self.header = out, header
        self.model: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.done = 0
        self._path = work_folder(out) / JOURNAL
        self._offsets = array("Q", [NOT_YET]) * header.data["studies"]
        self._began, self._runs, self._read_s, self._run_s = _now(), 0, 0.0, 0.0
        self._lock = threading.Lock()
        self._queue: queue.Queue[bytes | None] = queue.Queue(256)
        self._failed: BaseException | None = None
        self._recover()

    def __enter__(self) -> Journal:
        self._file = open(self._path, "ab")
        self._writer = threading.Thread(target=self._write, name="cxr-journal", daemon=True)
        self._writer.start()
        run = {"run": self._runs, "began": _now(), "identity": identity(self.header)}
        self._put(run)
        self._runs += 1
        return self

    def __exit__(self, *exc) -> None:
        self._queue.put(None)
        self._writer.join()
        self._file.close()
        if self._failed and exc[0] is None:
            raise self._failed

    def __contains__(self, number: int) -> bool:
        return self._offsets[number] != NOT_YET

    def knows(self, model: dict[str, Any], facts: dict[str, Any]) -> None:
        """Note what the first reading told of the model, and of the request as it was sent."""
        self.model, self.facts = model, facts
        self._put({"model": model, "facts": facts})

    def add(self, row: Row, pictures: list[str], at_s: float) -> None:
        """Write a row, of pictures with these digests, `at_s` seconds into the run.

        Raises
        ------
        OSError
            An earlier row could not be written.
        """
        if self._failed:
            raise self._failed
        self._offsets[row.number] = 0  # its place is found when the result is written
        self.done += 1
        self._put({"row": line_of(row), "number": row.number, "pictures": pictures, "s": round(at_s, 3)})

    def finish(self) -> Header:
        """Write the result, in the data set's order, and clear the journal away; the header as written."""
        self._read_s, self._runs = 0.0, 0
        self._recover()
        digest = hashlib.sha256()
        for line in self._lines():
            digest.update("".join(f"{picture}\n" for picture in line["pictures"]).encode())
        header = dataclasses.replace(
            self.header,
            data={**self.header.data, "pictures": f"sha256:{digest.hexdigest()}"},
            request={**self.header.request, "sent": self.facts.get("sent")},
            model=self.model,
            versions={**self.header.versions, **self.facts.get("versions", {})},
            notice=self.facts.get("notice", ""),
            times={"began": self._began, "ended": _now(), "read_s": round(self._read_s, 3), "runs": self._runs},
        )
        write(self.out, header, (line["row"] for line in self._lines()))
        shutil.rmtree(self._path.parent)
        return header

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Rows with their pictures, in the data set's order."""
        with open(self._path, "rb") as file:
            for offset in self._offsets:
                file.seek(offset)
                yield json.loads(file.readline())

    def _recover(self) -> None:
        """Find the rows that are there, and cut off what a crash left of another."""
        if not self._path.is_file():
            return
        with open(self._path, "r+b") as file:
            self.done = sum(self._take(line, offset) for offset, line in _whole_lines(file))

    def _take(self, line: dict[str, Any], offset: int) -> bool:
        """Note a line of the journal; whether it is a row that was not there before."""
        if "identity" in line:
            self._require_same(line["identity"])
            self._began = line["began"] if not self._runs else self._began
            self._runs += 1
            self._run_s = 0.0
        elif "model" in line:
            self.model, self.facts = line["model"], line["facts"]
        else:
            self._read_s += line["s"] - self._run_s
            self._run_s = line["s"]
            is_new = self._offsets[line["number"]] in (NOT_YET, 0)
            self._offsets[line["number"]] = offset
            return is_new
        return False

    def _require_same(self, found: dict[str, Any]) -> None:
        mine = identity(self.header)
        if found != mine:
            raise InvalidRequest(
                f"{self.out}: an evaluation was begun there with other {_differing(found, mine)}; "
                "finish it with what it was begun with, give another -o, or --restart"
            )

    def _put(self, line: dict[str, Any]) -> None:
        self._queue.put(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _write(self) -> None:
        """Bring lines to the disk: those that came meanwhile together."""
        ends = False
        while not ends:
            lines = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while lines[-1] is not None:
                    lines.append(self._queue.get_nowait())
            ends = lines[-1] is None
            if self._failed:
                continue
            try:
                self._file.write(b"".join(line for line in lines if line))
                self._file.flush()
                os.fsync(self._file.fileno())
            except BaseException as error:
                self._failed = error


def is_complete(out: Path, header: Header) -> bool:
    """Whether a result is there, whole and of this evaluation.

    Raises
    ------
    InvalidRequest
        Something else is there.
    """
    if not out.exists() or is_begun(out):
        return False
    found = read(out).header
    if identity(found) != identity(header):
        differing = _differing(identity(found), identity(header))
        raise InvalidRequest(f"{out}: is a result with other {differing}; give another -o, or --restart")
    return True


def _differing(a: dict[str, Any], b: dict[str, Any]) -> str:
    names = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if x != y and isinstance(x, dict) and isinstance(y, dict) and key != "mapping":
            names += [f"{key}.{inner}" for inner in sorted(x.keys() | y.keys()) if x.get(inner) != y.get(inner)]
        elif x != y:
            names.append(key)
    return ", ".join(names)


def _whole_lines(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines of JSON with their offsets; the file ends after the last whole one."""
    offset = 0
    while line := file.readline():
        try:
            parsed = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            parsed = None
        if parsed is None:
            file.truncate(offset)
            return
        yield offset, parsed
        offset += len(line)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
