"""Compressed pixel data: what a codestream says about itself, read before any decoder allocates, and its decoding.

Takes one frame's joined fragments. A header that a decoder would read differently (two frame headers, subsampling,
a missing end marker) is refused here, because libjpeg-turbo and OpenJPH return a picture for truncated input. Nor is
what they return for damaged input believed: a scan has to end where its picture does, a code-block where its bytes do.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cxr_triton.errors import HeaderMismatch, InvalidImage, LimitExceeded, UnsupportedSyntax
from cxr_triton.pixels.jpeg_scan import require_whole_scans, segment_at
from cxr_triton.pixels.step import has_step


@dataclass(frozen=True)
class TransferSyntax:
    """How a data set and its pixel data are encoded (PS3.5 section 10 and annex A).

    Attributes
    ----------
    name : str
    kinds : frozenset of str
        Codestreams that may stand in the pixel data; empty for native pixels.
    explicit, little : bool
        Explicit VR; little endian.
    deflated : bool
        The data set is a raw deflate stream.
    lossy : bool or None
        None where only the header or the codestream tells.
    """

    name: str
    kinds: frozenset[str] = frozenset()
    explicit: bool = True
    little: bool = True
    deflated: bool = False
    lossy: bool | None = False


_J2K, _HTJ2K, _JPEG_LS = frozenset({"jpeg2000"}), frozenset({"htj2k"}), frozenset({"jpeg_ls"})
_DCT, _LOSSLESS = frozenset({"baseline", "extended"}), frozenset({"lossless"})

TRANSFER_SYNTAXES: dict[str, TransferSyntax] = {
    "1.2.840.10008.1.2": TransferSyntax("Implicit VR Little Endian", explicit=False),
    "1.2.840.10008.1.2.1": TransferSyntax("Explicit VR Little Endian"),
    "1.2.840.10008.1.2.1.99": TransferSyntax("Deflated Explicit VR Little Endian", deflated=True),
    "1.2.840.10008.1.2.2": TransferSyntax("Explicit VR Big Endian", little=False),
    "1.2.840.10008.1.2.4.50": TransferSyntax("JPEG Baseline", _DCT, lossy=True),
    "1.2.840.10008.1.2.4.51": TransferSyntax("JPEG Extended", _DCT, lossy=True),
    "1.2.840.10008.1.2.4.57": TransferSyntax("JPEG Lossless", _LOSSLESS),
    "1.2.840.10008.1.2.4.70": TransferSyntax("JPEG Lossless SV1", _LOSSLESS),
    "1.2.840.10008.1.2.4.80": TransferSyntax("JPEG-LS Lossless", _JPEG_LS),
    "1.2.840.10008.1.2.4.81": TransferSyntax("JPEG-LS Near-lossless", _JPEG_LS, lossy=None),
    "1.2.840.10008.1.2.4.90": TransferSyntax("JPEG 2000 Lossless", _J2K),
    "1.2.840.10008.1.2.4.91": TransferSyntax("JPEG 2000", _J2K, lossy=None),
    "1.2.840.10008.1.2.4.201": TransferSyntax("HTJ2K Lossless", _HTJ2K),
    "1.2.840.10008.1.2.4.202": TransferSyntax("HTJ2K Lossless RPCL", _HTJ2K),
    "1.2.840.10008.1.2.4.203": TransferSyntax("HTJ2K", _HTJ2K, lossy=None),
    "1.2.840.10008.1.2.5": TransferSyntax("RLE Lossless", frozenset({"rle"})),
}


@dataclass(frozen=True)
class Codestream:
    """What a codestream's own header declares.

    Attributes
    ----------
    kind : str
        baseline, extended, progressive, lossless, jpeg_ls, jpeg2000, htj2k or rle.
    width, height, components : int
        0 for RLE, which does not say its width and height.
    precision : int
        Bits of a sample.
    signed : bool
    lossy : bool or None
        None where the header cannot tell.
    """

    kind: str
    width: int
    height: int
    components: int
    precision: int
    signed: bool = False
    lossy: bool | None = None


def inspect(syntax: str, codestream: bytes) -> Codestream:
    """Read the header of `codestream` and check that it is whole and of a kind that `syntax` allows.

    Parameters
    ----------
    syntax : str
        Transfer syntax UID.
    codestream : bytes
        Joined fragments of one frame.

    Raises
    ------
    UnsupportedSyntax
        Unknown transfer syntax, or a codestream process that no radiograph syntax has (arithmetic, hierarchical).
    HeaderMismatch
        The codestream is of another kind than the transfer syntax says.
    InvalidImage
        Malformed or truncated.
    """
    allowed = TRANSFER_SYNTAXES[syntax].kinds if syntax in TRANSFER_SYNTAXES else frozenset()
    if not allowed:
        raise UnsupportedSyntax(f"transfer syntax {syntax} has no codestream; allowed: {', '.join(compressed())}")
    if "rle" in allowed:
        return _inspect_rle(codestream)
    if codestream[:3] == b"\xff\xd8\xff":
        header = inspect_jpeg(codestream)
        if not _stripped(codestream, b"\0\xff").endswith(b"\xff\xd9"):
            raise InvalidImage("codestream has no end-of-image marker: it is truncated; send the complete file")
    else:
        header = _inspect_jpeg2000(codestream)
    if header.kind not in allowed:
        raise HeaderMismatch(
            f"pixel data hold a {header.kind} codestream, transfer syntax {syntax} allows"
            f" {' or '.join(sorted(allowed))}; correct the transfer syntax"
        )
    return header


def compressed() -> list[str]:
    """UIDs of the transfer syntaxes with compressed pixel data."""
    return [uid for uid, syntax in TRANSFER_SYNTAXES.items() if syntax.kinds]


# SOF markers of ITU-T T.81 table B.1 and T.87; arithmetic and hierarchical processes are not used in DICOM
_SOF_KINDS = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive", 0xC3: "lossless", 0xF7: "jpeg_ls"}
_SOF_OTHER = {0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_MAX_SEGMENTS = 4096


def _stripped(codestream: bytes, padding: bytes) -> bytes:
    """The end of a codestream without its padding; two bytes or more, or all there is."""
    end = bytes(codestream[-64:]).rstrip(padding)
    return end if len(end) > 1 else bytes(codestream).rstrip(padding)


def inspect_jpeg(codestream: bytes) -> Codestream:
    """Read the one frame header and the first scan header of a JPEG or JPEG-LS stream (T.81 B.2, T.87 C.2)."""
    frame, position = None, 2
    for _ in range(_MAX_SEGMENTS):
        marker, body, position = segment_at(codestream, position)
        if marker in _SOF_OTHER:
            raise UnsupportedSyntax(
                f"JPEG process SOF{marker - 0xC0} is not supported; send a baseline or lossless JPEG"
            )
        if marker in _SOF_KINDS:
            if frame is not None:
                raise InvalidImage("JPEG stream has two frame headers; send one picture per file")
            frame = _jpeg_frame(marker, body)
        if marker == 0xDA:
            if frame is None:
                raise InvalidImage("JPEG stream has a scan before its frame header; the file is damaged")
            if frame.kind == "jpeg_ls":
                near = body[1 + 2 * body[0]] if body and len(body) > 1 + 2 * body[0] else 0
                return replace(frame, lossy=near > 0)
            return frame
    raise InvalidImage(f"JPEG stream has more than {_MAX_SEGMENTS} segments before its first scan; the file is damaged")


def _jpeg_frame(marker: int, body: bytes) -> Codestream:
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise InvalidImage(f"JPEG frame header has {len(body)} bytes; the file is damaged")
    frame = Codestream(
        kind=_SOF_KINDS[marker],
        precision=body[0],
        height=int.from_bytes(body[1:3], "big"),
        width=int.from_bytes(body[3:5], "big"),
        components=body[5],
        lossy=marker not in (0xC3, 0xF7),
    )
    if not (frame.height and frame.width and frame.components):
        raise InvalidImage(
            f"JPEG frame header declares {frame.height}x{frame.width}x{frame.components};"
            " sizes given later in the stream are not supported"
        )
    return frame


_JP2_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"


def unwrap_jp2(codestream: bytes) -> bytes:
    """Contiguous codestream of a JP2 file (T.800 annex I), which some writers store where DICOM wants the bare one."""
    if codestream[: len(_JP2_SIGNATURE)] != _JP2_SIGNATURE:
        return codestream
    position = 0
    for _ in range(_MAX_SEGMENTS):
        length = int.from_bytes(codestream[position : position + 4], "big")
        kind, body = codestream[position + 4 : position + 8], position + 8
        if length == 1:
            length = int.from_bytes(codestream[position + 8 : position + 16], "big")
            body = position + 16
        end = position + length if length else len(codestream)
        if end < body or end > len(codestream):
            break
        if kind == b"jp2c":
            return codestream[body:end]
        position = end
    raise InvalidImage("JP2 wrapper holds no codestream; the file is damaged")


def _number(data: bytes, at: int, size: int) -> int:
    if at + size > len(data):
        raise InvalidImage(f"JPEG 2000 stream ends at byte {len(data)} inside a header; send the complete file")
    return int.from_bytes(data[at : at + size], "big")


_CAP, _COD, _SOT = 0xFF50, 0xFF52, 0xFF90


def _main_header(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and position of each segment (T.800 A.3), the start of the first tile-part last."""
    position = 2
    for _ in range(_MAX_SEGMENTS):
        marker = _number(data, position, 2)
        yield marker, position
        if marker == _SOT:
            return
        position += 2 + _number(data, position + 2, 2)
    raise InvalidImage(f"JPEG 2000 main header has more than {_MAX_SEGMENTS} segments; the file is damaged")


def _inspect_jpeg2000(codestream: bytes) -> Codestream:
    """Read SIZ, CAP and COD (T.800 A.5.1, A.6.1; T.814 A.3) and walk the tile-parts to the end marker."""
    data = unwrap_jp2(codestream)
    if data[:4] != b"\xff\x4f\xff\x51":
        raise InvalidImage(
            f"pixel data starts with {data[:4].hex() or 'nothing'}, no known codestream; the file is damaged"
        )
    right, bottom, left, top, tile_width, tile_height = (_number(data, at, 4) for at in range(8, 32, 4))
    width, height, components = right - left, bottom - top, _number(data, 40, 2)
    if width <= 0 or height <= 0 or not components or not tile_width or not tile_height:
        raise InvalidImage(f"JPEG 2000 header declares {height}x{width}x{components}; the file is damaged")
    if (
        len({bytes(data[at : at + 3]) for at in range(42, 42 + 3 * components, 3)}) != 1
        or _number(data, 43, 2) != 0x0101
    ):
        raise InvalidImage("JPEG 2000 components differ in depth or are subsampled; send one full-size component")
    tiles = -(-right // tile_width) * -(-bottom // tile_height)
    if tiles > 65535:
        raise InvalidImage(f"JPEG 2000 header declares {tiles} tiles, allowed 65535; the file is damaged")
    segments = dict(_main_header(data))
    _walk_tile_parts(data, segments[_SOT], tiles)
    part_15 = _CAP in segments and _number(data, segments[_CAP] + 4, 4) & 1 << 17  # of Pcap
    reversible = _COD in segments and _number(data, segments[_COD] + 13, 1) == 1
    depth = data[42]
    return Codestream(
        kind="htj2k" if part_15 else "jpeg2000",
        width=width,
        height=height,
        components=components,
        precision=(depth & 0x7F) + 1,
        signed=bool(depth & 0x80),
        lossy=None if reversible else True,
    )


def _walk_tile_parts(data: bytes, position: int, tiles: int) -> None:
    """Follow the tile-part lengths (T.800 A.4.2): every tile has to come, and the last one has to be whole."""
    seen = set()
    while data[position : position + 2] == b"\xff\x90":
        seen.add(bytes(data[position + 4 : position + 6]))
        length = int.from_bytes(data[position + 6 : position + 10], "big")
        if length == 0:
            if not _stripped(data, b"\0").endswith(b"\xff\xd9"):
                raise InvalidImage("JPEG 2000 stream has no end marker: it is truncated; send the complete file")
            break
        if length < 14 or position + length > len(data):
            raise InvalidImage(
                f"JPEG 2000 tile-part at byte {position} declares {length} bytes, {len(data) - position} remain;"
                " send the complete file"
            )
        position += length
    # the end marker may be missing: the lengths and the tile count prove that nothing else is
    if len(seen) != tiles:
        raise InvalidImage(f"JPEG 2000 stream has {len(seen)} of {tiles} tiles; send the complete file")


def _inspect_rle(codestream: bytes) -> Codestream:
    """Read the segment table (PS3.5 G.5); one segment per byte of a grayscale sample."""
    table = np.frombuffer(codestream[:64], "<u4")
    segments = int(table[0]) if table.size == 16 else 0
    offsets = [int(offset) for offset in table[1 : 1 + segments]]
    if (
        segments not in (1, 2, 3, 6)
        or offsets[0] != 64
        or sorted(set(offsets)) != offsets
        or offsets[-1] >= len(codestream)
    ):
        raise InvalidImage(
            f"RLE header declares {segments} segments at {offsets[:6]} in {len(codestream)} bytes; it is damaged"
        )
    return Codestream(
        "rle", 0, 0, components=3 if segments % 3 == 0 else 1, precision=8 if segments in (1, 3) else 16, lossy=False
    )


@contextlib.contextmanager
def decoding(what: str, pixels: str) -> Iterator[None]:
    """What a codec raises, as `InvalidImage` of `what`, or `LimitExceeded` of `pixels`."""
    try:
        yield
    except InvalidImage:
        raise
    except MemoryError as error:
        raise LimitExceeded(f"decoding {pixels} needs more memory than allowed") from error
    except Exception as error:
        raise InvalidImage(f"{what} does not decode ({str(error)[:120]}); the file is damaged") from error


def decode(
    header: Codestream,
    codestream: bytes,
    shape: tuple[int, int],
    dtype: np.dtype,
    flags: set[str] | None = None,
) -> np.ndarray:
    """Decode a one-component codestream that `inspect` accepted, and check that it was whole.

    Parameters
    ----------
    header : Codestream
        With ``lossy`` False the picture has to be the one that was encoded, so that a warning is an error.
    codestream : bytes
    shape : (int, int)
        Rows and columns that the result has to have.
    dtype : dtype
        uint8 or uint16; RLE segments are joined to it, the other codecs give their own.
    flags : set of str, optional
        Gets `damage_suspected` where the stream is suspicious.

    Returns
    -------
    ndarray (rows, cols)
        8- or 16-bit integers, signed if the codestream says so.

    Raises
    ------
    InvalidImage
        The codec refuses the stream, or what it gave cannot be what was encoded.
    HeaderMismatch
        The decoded size is another one.
    """
    rows, columns = shape
    with decoding(f"{header.kind} codestream", f"{rows}x{columns} {header.kind} pixels"):
        values, doubt = _DECODERS.get(header.kind, _decode_jpeg)(codestream, header, shape, dtype)
    if values.shape != shape:
        raise HeaderMismatch(f"codestream decodes to {values.shape}, the header declares {shape}; correct the header")
    if doubt and flags is not None:
        flags.add("damage_suspected")
    return values


class _Unraised:
    """Exceptions of this thread that C code could not raise."""

    _decoding = threading.Lock()

    def __enter__(self) -> list[str]:
        self._decoding.acquire()
        self._before, swallowed, thread = sys.unraisablehook, [], threading.get_ident()

        def hook(unraised: sys.UnraisableHookArgs) -> None:
            if threading.get_ident() == thread:
                swallowed.append(str(unraised.exc_value)[:120])
            else:
                self._before(unraised)

        sys.unraisablehook = hook
        return swallowed

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._before
        self._decoding.release()


class _Messages(logging.Filter):
    """What OpenJPEG has to say, which imagecodecs logs; nothing of it goes on to a handler."""

    _decoding = threading.Lock()  # OpenJPEG speaks from threads of its own
    _log = logging.getLogger("imagecodecs")

    def __enter__(self) -> list[str]:
        self.heard: list[str] = []
        self._decoding.acquire()
        self._log.addFilter(self)
        return self.heard

    def __exit__(self, *_: object) -> None:
        self._log.removeFilter(self)
        self._decoding.release()

    def filter(self, record: logging.LogRecord) -> bool:
        self.heard.append(record.getMessage())
        return False


_PREDICTABLE_TERMINATION = 0x10  # T.800 table A.19
_TORN = re.compile("remaining bytes|segment too long")  # of OpenJPEG's warnings those that no whole stream gives
_MOST_MADE_UP = 8  # bytes: encoders of the conformance streams leave off up to 8 that the decoder makes up rightly
_ZEROED = bytes(48)  # magnitudes of HTJ2K are stored as they are, but not so many zeros in a row

# each decoder gives the values, and whether something speaks against them


def _decode_jpeg(codestream: bytes, header: Codestream, shape: tuple[int, int], _: np.dtype) -> tuple[np.ndarray, bool]:
    import imagecodecs

    require_whole_scans(codestream)
    values = imagecodecs.jpeg8_decode(codestream)
    if header.kind == "lossless" and values.max() >> header.precision:
        raise InvalidImage(
            f"JPEG decodes to {values.max()}, its samples have {header.precision} bits; the file is damaged"
        )
    return values, values.shape == shape and has_step(values)


def _decode_jpeg_ls(codestream: bytes, *_: object) -> tuple[np.ndarray, bool]:
    import imagecodecs

    return imagecodecs.jpegls_decode(codestream), False


def _decode_rle(codestream: bytes, _: Codestream, shape: tuple[int, int], dtype: np.dtype) -> tuple[np.ndarray, bool]:
    import imagecodecs

    little = dtype.newbyteorder("<")
    # a fixed output buffer: the decoder refuses data that would give more
    out = bytearray(shape[0] * shape[1] * dtype.itemsize)
    decoded = imagecodecs.dicomrle_decode(codestream, dtype=little.str, out=out)
    if len(decoded) != len(out):
        raise HeaderMismatch(
            f"RLE data decode to {len(decoded)} bytes, {shape[0]}x{shape[1]} pixels need {len(out)}; correct it"
        )
    return np.frombuffer(decoded, little).reshape(shape), False


def _decode_jpeg2000(codestream: bytes, header: Codestream, *_: object) -> tuple[np.ndarray, bool]:
    """OpenJPEG decodes a torn code-block without a word.

    But where a stream announces predictable termination it warns if the arithmetic decoder does not end where the
    code-block does, and the announcement changes nothing else. Other streams end there too, so it is added to all.
    """
    import imagecodecs

    data = unwrap_jp2(codestream)
    coding_style = next((position for marker, position in _main_header(data) if marker == _COD), None)
    if coding_style is None:
        raise InvalidImage("JPEG 2000 stream has no coding style; the file is damaged")
    announced = bytearray(data)
    announced[coding_style + 12] |= _PREDICTABLE_TERMINATION
    with _Messages() as warnings:
        values = imagecodecs.jpeg2k_decode(announced, numthreads=2, verbose=2)
    for warning in warnings:
        made_up = re.search(r"(\d+) synthesized", warning)
        if _TORN.search(warning) or (made_up and int(made_up[1]) > _MOST_MADE_UP):
            if header.lossy is False:
                raise InvalidImage(f"{header.kind} codestream is damaged: {warning}; send the file again")
            return values, True
    return values, False


def _decode_htj2k(codestream: bytes, header: Codestream, *_: object) -> tuple[np.ndarray, bool]:
    """OpenJPH raises in a function of imagecodecs that cannot, and the rows from there on are black.

    What Python then hands to `sys.unraisablehook` is an error here. Magnitudes have no check at all: what they lead to
    beyond the range of samples wraps in OpenJPH and is clamped by OpenJPEG, so a reversible stream is given to both.
    """
    import imagecodecs

    stream = unwrap_jp2(codestream)
    with _Unraised() as swallowed:
        values = imagecodecs.htj2k_decode(stream)
    if swallowed:
        raise InvalidImage(f"HTJ2K code-block does not decode ({swallowed[0]}); the file is damaged, send it again")
    doubt = _ZEROED in codestream
    if not header.lossy:
        again = _by_openjpeg(stream)
        is_same = again is not None and np.array_equal(again, values)
        if header.lossy is False and again is not None and not is_same:
            raise InvalidImage("HTJ2K decodes to samples that cannot be; the file is damaged, send it again")
        doubt |= not is_same
    return values, doubt


def _by_openjpeg(stream: bytes) -> np.ndarray | None:
    """Its reading, None where it refuses the stream: it does not know all of HTJ2K."""
    import imagecodecs

    with _Messages(), contextlib.suppress(imagecodecs.Jpeg2kError):
        return imagecodecs.jpeg2k_decode(stream, numthreads=2, verbose=2)
    return None


_DECODERS: dict[str, Callable[[bytes, Codestream, tuple[int, int], np.dtype], tuple[np.ndarray, bool]]] = {
    "rle": _decode_rle,
    "jpeg_ls": _decode_jpeg_ls,
    "jpeg2000": _decode_jpeg2000,
    "htj2k": _decode_htj2k,
}
