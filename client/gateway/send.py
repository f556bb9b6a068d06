"""The ways out: C-STORE, STOW-RS and FHIR; what an answer means for a result."""

from __future__ import annotations

import asyncio
import io
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import sqlalchemy as sa
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pynetdicom.association import Association

from cxr_triton.client.gateway.association import associate
from cxr_triton.client.gateway.config import Config, Destination, Unreachable
from cxr_triton.client.gateway.dimse import STORED, UNCOMPRESSED, is_permanent
from cxr_triton.client.gateway.http import WebClient, web_client
from cxr_triton.errors import InvalidImage, ReadingMismatch
from cxr_triton.pixels.dicom import read_identity

UNREADABLE = "its file in the storage folder cannot be read"

MIB = 1 << 20
"""Most that an answer says beyond what was sent."""

Report = Callable[[sa.Row, str, str], None]


class Refused(Exception):
    """Why a result will never be at its destination."""


class Sender:
    """Sends results to one destination.

    Parameters
    ----------
    destination : Destination
    config : Config
    """

    def __init__(self, destination: Destination, config: Config):
        self._to, self._storage, self._aet = destination, Path(config.storage), config.own_aet

    async def send(self, batch: Sequence[sa.Row], report: Report) -> None:
        """Send results, and report each as soon as its answer is there: ``stored``, ``again`` or ``refused``.

        Raises
        ------
        Unreachable
            What was not reported was not sent.
        """
        raise NotImplementedError

    def _content(self, row: sa.Row) -> bytes:
        try:
            content = (self._storage / row.path).read_bytes()
            require_result(content, row)
        except OSError:
            raise Refused(UNREADABLE) from None
        except ReadingMismatch as error:
            raise Refused(error.wire()) from None
        return content


class DicomSender(Sender):
    """C-STORE SCU; a batch goes over one association."""

    async def send(self, batch: Sequence[sa.Row], report: Report) -> None:
        """See `Sender.send`; what is under way goes on when the task is cancelled."""
        await asyncio.shield(asyncio.to_thread(self._send, batch, report))

    def _send(self, batch: Sequence[sa.Row], report: Report) -> None:
        with associate(self._to, self._aet, {row.sop_class: UNCOMPRESSED for row in batch}) as association:
            for row in batch:
                try:
                    status = self._store(association, row)
                except Refused as error:
                    report(row, "refused", str(error))
                    continue
                if "Status" not in status:
                    report(row, "again", "the association ended before an answer came")
                    raise Unreachable(f"{self._to.name} ended the association or did not answer in time")
                report(row, *judge(status.Status))

    def _store(self, association: Association, row: sa.Row) -> Dataset:
        try:
            result = dcmread(io.BytesIO(self._content(row)))
        except InvalidDicomError:
            raise Refused(UNREADABLE) from None
        try:
            return association.send_c_store(result)
        except ValueError:
            raise Refused("no presentation context was accepted for its SOP class") from None
        except RuntimeError:
            raise Unreachable(f"{self._to.name} ended the association") from None


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


class WebSender(Sender):
    """STOW-RS, one instance a request, and FHIR by PUT, so that a repeat changes nothing."""

    async def send(self, batch: Sequence[sa.Row], report: Report) -> None:
        """See `Sender.send`."""
        one = self._fhir if self._to.kind == "fhir" else self._stow
        async with web_client(self._to, self._to.name, self._to.timeout_s) as client:
            for row in batch:
                try:
                    answer = await one(client, await asyncio.to_thread(self._content, row))
                except Refused as error:
                    answer = "refused", str(error)
                await asyncio.to_thread(report, row, *answer)

    async def _stow(self, client: WebClient, content: bytes) -> tuple[str, str]:
        boundary = f"cxr-{secrets.token_hex(16)}"
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Accept": "application/dicom+json",
        }
        body = head + content + f"\r\n--{boundary}--\r\n".encode()
        answer = await client.ask("POST", "studies", limit=MIB, data=body, headers=headers)
        if answer.status not in (200, 202, 409):
            return self._judge(answer.status)
        return judge_stow(answer.status, answer.body.decode("utf-8", "replace"))

    async def _fhir(self, client: WebClient, content: bytes) -> tuple[str, str]:
        path, headers = f"DiagnosticReport/{json.loads(content)['id']}", {"Content-Type": "application/fhir+json"}
        answer = await client.ask("PUT", path, limit=len(content) + MIB, data=content, headers=headers)
        return ("stored", "") if answer.status in (200, 201) else self._judge(answer.status)

    def _judge(self, status: int) -> tuple[str, str]:
        """What an HTTP status means that is of the request and not of an instance."""
        if status in (400, 406, 413, 415, 422):
            return "refused", f"HTTP {status}"
        raise Unreachable(f"{self._to.name} answers HTTP {status}")


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
