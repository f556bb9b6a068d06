"""Who works with a repository: the servers that run on it share it, and what changes it has it for itself.

The lock is the kernel's, on the folder: it ends with the process, and leaves no file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cxr_triton.errors import InvalidRequest, Unavailable


def occupy(repository: Path) -> int | None:
    """Share a repository with other servers until the descriptor is closed; None where no lock can be had there.

    Raises
    ------
    Unavailable
        It is being changed.
    """
    try:
        return _locked(repository, fcntl.LOCK_SH)
    except BlockingIOError:
        raise Unavailable(f"{repository} is being tuned; wait until that has ended, or end it") from None
    except OSError:  # a file system without locks
        return None


@contextlib.contextmanager
def alone(repository: Path) -> Iterator[None]:
    """Have a repository for oneself as long as the block runs.

    Raises
    ------
    InvalidRequest
        A server runs on it, or somebody else changes it.
    """
    try:
        lock = _locked(repository, fcntl.LOCK_EX)
    except BlockingIOError:
        raise InvalidRequest(
            f"{repository} is in use: a server runs on it, or another `cxr-triton tune`; stop that first, or measure "
            "a bundle in its place"
        ) from None
    except OSError as error:
        raise InvalidRequest(
            f"{repository} cannot be locked ({error.strerror}): its file system has no locks; tune the bundle, and "
            "package it with what `cxr-triton tune` says"
        ) from None
    try:
        yield
    finally:
        os.close(lock)


def _locked(repository: Path, kind: int) -> int:
    folder = os.open(repository, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, kind | fcntl.LOCK_NB)
    except BaseException:
        os.close(folder)
        raise
    return folder
