"""The ways out: C-STORE with storage commitment, STOW-RS and FHIR; each result's status at each destination."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
import sqlalchemy as sa
import sqlalchemy.exc
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance

from cxr_triton.client.gateway.config import Config, Destination
from cxr_triton.client.gateway.log import Log, Metrics
from cxr_triton.client.gateway.read import POLL_S, either, spread
from cxr_triton.client.gateway.receive import Receiver, take_commitment
from cxr_triton.client.gateway.store import Store
from cxr_triton.errors import InvalidImage, ReadingMismatch
from cxr_triton.pixels.dicom import read_identity

STORED = (0x0000, 0xB000, 0xB006, 0xB007, 0x0111)
"""Success, the three warnings of PS3.4 B.2.3, and a duplicate SOP instance: it is there."""
LEASE_S = 300.0
UNREADABLE = "its file in the storage folder cannot be read"
SAME_ASSOCIATION_S = 2.0
"""How long an association stays open for an answer to storage commitment."""

Report = Callable[[sa.Row, str, str], None]


class Unreachable(Exception):
    """The destination, not a result: nothing can be sent there now."""


def is_permanent(status: int) -> bool:
    """A C-STORE status, or a STOW-RS failure reason, that the same bytes will always get (PS3.4 B.2.3, PS3.7 C)."""
    return (
        status in (0x0106, 0x0112, 0x0115, 0x0117, 0x0118, 0x0119, 0x0122) or status >> 12 == 0xC or status >> 8 == 0xA9
    )


def associate(to, aet: str, contexts: dict[str, list], handlers: Sequence = (), roles: Sequence = ()):
    """An association with a peer, for SOP classes with their transfer syntaxes.

    Parameters
    ----------
    to : Destination or Priors
        Its `aet`, `host`, `port`, `tls` and `timeout_s`.
    aet : str
        Of this gateway.

    Raises
    ------
    Unreachable
        No connection, no answer in time, or a refusal.
    """
    ae = AE(aet)
    ae.maximum_pdu_size = 131_072
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = to.timeout_s
    for sop_class, syntaxes in contexts.items():
        ae.add_requested_context(sop_class, syntaxes)

    def bound(event) -> None:
        wire = event.assoc.dul.socket
        wire.recv = Receiver(wire, pdu_limit=1 << 20, pdu_s=to.timeout_s, max_message=1 << 28)
        wire.socket.settimeout(to.timeout_s)

    association = ae.associate(
        to.host,
        to.port,
        ae_title=to.aet,
        tls_args=(to.tls.client(), to.host) if to.tls else None,
        evt_handlers=[(evt.EVT_CONN_OPEN, bound), *handlers],
        ext_neg=list(roles),
    )
    if not association.is_established:
        why = "rejected the association" if association.is_rejected else "is not reachable"
        raise Unreachable(f"{to.aet} at {to.host} port {to.port} {why}")
    return association


class DicomSender:
    """C-STORE SCU, and SCU of storage commitment."""

    def __init__(self, destination: Destination, config: Config, on_commitment):
        self._destination, self._storage = destination, Path(config.storage)
        self._aet = config.own_aet
        self._on_commitment = on_commitment

    def send(self, batch: Sequence[sa.Row], report: Report) -> None:
        """Send results over one association, and report each as soon as its answer is there."""
        syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
        association = associate(self._destination, self._aet, {row.sop_class: syntaxes for row in batch})
        try:
            for row in batch:
                try:
                    content = (self._storage / row.path).read_bytes()
                    require_result(content, row)
                    result = dcmread(io.BytesIO(content))
                except (OSError, InvalidDicomError):
                    report(row, "refused", UNREADABLE)
                    continue
                except ReadingMismatch as error:
                    report(row, "refused", error.wire())
                    continue
                try:
                    status = association.send_c_store(result)
                except ValueError:
                    report(row, "refused", "no presentation context was accepted for its SOP class")
                    continue
                except RuntimeError:
                    raise Unreachable(f"{self._destination.name} ended the association") from None
                if "Status" not in status:
                    report(row, "again", "the association ended before an answer came")
                    raise Unreachable(f"{self._destination.name} ended the association or did not answer in time")
                report(row, *judge(status.Status))
        finally:
            if association.is_established:
                association.release()

    def ask_commitment(self, rows: Sequence[sa.Row], transaction_uid: str) -> None:
        """N-ACTION for results; their answer may come here or later on any association."""
        answered = []

        def on_report(event):
            take_commitment(event.event_information, self._on_commitment)
            answered.append(True)
            return 0x0000, None

        association = associate(
            self._destination,
            self._aet,
            {StorageCommitmentPushModel: [ExplicitVRLittleEndian, ImplicitVRLittleEndian]},
            [(evt.EVT_N_EVENT_REPORT, on_report)],
        )
        try:
            request = Dataset()
            request.TransactionUID, request.ReferencedSOPSequence = transaction_uid, []
            for row in rows:
                item = Dataset()
                item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = row.sop_class, row.sop_instance
                request.ReferencedSOPSequence.append(item)
            try:
                status, _ = association.send_n_action(
                    request, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
                )
            except (ValueError, RuntimeError):
                raise Unreachable(f"{self._destination.name} has no storage commitment") from None
            if status.get("Status") != 0x0000:
                raise Unreachable(f"{self._destination.name} refused storage commitment with {_hex(status)}")
            ends = time.monotonic() + min(SAME_ASSOCIATION_S, self._destination.timeout_s)
            while not answered and association.is_established and time.monotonic() < ends:
                time.sleep(0.02)
        finally:
            if association.is_established:
                association.release()


def judge(status: int) -> tuple[str, str]:
    """What a C-STORE status means for a result: ``stored``, ``again`` or ``refused``; and the status as text."""
    text = f"status 0x{status:04X}"
    return ("stored" if status in STORED else "refused" if is_permanent(status) else "again"), text


def require_result(content: bytes, row: sa.Row) -> None:
    """Refuse a file that is not the result written for this delivery, by the UID that was made of its images.

    Raises
    ------
    ReadingMismatch
        Its text names the file; UIDs stay out of the log, which will hold it.
    """
    try:
        found = json.loads(content)["id"] if row.kind == "fhir" else read_identity(content).sop_instance
    except (InvalidImage, ValueError, KeyError, TypeError):
        found = None
    if found != row.sop_instance:
        raise ReadingMismatch(f"{row.path} in the storage folder is not the result that was written there; restore it")


def _hex(status: Dataset) -> str:
    return f"0x{status.Status:04X}" if "Status" in status else "no answer"


class WebSender:
    """STOW-RS, one instance a request, and FHIR by PUT, so that a repeat changes nothing."""

    def __init__(self, destination: Destination, config: Config):
        self._destination, self._storage = destination, Path(config.storage)

    def _headers(self) -> dict[str, str]:
        file = self._destination.token_file
        return {"Authorization": f"Bearer {Path(file).read_text().strip()}"} if file else {}

    def _session(self) -> aiohttp.ClientSession:
        tls = self._destination.tls.client() if self._destination.tls else True
        timeout = aiohttp.ClientTimeout(total=self._destination.timeout_s)
        return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=tls), headers=self._headers())

    async def send(self, batch: Sequence[sa.Row], report: Report) -> None:
        try:
            async with self._session() as session:
                for row in batch:
                    try:
                        content = await asyncio.to_thread((self._storage / row.path).read_bytes)
                        require_result(content, row)
                    except OSError:
                        await asyncio.to_thread(report, row, "refused", UNREADABLE)
                        continue
                    except ReadingMismatch as error:
                        await asyncio.to_thread(report, row, "refused", error.wire())
                        continue
                    one = self._fhir if self._destination.kind == "fhir" else self._stow
                    await asyncio.to_thread(report, row, *await one(session, row, content))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(f"{self._destination.name}: {type(error).__name__}") from None

    async def _stow(self, session: aiohttp.ClientSession, row: sa.Row, content: bytes) -> tuple[str, str]:
        boundary = f"cxr-{secrets.token_hex(16)}"
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Accept": "application/dicom+json",
        }
        body = head + content + f"\r\n--{boundary}--\r\n".encode()
        async with session.post(f"{self._destination.url.rstrip('/')}/studies", data=body, headers=headers) as answer:
            if answer.status not in (200, 202, 409):
                return self._judge(answer.status)
            text = await answer.text()
        return judge_stow(answer.status, text)

    async def _fhir(self, session: aiohttp.ClientSession, row: sa.Row, content: bytes) -> tuple[str, str]:
        url = f"{self._destination.url.rstrip('/')}/DiagnosticReport/{json.loads(content)['id']}"
        async with session.put(url, data=content, headers={"Content-Type": "application/fhir+json"}) as answer:
            return ("stored", "") if answer.status in (200, 201) else self._judge(answer.status)

    def _judge(self, status: int) -> tuple[str, str]:
        """What an HTTP status means that is of the request and not of an instance."""
        if status in (400, 406, 413, 415, 422):
            return "refused", f"HTTP {status}"
        raise Unreachable(f"{self._destination.name} answers HTTP {status}")


def judge_stow(status: int, text: str) -> tuple[str, str]:
    """What a STOW-RS answer means for its one instance."""
    try:
        failed = json.loads(text).get("00081198", {}).get("Value", [])
        reasons = [item.get("00081197", {}).get("Value", [0x0110])[0] for item in failed]
    except (ValueError, AttributeError, TypeError, IndexError):
        reasons = []
    if reasons:
        return judge(int(reasons[0]))
    return ("stored", "") if status != 409 else ("again", "HTTP 409 without a reason")


class Deliverer:
    """Delivers what waits for one destination, until it is told to stop."""

    def __init__(self, destination: Destination, config: Config, store: Store, log: Log, metrics: Metrics):
        self._to, self._store, self._log, self._metrics = destination, store, log, metrics
        if destination.kind == "dicom":
            self._sender = DicomSender(destination, config, self.take_commitment)
        else:
            self._sender = WebSender(destination, config)
        self.wake = asyncio.Event()
        self._failures = 0
        self._untold: list[Callable[[], None]] = []  # outcomes that the queue has not taken yet
        self._is_unsettled = False

    def take_commitment(self, transaction_uid: str, kept: set[str], failed: dict[str, str]) -> None:
        """An answer to storage commitment, from whatever association."""
        done, lost = self._store.committed(transaction_uid, kept, failed)
        self._metrics.commitments.labels("kept").inc(done)
        self._metrics.commitments.labels("failed").inc(lost)
        self._log("info", "commitment", kept=done, failed=lost)

    async def run(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            self.wake.clear()
            try:
                if await self._round():
                    self._failures = 0
                else:
                    await either(stopping, self.wake, POLL_S)
            except Unreachable as error:
                self._failures += 1
                wait_s = self._wait_s(self._failures)
                self._log(
                    "warning", "unreachable", destination=self._to.name, error=str(error), again_s=round(wait_s, 1)
                )
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), wait_s)
            except sqlalchemy.exc.SQLAlchemyError as error:
                self._is_unsettled = True
                self._log("error", "queue_failed", error=type(error).__name__)
                await either(stopping, self.wake, 4 * POLL_S)

    def _tell(self) -> None:
        while self._untold:
            self._untold[0]()
            self._untold.pop(0)

    def _wait_s(self, failures: int) -> float:
        return spread(self._to.retry_s[min(failures, len(self._to.retry_s)) - 1])

    async def _round(self) -> bool:
        """One batch; False when nothing was due."""
        if self._is_unsettled:  # the queue failed in the middle of a batch
            await asyncio.to_thread(self._tell)
            await asyncio.to_thread(self._store.release, self._to.name)
            self._is_unsettled = False
        batch = await asyncio.to_thread(self._store.claim_deliveries, self._to.name, LEASE_S)
        if not batch:
            return await self._ask_commitment() if self._to.commitment else False
        open_ = {row.id: row for row in batch}

        def report(row: sa.Row, outcome: str, text: str) -> None:
            self._metrics.deliveries.labels(self._to.name, outcome).inc()
            level = "info" if outcome == "stored" else "warning"
            sop = self._log.uid(row.sop_instance)
            self._log(level, outcome, destination=self._to.name, job=row.job, sop=sop, kind=row.kind, answer=text)
            open_.pop(row.id)
            if outcome == "stored":
                self._metrics.turnaround_s.labels(self._to.name).observe(time.time() - row.first_at)
                change = functools.partial(self._store.delivered, row.id, final=not self._to.commitment)
            elif outcome == "again" and time.time() < row.created_at + self._to.give_up_s:
                wait_s = self._wait_s(row.attempts + 1)
                change = functools.partial(self._store.postpone, row.id, time.time() + wait_s, text)
            else:
                change = functools.partial(self._store.undeliverable, row.id, text)
            self._untold.append(change)
            self._tell()

        try:
            if self._to.kind == "dicom":
                await asyncio.shield(asyncio.to_thread(self._sender.send, batch, report))
            else:
                await self._sender.send(batch, report)
        except Unreachable as error:
            await asyncio.to_thread(self._give_back, list(open_.values()), str(error))
            raise
        return True

    def _give_back(self, rows: Sequence[sa.Row], why: str) -> None:
        """Results that were not sent, since their destination could not be reached: due at once when it can be."""
        for row in rows:
            if time.time() < row.created_at + self._to.give_up_s:
                self._store.postpone(row.id, row.due_at, why, counts=False)
            else:
                self._store.undeliverable(row.id, why)

    async def _ask_commitment(self) -> bool:
        now = time.time()
        rows = await asyncio.to_thread(self._store.uncommitted, self._to.name, now - self._to.commitment_s)
        late = [row for row in rows if row.created_at + self._to.give_up_s < now]
        for row in late:
            await asyncio.to_thread(self._store.undeliverable, row.id, "storage commitment never came")
        rows = [row for row in rows if row not in late]
        if not rows:
            return False
        transaction_uid = f"2.25.{uuid.uuid4().int}"
        # Written down first: the answer may be here before the request returns.
        await asyncio.to_thread(self._store.asked_commitment, [row.id for row in rows], transaction_uid)
        await asyncio.to_thread(self._sender.ask_commitment, rows, transaction_uid)
        return True
