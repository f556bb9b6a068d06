"""The ways in: C-STORE and C-ECHO, a watched folder, STOW-RS. All end in `Intake.take`, which answers for durability.

pynetdicom trusts a peer: it buffers a PDU of any announced length, waits without limit for the rest of one, and counts
silent connections as associations. `Listener` puts limits under it, where bytes come off the socket.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import mmap
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pynetdicom
import sqlalchemy.exc
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from pydicom import Dataset
from pydicom.uid import UID
from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from cxr_triton.client.gateway.config import LOOPBACK, Config
from cxr_triton.client.gateway.log import Log, Metrics
from cxr_triton.client.gateway.store import CommitInDoubt, Received, Store, is_full
from cxr_triton.errors import InvalidImage, LimitExceeded, QueueFull, Unavailable
from cxr_triton.pixels.dicom import Identity, read_identity
from cxr_triton.pixels.limits import Limits

SUCCESS, OUT_OF_RESOURCES, WRONG_CLASS, CANNOT_UNDERSTAND, PROCESSING_FAILURE = 0x0000, 0xA700, 0xA900, 0xC000, 0x0110
STOW_IDLE_S = 30.0
"""How long a STOW-RS client may say nothing in the middle of a request."""
STALE_S = 900
"""After so long a file in the incoming folder belongs to no transfer any more."""
_MIB = 1 << 20
_DAY_S = 86400
_CHUNK = 1 << 18


class IncomingFile:
    """A file that an object is written to as it comes, also by pynetdicom, in place of its temporary file.

    Writing never raises: pynetdicom's thread would end of it, without an answer to the peer. What is written after a
    failure is let go by, the file is removed at once, and `Intake.take` raises `error`. A `with` block removes what it
    did not give to `Intake.take`. Only the gateway's own user may read the file.

    Attributes
    ----------
    path : Path
    error : OSError or None
        Why the file is not whole.
    """

    def __init__(self, folder: Path):
        self.path, self.error = folder / f"{secrets.token_hex(8)}.dcm", None
        self.name, self.file = str(self.path), self  # as `tempfile` has them
        try:
            self._file = open(self.path, "xb", opener=lambda path, flags: os.open(path, flags, 0o600))
        except OSError as error:
            self._file, self.error = None, error

    def write(self, data: bytes) -> None:
        self._try(lambda: self._file.write(data))

    def flush(self) -> None:
        self._try(lambda: self._file.flush())

    def close(self) -> None:
        self._try(lambda: self._file.close())

    def _try(self, step: Callable[[], object]) -> None:
        if self.error:
            return
        try:
            step()
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
        self._limits = Limits(max_file_bytes=self.max_bytes)
        self.incoming.mkdir(parents=True, exist_ok=True)
        for i in range(256):
            (self._objects / f"{i:02x}").mkdir(parents=True, exist_ok=True)
        for folder in (self._objects, self._objects.parent):
            _sync(folder)
        _prepare_pynetdicom(self.incoming)

    @property
    def max_bytes(self) -> int:
        return self.config.intake.max_object_mib * _MIB

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.incoming).free

    def require_room(self) -> None:
        """Raise `QueueFull` when the disk is about to be."""
        free, least = self.free_bytes(), self.config.intake.min_free_mib * _MIB
        if free < least:
            raise QueueFull(f"{free // _MIB} MiB free for objects, {least // _MIB} have to stay; send it again later")

    def new_file(self) -> IncomingFile:
        """An open file in the incoming folder."""
        return IncomingFile(self.incoming)

    def take(
        self,
        file: IncomingFile,
        door: str,
        source: str,
        expect: Callable[[Identity], None] | None = None,
        *,
        is_prior: bool = False,
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

        Raises
        ------
        InvalidImage
            It is no DICOM object that can be filed.
        QueueFull
            No room, or the gateway drains.
        OSError, sqlalchemy.exc.SQLAlchemyError
            The disk or the queue failed.
        """
        verdict, path = "failed", file.path
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
            verdict = self._queue(path, identity, digest, f"{door} {source}", is_prior)
            self.log(
                "info", "received", door=door, source=source, verdict=verdict, sop=self.log.uid(identity.sop_instance),
                study=self.log.uid(identity.study), syntax=identity.transfer_syntax,
            )  # fmt: skip
            return identity
        except (InvalidImage, QueueFull, OSError, sqlalchemy.exc.SQLAlchemyError) as error:
            is_out_of_room = isinstance(error, QueueFull) or is_full(error)
            verdict = "refused" if isinstance(error, InvalidImage) else "no_room" if is_out_of_room else "failed"
            code = getattr(error, "code", type(error).__name__)
            self.log("warning", "not_received", door=door, source=source, verdict=verdict, error=code)
            if is_full(error):
                raise QueueFull("the disk for objects is full; send it again later") from None
            raise
        finally:
            self.metrics.received.labels(door, verdict).inc()
            path.unlink(missing_ok=True)

    def _identify(self, path: Path) -> tuple[Identity, str]:
        size = path.stat().st_size
        if size > self.max_bytes:
            raise LimitExceeded(f"object has {size} bytes, allowed {self.max_bytes}; send a smaller one")
        with open(path, "r+b") as file:
            if file.read(132)[128:] != b"DICM":
                raise InvalidImage("file has no DICM at byte 128; send Part 10 files")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                identity = read_identity(data, self._limits)
                digest = hashlib.sha256(identity.transfer_syntax.encode())
                for start in range(identity.offset, len(data), _MIB):
                    digest.update(data[start : start + _MIB])
            file.seek(0)
            file.write(bytes(128))  # a preamble can make a file two things at once
            file.flush()
            os.fsync(file.fileno())
        return identity, digest.hexdigest()

    def _queue(self, path: Path, identity: Identity, digest: str, source: str, is_prior: bool) -> str:
        # A name of its own for each arrival: what retention deletes is never what has just come in again.
        folder = self._objects / digest[:2]
        place = folder / f"{digest}-{secrets.token_hex(4)}.dcm"
        size = path.stat().st_size
        os.rename(path, place)
        _sync(folder)
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
            verdict = self._store.add(received, self.config.group.quiet_s, self.config.group.max_wait_s)
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


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ----------------------------------------------------------------------------------------------------------- DICOM


class Listener:
    """C-STORE and C-ECHO SCP; also takes the answers to storage commitment.

    Parameters
    ----------
    intake : Intake
    on_commitment : callable
        Called with transaction UID, the set of kept SOP instances, and the failed ones with their reason.
    """

    def __init__(self, intake: Intake, on_commitment: Callable[[str, set[str], dict[str, str]], None]):
        self._intake, self._on_commitment = intake, on_commitment
        config = self.config = intake.config.dicom
        ae = self._ae = AE(config.aet)
        ae.maximum_pdu_size = config.max_pdu_bytes
        ae.maximum_associations = 1 << 16  # counted here, see `_Server`
        ae.require_called_aet = True
        ae.acse_timeout = config.first_pdu_s
        ae.dimse_timeout = config.pdu_s
        ae.network_timeout = config.idle_s
        for context in AllStoragePresentationContexts:
            ae.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
        ae.add_supported_context(Verification)
        ae.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)
        handlers = [
            (evt.EVT_CONN_CLOSE, self._on_close),
            (evt.EVT_REQUESTED, self._on_request),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_N_EVENT_REPORT, self._on_event_report),
        ]
        try:
            self._server = ae.make_server(
                (config.host, config.port), evt_handlers=handlers, server_class=_Server, listener=self
            )
        except OSError as error:
            raise Unavailable(
                f"dicom: cannot listen on {config.host} port {config.port} ({error.strerror}); stop what listens there"
            ) from None
        ae._servers.append(self._server)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="dicom", daemon=True)
        self._thread.start()

    def stop(self, grace_s: float = 5.0) -> None:
        """Take no more, let associations that are in the middle of an object end, then close them."""
        self._intake.draining = True
        self._server.shutdown()
        ends = time.monotonic() + grace_s
        while self._server.active_associations and time.monotonic() < ends:
            time.sleep(0.05)
        for association in self._server.active_associations:
            association.abort()

    @property
    def networks(self) -> list:
        return [n for peer in self.config.peers for n in peer.networks] or list(LOOPBACK)

    def _may(self, aet: str, address: str) -> bool:
        if not self.config.peers:
            return True  # the server has let the loopback interface through and nothing else
        return any(peer.aet == aet and _is_in(address, peer.networks) for peer in self.config.peers)

    def _on_request(self, event) -> None:
        association = event.assoc
        aet = str(association.requestor.primitive.calling_ae_title).strip()
        address = association.requestor.address
        others = sum(a.is_established for a in self._server.active_associations)
        answer, why = "accepted", None
        if not self._may(aet, address):
            answer, why = "unknown_peer", (0x01, 0x01, 0x03)
        elif self._intake.draining:
            answer, why = "draining", (0x02, 0x03, 0x01)
        elif others >= self.config.max_associations:
            answer, why = "too_many", (0x02, 0x03, 0x02)
        self._intake.metrics.associations.labels(answer).inc()
        if why:
            self._intake.log("warning", "association_refused", why=answer, aet=aet, address=address)
            association.acse.send_reject(*why)
            association.is_rejected = True
            association.kill()

    def _on_close(self, event) -> None:
        """End a connection that never became an association, which pynetdicom would go on waiting for."""
        dul = event.assoc.dul
        if dul.state_machine.current_state in ("Sta2", "Sta13"):  # no request yet; after an abort of ours
            dul.to_user_queue.put(None)

    def _on_echo(self, event) -> int:
        event.assoc.dul.socket.recv.message_ends()
        return SUCCESS

    def _on_store(self, event) -> Dataset:
        event.assoc.dul.socket.recv.message_ends()
        request, association = event.request, event.assoc
        source = f"{str(association.requestor.ae_title).strip()}@{association.requestor.address}"

        def expect(identity: Identity) -> None:
            announced = (str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID))
            if announced != (identity.sop_class, identity.sop_instance):
                raise _Mismatch("the data set is of another SOP class or instance than the request")

        answer = Dataset()
        answer.Status = SUCCESS
        try:
            self._intake.take(request._dataset_file, "dicom", source, expect)
        except QueueFull as error:
            answer.Status, answer.ErrorComment = OUT_OF_RESOURCES, error.message[:64]
        except _Mismatch as error:
            answer.Status, answer.ErrorComment = WRONG_CLASS, error.message[:64]
        except InvalidImage as error:
            answer.Status, answer.ErrorComment = (
                CANNOT_UNDERSTAND,
                error.message.encode("ascii", "replace")[:64].decode(),
            )
        except (OSError, sqlalchemy.exc.SQLAlchemyError):
            answer.Status = PROCESSING_FAILURE
        return answer

    def _on_event_report(self, event):
        event.assoc.dul.socket.recv.message_ends()
        take_commitment(event.event_information, self._on_commitment)
        return SUCCESS, None


class _Mismatch(InvalidImage):
    pass


def take_commitment(report: Dataset, on_commitment: Callable[[str, set[str], dict[str, str]], None]) -> None:
    """Pass the answer to a storage commitment (PS3.4 table J.3-2) on."""
    kept = {str(item.ReferencedSOPInstanceUID) for item in report.get("ReferencedSOPSequence") or []}
    failed = {
        str(item.ReferencedSOPInstanceUID): f"commitment failed with 0x{int(item.get('FailureReason') or 0):04X}"
        for item in report.get("FailedSOPSequence") or []
    }
    on_commitment(str(report.get("TransactionUID", "")), kept, failed)


def _is_in(address: str, networks) -> bool:
    try:
        ip = ipaddress.ip_address(address.split("%", maxsplit=1)[0])
    except ValueError:
        return False
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return any(ip in network for network in networks)


def _prepare_pynetdicom(incoming: Path) -> None:
    """Have objects written to the incoming folder as they come, and nothing of them into logs."""
    # There is no setting for the folder, and a rename needs the same file system.
    pynetdicom.dimse_messages.NamedTemporaryFile = lambda **_: IncomingFile(incoming)
    _config.STORE_RECV_CHUNKED_DATASET = True
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False
    for name in ("pynetdicom", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


class _Server(ThreadedAssociationServer):
    """Refuses connections before they cost a thread, does TLS in the connection's own thread, and counts."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args, listener: Listener, **kwargs):
        self._listener = listener
        self._open: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._tls = listener.config.tls.server() if listener.config.tls else None
        super().__init__(*args, request_handler=_Handler, **kwargs)

    def get_request(self):
        return self.socket.accept()

    def verify_request(self, request, client_address) -> bool:
        config, address, reason = self._listener.config, client_address[0], None
        with self._lock:
            if not _is_in(address, self._listener.networks):
                reason = "unknown_address"
            elif self._open[address] >= config.max_per_address:
                reason = "too_many_of_address"
            elif self._open.total() >= 4 * config.max_associations:
                reason = "too_many"
            else:
                self._open[address] += 1
                return True
        self._listener._intake.metrics.connections_refused.labels(reason).inc()
        self._listener._intake.log("warning", "connection_refused", why=reason, address=address)
        return False

    def finish_request(self, request, client_address) -> None:
        """Runs in a thread of the connection, to its end."""
        config = self._listener.config
        try:
            request.settimeout(config.first_pdu_s)
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if config.tls:
                request = self._tls.wrap_socket(request, server_side=True)
            association = _Handler(request, client_address, self).association
            association.join()
            association.dul.join(config.pdu_s)
            # An object that broke off in the middle.
            if rest := getattr(association.dimse.message, "_data_set_path", None):
                Path(rest).unlink(missing_ok=True)
        except OSError as error:
            self._listener._intake.log("warning", "connection_failed", address=client_address[0], error=str(error)[:80])
        finally:
            with self._lock:
                self._open[client_address[0]] -= 1
                self._open += collections.Counter()  # forget addresses without connections
            self.shutdown_request(request)


class _Handler(RequestHandler):
    def handle(self) -> None:
        self.association = self._create_association()
        listener = self.server._listener
        wire = self.association.dul.socket
        config = listener.config
        wire.recv = Receiver(
            wire, pdu_limit=config.pdu_limit, pdu_s=config.pdu_s, max_message=listener._intake.max_bytes + _MIB
        )
        take = self.association.dimse.receive_primitive

        def take_or_abort(data) -> None:
            """Without this, data that are no message would end pynetdicom's thread instead of the association."""
            try:
                take(data)
            except Exception as error:
                # its text may quote the data
                listener._intake.log(
                    "warning", "not_a_message", address=self.client_address[0], error=type(error).__name__
                )
                self.association.dul.event_queue.put("Evt19")  # as an invalid PDU: A-ABORT

        self.association.dimse.receive_primitive = take_or_abort
        self.association.start()


class Receiver:
    """Takes the place of `AssociationSocket.recv`: the same bytes, or `OSError` beyond the limits, which ends the
    association.

    A PDU may have `pdu_limit` bytes and take `pdu_s`, a whole message `max_message` bytes.
    """

    def __init__(self, wire, *, pdu_limit: int, pdu_s: float, max_message: int):
        self._wire, self._pdu_limit, self._pdu_s, self._max_message = wire, pdu_limit, pdu_s, max_message
        self._in_body = False
        self._received = 0
        self._ends = 0.0

    def message_ends(self) -> None:
        self._received = 0

    def __call__(self, size: int) -> bytearray:
        connection = self._wire.socket
        if not self._in_body:
            self._ends = time.monotonic() + self._pdu_s
        self._received += size
        try:
            if size > self._pdu_limit or self._received > self._max_message:
                raise OSError(f"{size} bytes of a PDU, {self._received} of a message")
            data = bytearray(size)
            view, got = memoryview(data), 0
            while got < size:
                connection.settimeout(max(self._ends - time.monotonic(), 0.001))
                read = connection.recv_into(view[got:])
                if not read:
                    break
                got += read
            connection.settimeout(self._pdu_s)
        except OSError:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            raise
        self._in_body = not self._in_body and got == size and 1 <= data[0] <= 7
        return data if got == size else data[:got]


# ---------------------------------------------------------------------------------------------------------- folder


class FolderWatcher:
    """Takes files of a folder that no longer grow; refused ones move to ``rejected/``.

    `scan` is called again and again; a file is taken when two scans in a row saw it with the same size and time.
    """

    def __init__(self, intake: Intake):
        self._intake = intake
        self.folder = Path(intake.config.folder.path)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._seen: dict[Path, tuple[int, int]] = {}

    def scan(self) -> int:
        """How many files were taken."""
        now, taken = {}, 0
        for path in sorted(self.folder.iterdir()):
            if path.is_symlink() or not path.is_file() or path.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):
                facts = path.stat()
                now[path] = (facts.st_size, facts.st_mtime_ns)
        for path, facts in now.items():
            if self._seen.get(path) == facts:
                taken += self._take(path)
        self._seen = {path: facts for path, facts in now.items() if path.exists()}
        return taken

    def _take(self, path: Path) -> int:
        try:
            self._intake.require_room()
            with open(path, "rb") as file, self._intake.new_file() as copy:
                shutil.copyfileobj(file, copy, _MIB)
                self._intake.take(copy, "folder", "folder")
        except InvalidImage:
            rejected = self.folder / "rejected"
            rejected.mkdir(exist_ok=True)
            os.replace(path, rejected / path.name)
            return 0
        except (QueueFull, OSError, sqlalchemy.exc.SQLAlchemyError):
            return 0  # it stays for the next scan
        path.unlink()
        return 1


# ------------------------------------------------------------------------------------------------------------ STOW


async def stow(request: web.Request, intake: Intake, token: str | None) -> web.Response:
    """STOW-RS (PS3.18 10.5): multipart/related of application/dicom; answers in the DICOM JSON model.

    200 when all instances are durable and queued, 202 when some are, 409 when none is, 507 when there was no room.
    """
    if token is not None:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), f"Bearer {token}".encode()):
            return web.json_response({"error": "token missing or wrong"}, status=401)
    kind = request.content_type
    if kind != "multipart/related":
        return web.json_response({"error": f"{kind} is not multipart/related"}, status=415)
    study = request.match_info.get("study")
    stored, failed, is_out_of_room = [], [], False

    def expect(identity: Identity) -> None:
        if study and identity.study != study:
            raise _Mismatch("the object is of another study than the address")

    try:
        parts = await request.multipart()
        while (part := await asyncio.wait_for(parts.next(), STOW_IDLE_S)) is not None:
            try:
                if part.headers.get("Content-Type", "application/dicom").split(";")[0].strip() != "application/dicom":
                    raise InvalidImage("part is not application/dicom")
                await asyncio.to_thread(intake.require_room)
                with intake.new_file() as file:
                    size = 0
                    while chunk := await asyncio.wait_for(part.read_chunk(_CHUNK), STOW_IDLE_S):
                        size += len(chunk)
                        if size > intake.max_bytes:
                            raise LimitExceeded(f"object is over {intake.max_bytes} bytes; send a smaller one")
                        file.write(chunk)
                    identity = await asyncio.to_thread(intake.take, file, "stow", request.remote or "", expect)
                stored.append(_item(identity.sop_class, identity.sop_instance))
            except QueueFull:
                is_out_of_room = True
                failed.append(_item(reason=OUT_OF_RESOURCES))
            except InvalidImage as error:
                failed.append(_item(reason=WRONG_CLASS if isinstance(error, _Mismatch) else CANNOT_UNDERSTAND))
            except TimeoutError:
                raise
            except (OSError, sqlalchemy.exc.SQLAlchemyError):
                failed.append(_item(reason=PROCESSING_FAILURE))
    except TimeoutError:
        return web.json_response({"error": f"nothing came for {STOW_IDLE_S:g} s"}, status=408)
    except (ValueError, HttpProcessingError) as error:
        return web.json_response({"error": f"not multipart/related: {type(error).__name__}"}, status=400)
    answer = {}
    if stored:
        answer["00081199"] = {"vr": "SQ", "Value": stored}
    if failed:
        answer["00081198"] = {"vr": "SQ", "Value": failed}
    status = 200 if stored and not failed else 202 if stored else 507 if is_out_of_room else 409 if failed else 400
    return web.json_response(answer, status=status, content_type="application/dicom+json")


def _item(sop_class: str | None = None, sop_instance: str | None = None, reason: int | None = None) -> dict:
    item = {}
    if sop_class:
        item["00081150"] = {"vr": "UI", "Value": [str(UID(sop_class))]}
        item["00081155"] = {"vr": "UI", "Value": [sop_instance]}
    if reason is not None:
        item["00081197"] = {"vr": "US", "Value": [reason]}
    return item
