"""A DICOM Part 10 file, opened: its transfer syntax, its data set inflated and walked, its SOP class allowed."""

from __future__ import annotations

import re
import struct
import zlib
from mmap import mmap

from cxr_triton.errors import ForProcessing, InvalidImage, LimitExceeded, NotARadiograph
from cxr_triton.pixels.codestream import TRANSFER_SYNTAXES, TransferSyntax
from cxr_triton.pixels.elements import ITEM, PIXEL_TAGS, VRS, WANTED, DataSet, Tag
from cxr_triton.pixels.filetype import has_prefix, kind_of
from cxr_triton.pixels.limits import Limits

_IMPLICIT, _EXPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
_MOST_VALUE, _MOST_SEQUENCE, _MOST_ITEMS = 1 << 14, 1 << 20, 1000  # of an element in an excerpt: bytes, items
_COMPUTED_RADIOGRAPHY = "1.2.840.10008.5.1.4.1.1.1"
_DIGITAL_XRAY = "1.2.840.10008.5.1.4.1.1.1.1"
_DIGITAL_XRAY_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"
_SECONDARY_CAPTURE = {
    "1.2.840.10008.5.1.4.1.1.7",
    "1.2.840.10008.5.1.4.1.1.7.2",
    "1.2.840.10008.5.1.4.1.1.7.3",
}
_MODALITIES = ("CR", "DX")


def read_meta(data: bytes | mmap, start: int) -> tuple[str, int]:
    """Transfer syntax of the File Meta Information (always explicit little endian, PS3.10 7.1), and where it ends.

    The transfer syntax is empty where there is none.
    """
    meta = DataSet(data, explicit=True, little=True)
    position = start
    while position + 8 <= len(data) and data[position : position + 2] == b"\x02\0":
        element = meta.element_at(position, len(data), True)
        meta.elements.setdefault(element.tag, element)
        position = meta.end_of(element, len(data))
    return meta.first(Tag.TRANSFER_SYNTAX), position


def recognise(data: bytes | mmap, position: int) -> str:
    """Native transfer syntax of a data set without File Meta Information, from its first element."""
    if data[position + 4 : position + 6] not in VRS:
        return _IMPLICIT
    return _BIG_ENDIAN if data[position] == 0 else _EXPLICIT


def walk_data_set(
    data: bytes | mmap, position: int, syntax: TransferSyntax, limits: Limits, wanted: frozenset[int] = WANTED
) -> DataSet:
    """Walk the data set from `position` on; the data decide whether its VR are explicit."""
    dataset, position = _open_data_set(data, position, syntax, limits)
    dataset.wanted = wanted
    return dataset.walk(position, len(dataset.data))


def _open_data_set(data: bytes | mmap, position: int, syntax: TransferSyntax, limits: Limits) -> tuple[DataSet, int]:
    if syntax.deflated:
        data, position = _inflate(data[position:], limits), 0
    return DataSet(data, data[position + 4 : position + 6] in VRS, syntax.little), position


def excerpt(data: bytes, wanted: frozenset[int], limits: Limits | None = None) -> tuple[bytes, list[int]]:
    """A Part 10 file of some elements of another, small enough for any parser.

    Parameters
    ----------
    data : bytes
    wanted : frozenset of int
        Tags.
    limits : Limits, optional
        `max_file_bytes` bounds what a deflated data set inflates to.

    Returns
    -------
    file : bytes
        Native, with at most 16 KiB of a value, and 1 MiB and 1000 items of a sequence.
    left_out : list of int
        Tags of what is larger.

    Raises
    ------
    InvalidImage
        Not a Part 10 file, or damaged before its pixel data.
    LimitExceeded
        Nested, long or inflated beyond the limits.
    """
    if not has_prefix(data):
        raise InvalidImage(f"the file is not DICOM but {kind_of(data)}; send Part 10 files")
    uid, start = read_meta(data, 132)
    syntax = TRANSFER_SYNTAXES.get(uid, TRANSFER_SYNTAXES[_EXPLICIT])
    dataset, position = _open_data_set(data, start, syntax, limits or Limits())
    item = struct.pack("<HH" if syntax.little else ">HH", ITEM >> 16, ITEM & 0xFFFF)
    parts, left_out = [], []
    for begin, element in dataset.each(position, len(dataset.data)):
        if element.tag in PIXEL_TAGS:
            break
        if element.tag in wanted:
            end = dataset.after(element, len(dataset.data))
            most = _MOST_SEQUENCE if dataset.data[element.start : element.start + 4] == item else _MOST_VALUE
            part = bytes(dataset.data[begin : min(end, begin + most + 1)])
            if len(part) > most or part.count(item) > _MOST_ITEMS:
                left_out.append(element.tag)
            else:
                parts.append(part)
    native = (_EXPLICIT if syntax.little else _BIG_ENDIAN) if dataset.explicit else _IMPLICIT
    name = native.encode().ljust(len(native) + len(native) % 2, b"\0")
    meta = b"\x02\0\x10\0UI" + struct.pack("<H", len(name)) + name
    head = [bytes(128), b"DICM\x02\0\0\0UL\x04\0", struct.pack("<I", len(meta)), meta]
    return b"".join([*head, *parts]), left_out


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


def require_radiograph(dataset: DataSet, flags: set[str]) -> tuple[str, str]:
    """SOP class and modality decide, not text: a CT scout may well call itself a chest X-ray."""
    sop_class = dataset.first(Tag.SOP_CLASS)
    modality = dataset.text(Tag.MODALITY)
    if sop_class == _DIGITAL_XRAY_PROCESSING or dataset.text(Tag.INTENT) == "FOR PROCESSING":
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
