"""CheXpert: ``train.csv``, ``valid.csv``, ``test.csv`` (``test_labels.csv``), or a table by study, ``groundtruth.csv``.

A row is a picture; those of a study follow each other and have its labels. 1 is present, 0 absent, -1 uncertain, empty
not mentioned.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.study import SUFFIXES, Image, Source, Studies, Study, groups, sex, value_of
from cxr_triton.evaluate.tables import rows_of
from cxr_triton.evaluate.vocabulary import CHEXPERT

_PICTURE = re.compile(r"(patient[^/]+)/(study[^/]+)")


def studies(source: Source) -> Studies:
    """Studies in the order of the table."""
    split = source.data.split
    names = [f"{split}.csv", f"{split}_labels.csv", *(["groundtruth.csv"] if split == "test" else [])]
    path = source.file(*names)
    labels = [label for label in CHEXPERT if label in next(iter(rows_of(path)), {})]
    if not labels:
        raise InvalidRequest(f"{path.name}: has none of CheXpert's 14 labels as a column; give CheXpert's own table")
    rows = ((_place(row, path.name), row) for row in rows_of(path))
    for place, of_study in itertools.groupby(rows, key=lambda pair: pair[0]):
        yield _study(source, place, [row for _, row in of_study], labels)


def _place(row: dict[str, str], table: str) -> str:
    """Patient and study of a row."""
    path = row.get("Path") or row.get("Study") or ""
    if not (found := _PICTURE.search(path)):
        raise InvalidRequest(f"{table}: {path!r:.80} names no patient and study, expected …/patient00001/study1/…")
    return found[0]


def _study(source: Source, place: str, rows: list[dict[str, str]], labels: Iterable[str]) -> Study:
    found = {label: value_of(rows[0][label]) for label in labels}
    if any({label: value_of(row[label]) for label in labels} != found for row in rows[1:]):
        source.counted["study whose pictures have different labels: the first one's are taken"] += 1
    first = rows[0]
    return Study(
        name=place,
        patient=place.partition("/")[0],
        images=tuple(_images(source, place, rows)),
        groups=groups(sex=sex(first.get("Sex", "")), age=first.get("Age"), view=_view(first)),
        found=found,
    )


def _images(source: Source, place: str, rows: list[dict[str, str]]) -> Iterable[Image]:
    """Those of the rows, or where the table is by study, those in its folder."""
    if "Path" in rows[0]:
        for row in rows:
            parts = PurePosixPath(row["Path"]).parts
            # The table's paths begin with the name of the folder that was unpacked, which may be called otherwise.
            ways = ["/".join(parts[skip:]) for skip in range(len(parts) - 3)]
            path = next((way for way in ways if (source.root / way).is_file()), "/".join(parts[-4:]))
            yield source.image(path, view=_view(row))
        return
    folder = source.root / source.data.split / place
    for file in sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES):
        yield Image(path=file.relative_to(source.root).as_posix(), view=_view({"Path": file.name}))


def _view(row: dict[str, str]) -> str:
    """``PA``, ``AP``, ``FRONTAL`` or ``LATERAL``, as well as the row says it."""
    plane = row.get("Frontal/Lateral", "").upper() or ("LATERAL" if "lateral" in row.get("Path", "") else "FRONTAL")
    return plane if plane == "LATERAL" else row.get("AP/PA", "").upper() or plane
