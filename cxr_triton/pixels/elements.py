"""Bytes of a DICOM data set to its elements (PS3.5 section 7).

The data set is walked once without recursion, every length is checked against what remains, and only the elements of
`Tag`, or those that a caller names, are kept.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from mmap import mmap
from typing import NamedTuple

import numpy as np

from cxr_triton.errors import InvalidImage, LimitExceeded

VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
UNDEFINED = 0xFFFFFFFF
"""Length of an element that ends with a delimiter."""
ITEM, _ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_MAX_DEPTH = 32
_MAX_ELEMENTS = 100_000
_MAX_TEXT = 1024  # bytes of a text or of numbers that are looked at
_BLOCK = 1 << 16


class Tag(IntEnum):
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
    WINDOW_EXPLANATION = 0x00281055
    VOI_FUNCTION = 0x00281056
    LOSSY = 0x00282110
    MODALITY_LUT = 0x00283000
    LUT_DESCRIPTOR = 0x00283002
    LUT_EXPLANATION = 0x00283003
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
        return name_of(self)


WANTED = frozenset(Tag)
"""What `read_image` reads."""


_EXPLANATIONS = {Tag.WINDOW_EXPLANATION, Tag.LUT_EXPLANATION}
"""Words that nothing depends on: where one comes twice, none of them is taken."""

PIXEL_TAGS = {Tag.PIXELS, Tag.FLOAT_PIXELS, Tag.DOUBLE_PIXELS}


class Element(NamedTuple):
    """Header of an element; its value stays in the file."""

    tag: int
    vr: bytes  # empty in implicit VR
    start: int  # of the value
    length: int  # may be UNDEFINED


@dataclass
class DataSet:
    """Elements of one nesting level; the values stay in `data` until asked for."""

    data: bytes | mmap
    explicit: bool
    little: bool
    wanted: frozenset[int] = WANTED
    elements: dict[int, Element] = field(default_factory=dict)
    has_overlay: bool = False
    stop: int = 0  # where `walk` ended
    counted: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # of a file, its items' elements too
    zeros: dict[int, int] = field(default_factory=dict)  # of an end, where the zeros before it start

    def walk(self, position: int, end: int) -> DataSet:
        """Collect the wanted elements from `position` to `end`, an item delimiter, or the pixel data."""
        for _, element in self.each(position, end):
            if element.tag in self.wanted:
                if element.tag in self.elements:
                    if element.tag not in _EXPLANATIONS:
                        raise InvalidImage(f"element {name_of(element.tag)} comes twice; the file is damaged")
                    self.elements[element.tag] = element._replace(length=0)
                    continue
                self.elements[element.tag] = element
                if element.tag in PIXEL_TAGS:
                    break  # its length is checked when it is read, so that a more telling error can come first
            elif element.tag >> 16 in range(0x6000, 0x6020, 2):
                self.has_overlay = True
            if element.tag == _ITEM_END:
                self.stop = element.start
                break
        return self

    def each(self, position: int, end: int) -> Iterator[tuple[int, Element]]:
        """Each element from `position` to `end`, and where its header starts; what it holds is passed over."""
        self.stop = position
        while self.stop < end and not self._is_padding(self.stop, end):
            element = self.element_at(self.stop, end, self.explicit)
            yield self.stop, element
            self.stop = self.after(element, end)

    def _is_padding(self, position: int, end: int) -> bool:
        """Whether there are zeros alone, which pad a file to a block size."""
        if any(self.data[position : position + 16]):
            return False
        if end not in self.zeros:
            self.zeros[end] = self._zeros_before(end, 0 if end == len(self.data) else position)
        return position >= self.zeros[end]

    def _zeros_before(self, end: int, least: int) -> int:
        """Where the zeros start that lead to `end`, `least` or later."""
        start = end
        while start > least:
            block = self.data[max(start - _BLOCK, least) : start]
            kept = len(block.rstrip(b"\0"))
            start -= len(block) - kept
            if kept:
                break
        return start

    def element_at(self, position: int, end: int, explicit: bool) -> Element:
        """Header of the element at `position`, in whichever of the three forms it has (PS3.5 section 7.1)."""
        if next(self.counted) > _MAX_ELEMENTS:
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
            return Element(tag, b"", position + 8, length)
        if vr in _LONG_VRS or (vr not in VRS and data[position + 6 : position + 8] == b"\0\0"):
            if position + 12 > end:
                raise InvalidImage(f"data set ends at byte {end} inside an element header; send the complete file")
            (length,) = struct.unpack_from(order + "I", data, position + 8)
            return Element(tag, vr, position + 12, length)
        (length,) = struct.unpack_from(order + "H", data, position + 6)
        return Element(tag, vr, position + 8, length)

    def after(self, element: Element, end: int) -> int:
        """Position after a value, whether its length is known or not."""
        return (self.skip_undefined if element.length == UNDEFINED else self.end_of)(element, end)

    def end_of(self, element: Element, end: int) -> int:
        """Position after a value of known length, which has to lie before `end`."""
        if element.length > end - element.start:
            raise InvalidImage(
                f"element {name_of(element.tag)} at byte {element.start} declares {element.length} bytes,"
                f" {end - element.start} remain; send the complete file"
            )
        return element.start + element.length

    def skip_undefined(self, element: Element, end: int) -> int:
        """Position after a sequence of undefined length, found with an explicit stack instead of recursion."""
        stack = [self.explicit and element.vr != b"UN"]  # one entry a level: is it explicit VR?
        in_item = False
        position = element.start
        while stack:
            inner = self.element_at(position, end, stack[-1])
            opens = inner.length == UNDEFINED
            if inner.tag == (_ITEM_END if in_item else SEQUENCE_END):
                stack.pop()
                in_item, position = not in_item and bool(stack), inner.start
            elif not in_item and inner.tag != ITEM:
                raise InvalidImage(
                    f"sequence {name_of(element.tag)} has {name_of(inner.tag)} where an item has to start"
                )
            elif opens:
                # PS3.5 6.2.2: UN of undefined length holds implicit VR
                stack.append(stack[-1] and inner.vr != b"UN")
                in_item, position = not in_item, inner.start
            else:
                position = self.end_of(inner, end)
            if len(stack) > 2 * _MAX_DEPTH:
                raise LimitExceeded(
                    f"sequence {name_of(element.tag)} is nested deeper than the {_MAX_DEPTH} levels allowed"
                )
        return position

    def items(self, tag: int) -> list[DataSet]:
        """Items of a wanted sequence."""
        element = self.elements.get(tag)
        if element is None:
            return []
        end = len(self.data) if element.length == UNDEFINED else self.end_of(element, len(self.data))
        explicit = self.explicit and element.vr != b"UN"
        found, position = [], element.start
        while position < end:
            item = self.element_at(position, end, explicit)
            if item.tag != ITEM:
                break
            stop = end if item.length == UNDEFINED else self.end_of(item, end)
            inner = DataSet(self.data, explicit, self.little, counted=self.counted, zeros=self.zeros)
            found.append(inner.walk(item.start, stop))
            position = found[-1].stop if item.length == UNDEFINED else stop
        return found

    def __contains__(self, tag: int) -> bool:
        return tag in self.elements

    def raw(self, tag: int, most: int = UNDEFINED) -> bytes:
        """The first `most` bytes of a value; empty if the element is absent."""
        element = self.elements.get(tag)
        if element is None or element.length == UNDEFINED:
            return b""
        return self.data[element.start : min(self.end_of(element, len(self.data)), element.start + most)]

    def texts(self, tag: int) -> list[str]:
        """Values of a text element, without padding."""
        value = self.raw(tag, _MAX_TEXT).decode("latin-1").strip(" \0\t\r\n")
        return [part.strip(" \0") for part in value.split("\\")] if value else []

    def first(self, tag: int) -> str:
        """First value of a text element; empty if absent."""
        return (self.texts(tag) or [""])[0]

    def text(self, tag: int) -> str:
        """First value of a code string in capitals; empty if absent."""
        return self.first(tag).upper()

    def shorts(self, tag: int, signed: bool = False) -> list[int]:
        """16-bit values, whatever VR a writer gave them."""
        raw = self.raw(tag, _MAX_TEXT)
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
        if element.vr in (b"IS", b"DS") or tag == Tag.FRAMES:
            value = raw.strip(b" \0")
            if value.isdigit() and len(value) < 12:
                return int(value)
        elif len(raw) == 2 or (len(raw) == 4 and element.vr in (b"UL", b"SL")):
            return int.from_bytes(raw, "little" if self.little else "big")
        raise InvalidImage(
            f"element {name_of(tag)} holds {len(raw)} bytes that are not one integer; the file is damaged"
        )

    def numbers(self, tag: int) -> list[float]:
        """Decimal strings; none if absent or empty, NaN where a value is malformed."""
        element = self.elements.get(tag)
        if element and element.vr in (b"FD", b"FL"):
            kind = np.dtype(("<" if self.little else ">") + ("f8" if element.vr == b"FD" else "f4"))
            raw = self.raw(tag, _MAX_TEXT)
            return np.frombuffer(raw, kind, len(raw) // kind.itemsize).tolist()
        return [_decimal(text) for text in self.texts(tag)]


def name_of(tag: int) -> str:
    """(GGGG,EEEE) in hexadecimal digits, as the standard writes tags."""
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _decimal(text: str) -> float:
    return float(text) if re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", text) else math.nan
