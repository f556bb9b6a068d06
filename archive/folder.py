"""OUT: Parquet files that appear whole or not at all, and what a run needs to go on with them.

    OUT/_archive.json            what is asked, of which source; another run has to ask the same
    OUT/_work/part-N.parquet     rows of one unit; gathered into
    OUT/readings-N.parquet       whose footer names the parts that it took in, so that a crash between doubles no row

Whoever reads a folder of Parquet leaves out names with an underscore. One process writes: the driver, under a lock.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from cxr_triton.archive.rows import SCHEMA, keys_of
from cxr_triton.errors import InvalidRequest, ServerMismatch
from cxr_triton.files import locked, write, writing

HEADER, WORK = "_archive.json", "_work"
VERSION = 1
ROWS = 10_000
"""Of a file that parts are gathered into."""
_GROUP_ROWS = 1_000
_PARTS = b"cxr_parts"
_PART, _FILE = re.compile(r"part-(\d{8})\.parquet"), re.compile(r"readings-(\d{6})\.parquet")


class Folder:
    """An archive's rows on a disk; see `opened`.

    Attributes
    ----------
    path : Path
    header : dict
        ``version``, ``source`` (kind and digest), ``identifiers``, ``request``, and once a reading told it ``bundle``.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path, self.header = path, header
        self.work = path / WORK
        self._files = sorted(each for each in path.iterdir() if _FILE.fullmatch(each.name))
        taken = [name for file in self._files for name in _parts_of(file)]
        for name in taken:
            (self.work / name).unlink(missing_ok=True)
        self._parts = {
            each: parquet.read_metadata(each).num_rows
            for each in sorted(self.work.iterdir()) if _PART.fullmatch(each.name)
        }  # fmt: skip
        numbers = [int(found[1]) for name in [*taken, *(p.name for p in self._parts)] if (found := _PART.match(name))]
        self._next_part = max(numbers, default=-1) + 1

    def done(self) -> set[bytes]:
        """Keys of the images that have a row: see `cxr_triton.archive.rows.key_of`."""
        found: set[bytes] = set()
        for batch in self.batches(["image"]):
            found.update(keys_of(batch.column(0).to_pylist(), self.header["identifiers"]))
        return found

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows, some at a time."""
        for path in [*self._files, *self._parts]:
            with parquet.ParquetFile(path) as file:
                yield from file.iter_batches(_GROUP_ROWS, columns=list(columns))

    def add(self, rows: pa.Table) -> None:
        """Write the rows of a unit.

        Raises
        ------
        ServerMismatch
            They are of another bundle than the rows that are there; then none is written.
        """
        self._require_one_bundle(rows)
        path = self.work / f"part-{self._next_part:08d}.parquet"
        self._next_part += 1
        with writing(path) as file:
            parquet.write_table(rows, file, compression="zstd")
        self._parts[path] = rows.num_rows
        if sum(self._parts.values()) >= ROWS:
            self.gather()

    def gather(self) -> None:
        """Make one file of the parts that are there."""
        if not self._parts:
            return
        last = self._files[-1].name if self._files else ""
        number = int(found[1]) + 1 if (found := _FILE.match(last)) else 0
        path = self.path / f"readings-{number:06d}.parquet"
        names = json.dumps([part.name for part in self._parts]).encode()
        _write(path, (parquet.read_table(part, schema=SCHEMA) for part in self._parts), names)
        self._files.append(path)
        for part in self._parts:
            part.unlink()
        self._parts = {}

    def forget(self, codes: Collection[str]) -> int:
        """Drop the rows with these error codes, so that their images are read again; how many they were."""
        self.gather()
        dropped = 0
        for path in self._files:
            rows = parquet.read_table(path)
            kept = rows.filter(pa.array(code not in codes for code in rows["error_code"].to_pylist()))
            if kept.num_rows < rows.num_rows:
                dropped += rows.num_rows - kept.num_rows
                _write(path, [kept], rows.schema.metadata[_PARTS])
        return dropped

    def finish(self) -> None:
        """Leave Parquet only, and the header."""
        self.gather()
        shutil.rmtree(self.work)

    def _require_one_bundle(self, rows: pa.Table) -> None:
        found = {bundle for bundle in rows["bundle"].to_pylist() if bundle}
        known = self.header.get("bundle")
        if found - {known} and (known or len(found) > 1):
            other = sorted(found - {known})[0]
            raise ServerMismatch(
                f"{self.path}: has readings of bundle {str(known)[:12]}, and a server reads with {other[:12]}; serve "
                "one bundle at every --url, or give another -o"
            )
        if found and not known:
            self.header["bundle"] = found.pop()
            _write_header(self.path, self.header)


@contextlib.contextmanager
def opened(out: Path, header: dict[str, Any]) -> Iterator[Folder]:
    """Begin an archive, or go on with one that was begun.

    Parameters
    ----------
    out : Path
    header : dict
        ``source``, ``identifiers`` and ``request``.

    Raises
    ------
    InvalidRequest
        Something else lies there, the archive was begun with another request, or another process has it open.
    """
    header = {"version": VERSION, **header}
    if out.is_dir() and any(out.iterdir()) and not (out / HEADER).is_file() and not (out / WORK).is_dir():
        raise InvalidRequest(f"{out}: holds something else; give an empty folder, or an archive to go on with")
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with locked(out / WORK / ".lock", f"{out}: another process writes it; wait for that one, or give another -o"):
        yield Folder(out, _agreed(out, header))


def _agreed(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The header that is there, if it is of the same."""
    try:
        there = json.loads((out / HEADER).read_bytes())
    except FileNotFoundError:
        _write_header(out, header)
        return header
    except ValueError:
        raise InvalidRequest(f"{out / HEADER}: is no JSON; give another -o") from None
    differing = sorted(key for key in header if there.get(key) != header[key])
    if differing:
        raise InvalidRequest(
            f"{out}: was begun with another {', '.join(differing)}; finish it with what it was begun with, or give "
            "another -o"
        )
    return there


def _write_header(out: Path, header: dict[str, Any]) -> None:
    write(out / HEADER, json.dumps(header, indent=2, ensure_ascii=False) + "\n")


def _parts_of(file: Path) -> list[str]:
    """Names of the parts that a file took in."""
    try:
        metadata = parquet.read_schema(file).metadata or {}
        return [str(name) for name in json.loads(metadata[_PARTS])]
    except (pa.ArrowInvalid, KeyError, ValueError):
        raise InvalidRequest(f"{file}: is no file of an archive; remove it, or give another -o") from None


def _write(path: Path, tables: Iterable[pa.Table], names: bytes) -> None:
    schema = SCHEMA.with_metadata({_PARTS: names})
    with writing(path) as file, parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table.replace_schema_metadata(None))
            if sum(each.num_rows for each in waiting) >= _GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting), _GROUP_ROWS)
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting), _GROUP_ROWS)
