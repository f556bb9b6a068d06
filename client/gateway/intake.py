"""What every way in ends in: `Intake.take` makes an object durable, files and queues it, and answers for that."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import sqlalchemy.exc

from cxr_triton.client.gateway.config import Config
from cxr_triton.client.gateway.database import CommitInDoubt, is_full
from cxr_triton.client.gateway.dimse import CANNOT_UNDERSTAND, OUT_OF_RESOURCES, PROCESSING_FAILURE, WRONG_CLASS
from cxr_triton.client.gateway.disk import sync
from cxr_triton.client.gateway.log import Log, Metrics
from cxr_triton.client.gateway.schema import Received
from cxr_triton.client.gateway.store import Store
from cxr_triton.client.spans import Span
from cxr_triton.errors import CxrError, InternalError, InvalidImage, LimitExceeded, QueueFull
from cxr_triton.pixels.dicom import Identity
from cxr_triton.pixels.limits import Limits
from cxr_triton.pixels.sandbox import Sandbox

IDENTIFY_S = 20.0
"""How long it may take to say which object a file is."""
STALE_S = 900
"""After so long a file in the incoming folder belongs to no transfer any more."""
MIB = 1 << 20
_DAY_S = 86400


class Mismatch(InvalidImage):
    """An object that is not what its sender announced."""


REFUSALS = (InvalidImage, InternalError, QueueFull, OSError, sqlalchemy.exc.SQLAlchemyError)
"""What `Intake.take` raises."""


def status_of(refusal: Exception) -> int:
    """The C-STORE status of one of `REFUSALS` (PS3.4 B.2.3), and its failure reason in STOW-RS (PS3.18 I.2)."""
    if isinstance(refusal, QueueFull):
        return OUT_OF_RESOURCES
    if isinstance(refusal, InvalidImage):
        return WRONG_CLASS if isinstance(refusal, Mismatch) else CANNOT_UNDERSTAND
    return PROCESSING_FAILURE


class IncomingFile:
    """A file that an object is written to as it comes, also by pynetdicom, in place of its temporary file.

    Writing never raises: pynetdicom's thread would end of it, without an answer to the peer. What is written after a
    failure is let go by, the file is removed at once, and `Intake.take` raises `error`. What is not given to
    `Intake.take` is removed at the end of a `with` block, or when nobody holds it any more. Nobody but the gateway's
    own user, or its group where `mode` says so, may read it.

    Attributes
    ----------
    path : Path
    error : OSError or None
        Why the file is not whole.
    """

    def __init__(self, folder: Path, mode: int = 0o600):
        self.path = folder / f"{secrets.token_hex(8)}.dcm"
        self.error: OSError | None = None
        self.name = str(self.path)  # as `tempfile` has it
        try:
            private = functools.partial(os.open, mode=mode)
            self._file: BinaryIO = open(self.path, "xb", opener=private)  # noqa: SIM115  # the object comes later
        except OSError as error:
            self._file, self.error = io.BytesIO(), error

    @property
    def file(self) -> IncomingFile:
        """As `tempfile` has it."""
        return self

    def write(self, data: bytes) -> None:
        """As a file's; see `error`."""
        self._try(self._file.write, data)

    def flush(self) -> None:
        """As a file's; see `error`."""
        self._try(self._file.flush)

    def close(self) -> None:
        """As a file's; see `error`."""
        self._try(self._file.close)

    def _try(self, step: Callable[..., object], *args: bytes) -> None:
        if self.error:
            return
        try:
            step(*args)
        except OSError as error:
            self.error = error
            with contextlib.suppress(OSError):
                self._file.close()  # it fails again, but closes
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> IncomingFile:
        return self

    def __exit__(self, *exc) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)


class Intake:
    """Makes an object durable and queues it.

    Parameters
    ----------
    config, store, log, metrics
    on_image : callable
        Called after each new image, from any thread.
    """

    def __init__(self, config: Config, store: Store, log: Log, metrics: Metrics, on_image: Callable[[], None]):
        self.config, self.log, self.metrics = config, log, metrics
        self._store, self._on_image = store, on_image
        self.draining = False
        self.incoming = Path(config.storage) / "incoming"
        self._objects = Path(config.storage) / "objects"
        # an object lies there mapped, inflated at most to its own size again, and copied once on the way
        memory_mib = 1024 + 3 * config.intake.max_object_mib
        self._sandbox = Sandbox(Limits(max_file_bytes=self.max_bytes, memory_mib=memory_mib, time_s=IDENTIFY_S))
        self.incoming.mkdir(parents=True, exist_ok=True)
        for i in range(256):
            (self._objects / f"{i:02x}").mkdir(parents=True, exist_ok=True)
        for folder in (self._objects, self._objects.parent):
            sync(folder)

    def close(self) -> None:
        """End the process that looks into objects; nothing is taken in any more."""
        self._sandbox.close()

    @property
    def max_bytes(self) -> int:
        """Largest object."""
        return self.config.intake.max_object_mib * MIB

    def free_bytes(self) -> int:
        """Room on the disk of the storage folder."""
        return shutil.disk_usage(self.incoming).free

    def require_room(self) -> None:
        """Raise `QueueFull` when the disk is about to be."""
        free, least = self.free_bytes(), self.config.intake.min_free_mib * MIB
        if free < least:
            raise QueueFull(f"{free // MIB} MiB free for objects, {least // MIB} have to stay; send it again later")

    def new_file(self) -> IncomingFile:
        """An open file in the incoming folder."""
        return IncomingFile(self.incoming, 0o660 if self.config.share_with_group else 0o600)

    def take(
        self,
        file: IncomingFile,
        door: str,
        source: str,
        expect: Callable[[Identity], None] | None = None,
        *,
        is_prior: bool = False,
        traceparent: str | None = None,
    ) -> Identity:
        """Move a file of the incoming folder into the queue; when this returns it survives a loss of power.

        Parameters
        ----------
        file : IncomingFile
            Of `new_file`, with a whole Part 10 file in it; it is gone afterwards, whatever happens.
        door, source : str
            How it came, and from whom.
        expect : callable, optional
            Raises when the object is not what was announced.
        is_prior : bool
            Fetched to be read beside another study; makes no job, and comes in while the gateway drains.
        traceparent : str, optional
            What the sender says that it belongs to; so does the job that it opens.

        Raises
        ------
        InvalidImage
            It is no DICOM object that can be filed.
        QueueFull
            No room, or the gateway drains.
        OSError, sqlalchemy.exc.SQLAlchemyError
            The disk or the queue failed.
        """
        verdict, code, path = "failed", None, file.path
        span = Span("receive", traceparent, "PRODUCER", {"cxr.door": door})
        trace = span.place.trace_id
        try:
            file.close()
            if file.error:
                raise file.error
            if self.draining and not is_prior:
                raise QueueFull("the gateway takes nothing in while it drains; send it again later")
            self.require_room()
            identity, digest = self._identify(path)
            if expect:
                expect(identity)
            place = str(span.place)
            verdict = self._queue(path, identity, digest, f"{door} {source}", is_prior=is_prior, traceparent=place)
            self.log(
                "info", "received", door=door, source=source, verdict=verdict, sop=self.log.uid(identity.sop_instance),
                study=self.log.uid(identity.study), syntax=identity.transfer_syntax, trace=trace,
            )  # fmt: skip
            return identity
        except REFUSALS as error:
            is_out_of_room = isinstance(error, QueueFull) or is_full(error)
            verdict = "refused" if isinstance(error, InvalidImage) else "no_room" if is_out_of_room else "failed"
            code = error.code if isinstance(error, CxrError) else type(error).__name__
            self.log("warning", "not_received", door=door, source=source, verdict=verdict, error=code, trace=trace)
            if is_full(error):
                raise QueueFull("the disk for objects is full; send it again later") from None
            raise
        finally:
            self.metrics.received.labels(door, verdict).inc()
            span.set({"cxr.outcome": verdict})
            span.end(code)
            path.unlink(missing_ok=True)

    def _identify(self, path: Path) -> tuple[Identity, str]:
        size = path.stat().st_size
        if size > self.max_bytes:
            raise LimitExceeded(f"object has {size} bytes, allowed {self.max_bytes}; send a smaller one")
        with open(path, "r+b") as file:
            if file.read(132)[128:] != b"DICM":
                raise InvalidImage("file has no DICM at byte 128; send Part 10 files")
            with open(path, "rb") as read_only:
                identity = self._sandbox.identify(read_only.fileno())
            digest = hashlib.sha256(identity.transfer_syntax.encode())
            file.seek(identity.offset)
            while part := file.read(MIB):
                digest.update(part)
            file.seek(0)
            file.write(bytes(128))  # a preamble can make a file two things at once
            file.flush()
            os.fsync(file.fileno())
        return identity, digest.hexdigest()

    def _queue(
        self, path: Path, identity: Identity, digest: str, source: str, *, is_prior: bool, traceparent: str
    ) -> str:
        # A name of its own for each arrival: what retention deletes is never what has just come in again.
        folder = self._objects / digest[:2]
        place = folder / f"{digest}-{secrets.token_hex(4)}.dcm"
        size = path.stat().st_size
        os.rename(path, place)
        sync(folder)
        received = Received(
            kind="other" if not identity.is_radiograph else "prior" if is_prior else "image",
            sop_instance=identity.sop_instance,
            digest=digest,
            sop_class=identity.sop_class,
            study=identity.study,
            series=identity.series,
            transfer_syntax=identity.transfer_syntax,
            patient=self.log.uid(identity.patient_id),
            view=identity.view,
            taken=identity.taken,
            number=identity.number,
            bytes=size,
            path=str(place.relative_to(self.config.storage)),
            source=source[:200],
        )
        try:
            group = self.config.group
            verdict = self._store.add(received, group.quiet_s, group.max_wait_s, traceparent)
        except CommitInDoubt:
            raise  # a row may point to the file: it stays, and `sweep` asks the rows
        except sqlalchemy.exc.SQLAlchemyError:
            place.unlink()  # or each attempt of a peer would leave one
            raise
        if verdict == "duplicate":
            place.unlink(missing_ok=True)
        elif verdict == "image":
            self._on_image()
        return verdict

    def sweep(self) -> int:
        """Remove what transfers that broke off, and crashes between file and row, left behind; how many files."""
        now, removed = time.time(), 0
        for path in self.incoming.iterdir():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < now - STALE_S:
                    path.unlink()
                    removed += 1
        for pattern in ("objects/*/*.dcm", "results/*/*"):
            old = [p for p in Path(self.config.storage).glob(pattern) if _age_s(p, now) > _DAY_S]
            for start in range(0, len(old), 500):
                paths = {str(p.relative_to(self.config.storage)): p for p in old[start : start + 500]}
                for name in set(paths) - self._store.known(list(paths)):
                    paths[name].unlink(missing_ok=True)
                    removed += 1
        return removed


def _age_s(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except OSError:
        return 0.0
