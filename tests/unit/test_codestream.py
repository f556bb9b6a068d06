"""Codestream headers tell the truth about what the decoders would allocate, and damaged ones are refused."""

import struct

import imagecodecs
import numpy as np
import pytest
from dicom_files import pattern
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_triton import errors
from cxr_triton.pixels.codestream import TRANSFER_SYNTAXES, compressed, decode, inspect

BASELINE, EXTENDED, LOSSLESS = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.70"
JPEG_LS, JPEG_2000, HTJ2K, RLE = (
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.201",
    "1.2.840.10008.1.2.5",
)
VALUES = pattern(12)
STREAMS = {
    LOSSLESS: imagecodecs.jpeg8_encode(VALUES, lossless=True, bitspersample=12),
    JPEG_LS: imagecodecs.jpegls_encode(VALUES),
    JPEG_2000: imagecodecs.jpeg2k_encode(VALUES, codecformat="J2K", reversible=True, level=0, bitspersample=12),
    HTJ2K: imagecodecs.htj2k_encode(VALUES, reversible=True),
}


@pytest.mark.parametrize(
    ("syntax", "stream", "expected"),
    [
        (BASELINE, imagecodecs.jpeg8_encode(pattern(8)), ("baseline", 67, 45, 1, 8, True)),
        (EXTENDED, imagecodecs.jpeg8_encode(VALUES, bitspersample=12), ("extended", 67, 45, 1, 12, True)),
        (LOSSLESS, STREAMS[LOSSLESS], ("lossless", 67, 45, 1, 12, False)),
        (JPEG_LS, STREAMS[JPEG_LS], ("jpeg_ls", 67, 45, 1, 16, False)),
        ("1.2.840.10008.1.2.4.81", imagecodecs.jpegls_encode(VALUES, level=3), ("jpeg_ls", 67, 45, 1, 16, True)),
        (JPEG_2000, STREAMS[JPEG_2000], ("jpeg2000", 67, 45, 1, 12, None)),
        (
            "1.2.840.10008.1.2.4.91",
            imagecodecs.jpeg2k_encode(VALUES, codecformat="J2K", reversible=False, level=50, bitspersample=12),
            ("jpeg2000", 67, 45, 1, 12, True),
        ),
        (HTJ2K, STREAMS[HTJ2K], ("htj2k", 67, 45, 1, 16, None)),
    ],
)
def test_header_is_read(syntax, stream, expected):
    header = inspect(syntax, stream)
    assert (header.kind, header.width, header.height, header.components, header.precision, header.lossy) == expected


def test_signed_jpeg_2000_is_seen():
    stream = imagecodecs.jpeg2k_encode(pattern(12, signed=True), codecformat="J2K", reversible=True, bitspersample=12)
    assert inspect(JPEG_2000, stream).signed


def test_colour_components_are_counted():
    assert inspect(BASELINE, imagecodecs.jpeg8_encode(np.zeros((16, 16, 3), np.uint8))).components == 3


@pytest.mark.parametrize("syntax", STREAMS)
def test_codestream_of_another_kind_is_a_mismatch(syntax):
    for other in set(STREAMS) - {syntax}:
        with pytest.raises(errors.HeaderMismatch):
            inspect(other, STREAMS[syntax])


@pytest.mark.parametrize("syntax", STREAMS)
def test_every_truncation_is_refused(syntax):
    stream = STREAMS[syntax]
    for size in range(len(stream) - 4):
        with pytest.raises(errors.InvalidImage):
            inspect(syntax, stream[:size])


@pytest.mark.parametrize("syntax", STREAMS)
def test_padding_after_the_end_marker_is_allowed(syntax):
    header = inspect(syntax, STREAMS[syntax])
    for padding in (b"\0", b"\xff", b"\0\0\0", *(b"\0" * count for count in (61, 62, 63, 64, 65, 1000))):
        padded = STREAMS[syntax] + padding
        assert inspect(syntax, padded) == header
        np.testing.assert_array_equal(decode(header, padded, VALUES.shape, VALUES.dtype), VALUES)


def test_second_frame_header_is_refused():
    stream = STREAMS[LOSSLESS]
    at = stream.index(b"\xff\xc3")
    length = 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    with pytest.raises(errors.InvalidImage, match="two frame headers"):
        inspect(LOSSLESS, stream[:at] + stream[at : at + length] + stream[at:])


def test_size_that_comes_later_is_refused():
    stream = bytearray(STREAMS[LOSSLESS])
    at = stream.index(b"\xff\xc3")
    stream[at + 5 : at + 7] = b"\0\0"
    with pytest.raises(errors.InvalidImage, match="later"):
        inspect(LOSSLESS, bytes(stream))


def test_arithmetic_coding_is_unsupported():
    stream = STREAMS[LOSSLESS].replace(b"\xff\xc3", b"\xff\xcb", 1)
    with pytest.raises(errors.UnsupportedSyntax, match="SOF11"):
        inspect(LOSSLESS, stream)


def test_missing_tile_is_refused():
    stream = bytearray(STREAMS[JPEG_2000])
    stream[24:28] = struct.pack(">I", 40)  # tiles of 40 columns: the one that is there is not enough
    with pytest.raises(errors.InvalidImage, match="1 of 2 tiles"):
        inspect(JPEG_2000, bytes(stream))


def test_million_tiles_are_refused():
    stream = bytearray(STREAMS[JPEG_2000])
    stream[24:32] = struct.pack(">II", 1, 1)
    stream[8:16] = struct.pack(">II", 20000, 20000)
    with pytest.raises(errors.InvalidImage, match="tiles"):
        inspect(JPEG_2000, bytes(stream))


@pytest.mark.parametrize(
    "table",
    [(0,), (16,), (2, 64, 64), (2, 200, 100), (2, 64, 10_000_000), (2, 0, 100), (2**31, 64)],
    ids=str,
)
def test_damaged_rle_tables_are_refused(table):
    stream = struct.pack("<16I", *table, *[0] * (16 - len(table))) + b"\0" * 500
    with pytest.raises(errors.InvalidImage, match="RLE"):
        inspect(RLE, stream)


def test_rle_data_that_grow_beyond_the_picture_are_refused_before_they_are_stored():
    segment = b"\x81\0" * 3_000_000  # 384 MB once decoded
    stream = struct.pack("<16I", 2, 64, 64 + len(segment), *[0] * 13) + segment * 2
    header = inspect(RLE, stream)
    with pytest.raises(errors.InvalidImage):
        decode(header, stream, (64, 64), np.dtype(np.uint16))


def test_native_and_unknown_syntaxes_have_no_codestream():
    for syntax in ("1.2.840.10008.1.2.1", "1.2.3"):
        with pytest.raises(errors.UnsupportedSyntax):
            inspect(syntax, STREAMS[LOSSLESS])
    assert set(compressed()) < set(TRANSFER_SYNTAXES)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(STREAMS)), st.binary(max_size=300), st.integers(0, 200))
def test_garbage_gives_a_typed_error_or_a_header(syntax, garbage, keep):
    try:
        header = inspect(syntax, STREAMS[syntax][:keep] + garbage)
    except errors.InvalidImage:
        return
    assert header.width > 0 and header.height > 0
