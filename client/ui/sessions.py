"""What visitors have given and asked, in memory only: so many sessions, so many bytes, and each for a while."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from cxr_triton.client.ui.refusal import Refusal
from cxr_triton.client.ui.servers import Server
from cxr_triton.client.ui.settings import Settings
from cxr_triton.errors import InvalidRequest, LimitExceeded, QueueFull
from cxr_triton.reading import Reading

PICTURE, READING = "{picture:p[0-9a-f]{16}}", "{reading:r[0-9a-f]{16}}"
"""Names of them in the path of a request."""


@dataclass(frozen=True)
class Preset:
    """A way to draw a picture.

    Attributes
    ----------
    render : str
        What `cxr_triton.pixels.display.render` calls it; as_is where it changes nothing.
    window : int or None
        Which of the file's further windows it uses, see `cxr_triton.pixels.sandbox.Prepared`; None for the first one.
    title : str
        Of that window: its number, and in quotes what the file calls it; empty for None.
    """

    render: str
    window: int | None = None
    title: str = ""


@dataclass(eq=False, kw_only=True)
class Picture:
    """A file that a visitor gave, and what was found in it.

    Attributes
    ----------
    file_name : str
        As the browser says it; empty where it does not.
    data : bytes
        The file.
    facts : dict
        See `cxr_triton.pixels.sandbox.Prepared`.
    width, height : int
        Of its PNG.
    presets : dict of str to Preset
        Each that it can be shown with.
    patient : str
        Digest of the Patient ID; empty where the file has none.
    pngs : dict of str to bytes
        By preset, those that were drawn.
    """

    name: str = ""
    file_name: str
    data: bytes
    facts: dict[str, Any]
    width: int
    height: int
    presets: dict[str, Preset]
    patient: str
    pngs: dict[str, bytes]

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return len(self.data) + sum(map(len, self.pngs.values()))


@dataclass(eq=False, kw_only=True)
class Asked:
    """A reading that was asked for.

    Attributes
    ----------
    pictures : tuple of Picture
        Prior first, current last.
    turns : tuple of Reading
        Those before it, which it goes on from.
    reading : Reading or None
        Once it is complete or was stopped.
    read_at : datetime.datetime or None
        When that was.
    bytes : int
        What the reading holds in memory, about.
    stopping : asyncio.Event
        Set to stop it.
    """

    name: str
    pictures: tuple[Picture, ...]
    server: Server
    turns: tuple[Reading, ...] = ()
    reading: Reading | None = None
    read_at: datetime.datetime | None = None
    bytes: int = 0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_complete(self) -> bool:
        """It was written to its end."""
        return self.reading is not None and self.reading.finish_reason != "cancelled"


class Session:
    """One tab's pictures and readings."""

    def __init__(self, settings: Settings):
        self.name = secrets.token_urlsafe(16)
        self.pictures: dict[str, Picture] = {}
        self.readings: dict[str, Asked] = {}
        self.under_way = 0
        self.coming = 0  # pictures
        self.incoming = 0  # bytes
        self.seen_s = time.monotonic()
        self.is_over = False
        self._settings = settings

    @property
    def held(self) -> int:
        """Bytes in memory: files that come in, readings, and each picture once, though it was removed from the page."""
        kept = [*self.pictures.values(), *(picture for asked in self.readings.values() for picture in asked.pictures)]
        pictures = {id(picture): picture.bytes for picture in kept}
        return self.incoming + sum(pictures.values()) + sum(asked.bytes for asked in self.readings.values())

    @property
    def is_in_use(self) -> bool:
        """A file is coming in, or a reading is being written."""
        return self.under_way > 0 or self.coming > 0

    def picture(self, name: str) -> Picture:
        """Raises `Refusal` where there is none of this name."""
        if name not in self.pictures:
            raise Refusal(InvalidRequest(f"there is no picture {name[:12]!r}; give its file again"), status=404)
        return self.pictures[name]

    def reading(self, name: str) -> Asked:
        """Raises `Refusal` where there is none of this name."""
        if name not in self.readings:
            raise Refusal(InvalidRequest(f"there is no reading {name[:12]!r}; ask again"), status=404)
        return self.readings[name]

    def keep(self, picture: Picture) -> None:
        """Take a picture in."""
        self._require_open()
        picture.name = _name("p")
        self.pictures[picture.name] = picture

    def remove(self, name: str) -> None:
        """Let a picture go, when no reading is of it; raises as `picture` does."""
        self.picture(name)
        del self.pictures[name]

    def ask(self, pictures: tuple[Picture, ...], server: Server, turns: tuple[Reading, ...]) -> Asked:
        """A reading to come.

        Raises
        ------
        Refusal
            The session has as many as it may.
        """
        self._require_open()
        if len(self.readings) >= self._settings.max_readings:
            raise Refusal(
                LimitExceeded(f"the session has {len(self.readings)} readings, as many as it may"),
                hint="Save what you need, then load the page again.",
            )
        asked = Asked(name=_name("r"), pictures=pictures, server=server, turns=turns)
        self.readings[asked.name] = asked
        return asked

    def complete(self, asked: Asked, reading: Reading) -> None:
        """It came to its end, or was stopped."""
        asked.reading, asked.read_at = reading, datetime.datetime.now().astimezone().replace(microsecond=0)
        asked.bytes = len(reading.to_json())

    def drop(self, asked: Asked) -> None:
        """Forget one of which nothing was written."""
        if asked.reading is None:
            self.readings.pop(asked.name, None)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While a reading is being written the session is in use; raises `QueueFull` where enough are."""
        if self.under_way >= self._settings.max_under_way:
            raise QueueFull(f"{self.under_way} readings are being written, allowed {self._settings.max_under_way}")
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self.seen_s = time.monotonic()

    def end(self) -> None:
        """Stop what is being written, and let everything go."""
        self.is_over = True
        for asked in self.readings.values():
            asked.stopping.set()
        self.pictures.clear()
        self.readings.clear()

    def _require_open(self) -> None:
        if self.is_over:
            raise _over()


class Sessions:
    """Those that are open."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._open: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._open.values())

    @property
    def under_way(self) -> int:
        """Readings that are being written."""
        return sum(session.under_way for session in self)

    def open(self) -> Session:
        """A new one; raises `QueueFull` where there are as many as there may be."""
        self.sweep()
        if len(self._open) >= self._settings.max_sessions:
            raise Refusal(
                QueueFull(f"{len(self._open)} sessions are open, as many as there may be"),
                hint="Close a tab of this page that you no longer need, or try again later.",
            )
        session = Session(self._settings)
        self._open[session.name] = session
        return session

    def of(self, request: web.Request) -> Session:
        """The session that a request names; raises `Refusal` where there is none."""
        session = self._open.get(request.match_info["session"])
        if session is None:
            raise _over()
        session.seen_s = time.monotonic()
        return session

    def end(self, session: Session) -> None:
        """Close one."""
        self._open.pop(session.name, None)
        session.end()

    def end_all(self) -> None:
        """Close every one."""
        for session in list(self):
            self.end(session)

    def sweep(self) -> int:
        """Close those that nobody has used for a while; how many that were."""
        before = time.monotonic() - self._settings.idle_s
        idle = [session for session in self if session.seen_s < before and not session.is_in_use]
        for session in idle:
            self.end(session)
        return len(idle)

    def require_room(self, session: Session, size: int) -> None:
        """Refuse `size` more bytes in a session.

        Raises
        ------
        LimitExceeded
            The session would hold more than one may.
        QueueFull
            All together would.
        """
        most, held = self._settings.session_mib << 20, sum(each.held for each in self)
        if session.held + size > most:
            raise LimitExceeded(
                f"the session holds {session.held >> 20} MiB, and {size >> 20} MiB more are over the "
                f"{self._settings.session_mib} MiB that it may hold"
            )
        if held + size > self._settings.sessions_mib << 20:
            raise QueueFull(f"all sessions together hold {held >> 20} MiB, as much as they may")

    @contextlib.contextmanager
    def room(self, session: Session, size: int) -> Iterator[None]:
        """Place for a picture of `size` bytes while it comes in and is looked at; raises as `require_room` does."""
        if len(session.pictures) + session.coming >= self._settings.max_pictures:
            raise LimitExceeded(f"the session has {len(session.pictures)} pictures, as many as it may")
        self.require_room(session, size)
        session.coming += 1
        session.incoming += size
        try:
            yield
        finally:
            session.coming -= 1
            session.incoming -= size
            session.seen_s = time.monotonic()


def _name(kind: str) -> str:
    """One that no session has had: what an old page says of its own things is of nothing in the next session."""
    return f"{kind}{secrets.token_hex(8)}"


def _over() -> Refusal:
    return Refusal(InvalidRequest("the session is over; load the page again"), status=404)
