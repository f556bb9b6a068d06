"""Results on a disk: a file or folder appears whole or not at all, and a write that fails names it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cxr_triton.errors import InvalidRequest

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an `OSError` of a write into `path` its name: the system tells none, or that of a temporary file."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno in _NO_ROOM:
            error.filename, error.filename2 = str(path), None
        raise


def write(path: str | Path, content: str | bytes, *, beside: Path | None = None) -> None:
    """Write a file whole or not at all; what it held before stays until then.

    Parameters
    ----------
    path : path
        A device or a pipe is written to as it is.
    content : str or bytes
        Text becomes UTF-8.
    beside : Path, optional
        Folder of the temporary file, on the same file system; that of `path` by default.

    Raises
    ------
    OSError
        Names `path`.
    """
    with writing(path, beside=beside) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing(path: str | Path, *, beside: Path | None = None) -> Iterator[BinaryIO]:
    """As `write`, for what comes in parts: the file appears when the block ends, and not at all if the block fails."""
    target = Path(path).resolve()
    with naming(Path(path)):
        if target.exists() and not target.is_file():
            with open(target, "wb") as file:
                yield file
            return
        partial = (beside or target.parent) / f".{target.name}.{os.getpid()}.partial"
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                partial.chmod(target.stat().st_mode & 0o777)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(out: Path, *, replaces: bool = False) -> Iterator[Path]:
    """A folder beside `out` to write into: it becomes `out` when the block ends, and is gone if the block fails.

    With `replaces` an older `out` goes, else it has to be empty.

    Raises
    ------
    OSError
        Names `out` where the disk is full.
    """
    with naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        around = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            new = around / "new"
            new.mkdir()
            yield new
            if replaces:
                _exchange(new, out)
            else:
                os.replace(new, out)
        finally:
            shutil.rmtree(around, ignore_errors=True)


def _exchange(new: Path, out: Path) -> None:
    """Have two folders change places, at once where the system can: whoever is killed leaves one of them at `out`."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        code = errno.ENOSYS
    elif rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(out), _RENAME_EXCHANGE) == 0:
        return
    else:
        code = ctypes.get_errno()
    if code not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code), str(out))
    old = new.with_name("old")
    os.replace(out, old)
    try:
        os.replace(new, out)
    except BaseException:
        os.replace(old, out)
        raise


def require_new(out: Path, remedy: str = "remove it or choose another one") -> None:
    """Refuse a folder that holds something.

    Raises
    ------
    InvalidRequest
        `out` is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequest(f"{out} is not an empty folder; {remedy}")


def why_not_writable(path: Path) -> str | None:
    """Why no file or folder can be made or replaced at `path`; None if it can. Makes nothing."""
    folder = path.resolve().parent
    if not folder.is_dir():
        return f"there is no folder {folder} for {path.name}; make it or choose another place"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"you may not write into {folder}; choose another place for {path.name}"
    return None


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file as long as the block runs, or the process lives.

    Raises
    ------
    InvalidRequest
        Another process holds it; `busy` is the message.
    """
    import fcntl  # not on every system that reads by the client

    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(busy) from None
        yield


def leave_no_core(pid: int = 0) -> None:
    """A process, this one unless told another, and those that it starts write no core file: it would hold pictures."""
    try:
        import resource

        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
    except (ImportError, AttributeError):  # not Linux: nothing is served there, and a page's process may be
        pass
