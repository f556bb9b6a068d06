"""Each result's way to each destination: leased, sent, written down, tried again, committed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import uuid
from collections.abc import Callable, Collection, Sequence

import sqlalchemy as sa
import sqlalchemy.exc

from cxr_triton.client.gateway.commitment import ask_commitment
from cxr_triton.client.gateway.config import Config, Destination, Unreachable
from cxr_triton.client.gateway.log import Log, Metrics
from cxr_triton.client.gateway.send import DicomSender, WebSender
from cxr_triton.client.gateway.store import Store
from cxr_triton.client.gateway.waits import POLL_S, either, spread
from cxr_triton.client.spans import Span
from cxr_triton.trace import trace_id_of

LEASE_S = 300.0
RENEW_S = LEASE_S / 3
"""A batch may take longer than one lease: a destination has `timeout_s` for each result."""


class Deliverer:
    """Delivers what waits for one destination, until it is told to stop."""

    def __init__(self, destination: Destination, config: Config, store: Store, log: Log, metrics: Metrics):
        self._to, self._store, self._log, self._metrics = destination, store, log, metrics
        self._aet = config.own_aet
        self._sender = (DicomSender if destination.kind == "dicom" else WebSender)(destination, config)
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
        """Until `stopping` is set; what is not sent then stays in the queue."""
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
        sent_s = [time.time()]

        def report(row: sa.Row, outcome: str, text: str) -> None:
            self._metrics.deliveries.labels(self._to.name, outcome).inc()
            level = "info" if outcome == "stored" else "warning"
            sop, trace = self._log.uid(row.sop_instance), trace_id_of(row.traceparent)
            self._log(
                level, outcome, destination=self._to.name, job=row.job, sop=sop, kind=row.kind, answer=text, trace=trace
            )
            facts = {"cxr.job": row.job, "cxr.destination": self._to.name, "cxr.kind": row.kind, "cxr.outcome": outcome}
            Span("deliver", row.traceparent, "PRODUCER", facts, start_s=sent_s.pop()).end()
            sent_s.append(time.time())  # of the next one: they go one after the other
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

        leases = asyncio.create_task(self._keep_leases(open_))
        try:
            await self._sender.send(batch, report)
        except Unreachable as error:
            await asyncio.to_thread(self._give_back, list(open_.values()), str(error))
            raise
        finally:
            leases.cancel()
        return True

    async def _keep_leases(self, open_: Collection[int]) -> None:
        """Prolong the leases of what is not reported yet, however long its destination takes."""
        while True:
            await asyncio.sleep(RENEW_S)
            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
                await asyncio.to_thread(self._store.renew_deliveries, list(open_), LEASE_S)

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
        await asyncio.to_thread(ask_commitment, self._to, self._aet, rows, transaction_uid, self.take_commitment)
        return True
