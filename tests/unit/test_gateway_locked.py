"""What the gateway keeps to itself, and what it does not let others do to it."""

import asyncio
import contextlib
import http.server
import io
import json
import multiprocessing
import os
import re
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydicom import Dataset

pytest.importorskip("sqlalchemy")
pytest.importorskip("pynetdicom")

import sqlalchemy.exc
from fake_server import FakeServer, failure, response
from pynetdicom import AE
from pynetdicom.association import Association

from cxr_triton import files, phantom, phantom_file
from cxr_triton.client.gateway import disk
from cxr_triton.client.gateway.association import forget_messages, limit
from cxr_triton.client.gateway.config import EXAMPLE, Destination, Priors, Unreachable, load_config
from cxr_triton.client.gateway.dimse import STUDY_ROOT_FIND
from cxr_triton.client.gateway.doors import Folder
from cxr_triton.client.gateway.intake import Intake
from cxr_triton.client.gateway.log import Log, Metrics
from cxr_triton.client.gateway.priors import PacsFinder, WebFinder
from cxr_triton.client.gateway.read import ReadWorker
from cxr_triton.client.gateway.send import WebSender
from cxr_triton.client.gateway.service import Gateway
from cxr_triton.client.gateway.store import Store
from cxr_triton.client.gateway.watch import FolderWatcher
from cxr_triton.client.limits import read_token
from cxr_triton.errors import InvalidConfig
from cxr_triton.profile import load_profile, profile_names

DESTINATION = "destinations: [{name: pacs, aet: PACS, host: 127.0.0.1}]\n"


@pytest.fixture(autouse=True)
def umask():
    """Of most systems, and again after a gateway has set its own."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def configured(folder, text="", **keys):
    """A configuration whose objects come by a folder."""
    path = folder / "gateway.yaml"
    own = {"storage": str(folder / "s"), "folder": {"path": str(folder / "in")}, "intake": {"min_free_mib": 0}, **keys}
    path.write_text(yaml.safe_dump(own) + ("" if "destinations" in keys else DESTINATION) + text)
    return load_config(path)


def phantom_dicom(seed: int = 1) -> bytes:
    import numpy as np

    return phantom_file.write_dicom(phantom.draw(np.random.default_rng(seed)))


class Site:
    """An intake with its queue and its log."""

    def __init__(self, folder, **keys):
        self.config = configured(folder, **keys)
        Path(self.config.storage).mkdir(exist_ok=True)
        self.stream = io.StringIO()
        self.store = Store(self.config.queue_url, "one")
        self.log = Log(self.config, self.stream)
        self.intake = Intake(self.config, self.store, self.log, Metrics(self.store.counts, lambda: 0), lambda: None)
        self.watcher = FolderWatcher(self.config.folder or Folder(path=str(folder / "in")), self.intake)
        self.inbox = folder / "in"

    def scan(self) -> int:
        """Two scans, since a file is taken at the second that sees it."""
        return self.watcher.scan() + self.watcher.scan()

    def events(self, name: str) -> list[dict]:
        return [line for line in map(json.loads, self.stream.getvalue().splitlines()) if line["event"] == name]


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.intake.close()
    made.store.close()


# -------------------------------------------------------------------------------------------------------- at rest


def modes(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"file": set(), "folder": set()}
    for path in (folder, *folder.rglob("*")):
        found["folder" if path.is_dir() else "file"].add(oct(stat.S_IMODE(path.stat().st_mode)))
    return found


@pytest.mark.parametrize("shared, expected", [(False, ("0o600", "0o700")), (True, ("0o660", "0o2770"))])
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_nobody_else_reads_what_the_gateway_writes(tmp_path, mask, shared, expected):
    os.umask(0o022)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "queue.sqlite").touch(0o644)  # of an earlier release
    os.umask(mask)
    config = configured(tmp_path, share_with_group=shared)
    gateway = Gateway(config, io.StringIO())
    with gateway.intake.new_file() as file:
        file.write(phantom_dicom())
        gateway.intake.take(file, "folder", "test")
    folder = tmp_path / "s" / "results" / "1"
    folder.mkdir(parents=True)
    files.write(folder / "0-sr.dcm", b"result")
    beside = {path.name for path in (tmp_path / "s").glob("queue.sqlite-*")}
    found = modes(tmp_path / "s")
    gateway.store.close()
    gateway._lock.close()
    assert beside == {"queue.sqlite-wal", "queue.sqlite-shm"}
    assert found["file"] <= {expected[0], "0o600"} and expected[0] in found["file"]
    assert found["folder"] <= {expected[1], expected[1].replace("2", "")}


def test_a_queue_that_an_operator_looks_into_first_is_private_too(tmp_path):
    Store(f"sqlite:///{tmp_path}/queue.sqlite", "operator").close()
    assert modes(tmp_path)["file"] == {"0o600"}


def make_key(config, start, keys):
    start.wait()
    keys.put(Log(config, io.StringIO()).uid("1.2.3"))


@pytest.mark.slow
def test_gateways_that_start_at_once_have_one_key(tmp_path):
    """A key is there whole or not at all, whoever comes first."""
    context = multiprocessing.get_context("fork")
    for i in range(5):
        folder = tmp_path / str(i)
        (folder / "s").mkdir(parents=True)
        config, start, keys = configured(folder), context.Event(), context.Queue()
        at_once = [context.Process(target=make_key, args=(config, start, keys)) for _ in range(6)]
        for process in at_once:
            process.start()
        start.set()
        found = {keys.get(timeout=60) for _ in at_once}
        for process in at_once:
            process.join()
        assert len(found) == 1 and found == {Log(config, io.StringIO()).uid("1.2.3")}
        assert [path.name for path in (folder / "s").iterdir()] == ["log.key"]


@pytest.mark.parametrize("content", [b"", b"short", b"\n" * 40])
def test_a_key_of_nothing_is_refused(tmp_path, content):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "log.key").write_bytes(content)
    with pytest.raises(InvalidConfig, match=r"log.key.*at least 16.*urandom"):
        Log(configured(tmp_path), io.StringIO())


def test_a_key_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    steps = []
    sync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda handle: steps.append("sync") or sync(handle))
    monkeypatch.setattr(os, "link", lambda *args: steps.append("name") or link(*args))
    disk.new_file(tmp_path / "k", bytes(32))
    disk.new_file(tmp_path / "k", b"another")
    assert steps[:3] == ["sync", "name", "sync"] and (tmp_path / "k").read_bytes() == bytes(32)


# ------------------------------------------------------------------------------------------------------- clear text

FAR = "name: far, kind: stow"


@pytest.mark.parametrize(
    "text, message",
    [
        (f"destinations: [{{{FAR}, url: 'http://pacs.example', token_file: t}}]", "not encrypted"),
        (f"destinations: [{{{FAR}, url: 'http://user:secret@pacs.example'}}]", "not encrypted"),
        (f"destinations: [{{{FAR}, url: 'http://127.0.0.1', token_file: t, proxy: 'http://p:1'}}]", "not encrypted"),
        (f"destinations: [{{{FAR}, url: 'https:///x'}}]", "name a host"),
        ("web: {stow: true, host: 0.0.0.0, token_file: t}\n" + DESTINATION, "clear_text: true"),
        ("read: {max_images: 2}\npriors: {url: 'http://pacs.example', token_file: t}\n" + DESTINATION, "not encrypted"),
    ],
)
def test_a_token_does_not_travel_in_clear_text_unless_that_is_meant(tmp_path, text, message):
    path = tmp_path / "gateway.yaml"
    path.write_text(f"storage: s\nfolder: {{path: in}}\n{text}")
    with pytest.raises(InvalidConfig, match=message) as error:
        load_config(path)
    assert "secret" not in str(error.value)
    for key in ("token_file: t", "secret@pacs.example'"):
        path.write_text(path.read_text().replace(key, f"{key}, clear_text: true"))
    if "https:///x" not in text:
        load_config(path)


def test_a_token_on_this_machine_or_encrypted_is_taken(tmp_path):
    path = tmp_path / "gateway.yaml"
    for url in ("http://127.0.0.1:8042", "http://localhost", "http://[::1]:1", "https://pacs.example"):
        path.write_text(f"storage: s\nfolder: {{path: in}}\ndestinations: [{{{FAR}, url: '{url}', token_file: t}}]")
        assert list(load_config(path).in_clear_text()) == []


def test_clear_text_is_said_once_by_section_until_it_is_meant(tmp_path):
    away = {"host": "10.1.2.3", "aet": "PACS"}
    keys = {
        "dicom": {"host": "0.0.0.0", "port": 0, "peers": [{"aet": "A", "addresses": ["10.0.0.0/8"]}]},
        "web": {"host": "0.0.0.0", "port": 0},
        "read": {"url": "triton:8001", "max_images": 2},
        "priors": away,
        "destinations": [{"name": "pacs", **away}, {"name": "near", "host": "127.0.0.1", "aet": "NEAR"}],
    }
    sections = ["dicom", "web", "read", "priors", "destinations.pacs"]

    def said(folder) -> list:
        folder.mkdir()
        stream = io.StringIO()
        gateway = Gateway(configured(folder, **keys), stream)
        gateway.store.close()
        gateway._lock.close()
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        return [line["sections"] for line in lines if line["event"] == "clear_text"]

    assert said(tmp_path / "a") == [sections]
    for section in (keys["dicom"], keys["web"], keys["read"], keys["priors"], keys["destinations"][0]):
        section["clear_text"] = True
    assert said(tmp_path / "b") == []


def test_a_token_file_has_to_hold_a_token_and_is_better_not_for_everybody(tmp_path):
    token = tmp_path / "token"
    for content in ("", "\n", "two\nlines", "a b", "t\u00f6ken"):
        token.write_text(content)
        with pytest.raises(InvalidConfig, match="token_file"):
            read_token(str(token))
    token.write_text("abc\n")
    assert read_token(str(token)) == "abc"
    keys = {"destinations": [{"name": "a", "kind": "fhir", "url": "https://x.example", "token_file": str(token)}]}
    for mode, warned in ((0o644, ["destinations.a.token_file"]), (0o640, None)):
        token.chmod(mode)
        stream = io.StringIO()
        gateway = Gateway(configured(tmp_path, **keys), stream)
        gateway.store.close()
        gateway._lock.close()
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        found = [line["keys"] for line in lines if line["event"] == "secret_readable_by_others"]
        assert found == ([warned] if warned else []) and "abc" not in stream.getvalue()
    token.unlink()
    with pytest.raises(InvalidConfig, match="cannot be read"):
        Gateway(configured(tmp_path, **keys), io.StringIO())


def test_a_password_of_a_queue_that_is_no_url_is_not_said(tmp_path):
    with pytest.raises(InvalidConfig) as error:
        Store("postgresql+psycopg://gateway:se@cr:et@db/x", "one")
    assert "et@db" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- HTTP clients


class Peer(http.server.ThreadingHTTPServer):
    """Answers by a function of the handler; keeps paths and headers."""

    daemon_threads = True

    def __init__(self, answer):
        self.asked = asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def _do(self):
                asked.append((self.path, dict(self.headers)))
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with contextlib.suppress(OSError):
                    answer(self)

            do_GET = do_POST = do_PUT = _do

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()


def says(status: int, body: bytes = b"", **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def drip(handler):
    """An answer that never ends."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def flood(handler):
    """32 MiB."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(32):
        handler.wfile.write(bytes(1 << 20))


def deliver(kind: str, url: str, tmp_path, **more) -> str:
    """What became of a result: its outcome, or why the destination counts as unreachable."""
    (tmp_path / "token").write_text("the-token")
    more = {"timeout_s": 60.0, "token_file": str(tmp_path / "token"), **more}
    to = Destination(name="there", kind=kind, url=url, **more)
    sender = WebSender(to, SimpleNamespace(storage=tmp_path, own_aet="X"))
    sender._content = lambda row: b'{"id": "1"}'
    said = []
    try:
        asyncio.run(sender.send([SimpleNamespace()], lambda row, outcome, text: said.append(outcome)))
    except Unreachable as error:
        said.append(str(error))
    return said[-1]


def ask(url: str, tmp_path, **more) -> str:
    """What a QIDO-RS search for priors ends with."""
    (tmp_path / "token").write_text("the-token")
    more = {"total_s": more.get("timeout_s", 60.0), "token_file": str(tmp_path / "token"), **more}
    intake = SimpleNamespace(config=SimpleNamespace(storage=tmp_path, own_aet="X"), max_bytes=1 << 20)
    finder = WebFinder(Priors(url=url, **more), None, intake)
    try:
        return str(len(finder._studies("PATIENT-1", "20200101-20260101")))
    except Unreachable as error:
        return str(error)


def everyone(url: str, tmp_path, **more) -> dict[str, str]:
    found = {kind: deliver(kind, url, tmp_path, **more) for kind in ("stow", "fhir")}
    return {**found, "priors": ask(url, tmp_path, **more)}


@pytest.mark.slow
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(tmp_path, status):
    with Peer(says(200, b"[]")) as other, Peer(says(status, Location=other.url + "/x")) as peer:
        outcomes = everyone(peer.url, tmp_path)
        assert all(f"HTTP {status}, a redirect" in text for text in outcomes.values())
        assert len(peer.asked) == 3 and other.asked == []


def test_a_proxy_is_used_where_the_file_names_one_and_never_by_the_environment(tmp_path, monkeypatch):
    with Peer(says(200, b"[]")) as proxy, Peer(says(200, b"[]")) as peer:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert everyone(peer.url, tmp_path) == {"stow": "stored", "fhir": "stored", "priors": "0"}
        assert proxy.asked == [] and len(peer.asked) == 3
        outcomes = everyone("http://nowhere.example", tmp_path, proxy=proxy.url, clear_text=True)
        assert outcomes == {"stow": "stored", "fhir": "stored", "priors": "0"} and len(proxy.asked) == 3
        assert proxy.asked[0][0].startswith("http://nowhere.example/")


@pytest.mark.parametrize(
    "answer, why", [pytest.param(drip, "TimeoutError", marks=pytest.mark.slow), (flood, "is over")]
)
def test_an_answer_without_end_is_given_up(tmp_path, answer, why):
    with Peer(answer) as peer:
        outcomes = everyone(peer.url, tmp_path, timeout_s=0.5 if answer is drip else 60.0)
        assert all(why in text for text in outcomes.values()), outcomes


def test_a_compressed_answer_is_not_unpacked(tmp_path):
    import gzip

    bomb = gzip.compress(bytes(64 << 20))
    with Peer(says(200, bomb, **{"Content-Encoding": "gzip"})) as peer:
        assert "no JSON" in ask(peer.url, tmp_path)
        assert {headers["Accept-Encoding"] for _, headers in peer.asked} == {"identity"}


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_an_answer_of_a_server_chooses_no_address(tmp_path):
    """UIDs of an answer become part of the next request's path."""

    def answer(handler):
        uid = "1.2/../../admin?x=" if "PatientID" in handler.path else "1.3"
        study = {"00100020": {"vr": "LO", "Value": ["P"]}, "0020000D": {"vr": "UI", "Value": [uid]},
                 "00080060": {"vr": "CS", "Value": ["DX"]}, "0020000E": {"vr": "UI", "Value": ["../1"]}}  # fmt: skip
        says(200, json.dumps([study]).encode())(handler)

    with Peer(answer) as peer:
        intake = SimpleNamespace(config=SimpleNamespace(storage=tmp_path, own_aet="X"), max_bytes=1 << 20)
        finder = WebFinder(Priors(url=peer.url), None, intake)
        assert list(finder._series_of("P", "20200101-20260101", "1.9", "20260101")) == []
        assert len(peer.asked) == 1
        study = Dataset()
        study.PatientID, study.StudyInstanceUID = "P", "1.2"
        finder._studies = lambda *args: [study]
        assert list(finder._series_of("P", "", "1.9", "20260101")) == []


@pytest.mark.slow
def test_a_pacs_that_finds_without_end_is_given_up(tmp_path):
    import pynetdicom

    def endless(event):
        answer = Dataset()
        answer.PatientID = "P"
        while not event.is_cancelled:
            yield 0xFF00, answer

    ae = pynetdicom.AE("PACS")
    ae.add_supported_context(STUDY_ROOT_FIND)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(pynetdicom.evt.EVT_C_FIND, endless)])
    try:
        settings = Priors(aet="PACS", host="127.0.0.1", port=server.server_address[1], timeout_s=60.0)
        intake = SimpleNamespace(config=SimpleNamespace(storage=tmp_path, own_aet="X"))
        with pytest.raises(Unreachable, match="no end within 1000 matches"):
            PacsFinder(settings, None, intake)._studies("P", "20200101-20260101")
    finally:
        server.shutdown()


def test_a_token_that_was_taken_away_makes_its_destination_wait(tmp_path):
    to = Destination(name="there", kind="stow", url="https://127.0.0.1:1", token_file=str(tmp_path / "none"))
    sender = WebSender(to, SimpleNamespace(storage=tmp_path, own_aet="X"))
    with pytest.raises(Unreachable, match="token_file"):
        asyncio.run(sender.send([], print))


# ---------------------------------------------------------------------------------------------------------- folder


def test_a_file_that_cannot_be_removed_keeps_no_other_from_being_taken(site, monkeypatch):
    for name, seed in (("a.dcm", 1), ("b.dcm", 2)):
        (site.inbox / name).write_bytes(phantom_dicom(seed))
    unlink = os.unlink

    def refuse(path, **more):
        if path == "a.dcm":
            raise PermissionError(13, "Operation not permitted")
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", refuse)
    site.scan()
    assert [path.name for path in site.inbox.iterdir()] == ["a.dcm"] and site.store.counts()["objects"]["image"] == 2
    received = len(site.events("received"))
    site.scan()
    assert len(site.events("received")) == received, "taken again and again"
    (told,) = site.events("file_stays")
    assert told["error"] == "PermissionError" and "a.dcm" not in site.stream.getvalue()
    monkeypatch.undo()
    os.utime(site.inbox / "a.dcm", ns=(1, 1))
    assert site.scan() == 1


def test_a_rejected_that_is_no_folder_or_a_link_keeps_nothing_back_and_takes_nothing_out(site, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (site.inbox / "rejected").symlink_to(outside)
    (site.inbox / "a.dcm").write_bytes(b"no DICOM")
    (site.inbox / "b.dcm").write_bytes(phantom_dicom())
    assert site.scan() == 1 and list(outside.iterdir()) == [] and site.events("file_stays")


def test_folders_in_the_folder_are_read(site):
    deep = site.inbox / "2026" / "11"
    deep.mkdir(parents=True)
    (deep / "a.dcm").write_bytes(phantom_dicom())
    (deep / "b.dcm").write_bytes(b"no DICOM")
    (site.inbox / ".hidden").mkdir()
    (site.inbox / ".hidden" / "c.dcm").write_bytes(phantom_dicom(2))
    assert site.scan() == 1 and list(deep.iterdir()) == []
    assert [path.name for path in (site.inbox / "rejected").iterdir()] == ["b.dcm"]
    below = site.inbox / "/".join("d" * 20)
    below.mkdir(parents=True)
    assert site.scan() == 0
    site.scan()
    assert len(site.events("folder_too_deep")) == 1


def test_no_link_is_followed_whenever_it_is_put_there(site, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.dcm").write_bytes(phantom_dicom())
    (site.inbox / "folder").symlink_to(outside)
    (site.inbox / "file.dcm").symlink_to(outside / "secret.dcm")
    os.mkfifo(site.inbox / "pipe.dcm")
    assert site.scan() == 0
    # Swapped in between the look and the open.
    (site.inbox / "swap.dcm").write_bytes(phantom_dicom(2))
    site.watcher.scan()
    require_room = site.intake.require_room

    def swap():
        (site.inbox / "swap.dcm").unlink()
        (site.inbox / "swap.dcm").symlink_to(outside / "secret.dcm")
        require_room()

    monkeypatch.setattr(site.intake, "require_room", swap)
    assert site.watcher.scan() == 0 and site.store.counts()["objects"]["image"] == 0
    assert (outside / "secret.dcm").exists()


def test_a_file_that_another_took_the_place_of_is_not_removed_unread(site, monkeypatch):
    (site.inbox / "a.dcm").write_bytes(phantom_dicom())
    take = site.intake.take

    def replaced(*args, **kwargs):
        take(*args, **kwargs)
        (site.inbox / "new").write_bytes(phantom_dicom(2))
        (site.inbox / "new").rename(site.inbox / "a.dcm")

    monkeypatch.setattr(site.intake, "take", replaced)
    site.scan()
    monkeypatch.undo()
    assert site.scan() == 1 and site.store.counts()["objects"]["image"] == 2


def test_a_file_that_grew_after_all_is_left_to_a_later_scan(site, monkeypatch):
    path, whole = site.inbox / "a.dcm", phantom_dicom()
    path.write_bytes(whole[:5000])
    site.watcher.scan()
    require_room = site.intake.require_room
    monkeypatch.setattr(site.intake, "require_room", lambda: path.write_bytes(whole) and require_room())
    assert site.watcher.scan() == 0 and path.exists(), "half of it was taken, or set aside"
    monkeypatch.undo()
    assert site.scan() == 1


def test_a_file_larger_than_an_object_is_not_copied(site, monkeypatch):
    with open(site.inbox / "huge.dcm", "wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(site.intake, "new_file", None)
    site.scan()
    assert [path.name for path in (site.inbox / "rejected").iterdir()] == ["huge.dcm"]


def test_what_was_rejected_is_kept_for_a_time_to_its_owner_alone(site):
    for _ in range(2):
        (site.inbox / "a.dcm").write_bytes(b"no DICOM")
        os.utime(site.inbox / "a.dcm", (1, 1))
        (site.inbox / "a.dcm").chmod(0o666)
        site.scan()
    rejected = site.inbox / "rejected"
    assert len(list(rejected.iterdir())) == 2, "an earlier one of the name stays"
    assert modes(rejected) == {"file": {"0o600"}, "folder": {"0o700"}}
    assert site.watcher.sweep(time.time() - 60) == 0  # by when it came here, not by a time of its own
    assert site.watcher.sweep(time.time() + 60) == 2 and list(rejected.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- names


def test_every_name_of_the_example_is_in_a_shipped_profile():
    profiles = [load_profile(name) for name in profile_names()]
    found, section = {}, ""
    for line in EXAMPLE.read_text().splitlines():
        key, _, value = line.partition(":")
        if re.fullmatch(r"(# )?[a-z]+", key):
            section = key.removeprefix("# ")
        elif (name := key.strip(" #")) in ("task", "mode"):
            found[section, name] = value.split()[0]
    assert set(found) == {("read", "task"), ("read", "mode"), ("priors", "task")}
    assert any(found["read", "task"] in profile.tasks for profile in profiles)
    assert any(found["read", "mode"] in profile.modes for profile in profiles)
    tasks = [profile.tasks[found["priors", "task"]] for profile in profiles if found["priors", "task"] in profile.tasks]
    assert tasks and all(task.max_images > 1 and not task.placeholders for task in tasks)


REFUSAL = "[INVALID_REQUEST] REQUEST.task: unknown key 'comparison' in tasks of chexone; did you mean 'progression'?"
NO_IMAGE = "[INVALID_REQUEST] IMAGES: 0 given, task 'findings' takes 1; send that many"


def worker_of(tmp_path, url: str, **read) -> ReadWorker:
    config = configured(tmp_path, read={"url": url, **read})
    (tmp_path / "s").mkdir(exist_ok=True)
    store = Store(config.queue_url, "one")
    return ReadWorker(config, store, Log(config, io.StringIO()), Metrics(store.counts, lambda: 0), lambda: None)


def run_until(worker: ReadWorker, holds) -> None:
    async def run():
        stopping = asyncio.Event()
        task = asyncio.create_task(worker.run(stopping))
        ends = time.monotonic() + 60
        while not holds() and not task.done():
            assert time.monotonic() < ends, "timed out"
            await asyncio.sleep(0.02)
        stopping.set()
        await task

    asyncio.run(run())


def test_a_task_that_the_server_does_not_know_is_refused_by_name_and_never_ready(tmp_path):
    worker = worker_of(tmp_path, "127.0.0.1:1", task="comparison")
    assert not worker.are_names_known
    with FakeServer(lambda request, context: iter([failure(REFUSAL)])) as server:
        worker = worker_of(tmp_path, server.url, task="comparison")
        with pytest.raises(InvalidConfig, match=r"read: .*'comparison'.*did you mean 'progression'"):
            run_until(worker, lambda: False)
        assert not worker.is_server_ready and not worker.are_names_known
        assert server.asked["task"] == "comparison"


@pytest.mark.parametrize("answer", [failure(NO_IMAGE), response("text")])
def test_a_task_that_the_server_knows_is_ready(tmp_path, answer):
    with FakeServer(lambda request, context: iter([answer])) as server:
        worker = worker_of(tmp_path, server.url, task="findings", mode="reasoning")
        assert not worker.are_names_known
        run_until(worker, lambda: worker.is_server_ready)
        assert worker.are_names_known and server.asked["mode"] == "reasoning"


@pytest.mark.slow
def test_a_server_that_later_knows_the_task_no_more_is_waited_for(tmp_path):
    answers = [failure(NO_IMAGE)]
    with FakeServer(lambda request, context: iter(answers)) as server:
        worker = worker_of(tmp_path, server.url, task="findings")

        def swapped() -> bool:
            if worker.is_server_ready:
                answers[:] = [failure(REFUSAL)]
                worker.is_server_ready = False  # as after a failure
            return len(server.requests) > 2

        run_until(worker, swapped)
        assert not worker.are_names_known and not worker.is_server_ready


def test_an_incoming_file_that_nobody_holds_is_gone(site):
    kept = site.intake.new_file()
    kept.write(b"an object that broke off")
    site.intake.new_file()
    assert list(site.intake.incoming.iterdir()) == [kept.path]
    del kept
    assert not list(site.intake.incoming.iterdir())


def test_an_answer_to_a_peer_that_broke_off_does_not_end_the_thread():
    """As A-ASSOCIATE-AC where an abort of ours is on its way (PS3.8 table 9-10: no such transition)."""
    association = Association(AE(), "acceptor")
    association.dul.state_machine.current_state = "Sta13"
    association.dul.socket = SimpleNamespace(recv=None)
    limit(association, pdu_limit=1 << 20, pdu_s=1, max_message=1 << 20)
    association.dul.state_machine.do_action("Evt7")
    assert association.dul.state_machine.current_state == "Sta13"
    message = association.dimse.message = SimpleNamespace()
    association.dimse.msg_queue.put((1, message))
    forget_messages(association)
    assert association.dimse.message is None and association.dimse.msg_queue.empty()


# --------------------------------------------------------------------------------------------------------- the log


def test_the_log_names_the_failure_of_a_queue(site, monkeypatch):
    """By its class: SQLAlchemy's errors have a `code` too, which says nothing to an operator."""
    monkeypatch.setattr(site.store, "add", broken)
    with site.intake.new_file() as file:
        file.write(phantom_dicom())
        with pytest.raises(sqlalchemy.exc.OperationalError):
            site.intake.take(file, "dicom", "MODALITY")
    assert [line["error"] for line in site.events("not_received")] == ["OperationalError"]


def broken(*args):
    raise sqlalchemy.exc.OperationalError("INSERT", {}, Exception("the server closed the connection"))
