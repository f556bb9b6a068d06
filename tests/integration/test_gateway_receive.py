"""The gateway's doors, as peers find them: friendly, wrong and hostile ones. No reader runs; the queue just fills."""

import asyncio
import contextlib
import functools
import json
import os
import random
import resource
import socket
import ssl
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

pytest.importorskip("pynetdicom")
pytest.importorskip("sqlalchemy")

from gateway_peers import (
    GatewayProcess,
    gateway_config,
    phantom_dicom,
    renamed,
    require,
    send,
    wait_for,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutation_corpus import associations

from cxr_triton.cli import main
from cxr_triton.client.endpoint import TlsFiles
from cxr_triton.client.gateway.config import Destination, Unreachable
from cxr_triton.client.gateway.send import DicomSender
from cxr_triton.pixels.dicom import read_identity

NOWHERE = [{"name": "nowhere", "kind": "dicom", "aet": "NOWHERE", "host": "127.0.0.1", "port": 1}]
LIMIT_MIB = 4


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """A gateway with short limits, two of whose peers are known."""
    folder = tmp_path_factory.mktemp("receive")
    (folder / "in").mkdir()
    config = gateway_config(
        folder / "storage",
        "127.0.0.1:1",
        NOWHERE,
        dicom={"port": 0, "first_pdu_s": 3, "pdu_s": 3, "idle_s": 20, "max_per_address": 20, "max_associations": 8,
               "peers": [{"aet": "MODALITY", "addresses": ["127.0.0.1"]}, {"aet": "FAR", "addresses": ["10.0.0.0/8"]}]},
        folder={"path": str(folder / "in"), "every_s": 0.1},
        intake={"max_object_mib": LIMIT_MIB},
    )  # fmt: skip
    with GatewayProcess(folder / "gateway", config) as gateway:
        gateway.inbox, gateway.storage = folder / "in", folder / "storage"
        yield gateway


@pytest.fixture(autouse=True)
def still_well(gateway):
    """After each test the gateway is up and serves others."""
    yield
    assert gateway.process.poll() is None, gateway.log.read_text()[-3000:]
    wait_for(lambda: send(gateway.port, [friendly()], timeout_s=20) == [0], "a friendly C-STORE")


@functools.cache
def friendly() -> bytes:
    """An object like any other."""
    return phantom_dicom(1)


def objects(gateway) -> dict:
    return gateway.queue.counts()["objects"]


def post(gateway, parts: list[bytes], path="/dicom-web/studies", kind='multipart/related; type="application/dicom"'):
    """Status and answer of a STOW-RS request."""
    return post_body(gateway, framed(parts), path, kind)


def framed(parts: list[bytes]) -> bytes:
    """multipart/related with the boundary xyz."""
    return b"".join(b"--xyz\r\nContent-Type: application/dicom\r\n\r\n" + part + b"\r\n" for part in parts) + b"--xyz--"


def post_body(gateway, body: bytes, path="/dicom-web/studies", kind="multipart/related"):
    headers = {"Content-Type": f"{kind}; boundary=xyz"}
    request = urllib.request.Request(gateway.web + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def rss_mib(gateway) -> float:
    pages = int(Path(f"/proc/{gateway.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# ------------------------------------------------------------------------------------------------------- friendly


def test_dcmtk_echoes_and_stores(gateway, tmp_path):
    echoscu, storescu = require("echoscu"), require("storescu")
    to = ["-aet", "MODALITY", "-aec", "CXR_GATEWAY", "127.0.0.1", str(gateway.port)]
    subprocess.run([echoscu, *to], check=True)
    before = objects(gateway)["image"]
    (tmp_path / "a.dcm").write_bytes(phantom_dicom(2))
    subprocess.run([storescu, *to, str(tmp_path / "a.dcm")], check=True)
    assert objects(gateway)["image"] == before + 1


def test_an_object_is_stored_as_it_came_and_a_repeat_is_no_second_one(gateway):
    import io

    import pydicom

    file = phantom_dicom(3)
    before = objects(gateway)["image"]
    known = dict.fromkeys(gateway.storage.glob("objects/*/*.dcm"))
    assert send(gateway.port, [file, file]) == [0, 0]
    (path,) = [path for path in gateway.storage.glob("objects/*/*.dcm") if path not in known]
    assert objects(gateway)["image"] == before + 1
    sent, kept = pydicom.dcmread(io.BytesIO(file)), pydicom.dcmread(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert sent == kept and sent.file_meta.TransferSyntaxUID == kept.file_meta.TransferSyntaxUID


def test_other_bytes_under_one_uid_are_kept_and_flagged(gateway):
    import io

    import pydicom

    file = phantom_dicom(4)
    changed = pydicom.dcmread(io.BytesIO(file))
    changed.PatientComments = "changed"
    out = io.BytesIO()
    changed.save_as(out, enforce_file_format=True)
    before = objects(gateway)["conflict"]
    assert send(gateway.port, [file, out.getvalue(), out.getvalue()]) == [0, 0, 0]
    assert objects(gateway)["conflict"] == before + 1


def test_stow_stores_each_part_and_names_what_failed(gateway):
    first, second = phantom_dicom(5), phantom_dicom(6)
    status, answer = post(gateway, [first, second])
    assert status == 200 and len(answer["00081199"]["Value"]) == 2 and "00081198" not in answer
    status, answer = post(gateway, [phantom_dicom(7), b"no DICOM"])
    assert status == 202 and answer["00081198"]["Value"][0]["00081197"]["Value"] == [0xC000]
    status, answer = post(gateway, [b"no DICOM"])
    assert status == 409
    assert post(gateway, [phantom_dicom(8)], "/dicom-web/studies/1.2.3")[0] == 409  # of another study
    assert post(gateway, [first], kind="application/json")[0] == 415
    assert post(gateway, [b"x" * (LIMIT_MIB * 2**20 + 1)])[0] == 409


def test_a_watched_folder_takes_files_and_sets_aside_what_is_none(gateway):
    before = objects(gateway)["image"]
    (gateway.inbox / "a.dcm").write_bytes(phantom_dicom(9))
    (gateway.inbox / "b.dcm").write_bytes(b"no DICOM")
    rejected = gateway.inbox / "rejected" / "b.dcm"
    wait_for(lambda: rejected.exists() and not (gateway.inbox / "a.dcm").exists(), "the folder's turn")
    assert objects(gateway)["image"] == before + 1


def test_drain_takes_nothing_in_and_undo_does_again(gateway):
    assert send(gateway.port, [phantom_dicom(10)]) == [0]
    assert gateway.ask("drain", "--timeout-s", "0", code=3)["left"] > 0
    wait_for(lambda: send(gateway.port, [phantom_dicom(10)], timeout_s=20) == [-1], "a refused association")
    assert post(gateway, [phantom_dicom(10)])[0] == 507
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{gateway.web}/health/ready")
    assert json.loads(error.value.read())["trouble"] == ["draining"]
    gateway.ask("drain", "--undo")
    wait_for(lambda: send(gateway.port, [phantom_dicom(10)], timeout_s=20) == [0], "objects taken in again")


def test_operators_drop_and_look_at_a_job(gateway):
    send(gateway.port, [phantom_dicom(11)])
    status = gateway.ask("status")
    wait_for(lambda: gateway.queue.counts()["jobs"]["grouped"], "a grouped job")
    assert status["gateways"][0]["name"] == "gateway"
    assert gateway.ask("drop", "1")["jobs"] == [1] and gateway.ask("drop", "1", code=3)["jobs"] == []
    assert gateway.ask("status", "1")["history"][-1]["state"] == "dropped"
    assert gateway.ask("retry")["jobs"] == []


def test_metrics_and_log_tell_of_it_without_a_patient(gateway):
    secret = renamed(phantom_dicom(12), patient="SECRET-4711")
    send(gateway.port, [secret])
    text = urllib.request.urlopen(f"{gateway.web}/metrics").read().decode()
    assert 'cxr_gateway_received_total{door="dicom",verdict="image"}' in text
    assert "cxr_gateway_jobs{" in text and "cxr_gateway_disk_free_bytes" in text
    import io

    import pydicom

    uid = str(pydicom.dcmread(io.BytesIO(secret)).StudyInstanceUID)
    log = gateway.log.read_text()
    assert "SECRET-4711" not in log and "PHANTOM^SYNTHETIC" not in log and uid not in log
    assert all(json.loads(line)["event"] for line in log.splitlines())
    assert b"SECRET-4711" not in (gateway.storage / "queue.sqlite").read_bytes()


# ---------------------------------------------------------------------------------------------------------- wrong


def test_a_gateway_that_crashes_leaves_no_core(gateway):
    """Studies would be in it."""
    assert resource.prlimit(gateway.process.pid, resource.RLIMIT_CORE) == (0, 0)


def test_a_wrong_peer_is_refused(gateway):
    assert send(gateway.port, [phantom_dicom(1)], aet="STRANGER") == [-1]
    assert send(gateway.port, [phantom_dicom(1)], aet="FAR") == [-1]  # known, but not from here
    assert send(gateway.port, [phantom_dicom(1)], called="OTHER") == [-1]


def test_what_is_no_object_is_answered_with_a_status(gateway):
    from pydicom import Dataset
    from pydicom.uid import ExplicitVRLittleEndian
    from pynetdicom import AE

    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    dataset.file_meta = Dataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ae = AE("MODALITY")
    ae.add_requested_context(dataset.SOPClassUID, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", gateway.port, ae_title="CXR_GATEWAY")
    status = association.send_c_store(dataset)
    association.release()
    assert status.Status == 0xC000 and "study" in status.ErrorComment


def test_a_full_disk_is_answered_with_a700_and_507(tmp_path):
    config = gateway_config(tmp_path / "s", "127.0.0.1:1", NOWHERE, intake={"min_free_mib": 1 << 24})
    with GatewayProcess(tmp_path / "g", config) as full:
        assert send(full.port, [phantom_dicom(1)]) == [0xA700]
        assert post(full, [phantom_dicom(1)])[0] == 507
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{full.web}/health/ready")
        assert urllib.request.urlopen(f"{full.web}/health/live").status == 200
        echo = [require("echoscu"), "-aec", "CXR_GATEWAY", "127.0.0.1", str(full.port)]
        subprocess.run(echo, check=True)  # C-ECHO is answered all the same
        again = CliRunner().invoke(main, ["gateway", "--config", str(full.config)])
        assert again.exit_code == 75 and "runs on" in again.stderr  # two processes of one name


def test_tls_is_spoken_and_asks_for_a_certificate(tmp_path):
    openssl = require("openssl")
    for name in ("server", "client"):
        subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
        keys = ["-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.pem")]
        make = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *keys]
        subprocess.run(make, check=True, capture_output=True)
    files = {
        "cert": str(tmp_path / "server.pem"),
        "key": str(tmp_path / "server.key"),
        "ca": str(tmp_path / "client.pem"),
    }
    config = gateway_config(tmp_path / "s", "127.0.0.1:1", NOWHERE, dicom={"port": 0, "tls": files, "first_pdu_s": 3})
    with GatewayProcess(tmp_path / "g", config) as secure:
        silent = [socket.create_connection(("127.0.0.1", secure.port)) for _ in range(12)]  # no handshake ever
        (tmp_path / "a.dcm").write_bytes(data := friendly())
        uids = {"sop_class": "1.2.840.10008.5.1.4.1.1.1.1", "sop_instance": read_identity(data).sop_instance}
        row = SimpleNamespace(path="a.dcm", kind="findings_sr", **uids)

        def deliver(**tls) -> list[str]:
            """What the gateway's own sender meets."""
            to = Destination(name="s", aet="CXR_GATEWAY", host="127.0.0.1", port=secure.port, timeout_s=10.0, **tls)
            sender = DicomSender(to, SimpleNamespace(storage=tmp_path, own_aet="MODALITY"))
            outcomes = []
            asyncio.run(sender.send([row], lambda row, outcome, text: outcomes.append(outcome)))
            return outcomes

        server, key = str(tmp_path / "server.pem"), str(tmp_path / "client.key")
        for tls in (None, TlsFiles(ca=server)):
            with pytest.raises(Unreachable):
                deliver(tls=tls)
        assert deliver(tls=TlsFiles(ca=server, cert=str(tmp_path / "client.pem"), key=key)) == ["stored"]
        for one in silent:
            one.close()


# -------------------------------------------------------------------------------------------------------- hostile


def associate_request(size: int | None = None) -> bytes:
    """An A-ASSOCIATE-RQ for C-ECHO as bytes."""

    def item(kind: int, data: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(data)) + data

    context = item(0x30, b"1.2.840.10008.1.1") + item(0x40, b"1.2.840.10008.1.2")
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3.4")
    body = struct.pack(">HH16s16s32x", 1, 0, b"CXR_GATEWAY     ", b"MODALITY        ")
    body += item(0x10, b"1.2.840.10008.3.1.1.1") + item(0x20, b"\1\0\0\0" + context) + item(0x50, user)
    return struct.pack(">BBI", 1, 0, len(body) if size is None else size) + body


def ends(connection: socket.socket, timeout_s: float = 30) -> bool:
    """The peer closes the connection, whatever it says before."""
    connection.settimeout(timeout_s)
    try:
        while connection.recv(65536):
            pass
        return True
    except TimeoutError:
        return False
    except OSError:
        return True


def test_twelve_silent_connections_shut_nobody_out_and_are_closed(gateway):
    silent = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(12)]
    assert send(gateway.port, [phantom_dicom(13)], timeout_s=20) == [0]
    assert all(ends(connection) for connection in silent)


def test_more_connections_than_one_address_may_have_are_closed_unheard(gateway):
    crowd = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(40)]
    assert sum(ends(connection, 20) for connection in crowd) == 40
    metrics = urllib.request.urlopen(f"{gateway.web}/metrics").read().decode()
    assert 'cxr_gateway_connections_refused_total{reason="too_many_of_address"}' in metrics


def test_a_slow_loris_is_cut_off(gateway):
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        stop = threading.Event()

        def drip():
            for byte in associate_request() * 20:
                if stop.wait(0.2):
                    return
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert ends(connection)
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n"], ids=["nothing", "junk"])
def test_connections_that_ended_do_not_count(gateway, said):
    """A load balancer that looks whether the port is open shuts nobody out."""
    for _ in range(30):  # 20 at once are allowed
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            assert ends(connection, 20)
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.settimeout(20)
        connection.sendall(associate_request())
        assert connection.recv(1) == b"\2"


def test_data_that_are_no_message_are_answered_by_an_abort(gateway):
    for body in (struct.pack(">IB", 1, 1), struct.pack(">IBB", 6, 1, 3) + b"junk"):
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.settimeout(20)
            connection.sendall(associate_request())
            head = connection.recv(6, socket.MSG_WAITALL)
            assert head[0] == 2
            connection.recv(struct.unpack(">I", head[2:])[0], socket.MSG_WAITALL)
            connection.sendall(struct.pack(">BBI", 4, 0, len(body)) + body)
            assert connection.recv(1) == b"\7"
    assert "Traceback" not in gateway.log.read_text()


EVEN_ID = associate_request().replace(b"\1\0\0\0\x30", b"\2\0\0\0\x30")
NO_ABSTRACT_SYNTAX = associate_request().replace(b"\x30\0\0\x11", b"\x31\0\0\x11")


@pytest.mark.parametrize(
    ("pdus", "answer"),
    [
        ([EVEN_ID], b"\7"),
        ([NO_ABSTRACT_SYNTAX], b"\7"),
        ([associate_request(), struct.pack(">BBI4B", 7, 0, 4, 0, 0, 4, 0)], b"\2"),
    ],
    ids=["even context", "no abstract syntax", "abort of no source"],
)
def test_what_the_standard_does_not_know_ends_no_thread(gateway, pdus, answer):
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.settimeout(20)
        for pdu in pdus:
            connection.sendall(pdu)
            if pdu is pdus[0]:
                assert connection.recv(1 << 16)[:1] == answer
        assert ends(connection, 15)
    assert "Traceback" not in gateway.log.read_text()


def test_objects_that_nobody_takes_leave_no_file(gateway):
    """Those that wait behind others when their peer goes; pynetdicom writes each to a temporary file."""
    request, _, *object_pdus, _ = associations({"object": friendly()})["object"]
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.settimeout(20)
            connection.sendall(request)
            assert connection.recv(1 << 16)[:1] == b"\2"
            with contextlib.suppress(OSError):
                connection.sendall(b"".join(object_pdus) * 8)
    wait_for(lambda: not list(gateway.storage.glob("incoming/*")), "the end of files that nobody took", 20)


@pytest.mark.parametrize("before", [b"", associate_request()], ids=["before association", "after association"])
def test_a_pdu_of_four_gib_is_refused_at_its_header(gateway, before):
    at_first = rss_mib(gateway)
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.settimeout(30)
        if before:
            connection.sendall(before)
            assert connection.recv(1) == b"\2"
        connection.sendall(struct.pack(">BBI", 4 if before else 1, 0, 0xFFFFFFFF))
        sent = 0
        try:
            while sent < 300 << 20:
                sent += connection.send(bytes(1 << 20))
        except OSError:
            pass
        assert sent < 64 << 20 and ends(connection)
    assert rss_mib(gateway) - at_first < 64


def test_a_message_larger_than_an_object_may_be_ends_the_association(gateway):
    """PDUs of a fair size without end, as the data of a C-STORE that never comes to its last fragment."""
    at_first = rss_mib(gateway)
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.settimeout(30)
        connection.sendall(associate_request())
        assert connection.recv(1) == b"\2"
        fragment = struct.pack(">IBB", 60_002, 1, 0) + bytes(60_000)  # a data set's, not the last
        sent = 0
        try:
            while sent < 200 << 20:
                sent += connection.send(struct.pack(">BBI", 4, 0, len(fragment)) + fragment)
        except OSError:
            pass
        assert sent < (LIMIT_MIB + 32) << 20
    assert rss_mib(gateway) - at_first < 64


def test_damaged_and_bomb_objects_are_refused_and_cost_little(gateway):
    import zlib

    at_first = rss_mib(gateway)
    good = phantom_dicom(14)
    header = good[: good.index(b"\x08\0\x05\0") if b"\x08\0\x05\0" in good[:400] else 340]
    deep = b"".join(struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + b"\xfe\xff\0\xe0\xff\xff\xff\xff"
                    for _ in range(50_000))  # fmt: skip
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bomb.compress(struct.pack("<HH2sHI", 9, 0x1001, b"OB", 0, 400 << 20) + bytes(400 << 20)) + bomb.flush()
    meta = b"\2\0\x10\0UI\x16\0" + b"1.2.840.10008.1.2.1.99"
    meta = b"\2\0\0\0UL\4\0" + struct.pack("<I", len(meta)) + meta
    hostile = [header + deep, bytes(128) + b"DICM" + meta + zeros, good[:200], b"\x7fELF" + good[4:], bytes(132), b""]
    status, answer = post(gateway, hostile)
    assert status == 409 and len(answer["00081198"]["Value"]) == len(hostile)
    assert rss_mib(gateway) - at_first < 200


def test_files_of_section_b1_do_no_harm(gateway, shared_data):
    files = sorted((shared_data / "hostile_or_odd").iterdir())
    status, _ = post(gateway, [file.read_bytes() for file in files])
    assert status in (200, 202, 409)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=400), st.integers(0, 2**31), st.sampled_from(["raw", "mutated", "p-data"]))
def test_malformed_pdus_end_only_their_own_connection(gateway, noise, seed, kind):
    """Three ways in: bytes that are no PDU, a request with bytes changed, and P-DATA on a good association."""
    rng = random.Random(seed)
    request = bytearray(associate_request())
    if kind == "mutated":
        for _ in range(rng.randint(1, 6)):
            request[rng.randrange(len(request))] = rng.randrange(256)
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.settimeout(20)
        try:
            if kind == "raw":
                connection.sendall(noise)
            else:
                connection.sendall(bytes(request))
                if kind == "p-data":
                    assert connection.recv(1) == b"\2"
                    body = struct.pack(">IB", len(noise) + 1, 1) + noise
                    connection.sendall(struct.pack(">BBI", 4, 0, len(body)) + body)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        ends(connection, 20)
    assert gateway.process.poll() is None


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31))
def test_mutated_objects_get_an_answer(gateway, seed):
    rng = random.Random(seed)
    data = bytearray(friendly())
    for _ in range(rng.randint(1, 12)):
        data[rng.randrange(128, 700)] = rng.randrange(256)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    assert post(gateway, [bytes(data)])[0] in (200, 202, 409)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=400), st.integers(0, 2**31), st.sampled_from(["raw", "inside", "frame"]))
def test_malformed_stow_bodies_get_an_answer(gateway, noise, seed, kind):
    """Bytes that are no multipart, those in the place of its parts, and one whose frame is damaged."""
    rng = random.Random(seed)
    body = bytearray(noise if kind == "raw" else framed([noise] if kind == "inside" else [friendly()]))
    if kind == "frame":
        for _ in range(rng.randint(1, 4)):
            body[rng.choice([*range(46), *range(len(body) - 9, len(body))])] = rng.randrange(256)
    assert post_body(gateway, bytes(body))[0] in (200, 202, 400, 409)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=2000), st.booleans())
def test_malformed_files_of_the_folder_are_set_aside(gateway, noise, is_part10):
    path = gateway.inbox / f"{uuid.uuid4().hex}.dcm"  # hypothesis seeds `random`
    partial = gateway.storage / path.name
    partial.write_bytes((bytes(128) + b"DICM" if is_part10 else b"") + noise)
    partial.rename(path)
    wait_for(lambda: (gateway.inbox / "rejected" / path.name).exists(), "the file among the rejected")
    assert not path.exists()


# ------------------------------------------------------------------------------------------------ hostile, over HTTP


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    files = {"cert": str(folder / "web.pem"), "key": str(folder / "web.key")}
    subject = ["-subj", "/CN=web", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = [require("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*make, "-keyout", files["key"], "-out", files["cert"]], check=True, capture_output=True)
    return files


@pytest.fixture(scope="module", params=["clear", "tls"])
def door(request, tmp_path_factory):
    """STOW-RS with short limits, and how to connect to it."""
    folder = tmp_path_factory.mktemp("door")
    tls = request.getfixturevalue("certificate") if request.param == "tls" else None
    web = {"idle_s": 1.0, "total_s": 4.0, "max_per_address": 6, "max_connections": 8, **({"tls": tls} if tls else {})}
    with GatewayProcess(folder / "g", gateway_config(folder / "s", "127.0.0.1:1", NOWHERE, web=web)) as gateway:
        trust = ssl.create_default_context(cafile=tls["cert"]) if tls else None
        port = int(gateway.web.rpartition(":")[2])

        def connect(raw: bool = False) -> socket.socket:
            connection = socket.create_connection(("127.0.0.1", port), timeout=20)
            return trust.wrap_socket(connection, server_hostname="127.0.0.1") if trust and not raw else connection

        gateway.connect, gateway.trust = connect, trust
        yield gateway
        assert gateway.process.poll() is None
        assert all(json.loads(line)["event"] for line in gateway.log.read_text().splitlines())


HEAD = b"POST /dicom-web/studies HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/related; boundary=xyz\r\n"


def said(connection: socket.socket) -> int:
    """Status of the answer; 0 where the connection just ended."""
    connection.settimeout(30)
    answer = b""
    with contextlib.suppress(OSError):
        while b"\r\n" not in answer and (data := connection.recv(65536)):
            answer += data
    return int(answer.split()[1]) if answer else 0


def health(door) -> int:
    try:
        with door.connect() as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return said(connection)
    except OSError:
        return 0


def test_objects_come_in_through_the_bounded_door(door):
    body = framed([phantom_dicom(60)])
    with door.connect() as connection:
        for _ in range(2):  # one connection, kept
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            connection.settimeout(30)
            assert connection.recv(12) == b"HTTP/1.1 200"
            while not connection.recv(65536).endswith(b"}"):
                pass


def drips(connection: socket.socket, piece: bytes, every_s: float) -> threading.Thread:
    def run():
        with contextlib.suppress(OSError):
            for _ in range(400):
                connection.sendall(piece)
                time.sleep(every_s)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("first", [b"", b"GET /health/live HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "head"])
def test_a_head_that_never_ends_is_cut_off(door, first):
    with door.connect() as connection:
        connection.sendall(first)
        drips(connection, b"X: y\r\n" if first else b"", 0.2)
        assert said(connection) in (0, 400, 408)
    wait_for(lambda: health(door) == 200, "the door open again")


@pytest.mark.parametrize("every_s", [0.05, 30.0], ids=["drop by drop", "not at all"])
def test_a_body_that_never_ends_is_answered_408(door, every_s):
    before = objects(door)["image"]
    with door.connect() as connection:
        whole = framed([phantom_dicom(61 + int(every_s))])[: -len(b"--xyz--")]
        part = b"--xyz\r\nContent-Type: application/dicom\r\n\r\n"
        connection.sendall(HEAD + b"Content-Length: 10000000\r\n\r\n" + whole + part)
        drips(connection, b"x", every_s)
        assert said(connection) in ((0, 408) if every_s < 1 else (408,))  # a drop after the end may reset what was said
    if every_s < 1:  # what came whole before is there
        assert objects(door)["image"] == before + 1


def test_a_crowd_is_answered_503_and_then_let_in(door):
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(door.connect(raw=True)) for _ in range(20)]
        if door.trust:
            assert health(door) == 0
        else:
            assert 503 in [said(connection) for connection in crowd[-3:]]
            assert health(door) == 503
        assert all(ends(connection) for connection in crowd)
    wait_for(lambda: health(door) == 200, "the door open again")
    assert any(line["event"] == "connection_refused" and line["door"] == "web" for line in door.lines())


def test_a_compressed_or_nested_body_is_refused(door):
    import gzip

    bomb = gzip.compress(framed([bytes(64 << 20)]))
    with door.connect() as connection:
        connection.sendall(HEAD + f"Content-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n".encode() + bomb)
        assert said(connection) == 415
    nested = b"".join(b"--xyz\r\nContent-Type: multipart/mixed; boundary=xyz\r\n\r\n" for _ in range(5000))
    with door.connect() as connection:
        connection.sendall(HEAD + f"Content-Length: {len(nested)}\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            connection.sendall(nested)
        assert said(connection) == 400
    with door.connect() as connection:
        connection.sendall(HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n")
        assert said(connection) in (0, 400, 431)
    assert "Traceback" not in door.log.read_text()


def test_a_message_that_is_no_object_is_not_kept_in_memory(gateway):
    """The command set without end, and the data set of an answer to storage commitment."""
    command = [struct.pack("<HHIH", 0, 0x100, 2, 0x100), struct.pack("<HHIH", 0, 0x800, 2, 1)]  # N-EVENT-REPORT-RQ
    report = struct.pack("<HHII", 0, 0, 4, sum(map(len, command))) + b"".join(command)
    for first, control in ((b"", 1), (struct.pack(">IBB", len(report) + 2, 1, 3) + report, 0)):
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.settimeout(30)
            connection.sendall(associate_request())
            head = connection.recv(6, socket.MSG_WAITALL)
            connection.recv(struct.unpack(">I", head[2:])[0], socket.MSG_WAITALL)
            if first:
                connection.sendall(struct.pack(">BBI", 4, 0, len(first)) + first)
            fragment = struct.pack(">IBB", 60_002, 1, control) + bytes(60_000)
            pdu, sent = struct.pack(">BBI", 4, 0, len(fragment)) + fragment, 0
            with contextlib.suppress(OSError):
                while sent < LIMIT_MIB << 20:  # less than an object may have
                    connection.sendall(pdu)
                    sent += len(pdu)
            assert ends(connection)
    assert any(line.get("error") == "LimitExceeded" for line in gateway.lines() if line["event"] == "not_a_message")


def test_a_line_of_the_log_is_a_line_whatever_a_peer_calls_itself(gateway):
    request = associate_request().replace(b"MODALITY        ", b'A\n{"event":"x"}\n')
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(request)
        ends(connection)
    assert all(json.loads(line)["event"] != "x" for line in gateway.log.read_text().splitlines())


def test_threads_end_with_their_connections(gateway):
    """After all of that no thread of a connection is left."""

    def threads() -> int:
        return len(list(Path(f"/proc/{gateway.process.pid}/task").iterdir()))

    wait_for(lambda: threads() < 40, f"the end of connection threads (now {threads()})")
