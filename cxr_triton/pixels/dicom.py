"""Bytes of a DICOM, PNG or JPEG file to stored pixel values, with what is needed to display them.

The data set is walked once without recursion, every length is checked against what remains, and only the elements
that describe the pixels are read, and the three UIDs that say which image it is: names, dates and Patient IDs never
leave `read_image`. Whatever would have to be guessed is a flag; whatever is not a single-frame chest-style radiograph
is refused with a typed error.
"""

from __future__ import annotations

import datetime
import math
import re
import struct
import zlib
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from cxr_triton.errors import (
    ForProcessing,
    HeaderMismatch,
    InvalidImage,
    LimitExceeded,
    MultiFrame,
    NoPixels,
    NotARadiograph,
    UnsupportedSyntax,
)
from cxr_triton.pixels.codestream import TRANSFER_SYNTAXES, TransferSyntax, decode, inspect, inspect_jpeg
from cxr_triton.pixels.display import LookupTable, Rescale, Window, declared_range
from cxr_triton.pixels.jpeg_scan import has_step, require_whole_scans
from cxr_triton.pixels.plausibility import DOUBTS, Anatomy, Code, anatomy, view_of


@dataclass(frozen=True)
class Limits:
    """What one image may cost.

    Attributes
    ----------
    max_pixels : int
        Rows times columns.
    max_file_bytes : int
        Size of the file, and of a deflated data set once inflated.
    memory_mib : int
        Address space of the process that decodes.
    time_s : float
        Wall-clock and processor time of decoding and preparing one image.
    """

    max_pixels: int = 64_000_000
    max_file_bytes: int = 64 * 1024**2
    memory_mib: int = 2048
    time_s: float = 20.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"Limits.{name} is {value}, has to be positive")


FLAGS: dict[str, str] = {
    "alpha_dropped": "the file's transparency was ignored",
    "bits_stored_corrected": "the values go on above BitsStored, which is wrong: read with the bits that they have",
    "burned_in": "the file says that text is burned into the pixels",
    "burned_in_unknown": "the file does not say whether text is burned into the pixels",
    "clamped": "lossy values beyond BitsStored were clamped",
    "damage_suspected": "the compressed pixels may be damaged: compare the picture with the original",
    "display_ready": "8-bit PNG or JPEG: shown as it is, no preset ran",
    "exif_transposed": "the JPEG's EXIF orientation was applied",
    "full_range": "no usable VOI LUT or window: scaled by the declared range",
    "high_bits_masked": "bits above BitsStored (old overlays) were masked",
    "lateral": "a lateral view",
    "lossy": "lossy compression",
    "lut_corrected": "a LUT's declared depth did not fit its entries and was replaced",
    "mirrored": "PatientOrientation says that the patient's right is at the right; not flipped",
    "modality_lut": "a Modality LUT Sequence was found and is used by voi_display",
    "modality_lut_and_rescale": "Modality LUT Sequence and rescale both present; the sequence wins",
    "modality_lut_unusable": "the Modality LUT Sequence is malformed and was ignored",
    "modality_missing": "no Modality; accepted for its SOP class",
    "monochrome1_with_identity": "MONOCHROME1 with Presentation LUT Shape IDENTITY; Photometric Interpretation wins",
    "monochrome2_with_inverse": "MONOCHROME2 with Presentation LUT Shape INVERSE; Photometric Interpretation wins",
    "negative_slope": "negative Rescale Slope: the two presets disagree on polarity",
    "no_meta_header": "no File Meta Information; the transfer syntax was recognised from the first element",
    "not_upright": "PatientOrientation says that the image is rotated or upside down; not rotated",
    "overlay_present": "an overlay plane exists; not burned in",
    "padding": "a part of the pixels is padding; black in voi_display",
    "padding_ignored": "Pixel Padding Value would remove every pixel and was ignored",
    "palette": "the file's palette was applied",
    "pixel_shape_doubtful": "what the file says of its pixels' shape is malformed or contradicts itself",
    "pixels_not_square": "the pixels are not square: resampled to square ones; boxes are in pixels as stored",
    "polarity_suspect": "the picture's border is brighter than its inside; it may be inverted; not changed",
    "presentation_lut_ignored": "a Presentation LUT Sequence was ignored",
    "range_fallback": "no usable VOI LUT or window, and the declared range is mostly unused: scaled by min and max",
    "rescale_unusable": "Rescale Slope or Intercept is zero or malformed and was ignored",
    "secondary_capture": "a Secondary Capture: provenance and display state are unknown",
    "several_windows": "several windows or VOI LUTs; the first was used",
    "shutter_present": "a display shutter exists; not applied",
    "view_conflict": "View Position and Patient Orientation disagree",
    "view_unknown": "neither View Position nor Patient Orientation names the view",
    "voi_function_unknown": "unknown VOI LUT Function; taken as LINEAR",
    "voi_lut_and_window": "VOI LUT Sequence and window both present; the sequence was used",
    "voi_lut_unusable": "the VOI LUT Sequence is malformed and was ignored",
    "vr_mismatch": "explicit or implicit VR encoding differs from the transfer syntax; the data decided",
    "window_fallback": "the window is malformed or narrower than allowed and was ignored",
    **DOUBTS,
}
"""The closed vocabulary of `Radiograph.flags` and `Picture.flags`."""

DOUBTFUL = frozenset({*DOUBTS, "damage_suspected", "pixel_shape_doubtful"})
"""Flags with which no reading has the status ``ok``."""


@dataclass(frozen=True, eq=False)
class Metadata:
    """What describes the pixels, UIDs and date of the image; nothing in here names a person or a device.

    Attributes
    ----------
    format : str
        dicom, png or jpeg.
    rows, columns : int
    bits_stored : int
        Significant bits of a stored value: BitsStored, unless the flag `bits_stored_corrected` is set.
    signed : bool
        Pixel Representation 1.
    photometric : str
        MONOCHROME1 or MONOCHROME2; RGB for true-colour PNG and JPEG.
    transfer_syntax, transfer_syntax_name, sop_class, modality : str
        Empty for PNG and JPEG.
    modality_transform : Rescale, LookupTable or None
    voi : Window, LookupTable or None
        The first one; an unusable one is None.
    padding : (int, int) or None
        Smallest and largest stored value that is padding.
    view : str
        PA, AP, frontal, lateral, oblique or unknown.
    patient_orientation : tuple of str
        Directions of rows and columns, empty if absent.
    laterality : str
        L, R, U, B or empty.
    sop_instance_uid, series_instance_uid, study_instance_uid : str
        Empty for PNG and JPEG, and where missing or malformed.
    study_date : str
        YYYY-MM-DD; empty for PNG and JPEG, and where missing or malformed.
    pixel_aspect_ratio : float
        Height of a pixel over its width; 1 where they differ by less than a hundredth.
    anatomy : Anatomy
        What the header says of the part of the body, in words of a closed list.
    """

    format: str
    rows: int
    columns: int
    bits_stored: int
    signed: bool = False
    photometric: str = "MONOCHROME2"
    transfer_syntax: str = ""
    transfer_syntax_name: str = ""
    sop_class: str = ""
    modality: str = ""
    modality_transform: Rescale | LookupTable | None = None
    voi: Window | LookupTable | None = None
    padding: tuple[int, int] | None = None
    view: str = "unknown"
    patient_orientation: tuple[str, ...] = ()
    laterality: str = ""
    sop_instance_uid: str = ""
    series_instance_uid: str = ""
    study_instance_uid: str = ""
    study_date: str = ""
    pixel_aspect_ratio: float = 1.0
    anatomy: Anatomy = field(default_factory=Anatomy)


@dataclass(frozen=True, eq=False)
class Radiograph:
    """Stored pixel values and what describes them.

    Attributes
    ----------
    stored : ndarray (rows, columns) uint8, int8, uint16 or int16; or (rows, columns, 3) uint8
        Masked and sign-extended to BitsStored, before any modality or VOI transform.
    metadata : Metadata
    flags : tuple of str
        Sorted members of `FLAGS`.
    """

    stored: np.ndarray
    metadata: Metadata
    flags: tuple[str, ...] = ()


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


def read_identity(data, limits: Limits | None = None) -> Identity:
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
    has_prefix = data[128:132] == b"DICM"
    if not has_prefix and data[:2] not in (b"\x02\0", b"\x08\0", b"\0\x08"):
        raise InvalidImage(f"file is {kind_of(data)}, no DICOM; send Part 10 files")
    if has_prefix and data[:128].startswith(_EXECUTABLE):
        raise InvalidImage("DICOM file starts like a program; clear its 128-byte preamble")
    uid, position = _meta(data, 132 if has_prefix else 0)
    uid = uid or _recognise(data, position)
    syntax = TRANSFER_SYNTAXES.get(uid, TRANSFER_SYNTAXES["1.2.840.10008.1.2.1"])
    offset = position
    if syntax.deflated:
        data, position = _inflate(data[position:], limits or Limits()), 0
    explicit = data[position + 4 : position + 6] in _VRS
    wanted = _WANTED | frozenset(_IdentityTag)
    dataset = _DataSet(data, explicit, syntax.little, wanted=wanted).walk(position, len(data))
    tags = {"SOP class": _Tag.SOP_CLASS, "SOP instance": _Tag.SOP_INSTANCE}
    tags |= {"study": _Tag.STUDY, "series": _Tag.SERIES}
    uids = {name: (dataset.texts(tag) or [""])[0] for name, tag in tags.items()}
    for name, value in uids.items():
        if not _UID.fullmatch(value):
            raise InvalidImage(f"{name} UID is {'malformed' if value else 'missing'}; send a complete object")
    if not _UID.fullmatch(uid):
        raise InvalidImage("transfer syntax UID is malformed; send a complete object")
    number = (dataset.texts(_IdentityTag.INSTANCE_NUMBER) or [""])[0]
    try:
        _require_radiograph(dataset, set())
        is_radiograph = True
    except InvalidImage:
        is_radiograph = False
    pixels = dataset.elements.get(_Tag.PIXELS)
    if is_radiograph and pixels:
        if pixels.length != _UNDEFINED:
            dataset.end_of(pixels, len(data))
        elif data.rfind(b"\xfe\xff\xdd\xe0\0\0\0\0", pixels.start) < 0:
            raise InvalidImage("pixel data has no end; send the complete file")
    return Identity(
        *uids.values(),
        transfer_syntax=uid,
        modality=dataset.text(_Tag.MODALITY)[:16],
        view="elsewhere" if is_radiograph and _anatomy(dataset).says == "elsewhere" else _view(dataset, set())[0],
        patient_id=(dataset.texts(_IdentityTag.PATIENT_ID) or [""])[0],
        taken=_taken(dataset),
        number=int(number) if re.fullmatch(r"[+-]?\d{1,9}", number) else 0,
        offset=offset,
        is_radiograph=is_radiograph,
    )


_UID = re.compile(r"[0-9][0-9.]{0,63}")


def _uid(dataset: _DataSet, tag: _Tag) -> str:
    """Empty where it is missing or malformed."""
    uid = (dataset.texts(tag) or [""])[0]
    return uid if _UID.fullmatch(uid) else ""


def _date(dataset: _DataSet, tag: _Tag) -> str:
    """YYYY-MM-DD of a DA element; empty where it is missing, malformed or no day of the calendar."""
    text = (dataset.texts(tag) or [""])[0]
    try:
        return datetime.date.fromisoformat(text).isoformat() if re.fullmatch("[0-9]{8}", text) else ""
    except ValueError:
        return ""


def _taken(dataset: _DataSet) -> str:
    """YYYYMMDDHHMMSS.FFFFFF, as much of it as the first of the three that is there says."""
    tag = _IdentityTag
    for date, time in (
        (tag.ACQUISITION_DATETIME, None),
        (tag.ACQUISITION_DATE, tag.ACQUISITION_TIME),
        (tag.CONTENT_DATE, tag.CONTENT_TIME),
        (_Tag.STUDY_DATE, tag.STUDY_TIME),
    ):
        if text := (dataset.texts(date) or [""])[0]:
            text += (dataset.texts(time) or [""])[0] if time else ""
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
    if len(data) > limits.max_file_bytes:
        raise LimitExceeded(f"file has {len(data)} bytes, allowed {limits.max_file_bytes}; send a smaller file")
    has_prefix = data[128:132] == b"DICM"
    picture = data.startswith(_PICTURES)
    if has_prefix and (picture or data.startswith(_EXECUTABLE)):
        raise InvalidImage(f"DICOM file starts like {kind_of(data)}; clear its 128-byte preamble")
    if picture:
        return _read_png(data, limits) if data[0] == 0x89 else _read_jpeg(data, limits)
    if has_prefix:
        return _read_dicom(data, 132, limits)
    if may_be_image(data):
        return _read_dicom(data, 0, limits)
    raise InvalidImage(f"file is {kind_of(data)}, no DICOM, PNG or JPEG; send one of these")


_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


def may_be_image(data: bytes) -> bool:
    """Whether a file starts as a DICOM file, with or without prefix, a PNG or a JPEG does."""
    is_bare = data[:2] in (b"\x02\0", b"\x08\0", b"\0\x08") and len(data) >= 16
    return data[128:132] == b"DICM" or data.startswith(_PICTURES) or is_bare


_KINDS = {
    b"\x89PNG": "a PNG",
    b"\xff\xd8\xff": "a JPEG",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a ZIP archive or an Office document",
    b"PK\x05\x06": "an empty ZIP archive",
    b"\x1f\x8b": "compressed by gzip",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"II+\0": "a TIFF",
    b"MM\0+": "a TIFF",
    b"GIF8": "a GIF",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 file",
    b"\xff\x4f\xff\x51": "a JPEG 2000 codestream",
    b"\0\0\0\x0cJXL ": "a JPEG XL file",
    b"\xff\x0a": "a JPEG XL codestream",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def kind_of(data: bytes) -> str:
    """What a file without a DICOM prefix seems to be, in words with their article."""
    head = bytes(data[:512])
    if not head:
        return "empty"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return "a HEIC picture" if brand in _BRANDS else "an AVIF picture" if brand == b"avif" else "a video"
    if head.startswith(b"RIFF"):
        return "a WebP picture" if head[8:12] == b"WEBP" else "a recording"
    if known := next((kind for start, kind in _KINDS.items() if head.startswith(start)), None):
        return known
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if text.startswith((b"<?xml", b"<svg")):
        return "XML"
    if text and not set(text) & _NO_TEXT:
        return "a script" if text.startswith(b"#!") else "text"
    if head.startswith(_EXECUTABLE):
        return "a program"
    if head.startswith(b"BM"):
        return "a BMP"
    return "of an unknown kind"


_NO_TEXT = {*range(32), 127} - set(b"\t\n\v\f\r\x1b")


# ELF, DOS/Windows, Mach-O in both byte orders and fat, scripts (CVE-2019-11687)
_EXECUTABLE = (
    b"\x7fELF",
    b"MZ",
    b"#!",
    b"\xfe\xed\xfa\xce",
    b"\xfe\xed\xfa\xcf",
    b"\xce\xfa\xed\xfe",
    b"\xcf\xfa\xed\xfe",
    b"\xca\xfe\xba\xbe",
    b"\xbe\xba\xfe\xca",
)


# ---------------------------------------------------------------------------------------------------------------- tags

_VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_MAX_DEPTH = 32
_MAX_ELEMENTS = 100_000


class _Tag(IntEnum):
    """The elements that are read; every other one is passed over."""

    TRANSFER_SYNTAX = 0x00020010
    SOP_CLASS = 0x00080016
    SOP_INSTANCE = 0x00080018
    STUDY_DATE = 0x00080020
    MODALITY = 0x00080060
    INTENT = 0x00080068
    CODE_VALUE = 0x00080100
    CODE_SCHEME = 0x00080102
    CODE_MEANING = 0x00080104
    STUDY_DESCRIPTION = 0x00081030
    PROCEDURE_CODE = 0x00081032
    SERIES_DESCRIPTION = 0x0008103E
    REGION = 0x00082218
    BODY_PART = 0x00180015
    PROTOCOL_NAME = 0x00181030
    IMAGER_PIXEL_SPACING = 0x00181164
    SHUTTER_SHAPE = 0x00181600
    NOMINAL_SCANNED_PIXEL_SPACING = 0x00182010
    VIEW_POSITION = 0x00185101
    STUDY = 0x0020000D
    SERIES = 0x0020000E
    ORIENTATION = 0x00200020
    LATERALITY = 0x00200060
    IMAGE_LATERALITY = 0x00200062
    SAMPLES = 0x00280002
    PHOTOMETRIC = 0x00280004
    FRAMES = 0x00280008
    ROWS = 0x00280010
    COLUMNS = 0x00280011
    PIXEL_SPACING = 0x00280030
    PIXEL_ASPECT_RATIO = 0x00280034
    BITS_ALLOCATED = 0x00280100
    BITS_STORED = 0x00280101
    HIGH_BIT = 0x00280102
    REPRESENTATION = 0x00280103
    PADDING = 0x00280120
    PADDING_LIMIT = 0x00280121
    BURNED_IN = 0x00280301
    CENTER = 0x00281050
    WIDTH = 0x00281051
    INTERCEPT = 0x00281052
    SLOPE = 0x00281053
    VOI_FUNCTION = 0x00281056
    LOSSY = 0x00282110
    MODALITY_LUT = 0x00283000
    LUT_DESCRIPTOR = 0x00283002
    LUT_DATA = 0x00283006
    VOI_LUT = 0x00283010
    REQUESTED_PROCEDURE = 0x00321060
    REQUESTED_CODE = 0x00321064
    PERFORMED_PROCEDURE = 0x00400254
    REQUEST = 0x00400275
    VIEW_CODE = 0x00540220
    PRESENTATION_LUT = 0x20500010
    LUT_SHAPE = 0x20500020
    FLOAT_PIXELS = 0x7FE00008
    DOUBLE_PIXELS = 0x7FE00009
    PIXELS = 0x7FE00010

    def __str__(self) -> str:
        return _name(self)


_WANTED = frozenset(_Tag)


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

    def __str__(self) -> str:
        return _name(self)


_PIXEL_TAGS = {_Tag.PIXELS, _Tag.FLOAT_PIXELS, _Tag.DOUBLE_PIXELS}


class _Element(NamedTuple):
    tag: int
    vr: bytes  # empty in implicit VR
    start: int  # of the value
    length: int  # may be _UNDEFINED


@dataclass
class _DataSet:
    """Elements of one nesting level; the values stay in `data` until asked for."""

    data: bytes
    explicit: bool
    little: bool
    elements: dict[int, _Element] = field(default_factory=dict)
    wanted: frozenset[int] = _WANTED
    has_overlay: bool = False
    stop: int = 0  # where `walk` ended
    count: int = 0

    def walk(self, position: int, end: int) -> _DataSet:
        """Collect the wanted elements from `position` to `end`, an item delimiter, or the pixel data."""
        while position < end:
            # zeros after the last element pad the file to a block size
            if not any(self.data[position : position + 16]) and not self.data[position:end].strip(b"\0"):
                break
            element = self.element_at(position, end, self.explicit)
            if element.tag in self.wanted:
                if element.tag in self.elements:
                    raise InvalidImage(f"element {_name(element.tag)} comes twice; the file is damaged")
                self.elements[element.tag] = element
                if element.tag in _PIXEL_TAGS:
                    break  # its length is checked when it is read, so that a more telling error can come first
            elif element.tag >> 16 in range(0x6000, 0x6020, 2):
                self.has_overlay = True
            if element.tag == _ITEM_END:
                position = element.start
                break
            if element.length == _UNDEFINED:
                position = self.skip_undefined(element, end)
            else:
                position = self.end_of(element, end)
        self.stop = position
        return self

    def element_at(self, position: int, end: int, explicit: bool) -> _Element:
        """Header of the element at `position`, in whichever of the three forms it has (PS3.5 section 7.1)."""
        self.count += 1
        if self.count > _MAX_ELEMENTS:
            raise LimitExceeded(f"data set has over {_MAX_ELEMENTS} elements, the number allowed; send a radiograph")
        data, order = self.data, "<" if self.little else ">"
        if position + 8 > end:
            raise InvalidImage(f"data set ends at byte {end} inside an element header; send the complete file")
        group, number = struct.unpack_from(order + "HH", data, position)
        tag = group << 16 | number
        vr = data[position + 4 : position + 6]
        # items have no VR; where no two capitals stand, a faulty writer fell back to implicit VR
        if not explicit or group == 0xFFFE or not (vr.isalpha() and vr.isupper()):
            (length,) = struct.unpack_from(order + "I", data, position + 4)
            return _Element(tag, b"", position + 8, length)
        if vr in _LONG_VRS or (vr not in _VRS and data[position + 6 : position + 8] == b"\0\0"):
            if position + 12 > end:
                raise InvalidImage(f"data set ends at byte {end} inside an element header; send the complete file")
            (length,) = struct.unpack_from(order + "I", data, position + 8)
            return _Element(tag, vr, position + 12, length)
        (length,) = struct.unpack_from(order + "H", data, position + 6)
        return _Element(tag, vr, position + 8, length)

    def end_of(self, element: _Element, end: int) -> int:
        """Position after a value of known length, which has to lie before `end`."""
        if element.length > end - element.start:
            raise InvalidImage(
                f"element {_name(element.tag)} at byte {element.start} declares {element.length} bytes,"
                f" {end - element.start} remain; send the complete file"
            )
        return element.start + element.length

    def skip_undefined(self, element: _Element, end: int) -> int:
        """Position after a sequence of undefined length, found with an explicit stack instead of recursion."""
        stack = [self.explicit and element.vr != b"UN"]  # one entry a level: is it explicit VR?
        in_item = False
        position = element.start
        while stack:
            inner = self.element_at(position, end, stack[-1])
            opens = inner.length == _UNDEFINED
            if inner.tag == (_ITEM_END if in_item else _SEQUENCE_END):
                stack.pop()
                in_item, position = not in_item and bool(stack), inner.start
            elif not in_item and inner.tag != _ITEM:
                raise InvalidImage(f"sequence {_name(element.tag)} has {_name(inner.tag)} where an item has to start")
            elif opens:
                # PS3.5 6.2.2: UN of undefined length holds implicit VR
                stack.append(stack[-1] and inner.vr != b"UN")
                in_item, position = not in_item, inner.start
            else:
                position = self.end_of(inner, end)
            if len(stack) > 2 * _MAX_DEPTH:
                raise LimitExceeded(
                    f"sequence {_name(element.tag)} is nested deeper than the {_MAX_DEPTH} levels allowed"
                )
        return position

    def items(self, tag: int) -> list[_DataSet]:
        """Items of a wanted sequence."""
        element = self.elements.get(tag)
        if element is None:
            return []
        end = len(self.data) if element.length == _UNDEFINED else self.end_of(element, len(self.data))
        explicit = self.explicit and element.vr != b"UN"
        found, position = [], element.start
        while position < end:
            item = self.element_at(position, end, explicit)
            if item.tag != _ITEM:
                break
            stop = end if item.length == _UNDEFINED else self.end_of(item, end)
            found.append(_DataSet(self.data, explicit, self.little).walk(item.start, stop))
            position = found[-1].stop if item.length == _UNDEFINED else stop
        return found

    def __contains__(self, tag: int) -> bool:
        return tag in self.elements

    def raw(self, tag: int) -> bytes:
        """Value bytes; empty if the element is absent."""
        element = self.elements.get(tag)
        if element is None or element.length == _UNDEFINED:
            return b""
        return self.data[element.start : self.end_of(element, len(self.data))]

    def texts(self, tag: int) -> list[str]:
        """Values of a text element, without padding."""
        value = self.raw(tag)[:1024].decode("latin-1").strip(" \0\t\r\n")
        return [part.strip(" \0") for part in value.split("\\")] if value else []

    def text(self, tag: int) -> str:
        """First value of a code string in capitals; empty if absent."""
        return (self.texts(tag) or [""])[0].upper()

    def shorts(self, tag: int, signed: bool = False) -> list[int]:
        """16-bit values, whatever VR a writer gave them."""
        raw = self.raw(tag)
        raw = raw[: len(raw) // 2 * 2]
        return np.frombuffer(raw, ("<" if self.little else ">") + ("i2" if signed else "u2")).tolist()

    def number(self, tag: int) -> int | None:
        """One unsigned integer of the image's description; None if absent.

        Raises
        ------
        InvalidImage
            Several values, or a value that is no integer.
        """
        element = self.elements.get(tag)
        if element is None or element.length == 0:
            return None
        raw = self.raw(tag)
        order = "little" if self.little else "big"
        if element.vr in (b"IS", b"DS") or tag == _Tag.FRAMES:
            value = raw.strip(b" \0")
            if value.isdigit() and len(value) < 12:
                return int(value)
        elif len(raw) == 2 or (len(raw) == 4 and element.vr in (b"UL", b"SL")):
            return int.from_bytes(raw, order)
        raise InvalidImage(f"element {_name(tag)} holds {len(raw)} bytes that are not one integer; the file is damaged")

    def numbers(self, tag: int) -> list[float] | None:
        """Decimal strings; None if absent or empty, NaN where a value is malformed."""
        element = self.elements.get(tag)
        if element is None or element.length == 0:
            return None
        if element.vr in (b"FD", b"FL"):
            kind = np.dtype(("<" if self.little else ">") + ("f8" if element.vr == b"FD" else "f4"))
            raw = self.raw(tag)
            return np.frombuffer(raw, kind, len(raw) // kind.itemsize).tolist() or None
        return [_decimal(text) for text in self.texts(tag)] or None


def _name(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _decimal(text: str) -> float:
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text) else math.nan


# --------------------------------------------------------------------------------------------------------------- DICOM

_COMPUTED_RADIOGRAPHY = "1.2.840.10008.5.1.4.1.1.1"
_DIGITAL_XRAY = "1.2.840.10008.5.1.4.1.1.1.1"
_DIGITAL_XRAY_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"
_SECONDARY_CAPTURE = {
    "1.2.840.10008.5.1.4.1.1.7",
    "1.2.840.10008.5.1.4.1.1.7.2",
    "1.2.840.10008.5.1.4.1.1.7.3",
}
_MODALITIES = ("CR", "DX")

_FRONTAL = {"PA", "AP"}
_VIEW_WORDS = {
    "PA": "PA",
    "AP": "AP",
    "LL": "lateral",
    "RL": "lateral",
    "LAT": "lateral",
    "LATERAL": "lateral",
    "LLD": "frontal",  # decubitus positions are frontal projections
    "RLD": "frontal",
    "LLO": "oblique",
    "RLO": "oblique",
    "LAO": "oblique",
    "RAO": "oblique",
    "LPO": "oblique",
    "RPO": "oblique",
    # View Code Sequence, SNOMED CT and the older SNOMED RT codes of CID 4010
    "272479007": "PA",
    "R-40888": "PA",
    "R-10214": "PA",
    "399348003": "AP",
    "R-10206": "AP",
    "399033003": "frontal",
    "399067008": "lateral",
    "R-102CD": "lateral",
    "399173006": "lateral",
    "R-10236": "lateral",
    "399198007": "lateral",
    "R-10232": "lateral",
    "399182000": "oblique",
    "399059000": "oblique",
    "399312000": "oblique",
}


def _read_dicom(data: bytes, start: int, limits: Limits) -> Radiograph:
    flags: set[str] = set()
    dataset, uid, syntax = _open(data, start, limits, flags)
    sop_class, modality = _require_radiograph(dataset, flags)
    shape, bits_allocated, bits_stored, signed, photometric = _require_layout(dataset, limits)
    stored, bits_stored, lossy = _pixels(dataset, uid, syntax, shape, bits_allocated, bits_stored, signed, flags)
    if lossy or dataset.text(_Tag.LOSSY) == "01":
        flags.add("lossy")
    modality_transform = _modality_transform(dataset, signed, flags)
    view, orientation = _view(dataset, flags)
    _presentation_flags(dataset, photometric, flags)
    laterality = dataset.text(_Tag.IMAGE_LATERALITY) or dataset.text(_Tag.LATERALITY)
    metadata = Metadata(
        format="dicom",
        rows=shape[0],
        columns=shape[1],
        bits_stored=bits_stored,
        signed=signed,
        photometric=photometric,
        transfer_syntax=uid,
        transfer_syntax_name=syntax.name,
        sop_class=sop_class,
        modality=modality,
        modality_transform=modality_transform,
        voi=_voi(dataset, declared_range(bits_stored, signed, modality_transform)[0] < 0, flags),
        padding=_padding(dataset, signed),
        view=view,
        patient_orientation=orientation,
        laterality=laterality if laterality in ("L", "R", "U", "B") else "",
        sop_instance_uid=_uid(dataset, _Tag.SOP_INSTANCE),
        series_instance_uid=_uid(dataset, _Tag.SERIES),
        study_instance_uid=_uid(dataset, _Tag.STUDY),
        study_date=_date(dataset, _Tag.STUDY_DATE),
        pixel_aspect_ratio=_pixel_aspect_ratio(dataset, flags),
        anatomy=_anatomy(dataset, shape),
    )
    return Radiograph(stored, metadata, tuple(sorted(flags)))


def _open(data: bytes, start: int, limits: Limits, flags: set[str]) -> tuple[_DataSet, str, TransferSyntax]:
    """Read the File Meta Information and walk the data set after it."""
    uid, position = _meta(data, start)
    if not uid:
        flags.add("no_meta_header")
        uid = _recognise(data, position)
    syntax = TRANSFER_SYNTAXES.get(uid)
    if syntax is None:
        shown = uid if re.fullmatch(r"[0-9.]{1,64}", uid) else "malformed"
        raise UnsupportedSyntax(
            f"transfer syntax {shown} is not supported; convert to one of {', '.join(TRANSFER_SYNTAXES)}"
        )
    if syntax.deflated:
        data, position = _inflate(data[position:], limits), 0
    explicit = data[position + 4 : position + 6] in _VRS
    if explicit != syntax.explicit and position + 8 <= len(data):
        flags.add("vr_mismatch")
    return _DataSet(data, explicit, syntax.little).walk(position, len(data)), uid, syntax


def _meta(data: bytes, start: int) -> tuple[str, int]:
    """Transfer syntax of the File Meta Information (always explicit little endian, PS3.10 7.1), and where it ends."""
    meta = _DataSet(data, explicit=True, little=True)
    position = start
    while position + 8 <= len(data) and data[position : position + 2] == b"\x02\0":
        element = meta.element_at(position, len(data), True)
        meta.elements.setdefault(element.tag, element)
        position = meta.end_of(element, len(data))
    return (meta.texts(_Tag.TRANSFER_SYNTAX) or [""])[0], position


def _recognise(data: bytes, position: int) -> str:
    """Native transfer syntax of a data set without File Meta Information, from its first element."""
    if data[position + 4 : position + 6] not in _VRS:
        return "1.2.840.10008.1.2"
    return "1.2.840.10008.1.2.2" if data[position] == 0 else "1.2.840.10008.1.2.1"


def _inflate(data: bytes, limits: Limits) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, limits.max_file_bytes + 1)
    except zlib.error as error:
        raise InvalidImage(f"deflated data set does not inflate ({error}); the file is damaged") from error
    if len(inflated) > limits.max_file_bytes:
        raise LimitExceeded(f"data set inflates beyond the {limits.max_file_bytes} bytes allowed; send a smaller file")
    if not inflater.eof:
        raise InvalidImage("deflated data set is truncated; send the complete file")
    rest = inflater.unused_data
    # some writers leave gzip's trailer there
    if rest.rstrip(b"\0") and not rest.startswith(struct.pack("<II", zlib.crc32(inflated), len(inflated))):
        raise InvalidImage(f"deflated data set ends {len(rest)} bytes before the file; it is damaged, send it again")
    return inflated


def _require_radiograph(dataset: _DataSet, flags: set[str]) -> tuple[str, str]:
    """SOP class and modality decide, not text: a CT scout may well call itself a chest X-ray."""
    sop_class = (dataset.texts(_Tag.SOP_CLASS) or [""])[0]
    modality = dataset.text(_Tag.MODALITY)
    if sop_class == _DIGITAL_XRAY_PROCESSING or dataset.text(_Tag.INTENT) == "FOR PROCESSING":
        raise ForProcessing("image is For Processing, not ready for display; send the For Presentation image")
    secondary = sop_class in _SECONDARY_CAPTURE
    shown_class = sop_class if re.fullmatch(r"[0-9.]{1,64}", sop_class) else "absent or malformed"
    shown_modality = modality if re.fullmatch(r"[A-Z]{1,16}", modality) else "absent or malformed"
    if not secondary and sop_class not in (_COMPUTED_RADIOGRAPHY, _DIGITAL_XRAY):
        raise NotARadiograph(
            f"SOP class is {shown_class} (modality {shown_modality}); allowed are Computed Radiography, Digital X-Ray"
            " For Presentation, and Secondary Capture with modality CR or DX; send such an image"
        )
    if modality not in _MODALITIES and (modality or secondary):
        raise NotARadiograph(f"modality is {shown_modality}, allowed CR or DX; send a radiograph")
    if secondary:
        flags.add("secondary_capture")
    if not modality:
        flags.add("modality_missing")
    return sop_class, modality


def _require_layout(dataset: _DataSet, limits: Limits) -> tuple[tuple[int, int], int, int, bool, str]:
    """Check the Image Pixel module (PS3.3 C.7.6.3): shape, bits allocated, bits stored, sign, photometric."""
    frames = dataset.number(_Tag.FRAMES)
    if frames is not None and frames > 1:
        raise MultiFrame(f"image has {frames} frames, allowed 1; send one frame per file")
    if _Tag.FLOAT_PIXELS in dataset or _Tag.DOUBLE_PIXELS in dataset:
        raise InvalidImage("pixel data are floating point, allowed 8- or 16-bit integers; convert the image")
    pixels = dataset.elements.get(_Tag.PIXELS)
    if pixels is None or pixels.length == 0:
        raise NoPixels(f"data set has no {'' if pixels is None else 'bytes in its '}pixel data; send the image object")

    def required(tag: _Tag) -> int:
        value = dataset.number(tag)
        if value is None:
            raise InvalidImage(f"element {tag} {tag.name.lower()} is missing; the file is damaged")
        return value

    rows, columns = required(_Tag.ROWS), required(_Tag.COLUMNS)
    _require_size(rows, columns, limits)
    photometric = dataset.text(_Tag.PHOTOMETRIC)
    samples = dataset.number(_Tag.SAMPLES) or 1
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        shown = photometric if re.fullmatch(r"[A-Z0-9_ ]{1,16}", photometric) else "absent or malformed"
        raise InvalidImage(
            f"pixels are {samples} samples of photometric interpretation {shown}, allowed 1 of MONOCHROME1 or"
            " MONOCHROME2; send a grayscale image"
        )
    allocated, stored = required(_Tag.BITS_ALLOCATED), required(_Tag.BITS_STORED)
    high_bit, representation = dataset.number(_Tag.HIGH_BIT), required(_Tag.REPRESENTATION)
    if allocated not in (8, 16) or not 1 <= stored <= allocated:
        raise InvalidImage(
            f"pixels have {stored} bits stored in {allocated}, allowed 1-8 in 8 or 1-16 in 16; re-encode them"
        )
    if high_bit is not None and high_bit != stored - 1:
        raise InvalidImage(f"High Bit is {high_bit}, allowed {stored - 1} (Bits Stored - 1); re-encode the image")
    if representation > 1:
        raise InvalidImage(f"Pixel Representation is {representation}, allowed 0 or 1; the file is damaged")
    return (rows, columns), allocated, stored, representation == 1, photometric


def _pixels(
    dataset: _DataSet,
    uid: str,
    syntax: TransferSyntax,
    shape: tuple[int, int],
    bits_allocated: int,
    bits_stored: int,
    signed: bool,
    flags: set[str],
) -> tuple[np.ndarray, int, bool]:
    """Stored values, masked and sign-extended, the bits that they have, and whether their compression was lossy."""
    encapsulated = dataset.elements[_Tag.PIXELS].length == _UNDEFINED
    if encapsulated != bool(syntax.kinds):
        raise HeaderMismatch(
            f"transfer syntax {uid} has {'compressed' if syntax.kinds else 'native'} pixel data,"
            f" the file's are {'compressed' if encapsulated else 'native'}; correct the transfer syntax"
        )
    dtype = np.dtype(np.uint8 if bits_allocated == 8 else np.uint16)
    if not encapsulated:
        if syntax.deflated:
            _require_exact_end(dataset)
        return *_to_stored(_native(dataset, shape, dtype), bits_stored, signed, False, flags), False
    frame = _join_fragments(dataset)
    header = inspect(uid, frame)
    declared = (header.height, header.width, header.components) if header.kind != "rle" else (*shape, header.components)
    if declared != (*shape, 1):
        raise HeaderMismatch(
            f"codestream is {declared[0]}x{declared[1]}x{declared[2]}, the data set declares {shape[0]}x{shape[1]}x1;"
            " correct the header"
        )
    low, high = (bits_allocated, bits_allocated) if header.kind == "rle" else (bits_stored, bits_allocated)
    if not low <= header.precision <= high:
        raise HeaderMismatch(
            f"codestream has {header.precision} bits a sample, the data set declares {bits_stored} stored in"
            f" {bits_allocated}; correct the header"
        )
    lossy = bool(header.lossy) if syntax.lossy is None else syntax.lossy
    if header.lossy is None and syntax.lossy is not None:
        header = replace(header, lossy=lossy)
    values = decode(header, frame, shape, dtype, flags)
    words = values.astype(f"{values.dtype.kind}{dtype.itemsize}", copy=False).view(dtype)
    return *_to_stored(words, bits_stored, signed, lossy, flags), lossy


def _native(dataset: _DataSet, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    element = dataset.elements[_Tag.PIXELS]
    rows, columns = shape
    expected, remaining = rows * columns * dtype.itemsize, len(dataset.data) - element.start
    if element.length > remaining or element.length < expected:
        raise InvalidImage(
            f"pixel data have {min(element.length, remaining)} bytes, {rows}x{columns} pixels need {expected};"
            " send the complete file"
        )
    # a wrong Rows or Columns leaves at least the bytes of one row or column over
    if element.length - expected > 1 and element.length - expected >= min(rows, columns) * dtype.itemsize:
        raise HeaderMismatch(
            f"pixel data have {element.length} bytes, {rows}x{columns} pixels need {expected}; correct Rows and Columns"
        )
    if dtype.itemsize == 2:
        order = "<u2" if dataset.little else ">u2"
        return np.frombuffer(dataset.data, order, rows * columns, element.start).astype(dtype).reshape(shape)
    if dataset.little or element.vr != b"OW":
        return np.frombuffer(dataset.data, np.uint8, expected, element.start).reshape(shape)
    # 8-bit pixels in big endian 16-bit words stand in swapped pairs
    even = expected + expected % 2
    if element.length < even or remaining < even:
        raise InvalidImage(f"pixel data have {min(element.length, remaining)} bytes, 16-bit words need {even}")
    words = np.frombuffer(dataset.data, ">u2", even // 2, element.start).astype("<u2")
    return words.view(np.uint8)[:expected].reshape(shape)


def _require_exact_end(dataset: _DataSet) -> None:
    """What follows the pixel data has to be elements in order, up to the last byte.

    Raw deflate has no checksum: a torn stream inflates to a data set that is a few bytes too long or too short.
    """
    last, end = dataset.elements[_Tag.PIXELS], len(dataset.data)
    position = dataset.end_of(last, end)
    while position < end:
        following = dataset.element_at(position, end, dataset.explicit)
        if following.tag <= last.tag:
            raise InvalidImage(
                f"deflated data set has {end - position} bytes that are no element; the file is damaged, send it again"
            )
        last = following
        undefined = following.length == _UNDEFINED
        position = dataset.skip_undefined(following, end) if undefined else dataset.end_of(following, end)


def _join_fragments(dataset: _DataSet) -> bytes | memoryview:
    """Codestream of the one frame, copied only if it comes in several fragments (PS3.5 A.4)."""
    data, position = dataset.data, dataset.elements[_Tag.PIXELS].start
    fragments: list[memoryview] = []
    while position < len(data):
        # a fragment of odd length may be followed by a padding byte that it did not count
        if data[position : position + 1] == b"\0" and data[position + 1 : position + 3] == b"\xfe\xff":
            position += 1
        item = dataset.element_at(position, len(data), False)
        if item.tag == _SEQUENCE_END:
            break
        if item.tag != _ITEM or item.length == _UNDEFINED:
            raise InvalidImage(f"pixel data have {_name(item.tag)} at byte {position} where a fragment has to start")
        position = dataset.end_of(item, len(data))
        fragments.append(memoryview(data)[item.start : position])
    if len(fragments) < 2:
        raise NoPixels("pixel data hold no fragment; send the image object")
    if len(fragments[0]) > 4:
        raise MultiFrame(f"offset table lists {len(fragments[0]) // 4} frames, allowed 1; send one frame per file")
    return fragments[1] if len(fragments) == 2 else b"".join(fragments[1:])


def _to_stored(raw: np.ndarray, bits_stored: int, signed: bool, lossy: bool, flags: set[str]) -> tuple[np.ndarray, int]:
    """Stored values of unsigned words, and the bits that they have.

    Keeps BitsStored bits: clamps what a lossy codec overshot, else masks what an old overlay or garbage left above.
    More bits are kept where those above continue the values: masking would wrap them.
    """
    whole = raw.view(np.dtype(f"i{raw.dtype.itemsize}")) if signed else raw
    low, high = (int(end) for end in declared_range(bits_stored, signed))
    least, most = int(whole.min()), int(whole.max())
    if low <= least and most <= high:
        return whole, bits_stored
    bits = bits_stored
    if not lossy:
        bits = _continued_bits(raw, bits_stored, signed)
    elif most > high + (high - low) / 2 or least < low - (high - low) / 2:  # more than a codec rings
        bits = max(most.bit_length(), (-1 - least).bit_length()) + signed
    if bits != bits_stored:
        flags.add("bits_stored_corrected")
    elif lossy:
        flags.add("clamped")
        return np.clip(whole, low, high), bits
    values = _lowest_bits(raw, bits, signed)
    if not np.array_equal(values, whole):
        flags.add("high_bits_masked")
    return values, bits


def _continued_bits(raw: np.ndarray, bits_stored: int, signed: bool) -> int:
    """BitsStored, or more where the bits above continue the values.

    Neighbours that differ above BitsStored decide: bits that belong to the values bring them closer, overlays and
    garbage part them and leave them alike below.

    Raises
    ------
    HeaderMismatch
        The bits above are neither.
    """
    rows = raw[:: -(-raw.shape[0] // 256), : 1 << 13]  # enough to decide

    def steps(bits: int) -> np.ndarray:
        return np.abs(np.diff(_lowest_bits(rows, bits, signed).astype(np.int32), axis=1))

    masked = steps(bits_stored)
    closer = {bits: np.sign(masked - steps(bits)).sum() for bits in range(bits_stored, 8 * raw.dtype.itemsize + 1)}
    best = max(closer, key=closer.get)  # the fewest bits of equals
    above = rows - _lowest_bits(rows, best, signed).view(rows.dtype)
    if (above == np.median(above)).mean() > 0.999:  # the same everywhere, but for a few dead pixels
        return best
    across = steps(best)[np.diff(above, axis=1) != 0]
    if across.size and np.median(across) > 2**best / 16:
        raise HeaderMismatch(
            f"Bits Stored {_Tag.BITS_STORED} is {bits_stored}, the pixels use {int(raw.max()).bit_length()}, and what"
            " stands in those above is no overlay; correct the header"
        )
    return best


def _lowest_bits(raw: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """The lowest bits of unsigned words, with their sign extended."""
    if not signed:
        return raw & raw.dtype.type((1 << bits) - 1)
    spare = raw.dtype.itemsize * 8 - bits
    return np.left_shift(raw, spare).view(np.dtype(f"i{raw.dtype.itemsize}")) >> spare


_PIXEL_SHAPES = (
    _Tag.PIXEL_SPACING,
    _Tag.IMAGER_PIXEL_SPACING,
    _Tag.NOMINAL_SCANNED_PIXEL_SPACING,
    _Tag.PIXEL_ASPECT_RATIO,
)
_MAX_PIXEL_ASPECT_RATIO = 5
_SQUARE = 0.01  # spacings are rounded


def _pixel_aspect_ratio(dataset: _DataSet, flags: set[str]) -> float:
    """Height of a pixel over its width, by the first element that tells it; all of them are (vertical, horizontal)."""
    ratios = {}
    for tag in _PIXEL_SHAPES:
        pair = dataset.numbers(tag) or [0.0, 0.0]
        if len(pair) == 2 and all(math.isfinite(value) and value > 0 for value in pair):
            ratios[f"{tag} {tag.name.lower()}"] = pair[0] / pair[1]
        elif len(pair) != 2 or any(pair):  # zeros stand for unknown
            flags.add("pixel_shape_doubtful")
    if not ratios:
        return 1.0
    where, ratio = next(iter(ratios.items()))
    if any(not math.isclose(other, ratio, rel_tol=_SQUARE) for other in ratios.values()):
        flags.add("pixel_shape_doubtful")
    return _stretch(ratio, where, flags)


def _stretch(ratio: float, where: str, flags: set[str]) -> float:
    """A pixel's height over its width, flagged where that matters."""
    if not 1 / _MAX_PIXEL_ASPECT_RATIO <= ratio <= _MAX_PIXEL_ASPECT_RATIO:
        raise HeaderMismatch(
            f"{where} makes a pixel {ratio:.3g} times as high as wide, allowed are 1/{_MAX_PIXEL_ASPECT_RATIO} to"
            f" {_MAX_PIXEL_ASPECT_RATIO}; correct it"
        )
    if math.isclose(ratio, 1, rel_tol=_SQUARE):
        return 1.0
    flags.add("pixels_not_square")
    return ratio


def _modality_transform(dataset: _DataSet, signed: bool, flags: set[str]) -> Rescale | LookupTable | None:
    numbers = [dataset.numbers(tag) for tag in (_Tag.SLOPE, _Tag.INTERCEPT)]
    has_rescale = any(numbers)
    if _Tag.MODALITY_LUT in dataset:
        table = _first_table(dataset, _Tag.MODALITY_LUT, signed, flags)
        if table:
            flags.add("modality_lut")
            if has_rescale:
                flags.add("modality_lut_and_rescale")
            return table
        flags.add("modality_lut_unusable")
    if not has_rescale:
        return None
    slope, intercept = (values[0] if values else default for values, default in zip(numbers, (1.0, 0.0), strict=True))
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        flags.add("rescale_unusable")
        return None
    if slope < 0:
        flags.add("negative_slope")
    return Rescale(slope, intercept) if (slope, intercept) != (1, 0) else None


def _voi(dataset: _DataSet, negative_input: bool, flags: set[str]) -> Window | LookupTable | None:
    """The first VOI LUT, else the first window; None with a flag where it is unusable."""
    centers, widths = dataset.numbers(_Tag.CENTER), dataset.numbers(_Tag.WIDTH)
    if _Tag.VOI_LUT in dataset:
        table = _first_table(dataset, _Tag.VOI_LUT, negative_input, flags)
        if table:
            if len(dataset.items(_Tag.VOI_LUT)) > 1:
                flags.add("several_windows")
            if centers or widths:
                flags.add("voi_lut_and_window")
            return table
        flags.add("voi_lut_unusable")
    if not centers and not widths:
        return None
    function = dataset.text(_Tag.VOI_FUNCTION) or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        flags.add("voi_function_unknown")
        function = "LINEAR"
    window = Window(centers[0], widths[0], function) if centers and widths else None
    if window is None or not window.usable:
        flags.add("window_fallback")
        return None
    if max(len(centers), len(widths)) > 1:
        flags.add("several_windows")
    return window


def _first_table(dataset: _DataSet, tag: _Tag, negative_input: bool, flags: set[str]) -> LookupTable | None:
    """LUT Descriptor and LUT Data of the first item (PS3.3 C.11.1.1.1); None if malformed."""
    item = next(iter(dataset.items(tag)), None)
    descriptor = item.shorts(_Tag.LUT_DESCRIPTOR) if item else []
    if len(descriptor) != 3:
        return None
    count, first, bits = descriptor[0] or 65536, descriptor[1], descriptor[2]
    raw = item.raw(_Tag.LUT_DATA)
    if len(raw) >= 2 * count:
        entries = np.frombuffer(raw, "<u2" if item.little else ">u2", count).astype(np.uint16)
    elif bits <= 8 and len(raw) >= count:  # two 8-bit entries a word
        entries = np.frombuffer(raw, np.uint8, count).astype(np.uint16)
    else:
        return None
    if negative_input and first >= 1 << 15:
        first -= 1 << 16
    used_bits = max(int(entries.max()).bit_length(), 1)
    # fewer than a quarter of the declared greys: a 12-bit table that calls itself 16-bit
    if not used_bits <= bits <= min(used_bits + 1, 16):
        bits = used_bits
        flags.add("lut_corrected")
    return LookupTable(first, entries, bits)


def _padding(dataset: _DataSet, signed: bool) -> tuple[int, int] | None:
    ends = [dataset.shorts(tag, signed)[:1] for tag in (_Tag.PADDING, _Tag.PADDING_LIMIT)]
    if not ends[0]:
        return None
    both = ends[0] + (ends[1] or ends[0])
    return min(both), max(both)


def _view(dataset: _DataSet, flags: set[str]) -> tuple[str, tuple[str, ...]]:
    """View from View Position, View Code Sequence or Patient Orientation; flags for what a reader has to know."""
    orientation = tuple(text.upper() for text in dataset.texts(_Tag.ORIENTATION))
    if len(orientation) != 2 or not all(re.fullmatch(r"[APRLHF]{1,3}", text) for text in orientation):
        orientation = ()
    codes = [item.text(_Tag.CODE_VALUE) for item in dataset.items(_Tag.VIEW_CODE)]
    named = next((_VIEW_WORDS[word] for word in (dataset.text(_Tag.VIEW_POSITION), *codes) if word in _VIEW_WORDS), "")
    implied = ""
    if orientation:
        across, down = orientation[0][0], orientation[1][0]
        if down != "F":
            flags.add("not_upright")
        elif across in "LR":
            implied = "frontal"
            if across == "R":
                flags.add("mirrored")
        elif across in "AP":
            implied = "lateral"
    if named and implied and (implied == "lateral") != (named == "lateral") and named != "oblique":
        flags.add("view_conflict")
    view = named or implied or view_of(_descriptions(dataset)) or "unknown"
    if view == "unknown":
        flags.add("view_unknown")
    if view == "lateral":
        flags.add("lateral")
    return view, orientation


def _anatomy(dataset: _DataSet, shape: tuple[int, int] = (0, 0)) -> Anatomy:
    """What the header says of the part of the body; codes and texts stay here."""
    spacing = dataset.numbers(_Tag.IMAGER_PIXEL_SPACING) or dataset.numbers(_Tag.PIXEL_SPACING) or []
    extent = max((side * step for side, step in zip(shape, spacing, strict=False)), default=0.0)
    return anatomy(
        body_part=_free_text(dataset, _Tag.BODY_PART),
        regions=[
            Code(item.text(_Tag.CODE_VALUE), item.text(_Tag.CODE_SCHEME), _free_text(item, _Tag.CODE_MEANING))
            for item in dataset.items(_Tag.REGION)
        ],
        descriptions=_descriptions(dataset),
        extent_mm=extent if 0 < extent < math.inf else None,
    )


def _descriptions(dataset: _DataSet) -> list[str]:
    """Free texts that may name the part of the body or the view, the one nearest to the image first."""
    own = [_free_text(dataset, tag) for tag in (_Tag.SERIES_DESCRIPTION, _Tag.PROTOCOL_NAME)]
    sources = [dataset, *dataset.items(_Tag.REQUEST)]
    for tag in (_Tag.PERFORMED_PROCEDURE, _Tag.REQUESTED_PROCEDURE):
        own += [_free_text(source, tag) for source in sources]
    codes = [code for source in sources for code in source.items(_Tag.REQUESTED_CODE)]
    codes += dataset.items(_Tag.PROCEDURE_CODE)
    return [*own, *(_free_text(code, _Tag.CODE_MEANING) for code in codes), _free_text(dataset, _Tag.STUDY_DESCRIPTION)]


def _free_text(dataset: _DataSet, tag: _Tag) -> str:
    """Text whose words are looked for: UTF-8 where it is that, else Latin-1, whatever the file's character set."""
    raw = dataset.raw(tag)[:1024]
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _presentation_flags(dataset: _DataSet, photometric: str, flags: set[str]) -> None:
    shape = dataset.text(_Tag.LUT_SHAPE)
    if photometric == "MONOCHROME2" and shape == "INVERSE":
        flags.add("monochrome2_with_inverse")
    if photometric == "MONOCHROME1" and shape == "IDENTITY":
        flags.add("monochrome1_with_identity")
    if _Tag.PRESENTATION_LUT in dataset:
        flags.add("presentation_lut_ignored")
    if _Tag.SHUTTER_SHAPE in dataset:
        flags.add("shutter_present")
    if dataset.has_overlay:
        flags.add("overlay_present")
    burned_in = dataset.text(_Tag.BURNED_IN)
    if burned_in != "NO":
        flags.add("burned_in" if burned_in == "YES" else "burned_in_unknown")


# ------------------------------------------------------------------------------------------------------- PNG and JPEG


def _require_size(height: int, width: int, limits: Limits) -> None:
    if not height or not width:
        raise InvalidImage(f"image has {height} rows and {width} columns; the file is damaged")
    if height * width > limits.max_pixels:
        raise LimitExceeded(
            f"image has {height}x{width} = {height * width} pixels, allowed {limits.max_pixels}; send a smaller one"
        )


def _read_png(data: bytes, limits: Limits) -> Radiograph:
    """8- or 16-bit PNG; 16-bit grays are raw values, everything else is display-ready."""
    import imagecodecs

    if len(data) < 33 or data[12:16] != b"IHDR":
        raise InvalidImage("PNG has no header chunk; the file is damaged")
    width, height = struct.unpack_from(">II", data, 16)
    _require_size(height, width, limits)
    density = _walk_png(data)
    try:
        pixels = imagecodecs.png_decode(data)
    except MemoryError as error:
        raise LimitExceeded(f"decoding a {height}x{width} PNG needs more memory than allowed") from error
    except Exception as error:
        raise InvalidImage(f"PNG does not decode ({str(error)[:120]}); the file is damaged") from error
    flags = {"palette"} if data[25] == 3 else set()
    pixels = pixels.reshape(height, width, -1)
    if pixels.shape[2] in (2, 4):
        opaque = 255 if pixels.dtype == np.uint8 else 65535
        if (pixels[..., -1] != opaque).any():
            flags.add("alpha_dropped")
        pixels = pixels[..., :-1]
    return _picture("png", _collapse(pixels), density, flags)


def _walk_png(data: bytes) -> tuple[float, float]:
    """Walk the chunks to IEND: decoders differ on what they do with a truncated file and with animations.

    Gives pixels per unit across and down, equal where the file does not say.
    """
    position, count, density = 8, 0, (1, 1)
    while count < _MAX_ELEMENTS:
        if position + 12 > len(data):
            raise InvalidImage(f"PNG ends at byte {len(data)} before its end chunk; send the complete file")
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        if kind == b"acTL" and data[position + 8 : position + 12] > b"\0\0\0\x01":
            raise MultiFrame("PNG is animated, allowed 1 frame; send one frame per file")
        if kind == b"pHYs" and length == 9:
            density = struct.unpack_from(">II", data.ljust(position + 17), position + 8)
        position += 12 + length
        if kind == b"IEND":
            if position > len(data):
                break
            return density
        count += 1
    raise InvalidImage("PNG chunks do not lead to an end chunk; the file is damaged")


def _read_jpeg(data: bytes, limits: Limits) -> Radiograph:
    """8-bit baseline, extended or progressive JPEG; its EXIF orientation is applied."""
    import io

    from PIL import Image, ImageOps

    header = inspect_jpeg(data)
    if header.kind in ("lossless", "jpeg_ls") or header.precision != 8 or header.components not in (1, 3):
        raise InvalidImage(
            f"JPEG is {header.kind} with {header.components} components of {header.precision} bits, allowed 1 or 3"
            " of 8 bits; send an ordinary JPEG"
        )
    _require_size(header.height, header.width, limits)
    if data.rfind(b"\xff\xd9") < len(data) // 2:
        raise InvalidImage("JPEG has no end-of-image marker: it is truncated; send the complete file")
    require_whole_scans(data)
    try:
        picture = Image.open(io.BytesIO(data), formats=["JPEG"])
        turned = ImageOps.exif_transpose(picture)
        pixels = np.asarray(turned)
    except MemoryError as error:
        raise LimitExceeded(f"decoding a {header.height}x{header.width} JPEG needs more memory than allowed") from error
    except Exception as error:
        raise InvalidImage(f"JPEG does not decode ({str(error)[:120]}); the file is damaged") from error
    if pixels.shape[0] * pixels.shape[1] != header.height * header.width:
        raise HeaderMismatch(f"JPEG decodes to {pixels.shape}, its header declares {header.height}x{header.width}")
    flags = {"lossy"}
    density = picture.info.get("jfif_density", (1, 1)) if picture.info.get("jfif_unit") else (1, 1)
    if (turn := picture.getexif().get(0x0112, 1)) != 1:
        flags.add("exif_transposed")
        density = density[::-1] if turn > 4 else density
    pixels = _collapse(pixels.reshape(*pixels.shape[:2], -1))
    if has_step(pixels if pixels.ndim == 2 else pixels[..., 1]):
        flags.add("damage_suspected")
    return _picture("jpeg", pixels, density, flags)


def _collapse(pixels: np.ndarray) -> np.ndarray:
    """(rows, columns) where the channels are equal; else (rows, columns, 3) uint8."""
    if pixels.shape[2] == 1:
        return pixels[..., 0]
    if np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2]):
        return np.ascontiguousarray(pixels[..., 0])
    if pixels.dtype == np.uint16:
        return (pixels >> 8).astype(np.uint8)
    return np.ascontiguousarray(pixels)


def _picture(form: str, pixels: np.ndarray, density: tuple[float, float], flags: set[str]) -> Radiograph:
    """`density` is pixels per unit across and down."""
    metadata = Metadata(
        format=form,
        rows=pixels.shape[0],
        columns=pixels.shape[1],
        bits_stored=pixels.dtype.itemsize * 8,
        photometric="RGB" if pixels.ndim == 3 else "MONOCHROME2",
        pixel_aspect_ratio=_stretch(density[0] / density[1], "its resolution", flags) if all(density) else 1.0,
    )
    return Radiograph(pixels, metadata, tuple(sorted(flags | {"burned_in_unknown", "view_unknown"})))
