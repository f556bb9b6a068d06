"""Formats of labelled data sets: one table, a module each; none of the data is shipped."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from cxr_triton.errors import InvalidRequest, unknown_key
from cxr_triton.evaluate import vocabulary
from cxr_triton.evaluate.study import Source, Studies


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a data set is published.

    Attributes
    ----------
    module : str
        Of this package; its ``studies`` gives them.
    kinds : tuple of str
        Of `cxr_triton.evaluate.rows.KINDS` that it holds, the usual one first.
    mapped : dict
        Its labels to ours.
    complete : bool
        A label that a study does not list is absent.
    title : str
    """

    module: str
    kinds: tuple[str, ...]
    mapped: vocabulary.Mapped
    complete: bool = False
    title: str

    def studies(self, source: Source) -> Studies:
        """The studies of a source, in the order of its table.

        Raises
        ------
        InvalidRequest
            A table or column is missing, or a cell is none of its kind; names it.
        """
        return importlib.import_module(f"{__name__}.{self.module}").studies(source)


FORMATS = {
    "chexpert": Format(
        module="chexpert", kinds=("labels",), mapped=vocabulary.OF_CHEXPERT, title="CheXpert: SPLIT.csv"
    ),
    "nih": Format(
        module="nih",
        kinds=("labels", "boxes"),
        mapped=vocabulary.OF_NIH,
        complete=True,
        title="NIH ChestX-ray14: Data_Entry_2017, split lists, BBox_List_2017",
    ),
    "mimic-cxr": Format(
        module="mimic",
        kinds=("labels",),
        mapped=vocabulary.OF_MIMIC,
        title="MIMIC-CXR and MIMIC-CXR-JPG: split, metadata, labels of a labeller",
    ),
    "vindr-cxr": Format(
        module="vindr",
        kinds=("labels", "boxes"),
        mapped=vocabulary.OF_VINDR,
        title="VinDr-CXR: annotations/image_labels_SPLIT.csv, annotations_SPLIT.csv",
    ),
    "padchest": Format(
        module="padchest",
        kinds=("labels",),
        mapped=vocabulary.OF_PADCHEST,
        complete=True,
        title="PadChest: its table of 160,000 images",
    ),
    "questions": Format(
        module="questions",
        kinds=("options",),
        mapped={},
        title="ReXVQA and other JSON of question, options and answer",
    ),
    "ms-cxr": Format(
        module="ms_cxr", kinds=("boxes",), mapped={}, title="MS-CXR: phrases with boxes, on MIMIC-CXR's pictures"
    ),
    "table": Format(
        module="table",
        kinds=("labels", "options", "boxes", "report"),
        mapped=vocabulary.OF_CHEXPERT,
        complete=True,
        title="a CSV, Parquet or JSON Lines table of one's own",
    ),
}


def format_of(name: str) -> Format:
    """A format by its name; raises `InvalidRequest`, which names the nearest."""
    if name not in FORMATS:
        raise InvalidRequest(unknown_key(name, FORMATS, "formats").replace("key", "format", 1))
    return FORMATS[name]


def format_names() -> list[str]:
    """For the command line's completion."""
    return list(FORMATS)
