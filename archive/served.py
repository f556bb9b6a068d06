"""Readings from running servers: several are balanced, and what may pass is asked again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

from cxr_triton.client.limits import Access, Timeouts
from cxr_triton.client.reader import Reader
from cxr_triton.errors import Cancelled, DeadlineExceeded, InternalError, QueueFull, Unavailable
from cxr_triton.reading import Reading

BUSY = (QueueFull, Unavailable)
"""Asked again until the time for a reading is over."""
MAY_PASS = (DeadlineExceeded, InternalError, Cancelled)
"""Asked again `RETRIES` times: the image may be their cause."""
RETRIES = 2
_FIRST_PAUSE_S, _LAST_PAUSE_S, _CONNECT_S = 0.25, 10.0, 2.0


class _Link:
    """One server: its client, how much is under way there, and when it may be asked again."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.active = 0
        self.rests_until = 0.0
        self.server = ""

    def read(self, data: bytes, asked: dict[str, Any]) -> tuple[Reading, str]:
        if not self.server:
            info = self.reader.server_info()
            self.server = f"{info.name} {info.version}"
        return self.reader.read([data], **asked).result(), self.server


class Served:
    """Readings of any number of threads.

    Parameters
    ----------
    urls : sequence of str
    timeout_s : float
        Of one reading; also how long a busy or missing server is asked again.
    access : Access
    """

    def __init__(self, urls: Sequence[str], timeout_s: float, access: Access):
        timeouts = Timeouts(connect_s=_CONNECT_S, first_delta_s=None, idle_s=None, total_s=timeout_s)
        self._links = [_Link(Reader(url, timeouts=timeouts, **vars(access))) for url in urls]
        random.shuffle(self._links)  # actors do not all begin with the same one
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._closed = False

    def read(self, data: bytes, asked: dict[str, Any]) -> tuple[Reading, str]:
        """A reading of one image, and name and version of the server that gave it.

        Parameters
        ----------
        data : bytes
            DICOM Part 10, PNG or JPEG.
        asked : dict
            Keyword arguments of `Reader.read`.

        Raises
        ------
        CxrError
            The last one, once the time or the tries are over.
        """
        ends, failed, pause_s = time.monotonic() + self._timeout_s, 0, _FIRST_PAUSE_S
        while True:
            link = self._taken()
            rest_s = 0.0
            try:
                return link.read(data, asked)
            except BUSY:
                if time.monotonic() >= ends or self._closed:
                    raise
                rest_s, pause_s = pause_s * random.uniform(0.5, 1.0), min(2 * pause_s, _LAST_PAUSE_S)  # noqa: S311
            except MAY_PASS:
                failed += 1
                if failed > RETRIES or self._closed:
                    raise
            finally:
                self._given_back(link, rest_s)

    def close(self) -> None:
        """End the connections."""
        self._closed = True
        for link in self._links:
            link.reader.close()

    def _taken(self) -> _Link:
        """The server with the least under way of those that do not rest; waits where all do."""
        with self._changed:
            while not (ready := [link for link in self._links if link.rests_until <= time.monotonic()]):
                self._changed.wait(min(link.rests_until for link in self._links) - time.monotonic())
            link = min(ready, key=lambda each: each.active)
            link.active += 1
            return link

    def _given_back(self, link: _Link, rest_s: float) -> None:
        with self._changed:
            link.active -= 1
            link.rests_until = max(link.rests_until, time.monotonic() + rest_s)
            self._changed.notify()
