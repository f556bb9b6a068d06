"""The queue's database: SQLite or PostgreSQL, its transactions, and the steps of a job."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import threading
import time
import urllib.parse
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cxr_triton.client.gateway.schema import deliveries, history, jobs, schema
from cxr_triton.errors import InvalidConfig

_LATER_COLUMNS = {"generation": "INTEGER DEFAULT 0", "traceparent": "VARCHAR(64) DEFAULT ''"}
"""Of `jobs`, which queues of earlier releases lack."""
FREE = {"owner": None, "lease_until": None}
_PATIENCE = {"connect_timeout": "10", "keepalives_idle": "10", "tcp_user_timeout": "30000"}
"""libpq's settings in s, s and ms; without them it waits without limit for a host that went away."""


class CommitInDoubt(sa.exc.SQLAlchemyError):
    """The connection was lost while a commit was under way: whether it was carried out is not known."""


class LeaseLost(Exception):
    """Somebody else holds the job now, or an operator dropped it."""


class Database:
    """Transactions, usable from any thread, and what every part of the queue does with a job."""

    def __init__(self, url: str, gateway: str):
        self.gateway = gateway
        with _said_as_config():
            parsed = _parsed(url)
            self._is_sqlite = parsed.get_backend_name() == "sqlite"
            options = {"connect_args": {"timeout": 60}} if self._is_sqlite else {"pool_pre_ping": True}
            if not self._is_sqlite:
                parsed = parsed.set(query={**_PATIENCE, **parsed.query})
            self._engine = sa.create_engine(parsed, **options)
            if self._is_sqlite:
                _keep_private(parsed.database)
                sa.event.listen(self._engine, "connect", _prepare_sqlite)
                sa.event.listen(self._engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
            self._insert = sqlite.insert if self._is_sqlite else postgresql.insert
            # SQLite lets a waiting writer sleep; a lock hands over at once.
            self._turn = threading.Lock() if self._is_sqlite else contextlib.nullcontext()
            with self._begin() as c:
                if not self._is_sqlite:
                    c.exec_driver_sql("SELECT pg_advisory_xact_lock(726573)")  # several gateways may start at once
                schema.create_all(c)
                there = {column["name"] for column in sa.inspect(c).get_columns("jobs")}
                for name, kind in _LATER_COLUMNS.items():
                    if name not in there:
                        c.exec_driver_sql(f"ALTER TABLE jobs ADD COLUMN {name} {kind} NOT NULL")

    def close(self) -> None:
        """Let go of the connections."""
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


@dataclasses.dataclass(frozen=True)
class Seen:
    """A queue as it is.

    Attributes
    ----------
    missing : tuple of str
        Tables, and columns as ``TABLE.COLUMN``, that a gateway would make.
    is_new : bool
        It has no table at all.
    dead : int
        Jobs that are dead letters.
    ahead_s : float
        How much its host's clock is ahead of this one; of SQLite 0.
    """

    missing: tuple[str, ...]
    is_new: bool
    dead: int
    ahead_s: float


def look(url: str) -> Seen | None:
    """What a queue holds, over a connection that may only read; None where SQLite's file is yet to be made.

    Raises
    ------
    InvalidConfig
        As `Database`.
    """
    with _said_as_config():
        parsed = _parsed(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        if is_sqlite:
            path = os.path.abspath(parsed.database or "")
            if not os.path.exists(path):
                return None
            # A reader of a database in WAL mode makes files beside it, unless nobody else has it open.
            state = "mode=ro" if os.path.exists(f"{path}-wal") else "mode=ro&immutable=1"
            engine = sa.create_engine(f"sqlite:///file:{urllib.parse.quote(path)}?{state}&uri=true")
        else:
            options = "-c default_transaction_read_only=on -c statement_timeout=10000"
            query = {"connect_timeout": "5", **parsed.query, "options": options}
            engine = sa.create_engine(parsed.set(query=query))
        try:
            with engine.connect() as c:
                return _seen(c, is_sqlite)
        finally:
            engine.dispose()


def _parsed(url: str) -> sa.URL:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise InvalidConfig(f"queue: {parsed.get_backend_name()} is none of sqlite, postgresql")
    return parsed


def _seen(c: sa.Connection, is_sqlite: bool) -> Seen:
    inspected = sa.inspect(c)
    there = {
        table: {column["name"] for column in inspected.get_columns(table)} for table in inspected.get_table_names()
    }
    missing = [name for name in schema.tables if name not in there]
    for name, table in schema.tables.items():
        wanted = set(table.columns.keys())
        missing += [f"{name}.{column}" for column in wanted - there.get(name, wanted)]
    dead, ahead_s = 0, 0.0
    if "jobs" in there and "state" in there["jobs"]:
        dead = c.execute(sa.select(sa.func.count()).where(jobs.c.state == "dead")).scalar() or 0
    if not is_sqlite:
        ahead_s = float(c.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar() or 0) - time.time()
    return Seen(tuple(sorted(missing)), not (there.keys() & schema.tables.keys()), dead, ahead_s)


@contextlib.contextmanager
def _said_as_config() -> Iterator[None]:
    """What keeps a queue from being opened, without what its URL holds."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, ImportError, OSError, ValueError) as error:
        is_of_url = isinstance(error, ValueError)  # its text quotes the URL, a password perhaps
        what = "is no URL" if is_of_url else str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise InvalidConfig(f"queue: {what}; check the URL and that the database runs") from None


def is_full(error: BaseException) -> bool:
    """The disk is full, as a file or SQLite says it."""
    if isinstance(error, sa.exc.OperationalError):
        return "disk is full" in str(error.orig)
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def _keep_private(database: str | None) -> None:
    """Make the file before SQLite does, which gives its mode to the ``-wal`` and ``-shm`` beside it."""
    if database and database != ":memory:" and not database.startswith("file:"):
        with contextlib.suppress(FileExistsError):
            handle = os.open(database, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            if os.stat(os.path.dirname(database) or ".").st_mode & 0o020:  # shared with the group
                os.fchmod(handle, 0o660)
            os.close(handle)


def _prepare_sqlite(connection, _) -> None:
    connection.isolation_level = None  # transactions are begun by `Store`, at once for writing
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
