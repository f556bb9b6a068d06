"""Bytes of a DICOM, PNG or JPEG file to stored pixel values, with what is needed to display them.

Only the elements that describe the pixels are read, and the three UIDs that say which image it is: names, dates and
Patient IDs never leave `read_image`. Whatever would have to be guessed is a flag; whatever is not a single-frame
chest-style radiograph is refused with a typed error. `read_identity` says which object a file is, and decodes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from mmap import mmap

from cxr_triton.errors import InvalidImage, UnsupportedSyntax
from cxr_triton.pixels import header
from cxr_triton.pixels.codestream import TRANSFER_SYNTAXES
from cxr_triton.pixels.elements import UNDEFINED, WANTED, DataSet, Tag
from cxr_triton.pixels.filetype import EXECUTABLE, PICTURES, has_prefix, kind_of, may_be_bare
from cxr_triton.pixels.layout import require_layout, stored_values
from cxr_triton.pixels.limits import Limits
from cxr_triton.pixels.part10 import read_meta, recognise, require_radiograph, walk_data_set
from cxr_triton.pixels.picture_file import read_jpeg, read_png
from cxr_triton.pixels.radiograph import Metadata, Radiograph
from cxr_triton.pixels.transforms import declared_range


class _IdentityTag(IntEnum):
    """What `read_identity` reads besides."""

    ACQUISITION_DATE = 0x00080022
    CONTENT_DATE = 0x00080023
    ACQUISITION_DATETIME = 0x0008002A
    STUDY_TIME = 0x00080030
    ACQUISITION_TIME = 0x00080032
    CONTENT_TIME = 0x00080033
    PATIENT_ID = 0x00100020
    INSTANCE_NUMBER = 0x00200013


_IDENTIFYING = WANTED | frozenset(_IdentityTag)


@dataclass(frozen=True)
class Identity:
    """Which object a DICOM file is, for a gateway that files it; unlike `Metadata` it identifies the patient.

    Attributes
    ----------
    sop_class, sop_instance, study, series : str
        UIDs, checked in form.
    transfer_syntax, modality, view : str
        ``view`` as in `Metadata`, or ``elsewhere`` where the header says that it is no chest.
    patient_id : str
    taken : str
        Date and time of acquisition, content or study, whichever is there; sorts as text.
    number : int
        Instance Number, 0 without one.
    offset : int
        Where the data set starts in the file.
    is_radiograph : bool
        By SOP class, modality and presentation intent `read_image` would not refuse it.
    """

    sop_class: str
    sop_instance: str
    study: str
    series: str
    transfer_syntax: str
    modality: str
    view: str
    patient_id: str
    taken: str
    number: int
    offset: int
    is_radiograph: bool


def read_identity(data: bytes | mmap, limits: Limits | None = None) -> Identity:
    """Which object a DICOM Part 10 file is; nothing is decoded, and every transfer syntax will do.

    Parameters
    ----------
    data : bytes or mmap
    limits : Limits, optional
        `max_file_bytes` bounds what a deflated data set inflates to.

    Raises
    ------
    InvalidImage
        Not DICOM, damaged, without one of the UIDs, or a radiograph that is cut off.
    LimitExceeded
        Nested, long or inflated beyond the limits.
    """
    prefixed = has_prefix(data)
    if not prefixed and not may_be_bare(data):
        raise InvalidImage(f"file is {kind_of(data)}, no DICOM; send Part 10 files")
    if prefixed and EXECUTABLE.match(data):
        raise InvalidImage("DICOM file starts like a program; clear its 128-byte preamble")
    uid, offset = read_meta(data, 132 if prefixed else 0)
    uid = uid or recognise(data, offset)
    syntax = TRANSFER_SYNTAXES.get(uid, TRANSFER_SYNTAXES["1.2.840.10008.1.2.1"])
    dataset = walk_data_set(data, offset, syntax, limits or Limits(), _IDENTIFYING)
    sop_class = _require_uid("SOP class", dataset.first(Tag.SOP_CLASS))
    sop_instance = _require_uid("SOP instance", dataset.first(Tag.SOP_INSTANCE))
    study = _require_uid("study", dataset.first(Tag.STUDY))
    series = _require_uid("series", dataset.first(Tag.SERIES))
    transfer_syntax = _require_uid("transfer syntax", uid)
    view, _ = header.view(dataset, set())
    is_radiograph = _is_radiograph(dataset)
    if is_radiograph:
        _require_whole_pixels(dataset)
        view = "elsewhere" if header.anatomy(dataset).says == "elsewhere" else view
    number = dataset.first(_IdentityTag.INSTANCE_NUMBER)
    return Identity(
        sop_class=sop_class,
        sop_instance=sop_instance,
        study=study,
        series=series,
        transfer_syntax=transfer_syntax,
        modality=dataset.text(Tag.MODALITY)[:16],
        view=view,
        patient_id=dataset.first(_IdentityTag.PATIENT_ID),
        taken=_taken(dataset),
        number=int(number) if re.fullmatch(r"[+-]?\d{1,9}", number) else 0,
        offset=offset,
        is_radiograph=is_radiograph,
    )


def _require_uid(name: str, uid: str) -> str:
    if not header.is_uid(uid):
        raise InvalidImage(f"{name} UID is {'malformed' if uid else 'missing'}; send a complete object")
    return uid


def _is_radiograph(dataset: DataSet) -> bool:
    try:
        require_radiograph(dataset, set())
    except InvalidImage:
        return False
    return True


def _require_whole_pixels(dataset: DataSet) -> None:
    data, pixels = dataset.data, dataset.elements.get(Tag.PIXELS)
    if pixels and pixels.length != UNDEFINED:
        dataset.end_of(pixels, len(data))
    elif pixels and data.rfind(b"\xfe\xff\xdd\xe0\0\0\0\0", pixels.start) < 0:
        raise InvalidImage("pixel data has no end; send the complete file")


def _taken(dataset: DataSet) -> str:
    """YYYYMMDDHHMMSS.FFFFFF, as much of it as the first of the three that is there says."""
    tag = _IdentityTag
    for date, time in (
        (tag.ACQUISITION_DATETIME, None),
        (tag.ACQUISITION_DATE, tag.ACQUISITION_TIME),
        (tag.CONTENT_DATE, tag.CONTENT_TIME),
        (Tag.STUDY_DATE, tag.STUDY_TIME),
    ):
        if text := dataset.first(date):
            text += dataset.first(time) if time else ""
            return re.sub(r"[^0-9.]", "", text)[:21]
    return ""


def read_image(data: bytes, limits: Limits | None = None) -> Radiograph:
    """Read a DICOM Part 10, PNG or JPEG file.

    Decoding untrusted data needs memory and time limits that only a process has: servers call this inside
    `cxr_triton.pixels.sandbox`.

    Parameters
    ----------
    data : bytes
    limits : Limits, optional
        `memory_mib` and `time_s` are the sandbox's matter and are not looked at here.

    Raises
    ------
    InvalidImage
        Or one of its subclasses, see `cxr_triton.errors`.
    """
    limits = limits or Limits()
    limits.require_file(data)
    prefixed, picture = has_prefix(data), data.startswith(PICTURES)
    if prefixed and (picture or EXECUTABLE.match(data)):
        raise InvalidImage(f"DICOM file starts like {kind_of(data)}; clear its 128-byte preamble")
    if picture:
        return read_png(data, limits) if data[0] == 0x89 else read_jpeg(data, limits)
    if not prefixed and not may_be_bare(data):
        raise InvalidImage(f"file is {kind_of(data)}, no DICOM, PNG or JPEG; send one of these")
    return _read_dicom(data, 132 if prefixed else 0, limits)


def _read_dicom(data: bytes, start: int, limits: Limits) -> Radiograph:
    flags: set[str] = set()
    uid, position = read_meta(data, start)
    if not uid:
        flags.add("no_meta_header")
        uid = recognise(data, position)
    syntax = TRANSFER_SYNTAXES.get(uid)
    if syntax is None:
        shown = uid if header.is_uid(uid) else "malformed"
        raise UnsupportedSyntax(
            f"transfer syntax {shown} is not supported; convert to one of {', '.join(TRANSFER_SYNTAXES)}"
        )
    dataset = walk_data_set(data, position, syntax, limits)
    if dataset.explicit != syntax.explicit:
        flags.add("vr_mismatch")
    sop_class, modality = require_radiograph(dataset, flags)
    layout = require_layout(dataset, limits)
    stored, bits_stored, lossy = stored_values(dataset, uid, layout, flags)
    if lossy or dataset.text(Tag.LOSSY) == "01":
        flags.add("lossy")
    transform = header.modality_transform(dataset, layout.signed, flags)
    negative_input = declared_range(bits_stored, layout.signed, transform)[0] < 0
    voi = header.voi(dataset, negative_input, flags)
    view, orientation = header.view(dataset, flags)
    header.presentation_flags(dataset, layout.photometric, flags)
    laterality = dataset.text(Tag.IMAGE_LATERALITY) or dataset.text(Tag.LATERALITY)
    metadata = Metadata(
        format="dicom",
        rows=layout.shape[0],
        columns=layout.shape[1],
        bits_stored=bits_stored,
        signed=layout.signed,
        photometric=layout.photometric,
        transfer_syntax=uid,
        transfer_syntax_name=syntax.name,
        sop_class=sop_class,
        modality=modality,
        modality_transform=transform,
        voi=voi,
        other_windows=header.other_windows(dataset, negative_input, voi),
        padding=header.padding(dataset, layout.signed),
        view=view,
        patient_orientation=orientation,
        laterality=laterality if laterality in ("L", "R", "U", "B") else "",
        sop_instance_uid=header.uid(dataset, Tag.SOP_INSTANCE),
        series_instance_uid=header.uid(dataset, Tag.SERIES),
        study_instance_uid=header.uid(dataset, Tag.STUDY),
        study_date=header.date(dataset, Tag.STUDY_DATE),
        pixel_aspect_ratio=header.pixel_aspect_ratio(dataset, flags),
        anatomy=header.anatomy(dataset, layout.shape),
    )
    return Radiograph(stored, metadata, tuple(sorted(flags)))
