"""An archive read through: sources, rows, what a crash leaves, servers that fail, and Ray's actors around a double."""

import dataclasses
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pytest
import yaml
from click.testing import CliRunner
from fake_server import FakeServer, failure, response
from fake_session import until
from pyarrow import parquet

from cxr_triton.archive import folder as archive_folder
from cxr_triton.archive.dicomweb import TRIES
from cxr_triton.archive.folder import WORK, opened
from cxr_triton.archive.item import Item
from cxr_triton.archive.rows import SCHEMA, error_row, key_of, keys_of, packed, read_row, unpacked
from cxr_triton.archive.run import Actors, Run
from cxr_triton.archive.served import Served
from cxr_triton.archive.source import source_of
from cxr_triton.archive.worker import Task, Worker
from cxr_triton.cli import main
from cxr_triton.client.limits import NO_ACCESS
from cxr_triton.errors import InvalidImage, InvalidRequest, ServerMismatch, Unavailable
from cxr_triton.identity import hashed, sha256
from cxr_triton.reading import Reading, parse

PNG = b"\x89PNG\r\n\x1a\n picture "
LABELS = ("Edema", "No Finding", "Pneumonia")
HEADER = {"source": {"kind": "folder", "sha256": "0"}, "identifiers": "hashed", "request": {"task": None}}


def reading(image: bytes, bundle: str = "b1", text: str = "Edema") -> Reading:
    return Reading.of(
        parse(text, grammar="plain", answer="labels", labels=LABELS),
        task=None,
        prompt="Find.",
        model={"profile": "test", "bundle": bundle, "labels": list(LABELS)},
        images=({"rows": 100, "columns": 200, "flags": ["lossy"], "identity": {"file_sha256": sha256(image)}},),
        usage={"prompt_tokens": 7, "completion_tokens": 3},
        timings_ms={"total": 5.0},
        notice="A test double answered.",
    )


class Double(FakeServer):
    """Reads what `say` makes of a picture's name: a text, an error as it travels, or a reading's bundle after ``@``."""

    def __init__(self, say=lambda name: "Edema"):
        self.say, self.seen = say, Counter()
        super().__init__(self.respond)

    def respond(self, request, context):
        tensors = dict(zip([tensor.name for tensor in request.inputs], request.raw_input_contents, strict=True))
        image = tensors["IMAGES"][4:]
        name = image.removeprefix(PNG).decode()
        self.seen[name] += 1
        said = self.say(name)
        if said.startswith("["):
            yield failure(said)
            return
        text, _, bundle = said.partition("@")
        yield response("", reading(image, bundle or "b1", text).to_json(), final=True)


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG + name.encode())
    return folder


def rows_in(out: Path) -> list[dict]:
    return parquet.read_table(out).to_pylist() if any(out.glob("*.parquet")) else []


def rows(*names: str, bundle: str | None = "b1") -> pa.Table:
    made = [error_row(Item(name, name), "NO_IMAGE", "", data=b"", identifiers="hashed") for name in names]
    return unpacked(packed([{**row, "bundle": bundle} for row in made]))


# Sources.


def test_a_folder_has_every_file_once_but_what_is_hidden_or_written(tmp_path):
    pictures(tmp_path / "in", "b/2.dcm", "a.dcm", "b/c/1.png", ".hidden/x.dcm", "b/.y.dcm", "DICOMDIR", "out/old.dcm")
    found = list(source_of(str(tmp_path / "in"), tmp_path / "in" / "out"))
    assert [item.name for item in found] == ["a.dcm", "b/2.dcm", "b/c/1.png"]
    assert all(Path(item.place).is_file() for item in found)


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    pictures(tmp_path / "in", "a/1.dcm", "b/2.dcm")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="/b"):
        list(source_of(str(tmp_path / "in"), tmp_path / "out"))


def test_a_glob_and_one_file(tmp_path):
    pictures(tmp_path, "a/1.dcm", "a/b/2.dcm", "a/3.png")
    found = [Path(item.place).name for item in source_of(str(tmp_path / "**" / "*.dcm"), tmp_path / "out")]
    assert found == ["1.dcm", "2.dcm"]
    assert len(list(source_of(str(tmp_path / "a" / "3.png"), tmp_path / "out"))) == 1


def test_a_manifest_names_paths_beside_it_and_a_wrong_column_is_told(tmp_path):
    pictures(tmp_path, "p/1.dcm", "p/2.dcm")
    parquet.write_table(pa.table({"file": ["p/1.dcm", "p/2.dcm", None]}), tmp_path / "m.parquet")
    found = list(source_of(str(tmp_path / "m.parquet"), tmp_path / "out", column="file"))
    assert [(item.name, Path(item.place).is_file()) for item in found] == [("p/1.dcm", True), ("p/2.dcm", True)]
    with pytest.raises(InvalidRequest, match=r"'pat'.*file.*--column"):
        list(source_of(str(tmp_path / "m.parquet"), tmp_path / "out", column="pat"))


def test_what_is_no_source_says_what_is(tmp_path):
    with pytest.raises(InvalidRequest, match="give a folder, a glob in quotes, a Parquet file"):
        source_of(str(tmp_path / "nothing"), tmp_path / "out")
    with pytest.raises(InvalidRequest, match="no query for studies or instances"):
        source_of("https://pacs/dicom-web/patients?x=1", tmp_path / "out")


class Pacs(BaseHTTPRequestHandler):
    """Studies of a number of instances each, in pages; `statuses` are answered to the next requests for an instance."""

    sizes: tuple[int, ...] = (3,)
    statuses: ClassVar[list[int]] = []
    broken: ClassVar[dict[str, int]] = {}  # instances, and what is answered for them
    is_down = False
    knows_pages = True
    most = 500  # in a page, whatever is asked for

    def do_GET(self):
        if self.is_down:
            return self.answer(502, "text/html", b"bad gateway")
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        words = parts.path.strip("/").split("/")[1:]
        if len(words) == 6:
            return self.instance(words[5])
        found = []
        for study, size in enumerate(self.sizes):
            one = {"0020000D": {"Value": [f"1.{study}"]}}
            if words == ["studies"]:
                found.append(one)
            elif words == ["instances"] or words[:2] == ["studies", f"1.{study}"]:
                for n in range(size):
                    series = {"0020000E": {"Value": [f"1.{study}.7"]}, "00080018": {"Value": [f"1.{study}.7.{n}"]}}
                    found.append({**one, **series})
        if self.knows_pages:
            offset = int(query["offset"][0])
            found = found[offset : offset + min(int(query["limit"][0]), self.most)]
        self.answer(200, "application/dicom+json", json.dumps(found).encode())

    def instance(self, uid):
        status = self.statuses.pop(0) if self.statuses else self.broken.get(uid, 200)
        self.asked[uid] += 1
        body = b"--cut\r\nContent-Type: application/dicom\r\n\r\n" + PNG + uid.encode() + b"\r\n--cut--"
        self.answer(status, 'multipart/related; type="application/dicom"; boundary=cut', body)

    def answer(self, status, kind, body):
        if status == 0:
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def pacs(monkeypatch):
    for name in ("sizes", "statuses", "broken", "is_down", "knows_pages", "most"):
        monkeypatch.setattr(Pacs, name, getattr(Pacs, name))
    monkeypatch.setattr(Pacs, "asked", Counter(), raising=False)
    monkeypatch.setattr("cxr_triton.archive.dicomweb.time.sleep", lambda s: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Pacs) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/dicom-web"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("knows_pages", "most"), [(True, 500), (True, 1), (False, 500)])
def test_a_dicomweb_query_is_followed_over_its_pages_to_every_instance(tmp_path, pacs, monkeypatch, knows_pages, most):
    monkeypatch.setattr("cxr_triton.archive.dicomweb.PAGE", 2)
    Pacs.sizes, Pacs.knows_pages, Pacs.most = (3, 0, 1), knows_pages, most
    by_study = list(source_of(f"{pacs}/studies?StudyDate=2026", tmp_path))
    assert [item.name for item in by_study] == ["1.0.7.0", "1.0.7.1", "1.0.7.2", "1.2.7.0"]
    assert by_study[3].place == "studies/1.2/series/1.2.7/instances/1.2.7.0"
    assert list(source_of(f"{pacs}/instances?Modality=DX", tmp_path)) == by_study


def test_an_instance_is_fetched_and_read_and_one_that_is_gone_is_a_row(tmp_path, pacs):
    Pacs.statuses = [503, 200, 404]
    source = source_of(f"{pacs}/instances?", tmp_path)
    with Double() as server:
        worker = Worker(Task(urls=(server.url,), slots=1, web=source.web, timeout_s=60.0))
        items = [vars(item) for item in source][:2]
        made = [unpacked(worker({"items": [json.dumps([item])]})["rows"][0]).to_pylist()[0] for item in items]
    assert [row["error_code"] for row in made] == [None, "INVALID_IMAGE"] and server.seen == {"1.0.7.0": 1}
    assert made[1]["sop_instance_uid"] == sha256(b"1.0.7.1") and "404" in made[1]["error"]


def read_from(pacs: str, out: Path, *broken: int) -> tuple[list[dict], str]:
    """Rows of a unit of three instances, the first ones of which are `broken`, and what stopped it."""
    Pacs.broken = {f"1.0.7.{n}": status for n, status in enumerate(broken)}
    source = source_of(f"{pacs}/instances?", out)
    with Double() as server:
        worker = Worker(Task(urls=(server.url,), slots=1, web=source.web, timeout_s=60.0))
        made = worker({"items": [json.dumps([vars(item) for item in source])]})
    return unpacked(made["rows"][0]).to_pylist(), made["stopped"][0]


@pytest.mark.parametrize("status", [500, 502, 0])
def test_an_instance_at_which_the_server_fails_for_good_is_a_row_and_the_others_are_read(tmp_path, pacs, status):
    made, stopped = read_from(pacs, tmp_path, status)
    assert [row["error_code"] for row in made] == ["INTERNAL", None, None] and not stopped
    asks = TRIES if status else 2 * TRIES  # aiohttp asks again by itself where a connection breaks
    assert Pacs.asked == {"1.0.7.0": asks, "1.0.7.1": 1, "1.0.7.2": 1}
    assert f"HTTP {status}" * bool(status) in made[0]["error"] and f"{TRIES} times" in made[0]["error"]


def test_a_server_that_lets_nobody_retrieve_ends_the_run(tmp_path, pacs):
    made, stopped = read_from(pacs, tmp_path, 403, 403, 403)
    assert made == [] and stopped.startswith("[ACCESS_DENIED] ") and Pacs.asked["1.0.7.0"] == 1


def test_a_server_that_fails_at_one_instance_after_the_other_ends_the_run(tmp_path, pacs, monkeypatch):
    monkeypatch.setattr("cxr_triton.archive.worker.MOST_LOST", 3)
    made, stopped = read_from(pacs, tmp_path, 500, 500, 500)
    assert {row["error_code"] for row in made} <= {"INTERNAL"} and stopped.startswith("[UNAVAILABLE] ")
    assert "3 instances in a row" in stopped
    made, stopped = read_from(pacs, tmp_path, 500, 200, 500)
    assert [row["error_code"] for row in made] == ["INTERNAL", None, "INTERNAL"] and not stopped


def test_a_unit_brings_what_it_read_and_those_after_a_stop_ask_nobody(tmp_path):
    names = [f"{n}.png" for n in range(4)]
    units = [
        [vars(item) for item in source_of(str(pictures(tmp_path / "in", *names)), tmp_path)][n : n + 2] for n in (0, 2)
    ]
    with Double(lambda name: "[UNAVAILABLE] stopping" if name == "1.png" else "Edema") as server:
        worker = Worker(Task(urls=(server.url,), slots=1, timeout_s=3.0))
        made = [worker({"items": [json.dumps(unit)]}) for unit in units]
    assert [unpacked(each["rows"][0]).num_rows for each in made] == [1, 0]
    assert {each["stopped"][0] for each in made} == {"[UNAVAILABLE] stopping"}
    assert not {"2.png", "3.png"} & set(server.seen)


def test_an_instance_that_is_too_large_is_a_row_and_fetched_once(tmp_path, pacs, monkeypatch):
    monkeypatch.setattr("cxr_triton.archive.worker.MAX_IMAGE_MIB", 0)
    made, stopped = read_from(pacs, tmp_path)
    assert [row["error_code"] for row in made] == ["LIMIT_EXCEEDED"] * 3 and not stopped
    assert set(Pacs.asked.values()) == {1}


@pytest.mark.parametrize("status, code", [(503, "QUEUE_FULL"), (429, "QUEUE_FULL")])
def test_a_server_that_stays_busy_ends_the_run(tmp_path, pacs, status, code):
    made, stopped = read_from(pacs, tmp_path, status, status, status)
    assert made == [] and stopped.startswith(f"[{code}] ")


def test_a_server_that_goes_ends_the_run(tmp_path, pacs, monkeypatch):
    def go(self, uid):
        Pacs.is_down = True
        self.answer(500, "text/html", b"")

    monkeypatch.setattr(Pacs, "instance", go)
    made, stopped = read_from(pacs, tmp_path)
    assert made == [] and stopped.startswith("[UNAVAILABLE] ")


def test_a_dicomweb_server_that_answers_something_else_ends_the_run(tmp_path, pacs, monkeypatch):
    monkeypatch.setattr(Pacs, "do_GET", lambda self: self.answer(200, "text/html", b"<html>"))
    with pytest.raises(Unavailable, match="no DICOM JSON"):
        list(source_of(f"{pacs}/studies?", tmp_path))


# Rows.


def test_a_row_has_the_reading_and_who_made_it():
    item = Item("a/1.dcm", "/x/a/1.dcm", {"sop_instance_uid": "1.2"})
    made = read_row(item, reading(b"bytes"), data=b"bytes", identifiers="plain", asked_ms=2.5, server="triton 2.51")
    (row,) = unpacked(packed([made])).to_pylist()
    assert row["image"] == "a/1.dcm" and row["sop_instance_uid"] == "1.2" and row["file_sha256"] == sha256(b"bytes")
    assert (row["status"], row["labels"], row["flags"]) == ("ok", ["Edema"], ["lossy"])
    assert (row["profile"], row["bundle"], row["server"], row["asked_ms"]) == ("test", "b1", "triton 2.51", 2.5)
    assert Reading.from_json(row["reading"]).to_json() == reading(b"bytes").to_json()
    assert row["error_code"] is row["error"] is None


@pytest.mark.parametrize("identifiers", ["plain", "hashed"])
def test_another_object_than_was_asked_for_is_no_row(identifiers):
    def given(uid):
        identity = {"sop_instance_uid": uid, "identifiers": "plain"}
        facts = hashed(identity) if identifiers == "hashed" else identity
        return dataclasses.replace(reading(b"x"), images=({"identity": facts},))

    asked = {"data": b"x", "identifiers": identifiers, "asked_ms": 1.0, "server": ""}
    item = Item("1.2", "place", {"sop_instance_uid": "1.2"})
    assert read_row(item, given("1.2"), **asked)["labels"] == ["Edema"]
    with pytest.raises(InvalidImage, match="SOP Instance UID differs"):
        read_row(item, given("1.3"), **asked)


def test_hashed_rows_name_neither_path_nor_uid():
    item = Item("DOE^JANE/1.2.3.dcm", "/x", {"study_instance_uid": "1.2.3"})
    row = error_row(item, "INVALID_IMAGE", "cut off", data=b"x", identifiers="hashed")
    assert row["image"] == sha256(b"DOE^JANE/1.2.3.dcm") and row["study_instance_uid"] == sha256(b"1.2.3")
    assert "DOE" not in str(row) and "1.2.3'" not in str(row)
    assert bytes.fromhex(row["image"][:32]) == key_of(item.name)


@pytest.mark.parametrize("identifiers", ["hashed", "plain"])
def test_a_name_that_is_no_utf_8_is_known_again(identifiers):
    item = Item("caf\udce9.dcm", "/x")
    (row,) = unpacked(packed([error_row(item, "NO_IMAGE", "", data=b"", identifiers=identifiers)])).to_pylist()
    assert list(keys_of([row["image"]], identifiers)) == [key_of(item.name)]


def test_scores_of_a_reading_become_a_column():
    class Scored(Reading):
        def to_json(self):
            return json.dumps({**json.loads(super().to_json()), "scores": {"Edema": 1.5}})

    scored = Scored(**{name: getattr(reading(b"x"), name) for name in reading(b"x").__dataclass_fields__})
    made = read_row(Item("1", "1"), scored, data=b"x", identifiers="plain", asked_ms=1.0, server="")
    assert unpacked(packed([made])).to_pylist()[0]["scores"] == [("Edema", 1.5)]


# What lies on the disk.


def test_parts_become_files_and_a_second_run_knows_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_folder, "ROWS", 4)
    with opened(tmp_path / "out", HEADER) as folder:
        for unit in (("a", "b"), ("c",), ("d", "e"), ("f",)):
            folder.add(rows(*unit))
        assert [path.name for path in sorted((tmp_path / "out" / WORK).glob("part*"))] == ["part-00000003.parquet"]
    with opened(tmp_path / "out", HEADER) as folder:
        assert folder.done() == {key_of(name) for name in "abcdef"}
        folder.add(rows("g"))
        folder.finish()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "_archive.json", "readings-000000.parquet", "readings-000001.parquet",
    }  # fmt: skip
    assert len(rows_in(tmp_path / "out")) == 7
    assert parquet.read_schema(tmp_path / "out" / "readings-000001.parquet").remove_metadata() == SCHEMA


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_a_crash_between_a_file_and_the_parts_that_it_took_in_doubles_no_row(tmp_path, monkeypatch, dies_at):
    """The file is there and `dies_at` of its parts are gone."""
    with opened(tmp_path / "out", HEADER) as folder:
        for name in "abc":
            folder.add(rows(name))
        unlink, left = Path.unlink, [dies_at]

        def dying(path, **options):
            if path.name.startswith("part-"):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
            unlink(path, **options)

        monkeypatch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            folder.gather()
        monkeypatch.undo()
    with opened(tmp_path / "out", HEADER) as folder:
        folder.add(rows("d"))
        folder.finish()
    assert sorted(row["image"] for row in rows_in(tmp_path / "out")) == sorted(sha256(name.encode()) for name in "abcd")


def test_what_a_crash_left_of_a_part_is_no_row(tmp_path):
    with opened(tmp_path / "out", HEADER) as folder:
        folder.add(rows("a"))
        (folder.work / ".part-00000001.parquet.99.partial").write_bytes(b"PAR1 cut")
    with opened(tmp_path / "out", HEADER) as folder:
        assert folder.done() == {key_of("a")}
        folder.finish()
    assert len(rows_in(tmp_path / "out")) == 1


def test_another_request_another_process_or_something_else_is_refused(tmp_path):
    with opened(tmp_path / "out", HEADER):
        with pytest.raises(InvalidRequest, match="another process writes it"):
            with opened(tmp_path / "out", HEADER):
                pass
    with pytest.raises(InvalidRequest, match="was begun with another request"):
        with opened(tmp_path / "out", {**HEADER, "request": {"task": "other"}}):
            pass
    pictures(tmp_path / "photos", "1.png")
    with pytest.raises(InvalidRequest, match="holds something else"):
        with opened(tmp_path / "photos", HEADER):
            pass


def test_readings_of_two_bundles_do_not_come_into_one_archive(tmp_path):
    with opened(tmp_path / "out", HEADER) as folder:
        folder.add(rows("a"))
        with pytest.raises(ServerMismatch, match=r"bundle b1.* reads with b2"):
            folder.add(rows("b", bundle="b2"))
        folder.add(rows("c", bundle=None))
    with opened(tmp_path / "out", HEADER) as folder:
        with pytest.raises(ServerMismatch):
            folder.add(rows("d", bundle="b3"))
        assert folder.done() == {key_of("a"), key_of("c")}


def test_rows_of_a_code_are_dropped_to_be_read_again(tmp_path):
    with opened(tmp_path / "out", HEADER) as folder:
        folder.add(rows("a", "b"))
        other = error_row(Item("c", "c"), "DEADLINE_EXCEEDED", "", data=b"", identifiers="hashed")
        folder.add(unpacked(packed([other])))
        assert folder.forget(["DEADLINE_EXCEEDED"]) == 1
        assert folder.done() == {key_of("a"), key_of("b")}


def test_the_job_for_kubernetes_is_a_command_of_this_release(monkeypatch):
    """It was not run, so at least it is held against the command line."""
    job = yaml.safe_load((Path(__file__).resolve().parents[2] / "deploy" / "rayjob.yaml").read_text())
    program, verb, *words = shlex.split(job["spec"]["entrypoint"])
    assert (program, verb) == ("cxr-triton", "archive")
    monkeypatch.setattr("cxr_triton.cli.why_not_writable", lambda path: None)  # it is in a container that OUT is
    command = main.get_command(None, "archive")
    given = command.make_context("archive", words).params
    assert given["source"] == "/data/radiographs" and given["urls"] and given["out"] == Path("/data/rows")
    cluster = job["spec"]["rayClusterSpec"]
    for template in (cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]):
        (container,) = template["spec"]["containers"]
        assert container["resources"]["limits"] and template["spec"]["securityContext"]["runAsNonRoot"]


# Servers.


def test_what_may_pass_is_asked_again_and_two_servers_share(monkeypatch):
    monkeypatch.setattr("cxr_triton.archive.served._FIRST_PAUSE_S", 0.01)
    full = ["[QUEUE_FULL] later", "[INTERNAL] incident", "[QUEUE_FULL] later"]

    def say(name):
        return full.pop() if full else "Edema"

    # the other one answers once the first was asked, so that four readings one after the other are not all its own
    with Double(say) as one, Double(lambda name: until(lambda: one.seen) or "Edema") as other:
        served = Served([one.url, other.url], 20.0, NO_ACCESS)
        barrier = threading.Barrier(4)

        def read(n):
            barrier.wait()
            done.append(served.read(PNG + str(n).encode(), {}))

        done: list = []
        threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        served.close()
    assert len(done) == 4 and all(server == "fake 0.0" for _, server in done)
    assert one.seen and other.seen


@pytest.mark.slow
def test_a_server_that_is_away_is_left_to_the_other(monkeypatch):
    with Double() as gone:
        pass
    with Double() as there:
        served = Served([gone.url, there.url], 60.0, NO_ACCESS)
        for n in range(4):
            served.read(PNG + str(n).encode(), {})
        served.close()
    assert sum(there.seen.values()) == 4


def test_an_image_that_fails_is_a_row_and_what_concerns_all_stops_the_unit(tmp_path):
    said = {"bad": "[NOT_A_CHEST] a knee", "odd": "[INTERNAL] incident", "wrong": "[INVALID_REQUEST] no such task"}
    pictures(tmp_path, "good", "bad", "odd", "wrong")
    (tmp_path / "text").write_text("hello")
    with Double(lambda name: said.get(name, "Edema")) as server:
        worker = Worker(Task(urls=(server.url,), slots=1, timeout_s=60.0, identifiers="plain"))

        def unit(*names):
            items = [vars(Item(name, str(tmp_path / name))) for name in names]
            answer = worker({"items": [json.dumps(items)]})
            return unpacked(answer["rows"][0]).to_pylist(), answer["stopped"][0]

        made, stopped = unit("good", "bad", "text", "gone", "odd")
        assert stopped == ""
        assert {row["image"]: row["error_code"] for row in made} == {
            "good": None, "bad": "NOT_A_CHEST", "text": "NO_IMAGE", "gone": "UNREADABLE", "odd": "INTERNAL",
        }  # fmt: skip
        assert server.seen["odd"] == 3 and server.seen["bad"] == 1
        assert next(row for row in made if row["image"] == "gone")["error"] == "No such file or directory"
        made, stopped = unit("good", "wrong")
        assert [row["image"] for row in made] == ["good"] and stopped == "[INVALID_REQUEST] no such task"


# The whole, with Ray.


@pytest.fixture(scope="module")
def local_ray():
    """One small Ray for the tests here, on the loopback interface; it ends with them."""
    from cxr_triton.archive.cluster import ray_started

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_started(cpus=2):
            yield


def archive(source, out, *options):
    return CliRunner().invoke(main, ["archive", str(source), "-o", str(out), "--timeout-s", "60", *map(str, options)])


@pytest.mark.slow
def test_an_archive_is_read_once_gone_on_with_and_evaluated(tmp_path, local_ray):
    names = [f"{n}.png" for n in range(40)]
    pictures(tmp_path / "in", *names)
    (tmp_path / "in" / "note.txt").write_text("hello")
    said = {"7.png": "[NOT_A_CHEST] a knee; send a chest", "9.png": "Pneumonia"}
    with Double(lambda name: said.get(name, "Edema")) as one, Double(lambda name: said.get(name, "Edema")) as other:
        urls = ("--url", one.url, "--url", other.url, "--actors", 2, "--concurrency", 4)
        report = tmp_path / "rows.json"
        ended = archive(tmp_path / "in", tmp_path / "out", *urls, "--json", report, "--html", tmp_path / "rows.html")
        assert ended.exit_code == 3, ended.output
        told = json.loads(report.read_text())
        assert (told["images"], told["readings"], told["errors"]) == (41, 39, {"NOT_A_CHEST": 1, "NO_IMAGE": 1})
        assert told["labels"] == {"Edema": 38, "Pneumonia": 1} and sum(told["run"]["nodes"]) == 41
        pictures(tmp_path / "in", "late.png")
        again = archive(tmp_path / "in", tmp_path / "out", "--url", one.url, "--json", report)
        assert again.exit_code == 3 and "42 images, 41 of them have a row" in again.stderr
        assert Counter(one.seen + other.seen) == dict.fromkeys([*names, "late.png"], 1) and one.seen and other.seen
    found = rows_in(tmp_path / "out")
    assert len(found) == 42 == len({row["image"] for row in found})
    page = (tmp_path / "rows.html").read_text()
    assert "NOT_A_CHEST" in page and "A test double answered." in page and "7.png" not in page
    table = ["study,image,labels", *(f"{n},{n}.png,{'Pneumonia' if n == 9 else 'Edema'}" for n in range(40))]
    (tmp_path / "in" / "own.csv").write_text("\n".join(table))
    result = tmp_path / "result.jsonl"
    command = ["evaluate", "run", str(tmp_path / "in" / "own.csv"), "--format", "table", "-o", str(result)]
    measured = CliRunner().invoke(main, [*command, "--archive", str(tmp_path / "out")])
    assert measured.exit_code == 3, measured.output
    lines = [json.loads(line) for line in result.read_text().splitlines()]
    assert lines[0]["model"]["bundle"] == "b1" and lines[0]["versions"]["fake"] == "0.0"
    codes = Counter(line["code"] for line in lines[1:])
    assert codes == {"": 39, "NOT_A_CHEST": 1}
    assert next(line for line in lines[1:] if line["study"] == "9")["answer"]["labels"]["Pneumonia"] == 1
    other_task = CliRunner().invoke(main, [*command, "--archive", str(tmp_path / "out"), "--task", "x", "--restart"])
    assert other_task.exit_code == 1 and "was asked with another task" in other_task.stderr


@pytest.mark.slow
def test_an_actor_that_is_killed_loses_no_image(tmp_path, local_ray):
    """The double kills the actor that asks it for an image; Ray gives the unit to the next."""
    import psutil

    names = [f"{n}.png" for n in range(48)]
    pictures(tmp_path / "in", *names)
    killed = []

    def say(name):
        if name == "20.png" and not killed:
            actors = [p for p in psutil.process_iter() if "MapWorker(MapBatches(Worker))" in " ".join(_words(p))]
            killed.extend(p.pid for p in actors if any(c.raddr and c.raddr.port == port for c in p.net_connections()))
            for pid in killed:
                os.kill(pid, 9)
            time.sleep(0.2)
        return "Edema"

    with Double(say) as server:
        port = int(server.url.rpartition(":")[2])
        ended = archive(tmp_path / "in", tmp_path / "out", "--url", server.url, "--identifiers", "plain")
    assert ended.exit_code == 0, ended.output
    assert killed
    assert sorted(row["image"] for row in rows_in(tmp_path / "out")) == sorted(names)


def _words(process) -> list[str]:
    import psutil

    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_a_server_that_goes_leaves_what_was_read_and_the_run_goes_on(tmp_path, local_ray, monkeypatch):
    names = [f"{n:02}.png" for n in range(6)]  # one unit: of several, Ray chooses which begins
    pictures(tmp_path / "in", *names)
    source, task = source_of(str(tmp_path / "in"), tmp_path / "out"), Task(slots=1, timeout_s=3.0)

    def through(url):
        with opened(tmp_path / "out", HEADER) as folder:
            asked = Task(**{**vars(task), "urls": (url,)})
            return Run(folder, asked, Actors()).over(source)

    with Double(lambda name: "[UNAVAILABLE] stopping" if name > "03" else "Edema") as server:
        with pytest.raises(Unavailable, match="stopping"):
            through(server.url)
    with Double() as server:
        ran = through(server.url)
    assert (ran.there, ran.rows) == (3, 3) and server.seen == dict.fromkeys(names[3:], 1)


@pytest.mark.slow
def test_a_destructor_that_waits_for_ever_keeps_no_run_from_ending():
    """Its place is taken by ``pause``, registered first, as Ray's is."""
    code = (
        "import ctypes, sys; libc = ctypes.CDLL(None); libc.on_exit(ctypes.cast(libc.pause, ctypes.c_void_p), None)\n"
        "from cxr_triton.archive.cluster import leave_at_exit\n"
        "leave_at_exit(); print('said'); sys.exit(3)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (3, "said\n")


@pytest.mark.slow
def test_ray_on_one_machine_listens_on_the_loopback_interface_only(local_ray):
    import psutil
    import ray

    ours = {os.getpid(), *(p.pid for p in psutil.Process().children(recursive=True))}
    heard = [c for c in psutil.net_connections("tcp") if c.pid in ours and c.status == psutil.CONN_LISTEN]
    assert heard and {c.laddr.ip for c in heard} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
