"""NIH ChestX-ray14: ``Data_Entry_2017*.csv``, ``test_list.txt`` and ``train_val_list.txt``, ``BBox_List_2017.csv``.

Pictures lie in ``images/`` or in ``images_001/images/`` to ``images_012/images/``. Splits are ``test``, ``train_val``
and ``all``. Boxes are on the published PNG files of 1024 x 1024 pixels.
"""

from __future__ import annotations

import csv
from pathlib import Path

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.rows import Box
from cxr_triton.evaluate.study import Source, Studies, Study, groups, sex
from cxr_triton.evaluate.tables import rows_of
from cxr_triton.evaluate.vocabulary import OF_NIH

COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "View Position")


def studies(source: Source) -> Studies:
    """Pictures in the order of the table, each a study of its own."""
    path = source.file("Data_Entry_2017.csv", "Data_Entry_2017*.csv")
    wanted = _split(source)
    folders = [f.relative_to(source.root).as_posix() for f in (source.root / "images", *_parts(source.root))]
    boxes = _boxes(source.file("BBox_List_2017.csv")) if source.data.kind == "boxes" else {}
    for row in rows_of(path, COLUMNS):
        name = row["Image Index"]
        if wanted is not None:
            if name not in wanted:
                continue
            wanted.discard(name)
        study = Study(
            name=name,
            patient=row["Patient ID"],
            images=(source.image(name, *folders, view=row["View Position"]),),
            groups=groups(
                view=row["View Position"].upper(),
                sex=sex(row.get("Patient Gender") or row.get("Patient Sex", "")),
                age=row.get("Patient Age"),
            ),
            found={label.strip(): 1 for label in row["Finding Labels"].split("|") if label.strip()},
        )
        yield from _asked_for(study, boxes.pop(name, {})) if source.data.kind == "boxes" else [study]
    if wanted:
        source.counted["picture of the split's list that is not in the table"] += len(wanted)
    if boxes and source.data.split == "all":
        source.counted["picture of the boxes' list that is not in the table"] += len(boxes)


def _parts(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("images_*/images") if path.is_dir())


def _split(source: Source) -> set[str] | None:
    """Names of the pictures of the split; None takes all."""
    split = source.data.split
    if split == "all":
        return None
    if split not in ("test", "train_val"):
        raise InvalidRequest(f"split: {split!r} is none of test, train_val, all")
    lines = source.file(f"{split}_list.txt", f"{split}_list*.txt").read_text("utf-8").split()
    return set(lines)


def _boxes(path: Path) -> dict[str, dict[str, list[Box]]]:
    """Picture to label to its boxes; the header's last columns are cut up by commas, so that they go by place."""
    found: dict[str, dict[str, list[Box]]] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        if (next(lines, [""]) or [""])[0].strip() != "Image Index":
            raise InvalidRequest(f"{path.name}: its first column is not 'Image Index'; give the published list")
        for line in lines:
            try:
                x, y, width, height = (float(cell) for cell in line[2:6])
                name, label = line[0], "Infiltration" if line[1] == "Infiltrate" else line[1]
            except (ValueError, IndexError):
                raise InvalidRequest(
                    f"{path.name}:{lines.line_num}: holds no picture, label and four numbers"
                ) from None
            box = Box(label=label, corners=(x, y, x + width, y + height))
            found.setdefault(name, {}).setdefault(label, []).append(box)
    return found


def _asked_for(study: Study, boxes: dict[str, list[Box]]) -> Studies:
    """A question for each label that has boxes."""
    for label, drawn in boxes.items():
        disease = (OF_NIH.get(label) or label).lower()
        yield Study(
            name=f"{study.name}/{label}",
            patient=study.patient,
            images=study.images,
            groups=study.groups,
            boxes=tuple(drawn),
            variables={"disease": disease, "phrase": disease},
        )
