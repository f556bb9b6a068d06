"""VinDr-CXR: ``annotations/image_labels_SPLIT.csv`` and ``annotations_SPLIT.csv``; pictures in ``SPLIT/``.

Of ``train`` every picture was read by three radiologists; who decides is `Data.readers`. Of ``test`` there is their
consensus. Boxes are on the original pictures.
"""

from __future__ import annotations

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.rows import Box
from cxr_triton.evaluate.study import Found, Source, Studies, Study, value_of
from cxr_triton.evaluate.tables import rows_of

NOT_LABELS = ("image_id", "rad_id")


def studies(source: Source) -> Studies:
    """Pictures in the order of the table, each a study of its own."""
    split = source.data.split
    path = source.file(f"annotations/image_labels_{split}.csv", f"image_labels_{split}.csv")
    pictures: dict[str, dict[str, Found]] = {}
    for row in rows_of(path, ("image_id",)):
        reader = row.get("rad_ID") or row.get("rad_id") or ""
        found = {label: value_of(cell) for label, cell in row.items() if label.lower() not in NOT_LABELS}
        if not found:
            raise InvalidRequest(f"{path.name}: has no label as a column; give the published table")
        pictures.setdefault(row["image_id"], {})[reader] = found
    is_of_boxes = source.data.kind == "boxes"
    boxes = _boxes(source, split) if is_of_boxes else {}
    for name, readers in pictures.items():
        study = Study(
            name=name,
            images=(source.image(f"{name}.dicom", split, ""),),
            found=readers.get("", {}),
            readers={} if "" in readers else readers,
        )
        yield from _asked_for(study, boxes.get(name, {})) if is_of_boxes else [study]


def _boxes(source: Source, split: str) -> dict[str, dict[str, list[Box]]]:
    """Picture to class to its boxes, every reader's."""
    path = source.file(f"annotations/annotations_{split}.csv", f"annotations_{split}.csv")
    found: dict[str, dict[str, list[Box]]] = {}
    corners = ("x_min", "y_min", "x_max", "y_max")
    for row in rows_of(path, ("image_id", "class_name", *corners)):
        if not row["x_min"]:  # of "No finding"
            continue
        try:
            x1, y1, x2, y2 = (float(row[name]) for name in corners)
        except ValueError:
            raise InvalidRequest(f"{path.name}: {row['image_id']} has a box that is no four numbers") from None
        reader = row.get("rad_id") or row.get("rad_ID") or None
        box = Box(label=row["class_name"], corners=(x1, y1, x2, y2), reader=reader)
        found.setdefault(row["image_id"], {}).setdefault(row["class_name"], []).append(box)
    return found


def _asked_for(study: Study, boxes: dict[str, list[Box]]) -> Studies:
    """A question for each class that has boxes."""
    for label, drawn in boxes.items():
        yield Study(
            name=f"{study.name}/{label}",
            patient=study.name,
            images=study.images,
            boxes=tuple(drawn),
            variables={"disease": label.lower(), "phrase": label.lower()},
        )
