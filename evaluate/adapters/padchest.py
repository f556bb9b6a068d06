"""PadChest: one table of its images, ``PADCHEST_chest_x_ray_images_labels_160K_*.csv``; there are no splits.

Pictures lie in folders named by ``ImageDir`` or together. ``Labels`` is a list in Python's notation.
"""

from __future__ import annotations

import ast

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.study import Source, Studies, Study, groups, sex
from cxr_triton.evaluate.tables import rows_of

COLUMNS = ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Labels")
KEPT = (*COLUMNS, "PatientBirth", "StudyDate_DICOM", "PatientSex_DICOM", "Manufacturer_DICOM", "MethodLabel")
NOT_READ = "exclude"


def studies(source: Source) -> Studies:
    """Studies in the order of their first picture. Those that the data set marks to be excluded are counted."""
    path = source.file("PADCHEST_chest_x_ray_images_labels_160K*.csv", "PADCHEST*.csv", "padchest*.csv")
    if source.data.split not in ("test", "all"):
        raise InvalidRequest(f"split: PadChest has none, so {source.data.split!r} is none; leave it out")
    by_study: dict[str, list[dict[str, str]]] = {}
    for row in rows_of(path, COLUMNS):
        by_study.setdefault(row["StudyID"], []).append({key: row.get(key, "") for key in KEPT})
    for name, rows in by_study.items():
        first, labels = rows[0], _list(rows[0]["Labels"], name)
        if NOT_READ in labels:
            source.counted["study that the data set marks to be excluded"] += 1
            continue
        yield Study(
            name=name,
            patient=first["PatientID"],
            images=tuple(source.image(r["ImageID"], r["ImageDir"], "images", "", view=_view(r)) for r in rows),
            groups=groups(
                view=_view(first),
                sex=sex(first["PatientSex_DICOM"]),
                age=_age(first),
                source=first["Manufacturer_DICOM"],
                labelled_by=first["MethodLabel"],
            ),
            found=dict.fromkeys(labels, 1),
        )


def _list(text: str, study: str) -> list[str]:
    try:
        labels = ast.literal_eval(text) if text.strip() else []
        return [label.strip() for label in labels if label.strip()]
    except (ValueError, SyntaxError, AttributeError, TypeError, MemoryError, RecursionError):
        raise InvalidRequest(f"Labels of study {study}: {text!r:.60} is no list of names") from None


def _view(row: dict[str, str]) -> str:
    """As the data set's working classification; ``L`` is said in full."""
    view = row["Projection"].upper()
    return "LATERAL" if view == "L" else view


def _age(row: dict[str, str]) -> str:
    """Years between the years of birth and study."""
    try:
        return str(int(row["StudyDate_DICOM"][:4]) - int(float(row["PatientBirth"])))
    except ValueError:
        return ""
