"""Tables of the durable queue, and the two things that are put into it."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, String, Table, Text, UniqueConstraint

JOB_STATES = ("received", "grouped", "reading", "sending", "done", "dead", "dropped")
DELIVERY_STATES = ("pending", "sent", "done", "dead", "dropped")
OBJECT_KINDS = ("image", "prior", "other", "conflict")

schema = MetaData()
_Id = Integer().with_variant(BigInteger(), "postgresql")

objects = Table(
    "objects",
    schema,
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
    schema,
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
    Column("traceparent", String(64), nullable=False, server_default=""),
    Index("one_open_job_of_a_study", "study", unique=True,
          sqlite_where=sa.text("state = 'received'"), postgresql_where=sa.text("state = 'received'")),
    Index("jobs_by_state", "state", "due_at"),
    sqlite_autoincrement=True,  # or the number of a job that was forgotten is given again
)  # fmt: skip
deliveries = Table(
    "deliveries",
    schema,
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
    schema,
    Column("id", _Id, primary_key=True),
    Column("job", _Id, nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("gateway", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("note", Text, nullable=False),
)
gateways = Table(
    "gateways",
    schema,
    Column("name", String(64), primary_key=True),
    Column("started_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
)
switches = Table("switches", schema, Column("name", String(16), primary_key=True), Column("on", Integer))


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


AS_TAKEN = (objects.c.taken, objects.c.number, objects.c.sop_instance)
