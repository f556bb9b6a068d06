"""A row of an archive: which image it is of, and its reading or its error. Parquet, one column each."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from cxr_triton import __version__
from cxr_triton.archive.item import Item
from cxr_triton.errors import InvalidImage
from cxr_triton.identity import UIDS, hashed, sha256
from cxr_triton.reading import Reading

UNREADABLE, NO_IMAGE = "UNREADABLE", "NO_IMAGE"
"""Beside `cxr_triton.errors.CODES`: the file could not be read; it is neither DICOM, PNG nor JPEG."""
_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())

SCHEMA = pa.schema(
    {
        "image": _TEXT,
        "file_sha256": _TEXT,
        **dict.fromkeys(UIDS, _TEXT),
        "identifiers": _TEXT,
        "status": _TEXT,
        "error_code": _TEXT,
        "error": _TEXT,
        "labels": _TEXTS,
        "unknown_labels": _TEXTS,
        "scores": pa.map_(_TEXT, pa.float64()),
        "options": _TEXTS,
        "answer": _TEXT,
        "flags": _TEXTS,
        "prompt_tokens": pa.int64(),
        "completion_tokens": pa.int64(),
        "asked_ms": pa.float64(),
        "read_at": pa.timestamp("ms", "UTC"),
        "profile": _TEXT,
        "revision": _TEXT,
        "engine": _TEXT,
        "precision": _TEXT,
        "bundle": _TEXT,
        "server": _TEXT,
        "cxr_triton": _TEXT,
        "reading": _TEXT,
    }
)
"""Columns; `docs/archive.md` says what each holds."""
_OF_MODEL = ("profile", "revision", "engine", "precision", "bundle")


def written(name: str) -> str:
    r"""A name as text: bytes of a path that are no UTF-8 become ``\xff`` and such."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def key_of(name: str) -> bytes:
    """What tells an item from all others: 16 bytes of the SHA-256 of its name as it is written."""
    return hashlib.sha256(written(name).encode()).digest()[:16]


def keys_of(images: Iterable[str], identifiers: str) -> Iterable[bytes]:
    """Keys of the values of the column ``image``."""
    if identifiers == "hashed":
        return (bytes.fromhex(image[:32]) for image in images)
    return map(key_of, images)


def read_row(
    item: Item, reading: Reading, *, data: bytes, identifiers: str, asked_ms: float, server: str
) -> dict[str, Any]:
    """The row of an image that was read.

    Parameters
    ----------
    item : Item
    reading : Reading
        With its identities as `identifiers` says.
    data : bytes
        The file.
    identifiers : str
        Of `cxr_triton.identity.IDENTIFIERS`.
    asked_ms : float
        From the request to the reading.
    server : str
        Name and version of what read.

    Raises
    ------
    InvalidImage
        It is of another object than the one that was asked for.
    """
    text = reading.to_json()
    facts = [flag for image in reading.images for flag in image.get("flags", ())]
    identity: dict[str, str] = next((image.get("identity", {}) for image in reading.images), {})
    row = _row(item, identifiers, sha256(data), server)
    for key, name in UIDS.items():
        if key in item.uids and identity.get(key, row[key]) != row[key]:
            raise InvalidImage(f"the server gave another object than it was asked for: its {name} differs")
    return {
        **row,
        **{key: uid for key in UIDS if (uid := identity.get(key))},
        "status": reading.status,
        "labels": [finding.label for finding in reading.findings],
        "unknown_labels": list(reading.unknown_labels),
        "scores": list(json.loads(text).get("scores", {}).items()),
        "options": list(reading.options),
        "answer": reading.answer,
        "flags": list(dict.fromkeys([*reading.flags, *facts])),
        **{name: reading.usage.get(name) for name in ("prompt_tokens", "completion_tokens")},
        "asked_ms": round(asked_ms, 3),
        **{name: _told(reading.model, name) for name in _OF_MODEL},
        "reading": text,
    }


def error_row(
    item: Item, code: str, said: str, *, data: bytes | None, identifiers: str, server: str = ""
) -> dict[str, Any]:
    """The row of an image that has no reading; `data` is None where its file is not known either."""
    digest = None if data is None else sha256(data)
    return {**_row(item, identifiers, digest, server), "error_code": code, "error": said}


def _row(item: Item, identifiers: str, digest: str | None, server: str) -> dict[str, Any]:
    is_hashed = identifiers == "hashed"
    name = written(item.name)
    return {
        "image": sha256(name.encode()) if is_hashed else name,
        "file_sha256": digest,
        **(_without_form(hashed(item.uids)) if is_hashed else item.uids),
        "identifiers": identifiers,
        "read_at": datetime.datetime.now(datetime.UTC),
        "server": server or None,
        "cxr_triton": __version__,
    }


def _without_form(identity: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in identity.items() if key in UIDS}


def _told(model: Mapping[str, Any], name: str) -> str | None:
    value = model.get(name)
    return None if value is None else str(value)


def packed(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as an Arrow stream."""
    table = pa.Table.from_pylist(list(rows), SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def unpacked(stream: bytes) -> pa.Table:
    """Rows of an Arrow stream."""
    return pa.ipc.open_stream(stream).read_all()
