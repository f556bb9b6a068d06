"""Pixel data of a DICOM data set to stored values: layout, native bytes or a codestream, bits above BitsStored."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cxr_triton.errors import HeaderMismatch, InvalidImage, MultiFrame, NoPixels
from cxr_triton.pixels.codestream import TRANSFER_SYNTAXES, decode, inspect
from cxr_triton.pixels.elements import ITEM, SEQUENCE_END, UNDEFINED, DataSet, Tag, name_of
from cxr_triton.pixels.limits import Limits
from cxr_triton.pixels.transforms import declared_range


class Layout(NamedTuple):
    """What the Image Pixel module (PS3.3 C.7.6.3) says of the pixels."""

    shape: tuple[int, int]  # rows, columns
    bits_allocated: int  # 8 or 16
    bits_stored: int
    signed: bool
    photometric: str  # MONOCHROME1 or MONOCHROME2


def require_layout(dataset: DataSet, limits: Limits) -> Layout:
    """Check that the data set has one frame of grayscale pixels of a size allowed.

    Raises
    ------
    InvalidImage
        Or one of its subclasses.
    """
    frames = dataset.number(Tag.FRAMES)
    if frames is not None and frames > 1:
        raise MultiFrame(f"image has {frames} frames, allowed 1; send one frame per file")
    if Tag.FLOAT_PIXELS in dataset or Tag.DOUBLE_PIXELS in dataset:
        raise InvalidImage("pixel data are floating point, allowed 8- or 16-bit integers; convert the image")
    pixels = dataset.elements.get(Tag.PIXELS)
    if pixels is None or pixels.length == 0:
        raise NoPixels(f"data set has no {'' if pixels is None else 'bytes in its '}pixel data; send the image object")

    def required(tag: Tag) -> int:
        value = dataset.number(tag)
        if value is None:
            raise InvalidImage(f"element {tag} {tag.name.lower()} is missing; the file is damaged")
        return value

    rows, columns = required(Tag.ROWS), required(Tag.COLUMNS)
    limits.require_size(rows, columns)
    photometric = dataset.text(Tag.PHOTOMETRIC)
    samples = dataset.number(Tag.SAMPLES) or 1
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        shown = photometric if re.fullmatch(r"[A-Z0-9_ ]{1,16}", photometric) else "absent or malformed"
        raise InvalidImage(
            f"pixels are {samples} samples of photometric interpretation {shown}, allowed 1 of MONOCHROME1 or"
            " MONOCHROME2; send a grayscale image"
        )
    allocated, stored = required(Tag.BITS_ALLOCATED), required(Tag.BITS_STORED)
    high_bit, representation = dataset.number(Tag.HIGH_BIT), required(Tag.REPRESENTATION)
    if allocated not in (8, 16) or not 1 <= stored <= allocated:
        raise InvalidImage(
            f"pixels have {stored} bits stored in {allocated}, allowed 1-8 in 8 or 1-16 in 16; re-encode them"
        )
    if high_bit is not None and high_bit != stored - 1:
        raise InvalidImage(f"High Bit is {high_bit}, allowed {stored - 1} (Bits Stored - 1); re-encode the image")
    if representation > 1:
        raise InvalidImage(f"Pixel Representation is {representation}, allowed 0 or 1; the file is damaged")
    return Layout((rows, columns), allocated, stored, representation == 1, photometric)


def stored_values(dataset: DataSet, uid: str, layout: Layout, flags: set[str]) -> tuple[np.ndarray, int, bool]:
    """Stored values, masked and sign-extended, the bits that they have, and whether their compression was lossy.

    Raises
    ------
    InvalidImage
        Or one of its subclasses.
    """
    syntax = TRANSFER_SYNTAXES[uid]
    encapsulated = dataset.elements[Tag.PIXELS].length == UNDEFINED
    if encapsulated != bool(syntax.kinds):
        raise HeaderMismatch(
            f"transfer syntax {uid} has {'compressed' if syntax.kinds else 'native'} pixel data,"
            f" the file's are {'compressed' if encapsulated else 'native'}; correct the transfer syntax"
        )
    dtype = np.dtype(np.uint8 if layout.bits_allocated == 8 else np.uint16)
    if encapsulated:
        words, lossy = _decoded(dataset, uid, layout, dtype, flags)
    else:
        if syntax.deflated:
            _require_exact_end(dataset)
        words, lossy = _native(dataset, layout.shape, dtype), False
    return *_to_stored(words, layout.bits_stored, layout.signed, lossy, flags), lossy


def _decoded(dataset: DataSet, uid: str, layout: Layout, dtype: np.dtype, flags: set[str]) -> tuple[np.ndarray, bool]:
    """Unsigned words of a compressed frame, and whether the compression was lossy."""
    frame = _join_fragments(dataset)
    header = inspect(uid, frame)
    rows, columns = layout.shape
    size = layout.shape if header.kind == "rle" else (header.height, header.width)
    if size != layout.shape or header.components != 1:
        raise HeaderMismatch(
            f"codestream is {size[0]}x{size[1]}x{header.components}, the data set declares {rows}x{columns}x1;"
            " correct the header"
        )
    least = layout.bits_allocated if header.kind == "rle" else layout.bits_stored
    if not least <= header.precision <= layout.bits_allocated:
        raise HeaderMismatch(
            f"codestream has {header.precision} bits a sample, the data set declares {layout.bits_stored} stored in"
            f" {layout.bits_allocated}; correct the header"
        )
    if header.lossy is None:
        header = replace(header, lossy=TRANSFER_SYNTAXES[uid].lossy)
    values = decode(header, frame, layout.shape, dtype, flags)
    return values.astype(f"{values.dtype.kind}{dtype.itemsize}", copy=False).view(dtype), bool(header.lossy)


def _native(dataset: DataSet, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    element = dataset.elements[Tag.PIXELS]
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


def _require_exact_end(dataset: DataSet) -> None:
    """What follows the pixel data has to be elements in order, up to the last byte.

    Raw deflate has no checksum: a torn stream inflates to a data set that is a few bytes too long or too short.
    """
    last, end = dataset.elements[Tag.PIXELS], len(dataset.data)
    position = dataset.end_of(last, end)
    while position < end:
        following = dataset.element_at(position, end, dataset.explicit)
        if following.tag <= last.tag:
            raise InvalidImage(
                f"deflated data set has {end - position} bytes that are no element; the file is damaged, send it again"
            )
        last = following
        position = dataset.after(following, end)


def _join_fragments(dataset: DataSet) -> bytes:
    """Codestream of the one frame (PS3.5 A.4)."""
    data, position = dataset.data, dataset.elements[Tag.PIXELS].start
    fragments: list[memoryview] = []
    while position < len(data):
        # a fragment of odd length may be followed by a padding byte that it did not count
        if data[position : position + 1] == b"\0" and data[position + 1 : position + 3] == b"\xfe\xff":
            position += 1
        item = dataset.element_at(position, len(data), False)
        if item.tag == SEQUENCE_END:
            break
        if item.tag != ITEM or item.length == UNDEFINED:
            raise InvalidImage(f"pixel data have {name_of(item.tag)} at byte {position} where a fragment has to start")
        position = dataset.end_of(item, len(data))
        fragments.append(memoryview(data)[item.start : position])
    if len(fragments) < 2:
        raise NoPixels("pixel data hold no fragment; send the image object")
    if len(fragments[0]) > 4:
        raise MultiFrame(f"offset table lists {len(fragments[0]) // 4} frames, allowed 1; send one frame per file")
    return b"".join(fragments[1:])


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
    best = max(closer, key=lambda bits: closer[bits])  # the fewest bits of equals
    above = rows - _lowest_bits(rows, best, signed).view(rows.dtype)
    if (above == np.median(above)).mean() > 0.999:  # the same everywhere, but for a few dead pixels
        return best
    across = steps(best)[np.diff(above, axis=1) != 0]
    if across.size and np.median(across) > 2**best / 16:
        raise HeaderMismatch(
            f"Bits Stored {Tag.BITS_STORED} is {bits_stored}, the pixels use {int(raw.max()).bit_length()}, and what"
            " stands in those above is no overlay; correct the header"
        )
    return best


def _lowest_bits(raw: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """The lowest bits of unsigned words, with their sign extended."""
    if not signed:
        return raw & raw.dtype.type((1 << bits) - 1)
    spare = raw.dtype.itemsize * 8 - bits
    return np.left_shift(raw, spare).view(np.dtype(f"i{raw.dtype.itemsize}")) >> spare
