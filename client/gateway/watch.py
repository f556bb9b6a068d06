"""A watched folder as a way in."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sqlalchemy.exc

from cxr_triton.client.gateway.doors import Folder
from cxr_triton.client.gateway.intake import MIB, Intake
from cxr_triton.errors import InvalidImage, LimitExceeded, QueueFull

DEEPEST = 16
"""Folders in folders that are looked into."""
REJECTED = "rejected"


LOOK_S, KEPT_S = 1.0, 30.0
"""How long a page waits for a count of rejected files, and how long that count is told."""


def rejected_files(config: Folder) -> int | None:
    """How many files of a watched folder were refused and are still there; None where that cannot be told.

    Any failure gives None: this user may not look, or it is a link or no folder. A folder that is not there has none.
    """
    try:
        handle = _open_folder(Path(config.path) / REJECTED)
    except FileNotFoundError:
        return 0
    except OSError:
        return None
    try:
        with os.scandir(handle) as found:
            return sum(entry.is_file(follow_symlinks=False) for entry in found)
    except OSError:
        return None
    finally:
        os.close(handle)


class RejectedFiles:
    """`rejected_files` for whoever asks: one look at a time, told for half a minute; from any thread.

    The look has a thread of its own, which keeps no process from ending, so that a file system that hangs holds up
    nobody for longer than `LOOK_S`.
    """

    def __init__(self, config: Folder):
        self._config = config
        self._turn = threading.Lock()
        self._began_at = self._ended_at = 0.0
        self._look: concurrent.futures.Future[int | None] | None = None

    def count(self) -> int | None:
        """How many they are; None where that cannot be told, or not soon."""
        with self._turn:
            if self._look is None or (self._look.done() and time.monotonic() - self._ended_at >= KEPT_S):
                self._look, self._began_at = concurrent.futures.Future(), time.monotonic()
                threading.Thread(target=self._count, args=(self._look,), daemon=True).start()
            look, left_s = self._look, self._began_at + LOOK_S - time.monotonic()
        try:
            return look.result(max(0.0, left_s))
        except TimeoutError:
            return None

    def _count(self, look: concurrent.futures.Future[int | None]) -> None:
        count = rejected_files(self._config)
        self._ended_at = time.monotonic()
        look.set_result(count)


class Facts(NamedTuple):
    """What tells that a file is the one that was seen before, and grows no more."""

    inode: int
    size: int
    changed_ns: int


class FolderWatcher:
    """Takes files that no longer grow, of a folder and those in it; refused ones move to ``rejected/``.

    `scan` is called again and again; a file is taken when two scans in a row saw it with the same size and time. No
    symbolic link is followed, whoever puts one in place of a file or folder and whenever: every step is made relative
    to an open folder. What cannot be read or removed stays, is said once, and keeps nothing else from being taken.
    """

    def __init__(self, config: Folder, intake: Intake):
        self._intake = intake
        Path(config.path).mkdir(parents=True, exist_ok=True)
        self.folder = Path(config.path).resolve()
        self._seen: dict[str, Facts] = {}
        self._stuck: dict[str, Facts] = {}
        self._told: set[str] = set()

    def scan(self) -> int:
        """How many files were taken."""
        now: dict[str, Facts] = {}
        taken = 0
        for name, folder, path in self._files():
            try:
                found = _facts(os.stat(name, dir_fd=folder, follow_symlinks=False))
            except OSError:
                continue  # gone, or no file
            if found is None:
                continue
            now[path] = found
            if self._seen.get(path) == found and self._stuck.get(path) != found:
                taken += self._settle(name, folder, path, found)
        self._seen = now
        self._stuck = {path: facts for path, facts in self._stuck.items() if path in now}
        return taken

    def sweep(self, before: float) -> int:
        """Remove what was rejected before a time; how many files."""
        removed = 0
        with contextlib.suppress(OSError), self._open_rejected() as rejected:
            for entry in list(os.scandir(rejected)):
                with contextlib.suppress(OSError):
                    # When it was moved here; its own time is from whoever wrote it.
                    if os.stat(entry.name, dir_fd=rejected, follow_symlinks=False).st_ctime < before:
                        os.unlink(entry.name, dir_fd=rejected)
                        removed += 1
        return removed

    def _files(self) -> Iterator[tuple[str, int, str]]:
        """Name, open folder and path of each file; hidden ones are none yet."""
        for path, folders, files, handle in os.fwalk(self.folder, onerror=self._unreadable):
            inner = os.path.relpath(path, self.folder)
            depth = 0 if inner == "." else inner.count(os.sep) + 1
            if depth == 0 and REJECTED in folders:
                folders.remove(REJECTED)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if depth >= DEEPEST and folders:
                self._tell("folder_too_deep", path)
                folders.clear()
            for name in sorted(files):
                if not name.startswith("."):
                    yield name, handle, os.path.join(inner, name)

    def _settle(self, name: str, folder: int, path: str, found: Facts) -> int:
        try:
            try:
                self._take(name, folder, found)
            except InvalidImage:
                self._reject(name, folder)
                return 0
            if _facts(os.stat(name, dir_fd=folder, follow_symlinks=False)) == found:
                os.unlink(name, dir_fd=folder)
        except (QueueFull, sqlalchemy.exc.SQLAlchemyError):
            return 0  # it stays for the next scan
        except OSError as error:
            self._stuck[path] = found
            self._tell("file_stays", path, type(error).__name__)
            return 0
        return 1

    def _take(self, name: str, folder: int, found: Facts) -> None:
        self._intake.require_room()
        # Without O_NONBLOCK a pipe in its place would be waited for.
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with open(handle, "rb") as file:
            if _facts(os.fstat(handle)) != found:
                raise OSError("it is another file now")
            limit = self._intake.max_bytes
            if found.size > limit:
                raise LimitExceeded(f"object has {found.size} bytes, allowed {limit}; send a smaller one")
            with self._intake.new_file() as copy:
                left = found.size
                while left > 0 and (data := file.read(min(left, MIB))):
                    copy.write(data)
                    left -= len(data)
                self._intake.take(copy, "folder", "folder")

    def _reject(self, name: str, folder: int) -> None:
        with self._open_rejected() as rejected:
            place = name
            with contextlib.suppress(FileNotFoundError):
                os.stat(name, dir_fd=rejected, follow_symlinks=False)
                place = f"{secrets.token_hex(4)}-{name}"  # an earlier one of this name stays
            os.rename(name, place, src_dir_fd=folder, dst_dir_fd=rejected)
            with contextlib.suppress(OSError):  # another user's; the folder keeps others out
                handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=rejected)
                try:
                    os.fchmod(handle, 0o660 if self._intake.config.share_with_group else 0o600)
                finally:
                    os.close(handle)

    @contextlib.contextmanager
    def _open_rejected(self) -> Iterator[int]:
        """The folder of what was refused, never one that a link leads to."""
        path = self.folder / REJECTED
        path.mkdir(exist_ok=True)
        handle = _open_folder(path)
        try:
            with contextlib.suppress(OSError):
                os.fchmod(handle, 0o2770 if self._intake.config.share_with_group else 0o700)
            yield handle
        finally:
            os.close(handle)

    def _unreadable(self, error: OSError) -> None:
        self._tell("folder_stays", str(error.filename), type(error).__name__)

    def _tell(self, event: str, path: str, error: str = "") -> None:
        """Say once what an operator has to look at; a name may be a patient's."""
        if event + path not in self._told:
            if len(self._told) > 10_000:
                self._told.clear()
            self._told.add(event + path)
            self._intake.log("warning", event, file=self._intake.log.uid(path), error=error)


def _open_folder(path: Path) -> int:
    """A handle of a folder, never of one that a link leads to; raises `OSError`."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _facts(found: os.stat_result) -> Facts | None:
    """Of a regular file."""
    return Facts(found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
