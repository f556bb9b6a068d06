"""PNG and JPEG files to radiographs."""

from __future__ import annotations

import io
import struct

import numpy as np

from cxr_triton.errors import HeaderMismatch, InvalidImage, LimitExceeded, MultiFrame
from cxr_triton.pixels.codestream import decoding, inspect_jpeg
from cxr_triton.pixels.header import stretch
from cxr_triton.pixels.jpeg_scan import require_whole_scans, segment_at
from cxr_triton.pixels.limits import Limits
from cxr_triton.pixels.radiograph import Metadata, Radiograph
from cxr_triton.pixels.step import has_step

_MAX_CHUNKS = 100_000
_MAX_SCANS = 512  # libjpeg goes through all coefficients for each; 64 x 14 bits would need more, no encoder does
_SCAN, _EXTRAS = 0xDA, {*range(0xE0, 0xF0), 0xFE}  # application data, comment
_TURNS, _ACROSS = range(2, 9), range(5, 9)  # EXIF orientations that change the picture, and its sides
_APPLICATIONS = {(0xE0, b"JFIF\0"), (0xE1, b"Exif\0"), (0xEE, b"Adobe")}  # resolution, orientation, colour


def read_png(data: bytes, limits: Limits) -> Radiograph:
    """8- or 16-bit PNG; 16-bit grays are raw values, everything else is display-ready."""
    import imagecodecs

    if len(data) < 33 or data[12:16] != b"IHDR":
        raise InvalidImage("PNG has no header chunk; the file is damaged")
    width, height = struct.unpack_from(">II", data, 16)
    limits.require_size(height, width)
    density = _walk_png(data)
    with decoding("PNG", f"a {height}x{width} PNG"):
        pixels = imagecodecs.png_decode(data)
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
    while count < _MAX_CHUNKS:
        if position + 12 > len(data):
            raise InvalidImage(f"PNG ends at byte {len(data)} before its end chunk; send the complete file")
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        if kind == b"acTL" and data[position + 8 : position + 12] > b"\0\0\0\x01":
            raise MultiFrame("PNG is animated, allowed 1 frame; send one frame per file")
        if kind == b"IHDR" and count:
            raise InvalidImage("PNG has two header chunks; the file is damaged")
        if kind == b"pHYs" and length == 9:
            density = struct.unpack_from(">II", data.ljust(position + 17), position + 8)
        position += 12 + length
        if kind == b"IEND":
            if position > len(data):
                break
            return density
        count += 1
    raise InvalidImage("PNG chunks do not lead to an end chunk; the file is damaged")


def read_jpeg(data: bytes, limits: Limits) -> Radiograph:
    """8-bit baseline, extended or progressive JPEG; its EXIF orientation is applied."""
    from PIL import Image, ImageOps

    header = inspect_jpeg(data)
    if header.kind in ("lossless", "jpeg_ls") or header.precision != 8 or header.components not in (1, 3):
        raise InvalidImage(
            f"JPEG is {header.kind} with {header.components} components of {header.precision} bits, allowed 1 or 3"
            " of 8 bits; send an ordinary JPEG"
        )
    limits.require_size(header.height, header.width)
    if data.rfind(b"\xff\xd9") < len(data) // 2:
        raise InvalidImage("JPEG has no end-of-image marker: it is truncated; send the complete file")
    require_whole_scans(data)
    if header.kind == "progressive" and (scans := data.count(b"\xff\xda")) > _MAX_SCANS:
        raise LimitExceeded(f"JPEG has {scans} scans, allowed {_MAX_SCANS}; send a simpler file")
    with decoding("JPEG", f"a {header.height}x{header.width} JPEG"):
        picture = Image.open(io.BytesIO(_without_extras(data)), formats=["JPEG"])
        turned = ImageOps.exif_transpose(picture)
        pixels = np.asarray(turned)
    if pixels.shape[0] * pixels.shape[1] != header.height * header.width:
        raise HeaderMismatch(f"JPEG decodes to {pixels.shape}, its header declares {header.height}x{header.width}")
    flags = {"lossy"}
    density = picture.info.get("jfif_density", (1, 1)) if picture.info.get("jfif_unit") else (1, 1)
    turn = picture.getexif().get(0x0112)  # of any type, in a file that is damaged
    if turn in _TURNS:
        flags.add("exif_transposed")
        density = density[::-1] if turn in _ACROSS else density
    pixels = _collapse(pixels.reshape(*pixels.shape[:2], -1))
    if has_step(pixels if pixels.ndim == 2 else pixels[..., 1]):
        flags.add("damage_suspected")
    return _picture("jpeg", pixels, density, flags)


def _without_extras(data: bytes) -> bytes:
    """A JPEG with those segments alone that its picture needs.

    Pillow takes fill bytes one by one, joins Exif segments at the cost of a square, and reads previews.
    """
    parts, names, position = [data[:2]], set(), 2
    while True:
        marker, body, end = segment_at(data, position)
        segment = data[end - len(body) - 4 : end]
        if marker == _SCAN:
            return b"".join([*parts, segment, data[end:]])
        name = (marker, body[:5])
        if marker not in _EXTRAS or (name in _APPLICATIONS and name not in names):
            parts.append(segment)
            names.add(name)
        position = end


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
        pixel_aspect_ratio=stretch(density[0] / density[1], "its resolution", flags) if all(density) else 1.0,
    )
    return Radiograph(pixels, metadata, tuple(sorted(flags | {"burned_in_unknown", "view_unknown"})))
