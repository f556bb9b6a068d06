"""Jobs: received objects gathered into studies, each claimed and read by one gateway at a time."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from cxr_triton.client.gateway.database import FREE, Database, LeaseLost
from cxr_triton.client.gateway.schema import AS_TAKEN, Received, Result, deliveries, jobs, objects


class Jobs(Database):
    """The part of the queue that the ways in and the reader see."""

    def add(self, received: Received, quiet_s: float, max_wait_s: float, traceparent: str = "") -> str:
        """Queue an object whose file is on the disk; where it opens a job, `traceparent` is what that belongs to.

        Returns
        -------
        str
            Its kind; or ``duplicate`` when the same bytes of this SOP instance are there already, or ``conflict`` when
            other bytes are, which keep their place: the new ones are stored and flagged, and not read.

        Raises
        ------
        CommitInDoubt
            It may be queued.
        sqlalchemy.exc.SQLAlchemyError
            It is not.
        """
        now = time.time()
        with self._begin() as c:
            if not self._is_sqlite:
                # Two objects of one instance UID that come at once would else not see one another.
                key = sa.func.hashtextextended(received.sop_instance, 0)
                c.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
            same = c.execute(
                sa.select(objects.c.digest, objects.c.kind).where(objects.c.sop_instance == received.sop_instance)
            ).all()
            if received.digest in {row.digest for row in same if row.kind != "prior" or received.kind == "prior"}:
                return "duplicate"
            if received.digest in {row.digest for row in same}:  # fetched as a prior before, now sent to be read
                c.execute(sa.update(objects).where(objects.c.digest == received.digest).values(kind=received.kind))
                kind = received.kind
            else:
                kind = "conflict" if same else received.kind
                c.execute(sa.insert(objects).values({**vars(received), "kind": kind, "received_at": now}))
            if kind == "image":
                waits = {"quiet_s": quiet_s, "max_wait_s": max_wait_s}
                self._gather(c, received.study, now, traceparent=traceparent, **waits)
            return kind

    def _gather(
        self, c: sa.Connection, study: str, now: float, *, quiet_s: float, max_wait_s: float, traceparent: str
    ) -> None:
        """Put a new image into the study's open job, or open one."""
        latest = jobs.c.first_at + max_wait_s
        due = sa.case((latest < now + quiet_s, latest), else_=now + quiet_s)
        is_open = (jobs.c.study == study) & (jobs.c.state == "received")
        for _ in range(2):
            if c.execute(sa.update(jobs).where(is_open).values(due_at=due, changed_at=now)).rowcount:
                return
            values = {"study": study, "state": "received", "first_at": now, "changed_at": now, "attempts": 0}
            values |= {"due_at": now + min(quiet_s, max_wait_s), "traceparent": traceparent}
            insert = self._insert(jobs).values(values).on_conflict_do_nothing().returning(jobs.c.id)
            if (job := c.execute(insert).scalar()) is not None:
                self._note(c, job, "received", "")
                return

    def inputs(self, job: int) -> list[sa.Row]:
        """The images of a job, in the order taken."""
        with self._begin() as c:
            ids = c.execute(sa.select(jobs.c.inputs).where(jobs.c.id == job)).scalar() or []
            return list(c.execute(sa.select(objects).where(objects.c.id.in_(ids)).order_by(*AS_TAKEN)))

    def object_of(self, sop_instance: str) -> sa.Row | None:
        """The first object that came with a SOP Instance UID."""
        mine = (objects.c.sop_instance == sop_instance) & (objects.c.kind != "conflict")
        with self._begin() as c:
            return c.execute(sa.select(objects).where(mine).order_by(objects.c.id)).first()

    def group_due(self) -> int:
        """Close the studies that are complete; how many."""
        now = time.time()
        with self._begin() as c:
            due = (jobs.c.state == "received") & (jobs.c.due_at <= now)
            closed = c.execute(sa.select(jobs.c.id, jobs.c.study).where(due).with_for_update(skip_locked=True)).all()
            for job, study in closed:
                images = (objects.c.study == study) & (objects.c.kind == "image")
                inputs = c.execute(sa.select(objects.c.id).where(images).order_by(*AS_TAKEN)).scalars().all()
                self._move(c, job, "grouped", f"{len(inputs)} images", inputs=list(inputs), due_at=now)
            return len(closed)

    def claim_job(self, lease_s: float, at_work: Collection[int] = ()) -> sa.Row | None:
        """Take the grouped job that has waited longest, or one whose reader has not been heard of.

        Parameters
        ----------
        lease_s : float
        at_work : collection of int
            Jobs that this gateway still works on, whatever became of their leases: none of these.

        Returns
        -------
        sqlalchemy.Row or None
            The claim, which the methods that change the job want.
        """
        now = time.time()
        is_free = (jobs.c.state == "grouped") & (jobs.c.due_at <= now)
        is_lost = (jobs.c.state == "reading") & (jobs.c.lease_until < now)
        wanted = (is_free | is_lost) & jobs.c.id.not_in(at_work)
        free = sa.select(jobs.c.id).where(wanted).order_by(jobs.c.due_at, jobs.c.id).limit(1)
        with self._begin() as c:
            job = c.execute(free.with_for_update(skip_locked=True)).scalar()
            if job is None:
                return None
            self._move(c, job, "reading", "", owner=self.gateway, lease_until=now + lease_s,
                       attempts=jobs.c.attempts + 1, generation=jobs.c.generation + 1)  # fmt: skip
            return c.execute(sa.select(jobs).where(jobs.c.id == job)).one()

    def renew(self, claim: sa.Row, lease_s: float) -> bool:
        """Prolong a lease; False when it is another's now."""
        mine = self._mine(claim)
        with self._begin() as c:
            return bool(c.execute(sa.update(jobs).where(mine).values(lease_until=time.time() + lease_s)).rowcount)

    def put_back(self, claim: sa.Row, due_at: float, error: str, *, counts: bool = True) -> None:
        """Give a job back for a later attempt; without `counts` this one is not held against it."""
        with self._begin() as c:
            values: dict[str, Any] = {"due_at": due_at, "error": error, **FREE}
            if not counts:
                values["attempts"] = jobs.c.attempts - 1
            self._move(c, claim.id, "grouped", error, self._mine(claim), **values)

    def bury(self, claim: sa.Row, error: str) -> None:
        """A job that never will: a dead letter."""
        with self._begin() as c:
            self._move(c, claim.id, "dead", error, self._mine(claim), error=error, **FREE)

    def start_reading(self, claim: sa.Row, chosen: Sequence[int]) -> int | None:
        """Write down the images that a job's request will hold, in its order.

        Returns
        -------
        int or None
            An earlier job of the study that read the same, so that this one need not.

        Raises
        ------
        LeaseLost
            The job is another's now.
        """
        with self._begin() as c:
            was = jobs.c.state.in_(("sending", "done")) & (jobs.c.study == claim.study) & (jobs.c.id != claim.id)
            for row in c.execute(sa.select(jobs.c.id, jobs.c.read_objects).where(was)):
                if row.read_objects == list(chosen):
                    return row.id
            if not c.execute(sa.update(jobs).where(self._mine(claim)).values(read_objects=list(chosen))).rowcount:
                raise LeaseLost(f"job {claim.id}")
        return None

    def finish(self, claim: sa.Row, note: str) -> None:
        """A job that needs no results."""
        with self._begin() as c:
            self._move(c, claim.id, "done", note, self._mine(claim), error=None, **FREE)

    def deliver(
        self, claim: sa.Row, results: Sequence[Result], destinations: dict[str, set[str]], reading_s: float
    ) -> None:
        """Hand a job's results over to its destinations.

        Parameters
        ----------
        claim : sqlalchemy.Row
        results : sequence of Result
        destinations : dict of str to set of str
            Kinds of result that each destination takes.
        reading_s : float
            What the reading itself took.

        Raises
        ------
        LeaseLost
            The job is another's now, and nothing was done.
        """
        now = time.time()
        with self._begin() as c:
            values = {"error": None, "reading_s": reading_s, **FREE}
            if not self._move(c, claim.id, "sending", f"{len(results)} results", self._mine(claim), **values):
                raise LeaseLost(f"job {claim.id}")
            row = {"job": claim.id, "state": "pending", "first_at": claim.first_at, "created_at": now, "due_at": now}
            rows = [
                {**row, **vars(result), "destination": name}
                for name, kinds in destinations.items()
                for result in results
                if result.kind in kinds
            ]
            if rows:
                c.execute(sa.insert(deliveries), rows)
            else:
                self._settle(c, claim.id)

    def _mine(self, claim: sa.Row):
        held = (jobs.c.owner == self.gateway) & (jobs.c.generation == claim.generation)
        return (jobs.c.id == claim.id) & (jobs.c.state == "reading") & held
