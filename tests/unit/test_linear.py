"""What a hostile file costs grows with its bytes and not faster: twice the bytes take twice the time."""

import contextlib
import io
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pydicom
import pytest
from dicom_files import compressed_bytes, dataset_of, deflated, file_bytes, pattern
from PIL import Image

from cxr_triton.client.objects.source import source_header
from cxr_triton.errors import CxrError
from cxr_triton.pixels.dicom import read_identity, read_image
from cxr_triton.pixels.jpeg_scan import segment_at

pytestmark = pytest.mark.slow

GOOD = file_bytes(dataset_of(pattern(12), 12, StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.4"))
HEAD, REST = GOOD[: (at := GOOD.index(b"\x10\0\x10\0PN"))], GOOD[at:]  # before the patient, and from there on
ITEM = b"\xfe\xff\x00\xe0"
JPEG = io.BytesIO()
Image.fromarray(pattern(8)).save(JPEG, "JPEG")
JPEG = JPEG.getvalue()
PNG = io.BytesIO()
Image.fromarray(pattern(8)).save(PNG, "PNG")
PNG = PNG.getvalue()
EXIF = b"\xff\xe1\xff\xfaExif\0\0" + bytes(65522)
TABLES = b"\xff\xc4" + struct.pack(">H", 2 + 17 * 3000) + bytes(17) * 3000


def element(tag: bytes, value: bytes, vr: bytes = b"SQ\0\0") -> bytes:
    return tag + vr + struct.pack("<I", len(value)) + value


def items(n: int, inner: bytes) -> bytes:
    """A View Code Sequence of `n` bytes of items of known length."""
    one = ITEM + struct.pack("<I", len(inner)) + inner
    return HEAD + element(b"\x54\0\x20\x02", one * (n // len(one))) + REST


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


HOSTILE: dict[str, tuple[Callable[[int], bytes], int]] = {
    "zeros that end in other bytes": (lambda n: HEAD + bytes(n) + b"\1" * 8, 1 << 21),
    "zeros, deflated": (lambda n: deflated(bytes(n) + b"\1" * 8), 1 << 21),
    "zeros to the end": (lambda n: HEAD + bytes(n), 1 << 25),
    "elements": (lambda n: HEAD + b"\x09\0\1\0LO\0\0" * (n // 8), 1 << 18),
    "items": (lambda n: items(n, b""), 1 << 18),
    "items of zeros": (lambda n: items(n, bytes(64) + b"\1" * 8), 1 << 21),
    "items of undefined length in zeros": (
        lambda n: HEAD + element(b"\x54\0\x20\x02", (ITEM + b"\xff" * 4 + bytes(64)) * (n // 72)) + REST, 1 << 20,
    ),
    "sequences in sequences": (
        lambda n: HEAD + (b"\x54\0\x20\x02SQ\0\0\xff\xff\xff\xff" + ITEM + b"\xff" * 4) * (n // 20), 1 << 20,
    ),
    "long text": (lambda n: HEAD + element(b"\x08\0\x30\x10", b"x\\" * (n // 2), b"UT\0\0"), 1 << 24),
    "long numbers": (lambda n: HEAD + element(b"\x28\0\x50\x10", b"1" * n, b"UT\0\0"), 1 << 24),
    "fragments": (lambda n: compressed_bytes(pattern(8), 8, "1.2.840.10008.1.2.4.50", JPEG).replace(
        ITEM + bytes(4), ITEM + bytes(4) + (ITEM + bytes(4)) * (n // 8), 1), 1 << 18),
    "fill bytes of a JPEG": (lambda n: JPEG[:2] + b"\xff" * n + JPEG[2:], 1 << 24),
    "segments of a JPEG": (lambda n: JPEG[:2] + b"\xff\xfe\0\2" * (n // 4) + JPEG[2:], 1 << 13),
    "Exif of a JPEG": (lambda n: JPEG[:2] + EXIF * (n >> 16) + JPEG[2:], 1 << 23),
    "tables of a JPEG": (
        lambda n: JPEG[:2] + TABLES * (n // 51_000) + JPEG[2:],
        1 << 19,
    ),
    "chunks of a PNG": (lambda n: PNG[:33] + chunk(b"teSt", b"") * (n // 12) + PNG[33:], 1 << 19),
    "zeros after a JPEG": (lambda n: compressed_bytes(
        pattern(8), 8, "1.2.840.10008.1.2.4.50", JPEG + bytes(n)), 1 << 24),
}  # fmt: skip


def seconds(step: Callable[[bytes], object], data: bytes) -> float:
    """Least processor time of several runs."""
    best = float("inf")
    for _ in range(4):
        started = time.process_time()
        with contextlib.suppress(CxrError):
            step(data)
        best = min(best, time.process_time() - started)
    return best


def require_linear(step: Callable[[bytes], object], make: Callable[[int], bytes], size: int) -> None:
    """Four times the bytes take less than nine times the time, in one of three tries: linear takes four."""
    small, large = make(size), make(4 * size)
    floor = 0.004  # of a clock and the rest of a file
    ratios = []
    while not ratios or (ratios[-1] >= 9 and len(ratios) < 3):
        ratios.append(seconds(step, large) / max(seconds(step, small), floor))
    assert min(ratios) < 9, ratios


@pytest.mark.parametrize("step", [read_image, read_identity, source_header])
@pytest.mark.parametrize("name", HOSTILE)
def test_time_grows_with_the_bytes(name, step):
    make, size = HOSTILE[name]
    require_linear(step, make, size)


def test_fill_bytes_are_not_walked_one_by_one():
    """A loop in Python would take a hundred times as long as reading the bytes does."""
    data = b"\xff" * (1 << 24) + JPEG[2:]
    assert segment_at(data, 0).marker == JPEG[3]
    assert seconds(lambda d: segment_at(d, 0), data) < 10 * seconds(lambda d: d.count(b"\0"), data) + 0.02


def test_elements_of_all_items_count_together():
    """An item's own count would let a file have the square of the elements allowed."""
    inner = b"\x09\0\1\0LO\0\0" * 2000
    with pytest.raises(CxrError, match="100000"):
        read_image(items(len(inner) * 60, inner))


def test_pydicom_gets_an_excerpt_of_bounded_size(monkeypatch):
    seen = []
    read = pydicom.filereader.dcmread
    monkeypatch.setattr(
        "cxr_triton.client.objects.source.dcmread", lambda file: (seen.append(len(file.getvalue())), read(file))[1]
    )
    long_name = element(b"\x10\0\x01\x10", b"x" * (1 << 22), b"UT\0\0")
    many = element(b"\x08\0\x32\x10", (ITEM + bytes(4)) * 100_000)
    source = source_header(HEAD + many + REST)
    assert source.undecoded == ["ProcedureCodeSequence"] and source.PatientID == "ID-4711"
    bomb = deflated(long_name + element(b"\x10\0\x02\x10", bytes(1 << 25), b"OB\0\0"))
    source_header(bomb)
    assert max(seen) < 1 << 16


def test_a_patient_id_too_long_for_the_excerpt_is_an_error():
    ds = dataset_of(np.zeros((4, 4), np.uint16), 12)
    data = file_bytes(ds)
    at = data.index(b"\x10\0\x20\0LO")
    length = struct.unpack_from("<H", data, at + 6)[0]
    long = data[:at] + b"\x10\0\x20\0LO" + struct.pack("<H", 20_000) + b"1" * 20_000 + data[at + 8 + length :]
    with pytest.raises(CxrError, match="Patient ID"):
        source_header(long)
