"""The patient's last earlier radiograph, from a PACS (C-FIND, C-GET) or a DICOMweb server (QIDO-RS, WADO-RS)."""

from __future__ import annotations

import abc
import asyncio
import datetime
import json
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import sqlalchemy as sa
import sqlalchemy.exc
from pydicom import Dataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    SecondaryCaptureImageStorage,
)
from pynetdicom import build_role, evt

from cxr_triton.client.gateway.association import MOST_ANSWERED, associate, whole_request
from cxr_triton.client.gateway.config import Priors, Unreachable
from cxr_triton.client.gateway.dimse import (
    OUT_OF_RESOURCES,
    PENDING,
    STUDY_ROOT_FIND,
    STUDY_ROOT_GET,
    SUCCESS,
    UNCOMPRESSED,
)
from cxr_triton.client.gateway.http import Answer, first_part, web_client
from cxr_triton.client.gateway.intake import MIB, IncomingFile, Intake
from cxr_triton.client.gateway.read import choose
from cxr_triton.client.gateway.store import Store
from cxr_triton.client.objects.source import item, source_header
from cxr_triton.errors import InvalidImage, QueueFull, Unavailable
from cxr_triton.pixels.codestream import TRANSFER_SYNTAXES

MODALITIES = ("CR", "DX")
MOST_STUDIES = 5
"""Earlier studies that are looked into, the last first."""
MOST_IMAGES = 32
"""Images that are fetched of a series, and series of a study."""
MOST_MATCHES = 1000
"""Matches of a C-FIND."""
_UID = re.compile(r"[0-9.]{1,64}")
IMAGES = (ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation, SecondaryCaptureImageStorage)


class PriorFinder(abc.ABC):
    """Finds and fetches; what it fetches is filed as a prior and makes no job.

    A prior is only taken when the server says that it is of the same Patient ID, and its own header does.
    """

    def __init__(self, settings: Priors, store: Store, intake: Intake):
        self._settings, self._store, self._intake = settings, store, intake
        self._storage, self._aet = Path(intake.config.storage), intake.config.own_aet

    def fetch(self, current: sa.Row) -> list[sa.Row]:
        """The row of at most one earlier image.

        Raises
        ------
        Unavailable
            The PACS cannot be reached or does not answer as it should: the study is read later rather than without.
        """
        header = source_header(self._storage / current.path)
        patient, date = str(header.get("PatientID") or ""), str(header.get("StudyDate") or "")
        if not patient or set(patient) & set("*?\\"):  # they would match other patients
            return []
        until = _date(date) or datetime.date.today()
        since = until - datetime.timedelta(days=self._settings.max_age_days)
        between = f"{since:%Y%m%d}-{until:%Y%m%d}"
        try:
            for study, series in self._series_of(patient, between, str(header.StudyInstanceUID), date):
                found = [self._store.object_of(sop_instance) for sop_instance in self._bring(study, series)]
                rows = [row for row in found if row and row.kind in ("prior", "image")]
                rows = [row for row in rows if row.patient == current.patient]
                if rows:
                    return choose(sorted(rows, key=lambda row: (row.taken, row.number)), 1)
        except Unreachable as error:
            raise Unavailable(f"priors: {error}; the study waits, see read.retry_s") from None
        return []

    def _series_of(self, patient: str, between: str, current: str, date: str) -> Iterator[tuple[str, str]]:
        """Study and series of earlier radiographs, the last study first."""
        found = [s for s in self._studies(patient, between) if str(s.get("PatientID", "")) == patient]
        for study in _earlier([s for s in found if _uid(s, "StudyInstanceUID")], current, date):
            uid = _uid(study, "StudyInstanceUID")
            ours = [s for s in self._series(uid) if s.get("Modality") in MODALITIES]
            for series in [found for found in (_uid(s, "SeriesInstanceUID") for s in ours) if found][:MOST_IMAGES]:
                yield uid, series

    @abc.abstractmethod
    def _studies(self, patient: str, between: str) -> Sequence[Dataset]:
        """Answers about a patient's studies of a range of dates."""

    @abc.abstractmethod
    def _series(self, study: str) -> Sequence[Dataset]:
        """Answers about the series of a study."""

    @abc.abstractmethod
    def _bring(self, study: str, series: str) -> list[str]:
        """Fetch a series; the SOP Instance UIDs of what was taken in."""

    def _take(self, file: IncomingFile, source: str) -> str | None:
        try:
            return self._intake.take(file, "prior", source, is_prior=True).sop_instance
        except InvalidImage:
            return None


class PacsFinder(PriorFinder):
    """By C-FIND and C-GET."""

    def _studies(self, patient: str, between: str) -> list[Dataset]:
        query = {"PatientID": patient, "StudyDate": between, "StudyInstanceUID": "", "StudyTime": ""}
        return self._find("STUDY", query)

    def _series(self, study: str) -> list[Dataset]:
        return self._find("SERIES", {"StudyInstanceUID": study, "SeriesInstanceUID": "", "Modality": ""})

    def _find(self, level: str, query: dict[str, str]) -> list[Dataset]:
        identifier = item(QueryRetrieveLevel=level, **query)
        found: list[Dataset] = []
        ends = time.monotonic() + self._settings.total_s
        with associate(self._settings, self._aet, {STUDY_ROOT_FIND: UNCOMPRESSED}) as association:
            try:
                for status, answer in association.send_c_find(identifier, STUDY_ROOT_FIND):
                    if len(found) >= MOST_MATCHES or time.monotonic() > ends:
                        association.abort()
                        raise Unreachable(f"C-FIND came to no end within {len(found)} matches")
                    if status.get("Status") in PENDING and answer is not None:
                        found.append(answer)
                    elif status.get("Status") != SUCCESS:
                        raise Unreachable(f"C-FIND ended with status {status.get('Status', 'none')}")
            except (ValueError, RuntimeError) as error:
                raise Unreachable(f"C-FIND: {type(error).__name__}") from None
        return found

    def _bring(self, study: str, series: str) -> list[str]:
        taken: list[str] = []
        failed: list[Exception] = []
        ends = time.monotonic() + self._settings.total_s
        called, _ = self._settings.pacs

        def on_store(event: evt.Event) -> int:
            file = whole_request(event)._dataset_file
            is_late = time.monotonic() > ends
            if is_late:
                event.assoc.abort()  # or objects would come without end, and no answer to the C-GET
            if is_late or len(taken) >= MOST_IMAGES:
                with file:
                    return OUT_OF_RESOURCES
            try:
                if sop_instance := self._take(file, called):
                    taken.append(sop_instance)
            except (QueueFull, OSError, sqlalchemy.exc.SQLAlchemyError) as error:
                failed.append(error)  # pynetdicom would keep it from `fetch`
                return OUT_OF_RESOURCES
            return SUCCESS

        identifier = item(QueryRetrieveLevel="SERIES", StudyInstanceUID=study, SeriesInstanceUID=series)
        self._get(identifier, on_store, ends)
        if failed:
            raise failed[0]
        return taken

    def _get(self, identifier: Dataset, on_store: Callable[[evt.Event], int], ends: float) -> None:
        contexts: dict[str, Sequence[str]] = {
            STUDY_ROOT_GET: UNCOMPRESSED,
            **dict.fromkeys(IMAGES, tuple(TRANSFER_SYNTAXES)),
        }
        roles = [build_role(sop_class, scp_role=True) for sop_class in IMAGES]
        handlers = [(evt.EVT_C_STORE, on_store)]
        with associate(self._settings, self._aet, contexts, handlers, roles, max_bytes=1 << 28) as association:
            try:
                for status, _ in association.send_c_get(identifier, STUDY_ROOT_GET):
                    if time.monotonic() > ends:
                        association.abort()
                        raise Unreachable("C-GET came to no end")
                    if status.get("Status") not in (*PENDING, SUCCESS, 0xB000):
                        raise Unreachable(f"C-GET ended with status {status.get('Status', 'none')}")
            except (ValueError, RuntimeError) as error:
                raise Unreachable(f"C-GET: {type(error).__name__}") from None


class WebFinder(PriorFinder):
    """By QIDO-RS and WADO-RS."""

    def _studies(self, patient: str, between: str) -> list[Dataset]:
        query = {"PatientID": patient, "StudyDate": between, "includefield": "00100020"}
        return self._qido(f"studies?{urllib.parse.urlencode(query)}")

    def _series(self, study: str) -> list[Dataset]:
        return self._qido(f"studies/{study}/series?includefield=00080060")

    def _bring(self, study: str, series: str) -> list[str]:
        taken = []
        found = self._qido(f"studies/{study}/series/{series}/instances")
        for instance in [uid for uid in (_uid(one, "SOPInstanceUID") for one in found) if uid][:MOST_IMAGES]:
            path = f"studies/{study}/series/{series}/instances/{instance}"
            accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
            kind, body = self._ask(path, accept, self._intake.max_bytes + MIB)
            with self._intake.new_file() as file:
                file.write(first_part(kind, body))
                if sop_instance := self._take(file, "dicomweb"):
                    taken.append(sop_instance)
        return taken

    def _qido(self, path: str) -> list[Dataset]:
        _, body = self._ask(path, "application/dicom+json", MOST_ANSWERED)
        try:
            answers = json.loads(body or b"[]")
        except (ValueError, RecursionError):
            raise Unreachable("QIDO-RS answered no JSON") from None
        try:
            return [Dataset.from_json(answer) for answer in answers]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise Unreachable("QIDO-RS answered what is not the DICOM JSON model") from None

    def _ask(self, path: str, accept: str, limit: int) -> tuple[str, bytes]:
        async def ask() -> Answer:
            async with web_client(self._settings, "DICOMweb", self._settings.total_s) as client:
                return await client.ask("GET", path, limit=limit, headers={"Accept": accept})

        answer = asyncio.run(ask())  # `fetch` has a thread of its own
        if answer.status == 204:
            return "", b""
        if answer.status != 200:
            raise Unreachable(f"DICOMweb answers HTTP {answer.status}")
        return answer.kind, answer.body


def _earlier(studies: list[Dataset], current: str, date: str) -> list[Dataset]:
    """Studies other than the current one that are not later, the last first."""
    others = [s for s in studies if str(s.StudyInstanceUID) != current]
    others = [s for s in others if not date or str(s.get("StudyDate") or "") <= date]
    others.sort(key=lambda s: (str(s.get("StudyDate") or ""), str(s.get("StudyTime") or "")), reverse=True)
    return others[:MOST_STUDIES]


def _uid(answer: Dataset, name: str) -> str:
    """A UID of an answer, empty where it is none: it becomes part of an address."""
    uid = str(answer.get(name) or "")
    return uid if _UID.fullmatch(uid) else ""


def _date(text: str) -> datetime.date | None:
    try:
        return datetime.datetime.strptime(text, "%Y%m%d").date()
    except ValueError:
        return None
