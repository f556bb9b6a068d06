"""What kind of file some bytes are, by how they start."""

from __future__ import annotations

import re
from mmap import mmap

PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
"""How PNG and JPEG files start."""

EXECUTABLE = re.compile(
    rb"\x7fELF|MZ|#!|\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe|\xbe\xba\xfe\xca"
)
"""How programs start: ELF, DOS and Windows, scripts, Mach-O in both byte orders and fat (CVE-2019-11687)."""

_TEXT = rb"[^\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]*\Z"
_KINDS = [
    (re.compile(start, re.DOTALL), kind)
    for start, kind in (
        (rb"\Z", "empty"),
        (rb".{4}ftyp(hei[cxms]|hev[cx]|mif1|msf1)", "a HEIC picture"),
        (rb".{4}ftypavif", "an AVIF picture"),
        (rb".{4}ftyp", "a video"),
        (rb"RIFF.{4}WEBP", "a WebP picture"),
        (rb"RIFF", "a recording"),
        (rb"\x89PNG", "a PNG"),
        (rb"\xff\xd8\xff", "a JPEG"),
        (rb"%PDF", "a PDF"),
        (rb"PK\x03\x04", "a ZIP archive or an Office document"),
        (rb"PK\x05\x06", "an empty ZIP archive"),
        (rb"\x1f\x8b", "compressed by gzip"),
        (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
        (rb"Rar!", "a RAR archive"),
        (rb"II[*+]\0|MM\0[*+]", "a TIFF"),
        (rb"GIF8", "a GIF"),
        (rb"\0\0\0\x0cjP  ", "a JPEG 2000 file"),
        (rb"\xff\x4f\xff\x51", "a JPEG 2000 codestream"),
        (rb"\0\0\0\x0cJXL ", "a JPEG XL file"),
        (rb"\xff\x0a", "a JPEG XL codestream"),
        (rb"\x89HDF", "an HDF5 file"),
        (rb"\x93NUMPY", "a NumPy array"),
        (rb"(\xef\xbb\xbf)?\s*(?i:<!doctype html|<html)", "an HTML page"),
        (rb"(\xef\xbb\xbf)?\s*(?i:<\?xml|<svg)", "XML"),
        (rb"(\xef\xbb\xbf)?\s*#!" + _TEXT, "a script"),
        (rb"\s*(?=\S)" + _TEXT, "text"),
        (EXECUTABLE.pattern, "a program"),
        (rb"BM", "a BMP"),
    )
]


def kind_of(data: bytes | mmap) -> str:
    """What a file without a DICOM prefix seems to be, in words with their article."""
    head = bytes(data[:512])
    return next((kind for start, kind in _KINDS if start.match(head)), "of an unknown kind")


def has_prefix(data: bytes | mmap) -> bool:
    """Whether a file has the preamble and prefix of DICOM Part 10."""
    return data[128:132] == b"DICM"


def may_be_bare(data: bytes | mmap) -> bool:
    """Whether a file may start with a DICOM group 2 or 8 element, without preamble and prefix."""
    return data[:2] in (b"\x02\0", b"\x08\0", b"\0\x08") and len(data) >= 16


def may_be_image(data: bytes | mmap) -> bool:
    """Whether a file starts as a DICOM file, with or without prefix, a PNG or a JPEG does."""
    return has_prefix(data) or data[:8].startswith(PICTURES) or may_be_bare(data)
