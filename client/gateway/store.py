"""The durable queue: received objects, the jobs made of them, their results' deliveries, and the history of each job.

A job is one reading of one study. It goes received → grouped → reading → sending → done; dead is the letter box for
what an operator has to look at, dropped what an operator gave up. SQLite for one gateway, PostgreSQL for several: work
is taken by a lease, and every step is a conditional update, so that of two that believe to hold it one is told it does
not. Each claim of a job has a generation of its own: an earlier holder changes nothing, be it of the same gateway.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa

from cxr_triton.client.gateway.database import FREE
from cxr_triton.client.gateway.deliveries import Deliveries
from cxr_triton.client.gateway.jobs import Jobs
from cxr_triton.client.gateway.schema import (
    DELIVERY_STATES,
    JOB_STATES,
    OBJECT_KINDS,
    deliveries,
    gateways,
    history,
    jobs,
    objects,
    switches,
)
from cxr_triton.trace import trace_id_of


class JobSeen(NamedTuple):
    """What a job was when somebody decided about it. A number alone may be another job's by then."""

    first_at: float
    state: str


class Store(Jobs, Deliveries):
    """The queue as one gateway sees it; usable from any thread.

    Parameters
    ----------
    url : str
        SQLAlchemy URL of SQLite or PostgreSQL.
    gateway : str
        Name of this gateway, which owns what it leases.

    Raises
    ------
    InvalidConfig
        The URL is of another database, or it cannot be reached.
    """

    def start(self) -> None:
        """Say that this gateway runs, and take back what an earlier process of its name held."""
        now = time.time()
        with self._begin() as c:
            held = (jobs.c.state == "reading") & (jobs.c.owner == self.gateway)
            for job in c.execute(sa.select(jobs.c.id).where(held)).scalars().all():
                values = {"due_at": now, "attempts": jobs.c.attempts - 1, **FREE}
                self._move(c, job, "grouped", "the gateway was restarted", **values)
            c.execute(sa.update(deliveries).where(deliveries.c.owner == self.gateway).values(FREE))
            row = {"name": self.gateway, "started_at": now, "seen_at": now}
            upsert = self._insert(gateways).values(row)
            c.execute(upsert.on_conflict_do_update(index_elements=["name"], set_=row))

    def beat(self) -> None:
        """A sign of life of this gateway."""
        with self._begin() as c:
            c.execute(sa.update(gateways).where(gateways.c.name == self.gateway).values(seen_at=time.time()))

    def is_draining(self) -> bool:
        """Whether `set_draining` was switched on, by whichever gateway or operator."""
        with self._begin() as c:
            return bool(c.execute(sa.select(switches.c.on).where(switches.c.name == "drain")).scalar())

    def set_draining(self, on: bool) -> None:
        """Draining gateways take nothing in and finish what they have; it outlives their restart."""
        with self._begin() as c:
            row = {"name": "drain", "on": int(on)}
            c.execute(self._insert(switches).values(row).on_conflict_do_update(index_elements=["name"], set_=row))

    def counts(self) -> dict:
        """Numbers of jobs, objects and deliveries by state, and the age of the oldest open job in seconds."""
        now = time.time()
        with self._begin() as c:
            by_state = c.execute(sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)).all()
            by_kind = c.execute(sa.select(objects.c.kind, sa.func.count()).group_by(objects.c.kind)).all()
            d = deliveries.c
            rows = c.execute(sa.select(d.destination, d.state, sa.func.count()).group_by(d.destination, d.state)).all()
            is_open = jobs.c.state.in_(("received", "grouped", "reading", "sending"))
            oldest = c.execute(sa.select(sa.func.min(jobs.c.first_at)).where(is_open)).scalar()
        by_destination: dict[str, dict[str, int]] = {}
        for destination, state, count in rows:
            by_destination.setdefault(destination, dict.fromkeys(DELIVERY_STATES, 0))[state] = count
        return {
            "jobs": dict.fromkeys(JOB_STATES, 0) | {row[0]: row[1] for row in by_state},
            "objects": dict.fromkeys(OBJECT_KINDS, 0) | {row[0]: row[1] for row in by_kind},
            "deliveries": by_destination,
            "oldest_open_s": round(now - oldest, 1) if oldest else 0.0,
        }

    def status(self) -> dict:
        """`counts`, the gateways, whether they drain, and the dead letters with their errors."""
        result = {**self.counts(), "draining": self.is_draining()}
        with self._begin() as c:
            result["gateways"] = [
                {"name": row.name, "started_at": row.started_at, "seen_s_ago": round(time.time() - row.seen_at, 1)}
                for row in c.execute(sa.select(gateways).order_by(gateways.c.name))
            ]
            dead = sa.select(jobs).where(jobs.c.state == "dead").order_by(jobs.c.id).limit(1000)
            result["dead"] = [
                {
                    "job": row.id,
                    "attempts": row.attempts,
                    "error": row.error,
                    "since": row.changed_at,
                    "trace": trace_id_of(row.traceparent),
                }
                for row in c.execute(dead)
            ]
        return result

    def job(self, job: int) -> dict | None:
        """One job with its history and its deliveries."""
        with self._begin() as c:
            row = c.execute(sa.select(jobs).where(jobs.c.id == job)).one_or_none()
            if row is None:
                return None
            steps = c.execute(sa.select(history).where(history.c.job == job).order_by(history.c.id)).all()
            sent = c.execute(sa.select(deliveries).where(deliveries.c.job == job).order_by(deliveries.c.id)).all()
        return {
            **{key: getattr(row, key) for key in ("id", "study", "state", "attempts", "error", "first_at", "due_at")},
            "trace": trace_id_of(row.traceparent),
            "inputs": row.inputs or [],
            "read_objects": row.read_objects or [],
            "history": [{"at": s.at, "gateway": s.gateway, "state": s.state, "note": s.note} for s in steps],
            "deliveries": [
                {key: getattr(s, key) for key in ("destination", "kind", "state", "sop_instance", "attempts", "error")}
                for s in sent
            ],
        }

    def listed(self, states: Sequence[str], *, before: int | None = None, limit: int = 100) -> list[dict]:
        """The newest jobs in some states, with what became of their results.

        Parameters
        ----------
        states : sequence of str
        before : int, optional
            Only jobs with a smaller id.
        limit : int

        Returns
        -------
        list of dict
            ``id``, ``study``, ``patient``, ``state``, ``images``, ``attempts``, ``error``, ``first_at``,
            ``changed_at``, ``reading_s``, ``deliveries`` (destination to state to count) and ``undelivered`` (errors of
            results that are late or dead).
        """
        wanted = jobs.c.state.in_(states) & (sa.true() if before is None else jobs.c.id < before)
        patient = (
            sa.select(sa.func.min(objects.c.patient))
            .where((objects.c.study == jobs.c.study) & (objects.c.kind == "image"))
            .scalar_subquery()
        )
        with self._begin() as c:
            query = sa.select(jobs, patient.label("patient")).where(wanted).order_by(jobs.c.id.desc()).limit(limit)
            rows = c.execute(query).all()
            d = deliveries.c
            of_these = sa.select(d.job, d.destination, d.state, d.error).where(d.job.in_([row.id for row in rows]))
            results = c.execute(of_these.order_by(d.id)).all()
        sent: dict[int, dict[str, dict[str, int]]] = {}
        late: dict[int, list[str]] = {}
        for result in results:
            states_ = sent.setdefault(result.job, {}).setdefault(result.destination, {})
            states_[result.state] = states_.get(result.state, 0) + 1
            if result.error and result.state in ("pending", "dead"):
                late.setdefault(result.job, []).append(f"{result.destination}: {result.error}")
        keys = ("id", "study", "patient", "state", "attempts", "error", "first_at", "changed_at", "reading_s")
        return [
            {
                **{key: getattr(row, key) for key in keys},
                "images": len(row.inputs or []),
                "deliveries": sent.get(row.id, {}),
                "undelivered": list(dict.fromkeys(late.get(row.id, []))),
            }
            for row in rows
        ]

    def done_since(self, at: float) -> int:
        """Jobs that were done after a time, in seconds since 1970."""
        with self._begin() as c:
            is_done = (jobs.c.state == "done") & (jobs.c.changed_at >= at)
            return int(c.execute(sa.select(sa.func.count()).where(is_done)).scalar() or 0)

    def times(self, job: int) -> dict:
        """When a job's first image came, when its last result was delivered, and the seconds its reading took."""
        with self._begin() as c:
            last = sa.select(sa.func.max(deliveries.c.sent_at)).where(deliveries.c.job == job).scalar_subquery()
            row = c.execute(sa.select(jobs.c.first_at, jobs.c.reading_s, last).where(jobs.c.id == job)).one()
        return dict(zip(("first_at", "reading_s", "delivered_at"), row, strict=True))

    def retry(self, ids: Sequence[int] = (), *, seen: JobSeen | None = None) -> list[int]:
        """Bring dead letters back to life, all of them without `ids`, only what still is as it was `seen`; which."""
        now = time.time()
        with self._begin() as c:
            wanted = (jobs.c.state == "dead") & _is_still(seen)
            if ids:
                wanted &= jobs.c.id.in_(ids)
            found = c.execute(sa.select(jobs.c.id).where(wanted).with_for_update()).scalars().all()
            for job in found:
                again = (deliveries.c.job == job) & (deliveries.c.state == "dead")
                values = {"state": "pending", "attempts": 0, "due_at": now, "created_at": now, "error": None}
                was_read = c.execute(sa.update(deliveries).where(again).values(values)).rowcount
                state = "sending" if was_read else "grouped"
                self._move(c, job, state, "an operator said so", attempts=0, due_at=now, error=None)
            return list(found)

    def drop(self, ids: Sequence[int], *, seen: JobSeen | None = None) -> list[int]:
        """Give jobs up that have not ended, only what still is as it was `seen`; which."""
        with self._begin() as c:
            ended = jobs.c.state.in_(("done", "dropped"))
            wanted = jobs.c.id.in_(ids) & ~ended & _is_still(seen)
            found = c.execute(sa.select(jobs.c.id).where(wanted).with_for_update()).scalars().all()
            for job in found:
                open_ = (deliveries.c.job == job) & deliveries.c.state.in_(("pending", "sent", "dead"))
                c.execute(sa.update(deliveries).where(open_).values(state="dropped", **FREE))
                self._move(c, job, "dropped", "an operator said so", **FREE)
            return list(found)

    def purge(self, done_before: float, dead_before: float) -> list[str]:
        """Forget old jobs, and objects of studies that have none left; the paths of their files."""
        with self._begin() as c:
            over = jobs.c.state.in_(("done", "dropped")) & (jobs.c.changed_at < done_before)
            over |= (jobs.c.state == "dead") & (jobs.c.changed_at < dead_before)
            old = c.execute(sa.select(jobs.c.id).where(over)).scalars().all()
            gone = deliveries.c.job.in_(old)
            paths = list(c.execute(sa.select(deliveries.c.path).where(gone)).scalars())
            c.execute(sa.delete(deliveries).where(gone))
            c.execute(sa.delete(history).where(history.c.job.in_(old)))
            c.execute(sa.delete(jobs).where(jobs.c.id.in_(old)))
            is_left = sa.exists().where(jobs.c.study == objects.c.study)
            idle = (objects.c.received_at < done_before) & ~is_left
            paths += c.execute(sa.delete(objects).where(idle).returning(objects.c.path)).scalars().all()
            return paths

    def known(self, paths: Sequence[str]) -> set[str]:
        """Those of some paths that a row points to."""
        with self._begin() as c:
            found = set(c.execute(sa.select(objects.c.path).where(objects.c.path.in_(paths))).scalars())
            return found | set(c.execute(sa.select(deliveries.c.path).where(deliveries.c.path.in_(paths))).scalars())


def _is_still(seen: JobSeen | None) -> sa.ColumnElement[bool]:
    return sa.true() if seen is None else (jobs.c.first_at == seen.first_at) & (jobs.c.state == seen.state)
