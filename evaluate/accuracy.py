"""Whether an engine is right enough: the record that a bundle's manifest keeps."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cxr_triton.evaluate.compare import compare, judge
from cxr_triton.evaluate.kinds import Columns
from cxr_triton.evaluate.rows import read
from cxr_triton.evaluate.summary import summarize

SCHEMA = 1


def record(result: Path, limits: Mapping[str, float], against: Path | None = None) -> dict[str, Any]:
    """What a result says of an engine.

    Parameters
    ----------
    result : Path
    limits : mapping
        Measures to the least that they have to be; see `cxr_triton.evaluate.compare.judge`.
    against : Path, optional
        Result on the same data that it must not be worse than.

    Returns
    -------
    dict
        ``passed``, ``verdict``, ``checks``, all ``measures`` with intervals, and what was asked about which data.

    Raises
    ------
    InvalidRequest
        A limit is of a measure that the result does not have, or both results are of other data.
    """
    columns = _columns(result)
    summary = summarize(columns)
    comparison = compare(_columns(against), columns) if against else None
    header = columns.header
    return {
        "schema": SCHEMA,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **judge(summary, limits, comparison),
        "measures": summary["measures"],
        "kind": header.kind,
        "data": header.data,
        "request": header.request,
        "seed": header.seed,
    }


def _columns(path: Path) -> Columns:
    found = read(path)
    return Columns(found.header, iter(found))
