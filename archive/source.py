"""What is to be read, as a stream: a folder, a glob, a Parquet manifest, or a DICOMweb query."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_triton.archive.item import Item
from cxr_triton.errors import InvalidRequest, unknown_key

if TYPE_CHECKING:
    from cxr_triton.client.gateway.config import Remote

DICOMDIR = "DICOMDIR"
_MAGIC = "*?["


@dataclass(frozen=True, kw_only=True)
class Source:
    """Items, in an order that is the same each time.

    Attributes
    ----------
    kind : str
        ``folder``, ``glob``, ``manifest`` or ``dicomweb``.
    text : str
        As it was given; paths absolute.
    column : str
        Of a manifest: the paths' column.
    out : Path
        What is below it is no part of a folder.
    web : Remote or None
        Of DICOMweb: the root, with its token and authorities.
    """

    kind: str
    text: str
    column: str = "path"
    out: Path
    web: Remote | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of what tells one source from another."""
        root = self.web.root if self.web else ""
        return hashlib.sha256("\n".join((self.kind, root, self.text, self.column)).encode()).hexdigest()

    def __iter__(self) -> Iterator[Item]:
        if self.kind == "folder":
            return _folder(Path(self.text), self.out.resolve())
        if self.kind == "glob":
            return _glob(self.text)
        if self.kind == "manifest":
            return _manifest(Path(self.text), self.column)
        if self.web is None:
            raise InvalidRequest(f"{self.text}: is of no server; see `source_of`")
        from cxr_triton.archive.dicomweb import instances

        return instances(self.web, self.text)


def source_of(
    text: str, out: Path, *, column: str = "path", token_file: str | None = None, ca: str | None = None
) -> Source:
    """The source that a word of the command line names.

    Raises
    ------
    InvalidRequest
        There is nothing of this name; says what may be given.
    InvalidConfig
        The address is none, or would let a token travel in clear text.
    """
    if text.startswith(("http://", "https://")):
        from cxr_triton.archive.dicomweb import root_and_query
        from cxr_triton.client.endpoint import TlsFiles
        from cxr_triton.client.gateway.config import Remote

        root, query = root_and_query(text)
        web = Remote(url=root, token_file=token_file, tls=TlsFiles(ca=ca) if ca else None)
        return Source(kind="dicomweb", text=query, out=out, web=web)
    path = Path(text)
    if path.is_dir():
        return Source(kind="folder", text=str(path.resolve()), out=out)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return Source(kind="manifest", text=str(path.resolve()), column=column, out=out)
    if path.is_file() or any(mark in text for mark in _MAGIC):
        return Source(kind="glob", text=os.path.abspath(text), out=out)
    raise InvalidRequest(
        f"{text}: is not there; give a folder, a glob in quotes, a Parquet file with a column {column!r}, or the "
        "address of a DICOMweb query, https://HOST/ROOT/studies?StudyDate=20260101-20261231"
    )


def _folder(folder: Path, out: Path) -> Iterator[Item]:
    """Every file below a folder but for hidden ones, a DICOMDIR, and what is in `out`."""
    for at, folders, files in os.walk(folder, onerror=_raise):
        here = Path(at)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (here / name).resolve() != out)
        for name in sorted(files):
            path = here / name
            if not name.startswith(".") and name != DICOMDIR and path.is_file():
                yield Item(path.relative_to(folder).as_posix(), str(path))


def _raise(error: OSError) -> None:
    """A folder that cannot be listed would leave its images out in silence."""
    raise error


def _glob(pattern: str) -> Iterator[Item]:
    for path in sorted(glob.iglob(pattern, recursive=True)):
        if os.path.isfile(path) and os.path.basename(path) != DICOMDIR:
            yield Item(path, path)


def _manifest(file: Path, column: str) -> Iterator[Item]:
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(file) as table:
            if column not in (names := table.schema_arrow.names):
                raise InvalidRequest(f"{unknown_key(column, names, f'the columns of {file}')}; give --column")
            for batch in table.iter_batches(4096, columns=[column]):
                for name in batch.column(0).to_pylist():
                    if name:
                        yield Item(str(name), os.path.join(file.parent, str(name)))
    except ArrowInvalid as error:
        raise InvalidRequest(f"{file}: is no Parquet file: {error}") from None
