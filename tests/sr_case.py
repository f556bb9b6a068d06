"""What the tests of a reading's objects share: a radiograph, a reading of it, and fixed options."""

from __future__ import annotations

import datetime
import json

import numpy as np
from pydicom.dataset import Dataset

from cxr_triton import phantom, phantom_file
from cxr_triton.client.objects.codes import LABELS
from cxr_triton.client.objects.source import source_header
from cxr_triton.client.objects.study import ObjectOptions
from cxr_triton.identity import UIDS, identity_of
from cxr_triton.pixels.dicom import read_image
from cxr_triton.reading import Reading, parse

TEXT = (
    "<think>Heart: larger than half of the chest, ratio ≥ 0.5 – see “silhouette”.\n\nПлевра 胸膜 الجنبة.</think>"
    "<answer>Cardiomegaly, Edema</answer>"
)
BOXES = "<|ref|>edema<|/ref|><|box|>(10,20),(60,45.5)<|/box|><|ref|>the left base<|/ref|><|box|>(0,0),(100,100)<|/box|>"
OPTIONS = ObjectOptions(made_at=datetime.datetime(2026, 11, 22, 9, 30, 5, tzinfo=datetime.UTC), digests=("ab" * 32,))


def file(**options) -> bytes:
    """A phantom as a DICOM file, the same bytes each time."""
    return phantom_file.write_dicom(phantom.draw(np.random.default_rng(3)), seed="sr", **options)


def header(**attributes) -> Dataset:
    """Header of `file` with other attributes."""
    source = source_header(file())
    for keyword, value in attributes.items():
        setattr(source, keyword, value)
    return source


def identity(source: Dataset) -> dict:
    """What a server records of `file` under the UIDs of `source`."""
    data = file()
    return {
        **identity_of(data, read_image(data)),
        **{k: str(source[n.replace(" ", "")].value) for k, n in UIDS.items()},
    }


def reading(*sources: Dataset, text: str = TEXT, answer: str = "labels", **changes) -> dict:
    """READING of sources, as a server of a labels model gives it."""
    sizes = [(source.Rows, source.Columns) for source in sources]
    parsed = parse(
        text,
        grammar="think_answer",
        answer=answer,
        labels=tuple(LABELS),
        finish_reason=changes.pop("finish_reason", "stop"),
        image_sizes=sizes,
    )
    model = {
        "profile": "phantom",
        "title": "Phantom reader",
        "revision": "r1",
        "engine": "onnxruntime",
        "precision": "fp32",
        "bundle": "0123456789abcdef" * 4,
        "verification": "none",
        "labels": list(LABELS),
    }
    images = tuple(
        {
            "rows": source.Rows,
            "columns": source.Columns,
            "preset": "mimic_jpg",
            "flags": ["view_unknown"],
            "identity": identity(source),
        }
        for source in sources
    )
    facts = {"task": "findings", "prompt": "Find abnormalities.", "model": model, "images": images}
    return json.loads(Reading.of(parsed, **{**facts, "notice": "A test fixture wrote this.", **changes}).to_json())


def with_boxes(source: Dataset, boxes: str = BOXES) -> dict:
    """READING of a grounding task."""
    return reading(source, text=f"<think>Look.</think><answer>{boxes}</answer>", answer="boxes", task="detection")
