"""Readings that `cxr-triton archive` wrote, in the place of a server: an evaluation of them asks nothing again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cxr_triton.client.wire import ServerInfo
from cxr_triton.errors import CODES, CxrError, InvalidImage, InvalidRequest, ServerMismatch
from cxr_triton.identity import sha256
from cxr_triton.reading import Reading

HEADER = "_archive.json"
_COLUMNS = ("file_sha256", "reading", "error_code", "error", "server")
_SAME = ("task", "prompt", "mode", "variables", "max_new_tokens", "temperature", "top_p", "repetition_penalty")
"""Keys of a request; an archive's has those that are not None."""


class Archive:
    """Takes the place of `cxr_triton.client.AsyncReader`: gives the reading of the image with the same bytes.

    Readings lie in a temporary file, so that memory does not grow with them.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    InvalidRequest
        It is no archive.
    """

    def __init__(self, folder: Path):
        try:
            self._request = json.loads((folder / HEADER).read_bytes())["request"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InvalidRequest(f"{folder}: is no archive; give what `cxr-triton archive -o` wrote") from None
        self.folder, self.server = folder, "archive"
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `__aexit__`
        self._places: dict[bytes, int] = {}
        for digest, line in self._rows():
            self._places[digest] = self._spool.tell()
            self._spool.write(json.dumps(line).encode() + b"\n")

    def _rows(self) -> Iterator[tuple[bytes, list[str | None]]]:
        from pyarrow import parquet

        for path in sorted(self.folder.glob("readings-*.parquet")):
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(1024, columns=list(_COLUMNS)):
                    for row in batch.to_pylist():
                        self.server = row["server"] or self.server
                        if row["file_sha256"]:
                            yield bytes.fromhex(row["file_sha256"]), [row["reading"], row["error_code"], row["error"]]

    async def __aenter__(self) -> Archive:
        return self

    async def __aexit__(self, *exc) -> None:
        self._spool.close()

    async def server_info(self) -> ServerInfo:
        """What wrote the readings."""
        name, _, version = self.server.rpartition(" ")
        return ServerInfo(name or "archive", version, "cxr_reader", ())

    def read(self, images: Sequence[bytes], **asked: Any) -> Stored:
        """The reading of the one image.

        Raises
        ------
        ServerMismatch
            The archive was asked something else.
        InvalidRequest
            It has no such image, or the study has not one image.
        CxrError
            As it stands in the image's row.
        """
        differing = [key for key in _SAME if asked.get(key) != self._request.get(key)]
        if differing:
            raise ServerMismatch(
                f"{self.folder}: was asked with another {', '.join(differing)}; evaluate with the same, or ask a server"
            )
        if len(images) != 1:
            raise InvalidRequest(f"the study has {len(images)} images, an archive reads each by itself; see `pictures`")
        place = self._places.get(bytes.fromhex(sha256(images[0])))
        if place is None:
            raise InvalidRequest(f"{self.folder}: has no image of these bytes; read it with `cxr-triton archive`")
        self._spool.seek(place)
        return Stored(*json.loads(self._spool.readline()))


class Stored:
    """A row's reading, or its error."""

    def __init__(self, reading: str | None, code: str | None, said: str | None):
        self._reading, self._code, self._said = reading, code, said

    async def result(self) -> Reading:
        """The reading; raises its error."""
        if self._reading is not None:
            return Reading.from_json(self._reading)
        error: type[CxrError] = CODES.get(self._code or "", InvalidImage)
        raise error(self._said or "")
