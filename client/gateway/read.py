"""The worker: grouped studies through a served reader to result files that wait for delivery."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import sqlalchemy as sa
import sqlalchemy.exc
from pydicom import Dataset

from cxr_triton.client.aio import AsyncReader
from cxr_triton.client.gateway.config import Config
from cxr_triton.client.gateway.database import LeaseLost, is_full
from cxr_triton.client.gateway.disk import sync
from cxr_triton.client.gateway.log import Log, Metrics
from cxr_triton.client.gateway.schema import Result
from cxr_triton.client.gateway.store import Store
from cxr_triton.client.gateway.waits import POLL_S, either, spread
from cxr_triton.client.objects.results import diagnostic_report, encoded, result_objects
from cxr_triton.client.objects.source import header_faults, source_header
from cxr_triton.client.objects.study import ObjectOptions
from cxr_triton.client.page import DOCUMENT_PIXELS, Shown, draw
from cxr_triton.client.spans import Span
from cxr_triton.errors import (
    AccessDenied,
    Cancelled,
    CxrError,
    DeadlineExceeded,
    InternalError,
    InvalidConfig,
    InvalidImage,
    InvalidRequest,
    QueueFull,
    ReadingMismatch,
    ServerMismatch,
    Unavailable,
)
from cxr_triton.files import write
from cxr_triton.pixels.dicom import read_identity
from cxr_triton.reading import Reading
from cxr_triton.trace import trace_id_of

PASSING = (AccessDenied, Unavailable, QueueFull, DeadlineExceeded, Cancelled, InternalError, ServerMismatch)
"""Failures of the server rather than of the images: worth another attempt."""
VIEWS = {"lateral": 0, "oblique": 0, "unknown": 1}
"""Rank of a view among those that are read; the frontal ones rank 2."""


def choose(images: Sequence[sa.Row], most: int) -> list[sa.Row]:
    """The images of a study that go into one request.

    Frontal views come before unknown and those before lateral ones, later ones before earlier ones; in the request the
    frontal view taken last stands last, where models look for the current image. An image whose header names another
    part of the body is left out beside a chest; alone it is sent, so that the reader's refusal is kept with the study.
    """
    images = [image for image in images if image.view != "elsewhere"] or images
    ranked = sorted(images, key=lambda image: VIEWS.get(image.view, 2))  # stable: the order taken stays within each
    return ranked[-most:]


class ReadWorker:
    """Reads studies until it is told to stop.

    Parameters
    ----------
    config, store, log, metrics
    on_results : callable
        Called when results wait for delivery.
    find_prior : callable, optional
        Gives the row of at most one earlier image of the patient whose row it takes.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        log: Log,
        metrics: Metrics,
        on_results: Callable[[], None],
        *,
        find_prior: Callable[[sa.Row], list[sa.Row]] | None = None,
    ):
        self._config, self._store, self._log, self._metrics = config, store, log, metrics
        self._on_results, self._find_prior = on_results, find_prior
        self.wake = asyncio.Event()
        self.is_server_ready = False
        self.are_names_known = not self._asked()
        self._was_ready = False
        self._checks_failed = 0
        self._check_at = 0.0
        self._storage = Path(config.storage)

    async def run(self, stopping: asyncio.Event) -> None:
        """Until `stopping` is set; readings under way then have `drain_s`, and are given back after it."""
        settings = self._config.read
        running: dict[asyncio.Task, int] = {}  # job of each attempt

        def ended(attempt: asyncio.Task) -> None:
            running.pop(attempt)
            self.wake.set()

        async with AsyncReader(settings.url, timeouts=settings.timeouts, **vars(settings.access)) as reader:
            while not stopping.is_set():
                self.wake.clear()
                try:
                    job = await self._next(reader, running.values())
                except sqlalchemy.exc.SQLAlchemyError as error:
                    self._log("error", "queue_failed", error=type(error).__name__)
                    await either(stopping, self.wake, 4 * POLL_S)
                    continue
                if job is not None:
                    task = asyncio.create_task(self._read(reader, job))
                    running[task] = job.id
                    task.add_done_callback(ended)
                else:
                    await either(stopping, self.wake, POLL_S)
            if running:
                await asyncio.wait(list(running), timeout=settings.drain_s)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _next(self, reader: AsyncReader, at_work: Collection[int]) -> sa.Row | None:
        """The next study to read, when there is room and a server."""
        await asyncio.to_thread(self._store.group_due)
        if len(at_work) >= self._config.read.concurrency:
            return None
        if not self.is_server_ready:
            if time.monotonic() < self._check_at:
                return None
            try:
                await reader.server_info()
                await self._check_names(reader)
            except CxrError as error:
                if isinstance(error, InvalidConfig):
                    self.are_names_known = False
                    if not self._was_ready:
                        raise
                if not self._checks_failed:
                    self._log("warning", "server_not_ready", error=error.code)
                self._checks_failed += 1
                self._check_at = time.monotonic() + spread(min(2.0 ** min(self._checks_failed, 5) / 4, 5.0))
                return None
            self._log("info", "server_ready")
            self.is_server_ready = self._was_ready = self.are_names_known = True
            self._checks_failed = 0
        return await asyncio.to_thread(self._store.claim_job, self._config.read.lease_s, list(at_work))

    def _asked(self) -> list[tuple[str, str | None]]:
        """Tasks that studies will be asked for, where the file names them or anything beside, with their section."""
        settings, priors = self._config.read, self._config.priors
        asked = [("read", settings.task)] if settings.task or settings.mode or settings.identifiers else []
        return [*asked, ("priors", priors.task)] if priors and priors.task else asked

    async def _check_names(self, reader: AsyncReader) -> None:
        """Ask the server for readings of no image: it refuses them for an unknown name, or else for the image.

        Raises
        ------
        InvalidConfig
            The served profile has no such task, mode or form of identifiers, or the task needs what is not sent.
        """
        settings = self._config.read
        for section, task in self._asked():
            stream = reader.read((), task=task, mode=settings.mode, identifiers=settings.identifiers)
            try:
                async for _ in stream:
                    break  # a task without images
            except InvalidRequest as error:
                if error.message.startswith("REQUEST"):
                    raise InvalidConfig(
                        f"{section}: {settings.url} refuses what it would be asked: {error.message}"
                    ) from None
            finally:
                await stream.close()

    async def _read(self, reader: AsyncReader, job: sa.Row) -> None:
        """One attempt at one job; every way it can end is written into the queue."""
        name, trace = self._log.uid(job.study), trace_id_of(job.traceparent)
        lease = asyncio.create_task(self._keep_lease(job, asyncio.current_task()))
        try:
            facts = {"cxr.job": job.id, "cxr.attempt": job.attempts}
            Span("wait", job.traceparent, attributes=facts, start_s=job.first_at).end()
            with Span("job", job.traceparent, "CONSUMER", facts) as span:
                outcome = await self._attempt(reader, job, span)
                span.set({"cxr.outcome": outcome})
            self._metrics.readings.labels(outcome).inc()
            self._log("info", "read", job=job.id, study=name, outcome=outcome, attempt=job.attempts, trace=trace)
        except LeaseLost:
            self._metrics.readings.labels("lost_lease").inc()
            self._log("warning", "lost_lease", job=job.id, study=name, attempt=job.attempts, trace=trace)
        except asyncio.CancelledError:
            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
                await asyncio.shield(
                    asyncio.to_thread(self._store.put_back, job, time.time(), "the gateway stopped", counts=False)
                )
        except Exception as error:
            await self._failed(job, error)
        finally:
            lease.cancel()

    async def _failed(self, job: sa.Row, error: Exception) -> None:
        """Put a job back for another attempt where that may help, else bury it."""
        settings, name = self._config.read, self._log.uid(job.study)
        if isinstance(error, CxrError):
            code, text, passing = error.code, error.wire(), isinstance(error, PASSING)
        else:  # its text may quote a data set
            code, passing = type(error).__name__, True
            text = f"[INTERNAL] {code}"
        if isinstance(error, AccessDenied | Unavailable | Cancelled | InternalError | ServerMismatch):
            self.is_server_ready = False
        self._metrics.readings.labels(code).inc()
        is_ours = is_full(error) or isinstance(error, sqlalchemy.exc.SQLAlchemyError)
        again = is_ours or (passing and job.attempts < settings.max_attempts)
        trace = trace_id_of(job.traceparent)
        self._log(
            "warning", "not_read", job=job.id, study=name, error=code, attempt=job.attempts, again=again, trace=trace
        )
        if again:
            wait_s = spread(settings.retry_s[min(job.attempts, len(settings.retry_s)) - 1])
            await self._tell(self._store.put_back, job, time.time() + wait_s, text, counts=not is_ours)
        else:
            await self._tell(self._store.bury, job, text)

    async def _tell(self, change: Callable[..., None], *args, **kwargs) -> None:
        """Have the queue change, as soon as it can; the lease is kept until then."""
        while True:
            try:
                return await asyncio.to_thread(change, *args, **kwargs)
            except sqlalchemy.exc.SQLAlchemyError:
                await asyncio.sleep(4 * POLL_S)

    async def _keep_lease(self, job: sa.Row, attempt: asyncio.Task | None) -> None:
        while True:
            await asyncio.sleep(self._config.read.lease_s / 3)
            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
                if not await asyncio.to_thread(self._store.renew, job, self._config.read.lease_s):
                    # Dropped by an operator, or taken by another gateway.
                    name, trace = self._log.uid(job.study), trace_id_of(job.traceparent)
                    self._log("warning", "lost_lease", job=job.id, study=name, attempt=job.attempts, trace=trace)
                    if attempt:
                        attempt.cancel()
                    return

    async def _attempt(self, reader: AsyncReader, job: sa.Row, span: Span) -> str:
        settings = self._config.read
        images = await asyncio.to_thread(self._store.inputs, job.id)
        if len({image.patient for image in images}) > 1:
            raise InvalidRequest("images of several Patient IDs have the same Study Instance UID; correct the study")
        priors = await asyncio.to_thread(self._find_prior, images[-1]) if self._find_prior else []
        chosen = [*priors, *choose(images, settings.max_images - len(priors))]
        same = await asyncio.to_thread(self._store.start_reading, job, [image.id for image in chosen])
        if same is not None:
            await asyncio.to_thread(self._store.finish, job, f"reads the same images as job {same}")
            return "same_images"
        files = await asyncio.to_thread(lambda: [self._file(image) for image in chosen])
        task = settings.task
        if priors and self._config.priors:
            task = self._config.priors.task or task
        started = time.monotonic()
        place, mode, identifiers = str(span.place), settings.mode, settings.identifiers
        stream = reader.read(files, task=task, mode=mode, identifiers=identifiers, traceparent=place)
        reading = await stream.result()
        del files
        reading_s = time.monotonic() - started
        self._metrics.reading_s.observe(reading_s)
        results = await asyncio.to_thread(self._write, job, chosen, reading)
        destinations = {
            d.name: {"fhir"} if d.kind == "fhir" else set(self._config.results.kinds) for d in self._config.destinations
        }
        await self._tell(self._store.deliver, job, results, destinations, reading_s)
        self._on_results()
        return reading.status

    def _file(self, image: sa.Row) -> bytes:
        """An object's file, which has to be of the image that came in."""
        data = (self._storage / image.path).read_bytes()
        found = read_identity(data)
        if (found.study, found.series, found.sop_instance) != (image.study, image.series, image.sop_instance):
            raise ReadingMismatch(
                f"{image.path} in the storage folder is SOP instance {found.sop_instance} of study {found.study}, "
                f"received was {image.sop_instance} of {image.study}; restore the folder, or send the image again"
            )
        return data

    def _write(self, job: sa.Row, chosen: Sequence[sa.Row], reading: Reading) -> list[Result]:
        """Result files of a reading, on the disk for good."""
        content = json.loads(reading.to_json())
        sources = [source_header(self._storage / image.path) for image in chosen]
        for image, source in zip(chosen, sources, strict=True):
            if faults := header_faults(source):
                self._log("warning", "header_faults", job=job.id, sop=self._log.uid(image.sop_instance), faults=faults)
        options = ObjectOptions(
            # A time that is the same at every attempt, so that the objects are.
            made_at=datetime.datetime.fromtimestamp(job.first_at).astimezone(),
            digests=tuple(image.digest for image in chosen),
            station=self._config.own_aet,
            unchecked_reading=self._config.read.unchecked_reading,
        )
        pictures = self._pictures(job, chosen, reading) if "pdf" in self._config.results.kinds else []
        folder = self._storage / "results" / f"{job.id}-{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        try:
            return self._write_to(folder, content, sources, pictures, options)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _pictures(self, job: sa.Row, chosen: Sequence[sa.Row], reading: Reading) -> list[Shown]:
        """Of the images, for the PDF; none where one that the server could read cannot be read here."""
        files = [self._file(image) for image in chosen]
        unchecked_reading = self._config.read.unchecked_reading
        try:
            return draw(files, reading, max_pixels=DOCUMENT_PIXELS, unchecked_reading=unchecked_reading)
        except InvalidImage as error:
            self._log("warning", "no_pictures", job=job.id, error=error.code)
            return []

    def _write_to(
        self, folder: Path, content: dict, sources: list[Dataset], pictures: list[Shown], options: ObjectOptions
    ) -> list[Result]:
        results: list[Result] = []
        place = folder.relative_to(self._storage)
        for kind in self._config.results.kinds:
            for instance in result_objects(content, sources, kinds=(kind,), pictures=pictures, options=options):
                name = f"{len(results)}-{kind}.dcm"
                write(folder / name, encoded(instance))
                uids = {"sop_class": str(instance.SOPClassUID), "sop_instance": str(instance.SOPInstanceUID)}
                results.append(Result(kind=kind, path=str(place / name), **uids))
        if any(destination.kind == "fhir" for destination in self._config.destinations):
            report = diagnostic_report(content, sources, options=options)
            write(folder / "report.json", json.dumps(report, ensure_ascii=False))
            path, uid = str(place / "report.json"), str(report["id"])[:64]
            results.append(Result(kind="fhir", path=path, sop_class="", sop_instance=uid))
        sync(folder)
        sync(folder.parent)
        return results
