"""Whether the scans of a Huffman-coded JPEG hold what its frame header declares, no bit more and no bit less.

libjpeg makes up what a damaged scan lacks, drops what it has too much, and calls both a warning, which neither
imagecodecs nor Pillow passes on. Here the codes are walked without decoding a sample: each code and run has to exist,
each block's mean has to be possible, and the last code has to end where the next marker stands. Progressive scans are
not walked. Damage that leaves the number of bits right shifts what is predicted from it, which the picture may show.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import NamedTuple

import numpy as np

from cxr_triton.errors import InvalidImage

_CHUNK = 1 << 19  # bytes of DCT blocks that are walked at a time; each takes 8 bytes of every table
_CHUNK_BITS, _RUN_IN_BITS = 2048, 512  # of lossless samples that are walked together
_UNKNOWN = 1 << 12  # codes, more than a chunk's bits hold
_STEPS = 16  # until those that have arrived are left out
_CODE_BYTES = 8  # that a code may reach into
_MOST_BLOCKS = 10  # of an MCU (T.81 B.2.3)
_MCU_BYTES = 4096  # more than 10 blocks of 64 coefficients of 16 + 15 bits
_MOST_PADDING = 128  # bits, all alike, that may follow the last code
_FILL = re.compile(rb"\xff+(?=\xff)")  # before a marker (T.81 B.1.1.2)
_LAST = 64  # coefficients of a block
_END_OF_BLOCK, _NO_CODE = 128, 64  # as runs: from any coefficient they lead to where no other run leads
_HUFFMAN_FRAMES = {0xC0: 8, 0xC1: 8, 0xC3: 1}  # samples along each side of a block


class _Table(NamedTuple):
    """What 16 bits mean that start with a code (T.81 annex C), each (65536,) uint8."""

    advance: np.ndarray  # bits of the code and of the value that follows it; 0 if there is no such code
    run: np.ndarray  # coefficients that an AC code stands for
    length: np.ndarray  # bits of the code


class _Component(NamedTuple):
    identifier: int
    across: int  # blocks of an MCU
    down: int
    quantization: int


class _Block(NamedTuple):
    dc: _Table
    ac: _Table
    component: int  # of the frame
    most: float  # magnitude of a DC coefficient


class _Frame(NamedTuple):
    side: int
    precision: int
    height: int
    width: int
    components: list[_Component]


class Segment(NamedTuple):
    """A marker segment of a JPEG (T.81 B.1.1.4)."""

    marker: int  # second byte
    body: bytes
    end: int  # where the next one starts


def segment_at(codestream: bytes, position: int) -> Segment:
    """The marker segment at a byte, or behind the fill bytes there.

    Raises
    ------
    InvalidImage
        There is none, or it is cut off.
    """
    if fill := _FILL.match(codestream, position):
        position = fill.end()
    head = codestream[position : position + 4]
    if len(head) < 4 or head[0] != 0xFF or not 0xC0 <= head[1] <= 0xFE or 0xD0 <= head[1] <= 0xD9:
        raise InvalidImage(f"JPEG stream has no segment at byte {position} of {len(codestream)}; the file is damaged")
    length = int.from_bytes(head[2:], "big")
    body = codestream[position + 4 : position + 2 + length]
    if length < 2 or len(body) != length - 2:
        raise InvalidImage(
            f"JPEG segment at byte {position} declares {length} bytes, {len(codestream) - position - 2} remain;"
            " send the complete file"
        )
    return Segment(head[1], body, position + 2 + length)


def require_whole_scans(codestream: bytes) -> None:
    """Walk every scan of a JPEG that `cxr_triton.pixels.codestream.inspect_jpeg` accepted (T.81 B.2, F.2.2, H.2).

    Raises
    ------
    InvalidImage
        A code that is in no table, coefficients after the 64th, means that no pixels have, too few or too many data,
        restart markers out of order.
    """
    data = np.frombuffer(codestream, np.uint8)
    tables: dict[int, bytes] = {}
    steps: dict[int, int] = {}
    frame, interval, scanned, position = None, 0, 0, 2
    while frame is None or scanned < len(frame.components):
        marker, body, position = segment_at(codestream, position)
        if marker == 0xC2:
            return
        if marker == 0xC4:
            tables |= _tables(body)
        elif marker == 0xDB:
            steps |= _dc_steps(body)
        elif marker == 0xDD:
            interval = int.from_bytes(body, "big")
        elif marker in _HUFFMAN_FRAMES:
            frame = _frame(marker, body)
        elif marker == 0xDA:
            if frame is None:
                raise InvalidImage("JPEG stream has a scan before its frame header; the file is damaged")
            components, blocks = _plan(body, frame, tables, steps)
            parts, position = _intervals(data, position)
            _walk(parts, frame, components, blocks, interval)
            scanned += len(components)


def _frame(marker: int, body: bytes) -> _Frame:
    components = [_Component(body[i], body[i + 1] >> 4, body[i + 1] & 15, body[i + 2]) for i in range(6, len(body), 3)]
    if not all(part.across and part.down for part in components):
        raise InvalidImage("JPEG component has sampling factor 0; the file is damaged")
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    return _Frame(_HUFFMAN_FRAMES[marker], body[0], height, width, components)


def _tables(body: bytes) -> dict[int, bytes]:
    """Tables of a DHT segment by class and identifier (T.81 B.2.4.2), each as its 16 counts and its values."""
    found, position = {}, 0
    while position + 17 <= len(body):
        end = position + 17 + sum(body[position + 1 : position + 17])
        found[body[position]] = body[position + 1 : end]
        position = end
    return found


def _table(counts_and_values: bytes) -> _Table:
    lengths = np.repeat(np.arange(1, 17), np.frombuffer(counts_and_values, np.uint8, 16))
    values = np.frombuffer(counts_and_values, np.uint8, offset=16)
    windows = 1 << (16 - lengths)
    if len(values) < len(lengths) or windows.sum() > 1 << 16:
        raise InvalidImage("JPEG Huffman table is cut off or has too many codes; the file is damaged")
    following = values & 15  # the lossless difference of category 16 has no bits of its own either
    runs = (values >> 4) + 1
    runs[following == 0] = _NO_CODE
    runs[values == 0xF0] = 16
    runs[values == 0] = _END_OF_BLOCK
    table = _Table(*(np.full(1 << 16, nothing, np.uint8) for nothing in (0, _NO_CODE, 0)))
    table.advance[: windows.sum()] = np.repeat(lengths + following, windows)
    table.run[: windows.sum()] = np.repeat(runs, windows)
    table.length[: windows.sum()] = np.repeat(lengths, windows)
    return table


def _dc_steps(body: bytes) -> dict[int, int]:
    """Quantization step of the DC coefficient by table (T.81 B.2.4.1)."""
    found, position = {}, 0
    while position + 65 <= len(body):
        size = 2 if body[position] >> 4 else 1
        found[body[position] & 15] = int.from_bytes(body[position + 1 : position + 1 + size], "big")
        position += 1 + 64 * size
    return found


def _plan(
    body: bytes, frame: _Frame, tables: dict[int, bytes], steps: dict[int, int]
) -> tuple[list[_Component], list[_Block]]:
    """Components of a scan, and the blocks of its MCU (T.81 B.2.3, A.2.3)."""
    count = body[0] if body else 0
    selected = {body[i]: body[i + 1] for i in range(1, min(1 + 2 * count, len(body) - 1), 2)}
    components = [part for part in frame.components if part.identifier in selected]
    if not components or len(components) != count:
        raise InvalidImage("JPEG scan has components that its frame lacks; the file is damaged")
    blocks: list[_Block] = []
    for number, part in enumerate(components):
        dc, ac = selected[part.identifier] >> 4, 0x10 | selected[part.identifier] & 15
        ac = ac if frame.side > 1 else dc  # a lossless process has no AC tables
        if dc not in tables or ac not in tables:
            raise InvalidImage(f"JPEG scan uses Huffman table {dc} or {ac}, which is not there; the file is damaged")
        # eight times the mean of the block, with the slack of a careless transform
        most = 2 + 1.05 * 8 * 2 ** (frame.precision - 1) / max(1, steps.get(part.quantization, 1))
        blocks += [_Block(_table(tables[dc]), _table(tables[ac]), number, most)] * (
            1 if count == 1 else part.across * part.down
        )
    if len(blocks) > _MOST_BLOCKS:
        raise InvalidImage(f"JPEG scan has units of {len(blocks)} blocks, allowed {_MOST_BLOCKS}; the file is damaged")
    return components, blocks


def _intervals(data: np.ndarray, start: int) -> tuple[list[np.ndarray], int]:
    """Entropy-coded bytes between the restart markers from `start` on, without stuffing, and where the scan ends."""
    at = start + np.flatnonzero(data[start:-1] == 0xFF)
    following = data[at + 1]
    restart = (following & 0xF8) == 0xD0
    ends = at[(following != 0) & (following != 0xFF) & ~restart]
    if not len(ends):
        raise InvalidImage("JPEG scan has no end; the file is damaged")
    end = int(ends[0])
    restart &= at < end
    if (following[restart] & 7 != np.arange(restart.sum()) % 8).any():
        raise InvalidImage("JPEG restart markers are out of order; the file is damaged")
    starts, stops = [start, *(at[restart] + 2).tolist()], [*at[restart].tolist(), end]
    parts = [data[first:stop] for first, stop in zip(starts, stops, strict=True)]
    return [np.delete(part, np.flatnonzero((part[:-1] == 0xFF) & (part[1:] == 0)) + 1) for part in parts], end


def _walk(
    parts: list[np.ndarray], frame: _Frame, components: list[_Component], blocks: list[_Block], interval: int
) -> None:
    """Walk the restart intervals of one scan."""
    remaining = _mcus(frame, components)
    if len(parts) != (-(-remaining // interval) if interval else 1):
        raise InvalidImage(f"JPEG scan has {len(parts)} restart intervals of {interval} units; the file is damaged")
    walk = partial(_walk_blocks, blocks) if frame.side > 1 else partial(_walk_samples, *_steps(blocks[0].dc))
    for part in parts:
        count = min(interval or remaining, remaining)
        walk(part, count)
        remaining -= count


def _require_possible_means(differences: np.ndarray, blocks: list[_Block]) -> None:
    """`differences` of DC coefficients are [MCUs, blocks], each to the one before of its component (T.81 F.1.1.5.1)."""
    for number in {block.component for block in blocks}:
        own = [place for place, block in enumerate(blocks) if block.component == number]
        means = differences[:, own].ravel().cumsum()
        if means.size and np.abs(means).max() > blocks[own[0]].most:
            raise InvalidImage("JPEG has blocks brighter or darker than can be; the file is damaged, send it again")


def _mcus(frame: _Frame, components: list[_Component]) -> int:
    """How many MCUs a scan has (T.81 A.1.1, A.2); those of a lone component are one block each."""
    count = 1
    for size, name in ((frame.height, "down"), (frame.width, "across")):
        most = max(getattr(part, name) for part in frame.components)
        if len(components) == 1:
            count *= math.ceil(math.ceil(size * getattr(components[0], name) / most) / frame.side)
        else:
            count *= math.ceil(size / (frame.side * most))
    return count


def _require_end(part: np.ndarray, position: int) -> None:
    """The last code of a scan or interval ends at bit `position`: what is left has to be padding."""
    if position > 8 * len(part):
        raise InvalidImage("JPEG scan ends before its picture; the file is damaged, send it again")
    rest = np.unpackbits(part[position >> 3 :])[position & 7 :]
    # the last byte is filled with ones (T.81 F.1.2.3), by some writers with zeros; left-over codes are not all alike
    if len(rest) > _MOST_PADDING or (rest.any() and not rest.all()):
        raise InvalidImage(f"JPEG scan has {len(rest)} bits more than its picture; the file is damaged, send it again")


def _windows(data: np.ndarray) -> np.ndarray:
    """The 24 bits from each byte on; (len(data) - 2,) int32."""
    windows = data[:-2].astype(np.int32)
    for following in (data[1:-1], data[2:]):
        windows <<= 8
        windows |= following
    return windows


def _walk_samples(two: np.ndarray, one: np.ndarray, part: np.ndarray, samples: int) -> None:
    """Walk the lossless samples of one component by the `_steps` of its table.

    Huffman codes fall into step soon, wherever one starts to read. So many chunks are walked at once, each from a
    little before its start, and only those that came out of step with the one before are walked again.
    """
    padded = np.append(part, np.full(_CODE_BYTES, 0xFF, np.uint8))
    windows, data = _windows(padded), padded.tobytes()
    starts = np.arange(0, 8 * len(part), _CHUNK_BITS, dtype=np.int32)
    goals = np.append(starts[1:], np.int32(8 * len(part)))
    entries, _ = _walk_together(windows, two, one, np.maximum(starts - _RUN_IN_BITS, 0), starts)
    exits, counts = _walk_together(windows, two, one, entries, goals)
    position, left = 0, samples
    chunks = zip(*(array.tolist() for array in (entries, exits, counts, goals)), strict=True)
    for entry, exit_, count, goal in chunks:
        if position == entry and count < min(left, _UNKNOWN):
            position, left = exit_, left - count
        else:
            position, walked = _walk_alone(data, one.data, position, goal, left)
            left -= walked
        if not left:
            break
    if left:
        raise InvalidImage(f"JPEG scan ends {left} samples early; the file is damaged, send it again")
    _require_end(part, position)


def _steps(table: _Table) -> tuple[np.ndarray, np.ndarray]:
    """How far 16 bits lead, as bits + 256 * codes, (65536,) int32 each: by two codes where they hold both, and by one.

    The code that is in no table leads on by a bit, and counts as `_UNKNOWN` codes.
    """
    advance, length = table.advance.astype(np.int32), table.length
    one = np.where(advance > 0, advance + 256, 1 + 256 * _UNKNOWN)
    following = np.arange(1 << 16, dtype=np.int32) << advance & 0xFFFF
    both = (advance > 0) & (length[following] > 0) & (advance + length[following] <= 16)
    return np.where(both, one + one[following], one), one


def _walk_together(
    windows: np.ndarray, two: np.ndarray, one: np.ndarray, positions: np.ndarray, goals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Walk codes from each of `positions` to the first that starts at its goal or later.

    Returns where that is, and how many codes there were, `_UNKNOWN` or more if one is in no table; int32.
    """
    positions, counts = positions.copy(), np.zeros(len(goals), np.int32)
    for steps, ends in ((two, goals - 16), (one, goals)):
        walking = np.flatnonzero(positions < ends)
        while len(walking):
            at, end, count = positions[walking], ends[walking], np.zeros(len(walking), np.int32)
            for _ in range(_STEPS):
                step = steps[windows[at >> 3] >> (8 - (at & 7)) & 0xFFFF] * (at < end)
                at += step & 0xFF
                count += step >> 8
            positions[walking] = at
            counts[walking] += count
            walking = walking[at < end]
    return positions, counts


def _walk_alone(data: bytes, one: memoryview, position: int, goal: int, most: int) -> tuple[int, int]:
    """Walk up to `most` codes that start before `goal`; where the last ends, and how many there were."""
    for count in range(most):
        if position >= goal:
            return position, count
        byte = position >> 3
        window = data[byte] << 16 | data[byte + 1] << 8 | data[byte + 2]
        step = one[window >> (8 - (position & 7)) & 0xFFFF]
        if step >> 8 >= _UNKNOWN:
            raise InvalidImage("JPEG scan has a code that is in no table; the file is damaged, send it again")
        position += step & 0xFF
    return position, most


def _walk_blocks(blocks: list[_Block], part: np.ndarray, mcus: int) -> None:
    """Walk MCUs of DCT blocks, and check what their DC coefficients say."""
    padded = np.append(part, np.full(_MCU_BYTES, 0xFF, np.uint8))
    start = position = 0  # byte of the chunk, bit in it
    differences = [np.zeros((0, len(blocks)), np.int64)]
    while mcus and start < len(part):
        windows = _windows(padded[start : start + _CHUNK + _MCU_BYTES])
        done, position, found = _coefficients(windows, blocks, mcus, position)
        differences.append(found)
        mcus -= done
        start, position = start + (position >> 3), position & 7
    if mcus:
        raise InvalidImage(f"JPEG scan ends {mcus} units early; the file is damaged, send it again")
    _require_end(part, 8 * start + position)
    _require_possible_means(np.concatenate(differences), blocks)


def _at_each_bit(windows: np.ndarray, table: np.ndarray) -> bytes:
    """`table` at the 16 bits from each bit of the chunk on."""
    found = np.empty((len(windows), 8), np.uint8)
    for bit in range(8):
        found[:, bit] = table[(windows >> (8 - bit)).astype(np.uint16)]
    return found.tobytes()


def _coefficients(windows: np.ndarray, blocks: list[_Block], most: int, position: int) -> tuple[int, int, np.ndarray]:
    """Walk up to `most` MCUs of DCT blocks from bit `position` on: how many, where the last ends, DC differences."""
    # one array for each table, although several blocks use it
    wanted = {id(part): part for block in blocks for part in (block.dc.advance, block.ac.advance, block.ac.run)}
    found = {key: _at_each_bit(windows, part) for key, part in wanted.items()}
    plan = [(found[id(block.dc.advance)], found[id(block.ac.advance)], found[id(block.ac.run)]) for block in blocks]
    end, done = min(8 * _CHUNK, 8 * (len(windows) + 2 - _MCU_BYTES)), most
    starts: list[int] = []
    for number in range(most):
        if position >= end:
            done = number
            break
        for dc, ac, run in plan:
            starts.append(position)
            position += dc[position]
            coefficient = 1
            while coefficient < _LAST:
                coefficient += run[position]
                position += ac[position]
            if _LAST < coefficient < _END_OF_BLOCK:
                raise InvalidImage("JPEG scan has a code or run that cannot be; the file is damaged, send it again")
    at = np.array(starts, np.int64).reshape(done, len(blocks))
    return done, position, np.stack([_values(windows, block.dc, at[:, i]) for i, block in enumerate(blocks)], axis=1)


def _values(windows: np.ndarray, table: _Table, at: np.ndarray) -> np.ndarray:
    """The differences whose codes start at the bits `at` (T.81 F.2.2.1)."""
    byte, bit = at >> 3, at & 7
    bits = windows[byte].astype(np.int64) << 16 | windows[byte + 2] & 0xFFFF  # 40 from `byte` on
    code = bits >> (24 - bit) & 0xFFFF
    length = table.length[code].astype(np.int64)
    category = table.advance[code] - length
    value = bits >> (40 - bit - length - category) & (1 << category) - 1
    return np.where(value << 1 >> category, value, value - (1 << category) + 1)
