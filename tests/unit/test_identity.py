"""A reading goes with the images that it is of, on every path, and with no others of the same size."""

import asyncio
import contextlib
import hashlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner
from fake_server import FakeServer, response
from PIL import Image
from sr_case import OPTIONS, reading

from cxr_triton import cli, phantom, phantom_file
from cxr_triton.client.aio import AsyncReader
from cxr_triton.client.objects.results import diagnostic_report, result_objects
from cxr_triton.client.objects.source import source_header
from cxr_triton.client.page import draw
from cxr_triton.client.reader import Reader
from cxr_triton.errors import ReadingMismatch
from cxr_triton.identity import hashed, identity_of, pixels_digest
from cxr_triton.pixels.dicom import read_image
from cxr_triton.pixels.sandbox import identify
from cxr_triton.reading import Reading

PICTURE = phantom.draw(np.random.default_rng(3))


def dicom(patient: str, *, syntax: str = "explicit", **changes) -> bytes:
    """A patient's radiograph; each patient's has the same size, UIDs of its own, and pixels of its own."""
    dataset = pydicom.dcmread(io.BytesIO(phantom_file.write_dicom(PICTURE, seed=patient)))
    stored = dataset.pixel_array.copy()
    stored[:8, :8] = np.frombuffer(hashlib.sha256(patient.encode()).digest() * 2, np.uint8).reshape(8, 8)
    phantom_file.store(dataset, stored, syntax)
    dataset.PatientID = patient
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def png(patient: str, compression: int = 6) -> bytes:
    out = io.BytesIO()
    pixels = np.frombuffer(hashlib.sha256(patient.encode()).digest() * 32, np.uint8).reshape(32, 32)
    Image.fromarray(pixels).save(out, "PNG", compress_level=compression)
    return out.getvalue()


def reading_of(*files: bytes, record=identity_of, **changes) -> dict:
    """READING of some files, as a server gives it."""
    read = reading(*[source_header(dicom("A")) for _ in files], **changes)
    for facts, data in zip(read["images"], files, strict=True):
        radiograph = read_image(data)
        facts |= {"rows": radiograph.metadata.rows, "columns": radiograph.metadata.columns}
        facts |= {"flags": list(radiograph.flags), "identity": record(data, radiograph)}
    return read


def without_identity(read: dict) -> dict:
    """As a server wrote it before readings had identities."""
    return {**read, "images": [{key: facts[key] for key in facts if key != "identity"} for facts in read["images"]]}


def tampered(read: dict, *keys: str) -> dict:
    changed = {**read["images"][0]["identity"], **dict.fromkeys(keys, "0" * 64)}
    return {**read, "images": [{**read["images"][0], "identity": changed}]}


def answering(read: dict):
    return lambda request, context: iter([response("", json.dumps(read), final=True)])


A, B = dicom("A"), dicom("B")
STUDY_A, STUDY_B = (pydicom.dcmread(io.BytesIO(data)).StudyInstanceUID for data in (A, B))


# --------------------------------------------------------------------------------------------------------- digests


@pytest.mark.slow
@pytest.mark.parametrize("syntax", sorted(set(phantom_file.SYNTAXES) - set(phantom_file.LOSSY_BITS)))
def test_the_digest_of_stored_pixels_is_the_same_in_every_lossless_syntax(syntax):
    stored = pydicom.dcmread(io.BytesIO(A)).pixel_array
    line = f"<u2 {stored.shape[0]} {stored.shape[1]}\n".encode()
    expected = hashlib.sha256(line + stored.astype("<u2").tobytes()).hexdigest()
    other = dicom("A", syntax=syntax)
    (identity,) = identify([other])
    assert identity["pixels_sha256"] == expected
    assert identity["file_sha256"] == hashlib.sha256(other).hexdigest()
    assert identity["study_instance_uid"] == STUDY_A and identity["identifiers"] == "plain"


def test_radiographs_of_one_picture_in_several_syntaxes_have_one_digest(shared_data):
    """The reference decodes with pydicom."""
    groups = (
        ("dicom/RG2_UNC_explicitLE", "dicom/RG2_J2K_lossless", "dicom/RG2_JPEGLS_lossless",
         "dicom/RG2_JPEG_lossless_SV1", "dicom/RG2_RLE"),
        ("dicom/NIH_DX_SC_8bit_implicitLE", "dicom_derived/NIH_DX_bigendian", "dicom_derived/NIH_DX_deflated"),
    )  # fmt: skip
    for names in groups:
        first = pydicom.dcmread(shared_data / f"{names[0]}.dcm").pixel_array
        kind = "|u1" if first.dtype == np.uint8 else "<u2"
        line = f"{kind} {first.shape[0]} {first.shape[1]}\n".encode()
        expected = hashlib.sha256(line + first.astype(kind).tobytes()).hexdigest()
        for name in names:
            assert pixels_digest(read_image((shared_data / f"{name}.dcm").read_bytes()).stored) == expected, name


def test_digests_tell_type_and_shape_apart():
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    views = (values, values.view(np.int8), values.reshape(4, 3), values.view(np.uint16), values.view(np.int16))
    assert len({pixels_digest(view) for view in views}) == len(views)
    assert pixels_digest(values.astype(">u2")) == pixels_digest(values.astype("<u2"))


def test_a_picture_without_header_has_only_digests():
    (identity,) = identify([png("A")])
    assert identity.keys() == {"file_sha256", "pixels_sha256"} == hashed(identity).keys()


# -------------------------------------------------------------------------------------------------------------- sr


@pytest.fixture
def case(tmp_path):
    """Files of two patients, and a way to run a verb on them with a stored reading."""
    (tmp_path / "a.dcm").write_bytes(A)
    (tmp_path / "b.dcm").write_bytes(B)
    (tmp_path / "a.png").write_bytes(png("A"))
    (tmp_path / "b.png").write_bytes(png("B"))
    return tmp_path


def run_sr(case: Path, read: dict, *names: str, options=()):
    (case / "case.json").write_text(json.dumps(read))
    files = [case / name for name in names]
    arguments = ["sr", *files, "--reading", case / "case.json", "-o", case / "out", *options]
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


def run_read(case: Path, read: dict, *names: str, options=()):
    """`read --history`, through a server that answers properly; the result and the requests that it got."""
    (case / "t1.json").write_text(json.dumps(read))
    answer = reading_of(*[(case / name).read_bytes() for name in names])
    with FakeServer(answering(answer)) as server:
        arguments = ["read", *[case / name for name in names], "--history", case / "t1.json", "--url", server.url]
        return CliRunner().invoke(cli.main, list(map(str, [*arguments, *options]))), server.requests


def through_sr(case, read, *names, options=()):
    ran = run_sr(case, read, *names, options=options)
    return ran, (case / "out").exists() and any((case / "out").iterdir())


def through_history(case, read, *names, options=()):
    ran, requests = run_read(case, read, *names, options=options)
    return ran, bool(requests)


PATHS = pytest.mark.parametrize("through", [through_sr, through_history])


@pytest.mark.slow
@PATHS
@pytest.mark.parametrize("record", [identity_of, lambda *image: hashed(identity_of(*image))], ids=["plain", "hashed"])
def test_another_patient_s_reading_of_the_same_size_is_refused_by_name(case, through, record):
    right = reading_of(A, record=record)
    ran, is_through = through(case, right, "a.dcm")
    assert ran.exit_code == 0 and is_through and "warning" not in ran.stderr, ran.output
    for path in (case / "out").glob("*"):
        path.unlink()
    ran, is_through = through(case, right, "b.dcm")
    assert ran.exit_code == 1 and not is_through
    assert "[READING_MISMATCH] b.dcm" in ran.stderr and "Study Instance UID" in ran.stderr
    named = (
        [STUDY_A, STUDY_B]
        if record is identity_of
        else [hashlib.sha256(u.encode()).hexdigest() for u in (STUDY_A, STUDY_B)]
    )
    assert all(uid in ran.stderr for uid in named)
    assert record is identity_of or STUDY_A not in ran.stderr


@PATHS
def test_an_old_reading_needs_the_flag(case, through):
    old = without_identity(reading_of(A))
    ran, is_through = through(case, old, "a.dcm")
    assert ran.exit_code == 1 and not is_through
    assert "[READING_MISMATCH]" in ran.stderr and "--unchecked-reading" in ran.stderr
    ran, is_through = through(case, old, "a.dcm", options=["--unchecked-reading"])
    assert ran.exit_code == 0 and is_through, ran.output


@PATHS
def test_the_flag_lets_no_other_patient_s_reading_through(case, through):
    ran, is_through = through(case, reading_of(A), "b.dcm", options=["--unchecked-reading"])
    assert ran.exit_code == 1 and not is_through and "Study Instance UID" in ran.stderr


@pytest.mark.slow
@PATHS
@pytest.mark.parametrize(
    "keys",
    [("pixels_sha256",), ("file_sha256", "pixels_sha256"), ("sop_instance_uid",), ("series_instance_uid",),
     ("study_instance_uid",)],
)  # fmt: skip
def test_a_tampered_identity_is_refused(case, through, keys):
    ran, is_through = through(case, tampered(reading_of(A), *keys), "a.dcm")
    what = "stored pixels" if "pixels_sha256" in keys else {"sop": "SOP", "ser": "Series", "stu": "Study"}[keys[0][:3]]
    assert ran.exit_code == 1 and not is_through and what in ran.stderr


@pytest.mark.slow
@PATHS
def test_the_same_image_in_another_syntax_or_with_another_header_is_told_and_taken(case, through):
    read = reading_of(A)
    for other in (dicom("A", syntax="jpeg_ls"), dicom("A", PatientName="CORRECTED^NAME")):
        (case / "a.dcm").write_bytes(other)
        ran, is_through = through(case, read, "a.dcm")
        assert ran.exit_code == 0 and is_through, ran.output
        assert "warning: a.dcm has other bytes" in ran.stderr
    (case / "a.dcm").write_bytes(dicom("A", syntax="rle", SOPInstanceUID="1.2.3"))
    ran, _ = through(case, read, "a.dcm")
    assert ran.exit_code == 1 and "SOP Instance UID" in ran.stderr


@pytest.mark.slow
@PATHS
def test_images_in_another_order_are_refused_and_named(case, through):
    prior, current = dicom("A", SOPInstanceUID="1.2.3", StudyInstanceUID="1.2.4"), A
    (case / "prior.dcm").write_bytes(prior)
    both = reading_of(prior, current)
    ran, is_through = through(case, both, "a.dcm", "prior.dcm")
    assert ran.exit_code == 1 and not is_through
    assert "a.dcm" in ran.stderr and "image 2 of that reading and was given as image 1" in ran.stderr
    ran, is_through = through(case, both, "prior.dcm")
    assert ran.exit_code == 1 and "2 images, 1 were given" in ran.stderr
    ran, is_through = through(case, both, "prior.dcm", "a.dcm")
    assert ran.exit_code == 0 and is_through, ran.output


def test_a_picture_without_header_is_told_by_its_digests(case):
    read = reading_of(png("A"))
    assert run_read(case, read, "a.png")[0].exit_code == 0
    ran, requests = run_read(case, read, "b.png")
    assert ran.exit_code == 1 and not requests
    assert "[READING_MISMATCH] b.png" in ran.stderr and "SHA-256 of its stored pixels" in ran.stderr
    (case / "a.png").write_bytes(png("A", compression=0))
    assert "warning: a.png has other bytes" in run_read(case, read, "a.png")[0].stderr


def test_each_of_several_earlier_readings_is_checked(case):
    """Also where two files have the same name."""
    (case / "more").mkdir()
    (case / "more" / "t1.json").write_text(json.dumps(reading_of(B)))
    ran, requests = run_read(case, reading_of(A), "a.dcm", options=["--history", case / "more" / "t1.json"])
    assert ran.exit_code == 1 and not requests and STUDY_B in ran.stderr


def test_the_same_lossy_file_is_the_same_image_whatever_decoder_read_it(case):
    (case / "a.dcm").write_bytes(lossy())
    read = reading_of(lossy())
    assert "lossy" in read["images"][0]["flags"]
    assert run_sr(case, tampered(read, "pixels_sha256"), "a.dcm").exit_code == 0
    assert run_sr(case, tampered(read, "pixels_sha256", "file_sha256"), "a.dcm").exit_code == 1


def lossy() -> bytes:
    return phantom_file.write_dicom(PICTURE, seed="A", syntax="jpeg_baseline")


# --------------------------------------------------------------------------------------------------- objects, page


def test_objects_are_refused_for_another_study_without_the_files():
    """The library's own check, by the headers alone; it is what every kind of object goes through."""
    read, a, b = reading_of(A), source_header(A), source_header(B)
    assert result_objects(read, [a], options=OPTIONS) and diagnostic_report(read, [a], options=OPTIONS)
    for write in (result_objects, diagnostic_report):
        with pytest.raises(ReadingMismatch, match=f"Study Instance UID is {STUDY_B}.*{STUDY_A}"):
            write(read, [b], options=OPTIONS)
        with pytest.raises(ReadingMismatch, match="unchecked_reading"):
            write(without_identity(read), [a], options=OPTIONS)
        with pytest.raises(ReadingMismatch, match="no UIDs"):
            write(
                reading_of(png("A")) | {"boxes": []}, [source_header(dicom("A", Rows=32, Columns=32))], options=OPTIONS
            )


@pytest.mark.slow
@pytest.mark.parametrize(("right", "wrong"), [(A, B), (png("A"), png("B"))], ids=["dicom", "png"])
def test_no_page_shows_a_reading_on_another_patient_s_picture(right, wrong):
    read = Reading.from_json(json.dumps(reading_of(right)))
    assert len(draw([right], read)) == 1
    with pytest.raises(ReadingMismatch, match="image 1 is not image 1 of 1"):
        draw([wrong], read)
    for images in ([], [right, right]):
        with pytest.raises(ReadingMismatch, match=f"is of 1 images, {len(images)} were given"):
            draw(images, read)
    old = Reading.from_json(json.dumps(without_identity(reading_of(right))))
    with pytest.raises(ReadingMismatch, match="unchecked_reading"):
        draw([right], old)
    assert len(draw([right], old, unchecked_reading=True)) == 1


# ---------------------------------------------------------------------------------------------------------- client


def test_a_server_s_reading_of_other_images_is_refused_by_both_clients():
    async def read_async(url):
        async with AsyncReader(url) as reader:
            return await reader.read(A).result()

    def read(url):
        with Reader(url) as reader:
            return reader.read(A).result()

    for read_with in (read, lambda url: asyncio.run(read_async(url))):
        with FakeServer(answering(reading_of(B))) as server:
            with pytest.raises(ReadingMismatch, match=r"image 1 of the request.*SHA-256 of the file"):
                read_with(server.url)
            server.answer = answering(reading_of(A))
            assert read_with(server.url).images[0]["identity"]["study_instance_uid"] == STUDY_A


# --------------------------------------------------------------------------------------------------------- gateway


@pytest.fixture
def gateway(tmp_path):
    """A worker with its queue; `gateway(answer)` reads what is in the queue and gives the states of all jobs."""
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("pynetdicom")
    from cxr_triton.client.gateway.config import load_config
    from cxr_triton.client.gateway.intake import Intake
    from cxr_triton.client.gateway.log import Log, Metrics
    from cxr_triton.client.gateway.read import ReadWorker
    from cxr_triton.client.gateway.store import Store

    class Gateway:
        def __init__(self, *, url="127.0.0.1:1", **read):
            text = {
                "storage": str(tmp_path),
                "folder": {"path": str(tmp_path / "in")},
                "intake": {"min_free_mib": 1},
                "group": {"quiet_s": 0, "max_wait_s": 0},
                "read": {"url": url, **read},
                "destinations": [{"name": "archive", "kind": "stow", "url": "http://127.0.0.1:1"}],
            }
            (tmp_path / "gateway.yaml").write_text(json.dumps(text))
            self.config = load_config(tmp_path / "gateway.yaml")
            self.store = Store(self.config.queue_url, self.config.name)
            self.log = Log(self.config, io.StringIO())
            self.metrics = Metrics(self.store.counts, lambda: 0)

        def take(self, data: bytes) -> None:
            intake = Intake(self.config, self.store, self.log, self.metrics, lambda: None)
            with intake.new_file() as file:
                file.write(data)
                intake.take(file, "folder", "test")

        def read(self) -> None:
            """Work until no job is open before delivery."""
            worker = ReadWorker(self.config, self.store, self.log, self.metrics, lambda: None)

            async def work():
                stopping = asyncio.Event()
                task = asyncio.create_task(worker.run(stopping))
                ends = time.monotonic() + 60
                while any(self.store.counts()["jobs"][s] for s in ("received", "grouped", "reading")):
                    assert time.monotonic() < ends, "the job did not end"
                    await asyncio.sleep(0.02)
                stopping.set()
                await task

            asyncio.run(work())

        def dead(self) -> list[str]:
            return [letter["error"] for letter in self.store.status()["dead"]]

        @property
        def sending(self) -> int:
            return self.store.counts()["jobs"]["sending"]

    made = []

    def make(**read):
        made.append(Gateway(**read))
        return made[-1]

    yield make
    for one in made:
        one.store.close()


def test_the_gateway_refuses_a_reading_of_another_image(gateway):
    with FakeServer(answering(reading_of(B))) as server:
        site = gateway(url=server.url)
        site.take(A)
        site.read()
        (error,) = site.dead()
        assert error.startswith("[READING_MISMATCH]") and "SHA-256 of the file" in error and not site.sending
        server.answer = answering(tampered(reading_of(A), "study_instance_uid"))
        site.store.retry()
        site.read()
        (error,) = site.dead()
        assert error.startswith("[READING_MISMATCH]") and STUDY_A in error
        server.answer = answering(reading_of(A))
        site.store.retry()
        site.read()
        assert site.dead() == [] and site.sending == 1


def test_the_gateway_takes_readings_of_an_older_server_only_when_told_to(gateway):
    with FakeServer(answering(without_identity(reading_of(A)))) as server:
        site = gateway(url=server.url)
        site.take(A)
        site.read()
        (error,) = site.dead()
        assert error.startswith("[READING_MISMATCH]") and "unchecked_reading" in error
        site = gateway(url=server.url, unchecked_reading=True)
        site.store.retry()
        site.read()
        assert site.dead() == [] and site.sending == 1


def test_the_gateway_reads_no_file_that_took_another_s_place(gateway):
    with FakeServer(lambda request, context: iter(())) as server:
        site = gateway(url=server.url)
        site.take(A)
        (path,) = Path(site.config.storage).glob("objects/*/*.dcm")
        path.write_bytes(B)
        site.read()
        (error,) = site.dead()
        assert error.startswith("[READING_MISMATCH]") and path.name in error and STUDY_B in error
        assert server.requests == []


@contextlib.contextmanager
def web_server():
    """An HTTP server that takes everything; its URL and the bodies that it got."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        do_PUT = do_POST

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", bodies
    server.shutdown()
    server.server_close()


def result_of(data: bytes, kind: str) -> tuple[bytes, SimpleNamespace]:
    """A result file, and its row in the queue."""
    source, read = source_header(data), reading_of(data)
    if kind == "fhir":
        report = diagnostic_report(read, [source], options=OPTIONS)
        return json.dumps(report).encode(), SimpleNamespace(kind="fhir", sop_instance=report["id"], sop_class="")
    (instance,) = result_objects(read, [source], kinds=["findings_sr"], options=OPTIONS)
    out = io.BytesIO()
    instance.save_as(out, enforce_file_format=True)
    uids = {"sop_class": instance.SOPClassUID, "sop_instance": str(instance.SOPInstanceUID)}
    return out.getvalue(), SimpleNamespace(kind="findings_sr", **uids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dicom", "stow", "fhir"])
def test_no_archive_gets_a_result_in_place_of_another(tmp_path, monkeypatch, kind):
    """Of three results two files were exchanged; only the third is sent."""
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("pynetdicom")
    from cxr_triton.client.gateway import send
    from cxr_triton.client.gateway.config import Destination

    contents, rows = zip(*[result_of(data, kind) for data in (A, B, dicom("C"))], strict=True)
    for row, name, content in zip(rows, "abc", (contents[1], contents[0], contents[2]), strict=True):
        row.path = name
        (tmp_path / name).write_bytes(content)
    config = SimpleNamespace(storage=str(tmp_path), own_aet="GATEWAY")
    stored, success, reports = [], pydicom.Dataset(), []
    success.Status = 0

    def report(row, outcome, text):
        reports.append((row.path, outcome, text.partition(" ")[0]))

    def send_c_store(result):
        stored.append(result.SOPInstanceUID)
        return success

    association = SimpleNamespace(is_established=False, send_c_store=send_c_store)
    monkeypatch.setattr(send, "associate", lambda *args: contextlib.nullcontext(association))
    with web_server() as (url, bodies):
        to = Destination(name="archive", kind=kind, url=url, aet="ARCHIVE", host="127.0.0.1")
        sender = (send.DicomSender if kind == "dicom" else send.WebSender)(to, config)
        asyncio.run(sender.send(rows, report))
    assert reports[:2] == [(name, "refused", "[READING_MISMATCH]") for name in "ab"]
    assert reports[2][:2] == ("c", "stored")
    assert stored == [rows[2].sop_instance] if kind == "dicom" else [contents[2] in body for body in bodies] == [True]
