"""SHA-256 of files, taken as they are read or copied."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

Progress = Callable[[str, int], object]
"""Called with a file's name and the bytes just hashed or copied."""
_READ_BYTES = 1 << 22


def sha256(path: Path, progress: Progress | None = None) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    for block in _blocks(path, progress):
        digest.update(block)
    return digest.hexdigest()


def copy(source: Path, target: Path, progress: Progress | None = None) -> str:
    """Copy a file; the hex digest of what was copied."""
    digest = hashlib.sha256()
    with open(target, "wb") as file:
        for block in _blocks(source, progress):
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path, progress: Progress | None) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            yield block
            if progress:
                progress(path.name, len(block))
