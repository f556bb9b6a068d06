"""Fault run of the gateway: everything around it, and itself, dies or misbehaves; nothing is lost and nothing is twice.

    python tests/integration/gateway_faults.py --objects 500 --triton-kills 10 --gateway-kills 20 --json OUT
    python tests/integration/gateway_faults.py --objects 10000 --kills 100 --gateways 2 --section gateway

A sender stores phantoms, one study each, sends again what was not answered with success, and some that was. Meanwhile
Triton, the decoder's process in it, the gateways, the destinations, and PostgreSQL, where there is one, are killed with
SIGKILL at random moments and started again, some at the same moment; and connections to the destinations go through
phases: they refuse, accept and stay silent, cut in the middle of an object, answer that their disk is full.
At the end every study that was acknowledged has to have exactly one set of results at each destination, and the queue
has to be empty.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import random
import re
import resource
import select
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import click
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gateway_kills import Progress, Reaper, Victim, overlapping, recovery, schedule
from gateway_peers import (
    GatewayProcess,
    Orthanc,
    Postgres,
    free_port,
    gateway_config,
    phantom_dicom,
    phantom_repository,
    renamed,
    send,
    wait_for,
)
from reliability import provenance, set_section
from soak import process_name

from cxr_triton.client.gateway.schema import jobs
from cxr_triton.client.gateway.store import Store
from cxr_triton.errors import CxrError
from cxr_triton.triton_repo.serve import Server

KINDS = ("findings_sr", "text_sr")
TIMEOUT_S = 2.0
FAULTS = ("refuse", "silent", "cut", "full")
VICTIMS = ("triton", "decoder", "gateway", "database", "destination")
OPEN = ("received", "grouped", "reading", "sending")
BATCH = 5
DRAIN_S = 600
SENT_AGAIN = 0.02
"""Share of the acknowledged objects that are sent once more."""
PACKAGES = ("pynetdicom", "pydicom", "sqlalchemy", "psycopg", "aiohttp", "highdicom", "nvidia-pytriton")
DEBIAN = ("orthanc", "postgresql-15", "dcmtk")


class Proxy:
    """A TCP relay before a destination, whose mode makes connections fail in the ways that networks have."""

    def __init__(self, port: int):
        self.mode, self._target = "pass", port
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._socket.getsockname()[1]
        self.broken = 0
        self._ended = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            if self.mode == "refuse":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
                self.broken += 1
                continue
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        left = random.randrange(400, 9000)
        with client:
            try:
                with socket.create_connection(("127.0.0.1", self._target)) as server:
                    while not self._ended:
                        ready, _, _ = select.select([client, server], [], [], 0.2)
                        if self.mode == "silent":
                            self.broken += bool(ready)
                            time.sleep(0.2)
                            continue
                        for end in ready:
                            data = end.recv(65536)
                            if not data:
                                return
                            if self.mode == "cut" and end is client:
                                left -= len(data)
                                if left < 0:
                                    self.broken += 1
                                    return  # in the middle of what the client sends
                            (server if end is client else client).sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._ended = True
        self._socket.close()


class FlakyPacs:
    """A C-STORE SCP of the test's own: keeps what it answered success for, and remembers repeats.

    In the phases it refuses associations, answers late, aborts while an object comes in, or says that its disk is full.
    """

    def __init__(self):
        from pynetdicom import AE, AllStoragePresentationContexts, evt

        self.mode = "pass"
        self.stored: dict[str, tuple[str, str]] = {}  # SOP instance: study, digest
        self.classes: dict[str, str] = {}  # SOP instance: SOP class
        self.repeats = self.different = self.broken = 0
        self._lock = threading.Lock()
        ae = AE("FLAKY")
        ae.maximum_associations = 100
        ae.supported_contexts = AllStoragePresentationContexts
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_REQUESTED, self._request), (evt.EVT_PDU_RECV, self._pdu)]
        self._server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.port = self._server.server_address[1]

    def _request(self, event) -> None:
        if self.mode == "refuse":
            self.broken += 1
            event.assoc.acse.send_reject(0x02, 0x03, 0x01)
            event.assoc.is_rejected = True
            event.assoc.kill()

    def _pdu(self, event) -> None:
        if self.mode == "cut" and event.pdu.pdu_type == 4 and random.random() < 0.5:
            self.broken += 1
            event.assoc.dul.socket.socket.shutdown(socket.SHUT_RDWR)

    def _store(self, event) -> int:
        if self.mode == "full":
            self.broken += 1
            return 0xA700
        if self.mode == "silent":
            self.broken += 1
            time.sleep(2 * TIMEOUT_S)
        dataset = event.dataset
        digest = hashlib.sha256(event.request.DataSet.getvalue()).hexdigest()
        with self._lock:
            known = self.stored.get(dataset.SOPInstanceUID)
            self.repeats += known is not None
            self.different += known is not None and known[1] != digest
            self.stored[str(dataset.SOPInstanceUID)] = (str(dataset.StudyInstanceUID), digest)
            self.classes[str(dataset.SOPInstanceUID)] = str(dataset.SOPClassUID)
        return 0x0000

    def close(self) -> None:
        self._server.shutdown()


def start_triton(repository: Path, port: int):
    """The served model on a port; on a busy machine a model's process sometimes fails as it starts."""
    for attempt in range(5):
        server = Server(repository, grpc_port=port, metrics_port=0)
        try:
            server.start()
            return server
        except CxrError as error:
            server.stop()
            if attempt == 4:
                raise
            say(f"Triton did not start: {error.message[:200]}")


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def results_in(orthanc: Orthanc) -> dict[str, str]:
    """SOP instance to study of every SR in an Orthanc."""
    studies = {s["ID"]: s["MainDicomTags"]["StudyInstanceUID"] for s in orthanc.pages("/studies")}
    series = {s["ID"]: s for s in orthanc.pages("/series") if s["MainDicomTags"].get("Modality") == "SR"}
    return {
        i["MainDicomTags"]["SOPInstanceUID"]: studies[series[i["ParentSeries"]]["ParentStudy"]]
        for i in orthanc.pages("/instances")
        if i["ParentSeries"] in series
    }


class Sender(threading.Thread):
    """Stores phantoms at the gateways in turn until each was acknowledged; holds only those that are under way.

    Parameters
    ----------
    ports : list of int
        Of the gateways.
    objects : int
        Studies of one phantom each.
    may_send : callable
        Whether the next new ones may go, by the number acknowledged.
    rng : random.Random
    """

    def __init__(self, ports: list[int], objects: int, may_send, rng: random.Random):
        super().__init__()
        self._ports, self._rng, self._may_send = ports, rng, may_send
        drawn = [phantom_dicom(40_000 + i) for i in range(min(objects, 40))]
        self._fresh = ((i, renamed(drawn[i % len(drawn)])) for i in range(objects))
        self.acknowledged: dict[int, str] = {}  # number of the object: its study
        self.failed = self.repeated = 0
        self.over, self.no_more = threading.Event(), threading.Event()

    def run(self) -> None:
        turn, again = 0, []  # what has to go again
        while not self.over.is_set():
            if self.no_more.is_set():
                self._fresh = iter(())
            elif not again and not self._may_send(len(self.acknowledged)):
                time.sleep(0.1)
                continue
            batch = again[:BATCH]
            again = again[BATCH:]
            batch += itertools.islice(self._fresh, BATCH - len(batch))
            if not batch:
                return
            statuses = send(self._ports[turn % len(self._ports)], [file for _, file in batch], timeout_s=10)
            turn += 1
            for (number, file), status in zip(batch, statuses, strict=True):
                if status != 0:
                    self.failed += 1
                    again.append((number, file))
                elif number not in self.acknowledged:
                    self.acknowledged[number] = study_of(file)
                    if self._rng.random() < SENT_AGAIN:
                        self.repeated += 1
                        again.append((number, file))
            if any(statuses):
                time.sleep(0.3)


def study_of(file: bytes) -> str:
    import io

    import pydicom

    return str(pydicom.dcmread(io.BytesIO(file), stop_before_pixels=True).StudyInstanceUID)


class Site:
    """A served model, gateways, their database and destinations, each of which can be killed and started again."""

    def __init__(self, folder: Path, gateways: int, rng: random.Random):
        self.folder, self._rng = folder, rng
        self._repository, self._triton_port = phantom_repository(folder / "model"), free_port()
        self.triton = start_triton(self._repository, self._triton_port)
        self.database = Postgres(folder / "postgres") if gateways > 1 else None
        self.queue_url = self.database.url if self.database else f"sqlite:///{folder}/storage/queue.sqlite"
        self.orthancs = {name: Orthanc(folder / name) for name in ("pacs", "archive")}
        self.flaky, self.to_pacs = FlakyPacs(), Proxy(self.orthancs["pacs"].port)
        self.to_archive = Proxy(int(self.orthancs["archive"].http.rsplit(":", 1)[1]))
        self.faulty = {"pacs": self.to_pacs, "archive": self.to_archive, "flaky": self.flaky}
        self.ports = [free_port() for _ in range(gateways)]
        self._configs = [self._config(i) for i in range(gateways)]
        self.starts_that_failed = 0
        self.gateways: list[GatewayProcess] = []
        for i in range(gateways):
            self.gateways.append(GatewayProcess(folder / f"gateway-{i + 1}", self._configs[i]))

    def _config(self, i: int) -> dict:
        destinations = [
            {"name": "pacs", "kind": "dicom", "aet": "ORTHANC", "host": "127.0.0.1", "port": self.to_pacs.port},
            {"name": "flaky", "kind": "dicom", "aet": "FLAKY", "host": "127.0.0.1", "port": self.flaky.port},
            {"name": "archive", "kind": "stow", "url": f"http://127.0.0.1:{self.to_archive.port}/dicom-web"},
        ]
        destinations = [{**to, "timeout_s": TIMEOUT_S, "give_up_s": 86400.0} for to in destinations]
        sections = {"name": f"gateway-{i + 1}", "dicom": {"port": self.ports[i]}, "read": {"max_attempts": 100}}
        if self.database:
            sections["queue"] = self.database.url
        return gateway_config(self.folder / "storage", f"127.0.0.1:{self._triton_port}", destinations, **sections)

    def victims(self) -> list[Victim]:
        """All that can be killed, with the ways in which it can be."""
        ends = {"triton": self._kill_triton, "decoder": self._kill_decoder}
        found = [Victim("triton", ends, self._start_triton, self._is_triton_alive)]
        for i in range(len(self.gateways)):
            end, start = functools.partial(self._kill_gateway, i), functools.partial(self._start_gateway, i)
            is_alive = functools.partial(self._is_gateway_alive, i)
            found.append(Victim(f"gateway-{i + 1}", {"gateway": end}, start, is_alive))
        for name, orthanc in self.orthancs.items():
            is_alive = functools.partial(is_running, orthanc)
            end = functools.partial(orthanc.stop, signal.SIGKILL)
            found.append(Victim(name, {"destination": end}, orthanc.start, is_alive))
        if self.database:
            is_alive = functools.partial(is_running, self.database)
            found.append(Victim("database", {"database": self._kill_database}, self._start_database, is_alive))
        return found

    def _kill_triton(self) -> None:
        os.kill(self.triton.pid, signal.SIGKILL)

    def _kill_decoder(self) -> None:
        for pid in self.triton.pids:
            if (process_name(pid) or "").startswith("decoder "):
                os.kill(pid, signal.SIGKILL)

    def _start_triton(self) -> None:
        self.triton.stop()
        self.triton = start_triton(self._repository, self._triton_port)

    def _is_triton_alive(self) -> bool:
        try:
            self.triton.check()
        except CxrError as error:
            say(error.message[:200])
            return False
        return True

    def _kill_gateway(self, i: int) -> None:
        self.gateways[i].kill()

    def _start_gateway(self, i: int) -> None:
        """As a supervisor does: again and again, since a gateway ends that finds no database as it starts."""
        for _ in range(60):
            try:
                self.gateways[i] = GatewayProcess(self.folder / f"gateway-{i + 1}", self._configs[i])
                return
            except AssertionError as error:
                self.starts_that_failed += 1
                last = error
                time.sleep(1)
        raise last

    def _is_gateway_alive(self, i: int) -> bool:
        if alive := is_running(self.gateways[i]):
            return alive
        say(f"gateway-{i + 1} ended: {self.gateways[i].log.read_text(errors='replace')[-2000:]}")
        return False

    def _kill_database(self) -> None:
        if self._rng.random() < 0.5:
            self.database.crash()
        else:
            self.database.kill_backend(self._rng)

    def _start_database(self) -> None:
        if not is_running(self.database):
            self.database.start()
        wait_for(self.database._is_up, "PostgreSQL's recovery")

    def close(self) -> None:
        for process in (*self.gateways, *self.orthancs.values()):
            process.stop()
        for one in self.faulty.values():
            one.close()
        self.triton.stop()
        if self.database:
            self.database.stop()


def is_running(process) -> bool:
    return process.process.poll() is None


class Phases(threading.Thread):
    """Makes what leads to the destinations faulty for a share of the time."""

    def __init__(self, faulty: dict, phase_s: float, share: float, rng: random.Random):
        super().__init__()
        self._faulty, self._phase_s, self._share, self._rng = faulty, phase_s, share, rng
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            for one in self._faulty.values():
                one.mode = self._rng.choice(FAULTS) if self._rng.random() < self._share else "pass"
            self.over.wait(self._phase_s)
        for one in self._faulty.values():
            one.mode = "pass"


class Queue:
    """Numbers of jobs by state, or what they were last while the database is away."""

    def __init__(self, url: str):
        self._engine = sa.create_engine(url, pool_pre_ping=True)
        self.jobs: Counter[str] = Counter()

    def look(self) -> None:
        try:
            with self._engine.connect() as c:
                rows = c.execute(sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)).all()
            self.jobs = Counter({row[0]: row[1] for row in rows})
        except sa.exc.SQLAlchemyError:
            return


def count(site: Site, acknowledged: set[str]) -> dict:
    """What each destination holds of the acknowledged studies, against one set of results of each."""
    found = {name: results_in(orthanc) for name, orthanc in site.orthancs.items()}
    found["flaky"] = {sop: study for sop, (study, _) in site.flaky.stored.items()}
    lost, doubled, strange = {}, {}, {}
    for name, results in found.items():
        per_study = Counter(results.values())
        lost[name] = sum(per_study[study] < len(KINDS) for study in acknowledged)
        doubled[name] = sum(per_study[study] > len(KINDS) for study in acknowledged)
        strange[name] = len(set(results.values()) - acknowledged)
    sets = {}
    for sop, sop_class in site.flaky.classes.items():
        sets.setdefault(found["flaky"][sop], []).append(sop_class)
    assert all(len(set(classes)) == len(KINDS) for classes in sets.values()), "a set lacks one kind of result"
    assert site.flaky.different == 0, f"{site.flaky.different} repeats had other bytes"
    assert not any(strange.values()), f"results of studies that were never acknowledged: {strange}"
    if not any(lost.values()) and not any(doubled.values()):
        assert found["pacs"] == found["archive"] == found["flaky"], "destinations hold different results"
    return {"lost": sum(lost.values()), "doubled": sum(doubled.values())}


def run(
    folder: Path,
    *,
    objects: int,
    kills: dict[str, int],
    gateways: int = 1,
    seed: int = 0,
    phase_s: float = 2.5,
    fault_share: float = 0.5,
    most_open: int = 200,
    send_s: float = 3600,
) -> dict:
    """The run; what was counted. Raises `AssertionError` when something was lost, twice or left.

    After `send_s` nothing new is sent, and the objects of the run are those sent until then.
    """
    rng = random.Random(seed)
    started = time.monotonic()
    site = Site(folder, gateways, rng)
    queue = Queue(site.queue_url)
    sender = Sender(site.ports, objects, lambda sent: sent - queue.jobs["done"] < most_open, random.Random(seed + 1))
    phases = Phases(site.faulty, phase_s, fault_share, random.Random(seed + 2))
    reaper = Reaper(site.victims(), schedule(rng, kills), rng, say)
    try:
        sender.start()
        phases.start()
        told, began = 0.0, time.monotonic()
        while not (reaper.is_quiet() and not sender.is_alive() and queue.jobs["done"] >= len(sender.acknowledged)):
            queue.look()
            passed_s = time.monotonic() - began
            progress = (len(sender.acknowledged) + queue.jobs["done"]) / (2 * objects)
            reaper.step(max(progress, passed_s / send_s))
            if passed_s > send_s:
                sender.no_more.set()
            assert not queue.jobs["dead"], f"{queue.jobs['dead']} dead letters"
            assert passed_s < send_s + DRAIN_S, f"not done {DRAIN_S} s after the last was sent: {dict(queue.jobs)}"
            if passed_s > told + 30:
                told = passed_s
                say(f"{passed_s:.0f} s, {len(sender.acknowledged)} acknowledged, {dict(queue.jobs)}")
            time.sleep(0.5)
        phases.over.set()
        assert sender.no_more.is_set() or len(sender.acknowledged) == objects, "the sender ended before its time"
        objects = len(sender.acknowledged)
        wait_for(lambda: queue.look() or not any(queue.jobs[s] for s in OPEN), "an empty queue")
        store = Store(site.queue_url, "watcher")
        counts = store.counts()
        store.close()
        assert counts["jobs"]["done"] == objects == sum(counts["jobs"].values()), counts["jobs"]
        assert counts["objects"]["image"] == objects == sum(counts["objects"].values()), counts["objects"]
        outcome = count(site, set(sender.acknowledged.values()))
        assert not any(outcome.values()), outcome
        worked = Progress(site.queue_url)
        lines = Counter(line["event"] for gateway in site.gateways for line in gateway.lines())
    finally:
        for thread in (sender, phases):
            thread.over.set()
        reaper.wait()
        site.close()
    return {
        "objects": objects,
        "gateways": gateways,
        **outcome,
        "results_per_study_at_each_destination": len(KINDS),
        "destinations": len(site.faulty),
        "kills": sum(kills.values()),
        "killed": Counter(outage.kind for outage in reaper.outages),
        "killed_while_another_was_away": overlapping(reaper.outages),
        "died_by_themselves": Counter(outage.victim for outage in reaper.died),
        "gateway_starts_without_database": site.starts_that_failed,
        **recovery(reaper.outages, worked),
        "connections_and_requests_broken": {name: one.broken for name, one in site.faulty.items()},
        "sends_without_success": sender.failed,
        "acknowledged_objects_sent_again": sender.repeated,
        "readings_finished": lines["read"],
        "readings_failed": lines["not_read"],
        "results_delivered_again": site.flaky.repeats,
        "results_delivered_again_with_other_bytes": site.flaky.different,
        "left_in_queue": sum(counts["jobs"][state] for state in OPEN),
        "dead_letters": counts["jobs"]["dead"],
        "transfers_broken_off_on_disk": len(list((folder / "storage" / "incoming").iterdir())),
        "peak_memory_of_this_process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "seconds": round(time.monotonic() - started, 1),
    }


@click.command(help=__doc__)
@click.option("--objects", default=500, show_default=True)
@click.option("--kills", type=int, help="Of victims drawn at random, in place of the numbers below.")
@click.option("--triton-kills", default=10, show_default=True)
@click.option("--decoder-kills", default=0, show_default=True)
@click.option("--gateway-kills", default=20, show_default=True)
@click.option("--destination-kills", default=0, show_default=True)
@click.option("--database-crashes", "database_kills", default=10, show_default=True, help="With two or more gateways.")
@click.option("--gateways", default=1, show_default=True, help="Two or more share a queue in PostgreSQL.")
@click.option("--fault-share", default=0.5, show_default=True, help="Of the time that a destination is faulty.")
@click.option("--phase-s", default=2.5, show_default=True)
@click.option("--most-open", default=200, show_default=True, help="Studies acknowledged and not done.")
@click.option("--seed", default=0, show_default=True)
@click.option("--send-s", default=3600.0, show_default=True, help="Send nothing new after so long.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--section", help="Of docs/results/reliability.json, to set.")
def main(*, kills, gateways, seed, json_path, section, **asked):
    numbers = {kind: asked.pop(f"{kind}_kills") for kind in VICTIMS}
    if kills is not None:
        numbers = dict(Counter(random.Random(seed).choices(VICTIMS, k=kills)))
    if gateways < 2:
        numbers.pop("database", None)
    record = provenance(re.sub(r" --json \S+", "", f"python {shlex.join(sys.argv)}"), PACKAGES, DEBIAN)
    with tempfile.TemporaryDirectory(prefix="cxr-faults-") as name:
        result = run(Path(name), kills=numbers, gateways=gateways, seed=seed, **asked)
    result = {**record, "load_average_at_end": round(os.getloadavg()[2], 1), **result}
    print(json.dumps(result, indent=2))
    if json_path:
        json_path.write_text(json.dumps(result, indent=2) + "\n")
    if section:
        set_section(section, result)


if __name__ == "__main__":
    main()
