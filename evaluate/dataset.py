"""A data set as it is evaluated: chosen, mapped and numbered once, on a disk, so that memory does not grow with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.adapters import FORMATS, format_of
from cxr_triton.evaluate.config import Data
from cxr_triton.evaluate.rows import Row, Truth, line_of, row_of
from cxr_triton.evaluate.study import Image, Source, Studies, Study
from cxr_triton.evaluate.vocabulary import Vocabulary


@dataclass(frozen=True)
class Case:
    """A study that is asked: its row without an answer, and what its question is about."""

    row: Row
    variables: dict[str, str | list[str]]
    fault: str


class DataSet:
    """Cases in order; see `prepare`.

    Attributes
    ----------
    data : Data
        With the kind that is evaluated.
    labels : tuple of str
    mapping, counted : dict
        See `cxr_triton.evaluate.rows.Header`.
    digest : str
        ``sha256:`` of all that is asked and known, in order.
    patients, images : int
    """

    def __init__(self, data: Data, spool: Path, offsets: array, vocabulary: Vocabulary, counted: Counter[str]):
        self.data, self.labels, self.mapping = data, vocabulary.labels, dict(vocabulary.mapping)
        self._spool, self._offsets = spool, offsets
        digest, patients, self.images = hashlib.sha256(), set[str](), 0
        folder = data.folder
        for line in self._lines():
            digest.update(line)
            row = json.loads(json.loads(line)[0])
            patients.add(row["patient"])
            self.images += len(row["images"])
            missing = sum(not (folder / image).is_file() for image in row["images"])
            counted.update({"missing file": missing} if missing else {})
        self.patients, self.digest = len(patients), f"sha256:{digest.hexdigest()}"
        self.counted = dict(sorted(counted.items()))

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Case]:
        return map(_case, self._lines(), range(len(self)))

    def _lines(self) -> Iterator[bytes]:
        with open(self._spool, "rb") as file:
            for offset in self._offsets:
                file.seek(offset)
                yield file.readline()

    def facts(self) -> dict[str, Any]:
        """``data`` of a result's header."""
        data = self.data
        return {
            "name": data.name or data.format,
            "format": data.format,
            "split": data.split,
            "studies": len(self),
            "patients": self.patients,
            "images": self.images,
            "digest": self.digest,
        }


def prepare(data: Data, spool: Path) -> DataSet:
    """Read a data set's tables and write its cases to the file `spool`.

    Raises
    ------
    InvalidRequest
        Format or kind do not fit, a table or column is missing, a study is there twice, or nothing is left.
    """
    chosen = format_of(data.format)
    kind = data.kind or chosen.kinds[0]
    if kind not in chosen.kinds:
        fitting = ", ".join(name for name, each in FORMATS.items() if kind in each.kinds)
        raise InvalidRequest(f"format {data.format} has no {kind}, only {', '.join(chosen.kinds)}; {kind}: {fitting}")
    data = dataclasses.replace(data, kind=kind, name=data.name or data.format)
    source = Source(data)
    mapped = chosen.mapped if kind == "labels" else {}
    vocabulary = Vocabulary(mapped, data, complete=chosen.complete, counted=source.counted)
    offsets, seen = array("Q"), set[int]()
    with open(spool, "wb") as file:
        for study in _pictured(chosen.studies(source), data, source.counted):
            name = int.from_bytes(hashlib.blake2b(study.name.encode(), digest_size=8).digest())
            if name in seen:
                raise InvalidRequest(f"{data.path}: study {study.name!r:.80} is there twice; names have to be unique")
            seen.add(name)
            offsets.append(file.tell())
            file.write(_spooled(study, data, vocabulary))
    if not offsets:
        raise InvalidRequest(f"{data.path}: no study of split {data.split} is left; see {dict(source.counted)}")
    if data.limit and data.limit < len(offsets):
        drawn = sorted(random.Random(data.seed).sample(range(len(offsets)), data.limit))  # noqa: S311  # keeps no secret
        source.counted["study that was not drawn"] += len(offsets) - data.limit
        offsets = array("Q", (offsets[i] for i in drawn))
    return DataSet(data, spool, offsets, vocabulary, source.counted)


def _pictured(studies: Studies, data: Data, counted: Counter[str]) -> Studies:
    """Studies with the pictures that are to be read; one that has none is counted."""
    for study in studies:
        images = [image for image in study.images if not data.views or image.view in data.views]
        if data.pictures == "each" and len(study.images) > 1:
            yield from (_with(study, [image], f"{study.name}/{image.path}") for image in images)
            continue
        if data.pictures == "frontal" and len(study.images) > 1:
            images = [image for image in images if image.is_frontal][:1]
        if images or not (study.images or study.variables):
            yield _with(study, images, study.name)
        else:
            counted["study without a picture of the views that are read"] += 1


def _with(study: Study, images: list[Image], name: str) -> Study:
    views = {image.view for image in images if image.view}
    groups = study.groups | ({"view": views.pop()} if len(views) == 1 else {})
    return dataclasses.replace(study, name=name, images=tuple(images), groups=dict(sorted(groups.items())))


def _spooled(study: Study, data: Data, vocabulary: Vocabulary) -> bytes:
    labels, readers = vocabulary.truth(study) if data.kind == "labels" else ({}, {})
    row = Row(
        number=0,
        study=study.name,
        patient=hashlib.sha256(f"{data.name}\n{study.patient or study.name}".encode()).hexdigest()[:16],
        groups=study.groups,
        images=tuple(image.path for image in study.images),
        kind=data.kind,
        truth=Truth(labels=labels, options=study.options, boxes=study.boxes, text=study.text, readers=readers),
        answer=None,
        status="error",
    )
    return json.dumps([line_of(row), study.variables, study.fault]).encode() + b"\n"


def _case(line: bytes, number: int) -> Case:
    row, variables, fault = json.loads(line)
    return Case(dataclasses.replace(row_of(row), number=number), variables, fault)
