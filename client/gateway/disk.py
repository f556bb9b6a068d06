"""The gateway's files: nobody else's to read, whatever the umask, and on the disk for good."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

OTHERS = 0o007


def keep_private(storage: Path, *, group: bool) -> list[str]:
    """Have all files that this process makes from now on be of its own user, and of its group where `group` says so.

    Files become 0600 and folders 0700, or 0660 and 2770. The storage folder and the files right in it are changed, so
    that nobody reaches what an earlier release left readable.

    Returns
    -------
    list of str
        Names of what could not be changed, since it is another user's.
    """
    os.umask(OTHERS if group else 0o077)
    storage.mkdir(parents=True, exist_ok=True)
    kept = []
    for path in (storage, *storage.iterdir()):
        if path.is_symlink() or (path != storage and not path.is_file()):
            continue
        mode = (0o2770 if path == storage else 0o660) if group else (0o700 if path == storage else 0o600)
        try:
            path.chmod(mode)
        except OSError:
            kept.append("storage" if path == storage else path.name)
    return kept


def is_open(path: str | Path) -> bool:
    """Whether every user of this machine may read or write a file."""
    with contextlib.suppress(OSError):
        return bool(os.stat(path).st_mode & OTHERS)
    return False


def new_file(path: Path, content: bytes) -> None:
    """Make a file that only its user may read, whole and durable, or leave the one that is there.

    Raises
    ------
    OSError
        Also where the file system knows no hard links, by which of two that come at once one is first.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Make the names in a folder outlast a loss of power."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
