"""The safetensors format without its library: headers that are true to their files, and the head of a new file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cxr_triton.errors import UnsupportedCheckpoint

_MAX_AXES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_ITEM_BITS = {
    kind: bits
    for bits, kinds in {
        4: "F4",
        6: "F6_E2M3 F6_E3M2",
        8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0",
        16: "U16 I16 F16 BF16",
        32: "U32 I32 F32",
        64: "U64 I64 F64 C64",
    }.items()
    for kind in kinds.split()
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, its type as the format names it, its shape, and its bytes in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors of one safetensors file, after checking that the header is true to the file.

    Raises
    ------
    UnsupportedCheckpoint
        The header is longer than the file, not JSON, or its tensors overlap, leave holes, or pass the end.
    """
    try:
        header, start = _header(path)
        entries = {name: _entry(path, name, item, start) for name, item in header.items() if name != "__metadata__"}
        _require_no_holes(entries, start, path.stat().st_size)
    except FileNotFoundError:
        raise UnsupportedCheckpoint(f"{path} does not exist; the checkpoint is incomplete: download it again") from None
    except _Damaged as error:
        raise UnsupportedCheckpoint(f"{path} is not a sound safetensors file: {error}; download it again") from None
    return entries


def header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """Head of a file whose tensors follow in this order: length and JSON, padded to 8 bytes.

    Parameters
    ----------
    tensors : mapping
        Name to type as the format names it, shape and bytes.
    """
    told: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape, nbytes) in tensors.items():
        begin, end = end, end + nbytes
        told[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(told, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


class _Damaged(Exception):
    """What is wrong with a file."""


def _header(path: Path) -> tuple[dict, int]:
    """The JSON of a file's header, and where its tensors begin."""
    try:
        room = path.stat().st_size - 8
        with open(path, "rb") as file:
            prefix = file.read(8)
            length, allowed = int.from_bytes(prefix, "little"), max(0, min(room, MAX_HEADER_BYTES))
            if len(prefix) < 8 or length > allowed:
                raise _Damaged(f"header length {length} bytes, at most {allowed} possible")
            found = json.loads(file.read(length))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise _Damaged(f"header unreadable ({error})") from None
    if not isinstance(found, dict):
        raise _Damaged("header is not an object")
    return found, 8 + length


def _entry(path: Path, name: str, item: dict, start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _Damaged(f"entry of {name!r} lacks dtype, shape or data_offsets") from None
    numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
    if (
        len(numbers) > 2 + _MAX_AXES
        or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)
        or str(dtype) not in _ITEM_BITS
    ):
        raise _Damaged(
            f"entry of {name!r:.80} has dtype {dtype!r:.20}, shape {shape!r:.80}, data_offsets {[begin, end]!r:.80}"
        )
    if math.prod(shape) * _ITEM_BITS[dtype] != 8 * (end - begin):
        raise _Damaged(f"{name!r} of {dtype} {shape} is given {end - begin} bytes")
    return Entry(path, dtype, tuple(shape), start + begin, end - begin)


def _require_no_holes(entries: Mapping[str, Entry], position: int, size: int) -> None:
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            raise _Damaged(f"{name!r} starts at byte {entry.offset}, its predecessor ends at {position}")
        position += entry.nbytes
    if position != size:
        raise _Damaged(f"its tensors end at byte {position}, the file at {size}")
