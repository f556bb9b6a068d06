"""Seeded mutations of files: of bytes, and of what DICOM, PNG and JPEG say they are."""

from __future__ import annotations

import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence

EXTREME = (0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 32, 127, 128, 254, 255, 256, 32767, 32768, 65534, 65535)
EXTREME_LONG = (*EXTREME, 65536, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_MOST = 1 << 20  # bytes of a mutated input
Random = random.Random


# --------------------------------------------------------------------------------------------------------------- bytes


def _range(data: bytes, rng: Random, most: int = 64) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, rng.randint(1, most))))


def flip_bits(data: bytes, rng: Random) -> bytes:
    """One to eight bits."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if out else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def set_bytes(data: bytes, rng: Random) -> bytes:
    """One to four bytes to chance or to an extreme."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4)) if out else 0):
        out[rng.randrange(len(out))] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
    return bytes(out)


def set_number(data: bytes, rng: Random) -> bytes:
    """A number of one, two or four bytes to an extreme."""
    size, order = rng.choice((1, 2, 4)), rng.choice(("little", "big"))
    if len(data) < size:
        return data
    at = rng.randrange(len(data) - size + 1)
    return data[:at] + (rng.choice(EXTREME_LONG) & (1 << 8 * size) - 1).to_bytes(size, order) + data[at + size :]


def insert(data: bytes, rng: Random) -> bytes:
    """Bytes of chance, of one value, or of the input itself."""
    start, end = _range(data, rng)
    new = rng.choice((rng.randbytes(rng.randint(1, 16)), bytes([rng.randrange(256)]) * rng.randint(1, 300)))
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((new, data[start:end])) + data[at:]


def delete(data: bytes, rng: Random) -> bytes:
    """A range."""
    start, end = _range(data, rng)
    return data[:start] + data[end:]


def truncate(data: bytes, rng: Random) -> bytes:
    """The end."""
    return data[: rng.randrange(len(data) + 1)]


def blank(data: bytes, rng: Random) -> bytes:
    """A range to one value."""
    start, end = _range(data, rng, 256)
    return data[:start] + bytes([rng.choice((0, 0xFF, rng.randrange(256)))]) * (end - start) + data[end:]


def exchange(data: bytes, rng: Random) -> bytes:
    """Two ranges of a size."""
    (a, b), (c, d) = sorted((_range(data, rng), _range(data, rng)))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:] if b <= c else data


def splice(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """The begin of one and the end of another."""
    other = rng.choice(others)
    share = rng.random()
    at = int(share * len(data)), int((share if rng.random() < 0.5 else rng.random()) * len(other))
    return data[: at[0]] + other[at[1] :]


OF_BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(flip_bits,) * 3,
    *(set_bytes,) * 2,
    *(set_number,) * 2,
    insert,
    delete,
    truncate,
    blank,
    exchange,
)


def of_bytes(data: bytes, rng: Random) -> bytes:
    """Any mutation that knows no format."""
    return rng.choice(OF_BYTES)(data, rng)


# --------------------------------------------------------------------------------------------------------------- DICOM

_VRS = b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_ELEMENT = re.compile(b"[\\s\\S]{4}(" + b"|".join(_VRS) + b")")
_SYNTAXES = [
    f"1.2.840.10008.1.2{end}".encode()
    for end in ("", ".1", ".1.99", ".2", ".5", *(f".4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91, 201, 202, 203)))
]
_TEXTS = (
    b"",
    b"0",
    b"-1",
    b"1e308",
    b"1E999",
    b"nan",
    b"999999999999",
    b"\\\\\\",
    b"1\\2",
    b" ",
    b"\0",
    b"FOR PROCESSING",
    b"CHEST",
    b"HAND",
    b"MONOCHROME1",
    b"RGB",
    b"PALETTE COLOR",
    b"CT",
    b"DX",
    b"L\\F",
    b"A" * 200,
    b"\xff\xfe",
    b"1.2.840.10008.5.1.4.1.1.1",
    b"1.2.840.10008.5.1.4.1.1.7",
    b"0.0001",
    b"-0",
    b"1_0",
    b"01",
)
_META_END, _DEFLATED = 144, b"1.2.840.10008.1.2.1.99"


def _elements(data: bytes) -> list[tuple[int, int, int, int, int]]:
    """Start, where the length stands, its size, start of the value, length of elements with a VR, nested ones too."""
    found = []
    for match in _ELEMENT.finditer(data, 132):
        at = match.start()
        size = 4 if match[1] in _LONG else 2
        where = at + 8 if size == 4 else at + 6
        if where + size <= len(data):
            length = int.from_bytes(data[where : where + size], "little")
            if where + size + length <= len(data):
                found.append((at, where, size, where + size, length))
    return found


def implicit_elements(data: bytes, start: int) -> list[tuple[int, int, int, int, int]]:
    """As `_elements`, of implicit VR."""
    found = []
    while start + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, start + 4)
        if start + 8 + length > len(data):
            break
        found.append((start, start + 4, 4, start + 8, length))
        start += 8 + length
    return found


def _one(data: bytes, rng: Random) -> tuple[int, int, int, int, int] | None:
    elements = _elements(data)
    start = _META_END + int.from_bytes(data[140:144], "little")
    if data[start + 4 : start + 6] not in _VRS:
        elements += implicit_elements(data, start)
    return rng.choice(elements) if elements else None


def _length(data: bytes, rng: Random, element: tuple[int, int, int, int, int]) -> bytes:
    _, where, size, _, length = element
    value = rng.choice((*EXTREME_LONG, length - 1, length + 1, length - 2, length + 2, length * 2, len(data)))
    return data[:where] + (value & (1 << 8 * size) - 1).to_bytes(size, "little") + data[where + size :]


def _tag(data: bytes, rng: Random, element: tuple[int, int, int, int, int]) -> bytes:
    at, other = element[0], rng.choice(_elements(data) or [element])[0]
    new = rng.choice(
        (data[other : other + 4], rng.randbytes(4), b"\xe0\x7f\x10\0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0")
    )
    return data[:at] + new + data[at + 4 :]


def _vr(data: bytes, rng: Random, element: tuple[int, int, int, int, int]) -> bytes:
    at = element[0] + 4
    return data[:at] + rng.choice((*_VRS, b"??", b"\0\0", b"ZZ")) + data[at + 2 :]


def _value(data: bytes, rng: Random, element: tuple[int, int, int, int, int]) -> bytes:
    """Another value, with its length."""
    _, where, size, start, length = element
    if length == 2 and rng.random() < 0.6:
        return data[:start] + struct.pack("<H", rng.choice(EXTREME)) + data[start + 2 :]
    value = rng.choice(
        (*_TEXTS, *_SYNTAXES[:4], data[start : start + length] * 2, of_bytes(data[start : start + length], rng))
    )
    value = value + b"\0" * (len(value) % 2)
    if len(value) >= 1 << 8 * size:
        return data
    return data[:where] + len(value).to_bytes(size, "little") + value + data[start + length :]


def _repeat(data: bytes, rng: Random, element: tuple[int, int, int, int, int]) -> bytes:
    at, *_, start, length = element
    whole, times = data[at : start + length], rng.choice((1, 1, 2, 30))
    return data[:at] + whole * times + data[at:] if len(whole) * times < _MOST else data


def _remove(data: bytes, rng: Random, element: tuple[int, int, int, int, int]) -> bytes:
    return data[: element[0]] + data[element[3] + element[4] :]


def _move(data: bytes, rng: Random, element: tuple[int, int, int, int, int]) -> bytes:
    at, end = element[0], element[3] + element[4]
    rest, whole = data[:at] + data[end:], data[at:end]
    to = rng.choice(_elements(rest) or [(len(rest),)])[0]
    return rest[:to] + whole + rest[to:]


def _nest(data: bytes, rng: Random, element: tuple[int, int, int, int, int]) -> bytes:
    """A sequence before the element: whole, without end, deep, or of many empty items."""
    head = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\xff\xff\xff\xff"
    end = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    depth = rng.choice((1, 2, 16, 31, 33, 200))
    inner = data[element[0] : element[3] + element[4]]
    new = rng.choice(
        (
            head * depth + inner + end * depth,
            head * depth,
            head + end * 2,
            head[:12] + b"\xfe\xff\0\xe0\0\0\0\0" * 500 + end[8:],
        )
    )
    return data[: element[0]] + new + data[element[0] :]


def _syntax(data: bytes, rng: Random, _: object) -> bytes:
    """Another transfer syntax."""
    at = data.find(b"\x02\0\x10\0UI")
    if at < 0:
        return data
    length = int.from_bytes(data[at + 6 : at + 8], "little")
    value = rng.choice(_SYNTAXES)
    value += b"\0" * (len(value) % 2)
    return data[: at + 6] + struct.pack("<H", len(value)) + value + data[at + 8 + length :]


def _pixels(data: bytes, rng: Random, _: object) -> bytes:
    """Inside the pixel data: fragments' heads, the codestream's header, its body."""
    at = max(data.rfind(b"\xe0\x7f\x10\0"), data.rfind(b"\x7f\xe0\0\x10"), 0)
    first = data.find(b"\xfe\xff\0\xe0", at)
    choice = rng.random()
    if first > 0 and choice < 0.15:
        heads = [match.start() for match in re.finditer(b"\xfe\xff[\0\xdd]\xe0", data[at:])]
        where = at + rng.choice(heads)
        return rng.choice((_head_length, _head_gone, _head_split))(data, rng, where)
    if first > 0 and choice < 0.5:
        return data[: at + 8] + codestream_header(data[at + 8 :], rng)
    return data[: at + 8] + of_bytes(data[at + 8 :], rng)


def _head_length(data: bytes, rng: Random, where: int) -> bytes:
    return data[: where + 4] + struct.pack("<I", rng.choice(EXTREME_LONG)) + data[where + 8 :]


def _head_gone(data: bytes, rng: Random, where: int) -> bytes:
    return data[:where] + data[where + 8 :]


def _head_split(data: bytes, rng: Random, where: int) -> bytes:
    """One fragment as two, or an offset table with entries."""
    length = int.from_bytes(data[where + 4 : where + 8], "little")
    if length == 0:
        entries = struct.pack("<II", 0, rng.choice(EXTREME_LONG))[: rng.choice((4, 8))]
        return data[: where + 4] + struct.pack("<I", len(entries)) + entries + data[where + 8 :]
    cut = rng.randrange(length + 1) // 2 * 2
    new = (
        struct.pack("<I", cut) + data[where + 8 : where + 8 + cut] + b"\xfe\xff\0\xe0" + struct.pack("<I", length - cut)
    )
    return data[: where + 4] + new + data[where + 8 + cut :]


def codestream_header(data: bytes, rng: Random) -> bytes:
    """A number behind one of the first markers of a JPEG, JPEG-LS or JPEG 2000 stream, or of an RLE header."""
    markers = [match.end() for match in re.finditer(b"\xff[\x4f-\x93\xc0-\xfe]", data[:800])][:24]
    at = rng.choice(markers or [8]) + rng.randrange(24)
    return set_number(data[at : at + 4], rng).join((data[:at], data[at + 4 :]))


OF_COMMANDS = (_length, _value, _tag, _remove, _repeat)
"""Of an element of a command set; take bytes, chance, and one of `implicit_elements`."""
_OF_DICOM = (_length, _length, _tag, _vr, *(_value,) * 5, _repeat, _remove, _move, _nest, _syntax, *(_pixels,) * 6)


def of_dicom(data: bytes, rng: Random) -> bytes:
    """A mutation of elements, sequences, fragments or codestreams; a deflated data set is mutated inflated."""
    if _DEFLATED in data[:400] and rng.random() < 0.7:
        start = _META_END + int.from_bytes(data[140:144], "little")
        inflated = zlib.decompressobj(-15).decompress(data[start:])
        mutated = rng.choice((of_bytes, of_dicom))(
            data[:start].replace(_DEFLATED, b"1.2.840.10008.1.2.1\0\0\0") + inflated, rng
        )
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        return data[:start] + packer.compress(mutated[start:]) + packer.flush()
    step, element = rng.choice(_OF_DICOM), None
    if step not in (_syntax, _pixels):
        element = _one(data, rng)
        if element is None:
            return of_bytes(data, rng)
    return step(data, rng, element)


# ------------------------------------------------------------------------------------------------------- PNG and JPEG


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def of_png(data: bytes, rng: Random) -> bytes:
    """A mutation of chunks with right CRCs, or of the filtered lines before they are deflated."""
    chunks = _chunks(data)
    i = rng.randrange(len(chunks))
    kind, body = chunks[i]
    match rng.randrange(10):
        case 0 | 1:
            chunks[i] = (kind, of_bytes(body, rng))
        case 2:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[i])
        case 3:
            del chunks[i]
        case 4:
            j = rng.randrange(len(chunks))
            chunks[i], chunks[j] = chunks[j], chunks[i]
        case 5:
            chunks[i] = (
                rng.choice((b"PLTE", b"tRNS", b"gAMA", b"acTL", b"iCCP", b"zTXt", b"IEND", b"eXIf", b"sBIT")),
                body,
            )
        case 6:
            new = rng.choice((b"tEXt", b"tRNS", b"pHYs", b"PLTE", b"bKGD", b"acTL", b"fcTL", b"cICP", b"iTXt", b"hIST"))
            chunks.insert(
                rng.randrange(1, len(chunks) + 1), (new, rng.randbytes(rng.choice((0, 1, 4, 9, 13, 26, 768))))
            )
        case 7:
            header = bytearray(chunks[0][1].ljust(13, b"\0"))
            if rng.random() < 0.5:
                header[rng.choice((8, 9, 10, 11, 12))] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
            else:
                struct.pack_into(">I", header, rng.choice((0, 4)), rng.choice(EXTREME_LONG))
            chunks[0] = (b"IHDR", bytes(header))
        case _:
            chunks = _lines(chunks, rng)
    return data[:8] + b"".join(_chunk(*chunk) for chunk in chunks)


def _lines(chunks: list[tuple[bytes, bytes]], rng: Random) -> list[tuple[bytes, bytes]]:
    whole = b"".join(body for kind, body in chunks if kind == b"IDAT")
    mutated = zlib.compress(of_bytes(zlib.decompress(whole), rng))
    cut = rng.randrange(len(mutated))
    parts = [mutated] if rng.random() < 0.5 else [mutated[:cut], mutated[cut:]]
    at = next(i for i, (kind, _) in enumerate(chunks) if kind == b"IDAT")
    rest = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    return [*rest[:at], *((b"IDAT", part) for part in parts), *rest[at:]]


def _segments(data: bytes) -> tuple[list[bytes], bytes]:
    """Segments up to the first scan's, and the rest."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        (length,) = struct.unpack_from(">H", data, at + 2)
        found.append(data[at : at + 2 + length])
        at += 2 + length
        if found[-1][1] == 0xDA:
            break
    return found, data[at:]


def of_jpeg(data: bytes, rng: Random) -> bytes:
    """A mutation of segments or of the scan behind them."""
    segments, scan = _segments(data)
    if not segments:
        return of_bytes(data, rng)
    i = rng.randrange(len(segments))
    match rng.randrange(9):
        case 0:
            segments[i] = segments[i][:2] + struct.pack(">H", rng.choice(EXTREME)) + segments[i][4:]
        case 1:
            body = of_bytes(segments[i][4:], rng)
            segments[i] = segments[i][:2] + struct.pack(">H", (len(body) + 2) & 0xFFFF) + body
        case 2:
            segments[i] = segments[i][:4] + of_bytes(segments[i][4:], rng)
        case 3:
            segments.insert(rng.randrange(len(segments) + 1), segments[i])
        case 4:
            del segments[i]
        case 5:
            j = rng.randrange(len(segments))
            segments[i], segments[j] = segments[j], segments[i]
        case 6:
            segments[i] = bytes([0xFF, rng.randrange(0xC0, 0x100)]) + segments[i][2:]
        case 7:
            marker = bytes([0xFF, rng.choice((0xD0, 0xD7, 0xDD, 0xDC, 0xE1, 0xFE, 0xD9, 0xDA, 0xFF))])
            at = rng.randrange(len(scan) + 1)
            scan = scan[:at] + marker + rng.choice((b"", b"\0\4\0\1", b"\0\6\0\0\0\0")) + scan[at:]
        case _:
            scan = of_bytes(scan, rng)
    return data[:2] + b"".join(segments) + scan


# ---------------------------------------------------------------------------------------------------------------- files


def of_file(kind: str, data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """One to three mutations of a file; some know its format, which is dicom, png or jpeg."""
    knows = {"dicom": of_dicom, "png": of_png, "jpeg": of_jpeg}[kind]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        choice = rng.random()
        try:
            if choice < 0.03:
                data = splice(data, rng, others)
            else:
                data = of_bytes(data, rng) if choice < 0.4 else knows(data, rng)
        except (struct.error, zlib.error, IndexError, ValueError, StopIteration):
            data = of_bytes(data, rng)  # an earlier mutation left nothing of the format
        if len(data) > _MOST:
            data = data[:_MOST]
    return data
