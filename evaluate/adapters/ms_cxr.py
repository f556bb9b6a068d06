"""MS-CXR: ``MS_CXR_Local_Alignment_v*.csv`` beside MIMIC-CXR's ``files/``: phrases of reports, each with its boxes."""

from __future__ import annotations

from pathlib import Path

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.rows import Box
from cxr_triton.evaluate.study import Source, Studies, Study, groups
from cxr_triton.evaluate.tables import rows_of

NUMBERS = ("x", "y", "w", "h", "image_width", "image_height")
COLUMNS = ("dicom_id", "category_name", "label_text", "path", *NUMBERS)


def studies(source: Source) -> Studies:
    """Phrases in the order of the table, with all their boxes; without a column ``split`` every phrase is taken."""
    given = Path(source.data.path)
    table = given if given.is_file() else source.file("MS_CXR_Local_Alignment_v*.csv")
    phrases: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows_of(table, COLUMNS):
        if row.get("split", source.data.split) in (source.data.split, "") or source.data.split == "all":
            phrases.setdefault(tuple(row[name] for name in COLUMNS[:4]), []).append(row)
    for (dicom_id, category, phrase, path), rows in phrases.items():
        patient = next((part for part in Path(path).parts if part[:1] == "p" and len(part) > 3), "")
        yield Study(
            name=f"{dicom_id}/{category}/{phrase}",
            patient=patient.removeprefix("p"),
            images=(source.image(path),),
            groups=groups(category=category),
            boxes=tuple(_box(row, category) for row in rows),
            variables={"phrase": phrase, "disease": category.lower()},
        )


def _box(row: dict[str, str], label: str) -> Box:
    """In percent, because the picture may have been scaled since."""
    try:
        x, y, w, h, width, height = (float(row[name]) for name in NUMBERS)
    except ValueError:
        raise InvalidRequest(f"{row['dicom_id']}: its box or size is no number") from None
    corners = (100 * x / width, 100 * y / height, 100 * (x + w) / width, 100 * (y + h) / height)
    return Box(label=label, corners=corners, unit="percent")
