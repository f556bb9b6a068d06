"""An actor of Ray Data: keeps a client or an engine, and makes rows of the images of a unit."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_triton.archive.item import Item
from cxr_triton.archive.rows import NO_IMAGE, UNREADABLE, error_row, packed, read_row
from cxr_triton.client.limits import NO_ACCESS, Access
from cxr_triton.errors import (
    CODES,
    Cancelled,
    CxrError,
    DeadlineExceeded,
    InternalError,
    InvalidImage,
    LimitExceeded,
    Unavailable,
)
from cxr_triton.pixels.filetype import kind_of, may_be_image
from cxr_triton.reading import Reading

if TYPE_CHECKING:
    from cxr_triton.client.gateway.config import Remote

MOST_LOST = 10
"""Instances in a row, from one actor, at which a DICOMweb server fails before the run ends: it may fail at all."""
OF_THE_IMAGE = (InvalidImage, DeadlineExceeded, InternalError, Cancelled)
"""Errors that become a row, as another image may fare better; any other ends the run."""
MAX_IMAGE_MIB = 256
log = logging.getLogger(__name__)
Read = Callable[[bytes, dict[str, Any]], tuple[Reading, str]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an actor is to do.

    Attributes
    ----------
    urls : tuple of str
        Servers; none where `bundle` is read in the process.
    bundle : str or None
    access : Access
    timeout_s : float
        Of one reading.
    slots : int
        Readings under way at once in one actor.
    threads : int or None
        CPU threads of an engine.
    asked : dict
        Keyword arguments of `cxr_triton.client.Reader.read`.
    identifiers : str
        Of `cxr_triton.identity.IDENTIFIERS`.
    web : Remote or None
        Where instances are fetched; None reads files.
    """

    urls: tuple[str, ...] = ()
    bundle: str | None = None
    access: Access = NO_ACCESS
    timeout_s: float = 600.0
    slots: int = 4
    threads: int | None = None
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)
    identifiers: str = "hashed"
    web: Remote | None = None


class Worker:
    """Called by Ray with one unit at a time, in several threads, so that no slot waits for the end of a unit.

    Parameters
    ----------
    task : Task
    """

    def __init__(self, task: Task):
        self._task = task
        self._opening = threading.Lock()
        self._read: Read | None = None
        # One more each, which fetches a file while the others wait for their readings.
        self._threads = ThreadPoolExecutor(2 * task.slots, thread_name_prefix="cxr-archive")
        self._slots = threading.Semaphore(task.slots)
        self._stopped = ""
        self._lost = 0  # instances in a row at which the server of a DICOMweb source failed

    def __call__(self, batch: dict[str, Sequence[str]]) -> dict[str, list]:
        """Rows of a unit.

        Parameters
        ----------
        batch : dict
            ``items``: one text, JSON of a list of `Item`.

        Returns
        -------
        dict
            ``rows``: one Arrow stream, see `cxr_triton.archive.rows.packed`. ``stopped``: empty, or ``[CODE] message``
            of what no other image would fare better with; then some items have no row, and units after that have none.
            ``node``: Ray's name of the machine.
        """
        if self._stopped:
            return {"rows": [packed([])], "stopped": [self._stopped], "node": [_node()]}
        items = [Item(**item) for item in json.loads(batch["items"][0])]
        rows, stopped = [], ""
        asked = [self._threads.submit(self._row, item) for item in items]
        for row in asked:
            try:
                rows.append(row.result())
            except CancelledError:
                continue
            except CxrError as error:
                stopped = self._stopped = stopped or error.wire()
                _cancel(asked)
        return {"rows": [packed(rows)], "stopped": [stopped], "node": [_node()]}

    def _row(self, item: Item) -> dict[str, Any]:
        """A row, of a reading or of an error; raises what concerns all images."""
        data = None
        try:
            data = self._fetch(item)
            if may_be_image(data):
                return self._read_row(item, data)
            code, said = NO_IMAGE, kind_of(data)
        except OSError as error:
            code, said = UNREADABLE, error.strerror or type(error).__name__
        except OF_THE_IMAGE as error:
            code, said = error.code, error.message
        except CxrError:
            raise
        except Exception as error:  # one image shall not end a run over millions
            log.exception("an image failed")
            code, said = InternalError.code, f"{type(error).__name__}; see the actor's log"
        return error_row(item, code, said, data=data, identifiers=self._task.identifiers)

    def _read_row(self, item: Item, data: bytes) -> dict[str, Any]:
        identifiers = self._task.identifiers
        with self._slots:
            begins_s = time.monotonic()
            reading, server = self._reader()(data, {**self._task.asked, "identifiers": identifiers})
        asked_ms = 1e3 * (time.monotonic() - begins_s)
        return read_row(item, reading, data=data, identifiers=identifiers, asked_ms=asked_ms, server=server)

    def _fetch(self, item: Item) -> bytes:
        limit = MAX_IMAGE_MIB << 20
        if self._task.web is None:
            path = Path(item.place)
            if (size := path.stat().st_size) > limit:
                raise LimitExceeded(f"the file has {size >> 20} MiB, allowed are {MAX_IMAGE_MIB}")
            return path.read_bytes()
        from cxr_triton.archive.dicomweb import fetch

        try:
            data = fetch(self._task.web, item.place, limit)
        except InternalError as error:
            self._lost += 1  # a wrong count by threads side by side ends the run a few instances sooner or later
            if self._lost >= MOST_LOST:
                raise Unavailable(f"{error.message}; so it went with {self._lost} instances in a row") from None
            raise
        self._lost = 0
        return data

    def _reader(self) -> Read:
        """Opened by the first image, so that what fails is told with its code."""
        with self._opening:
            if self._read is None:
                self._read = open_reader(self._task).read
            return self._read


def open_reader(task: Task):
    """What reads: `Served` or `InProcess`."""
    if task.bundle is None:
        from cxr_triton.archive.served import Served

        return Served(task.urls, task.timeout_s, task.access)
    from cxr_triton.archive.in_process import InProcess

    return InProcess(task.bundle, task.slots, task.threads)


def _cancel(asked: Sequence[Future]) -> None:
    for row in asked:
        row.cancel()


def _node() -> str:
    ray = sys.modules.get("ray")  # where it is not yet, no actor is called
    return str(ray.get_runtime_context().get_node_id()) if ray else ""


def error_of(wire: str) -> CxrError:
    """The error that stopped a unit."""
    code, _, message = wire.removeprefix("[").partition("] ")
    return CODES.get(code, InternalError)(message)
