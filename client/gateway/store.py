"""The durable queue: received objects, the jobs made of them, their results' deliveries, and the history of each job.

A job is one reading of one study. It goes received → grouped → reading → sending → done; dead is the letter box for
what an operator has to look at, dropped what an operator gave up. SQLite for one gateway, PostgreSQL for several: work
is taken by a lease, and every step is a conditional update, so that of two that believe to hold it one is told it does
not. Each claim of a job has a generation of its own: an earlier holder changes nothing, be it of the same gateway.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, String, Table, Text, UniqueConstraint

from cxr_triton.errors import InvalidConfig

JOB_STATES = ("received", "grouped", "reading", "sending", "done", "dead", "dropped")
DELIVERY_STATES = ("pending", "sent", "done", "dead", "dropped")
OBJECT_KINDS = ("image", "prior", "other", "conflict")

_schema = MetaData()
_Id = Integer().with_variant(BigInteger(), "postgresql")

objects = Table(
    "objects",
    _schema,
    Column("id", _Id, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("sop_instance", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("sop_class", String(64), nullable=False),
    Column("study", String(64), nullable=False, index=True),
    Column("series", String(64), nullable=False),
    Column("transfer_syntax", String(64), nullable=False),
    Column("patient", String(64), nullable=False),
    Column("view", String(16), nullable=False),
    Column("taken", String(32), nullable=False),
    Column("number", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("path", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("received_at", Float, nullable=False),
    UniqueConstraint("sop_instance", "digest"),
)
jobs = Table(
    "jobs",
    _schema,
    Column("id", _Id, primary_key=True),
    Column("study", String(64), nullable=False, index=True),
    Column("state", String(16), nullable=False),
    Column("inputs", sa.JSON),
    Column("read_objects", sa.JSON),
    Column("first_at", Float, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("changed_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("owner", String(64)),
    Column("lease_until", Float),
    Column("generation", Integer, nullable=False, server_default="0"),
    Column("error", Text),
    Column("reading_s", Float),
    Index("one_open_job_of_a_study", "study", unique=True,
          sqlite_where=sa.text("state = 'received'"), postgresql_where=sa.text("state = 'received'")),
    Index("jobs_by_state", "state", "due_at"),
)  # fmt: skip
deliveries = Table(
    "deliveries",
    _schema,
    Column("id", _Id, primary_key=True),
    Column("job", _Id, nullable=False, index=True),
    Column("destination", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("sop_class", String(64), nullable=False),
    Column("sop_instance", String(64), nullable=False),
    Column("path", Text, nullable=False),
    Column("first_at", Float, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("owner", String(64)),
    Column("lease_until", Float),
    Column("sent_at", Float),
    Column("transaction_uid", String(64), index=True),
    Column("error", Text),
    UniqueConstraint("job", "destination", "sop_instance"),
    Index("deliveries_by_destination", "destination", "state", "due_at"),
)
history = Table(
    "history",
    _schema,
    Column("id", _Id, primary_key=True),
    Column("job", _Id, nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("gateway", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("note", Text, nullable=False),
)
gateways = Table(
    "gateways",
    _schema,
    Column("name", String(64), primary_key=True),
    Column("started_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
)
switches = Table("switches", _schema, Column("name", String(16), primary_key=True), Column("on", Integer))


@dataclass(frozen=True, kw_only=True)
class Received:
    """An object on its way into the queue; its file is already durable."""

    kind: str
    sop_instance: str
    digest: str
    sop_class: str
    study: str
    series: str
    transfer_syntax: str
    patient: str
    view: str
    taken: str
    number: int
    bytes: int
    path: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result file of a job."""

    kind: str
    sop_class: str
    sop_instance: str
    path: str


_PATIENCE = {"connect_timeout": "10", "keepalives_idle": "10", "tcp_user_timeout": "30000"}
"""libpq's settings in s, s and ms; without them it waits without limit for a host that went away."""


class CommitInDoubt(sa.exc.SQLAlchemyError):
    """The connection was lost while a commit was under way: whether it was carried out is not known."""


class LeaseLost(Exception):
    """Somebody else holds the job now, or an operator dropped it."""


class Store:
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

    def __init__(self, url: str, gateway: str):
        self.gateway = gateway
        try:
            parsed = sa.make_url(url)
            if parsed.get_backend_name() not in ("sqlite", "postgresql"):
                raise InvalidConfig(f"queue: {parsed.get_backend_name()} is none of sqlite, postgresql")
            self._is_sqlite = parsed.get_backend_name() == "sqlite"
            options = {"connect_args": {"timeout": 60}} if self._is_sqlite else {"pool_pre_ping": True}
            if not self._is_sqlite:
                parsed = parsed.set(query={**_PATIENCE, **parsed.query})
            self._engine = sa.create_engine(parsed, **options)
            if self._is_sqlite:
                sa.event.listen(self._engine, "connect", _prepare_sqlite)
                sa.event.listen(self._engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
            self._insert = _inserts(self._is_sqlite)
            # SQLite lets a waiting writer sleep; a lock hands over at once.
            self._turn = threading.Lock() if self._is_sqlite else contextlib.nullcontext()
            with self._begin() as c:
                if not self._is_sqlite:
                    c.exec_driver_sql("SELECT pg_advisory_xact_lock(726573)")  # several gateways may start at once
                _schema.create_all(c)
                if "generation" not in {column["name"] for column in sa.inspect(c).get_columns("jobs")}:
                    c.exec_driver_sql("ALTER TABLE jobs ADD COLUMN generation INTEGER DEFAULT 0 NOT NULL")
        except (sa.exc.SQLAlchemyError, ImportError) as error:
            what = str(getattr(error, "orig", error)).strip().splitlines()[0]
            raise InvalidConfig(f"queue: {what}; check the URL and that the database runs") from None

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        is_written = False
        try:
            with self._turn, self._engine.begin() as connection:
                yield connection
                is_written = True
        except sa.exc.DBAPIError as error:
            if is_written and not is_full(error):
                raise CommitInDoubt(str(error.orig)) from error
            raise

    # ------------------------------------------------------------------------------------------------- objects

    def add(self, received: Received, quiet_s: float, max_wait_s: float) -> str:
        """Queue an object whose file is on the disk.

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
                self._gather(c, received.study, now, quiet_s, max_wait_s)
            return kind

    def _gather(self, c: sa.Connection, study: str, now: float, quiet_s: float, max_wait_s: float) -> None:
        """Put a new image into the study's open job, or open one."""
        latest = jobs.c.first_at + max_wait_s
        due = sa.case((latest < now + quiet_s, latest), else_=now + quiet_s)
        is_open = (jobs.c.study == study) & (jobs.c.state == "received")
        for _ in range(2):
            if c.execute(sa.update(jobs).where(is_open).values(due_at=due, changed_at=now)).rowcount:
                return
            values = {"study": study, "state": "received", "first_at": now, "changed_at": now, "attempts": 0}
            values["due_at"] = now + min(quiet_s, max_wait_s)
            insert = self._insert(jobs).values(values).on_conflict_do_nothing().returning(jobs.c.id)
            if (job := c.execute(insert).scalar()) is not None:
                self._note(c, job, "received", "")
                return

    def inputs(self, job: int) -> list[sa.Row]:
        """The images of a job, in the order taken."""
        with self._begin() as c:
            ids = c.execute(sa.select(jobs.c.inputs).where(jobs.c.id == job)).scalar() or []
            return c.execute(sa.select(objects).where(objects.c.id.in_(ids)).order_by(*_AS_TAKEN)).all()

    def object_of(self, sop_instance: str) -> sa.Row | None:
        """The first object that came with a SOP Instance UID."""
        mine = (objects.c.sop_instance == sop_instance) & (objects.c.kind != "conflict")
        with self._begin() as c:
            return c.execute(sa.select(objects).where(mine).order_by(objects.c.id)).first()

    # ---------------------------------------------------------------------------------------------------- jobs

    def group_due(self) -> int:
        """Close the studies that are complete; how many."""
        now = time.time()
        with self._begin() as c:
            due = (jobs.c.state == "received") & (jobs.c.due_at <= now)
            closed = c.execute(sa.select(jobs.c.id, jobs.c.study).where(due).with_for_update(skip_locked=True)).all()
            for job, study in closed:
                images = (objects.c.study == study) & (objects.c.kind == "image")
                inputs = c.execute(sa.select(objects.c.id).where(images).order_by(*_AS_TAKEN)).scalars().all()
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
            values = {"due_at": due_at, "error": error, "owner": None, "lease_until": None}
            if not counts:
                values["attempts"] = jobs.c.attempts - 1
            self._move(c, claim.id, "grouped", error, self._mine(claim), **values)

    def bury(self, claim: sa.Row, error: str) -> None:
        """A job that never will: a dead letter."""
        with self._begin() as c:
            self._move(c, claim.id, "dead", error, self._mine(claim), error=error, owner=None, lease_until=None)

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
            self._move(c, claim.id, "done", note, self._mine(claim), owner=None, lease_until=None, error=None)

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
            kept = {"owner": None, "lease_until": None, "error": None, "reading_s": reading_s}
            if not self._move(c, claim.id, "sending", f"{len(results)} results", self._mine(claim), **kept):
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

    # ---------------------------------------------------------------------------------------------- deliveries

    def claim_deliveries(self, destination: str, lease_s: float, limit: int = 64) -> list[sa.Row]:
        """Take results that are due at a destination."""
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
            return c.execute(sa.select(deliveries).where(d.id.in_(ids)).order_by(d.id)).all()

    def release(self, destination: str) -> None:
        """Free what this gateway holds for a destination, when nothing of it is under way."""
        mine = (deliveries.c.destination == destination) & (deliveries.c.owner == self.gateway)
        with self._begin() as c:
            c.execute(sa.update(deliveries).where(mine).values(owner=None, lease_until=None))

    def delivered(self, delivery: int, *, final: bool) -> None:
        """A destination has a result; not `final` while its commitment is awaited."""
        sent = {"state": "done" if final else "sent", "sent_at": time.time(), "error": None}
        self._end_attempt(delivery, sent, sa.true())  # whoever sent it

    def postpone(self, delivery: int, due_at: float, error: str, *, counts: bool = True) -> None:
        """Try a result again later; an attempt that never reached it does not count."""
        more = {"attempts": deliveries.c.attempts + 1} if counts else {}
        self._end_attempt(delivery, {"state": "pending", "due_at": due_at, "error": error, **more})

    def undeliverable(self, delivery: int, error: str) -> None:
        self._end_attempt(delivery, {"state": "dead", "error": error})

    def _end_attempt(self, delivery: int, values: dict, where=None) -> None:
        if where is None:
            where = deliveries.c.owner.is_(None) | (deliveries.c.owner == self.gateway)
        mine = (deliveries.c.id == delivery) & deliveries.c.state.in_(("pending", "sent")) & where
        with self._begin() as c:
            free = {"owner": None, "lease_until": None}
            update = sa.update(deliveries).where(mine).values({**free, **values}).returning(deliveries.c.job)
            if (job := c.execute(update).scalar()) is not None:
                self._settle(c, job)

    def _settle(self, c: sa.Connection, job: int) -> None:
        """End a job all of whose deliveries have ended."""
        # The row is locked first: of two gateways that end the last two deliveries each would see the other's open.
        if c.execute(sa.select(jobs.c.state).where(jobs.c.id == job).with_for_update()).scalar() != "sending":
            return
        rows = c.execute(sa.select(deliveries.c.state, deliveries.c.destination).where(deliveries.c.job == job)).all()
        if any(row.state in ("pending", "sent") for row in rows):
            return
        dead = sorted({row.destination for row in rows if row.state == "dead"})
        if dead:
            self._move(c, job, "dead", f"not delivered to {', '.join(dead)}", error=f"not delivered: {', '.join(dead)}")
        else:
            self._move(c, job, "done", f"{len(rows)} deliveries")

    def uncommitted(self, destination: str, older_than: float) -> list[sa.Row]:
        """Results a destination has, whose commitment was never asked for, or before the time `older_than`."""
        d = deliveries.c
        late = sa.or_(d.transaction_uid.is_(None), d.due_at < older_than)
        where = (d.destination == destination) & (d.state == "sent") & late
        with self._begin() as c:
            return c.execute(sa.select(deliveries).where(where).order_by(d.id).limit(500)).all()

    def asked_commitment(self, ids: Sequence[int], transaction_uid: str) -> None:
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

    # ------------------------------------------------------------------------------------- gateways, operators

    def start(self) -> None:
        """Say that this gateway runs, and take back what an earlier process of its name held."""
        now = time.time()
        with self._begin() as c:
            held = (jobs.c.state == "reading") & (jobs.c.owner == self.gateway)
            for job in c.execute(sa.select(jobs.c.id).where(held)).scalars().all():
                self._move(c, job, "grouped", "the gateway was restarted", owner=None, lease_until=None,
                           due_at=now, attempts=jobs.c.attempts - 1)  # fmt: skip
            free = {"owner": None, "lease_until": None}
            c.execute(sa.update(deliveries).where(deliveries.c.owner == self.gateway).values(free))
            row = {"name": self.gateway, "started_at": now, "seen_at": now}
            upsert = self._insert(gateways).values(row)
            c.execute(upsert.on_conflict_do_update(index_elements=["name"], set_=row))

    def beat(self) -> None:
        with self._begin() as c:
            c.execute(sa.update(gateways).where(gateways.c.name == self.gateway).values(seen_at=time.time()))

    def is_draining(self) -> bool:
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
            by_job = dict(c.execute(sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)).all())
            by_kind = dict(c.execute(sa.select(objects.c.kind, sa.func.count()).group_by(objects.c.kind)).all())
            d = deliveries.c
            rows = c.execute(sa.select(d.destination, d.state, sa.func.count()).group_by(d.destination, d.state)).all()
            is_open = jobs.c.state.in_(("received", "grouped", "reading", "sending"))
            oldest = c.execute(sa.select(sa.func.min(jobs.c.first_at)).where(is_open)).scalar()
        by_destination: dict[str, dict[str, int]] = {}
        for destination, state, count in rows:
            by_destination.setdefault(destination, dict.fromkeys(DELIVERY_STATES, 0))[state] = count
        return {
            "jobs": {state: by_job.get(state, 0) for state in JOB_STATES},
            "objects": {kind: by_kind.get(kind, 0) for kind in OBJECT_KINDS},
            "deliveries": by_destination,
            "oldest_open_s": round(now - oldest, 1) if oldest else 0.0,
        }

    def status(self) -> dict:
        """`counts`, the gateways, whether they drain, and the dead letters with their errors."""
        result = self.counts()
        with self._begin() as c:
            result["draining"] = bool(c.execute(sa.select(switches.c.on).where(switches.c.name == "drain")).scalar())
            result["gateways"] = [
                {"name": row.name, "started_at": row.started_at, "seen_s_ago": round(time.time() - row.seen_at, 1)}
                for row in c.execute(sa.select(gateways).order_by(gateways.c.name))
            ]
            dead = sa.select(jobs).where(jobs.c.state == "dead").order_by(jobs.c.id).limit(1000)
            result["dead"] = [
                {"job": row.id, "attempts": row.attempts, "error": row.error, "since": row.changed_at}
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
            "inputs": row.inputs or [],
            "read_objects": row.read_objects or [],
            "history": [{"at": s.at, "gateway": s.gateway, "state": s.state, "note": s.note} for s in steps],
            "deliveries": [
                {key: getattr(s, key) for key in ("destination", "kind", "state", "sop_instance", "attempts", "error")}
                for s in sent
            ],
        }

    def times(self, job: int) -> dict:
        """When a job's first image came, when its last result was delivered, and the seconds its reading took."""
        with self._begin() as c:
            last = sa.select(sa.func.max(deliveries.c.sent_at)).where(deliveries.c.job == job).scalar_subquery()
            row = c.execute(sa.select(jobs.c.first_at, jobs.c.reading_s, last).where(jobs.c.id == job)).one()
        return dict(zip(("first_at", "reading_s", "delivered_at"), row, strict=True))

    def retry(self, ids: Sequence[int] = ()) -> list[int]:
        """Bring dead letters back to life, all of them without `ids`; which."""
        now = time.time()
        with self._begin() as c:
            wanted = jobs.c.state == "dead"
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

    def drop(self, ids: Sequence[int]) -> list[int]:
        """Give jobs up that have not ended; which."""
        with self._begin() as c:
            ended = jobs.c.state.in_(("done", "dropped"))
            wanted = jobs.c.id.in_(ids) & ~ended
            found = c.execute(sa.select(jobs.c.id).where(wanted).with_for_update()).scalars().all()
            for job in found:
                open_ = (deliveries.c.job == job) & deliveries.c.state.in_(("pending", "sent", "dead"))
                c.execute(sa.update(deliveries).where(open_).values(state="dropped", owner=None, lease_until=None))
                self._move(c, job, "dropped", "an operator said so", owner=None, lease_until=None)
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

    def _mine(self, claim: sa.Row):
        held = (jobs.c.owner == self.gateway) & (jobs.c.generation == claim.generation)
        return (jobs.c.id == claim.id) & (jobs.c.state == "reading") & held

    def _move(self, c: sa.Connection, job: int, state: str, note: str, where=None, **values) -> bool:
        where = jobs.c.id == job if where is None else where
        values |= {"state": state, "changed_at": time.time()}
        moved = bool(c.execute(sa.update(jobs).where(where).values(values)).rowcount)
        if moved:
            self._note(c, job, state, note)
        return moved

    def _note(self, c: sa.Connection, job: int, state: str, note: str) -> None:
        row = {"job": job, "at": time.time(), "gateway": self.gateway, "state": state, "note": note}
        c.execute(sa.insert(history).values(row))


def is_full(error: BaseException) -> bool:
    """The disk is full, as a file or SQLite says it."""
    if isinstance(error, sa.exc.OperationalError):
        return "disk is full" in str(error.orig)
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


_AS_TAKEN = (objects.c.taken, objects.c.number, objects.c.sop_instance)


def _prepare_sqlite(connection, _) -> None:
    connection.isolation_level = None  # transactions are begun by `Store`, at once for writing
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _inserts(is_sqlite: bool):
    from sqlalchemy.dialects import postgresql, sqlite

    return sqlite.insert if is_sqlite else postgresql.insert
