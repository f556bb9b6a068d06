"""What the gateway tells: JSON lines without patient data, and Prometheus metrics."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import sqlalchemy.exc
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily

from cxr_triton.client.gateway.config import LEAST_KEY_BYTES, Config
from cxr_triton.client.gateway.disk import new_file
from cxr_triton.errors import InvalidConfig

KEY_BYTES = 32
_MAKE = "head -c 32 /dev/urandom > log.key"
LEVELS = ("debug", "info", "warning", "error")


class Log:
    """One JSON object a line.

    UIDs go through `uid`: the first 16 hexadecimal digits of their HMAC-SHA256, so that who holds the key can find a
    study's lines, and nobody else can tell which study they are about. Names, numbers and dates of patients, file
    names and texts of readings are never given to it.
    """

    def __init__(self, config: Config, stream=None):
        self._stream = stream or sys.stderr
        self._least = LEVELS.index(config.log.level)
        self._gateway = config.name
        self._key = _key(config)
        self._lock = threading.Lock()

    def uid(self, uid: str) -> str:
        """What stands for a UID, or any other identifier, in a log."""
        return hmac.new(self._key, uid.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:16]

    def __call__(self, level: str, event: str, **fields) -> None:
        """Write a line, unless `level` is below that of the configuration."""
        if LEVELS.index(level) < self._least:
            return
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"at": at, "level": level, "gateway": self._gateway, "event": event, **fields}, default=str)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


def _key(config: Config) -> bytes:
    """The site's key.

    Raises
    ------
    InvalidConfig
        It cannot be read, or is so short that UIDs could be found by trying.
    """
    path = Path(config.log.key_file or Path(config.storage) / "log.key")
    try:
        if not config.log.key_file and not path.exists():
            new_file(path, secrets.token_bytes(KEY_BYTES))
        key = path.read_bytes()
    except OSError as error:
        raise InvalidConfig(
            f"log.key_file: {path} cannot be made or read ({error.strerror}); make it: {_MAKE}"
        ) from None
    if len(key.strip()) < LEAST_KEY_BYTES:
        raise InvalidConfig(
            f"log.key_file: {path} has {len(key)} bytes, at least {LEAST_KEY_BYTES} are needed; "
            f"remove it if no key was ever in it, and make another: {_MAKE}"
        )
    return key


class Metrics:
    """Counters of this process, and the queue's numbers when they are asked for.

    Parameters
    ----------
    counts : callable
        `Store.counts`.
    free_bytes : callable
        Room left on the disk of the storage folder.
    """

    def __init__(self, counts: Callable[[], dict], free_bytes: Callable[[], int]):
        self.registry = CollectorRegistry()
        self._counts, self._free_bytes = counts, free_bytes

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cxr_gateway_{name}", text, labels, registry=self.registry)

        self.received = counter("received", "Objects that came in, by door and what became of them.", "door", "verdict")
        self.associations = counter("associations", "Associations asked for, by answer.", "answer")
        self.connections_refused = counter("connections_refused", "Connections closed unheard, by reason.", "reason")
        self.readings = counter("readings", "Readings, by status or error code.", "outcome")
        self.deliveries = counter("deliveries", "Attempts to deliver a result.", "destination", "outcome")
        self.commitments = counter("commitments", "Results in answers to storage commitment.", "outcome")
        buckets = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
        self.reading_s = Histogram(
            "cxr_gateway_reading_seconds", "From request to reading.", buckets=buckets, registry=self.registry
        )
        self.turnaround_s = Histogram(
            "cxr_gateway_turnaround_seconds",
            "From the first image of a study to its result at a destination.",
            ("destination",),
            buckets=(*buckets, 1800, 7200),
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Gauges of the disk and the queue, for prometheus_client; without the latter's while it cannot be reached."""
        yield GaugeMetricFamily("cxr_gateway_disk_free_bytes", "Room left for objects.", self._free_bytes())
        try:
            counts = self._counts()
        except sqlalchemy.exc.SQLAlchemyError:
            return
        jobs = (([state], count) for state, count in counts["jobs"].items())
        yield _gauge("jobs", "Jobs in the queue, by state.", ["state"], jobs)
        objects = (([kind], count) for kind, count in counts["objects"].items())
        yield _gauge("objects", "Objects kept, by kind.", ["kind"], objects)
        waiting = (([to, state], n) for to, states in counts["deliveries"].items() for state, n in states.items())
        yield _gauge("queued_deliveries", "Results by destination and state.", ["destination", "state"], waiting)
        yield GaugeMetricFamily(
            "cxr_gateway_oldest_open_seconds", "Age of the oldest open job.", counts["oldest_open_s"]
        )


def _gauge(name: str, text: str, labels: list[str], values: Iterable[tuple[list[str], int]]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"cxr_gateway_{name}", text, labels=labels)
    for key, value in values:
        gauge.add_metric(key, value)
    return gauge
