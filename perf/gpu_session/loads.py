"""Loads: files that travel in pieces of a least size, to a machine that takes so much at a time.

A wheel is repacked for one GPU: what its libraries hold for others' kernels is blanked, which xz then leaves out.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

SCHEMA = 1
_FATBIN, _HEADER = 0xBA55ED50, struct.Struct("<IHHQ")  # magic, version, bytes of the header and of what follows
_ENTRY = struct.Struct("<HHIQ")  # kind, version, bytes of the header and of the code; 12 bytes on: compute capability
_CAPABILITY_AT = 28


def keep_capability(library: bytes, capability: int) -> bytes:
    """A shared library with zeros in the place of kernels for other GPUs.

    NVIDIA's driver looks for its own GPU's kernels by the entries' headers, which stay. A group that has none for this
    GPU stays whole.

    Parameters
    ----------
    library : bytes
    capability : int
        90 for compute capability 9.0.
    """
    data, at = bytearray(library), 0
    magic = struct.pack("<I", _FATBIN)
    while (at := data.find(magic, at)) >= 0:
        _, version, header, size = _HEADER.unpack_from(data, at)
        start, end = at + header, at + header + size
        if version != 1 or header != _HEADER.size or end > len(data):
            at += len(magic)
            continue
        entries = []
        while start < end:
            _, _, head, length = _ENTRY.unpack_from(data, start)
            if not head or start + head + length > end:
                break
            entries.append((start + head, length, struct.unpack_from("<I", data, start + _CAPABILITY_AT)[0]))
            start += head + length
        if any(entry[2] == capability for entry in entries):
            for begin, length, found in entries:
                if found != capability:
                    data[begin : begin + length] = bytes(length)
        at = end
    return bytes(data)


def repack(wheel: Path, target: Path, capability: int) -> Path:
    """A wheel's files as TARGET/NAME.tar.xz, for one GPU; unpacked they lie as an installer puts them."""
    path = target / f"{wheel.stem}.tar.xz"
    with (
        zipfile.ZipFile(wheel) as source,
        lzma.open(path, "wb", preset=6) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        for item in source.infolist():
            if item.is_dir():
                continue
            data = source.read(item)
            if ".so" in item.filename.rpartition("/")[2]:
                data = keep_capability(data, capability)
            entry = tarfile.TarInfo(item.filename)
            entry.size, entry.mode = len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))
    return path


def pack(files: Sequence[Path], out: Path, limit: int, capability: int | None = None) -> list[list[dict]]:
    """Split files into folders ``out/load-N`` of at most `limit` bytes; what each holds, piece by piece.

    Parameters
    ----------
    files : sequence of Path
    out : Path
    limit : int
    capability : int, optional
        Repack wheels for this one, see `keep_capability`.
    """
    out.mkdir(parents=True, exist_ok=True)
    if capability:
        files = [repack(path, out, capability) if path.suffix == ".whl" else path for path in files]
    loads = _loads(files, limit)
    for number, pieces in enumerate(loads):
        folder = out / f"load-{number}"
        folder.mkdir(parents=True)
        for piece in pieces:
            with open(piece["source"], "rb") as source:
                source.seek(piece["offset"])
                (folder / piece["piece"]).write_bytes(source.read(piece["bytes"]))
        listed = [{key: value for key, value in piece.items() if key != "source"} for piece in pieces]
        (folder / "pieces.json").write_text(json.dumps(listed, indent=1))
    return loads


def _loads(files: Sequence[Path], limit: int) -> list[list[dict]]:
    loads: list[list[dict]] = [[]]
    room = limit
    for path in files:
        digest, size, offset = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size, 0
        while offset < size:
            if not room:
                loads.append([])
                room = limit
            take = min(room, size - offset)
            loads[-1].append(
                {
                    "file": path.name, "file_bytes": size, "sha256": digest, "offset": offset, "bytes": take,
                    "piece": f"{path.name}.{offset}", "source": str(path),
                }
            )  # fmt: skip
            offset, room = offset + take, room - take
    return loads


def unpack(load: Path, target: Path) -> Iterator[tuple[str, bool]]:
    """Put the pieces of a load where they belong; name of each file, and whether it is whole now.

    A whole file is checked by its SHA-256; a ``.tar.xz`` is unpacked too.
    """
    target.mkdir(parents=True, exist_ok=True)
    for piece in json.loads((load / "pieces.json").read_text()):
        path = target / f"{piece['file']}.partial"
        with open(path, "r+b" if path.exists() else "w+b") as file:
            file.seek(piece["offset"])
            file.write((load / piece["piece"]).read_bytes())
        is_whole = hashlib.sha256(path.read_bytes()).hexdigest() == piece["sha256"]
        if is_whole:
            whole = path.rename(target / piece["file"])
            if whole.name.endswith(".tar.xz"):
                with tarfile.open(whole) as archive:
                    archive.extractall(target, filter="data")
        yield piece["file"], is_whole
