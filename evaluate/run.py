"""An evaluation: a data set's cases, read by a server, as rows; it goes on where it was stopped."""

from __future__ import annotations

import asyncio
import dataclasses
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_triton import __version__
from cxr_triton.client import AsyncReader, Timeouts
from cxr_triton.client.limits import NO_ACCESS, Access
from cxr_triton.errors import AccessDenied, CxrError, QueueFull, ServerMismatch, Unavailable
from cxr_triton.evaluate.adapters import format_of
from cxr_triton.evaluate.asking import Questions
from cxr_triton.evaluate.config import Data
from cxr_triton.evaluate.dataset import Case, DataSet, prepare
from cxr_triton.evaluate.journal import JOURNAL, Journal, is_begun, is_complete, work_folder
from cxr_triton.evaluate.rows import BAD_TRUTH, MISSING_FILE, Header, Row
from cxr_triton.evaluate.stored import Archive
from cxr_triton.files import locked
from cxr_triton.identity import sha256
from cxr_triton.reading import Reading

RETRY_S = 0.5
"""Between two attempts at a server whose queue is full."""
Told = Callable[[Row], None]


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where readings come from.

    Attributes
    ----------
    url : str
        gRPC endpoint; of an archive its folder, for messages.
    concurrency : int
        Studies under way at once.
    timeout_s : float
        Limit of one reading, and of waiting for a full queue.
    access : Access
        How it lets a client in.
    archive : Path, optional
        What `cxr-triton archive` wrote; its readings are taken, and no server is asked.
    """

    url: str
    concurrency: int = 4
    timeout_s: float = 600.0
    access: Access = NO_ACCESS
    archive: Path | None = None

    def reader(self) -> AsyncReader | Archive:
        """A client of it."""
        if self.archive:
            return Archive(self.archive)
        timeouts = Timeouts(first_delta_s=None, idle_s=None, total_s=self.timeout_s)
        return AsyncReader(self.url, timeouts=timeouts, **vars(self.access))


@dataclass(frozen=True)
class Evaluation:
    """A data set that is ready to be asked, and the result that it becomes; see `opened`."""

    out: Path
    dataset: DataSet
    questions: Questions
    header: Header
    is_complete: bool

    def run(self, server: Server, tell: Told = lambda row: None, resumed: Callable[[int], None] = lambda n: None):
        """Ask what is not there yet, and write the result.

        Parameters
        ----------
        server : Server
        tell : callable
            Given each row as it comes.
        resumed : callable
            Given the number of rows that earlier runs left.

        Returns
        -------
        Header
            As written.

        Raises
        ------
        Unavailable
            No server, or none any more. What came until then stays; another run goes on with it.
        ServerMismatch
            The server reads with another model than the rows that are there.
        """
        journal = Journal(self.out, self.header)
        resumed(journal.done)
        with journal:
            if journal.done < len(self.dataset):
                asyncio.run(_Run(self, server, journal, tell).through())
        return journal.finish()


@contextmanager
def opened(data: Data, out: Path, *, restart: bool = False) -> Iterator[Evaluation]:
    """Prepare the evaluation of a data set as `out`.

    Raises
    ------
    InvalidRequest
        As `prepare` and `Journal` raise it; or another process has it open.
    """
    work = work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    with locked(work / ".lock", f"{out}: another evaluation writes it; wait for that one, or give another -o"):
        if restart:
            for path in (work / JOURNAL, out):
                path.unlink(missing_ok=True)
        try:
            dataset = prepare(data, work / "cases.jsonl")
            questions = Questions(dataset.data, dataset.labels)
            header = _header(dataset, questions)
            yield Evaluation(out, dataset, questions, header, is_complete(out, header))
        finally:
            if not is_begun(out):
                shutil.rmtree(work, ignore_errors=True)


def _header(dataset: DataSet, questions: Questions) -> Header:
    data = dataset.data
    is_of_labels = data.kind == "labels"
    return Header(
        kind=data.kind,
        data=dataset.facts(),
        labels=dataset.labels if is_of_labels else (),
        uncertain=data.uncertain,
        blank="zeros" if format_of(data.format).complete else data.blank,
        readers=data.readers if is_of_labels else None,
        mapping=dataset.mapping if is_of_labels else {},
        counted=dataset.counted,
        request=questions.request,
        seed=data.seed,
        versions={"cxr-triton": __version__, "python": platform.python_version()},
    )


class _Run:
    """One run over the cases that have no row yet."""

    def __init__(self, evaluation: Evaluation, server: Server, journal: Journal, tell: Told):
        self._evaluation, self._server, self._journal, self._tell = evaluation, server, journal, tell
        self._began_s = time.monotonic()
        self._cases = (case for case in evaluation.dataset if case.row.number not in journal)
        self._slots = asyncio.Semaphore(server.concurrency)

    async def through(self) -> None:
        """Ask everything; what ends one worker ends all."""
        async with self._server.reader() as reader:
            info = await reader.server_info()
            self._versions = {info.name: info.version}
            try:
                async with asyncio.TaskGroup() as group:
                    # One more each, which reads files and writes rows while the others wait for the server.
                    for _ in range(2 * self._server.concurrency):
                        group.create_task(self._work(reader))
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None

    async def _work(self, reader: AsyncReader | Archive) -> None:
        for case in self._cases:
            row, pictures = await self._row(reader, case)
            self._journal.add(row, pictures, time.monotonic() - self._began_s)
            self._tell(row)

    async def _row(self, reader: AsyncReader | Archive, case: Case) -> tuple[Row, list[str]]:
        """The case's row, and the digests of its pictures."""
        if case.fault:
            return _failed(case, BAD_TRUTH, case.fault), []
        try:
            folder = self._evaluation.dataset.data.folder
            images = await asyncio.to_thread(lambda: [(folder / path).read_bytes() for path in case.row.images])
        except OSError as error:
            return _failed(case, MISSING_FILE, f"{error.filename}: {error.strerror}"), []
        pictures = [sha256(image) for image in images]
        async with self._slots:
            asked_s = time.monotonic()
            try:
                readings = [await self._read(reader, images, asked) for asked in self._evaluation.questions.of(case)]
            except (AccessDenied, Unavailable, ServerMismatch):
                raise
            except CxrError as error:
                return _failed(case, error.code, error.message), pictures
            asked_ms = 1e3 * (time.monotonic() - asked_s)
        return self._evaluation.questions.row(case, readings, asked_ms), pictures

    async def _read(self, reader: AsyncReader | Archive, images: list[bytes], asked: dict[str, Any]) -> Reading:
        """A reading, asked again while the server's queue is full."""
        ends_s = time.monotonic() + self._server.timeout_s
        while True:
            try:
                reading = await reader.read(images, **asked).result()
            except QueueFull:
                if time.monotonic() > ends_s:
                    raise
                await asyncio.sleep(RETRY_S)
                continue
            self._know(reading)
            return reading

    def _know(self, reading: Reading) -> None:
        """Hold every reading to the model of the first."""
        journal = self._journal
        if not journal.model:
            journal.knows(reading.model, {"sent": reading.prompt, "notice": reading.notice, "versions": self._versions})
        elif reading.model != journal.model:
            differing = sorted(k for k in reading.model | journal.model if reading.model.get(k) != journal.model.get(k))
            raise ServerMismatch(
                f"{self._server.url}: reads with another model ({', '.join(differing)}) than the rows that are there; "
                "go on with that one, or begin anew with --restart"
            )


def _failed(case: Case, code: str, said: str) -> Row:
    return dataclasses.replace(case.row, status="error", code=code, said=said)


def counts(rows: Iterator[Row]) -> dict[str, int]:
    """Rows by status, and those that are not ok by code, in one pass."""
    counted: Counter[str] = Counter()
    for row in rows:
        counted[row.status] += 1
        if row.code:
            counted[row.code] += 1
    return dict(counted)
