"""A table of one's own (CSV, Parquet, JSON Lines), a study a row: ``image`` or ``images``, and what is known of it.

Lists are written with ``;`` or ``|`` between, or as JSON. What is known: ``labels`` (names; ``?NAME`` is uncertain),
``options`` and ``answer`` with ``question``, ``boxes`` (JSON: label, x1, y1, x2, y2 in pixels) with ``disease`` or
``phrase``, or ``report``. Also taken: ``study``, ``patient``, ``view``, ``sex``, ``age``, ``portable``, ``source``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.adapters.questions import plain_options, right_options
from cxr_triton.evaluate.rows import Box
from cxr_triton.evaluate.study import UNCERTAIN, Source, Studies, Study, groups, sex
from cxr_triton.evaluate.tables import rows_of

NEEDS = {
    "labels": ("labels",),
    "options": ("question", "answer"),
    "boxes": ("boxes",),
    "report": ("report",),
}
PLACEHOLDERS = ("question", "disease", "phrase", "indication", "anatomy", "text")


def studies(source: Source) -> Studies:
    """Rows in their order."""
    given = Path(source.data.path)
    path = given if given.is_file() else source.file("*.csv", "*.parquet", "*.jsonl")
    first = next(iter(rows_of(path)), {})
    pictures = "images" if "images" in first else "image"
    for number, row in enumerate(rows_of(path, (pictures, *NEEDS[source.data.kind], *source.data.groups)), 1):
        yield _study(source, row, pictures, f"{path.name}, row {number}")


def _study(source: Source, row: dict[str, str], pictures: str, where: str) -> Study:
    images = [row[pictures].strip()] if pictures == "image" else many(row[pictures])
    options = plain_options(many(row.get("options", "")))
    right, fault = right_options(many(row["answer"]), options) if source.data.kind == "options" else ((), "")
    variables: dict[str, str | list[str]] = {"options": options} if options else {}
    variables |= {name: row[name] for name in PLACEHOLDERS if row.get(name)}
    return Study(
        name=row.get("study") or where,
        patient=row.get("patient", ""),
        images=tuple(source.image(image, view=row.get("view", "")) for image in images if image),
        groups=groups(
            view=row.get("view", "").upper(),
            sex=sex(row.get("sex", "")),
            age=row.get("age"),
            portable=row.get("portable"),
            source=row.get("source"),
            **{name: row[name] for name in source.data.groups},
        ),
        found={name.lstrip("?"): UNCERTAIN if name[0] == "?" else 1 for name in many(row.get("labels", ""))},
        options=right,
        boxes=_boxes(row["boxes"], where) if source.data.kind == "boxes" else (),
        text=row.get("report") or None,
        variables=variables,
        fault=fault,
    )


def many(cell: str) -> list[str]:
    """Parts of a cell: JSON's list, or split at ``;`` and ``|``."""
    if cell.lstrip().startswith("["):
        try:
            return [str(part) for part in json.loads(cell)]
        except ValueError:
            pass
    return [part.strip() for part in re.split(r"[;|]", cell) if part.strip()]


def _boxes(cell: str, where: str) -> tuple[Box, ...]:
    try:
        given: list[dict[str, Any]] = json.loads(cell or "[]")
        return tuple(
            Box(
                label=box.get("label"), corners=(float(box["x1"]), float(box["y1"]), float(box["x2"]), float(box["y2"]))
            )
            for box in given
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"{where}: boxes {cell!r:.60} are no JSON list of label, x1, y1, x2, y2: {type(error).__name__} {error}"
        ) from None
