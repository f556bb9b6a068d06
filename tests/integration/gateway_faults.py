"""Fault run of the gateway: everything around it, and itself, dies or misbehaves; nothing is lost and nothing is twice.

    python tests/integration/gateway_faults.py --objects 500 --triton-kills 10 --gateway-kills 20 --json OUT

A sender stores phantoms, one study each, and sends again what was not answered with success. Meanwhile the served
phantom model and the gateway are killed with SIGKILL and started again, PostgreSQL, where there is one, is crashed and
started again, and the destinations go through phases: they refuse connections, accept and stay silent, cut connections
in the middle of an object, answer that their disk is full.
At the end every study has to have exactly one set of results at each destination, and the queue has to be empty.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

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

KINDS = ("findings_sr", "text_sr")
TIMEOUT_S = 2.0
PHASES = ("pass", "refuse", "pass", "silent", "pass", "cut", "pass", "full")


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
        return 0x0000

    def close(self) -> None:
        self._server.shutdown()


def start_triton(repository: Path, port: int):
    """The served model on a port; on a busy machine a model's process sometimes fails as it starts."""
    from cxr_triton.errors import CxrError
    from cxr_triton.triton_repo.serve import Server

    for attempt in range(5):
        server = Server(repository, grpc_port=port, metrics_port=0)
        try:
            server.start()
            return server
        except CxrError as error:
            server.stop()
            if attempt == 4:
                raise
            print(f"Triton did not start: {error.message[:200]}", flush=True)


def results_in(orthanc: Orthanc) -> dict[str, str]:
    """SOP instance to study of every SR in an Orthanc."""
    studies = {s["ID"]: s["MainDicomTags"]["StudyInstanceUID"] for s in orthanc.get("/studies?expand")}
    series = {s["ID"]: s for s in orthanc.get("/series?expand") if s["MainDicomTags"].get("Modality") == "SR"}
    return {
        i["MainDicomTags"]["SOPInstanceUID"]: studies[series[i["ParentSeries"]]["ParentStudy"]]
        for i in orthanc.get("/instances?expand")
        if i["ParentSeries"] in series
    }


def run(
    folder: Path,
    *,
    objects: int,
    triton_kills: int,
    gateway_kills: int,
    gateways: int = 1,
    database_crashes: int = 0,
    seed: int = 0,
    phase_s: float = 2.5,
    timeout_s: float = 3600,
) -> dict:
    """The run; what was counted. Raises `AssertionError` when something was lost, twice or left."""
    from cxr_triton.client.gateway.store import Store
    from cxr_triton.errors import CxrError

    rng = random.Random(seed)
    started = time.monotonic()
    drawn = [phantom_dicom(40_000 + i) for i in range(min(objects, 20))]
    files = [renamed(drawn[i % len(drawn)]) for i in range(objects)]
    repository = phantom_repository(folder / "model")
    triton_port = free_port()
    triton = start_triton(repository, triton_port)
    database = Postgres(folder / "postgres") if gateways > 1 else None
    pacs, archive = Orthanc(folder / "pacs"), Orthanc(folder / "archive")
    flaky, to_pacs, to_archive = FlakyPacs(), Proxy(pacs.port), Proxy(int(archive.http.rsplit(":", 1)[1]))
    faulty = (flaky, to_pacs, to_archive)
    destinations = [
        {"name": "pacs", "kind": "dicom", "aet": "ORTHANC", "host": "127.0.0.1", "port": to_pacs.port},
        {"name": "flaky", "kind": "dicom", "aet": "FLAKY", "host": "127.0.0.1", "port": flaky.port},
        {"name": "archive", "kind": "stow", "url": f"http://127.0.0.1:{to_archive.port}/dicom-web"},
    ]
    destinations = [{**to, "timeout_s": TIMEOUT_S, "give_up_s": 86400.0} for to in destinations]
    ports = [free_port() for _ in range(gateways)]
    configs = []
    for i, port in enumerate(ports):
        sections = {"name": f"gateway-{i + 1}", "dicom": {"port": port}, "read": {"max_attempts": 100}}
        if database:
            sections["queue"] = database.url
        configs.append(gateway_config(folder / "storage", f"127.0.0.1:{triton_port}", destinations, **sections))
    running = [GatewayProcess(folder / f"gateway-{i + 1}", config) for i, config in enumerate(configs)]
    url = database.url if database else f"sqlite:///{folder}/storage/queue.sqlite"
    watcher = Store(url, "watcher")
    acknowledged, sends_failed, over = 0, 0, threading.Event()

    def send_all() -> None:
        nonlocal acknowledged, sends_failed
        waiting = list(files)
        turn = 0
        while waiting and not over.is_set():
            batch, turn = waiting[:5], turn + 1
            statuses = send(ports[turn % gateways], batch, timeout_s=10)
            done = sum(status == 0 for status in statuses)
            acknowledged += done
            sends_failed += len(batch) - done
            left = [file for file, status in zip(batch, statuses, strict=True) if status != 0]
            waiting = waiting[5:] + left
            if left:
                time.sleep(0.3)

    def change_phases() -> None:
        step = [rng.randrange(len(PHASES)) for _ in faulty]
        while not over.is_set():
            for i, one in enumerate(faulty):
                one.mode = PHASES[(step[i]) % len(PHASES)]
                step[i] += 1
            over.wait(phase_s)
        for one in faulty:
            one.mode = "pass"

    threads = [threading.Thread(target=target) for target in (send_all, change_phases)]
    kills = sorted(
        [(rng.uniform(0.02, 0.95), "triton", 0) for _ in range(triton_kills)]
        + [(rng.uniform(0.02, 0.95), "gateway", i % gateways) for i in range(gateway_kills)]
        + [(rng.uniform(0.02, 0.95), "database", 0) for _ in range(database_crashes)]
    )
    triton_crashes = 0
    killed = {"triton": 0, "gateway": 0} | ({"database": 0} if database else {})
    try:
        for thread in threads:
            thread.start()
        ends = time.monotonic() + timeout_s
        while True:
            jobs = watcher.counts()["jobs"]
            progress = (acknowledged + jobs["done"]) / (2 * objects)
            if kills and progress >= kills[0][0]:
                _, what, i = kills.pop(0)
                time.sleep(rng.uniform(0, 0.3))
                killed[what] += 1
                if what == "triton":
                    os.kill(triton.pid, signal.SIGKILL)
                    triton.stop()
                    triton = start_triton(repository, triton_port)
                elif what == "database":
                    database.crash()
                    time.sleep(rng.uniform(0.5, 5))
                    database.start()
                else:
                    running[i].kill()
                    running[i] = GatewayProcess(folder / f"gateway-{i + 1}", configs[i])
                print(f"{time.monotonic() - started:6.1f} s  {progress:4.0%}  killed {what} {jobs}", flush=True)
            try:
                triton.check()
            except CxrError as error:  # readings that a killed gateway leaves behind crash this server at times
                triton_crashes += 1
                print(f"{time.monotonic() - started:6.1f} s  {error.message[:200]}", flush=True)
                triton.stop()
                triton = start_triton(repository, triton_port)
            if not kills and acknowledged == objects and jobs["done"] >= objects:
                break
            assert not jobs["dead"], watcher.status()["dead"]
            assert time.monotonic() < ends, f"not done after {timeout_s} s: {watcher.counts()}"
            time.sleep(0.1)
        over.set()
        for thread in threads:
            thread.join()
        open_states = ("received", "grouped", "reading", "sending", "dead", "dropped")
        wait_for(lambda: not any(watcher.counts()["jobs"][s] for s in open_states), "an empty queue")
        counts = watcher.counts()
        studies = {uid for uid, _ in flaky.stored.values()}
        found = {"flaky": {sop: study for sop, (study, _) in flaky.stored.items()}}
        found |= {"pacs": results_in(pacs), "archive": results_in(archive)}
        assert counts["jobs"]["done"] == counts["objects"]["image"] == objects == len(studies), counts
        assert flaky.different == 0, f"{flaky.different} repeats had other bytes"
        for name, results in found.items():
            sets = {study: list(results.values()).count(study) for study in studies}
            assert set(results.values()) == studies, f"{name} lacks studies"
            assert set(sets.values()) == {len(KINDS)}, f"{name}: results per study {sorted(set(sets.values()))}"
            assert results == found["flaky"], f"{name} has other results than flaky"
        jobs_read = sum(line["event"] == "read" for one in running for line in one.lines())
        tried = sum(line["event"] == "not_read" for one in running for line in one.lines())
    finally:
        over.set()
        for process in (*running, pacs, archive):
            process.stop()
        for one in faulty:
            one.close()
        triton.stop()
        watcher.close()
        if database:
            database.stop()
    left = sorted((folder / "storage" / "incoming").iterdir())
    return {
        "objects": objects,
        "studies": len(studies),
        "results_per_study_at_each_destination": len(KINDS),
        "destinations": len(found),
        "killed": killed,
        "triton_crashed_by_itself": triton_crashes,
        "connections_and_requests_broken": {
            "pacs": to_pacs.broken,
            "archive": to_archive.broken,
            "flaky": flaky.broken,
        },
        "sends_without_success": sends_failed,
        "readings_finished": jobs_read,
        "readings_failed": tried,
        "results_delivered_again": flaky.repeats,
        "results_delivered_again_with_other_bytes": flaky.different,
        "left_in_queue": 0,
        "dead_letters": counts["jobs"]["dead"],
        "transfers_broken_off_on_disk": len(left),
        "seconds": round(time.monotonic() - started, 1),
    }


def machine() -> dict:
    """Hardware and versions, for the record."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    names = ("pynetdicom", "pydicom", "sqlalchemy", "psycopg", "aiohttp", "highdicom", "nvidia-pytriton")
    debian = ["orthanc", "postgresql-15", "dcmtk"]
    query = ["dpkg-query", "-W", "-f", "${Package} ${Version}\n", *debian]
    packages = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        **dict(line.split(" ") for line in packages if line),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=500)
    parser.add_argument("--triton-kills", type=int, default=10)
    parser.add_argument("--gateway-kills", type=int, default=20)
    parser.add_argument("--gateways", type=int, default=1, help="two or more share a queue in PostgreSQL")
    parser.add_argument("--database-crashes", type=int, default=10, help="with two or more gateways")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    crashes = asked.database_crashes if asked.gateways > 1 else 0
    with tempfile.TemporaryDirectory(prefix="cxr-faults-") as name:
        result = run(
            Path(name), objects=asked.objects, triton_kills=asked.triton_kills, gateway_kills=asked.gateway_kills,
            gateways=asked.gateways, database_crashes=crashes, seed=asked.seed,
        )  # fmt: skip
    command = f"python {sys.argv[0]} --objects {asked.objects} --triton-kills {asked.triton_kills}"
    command += f" --gateway-kills {asked.gateway_kills} --gateways {asked.gateways} --seed {asked.seed}"
    command += f" --database-crashes {crashes}" if crashes else ""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    result = {"command": command, "date": date, "load_average": os.getloadavg()[2], "machine": machine(), **result}
    print(json.dumps(result, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")
