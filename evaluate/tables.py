"""Rows of a data set's tables, one at a time: CSV (packed or not), Parquet, JSON Lines."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from cxr_triton.errors import InvalidRequest, unknown_key

MAX_CELL_BYTES = 1 << 26


def rows_of(path: Path, columns: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """Rows by column; every cell is text, of a missing one empty, of JSON's lists and objects JSON.

    Parameters
    ----------
    path : Path
        ``.parquet``, ``.jsonl``, or else CSV, also ``.gz``.
    columns : sequence of str
        Those that there have to be.

    Raises
    ------
    InvalidRequest
        A column is missing (names the nearest that is there), or a row is none of a table.
    """
    kind = path.suffix.lower()
    yield from (_parquet if kind == ".parquet" else _json_lines if kind == ".jsonl" else _csv)(path, columns)


def _require(path: Path, columns: Sequence[str], there: Sequence[str]) -> None:
    for column in columns:
        if column not in there:
            said = unknown_key(column, there, path.name).replace(f"unknown key {column!r}", f"no column {column!r}")
            raise InvalidRequest(said.replace("allowed:", "it has"))


def _csv(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    csv.field_size_limit(MAX_CELL_BYTES)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            _require(path, columns, [name.strip() for name in reader.fieldnames or ()])
            for row in reader:
                yield {key.strip(): value or "" for key, value in row.items() if key is not None}
        except (csv.Error, UnicodeDecodeError, EOFError, OSError) as error:
            raise InvalidRequest(f"{path}:{reader.line_num + 1}: is no CSV in UTF-8: {error}") from None


def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = {key: _text(value) for key, value in json.loads(line).items()}
            except (ValueError, AttributeError, RecursionError) as error:
                raise InvalidRequest(f"{path}:{number}: is no JSON object: {error}") from None
            _require(path, columns, list(row))
            yield row


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(path) as file:
            _require(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    yield {key: _text(value) for key, value in row.items()}
    except ArrowInvalid as error:
        raise InvalidRequest(f"{path}: is no Parquet file: {error}") from None


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
