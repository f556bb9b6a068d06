"""A reading as standard objects: DICOM structured reports, presentation state and PDF, and a FHIR DiagnosticReport.

In go a reading and the headers of the images that were read; out come complete instances of the same study. They are
the same bytes for the same input: UIDs are made from what was asked of which images, times come from the caller. Every
object is preliminary, unverified, and carries the research-only notice.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydicom import config
from pydicom.dataset import Dataset

from cxr_triton.client.objects import KINDS
from cxr_triton.client.objects.fhir import report
from cxr_triton.client.objects.pdf import pdf_report
from cxr_triton.client.objects.presentation import presentation_states
from cxr_triton.client.objects.sr import findings_report, text_report
from cxr_triton.client.objects.study import ObjectOptions, Study
from cxr_triton.errors import InvalidRequest

if TYPE_CHECKING:
    from cxr_triton.client.page import Shown

_WRITERS: dict[str, Callable[[Study], list[Dataset]]] = {
    "findings_sr": findings_report,
    "text_sr": text_report,
    "gsps": presentation_states,
    "pdf": pdf_report,
}


def result_objects(
    reading: dict[str, Any],
    sources: Sequence[Dataset],
    *,
    kinds: Sequence[str] = ("findings_sr", "text_sr"),
    pictures: Sequence[Shown] = (),
    options: ObjectOptions,
) -> list[Dataset]:
    """The DICOM instances of a reading, ready to be stored.

    Parameters
    ----------
    reading : dict
        READING, as ``docs/reading.schema.json`` describes it.
    sources : sequence of pydicom.Dataset
        Headers of the images that were read, in the reading's order: prior first, current last. See `source_header`.
    kinds : sequence of str
        Of `KINDS`. ``gsps`` gives one presentation state for each image with a box, so possibly none.
    pictures : sequence of Shown
        Of the sources, as `cxr_triton.client.page.draw` gives them, for the ``pdf``; none leaves them out of it.
    options : ObjectOptions

    Returns
    -------
    list of pydicom.Dataset
        In the order of `kinds`, with file meta information, Explicit VR Little Endian, UTF-8. They belong to the study
        of the current image.

    Raises
    ------
    InvalidRequest
        An unknown kind; the sources are of several patients.
    ReadingMismatch
        The reading is of other images than `sources`, by their UIDs; or does not say of which.
    InvalidImage
        A source lacks a UID, or its Patient ID cannot be decoded.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidRequest(f"kinds: {kind!r} is none of {', '.join(KINDS)}")
    with config.disable_value_validation():  # pydicom's warnings would put a header's values into logs
        study = Study(reading, sources, options, pictures)
        return [instance for kind in kinds for instance in _WRITERS[kind](study)]


def encoded(instance: Dataset) -> bytes:
    """An instance as a DICOM Part 10 file; in memory, since pydicom hides what goes wrong with a file on a disk."""
    file = io.BytesIO()
    instance.save_as(file, enforce_file_format=True)
    return file.getvalue()


def diagnostic_report(reading: dict[str, Any], sources: Sequence[Dataset], *, options: ObjectOptions) -> dict[str, Any]:
    """FHIR R4 DiagnosticReport of a reading, with the findings as contained Observations.

    Parameters and errors are those of `result_objects`.
    """
    with config.disable_value_validation():
        return report(Study(reading, sources, options))
