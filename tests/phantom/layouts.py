"""Held-out phantoms as labelled data: written in the layouts of published data sets, as DICOM or PNG files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import evaluate

from cxr_triton import phantom, phantom_file

NIH = {"Pleural Effusion": "Effusion", "Lung Opacity": "Infiltration"}
VINDR = {"Pleural Effusion": "Pleural effusion", "No Finding": "No finding"}
LABELS = (*phantom.LABELS, "No Finding")
SUFFIXES = {"dicom": ".dcm", "png": ".png"}


def files(phantoms: Sequence[phantom.Phantom], kind: str) -> list[bytes]:
    """Phantoms as files, both photometrics in turn; a PNG has the pixels that `mimic_jpg` makes of the DICOM file."""
    from PIL import Image

    found = []
    for index, each in enumerate(phantoms):
        photometric = evaluate.variant(index)[1]
        if kind == "dicom":
            found.append(phantom_file.write_dicom(each, photometric=photometric, seed=f"held-out {index}"))
            continue
        file = io.BytesIO()
        Image.fromarray(each.picture("mimic_jpg", photometric)).save(file, "PNG", compress_level=1)
        found.append(file.getvalue())
    return found


def write(folder: Path, layout: str, kind: str, phantoms: Sequence[phantom.Phantom]) -> dict:
    """Write a data set; keys of its DATA.yaml, without a path."""
    pictures, suffix = files(phantoms, kind), SUFFIXES[kind]
    return {"nih": _nih, "chexpert": _chexpert, "vindr-cxr": _vindr}[layout](folder, phantoms, pictures, suffix) | {
        "format": layout,
        "name": "phantoms",
        "suffix": suffix,
        "labels": list(LABELS),
    }


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def _nih(folder, phantoms, pictures, suffix) -> dict:
    head = [
        "Image Index",
        "Finding Labels",
        "Follow-up #",
        "Patient ID",
        "Patient Age",
        "Patient Gender",
        "View Position",
    ]
    rows: list[list[object]] = [[*head, "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]", ""]]
    for index, (each, data) in enumerate(zip(phantoms, pictures, strict=True)):
        height, width = each.stored.shape
        name = f"{index:08}_000.png"
        labels = "|".join(NIH.get(label, label) for label in each.labels)
        rows.append([name, labels, 0, index, 50, "FM"[index % 2], "PA", width, height, 0.143, 0.143, ""])
        _put(folder / f"images_{1 + index % 12:03}/images/{Path(name).with_suffix(suffix)}", data)
    _table(folder / "Data_Entry_2017.csv", rows)
    (folder / "test_list.txt").write_text("\n".join(str(row[0]) for row in rows[1:]))
    return {"split": "test", "mapping": {"Support Devices": "Support Devices"}}


def _chexpert(folder, phantoms, pictures, suffix) -> dict:
    from cxr_triton.evaluate.vocabulary import CHEXPERT

    rows: list[list[object]] = [["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT]]
    for index, (each, data) in enumerate(zip(phantoms, pictures, strict=True)):
        place = f"valid/patient{index:05}/study1/view1_frontal"
        said = [f"{label in each.labels:d}.0" if label in LABELS else "" for label in CHEXPERT]
        rows.append([f"CheXpert-v1.0-small/{place}.jpg", ("Female", "Male")[index % 2], 50, "Frontal", "PA", *said])
        _put(folder / f"{place}{suffix}", data)
    _table(folder / "valid.csv", rows)
    return {"split": "valid"}


def _vindr(folder, phantoms, pictures, suffix) -> dict:
    names = [VINDR.get(label, label) for label in LABELS]
    rows: list[list[object]] = [["image_id", *names]]
    for index, (each, data) in enumerate(zip(phantoms, pictures, strict=True)):
        name = f"{index:032x}"
        rows.append([name, *(f"{label in each.labels:d}" for label in LABELS)])
        _put(folder / f"test/{name}{suffix}", data)
    _table(folder / "annotations" / "image_labels_test.csv", rows)
    return {"split": "test", "mapping": {"Support Devices": "Support Devices"}}
