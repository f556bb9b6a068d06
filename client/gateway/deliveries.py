"""Deliveries of results: who sends which, for how long, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import sqlalchemy as sa

from cxr_triton.client.gateway.database import FREE, Database
from cxr_triton.client.gateway.schema import deliveries, jobs


class Deliveries(Database):
    """The part of the queue that the deliverers see."""

    def claim_deliveries(self, destination: str, lease_s: float, limit: int = 64) -> list[sa.Row]:
        """Take results that are due at a destination; each with the `traceparent` of its job."""
        now = time.time()
        d = deliveries.c
        is_free = sa.or_(d.lease_until.is_(None), d.lease_until < now)
        due = (d.destination == destination) & (d.state == "pending") & (d.due_at <= now) & is_free
        free = sa.select(d.id).where(due).order_by(d.due_at, d.id).limit(limit).with_for_update(skip_locked=True)
        with self._begin() as c:
            ids = c.execute(free).scalars().all()
            if not ids:
                return []
            lease = {"owner": self.gateway, "lease_until": now + lease_s}
            c.execute(sa.update(deliveries).where(d.id.in_(ids)).values(lease))
            rows = sa.select(deliveries, jobs.c.traceparent).join(jobs, jobs.c.id == d.job).where(d.id.in_(ids))
            return list(c.execute(rows.order_by(d.id)))

    def renew_deliveries(self, ids: Collection[int], lease_s: float) -> None:
        """Prolong the leases of results that are being sent, as far as they are still this gateway's."""
        mine = deliveries.c.id.in_(ids) & (deliveries.c.owner == self.gateway)
        with self._begin() as c:
            c.execute(sa.update(deliveries).where(mine).values(lease_until=time.time() + lease_s))

    def release(self, destination: str) -> None:
        """Free what this gateway holds for a destination, when nothing of it is under way."""
        mine = (deliveries.c.destination == destination) & (deliveries.c.owner == self.gateway)
        with self._begin() as c:
            c.execute(sa.update(deliveries).where(mine).values(FREE))

    def delivered(self, delivery: int, *, final: bool) -> None:
        """A destination has a result; not `final` while its commitment is awaited."""
        sent = {"state": "done" if final else "sent", "sent_at": time.time(), "error": None}
        self._end_attempt(delivery, sent, sa.true())  # whoever sent it

    def postpone(self, delivery: int, due_at: float, error: str, *, counts: bool = True) -> None:
        """Try a result again later; an attempt that never reached it does not count."""
        more = {"attempts": deliveries.c.attempts + 1} if counts else {}
        self._end_attempt(delivery, {"state": "pending", "due_at": due_at, "error": error, **more})

    def undeliverable(self, delivery: int, error: str) -> None:
        """A result that never will be there: a dead letter."""
        self._end_attempt(delivery, {"state": "dead", "error": error})

    def _end_attempt(self, delivery: int, values: dict, where=None) -> None:
        if where is None:
            where = deliveries.c.owner.is_(None) | (deliveries.c.owner == self.gateway)
        mine = (deliveries.c.id == delivery) & deliveries.c.state.in_(("pending", "sent")) & where
        with self._begin() as c:
            update = sa.update(deliveries).where(mine).values(FREE | values).returning(deliveries.c.job)
            if (job := c.execute(update).scalar()) is not None:
                self._settle(c, job)

    def uncommitted(self, destination: str, older_than: float) -> list[sa.Row]:
        """Results a destination has, whose commitment was never asked for, or before the time `older_than`."""
        d = deliveries.c
        late = sa.or_(d.transaction_uid.is_(None), d.due_at < older_than)
        where = (d.destination == destination) & (d.state == "sent") & late
        with self._begin() as c:
            return list(c.execute(sa.select(deliveries).where(where).order_by(d.id).limit(500)))

    def asked_commitment(self, ids: Sequence[int], transaction_uid: str) -> None:
        """Write down that the commitment of results is asked for, now."""
        with self._begin() as c:
            asked = {"transaction_uid": transaction_uid, "due_at": time.time()}
            c.execute(sa.update(deliveries).where(deliveries.c.id.in_(ids)).values(asked))

    def committed(self, transaction_uid: str, kept: set[str], failed: dict[str, str]) -> tuple[int, int]:
        """Take an answer: SOP instances the destination keeps, and those it failed, with reasons; how many of each."""
        d = deliveries.c
        open_ = (d.transaction_uid == transaction_uid) & (d.state == "sent")
        with self._begin() as c:
            rows = c.execute(sa.select(d.id, d.job, d.sop_instance).where(open_)).all()
            done = [row.id for row in rows if row.sop_instance in kept]
            lost = [row.id for row in rows if row.sop_instance in failed]
            c.execute(sa.update(deliveries).where(d.id.in_(done)).values(state="done"))
            for row in rows:
                if row.id in lost:
                    again = {"state": "pending", "transaction_uid": None, "due_at": time.time(),
                             "attempts": d.attempts + 1, "error": failed[row.sop_instance]}  # fmt: skip
                    c.execute(sa.update(deliveries).where(d.id == row.id).values(again))
            for job in {row.job for row in rows}:
                self._settle(c, job)
            return len(done), len(lost)
