"""The doors of a gateway process for `mutated`: STOW-RS requests and associations, over raw sockets."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutator
import mutator_messages
from gateway_peers import GatewayProcess, gateway_config, send
from mutation_corpus import associations, corpus

CLIENTS = 8
NAMES = ("explicit", "implicit", "deflated", "jpeg_ls", "jpeg_lossless", "spoken")
"""Of the corpus, what is sent."""
_NOWHERE = [{"name": "nowhere", "kind": "dicom", "aet": "NOWHERE", "host": "127.0.0.1", "port": 1}]
_ANSWERS = {200, 202, 400, 401, 404, 405, 408, 409, 411, 413, 415, 417, 507}
_WAIT_S = 25.0
_QUIET_S = 0.1
_RESPONSE = re.compile(rb"\0\0\0\x01\x02\0\0\0(..)[\s\S]*?\0\0\0\x09\x02\0\0\0(..)", re.DOTALL)
_C_STORE_RSP = 0x8001


class _Site:
    """A gateway with short limits, and what is looked at when its inputs are through."""

    def __init__(self, folder: Path):
        config = gateway_config(
            folder / "storage", "127.0.0.1:1", _NOWHERE,
            dicom={"port": 0, "first_pdu_s": 2, "pdu_s": 2, "idle_s": 4, "max_per_address": 64, "max_associations": 64},
            web={"port": 0, "stow": True, "idle_s": 2, "total_s": 10, "max_per_address": 64},
            intake={"max_object_mib": 4},
        )  # fmt: skip
        self.storage = folder / "storage"
        self.process = GatewayProcess(folder / "gateway", config)
        self.files = {name: data for name, data in corpus().dicom.items() if name in NAMES}
        self.at_first = self._uses()

    def _uses(self) -> dict[str, int]:
        pid = self.process.process.pid
        status = Path(f"/proc/{pid}/status").read_text()
        kib = {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "VmHWM")}
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        return {"rss_mib": kib["VmRSS"] >> 10, "peak_mib": kib["VmHWM"] >> 10, "descriptors": descriptors}

    def is_friendly(self) -> bool:
        """Whether an object like any other is taken over DIMSE."""
        return send(self.process.port, [self.files["explicit"]], timeout_s=20) == [0]

    def record(self, tally: Any) -> dict[str, Any]:
        """JSON of a door, once the gateway was looked at and stopped."""
        died = self.process.process.poll() is not None
        if died or not self.is_friendly():
            tally.finding("the gateway died" if died else "the gateway does not take a whole object", -1, b"")
        if not died:
            time.sleep(5)  # associations under way
        at_last = self.at_first if died else self._uses()
        counts = self.process.queue.counts()["objects"]
        self.process.stop()
        log = self.process.log.read_text(errors="replace")
        for line in self.process.lines():
            if line.get("event") == "request_failed":
                tally.finding(f"untyped {line.get('error')}", -1, b"", str(line))
        if "Traceback" in log:
            tally.finding("traceback", -1, log[log.index("Traceback") :].encode(), log[log.index("Traceback") :][-300:])
        left = len(list((self.storage / "incoming").iterdir()))
        if left:
            tally.finding("files left behind", -1, b"", f"{left} in incoming")
        events = Counter(line["event"] for line in self.process.lines())
        return tally.record(
            gateway={"at_first": self.at_first, "at_last": at_last}, objects=counts, log_events=dict(events)
        )


def _in_threads(work: Any, tally: Any, try_one: Callable[[int], None], is_alive: Callable[[], bool]) -> None:
    """All numbers, by several clients at once."""
    numbers, lock, stopped = iter(range(work.inputs)), threading.Lock(), threading.Event()

    def client() -> None:
        while not stopped.is_set():
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try_one(number)
            with lock:
                if not tally.goes_on() or not is_alive():
                    stopped.set()

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _until_closed(connection: socket.socket, ends: float) -> tuple[bytes, bool]:
    """What came, and whether the peer closed the connection in time."""
    parts = []
    while (left := ends - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            part = connection.recv(1 << 16)
        except TimeoutError:
            break
        except OSError:
            return b"".join(parts), True
        if not part:
            return b"".join(parts), True
        parts.append(part)
    return b"".join(parts), False


# ------------------------------------------------------------------------------------------------------------- STOW-RS


def _post(kind: str, body: bytes, rng: Any) -> tuple[bytes, bool]:
    """A request, and whether its head is whole."""
    path = rng.choice(("/dicom-web/studies",) * 8 + ("/dicom-web/studies/1.2.3", "/dicom-web/studies/", "/health/live"))
    head = f"POST {path} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\nContent-Type: {kind}\r\n".encode()
    if rng.random() < 0.1:
        middle = rng.randrange(len(body) + 1)
        chunks = b"".join(
            f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (body[:middle], body[middle:]) if part
        )
        head, body = head + b"Transfer-Encoding: chunked\r\n", chunks + b"0\r\n\r\n"
    else:
        head += f"Content-Length: {len(body)}\r\n".encode()
    if rng.random() < 0.02:
        return mutator.of_bytes(head, rng) + b"\r\n" + body, False
    return head + b"\r\n" + body, True


def through_stow(work: Any, tally: Any) -> dict[str, Any]:
    """The door of STOW-RS."""
    with tempfile.TemporaryDirectory() as folder:
        site = _Site(Path(folder))
        port, files = int(site.process.web.rpartition(":")[2]), list(site.files.values())
        slowest = [0.0]

        def try_one(number: int) -> None:
            rng = work.rng(number)
            parts = [rng.choice(files) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
            kind, body = mutator_messages.of_multipart(parts, rng)
            request, is_whole = _post(kind, body, rng)
            started = time.monotonic()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(request)
                answer, closed = _until_closed(connection, started + _WAIT_S)
                slowest[0] = max(slowest[0], time.monotonic() - started)
                status = int(answer[9:12]) if answer[:5] == b"HTTP/" else 0
                if status in (200, 202):
                    tally.outcomes["taken, some or all"] += 1
                else:
                    tally.outcomes[f"refused {status}" if status else "closed without an answer"] += 1
                if not closed:
                    tally.finding("not answered in time", number, request)
                elif is_whole and status not in _ANSWERS:
                    tally.finding(f"answered {status}", number, request, answer[:200].decode("latin-1"))
                if status == 202:
                    tally.outcomes["of which some parts refused"] += 1

        _in_threads(work, tally, try_one, lambda: site.process.process.poll() is None)
        record = site.record(tally)
    return {**record, "slowest_s": round(slowest[0], 3)}


# --------------------------------------------------------------------------------------------------------------- DIMSE


def _converse(connection: socket.socket, pdus: list[bytes]) -> tuple[bytes, bool]:
    """Send a request, then what follows; end the sending when nothing comes any more, and hear the peer out."""
    ends = time.monotonic() + _WAIT_S
    said = b""
    for i, pdu in enumerate(pdus):
        with contextlib.suppress(OSError):
            connection.sendall(pdu)
        if i == 0:
            connection.settimeout(1.0)
            with contextlib.suppress(OSError):
                said += connection.recv(1 << 16)
            if said[:1] not in (b"\2", b""):
                break
    connection.settimeout(_QUIET_S)
    with contextlib.suppress(OSError):
        while part := connection.recv(1 << 16):
            said += part
            if part[:1] == b"\6":
                break
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
    rest, closed = _until_closed(connection, ends)
    return said + rest, closed


def through_dimse(work: Any, tally: Any) -> dict[str, Any]:
    """The door of associations."""
    with tempfile.TemporaryDirectory() as folder:
        site = _Site(Path(folder))
        sequences = list(associations(site.files).values())
        slowest = [0.0]

        def try_one(number: int) -> None:
            rng = work.rng(number)
            pdus = mutator_messages.of_pdus(rng.choice(sequences), rng, sequences)
            if rng.random() < 0.3:  # the object instead of the protocol
                pdus = _with_mutated_object(rng.choice(sequences), rng)
            started = time.monotonic()
            try:
                connection = socket.create_connection(("127.0.0.1", site.process.port))
            except OSError as error:
                return tally.finding("no connection", number, b"".join(pdus), str(error))
            with connection:
                said, closed = _converse(connection, pdus)
            slowest[0] = max(slowest[0], time.monotonic() - started)
            if not closed:
                tally.finding("not ended in time", number, b"".join(pdus))
            tally.outcomes[_outcome(said)] += 1

        _in_threads(work, tally, try_one, lambda: site.process.process.poll() is None)
        record = site.record(tally)
    return {**record, "slowest_s": round(slowest[0], 3)}


def _with_mutated_object(pdus: list[bytes], rng: Any) -> list[bytes]:
    if len(pdus) < 6:
        return mutator_messages.of_pdus(pdus, rng, [pdus])
    out = list(pdus)
    i = rng.randrange(3, 5)
    body = mutator.of_bytes(out[i][12:], rng)
    out[i] = struct.pack(">BBIIBB", 4, 0, len(body) + 6, len(body) + 2, *out[i][10:12]) + body
    return out


def _outcome(said: bytes) -> str:
    stores = [int.from_bytes(status, "little") for kind, status in _RESPONSE.findall(said) if kind == b"\1\x80"]
    if 0 in stores:
        return "taken: C-STORE with success"
    if stores:
        return f"refused: C-STORE status {stores[-1]:04X}"
    kinds = []
    while len(said) >= 6:
        kinds.append(said[0])
        said = said[6 + struct.unpack_from(">I", said, 2)[0] :]
    if 7 in kinds:
        return "refused: A-ABORT"
    if 3 in kinds:
        return "refused: A-ASSOCIATE-RJ"
    if 4 in kinds:
        return "answered: another message"
    if 6 in kinds:
        return "answered: release alone"
    return "closed after the association" if 2 in kinds else "closed without a word"
