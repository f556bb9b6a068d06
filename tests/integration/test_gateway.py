"""The gateway whole: Orthanc to gateway to Triton with the phantom model, and the results back; kills in between."""

import collections
import contextlib
import io
import json
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

pytest.importorskip("pynetdicom")
pytest.importorskip("sqlalchemy")
pytest.importorskip("pytriton")

import gateway_faults
import pydicom
import yaml
from gateway_peers import (
    CLI,
    GatewayProcess,
    Orthanc,
    Postgres,
    free_port,
    gateway_config,
    orthanc_dicom,
    phantom_dicom,
    phantom_repository,
    renamed,
    require,
    send,
    wait_for,
)

from cxr_triton import phantom, phantom_file
from cxr_triton.client.gateway.schema import Received, Result
from cxr_triton.client.gateway.store import Store

TEXT, FINDINGS = "AI, not verified: report", "AI, not verified: findings"


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    """The served phantom model."""
    repository = phantom_repository(tmp_path_factory.mktemp("phantom"))
    server = gateway_faults.start_triton(repository, free_port())
    yield server
    server.stop()


@pytest.fixture(scope="module")
def site(triton, tmp_path_factory):
    """A PACS that forwards to a gateway, which delivers back to it by C-STORE and to an archive by STOW-RS."""
    folder = tmp_path_factory.mktemp("site")
    port = free_port()
    # What Orthanc's index lacks it does not send as commitment; see its own configuration.
    with Orthanc(folder / "pacs", gateway_port=port) as pacs, Orthanc(folder / "archive") as archive:
        destinations = [
            orthanc_dicom(pacs, commitment=True, commitment_s=30.0),
            {"name": "archive", "kind": "stow", "url": archive.stow},
        ]
        config = gateway_config(folder / "storage", triton.grpc, destinations, dicom={"port": port})
        with GatewayProcess(folder / "gateway", config) as gateway:
            gateway.pacs, gateway.archive = pacs, archive
            yield gateway


def forward(pacs: Orthanc, file: bytes) -> str:
    """Have the PACS store a file and send it on to the gateway; its study UID."""
    identifier = pacs.upload(file)
    assert pacs.post("/modalities/gateway/store", identifier)["FailedInstancesCount"] == 0
    return str(pydicom.dcmread(io.BytesIO(file), stop_before_pixels=True).StudyInstanceUID)


def reports(orthanc: Orthanc, study: str) -> dict[str, pydicom.Dataset]:
    """SRs of a study by series description, once both are there."""
    query = f"{orthanc.stow}/studies/{study}/series?Modality=SR&includefield=0008103E"

    def series():
        with urllib.request.urlopen(query) as answer:
            found = json.loads(answer.read() or b"[]")
        return found if len(found) == 2 else None

    found = {}
    for one in wait_for(series, "two reports"):
        root = f"{orthanc.stow}/studies/{study}/series/{one['0020000E']['Value'][0]}"
        with urllib.request.urlopen(f"{root}/instances") as answer:
            (instance,) = json.loads(answer.read())
        request = urllib.request.Request(
            f"{root}/instances/{instance['00080018']['Value'][0]}",
            headers={"Accept": 'multipart/related; type="application/dicom"'},
        )
        with urllib.request.urlopen(request) as answer:
            body = answer.read()
        start = body.index(b"\r\n\r\n") + 4
        dataset = pydicom.dcmread(io.BytesIO(body[start : body.rindex(b"\r\n--")]))
        found[str(dataset.SeriesDescription)] = dataset
    return found


def test_a_study_goes_round_and_its_results_are_committed_and_equal_everywhere(site, tmp_path):
    file = phantom_dicom(50_001)
    study = forward(site.pacs, file)
    image = pydicom.dcmread(io.BytesIO(file))
    at_pacs, at_archive = reports(site.pacs, study), reports(site.archive, study)
    assert set(at_pacs) == {TEXT, FINDINGS} and at_pacs == at_archive
    for name, report in at_pacs.items():
        assert report.StudyInstanceUID == image.StudyInstanceUID and report.PatientID == image.PatientID
        assert (report.PreliminaryFlag, report.VerificationFlag) == ("PRELIMINARY", "UNVERIFIED"), name
        path = tmp_path / "sr.dcm"
        report.save_as(path, enforce_file_format=True)
        subprocess.run([require("dsrdump"), str(path)], check=True, capture_output=True)
        check = subprocess.run([require("dciodvfy"), str(path)], capture_output=True, text=True)
        assert "Error" not in check.stderr, check.stderr
    wait_for(lambda: site.queue.counts()["deliveries"]["pacs"]["sent"] == 0, "storage commitment")
    answered = wait_for(lambda: [line for line in site.lines() if line["event"] == "commitment"], "word of it")
    assert sum(line["kept"] for line in answered) == 2 and not any(line["failed"] for line in answered)


def test_a_study_uid_with_leading_zeros_comes_back_as_it_was(site):
    with pydicom.config.disable_value_validation():
        file = phantom_dicom(50_002, study="1.2.826.0.1.03.04")
        study = forward(site.pacs, file)
        for orthanc in (site.pacs, site.archive):
            found = reports(orthanc, study)
            assert set(found) == {TEXT, FINDINGS}
            assert {str(report.StudyInstanceUID) for report in found.values()} == {"1.2.826.0.1.03.04"}
    (warned,) = [line for line in site.lines() if line["event"] == "header_faults"]
    assert [fault.split()[0] for fault in warned["faults"]] == ["StudyInstanceUID"]
    assert "1.2.826.0.1.03.04" not in site.log.read_text()


SYNTAXES = (
    "dicom/NIH_DX_SC_8bit_implicitLE", "dicom/RG1_UNC_explicitLE", "dicom/RG1_J2K_lossless", "dicom/RG1_J2K_lossy",
    "dicom_derived/RG1_JPEGLS_lossless", "dicom/RG1_JPEGLS_near", "jpeg_extended",
    "dicom_derived/RG1_JPEG_lossless_SV1", "rle", "dicom_derived/NIH_DX_JPEG_baseline",
    "dicom_derived/NIH_DX_bigendian", "dicom_derived/NIH_DX_deflated", "dicom_derived/RG1_HTJ2K_lossless",
)  # fmt: skip
"""One chest of every transfer syntax that the shared data has; a phantom where those of it are of a hip."""
ORTHANC_CANNOT_SEND = ("dicom_derived/RG1_HTJ2K_lossless",)
"""Orthanc 1.10 does not know HTJ2K as a transfer syntax of an association."""


def test_every_transfer_syntax_comes_back_as_two_reports_over_both_ways(site, shared_data, tmp_path):
    """Each file goes through Orthanc by C-STORE (HTJ2K: from a peer of our own), and by STOW-RS."""
    by_study = {}
    for name in SYNTAXES:
        original = shared_data / f"{name}.dcm"
        if name in phantom_file.SYNTAXES:
            original = tmp_path / f"{name}.dcm"
            original.write_bytes(phantom_file.write_dicom(phantom.draw(np.random.default_rng(50_020)), syntax=name))
        syntax = pydicom.dcmread(original, stop_before_pixels=True).file_meta.TransferSyntaxUID
        for way in ("c-store", "stow"):
            file = renamed(original)
            copy = pydicom.dcmread(io.BytesIO(file), stop_before_pixels=True)
            assert copy.file_meta.TransferSyntaxUID == syntax
            if way == "stow":
                assert stow(site, file)[0] == 200
            elif name in ORTHANC_CANNOT_SEND:
                assert send(site.port, [file]) == [0]
            else:
                forward(site.pacs, file)
            by_study[str(copy.StudyInstanceUID)] = (name, way, str(syntax), str(copy.SOPInstanceUID))
    received = {(line["door"], line["syntax"]) for line in site.lines() if line["event"] == "received"}
    for door, way in (("dicom", "c-store"), ("stow", "stow")):
        sent = {(door, syntax) for _, by, syntax, _ in by_study.values() if by == way}
        assert len(sent) == len(SYNTAXES) and sent <= received  # nothing was transcoded
    wait_for(lambda: not site.queue.counts()["oldest_open_s"], "all readings", 300)
    for study, (name, way, _, image) in by_study.items():
        at_pacs = reports(site.pacs, study)
        assert set(at_pacs) == {TEXT, FINDINGS} and at_pacs == reports(site.archive, study), (name, way)
        evidence = at_pacs[FINDINGS].CurrentRequestedProcedureEvidenceSequence[0]
        assert evidence.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == image


def stow(gateway, file: bytes) -> tuple[int, dict]:
    """Status and answer of a STOW-RS request with one instance."""
    body = b"--xyz\r\nContent-Type: application/dicom\r\n\r\n" + file + b"\r\n--xyz--"
    headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=xyz'}
    request = urllib.request.Request(f"{gateway.web}/dicom-web/studies", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_late_image_is_read_and_a_repeat_is_not(site):
    first = phantom_dicom(50_002, number=1)
    study = forward(site.pacs, first)
    reports(site.pacs, study)
    done = site.queue.counts()["jobs"]["done"]
    assert send(site.port, [first]) == [0]
    assert send(site.port, [phantom_dicom(50_003, study=study, number=2)]) == [0]
    wait_for(lambda: site.queue.counts()["jobs"]["done"] == done + 1, "the new reading")
    series = wait_for(
        lambda: (found := list(site.pacs.instances("SR").values())) and len(found) >= 4 and found, "four reports"
    )
    assert len({one["SOPInstanceUID"] for one in series}) == len(series)


def test_what_will_never_be_read_is_a_dead_letter_and_says_why(site):
    file = pydicom.dcmread(io.BytesIO(phantom_dicom(50_004)))
    file.NumberOfFrames = 2
    file.PixelData = file.PixelData * 2
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    assert send(site.port, [out.getvalue()]) == [0]
    letters = wait_for(lambda: site.queue.status()["dead"], "a dead letter")
    assert "[MULTI_FRAME]" in letters[-1]["error"] and letters[-1]["attempts"] == 1
    job = letters[-1]["job"]
    assert site.ask("retry", str(job))["jobs"] == [job]
    wait_for(lambda: site.queue.status()["dead"], "the dead letter again")
    site.ask("drop", str(job))
    assert site.ask("status", str(job))["state"] == "dropped"


def test_a_leg_is_a_dead_letter_and_a_doubtful_image_is_marked_in_its_reports(site):
    files = []
    for seed, changes in ((50_006, {"BodyPartExamined": "EXTREMITY"}), (50_007, {"StudyDescription": "CHEST ABDOMEN"})):
        file = pydicom.dcmread(io.BytesIO(phantom_dicom(seed)))
        if "StudyDescription" in changes:
            del file.BodyPartExamined
        file.update(changes)
        out = io.BytesIO()
        file.save_as(out, enforce_file_format=True)
        files.append(out.getvalue())
    assert send(site.port, files[:1]) == [0]
    (letter,) = wait_for(lambda: site.queue.status()["dead"], "a dead letter")
    assert letter["error"].startswith("[NOT_A_CHEST]") and "EXTREMITY" in letter["error"]
    assert site.ask("status", str(letter["job"]))["deliveries"] == []
    site.ask("drop", str(letter["job"]))
    for report in reports(site.pacs, forward(site.pacs, files[1])).values():
        assert (report.CompletionFlag, report.CompletionFlagDescription[:14]) == ("PARTIAL", "Doubtful image")


def test_images_of_two_patients_under_one_study_are_not_read(site):
    study = pydicom.uid.generate_uid()
    files = [phantom_dicom(50_005, study=study, patient=patient) for patient in ("A", "B")]
    assert send(site.port, files) == [0, 0]
    letters = wait_for(lambda: site.queue.status()["dead"], "a dead letter")
    assert "several Patient IDs" in letters[-1]["error"]
    site.ask("drop", str(letters[-1]["job"]))


def test_sigterm_ends_it_in_order_and_the_next_start_goes_on(triton, tmp_path):
    """Two studies wait for a server that is away; after a restart with the server's address they are read."""
    with Orthanc(tmp_path / "pacs") as pacs:
        away = gateway_config(tmp_path / "storage", f"127.0.0.1:{free_port()}", [orthanc_dicom(pacs)])
        with GatewayProcess(tmp_path / "gateway", away) as gateway:
            assert send(gateway.port, [phantom_dicom(50_006), phantom_dicom(50_007)]) == [0, 0]
            wait_for(lambda: gateway.queue.counts()["jobs"]["grouped"] == 2, "two grouped studies")
            assert gateway.stop(signal.SIGTERM) == 0
        assert gateway.lines()[-1]["event"] == "stopped"
        here = gateway_config(tmp_path / "storage", triton.grpc, [orthanc_dicom(pacs)])
        with GatewayProcess(tmp_path / "gateway", here) as gateway:
            wait_for(lambda: gateway.queue.counts()["jobs"]["done"] == 2, "both readings")
            assert len(pacs.instances("SR")) == 4


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        [require("mount"), "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("queue", ["on it", "elsewhere"])
def test_a_disk_that_fills_in_the_middle_of_anything_is_waited_for(queue, triton, small_disk, tmp_path):
    """Objects that are larger than the disk by each door; then no room for the results of a study that was taken in."""
    storage, inbox = small_disk / "storage", tmp_path / "in"
    inbox.mkdir()
    dataset = pydicom.dcmread(io.BytesIO(phantom_dicom(50_300)))
    dataset.PixelData = bytes(40 << 20)
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    large = out.getvalue()
    pacs = gateway_faults.FlakyPacs()
    config = gateway_config(
        storage, triton.grpc, [flaky(pacs)], intake={"min_free_mib": 0}, group={"quiet_s": 2, "max_wait_s": 2},
        folder={"path": str(inbox), "every_s": 0.1},
        queue=f"sqlite:///{storage if queue == 'on it' else tmp_path}/queue.sqlite",
    )  # fmt: skip
    with GatewayProcess(tmp_path / "gateway", config) as gateway:
        assert send(gateway.port, [large]) == [0xA700]
        status, answer = stow(gateway, large)
        assert status == 507 and answer["00081198"]["Value"][0]["00081197"]["Value"] == [0xA700]
        (inbox / "large.dcm").write_bytes(large)
        wait_for(lambda: any(line.get("door") == "folder" for line in gateway.lines()), "the folder's turn")
        (inbox / "large.dcm").unlink()
        refused = [(line["door"], line["verdict"]) for line in gateway.lines() if line["event"] == "not_received"]
        assert set(refused) == {(door, "no_room") for door in ("dicom", "stow", "folder")}
        wait_for(lambda: not list(storage.glob("incoming/*")), "the end of the folder's last turn")
        assert not list(storage.glob("objects/*/*"))
        assert send(gateway.port, [phantom_dicom(50_301)]) == [0]
        start, ballast = gateway.log.stat().st_size, small_disk / "ballast"
        with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        tried = ("not_read", "queue_failed", "read")  # the last where all of this took longer than `quiet_s`
        wait_for(lambda: any(line["event"] in tried for line in gateway.lines(start)), "the study's turn")
        assert send(gateway.port, [phantom_dicom(50_302)]) == [0xA700]
        ballast.unlink()
        assert send(gateway.port, [phantom_dicom(50_302)]) == [0]
        wait_for(lambda: gateway.queue.counts()["jobs"]["done"] == 2, "both readings")
        assert gateway.ask("status", "1")["attempts"] == 1  # the disk is not held against a study
    pacs.close()
    assert sorted(collections.Counter(study for study, _ in pacs.stored.values()).values()) == [2, 2]
    assert (
        not pacs.repeats and len(list(storage.glob("objects/*/*"))) == 2 and len(list(storage.glob("results/*/*"))) == 4
    )


def flaky(pacs: gateway_faults.FlakyPacs) -> dict:
    return {"name": "flaky", "kind": "dicom", "aet": "FLAKY", "host": "127.0.0.1", "port": pacs.port}


def test_faults_lose_nothing_and_double_nothing(tmp_path):
    """A small fault run; the large one is `make faults`, recorded in docs/results."""
    require("Orthanc")
    kills = {"decoder": 1, "gateway": 1, "destination": 1}
    found = gateway_faults.run(tmp_path, objects=8, kills=kills, phase_s=1.0)
    assert found["killed"] == kills and found["objects"] == 8 and found["lost"] == found["doubled"] == 0


# ------------------------------------------------------------------------------------------------------ PostgreSQL


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    with Postgres(tmp_path_factory.mktemp("postgres")) as postgres:
        yield postgres


def received(i: int, j: int = 0) -> Received:
    return Received(
        kind="image", sop_instance=f"1.{i}.{j}", digest=f"{i}-{j}", sop_class="1.2", study=f"1.{i}", series="1.8",
        transfer_syntax="1.2.840.10008.1.2.1", patient="p", view="PA", taken="2026", number=1, bytes=10,
        path=f"objects/{i}-{j}", source="test",
    )  # fmt: skip


def test_two_gateways_on_postgresql_share_the_work_and_never_the_same(postgres):
    stores = [Store(postgres.url, name) for name in ("one", "two")]
    for store in stores:
        store.start()

    def add(i: int) -> str:  # every image comes to both gateways at once
        return stores[i % 2].add(received(i // 2), 0, 60)

    def work(i: int) -> list[int]:
        store, sent = stores[i % 2], []
        for _ in range(40):
            store.group_due()
            if job := store.claim_job(60):
                result = Result(kind="k", sop_class="1.2", sop_instance=f"2.25.{job.id}", path="r")
                store.deliver(job, [result], {"a": {"k"}, "b": {"k"}}, 1.0)
            for destination in ("a", "b"):
                for row in store.claim_deliveries(destination, 60, 2):
                    sent.append((destination, row.sop_instance))
                    store.delivered(row.id, final=True)
        return sent

    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(add, range(60)))
        sent = [one for part in pool.map(work, range(8)) for one in part]
    assert verdicts.count("image") == 30 and verdicts.count("duplicate") == 30
    assert len(sent) == len(set(sent)) == 60
    assert stores[0].counts()["jobs"]["done"] == 30
    for store in stores:
        store.close()


def test_two_gateways_on_postgresql_read_every_study_once(triton, postgres, tmp_path):
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE DATABASE shared")
    url = postgres.url.rpartition("/")[0] + "/shared"
    with Orthanc(tmp_path / "pacs") as pacs:
        configs = [
            gateway_config(tmp_path / "storage", triton.grpc, [orthanc_dicom(pacs)], name=name, queue=url)
            for name in ("one", "two")
        ]
        with GatewayProcess(tmp_path / "1", configs[0]) as one, GatewayProcess(tmp_path / "2", configs[1]) as two:
            files = [phantom_dicom(50_100 + i) for i in range(6)]
            assert send(one.port, files[:4]) == [0] * 4 and send(two.port, files[2:]) == [0] * 4
            wait_for(lambda: one.queue.counts()["jobs"]["done"] == 6, "all readings")
            assert {g["name"] for g in two.queue.status()["gateways"]} == {"one", "two"}
            read = [line["study"] for gateway in (one, two) for line in gateway.lines() if line["event"] == "read"]
            assert len(read) == 6
            assert len(pacs.instances("SR")) == 12


def test_gateways_wait_for_a_database_that_crashed_and_recover_by_themselves(triton, postgres, tmp_path):
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE DATABASE crashing")
    url = postgres.url.rpartition("/")[0] + "/crashing"
    pacs = gateway_faults.FlakyPacs()
    configs = [
        gateway_config(tmp_path / "storage", triton.grpc, [flaky(pacs)], name=name, queue=url)
        for name in ("one", "two")
    ]
    with GatewayProcess(tmp_path / "1", configs[0]) as one, GatewayProcess(tmp_path / "2", configs[1]) as two:
        queue = one.queue
        before, meanwhile = ([phantom_dicom(seed + i) for i in range(4)] for seed in (50_400, 50_500))
        assert send(one.port, before[:2]) == [0, 0] and send(two.port, before[2:]) == [0, 0]
        postgres.crash()
        try:
            assert send(one.port, meanwhile[:2]) == [0x0110] * 2 and send(two.port, meanwhile[2:]) == [0x0110] * 2
            status, answer = stow(one, meanwhile[0])
            assert status == 409 and answer["00081198"]["Value"][0]["00081197"]["Value"] == [0x0110]
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(f"{one.web}/health/ready", timeout=60)
            assert error.value.code == 503 and json.loads(error.value.read())["trouble"] == ["queue"]
            assert b"cxr_gateway_disk_free_bytes" in urllib.request.urlopen(f"{one.web}/metrics", timeout=60).read()
            failed = ("queue_failed", "housekeeping_failed")
            for gateway in (one, two):
                wait_for(lambda g=gateway: any(line["event"] in failed for line in g.lines()), "the queue's failure")
        finally:
            postgres.start()
        assert send(one.port, meanwhile[:2]) == [0, 0] and send(two.port, meanwhile[2:]) == [0, 0]
        wait_for(lambda: queue.counts()["jobs"]["done"] == 8, "all readings")
        assert queue.counts()["jobs"]["dead"] == 0 and one.process.poll() is two.process.poll() is None
    pacs.close()
    assert collections.Counter(study for study, _ in pacs.stored.values()) == {
        uid(file): 2 for file in before + meanwhile
    }
    assert not pacs.repeats  # what was delivered when the database went away is not sent again
    assert len(list(tmp_path.glob("storage/objects/*/*"))) == 8  # the refused ones left nothing


def uid(file: bytes, keyword: str = "StudyInstanceUID") -> str:
    return str(pydicom.dcmread(io.BytesIO(file), stop_before_pixels=True)[keyword].value)


@pytest.mark.parametrize("way", ["dicom", "web"])
def test_the_patients_last_earlier_radiograph_is_read_first(way, triton, tmp_path):
    """Two priors of the patient, one of another patient whose ID would match a wildcard, and a CT of the patient."""

    def made(seed: int, date: str, patient: str = "P-1", modality: str = "DX", study: str | None = None) -> bytes:
        dataset = pydicom.dcmread(io.BytesIO(phantom_dicom(seed, patient=patient, study=study)))
        dataset.StudyDate, dataset.StudyTime, dataset.Modality = date, "120000", modality
        dataset.PatientName, dataset.AccessionNumber, dataset.StudyID = "A^B", "", ""
        out = io.BytesIO()
        dataset.save_as(out, enforce_file_format=True)
        return out.getvalue()

    with Orthanc(tmp_path / "pacs") as pacs:
        old, last = made(1, "20200101"), made(2, "20230101", study="1.2.826.0.1.03.05")
        for file in (old, last, made(3, "20240101", patient="P-12"), made(4, "20240201", modality="CT")):
            pacs.upload(file)
        current = made(5, "20240301")
        pacs.upload(current)
        priors = {"url": pacs.stow} if way == "web" else {"aet": "ORTHANC", "host": "127.0.0.1", "port": pacs.port}
        config = gateway_config(
            tmp_path / "storage", triton.grpc, [orthanc_dicom(pacs)], priors=priors,
            read={"max_images": 2, "max_attempts": 1},
        )  # fmt: skip
        with GatewayProcess(tmp_path / "gateway", config) as gateway:
            assert send(gateway.port, [current]) == [0]
            # The phantom's profile has no task of two images: what was asked is seen in the queue.
            wait_for(lambda: gateway.queue.status()["dead"], "the end of the job")
            store = gateway.queue
            job = store.job(store.status()["dead"][0]["job"])
            read = [store.object_of(sop) for sop in (uid(last, "SOPInstanceUID"), uid(current, "SOPInstanceUID"))]
            assert job["read_objects"] == [row.id for row in read]
            assert store.counts()["objects"]["prior"] == 1
            assert store.counts()["jobs"]["dead"] == 1 and "[INVALID_REQUEST]" in job["error"]
            assert "1.2.826.0.1.03.05" not in gateway.log.read_text()


def test_a_name_that_the_served_profile_lacks_is_refused_at_the_start(triton, tmp_path):
    """The nearest name that it has is said; with that one the gateway is ready."""
    away = [{"name": "x", "aet": "X", "host": "127.0.0.1", "port": 1}]
    read = {"task": "finding"}
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump(gateway_config(tmp_path / "storage", triton.grpc, away, read=read)))
    done = subprocess.run([*CLI, "gateway", "--config", str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "[INVALID_CONFIG] read: " in done.stderr
    assert "'finding'" in done.stderr and "did you mean 'findings'" in done.stderr
    read = {"task": "findings", "identifiers": "hashed"}
    config = gateway_config(tmp_path / "storage", triton.grpc, away, read=read)
    with GatewayProcess(tmp_path / "gateway", config) as gateway:

        def ready() -> dict:
            with (
                contextlib.suppress(urllib.error.HTTPError),
                urllib.request.urlopen(f"{gateway.web}/health/ready") as answer,
            ):
                return json.loads(answer.read())

        assert wait_for(ready, "readiness")["server"]


def test_a_fhir_server_gets_the_report_once_it_takes_it(triton, tmp_path):
    """The server is busy at first; the report is put under an identifier of its own: a repeat changes nothing."""
    puts = []

    class Server(BaseHTTPRequestHandler):
        def do_PUT(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            puts.append((self.path, json.loads(body)))
            self.send_response(503 if len(puts) == 1 else 201)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    to = {"name": "records", "kind": "fhir", "url": f"http://127.0.0.1:{server.server_port}/r4"}
    with GatewayProcess(tmp_path / "gateway", gateway_config(tmp_path / "storage", triton.grpc, [to])) as gateway:
        assert send(gateway.port, [phantom_dicom(7)]) == [0]
        wait_for(lambda: gateway.queue.counts()["jobs"]["done"], "the delivery")
    server.shutdown()
    server.server_close()
    (first, report), again = puts
    assert again == (first, report) and first == f"/r4/DiagnosticReport/{report['id']}"
    assert report["resourceType"] == "DiagnosticReport" and report["status"] in ("preliminary", "partial")


def test_a_study_waits_for_a_pacs_with_priors_that_is_away(tmp_path):
    from fake_server import FakeServer, failure

    def never(request, context):
        yield failure("[INTERNAL] not to be asked")

    with FakeServer(never) as server:
        config = gateway_config(
            tmp_path / "storage", server.url, [{"name": "x", "aet": "X", "host": "127.0.0.1", "port": 1}],
            priors={"aet": "PACS", "host": "127.0.0.1", "port": 1}, read={"max_images": 2, "max_attempts": 2},
        )  # fmt: skip
        with GatewayProcess(tmp_path / "gateway", config) as gateway:
            assert send(gateway.port, [phantom_dicom(6)]) == [0]
            (letter,) = wait_for(lambda: gateway.queue.status()["dead"], "a dead letter")
            assert letter["error"].startswith("[UNAVAILABLE] priors: PACS") and letter["attempts"] == 2
            assert not server.requests
