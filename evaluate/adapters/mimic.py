"""MIMIC-CXR (DICOM) and MIMIC-CXR-JPG: split, metadata, and the labels of CheXpert, NegBio or of radiologists."""

from __future__ import annotations

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.study import Found, Image, Source, Studies, Study, groups, value_of
from cxr_triton.evaluate.tables import rows_of
from cxr_triton.evaluate.vocabulary import OF_MIMIC

LABELS = {
    "chexpert": "mimic-cxr-2*-chexpert.csv",
    "negbio": "mimic-cxr-2*-negbio.csv",
    "radiologist": "mimic-cxr-2*-test-set-labeled.csv",
}


def studies(source: Source) -> Studies:
    """Studies of the split in the order of the metadata. One without labels is counted and left out."""
    names = _names(source)
    found = _labels(source)
    by_study: dict[str, list[dict[str, str]]] = {}
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition")
    for row in rows_of(source.file("mimic-cxr-2*-metadata.csv"), columns):
        if row["dicom_id"] in names:
            kept = {key: row.get(key, "") for key in (*columns, "PerformedProcedureStepDescription")}
            by_study.setdefault(row["study_id"], []).append(kept)
    for study, rows in by_study.items():
        labels = found.pop(study, None)
        if labels is None:
            source.counted[f"study without labels of {source.data.labeller}"] += 1
            continue
        first = rows[0]
        said = first["PerformedProcedureStepDescription"].upper()
        yield Study(
            name=study,
            patient=first["subject_id"],
            images=tuple(_image(source, row) for row in rows),
            groups=groups(
                view=first["ViewPosition"].upper(), portable=("yes" if "PORT" in said else "no") if said else ""
            ),
            found=labels,
        )


def _names(source: Source) -> set[str]:
    """``dicom_id`` of the split's pictures."""
    split, seen = source.data.split, set()
    names = set()
    for row in rows_of(source.file("mimic-cxr-2*-split.csv"), ("dicom_id", "split")):
        seen.add(row["split"])
        if row["split"] == split:
            names.add(row["dicom_id"])
    if not names:
        raise InvalidRequest(f"split: {split!r} is none of {', '.join(sorted(seen))}")
    return names


def _labels(source: Source) -> dict[str, Found]:
    path = source.file(LABELS[source.data.labeller])
    labels = [label for label in OF_MIMIC if label in next(iter(rows_of(path, ("study_id",))), {})]
    if not labels:
        raise InvalidRequest(f"{path.name}: has none of the labels as a column; give the published table")
    return {row["study_id"]: {label: value_of(row[label]) for label in labels} for row in rows_of(path)}


def _image(source: Source, row: dict[str, str]) -> Image:
    patient, study = row["subject_id"], row["study_id"]
    path = f"files/p{patient[:2]}/p{patient}/s{study}/{row['dicom_id']}"
    return source.image(f"{path}.jpg", view=row["ViewPosition"])
