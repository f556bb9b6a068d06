"""The reading room in front of an endpoint that answers as the test says."""

import asyncio
import contextlib
import dataclasses
import functools
import gc
import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import dataset_of, file_bytes, pattern
from fake_server import FakeServer, failure, pause, response
from fake_session import until
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels import apply_voi, apply_windowing

pytest.importorskip("aiohttp")
pytest.importorskip("highdicom")

from ui_server import UiServer, Visitor, said

from cxr_triton.client import base, conversation, login, wire
from cxr_triton.client.ui import readings, service
from cxr_triton.client.ui.decoders import Decoders
from cxr_triton.client.ui.pictures import file_name
from cxr_triton.client.ui.refusal import HINTS, Refusal
from cxr_triton.client.ui.settings import Settings
from cxr_triton.client.wire import unpack
from cxr_triton.errors import CODES, InvalidConfig, InvalidRequest
from cxr_triton.identity import identity_of, sha256
from cxr_triton.pixels.dicom import read_image
from cxr_triton.pixels.display import render
from cxr_triton.pixels.image import resize
from cxr_triton.profile import load_profile
from cxr_triton.reading import NOT_FOR_DIAGNOSIS, Reading, parse

ROOT = Path(__file__).resolve().parents[2]
NV, CHEXONE = load_profile("nv-reason-cxr-3b"), load_profile("chexone")
TEXT = "<think> The heart is large. </think>\n<answer> Cardiomegaly </answer>"
PASSWORD = "correct horse battery"
PATIENT, NAME = "ID-4711", "DOE^JANE chest.dcm"


UIDS = {"StudyInstanceUID": "1.2.3.1", "SeriesInstanceUID": "1.2.3.2"}


def dicom(rows=48, columns=40, **elements) -> bytes:
    given = {"BodyPartExamined": "CHEST", **UIDS, **elements}
    return file_bytes(dataset_of(pattern(12, rows=rows, columns=columns), 12, **given))


def picture(kind="PNG", size=(40, 48), color=False) -> bytes:
    values = pattern(8, rows=size[1], columns=size[0])
    file = io.BytesIO()
    Image.fromarray(np.dstack([values, values, values ^ 1]) if color else values).save(file, kind)
    return file.getvalue()


CHEST, PNG = dicom(), picture()


def reading_of(request, text=TEXT, grammar="think_answer", answer="labels") -> str:
    """A reading of the images that a request brings."""
    names = [tensor.name for tensor in request.inputs]
    images = []
    for data in unpack(request.raw_input_contents[names.index("IMAGES")]):
        radiograph = read_image(data)
        rows, columns = radiograph.stored.shape[:2]
        images.append({"identity": identity_of(data, radiograph), "rows": rows, "columns": columns, "flags": ["lossy"]})
    parsed = parse(
        text, grammar=grammar, answer=answer, labels=("Cardiomegaly",),
        image_sizes=[(facts["rows"], facts["columns"]) for facts in images],
    )  # fmt: skip
    model = {"profile": "x", "labels": ["Cardiomegaly", "Edema"]}
    facts = {"task": "findings", "prompt": "Asked.", "model": model, "notice": "A double."}
    return Reading.of(parsed, images=tuple(images), **facts).to_json()


def answering(text=TEXT, size=7, **facts):
    """An answer in pieces."""

    def answer(request, context):
        yield response()
        for at in range(0, len(text), size):
            yield response(text[at : at + size])
        yield response("", reading_of(request, text, **facts), final=True)

    return answer


def forever(delta="word "):
    """An answer without an end; without words where `delta` is empty."""

    def answer(request, context):
        while context.is_active():
            yield response(delta)
            pause(context, 0.005)

    return answer


@contextlib.contextmanager
def served(answer=None, **settings):
    with FakeServer(answer or answering()) as triton:
        triton.profile = NV.to_json()
        with UiServer(triton.url, **settings) as server:
            yield triton, server


@pytest.fixture(scope="module")
def site():
    """A room whose answers are whole."""
    with served(max_sessions=100) as (triton, server):
        yield triton, server


@pytest.fixture
def pairs():
    """A visitor of a room whose model takes several pictures."""
    with FakeServer(answering()) as triton, UiServer(triton.url) as server:
        triton.profile = CHEXONE.to_json()
        yield triton, Visitor(server)


@pytest.fixture
def triton(site):
    until(lambda: not site[0].active)  # what the test before left has ended
    site[0].answer = answering()
    site[0].cancelled.clear()
    return site[0]


@pytest.fixture
def visitor(site, triton):
    return Visitor(site[1])


# ------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_told_what_can_be_asked(site):
    status, _, about = site[1].ask("GET", "/api/about")
    (server,) = about["servers"]
    assert status == 200 and about["notice"] == NOT_FOR_DIAGNOSIS and about["exports"] == ["json", "page", "sr"]
    assert (server["name"], server["up"], server["model"]) == (site[0].url, True, NV.title)
    assert [task["name"] for task in server["tasks"]] == list(NV.tasks)
    assert [mode["name"] for mode in server["modes"]] == list(NV.modes)
    assert server["terms"] == NV.notice and about["login"] is False
    assert about["limits"] == {"file_bytes": 64 << 20, "pictures": 16, "question_chars": 32_768}


def test_a_server_that_is_down_is_said_to_be(triton):
    gone = FakeServer(answering())
    with UiServer(gone.url, triton.url, away=gone.url) as server:
        about = server.ask("GET", "/api/about")[2]
        assert [each["up"] for each in about["servers"]] == [False, True]
        assert about["servers"][0]["error"]["code"] == "UNAVAILABLE" and "error" not in about["servers"][1]
        visitor = Visitor(server)
        status, error = visitor.refused(pictures=[visitor.picture(CHEST)])
        assert (status, error["code"]) == (503, "UNAVAILABLE") and error["hint"]
        assert visitor.read(pictures=visitor.pictures[:1], server=triton.url)[-1]["type"] == "done"


def test_a_server_that_never_answers_does_not_keep_the_page_waiting(triton):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        with UiServer(url, known_s=0.2) as server:
            (told,) = server.ask("GET", "/api/about")[2]["servers"]
    assert not told["up"] and "within 0.2 s" in told["error"]["message"]


def test_files_of_the_page_and_nothing_else(tmp_path, triton):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<!doctype html>")
    (tmp_path / "page" / "main.js").write_text("export {}")
    (tmp_path / "page" / "notes.txt").write_text("x")
    (tmp_path / "secret.js").write_text("x")
    with UiServer(triton.url, page=tmp_path / "page") as server:
        assert server.ask("GET", "/")[::2] == (200, "<!doctype html>")
        status, headers, _ = server.ask("GET", "/page/main.js")
        assert (status, headers["content-type"]) == (200, "text/javascript; charset=utf-8")
        for path in ("notes.txt", "..%2fsecret.js", "%2e%2e/secret.js", "../secret.js", "main.js/"):
            assert server.ask("GET", f"/page/{path}")[0] == 404


@pytest.mark.parametrize("path", ["/", "/api/about", "/api/sessions/none/pictures/p1.png", "/nothing", "/page/x.js"])
def test_every_answer_is_held_to_the_policy(site, path):
    headers = site[1].ask("GET", path)[1]
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in headers["content-security-policy"]
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert headers["server"] == "cxr-triton"


# ------------------------------------------------------------------------------------------------------- pictures


def shown(visitor, name, preset=None) -> np.ndarray:
    query = f"?preset={preset}" if preset else ""
    status, headers, png = visitor.ask("GET", f"{visitor.path}/pictures/{name}.png{query}")
    assert (status, headers["content-type"]) == (200, "image/png")
    return np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]))


def test_a_dicom_file_is_shown_as_it_is_drawn_for_the_model_and_as_it_asks_for(visitor):
    data = dicom(ViewPosition="PA", WindowCenter=1500, WindowWidth=800)
    status, told = visitor.give(data, "a b.dcm")
    assert status == 201 and (told["name"], told["kind"]) == ("a b.dcm", "dicom")
    assert (told["width"], told["height"], told["view"]) == (40, 48, "PA")
    assert [preset["name"] for preset in told["presets"]] == ["model", "voi_display"]
    flags = {flag["code"]: flag for flag in told["flags"]}
    assert flags["burned_in_unknown"]["text"] and not flags["burned_in_unknown"]["doubtful"]
    assert flags["picture_unlike_chest"]["doubtful"]
    radiograph = read_image(data)
    for preset, drawn in ((None, NV.pixel_preset), ("model", NV.pixel_preset), ("voi_display", "voi_display")):
        for _ in range(2):  # drawn, then remembered
            assert np.array_equal(shown(visitor, visitor.pictures[0], preset), render(radiograph, drawn).pixels)
    assert visitor.ask("GET", f"{visitor.path}/pictures/{visitor.pictures[0]}.png?preset=bone")[0] == 400


def lut(explanation: str, *entries: int) -> Dataset:
    """An item of a VOI LUT Sequence: entries for the stored values from 0 on, 12 bits each."""
    item = Dataset()
    item.LUTDescriptor, item.LUTExplanation, item.LUTData = [len(entries), 0, 12], explanation, list(entries)
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    return item


def test_a_dicom_file_is_shown_by_each_of_its_windows_under_the_name_that_it_gives_them(visitor):
    """pydicom applies them too."""
    names = ["NORMAL", "HARDER", "NO WIDTH", ""]
    windows = {"WindowCenter": [1500, 800, 900, 2000], "WindowWidth": [3000, 300, 0, 900]}
    data = dicom(**windows, WindowCenterWidthExplanation=names)
    told = visitor.give(data)[1]["presets"]
    titles = [preset["title"] for preset in told[1:]]
    assert titles == ["As the file asks for", "Window 2: “HARDER”", "Window 4"], "one has no width"
    dataset = pydicom.dcmread(io.BytesIO(data))
    for index, preset in zip((0, 1, 3), told[1:], strict=True):
        theirs = apply_windowing(dataset.pixel_array, dataset, index)  # of a range of 12 bits
        ours = shown(visitor, visitor.pictures[0], preset["name"])
        assert np.abs(ours - theirs / 4095 * 255).max() <= 0.5 + 1e-6, preset

    tables = [lut("FIRST", *range(4096)), lut("STEEP", *(min(3 * value, 4095) for value in range(4096)))]
    data = dicom(**windows, VOILUTSequence=tables)
    told = visitor.give(data)[1]["presets"]
    titles = ["As the file asks for", "LUT 2: “STEEP”", "Window 1", "Window 2", "Window 4"]
    assert [each["title"] for each in told[1:]] == titles
    dataset = pydicom.dcmread(io.BytesIO(data))
    theirs = [apply_voi(dataset.pixel_array, dataset, index) for index in range(2)]
    theirs += [apply_windowing(dataset.pixel_array, dataset, index) for index in (0, 1, 3)]
    for preset, expected in zip(told[1:], theirs, strict=True):
        ours = shown(visitor, visitor.pictures[1], preset["name"])
        assert np.abs(ours - expected / 4095 * 255).max() <= 0.5 + 1e-6, preset


def test_what_a_file_calls_its_windows_steers_nothing_and_is_bounded(visitor):
    count = 40
    words = ["x", "[31m" + 50 * "b", *["c"] * (count - 2)]
    data = dicom(WindowCenter=[*range(count)], WindowWidth=[500] * count, WindowCenterWidthExplanation=words)
    titles = [preset["title"] for preset in visitor.give(data)[1]["presets"]]
    assert len(titles) == 10 and titles[2] == f"Window 2: “[31m{25 * 'b'}...”"
    done = visitor.read(pictures=visitor.pictures[:1])[-1]
    assert "[31m" not in json.dumps(done), "no reading repeats them"


@pytest.mark.parametrize("name", ["As the model sees it", "As the file asks for", "Equalized greys", "Window 3"])
def test_no_window_is_called_as_the_page_calls_one_of_its_own_or_as_another_one(visitor, name):
    windows = {"WindowCenter": [1, 2, 3], "WindowWidth": [9, 8, 7], "WindowCenterWidthExplanation": [name] * 3}
    titles = [preset["title"] for preset in visitor.give(dicom(**windows))[1]["presets"]]
    assert titles[-2:] == [f"Window 2: “{name}”", f"Window 3: “{name}”"]
    assert len(set(titles)) == len(titles) == 4


@pytest.mark.parametrize(
    ("names", "charset"),
    [
        (["weich", "hart", "härter"], "ISO_IR 192"),
        (["weich", "hart", "härter"], "ISO_IR 100"),
        (["мягко", "hard", "x"], "ISO_IR 144"),
        (["x", "y\u001b[31m", "z"], "ISO_IR 100"),
        (["one", "two"], "ISO_IR 100"),
        (["one", "two", "three", "four"], "ISO_IR 100"),
    ],
)
def test_what_is_not_plain_ascii_or_not_one_name_a_window_is_no_name(visitor, names, charset):
    windows = {"WindowCenter": [1, 2, 3], "WindowWidth": [9, 8, 7], "WindowCenterWidthExplanation": names}
    data = dicom(**windows, SpecificCharacterSet=charset)
    titles = [preset["title"] for preset in visitor.give(data)[1]["presets"]]
    assert titles[-2:] == ["Window 2", "Window 3"]


@pytest.mark.parametrize(("kind", "color"), [("PNG", False), ("PNG", True), ("JPEG", False)])
def test_a_picture_file_is_shown_as_it_is(visitor, kind, color):
    data = picture(kind, color=color)
    status, told = visitor.give(data, "x")
    assert status == 201 and told["kind"] == kind.lower() and told["view"] is None
    assert [preset["name"] for preset in told["presets"]] == ["model"]
    assert np.array_equal(shown(visitor, told["picture"]), read_image(data).stored)


def test_a_picture_of_oblong_pixels_is_shown_with_square_ones_and_its_boxes_fit(visitor, triton):
    text = "<think>x</think>\n<answer><|ref|>Heart<|/ref|><|box|>(75,25),(50,110)<|/box|></answer>"
    triton.answer = answering(text, answer="boxes")
    data = dicom(PixelAspectRatio=[2, 1])
    told = visitor.give(data)[1]
    assert (told["width"], told["height"]) == (40, 96)
    expected = resize(render(read_image(data), NV.pixel_preset).pixels, (96, 40))
    assert np.array_equal(shown(visitor, visitor.pictures[0]), expected)
    done = visitor.read(pictures=visitor.pictures[:1], question="Where?")[-1]
    assert done["reading"]["boxes"][0]["pixels"] == [20, 12, 30, 48], "those of the file"
    assert done["boxes"] == [{"label": "Heart", "picture": visitor.pictures[0], "x0": 20, "y0": 24, "x1": 30, "y1": 96}]


def test_a_box_is_on_the_picture_that_it_was_found_on(pairs):
    triton, visitor = pairs
    triton.answer = answering("<answer><|box|>(0,0),(50,50)<|/box|></answer>", answer="boxes", grammar="answer_only")
    prior, current = visitor.picture(CHEST), visitor.picture(dicom(rows=96, columns=80))
    done = visitor.read(pictures=[prior, current], question="Where?")[-1]
    assert done["boxes"] == [{"label": "unnamed", "picture": current, "x0": 0, "y0": 0, "x1": 40, "y1": 48}]


def bomb() -> bytes:
    """A PNG that says that it has ten billion pixels."""
    return PNG[:16] + struct.pack(">II", 100_000, 100_000) + PNG[24:]


HOSTILE = {
    "nothing": (b"", "INVALID_IMAGE"),
    "text": (b"hello", "INVALID_IMAGE"),
    "a page": (b"<!doctype html><script>alert(1)</script>", "INVALID_IMAGE"),
    "an archive": (b"PK\x03\x04" + bytes(64), "INVALID_IMAGE"),
    "half a DICOM file": (CHEST[: len(CHEST) // 2], "INVALID_IMAGE"),
    "half a PNG": (PNG[:-20], "INVALID_IMAGE"),
    "a bomb": (bomb(), "LIMIT_EXCEEDED"),
    "a program with a prefix": (b"\x7fELF" + CHEST[4:], "INVALID_IMAGE"),
    "a knee": (file_bytes(dataset_of(pattern(12), 12, BodyPartExamined="KNEE")), "NOT_A_CHEST"),
    "a CT": (file_bytes(dataset_of(pattern(12), 12, Modality="CT")), "NOT_A_RADIOGRAPH"),
    "no pixels": (file_bytes(dataset_of(pattern(12), 12, BodyPartExamined="CHEST", PixelData=None)), "NO_PIXELS"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_radiograph_of_a_chest_is_refused_with_what_to_do(visitor, name):
    data, code = HOSTILE[name]
    status, told = visitor.give(data)
    error = told["error"]
    assert status == (413 if code == "LIMIT_EXCEEDED" else 400)
    assert error["code"] == code and error["message"] and error["hint"] and "Traceback" not in error["message"]
    visitor.picture(PNG)  # the next one is taken


def test_a_profile_that_flags_what_is_no_chest_lets_it_in():
    with FakeServer(answering()) as triton, UiServer(triton.url) as server:
        triton.profile = dataclasses.replace(NV, not_a_chest="flag").to_json()
        told = Visitor(server).give(HOSTILE["a knee"][0])[1]
    assert {"code": "not_a_chest", "doubtful": True}.items() <= next(
        flag for flag in told["flags"] if flag["code"] == "not_a_chest"
    ).items()


def test_a_picture_that_is_removed_is_gone(visitor):
    name = visitor.picture(CHEST)
    assert visitor.ask("DELETE", f"{visitor.path}/pictures/{name}")[0] == 204
    assert visitor.ask("GET", f"{visitor.path}/pictures/{name}.png")[0] == 404
    assert visitor.ask("DELETE", f"{visitor.path}/pictures/{name}")[0] == 404
    assert visitor.refused(pictures=[name])[0] == 404


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("a%20b.dcm", "a b.dcm"),
        ("C%3A%5Cpacs%5Cx.dcm", "x.dcm"),
        ("..%2F..%2Fetc%2Fpasswd", "passwd"),
        ("%1b%5B2J%E2%80%AEx%00.png", "[2Jx.png"),
        ("%ff.png", "\ufffd.png"),
        ("x" * 5000, "x" * 120),
        ("", ""),
    ],
)
def test_a_file_name_steers_nothing(given, name):
    assert file_name(given) == name


# ------------------------------------------------------------------------------------------------------- readings


def test_no_picture_is_packed_or_hashed_in_the_loop_that_serves_all(visitor, monkeypatch):
    """It would keep every session waiting."""
    where = {}

    def beside(function):
        @functools.wraps(function)
        def called(*args):
            where.setdefault(function.__name__, set()).add(asyncio._get_running_loop() is None)
            return function(*args)

        return called

    for module, name in ((base, "sha256"), (conversation, "sha256"), (wire, "pack")):
        monkeypatch.setattr(module, name, beside(getattr(module, name)))
    name = visitor.picture(CHEST)
    first = visitor.read(pictures=[name])[0]["reading"]
    assert visitor.read(pictures=[name], question="And the lungs?", follow=first)[-1]["type"] == "done"
    assert where == {"sha256": {True}, "pack": {True}}


def test_a_reading_is_told_line_by_line(visitor, triton):
    lines = visitor.read(pictures=[visitor.picture(CHEST)], task="findings", mode=NV.default_mode, seed=3, max_tokens=9)
    assert lines[0] == {"type": "started", "reading": visitor.readings[0]}
    assert {line["type"] for line in lines[1:-1]} == {"text"} and len(lines) > 6
    assert (said(lines, "reasoning"), said(lines, "answer")) == ("The heart is large.", "Cardiomegaly")
    done = lines[-1]
    assert done["type"] == "done" and done["boxes"] == []
    assert done["presence"] == {"Cardiomegaly": "present", "Edema": "absent"}
    assert Reading.from_json(json.dumps(done["reading"])).findings[0].label == "Cardiomegaly"
    assert [(flag["code"], flag["doubtful"]) for flag in done["flags"]] == [("lossy", False)]
    assert triton.asked == {"task": "findings", "mode": NV.default_mode, "seed": 3, "max_new_tokens": 9}


def test_free_questions_and_variables_become_the_request(visitor, triton):
    visitor.picture(CHEST)
    visitor.read(pictures=visitor.pictures[:1], question="Is the heart large?", scores=None, task=None, logprobs=True)
    assert triton.asked == {"prompt": "Is the heart large?", "logprobs": True}
    assert visitor.read(pictures=[], question="What is a lung?")[-1]["type"] == "done"


def test_words_are_passed_on_at_once(visitor, triton):
    """The rest is only written once the first words have arrived."""
    heard = threading.Event()

    def answer(request, context):
        yield response("<think> The heart")
        assert heard.wait(60)
        yield response(TEXT.removeprefix("<think> The heart"))
        yield response("", reading_of(request), final=True)

    triton.answer = answer
    with visitor.asking(pictures=[visitor.picture(CHEST)]) as lines:
        assert next(lines)["type"] == "started"
        assert next(lines) == {"type": "text", "part": "reasoning", "text": "The heart"}
        heard.set()
        assert list(lines)[-1]["type"] == "done"


def test_a_silent_server_is_waited_for_aloud(visitor, triton, monkeypatch):
    monkeypatch.setattr(readings, "BEAT_S", 0.05)
    heard = threading.Event()

    def answer(request, context):
        yield response()
        assert heard.wait(60)
        yield from answering()(request, context)

    triton.answer = answer
    with visitor.asking(pictures=[visitor.picture(CHEST)]) as lines:
        assert [next(lines)["type"] for _ in range(3)] == ["started", "waiting", "waiting"]
        heard.set()
        assert list(lines)[-1]["type"] == "done"


def test_prose_of_a_model_that_boxes_its_answers_becomes_the_answer(pairs):
    triton, visitor = pairs
    mode = next(name for name, mode in CHEXONE.modes.items() if mode.grammar == "boxed")
    triton.answer = answering("The lungs are clear.", grammar="boxed", answer="text")
    lines = visitor.read(pictures=[visitor.picture(CHEST)], question="And the lungs?", mode=mode)
    assert said(lines, "answer") == "The lungs are clear." == lines[-1]["reading"]["answer"]


def test_a_reading_that_is_stopped_keeps_what_was_written(visitor, triton):
    triton.answer = forever("<think> word ")
    visitor.picture(CHEST)
    with visitor.asking(pictures=visitor.pictures[:1]) as lines:
        next(line for line in lines if line["type"] == "text")
        assert visitor.ask("POST", f"{visitor.path}/readings/{visitor.readings[0]}/stop")[0] == 202
        last = list(lines)[-1]
    until(triton.cancelled.is_set)
    assert last["type"] == "stopped" and last["reading"]["finish_reason"] == "cancelled"
    assert last["reading"]["text"].startswith("<think> word ") and last["reading"]["status"] == "truncated"
    assert last["reading"]["images"][0]["identity"]["file_sha256"] == sha256(CHEST)
    assert [visitor.export(visitor.readings[0], kind)[0] for kind in ("json", "page", "sr")] == [200, 200, 400]
    triton.answer = answering()
    assert visitor.refused(pictures=visitor.pictures[:1], question="And?", follow=visitor.readings[0])[0] == 400
    assert visitor.read(pictures=visitor.pictures[:1])[-1]["type"] == "done"


def test_a_reading_that_is_stopped_before_its_first_word(visitor, triton):
    triton.answer = forever("")
    with visitor.asking(pictures=[visitor.picture(CHEST)]) as lines:
        assert next(lines)["type"] == "started"
        until(lambda: triton.active)
        assert visitor.ask("POST", f"{visitor.path}/readings/{visitor.readings[0]}/stop")[0] == 202
        told = [line for line in lines if line["type"] != "waiting"]
        assert told == [{"type": "stopped", "reading": None, "flags": [], "boxes": [], "presence": {}}]
    until(triton.cancelled.is_set)
    until(lambda: visitor.export(visitor.readings[0], "json")[0] == 404)


@pytest.mark.parametrize("delta", ["word ", ""], ids=["after a word", "before one"])
def test_a_browser_that_leaves_ends_its_reading_on_the_server(visitor, triton, delta, monkeypatch):
    monkeypatch.setattr(readings, "BEAT_S", 1000.0)  # that nobody takes what is said is not needed
    triton.answer = forever(delta)
    with visitor.asking(pictures=[visitor.picture(CHEST)]) as lines:
        assert next(lines)["type"] == "started"
        until(lambda: triton.active)
    until(triton.cancelled.is_set)
    until(lambda: not triton.active)
    until(lambda: visitor.server.service.sessions.under_way == 0)


def test_a_browser_that_takes_nothing_is_left(triton):
    triton.answer = forever("word " * 20_000)
    with UiServer(triton.url, write_s=0.2) as server:
        visitor = Visitor(server)
        visitor.picture(CHEST)
        with visitor.asking(pictures=visitor.pictures[:1]) as lines:
            next(lines)
            until(triton.cancelled.is_set)
        until(lambda: server.service.sessions.under_way == 0)
        assert [e["outcome"] for e in server.events if e["event"] == "reading"] == ["CANCELLED"]


@pytest.mark.parametrize("way", [("DELETE", ""), ("POST", "/end")])
def test_a_session_that_is_ended_stops_its_readings_and_is_gone(visitor, triton, way):
    triton.answer = forever()
    visitor.picture(CHEST)
    with visitor.asking(pictures=visitor.pictures[:1]) as lines:
        next(line for line in lines if line["type"] == "text")
        assert visitor.ask(way[0], f"{visitor.path}{way[1]}")[0] == 204
        assert list(lines)[-1]["type"] == "stopped"
    until(triton.cancelled.is_set)
    assert visitor.ask("GET", f"{visitor.path}/pictures/{visitor.pictures[0]}.png")[0] == 404
    assert visitor.ask("DELETE", visitor.path)[0] == 404


def test_a_follow_up_takes_along_what_was_said(visitor, triton):
    visitor.picture(CHEST)
    visitor.read(pictures=visitor.pictures[:1])
    assert (
        visitor.read(pictures=visitor.pictures[:1], question="And the lungs?", follow=visitor.readings[0])[-1]["type"]
        == "done"
    )
    turns = [{"role": "user", "content": "Asked."}, {"role": "assistant", "content": TEXT}]
    assert triton.asked == {"prompt": "And the lungs?", "history": turns}
    visitor.read(pictures=visitor.pictures[:1], task="differentials", follow=visitor.readings[1])
    assert triton.asked["history"] == 2 * turns
    other = visitor.picture(dicom(SOPInstanceUID="1.2.5"))
    status, error = visitor.refused(pictures=[other], question="And?", follow=visitor.readings[0])
    assert (status, error["code"]) == (409, "READING_MISMATCH") and error["hint"]
    status, error = visitor.refused(pictures=visitor.pictures[:1], task="differentials")
    assert (status, error["code"]) == (400, "INVALID_REQUEST") and error["message"].startswith("question: is empty")
    assert visitor.refused(pictures=visitor.pictures[:1], follow="r9")[0] == 404


def test_two_servers_side_by_side(triton):
    with FakeServer(answering("<think> No. </think>\n<answer> Cardiomegaly </answer>")) as second:
        second.profile = NV.to_json()
        with UiServer(triton.url, second.url) as server:
            visitor = Visitor(server)
            visitor.picture(CHEST)
            with (
                visitor.asking(pictures=visitor.pictures[:1], server=second.url) as theirs,
                visitor.asking(pictures=visitor.pictures[:1]) as ours,
            ):
                told = [list(lines) for lines in (ours, theirs)]
            assert [said(lines, "reasoning") for lines in told] == ["The heart is large.", "No."]
            assert len({lines[0]["reading"] for lines in told}) == 2
            status, error = visitor.refused(pictures=visitor.pictures[:1], server="nobody:1")
            assert status == 400 and second.url in error["message"]


def test_a_prior_of_another_patient_is_refused(pairs):
    _, visitor = pairs
    first, same, other, unknown = (
        visitor.picture(data)
        for data in (CHEST, dicom(SOPInstanceUID="1.2.5"), dicom(PatientID="ID-4712"), dicom(PatientID=""))
    )
    status, error = visitor.refused(pictures=[other, first], question="What has changed?")
    assert (status, error["code"]) == (400, "INVALID_REQUEST") and "2 different patients" in error["message"]
    assert "one patient" in error["hint"] and PATIENT not in json.dumps(error)
    for prior in (same, unknown, visitor.picture(PNG, "prior.png")):
        assert visitor.read(pictures=[prior, first], question="What has changed?")[-1]["type"] == "done"


@pytest.mark.parametrize(
    ("said_there", "code"),
    [
        ("[NOT_A_CHEST] IMAGES[0]: image is no chest radiograph: a knee; send a chest", "NOT_A_CHEST"),
        ("[QUEUE_FULL] 64 requests wait; send it later", "QUEUE_FULL"),
        ("[PROMPT_TOO_LONG] REQUEST.prompt: too long; shorten it", "PROMPT_TOO_LONG"),
        ("inference failed", "INTERNAL"),
        ("in ensemble 'cxr_reader', /home/secret/model.py exploded", "INTERNAL"),
    ],
)
def test_what_the_server_refuses_is_the_last_line(visitor, triton, said_there, code):
    def answer(request, context):
        yield failure(said_there)

    triton.answer = answer
    started, error = visitor.read(pictures=[visitor.picture(CHEST)])
    assert started["type"] == "started"
    assert error["type"] == "error" and error["code"] == code and error["message"] and error["hint"]
    assert "REQUEST" not in error["message"] and "IMAGES" not in error["message"]
    assert "secret" not in json.dumps(error)


def test_what_nobody_foresaw_is_the_last_line(visitor, triton, monkeypatch):
    def fail(reading, pictures):
        raise RuntimeError("/home/secret")

    monkeypatch.setattr(readings, "_boxes", fail)
    error = visitor.read(pictures=[visitor.picture(CHEST)])[-1]
    assert (error["type"], error["code"]) == ("error", "INTERNAL") and "secret" not in json.dumps(error)
    assert "secret" not in visitor.server.log.getvalue() and "RuntimeError" in visitor.server.log.getvalue()


def test_a_picture_is_said_to_be_as_the_model_sees_it_only_where_that_is_known(triton):
    def title(*urls: str, away: str = "") -> str:
        with UiServer(*urls, away=away) as server:
            return Visitor(server).give(CHEST)[1]["presets"][0]["title"]

    gone = FakeServer(answering()).url
    with FakeServer(answering()) as other:
        other.profile = dataclasses.replace(NV, pixel_preset="voi_display").to_json()
        assert title(triton.url) == title(other.url) == "As the model sees it"
        assert title(triton.url, other.url) == title(gone, away=gone) == "Equalized greys"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"tusk": "findings"}, "task"),
        ({"task": "findigs"}, "findings"),
        ({"task": 5}, "task"),
        ({"mode": "quick"}, "mode"),
        ({"pictures": "p1"}, "pictures"),
        ({"pictures": [5]}, "pictures"),
        ({"pictures": ["p1", "p1"]}, "twice"),
        ({"pictures": [], "task": "findings"}, "pictures: 0 given"),
        ({"question": "x" * 32_769}, "question"),
        ({"question": "\ud800"}, "question"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": "x"}, "seed"),
        ({"scores": 1}, "scores"),
        ({"follow": 5}, "there is no reading"),
        ({"server": ["x"]}, "server"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused_before_anything_is_sent(visitor, triton, body, named):
    visitor.picture(CHEST)
    before = len(triton.requests)
    status, error = visitor.refused(**{"pictures": visitor.pictures, **body})
    assert status in (400, 404) and named in f"{error['message']} {error['hint']}" and len(triton.requests) == before


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_object_is_refused(visitor, body):
    assert visitor.ask("POST", f"{visitor.path}/readings", body)[0] == 400


# -------------------------------------------------------------------------------------------------------- exports


def test_a_reading_is_saved_as_json_page_and_report(visitor):
    import pydicom
    from chromium import Page

    visitor.picture(CHEST, NAME)
    done = visitor.read(pictures=visitor.pictures[:1])[-1]
    assert (
        visitor.read(pictures=visitor.pictures[:1], question="And the lungs?", follow=visitor.readings[0])[-1]["type"]
        == "done"
    )
    status, headers, told = visitor.export(visitor.readings[0], "json")
    assert (status, told) == (200, done["reading"])
    assert headers["content-disposition"] == f'attachment; filename="reading-{visitor.readings[0]}.json"'
    page = Page(visitor.export(visitor.readings[1], "page")[2])
    assert NOT_FOR_DIAGNOSIS in page.text and "Cardiomegaly" in page.text and NAME in page.text
    assert "img" in page.tags and page.text.count("The heart is large.") == 3, "that of the turn before too"
    status, headers, report = visitor.export(visitor.readings[0], "sr")
    assert (status, headers["content-type"]) == (200, "application/dicom")
    report = pydicom.dcmread(io.BytesIO(report))
    assert (report.Modality, report.PatientID, report.VerificationFlag) == ("SR", PATIENT, "UNVERIFIED")
    assert visitor.export(visitor.readings[0], "pdf")[0] == 400 and visitor.export(f"r{0:016x}", "json")[0] == 404


def test_a_report_is_of_dicom_images_only(visitor):
    visitor.read(pictures=[visitor.picture(PNG, "x.png")])
    status, _, told = visitor.export(visitor.readings[0], "sr")
    assert status == 400 and "DICOM" in told["error"]["message"]


def test_a_reading_that_does_not_say_of_which_images_it_is_becomes_no_page_and_no_report(visitor, triton):
    other = dicom(SOPInstanceUID="1.2.5")

    def answer(request, context):
        text = json.loads(reading_of(request))
        del text["images"][0]["identity"]
        yield response(TEXT, json.dumps(text), final=True)

    triton.answer = answer
    visitor.read(pictures=[visitor.picture(other)])
    for kind in ("page", "sr"):
        status, _, told = visitor.export(visitor.readings[0], kind)
        assert (status, told["error"]["code"]) == (409, "READING_MISMATCH")


# --------------------------------------------------------------------------------------------------------- limits


def test_a_file_that_is_too_large_is_not_read(visitor):
    connection = http.client.HTTPConnection(*visitor.server.address, timeout=60)
    connection.putrequest("POST", f"{visitor.path}/pictures")
    connection.putheader("Content-Type", "application/octet-stream")
    connection.putheader("Content-Length", str((64 << 20) + 1))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "LIMIT_EXCEEDED"
    connection.close()


def test_a_file_that_grows_too_large_on_its_way_is_cut_off(visitor, monkeypatch):
    from cxr_triton.client.ui.decoders import Decoders

    monkeypatch.setattr(Decoders, "most_bytes", 100_000)
    status, _, told = visitor.ask("POST", f"{visitor.path}/readings", b"x" * 300_000, Content_Type="application/json")
    assert status == 413 and told["error"]["code"] == "LIMIT_EXCEEDED"
    connection = http.client.HTTPConnection(*visitor.server.address, timeout=60)
    pieces = iter([bytes(60_000), bytes(60_000), bytes(60_000)])
    connection.request(
        "POST", f"{visitor.path}/pictures", pieces, {"Content-Type": "application/octet-stream"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()
    visitor.picture(CHEST)


def test_a_session_and_all_together_hold_so_much(triton):
    large = dicom(rows=600, columns=500)  # 0.8 MiB with its picture
    with UiServer(triton.url, session_mib=1, sessions_mib=2) as server:
        visitors = [Visitor(server) for _ in range(4)]
        assert visitors[0].give(large)[0] == 201
        status, told = visitors[0].give(large)
        assert (status, told["error"]["code"]) == (413, "LIMIT_EXCEEDED")
        assert visitors[1].give(large)[0] == 201
        status, told = visitors[2].give(large)
        assert (status, told["error"]["code"]) == (429, "QUEUE_FULL")
        assert visitors[0].ask("DELETE", f"{visitors[0].path}/pictures/{visitors[0].pictures[0]}")[0] == 204
        assert visitors[2].give(large)[0] == 201
        visitors[1].ask("DELETE", visitors[1].path)
        assert visitors[3].give(large)[0] == 201


def test_what_a_reading_is_of_is_held_though_it_was_removed(triton):
    with UiServer(triton.url, session_mib=1) as server:
        visitor, statuses = Visitor(server), []
        for _ in range(5):
            status, told = visitor.give(dicom(rows=400, columns=400))  # 0.4 MiB with its picture
            statuses.append(status)
            if status == 201:
                visitor.read(pictures=[told["picture"]])
                assert visitor.ask("DELETE", f"{visitor.path}/pictures/{told['picture']}")[0] == 204
        (session,) = server.service.sessions
        assert 413 in statuses and 0 < session.held <= 1 << 20


def test_what_is_given_up_before_its_turn_is_not_kept():
    class Held:
        pass

    async def tried() -> None:
        decoders, going, held = Decoders(1), threading.Event(), Held()
        gone = weakref.ref(held)
        first = asyncio.create_task(decoders.beside(going.wait))
        waiting = asyncio.create_task(decoders.beside(functools.partial(id, held)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait({waiting})
        del held, waiting
        gc.collect()
        assert gone() is None
        first.cancel()  # whoever waited for it left; it holds its thread until it ends
        await asyncio.wait({first})
        last = asyncio.create_task(decoders.beside(lambda: 7))
        await asyncio.sleep(0.01)
        assert not last.done()
        going.set()
        assert await last == 7
        await asyncio.to_thread(decoders.close)

    asyncio.run(tried())


def test_a_reading_that_was_refused_does_not_count(triton):
    with UiServer(triton.url, max_readings=1) as server:
        visitor = Visitor(server)

        def full(request, context):
            yield failure("[QUEUE_FULL] 64 requests wait; send it later")

        triton.answer = full
        assert [visitor.read(pictures=[], question="?")[-1]["code"] for _ in range(2)] == ["QUEUE_FULL"] * 2
        triton.answer = answering()
        assert visitor.read(pictures=[visitor.picture(CHEST)])[-1]["type"] == "done"
        assert visitor.refused(pictures=visitor.pictures[:1])[0] == 413


def test_so_many_sessions_pictures_and_readings(triton):
    with UiServer(triton.url, max_sessions=2, max_pictures=2, max_readings=2) as server:
        one, two = Visitor(server), Visitor(server)
        status, headers, told = one.ask("POST", "/api/sessions")
        assert (status, told["error"]["code"], headers["retry-after"]) == (429, "QUEUE_FULL", "1")
        two.ask("POST", f"{two.path}/end")
        Visitor(server)
        assert [one.give(PNG)[0] for _ in range(3)] == [201, 201, 413]
        for _ in range(2):
            assert one.read(pictures=one.pictures[:1])[-1]["type"] == "done"
        assert one.refused(pictures=one.pictures[:1])[0] == 413


def test_so_many_readings_at_once(triton):
    triton.answer = forever()
    with UiServer(triton.url, max_under_way=1) as server:
        visitor = Visitor(server)
        visitor.picture(CHEST)
        with visitor.asking(pictures=visitor.pictures[:1]) as lines:
            next(lines)
            status, error = visitor.refused(pictures=visitor.pictures[:1])
            assert (status, error["code"]) == (429, "QUEUE_FULL")
        triton.answer = answering()
        until(lambda: server.service.sessions.under_way == 0)
        assert visitor.read(pictures=visitor.pictures[:1])[-1]["type"] == "done"


def test_a_file_that_does_not_come_is_not_waited_for(triton):
    with UiServer(triton.url, body_s=0.2) as server:
        visitor = Visitor(server)
        connection = http.client.HTTPConnection(*server.address, timeout=60)
        connection.putrequest("POST", f"{visitor.path}/pictures")
        connection.putheader("Content-Type", "application/octet-stream")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"begin")
        assert connection.getresponse().status == 408
        connection.close()


def test_a_browser_that_leaves_its_upload_is_said_to_have_left(triton):
    with UiServer(triton.url) as server:
        connection = http.client.HTTPConnection(*server.address, timeout=60)
        connection.putrequest("POST", f"{Visitor(server).path}/pictures")
        connection.putheader("Content-Type", "application/octet-stream")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"begin")
        (session,) = server.service.sessions
        until(lambda: session.coming)
        connection.close()
        until(lambda: "picture" in server.log.getvalue())
        assert [event["outcome"] for event in server.events if event["event"] == "picture"] == ["CANCELLED"]


def test_a_session_that_nobody_uses_ends_but_not_one_that_is_read_in(triton, monkeypatch):
    monkeypatch.setattr(service, "SWEEP_S", 0.01)
    triton.answer = forever()
    with UiServer(triton.url) as server:
        reading, idle = Visitor(server), Visitor(server)
        reading.picture(CHEST)
        with reading.asking(pictures=reading.pictures[:1]) as lines:
            next(lines)
            for session in list(server.service.sessions):
                session.seen_s -= 2 * server.settings.idle_s
            until(lambda: len(server.service.sessions) == 1)
            status, _, told = idle.ask("DELETE", idle.path)
            assert status == 404 and "over" in told["error"]["message"]
            assert reading.ask("POST", f"{reading.path}/readings/{reading.readings[0]}/stop")[0] == 202
            assert list(lines)[-1]["type"] == "stopped"
        assert {"sessions_expired"} <= {event["event"] for event in server.events}


def test_sixteen_visitors_at_once_get_each_their_own(site, triton):
    def visit(number: int) -> bool:
        visitor, data = Visitor(site[1]), dicom(rows=32 + number, SOPInstanceUID=f"1.2.{number + 1}")
        done = visitor.read(pictures=[visitor.picture(data)])[-1]
        is_own = done["reading"]["images"][0]["identity"]["file_sha256"] == sha256(data)
        height = shown(visitor, visitor.pictures[0]).shape[0]
        visitor.ask("DELETE", visitor.path)
        return is_own and height == 32 + number

    with ThreadPoolExecutor(16) as visitors:
        assert all(visitors.map(visit, range(16)))


def test_what_one_session_holds_no_other_gets_by_any_name(site):
    """A page whose session ended may ask late, in its next session, by the names of the old one."""
    one, two = Visitor(site[1]), Visitor(site[1])
    for visitor in (one, two):
        visitor.read(pictures=[visitor.picture(CHEST)])
    (picture,), (reading,) = one.pictures, one.readings
    for method, path in (
        ("GET", f"pictures/{picture}.png"), ("DELETE", f"pictures/{picture}"), ("POST", f"readings/{reading}/stop"),
        ("GET", f"readings/{reading}/export?as=json"),
    ):  # fmt: skip
        assert two.ask(method, f"{two.path}/{path}")[0] == 404
    assert two.refused(pictures=[picture])[0] == two.refused(pictures=[], follow=reading)[0] == 404
    assert len(one.session) > 20 and one.session != two.session


# ----------------------------------------------------------------------------------------------------- who may come


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:80"}, 421),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
    ],
    ids=str,
)
def test_other_sites_ask_for_nothing(visitor, headers, status):
    before = len(visitor.server.service.sessions)
    body = b"{}" if {"Content-Type", "Content-Encoding"} & set(headers) else None
    assert visitor.ask("POST", "/api/sessions", body, **headers)[0] == status
    assert len(visitor.server.service.sessions) == before
    if status == 403:
        assert visitor.ask("DELETE", visitor.path, **headers)[0] == 403
        assert visitor.ask("POST", f"{visitor.path}/end", **headers)[0] == 403
        assert visitor.ask("GET", f"{visitor.path}/pictures/p1.png", **headers)[0] in (403, 404)
    visitor.picture(PNG)


def test_the_page_itself_may_ask(site):
    host = f"{site[1].address[0]}:{site[1].address[1]}"
    same = Visitor(site[1], **{"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"})
    assert same.read(pictures=[same.picture(CHEST)])[-1]["type"] == "done"


@pytest.fixture
def locked(tmp_path, triton):
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    with UiServer(triton.url, password_file=tmp_path / "password") as server:
        yield server


def enter(server, password, **headers):
    body = f"password={password.replace(' ', '+')}".encode()
    return server.ask("POST", "/login", body, {"Content-Type": "application/x-www-form-urlencoded", **headers})


def test_the_login_guards_everything(locked):
    status, headers, _ = locked.ask("GET", "/")
    assert (status, headers["location"]) == (303, "/login")
    for method, path in (
        ("GET", "/api/about"), ("POST", "/api/sessions"), ("GET", "/page/index.html"), ("DELETE", "/api/sessions/x"),
        ("GET", "/api/sessions/x/pictures/p1.png"), ("POST", "/logout"),
    ):  # fmt: skip
        status, _, told = locked.ask(method, path, headers={"Cookie": "cxr_ui=made-up"})
        assert (status, told["error"]["code"]) == (401, "ACCESS_DENIED")
    status, _, form = locked.ask("GET", "/login")
    assert status == 200 and NOT_FOR_DIAGNOSIS in form and "hidden" in form
    assert locked.ask("GET", "/login.css")[1]["content-type"].startswith("text/css")
    status, headers, form = enter(locked, "not the password")
    assert status == 403 and "hidden" not in form and "set-cookie" not in headers
    assert enter(locked, PASSWORD, Origin="http://evil.example")[0] == 403
    status, headers, _ = enter(locked, PASSWORD)
    assert (status, headers["location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=Strict"} <= set(headers["set-cookie"].split("; "))
    cookie = headers["set-cookie"].partition(";")[0]
    visitor = Visitor(locked, Cookie=cookie)
    assert visitor.read(pictures=[visitor.picture(CHEST)])[-1]["type"] == "done"
    assert locked.ask("POST", "/logout", headers={"Cookie": cookie})[0] == 303
    assert visitor.ask("GET", "/api/about")[0] == 401
    assert locked.ask("POST", f"{visitor.path}/end", headers={"Origin": "http://evil.example"})[0] == 403
    assert locked.ask("POST", f"{visitor.path}/end")[0] == 204  # as a tab does that closes after its login ended
    assert not len(locked.service.sessions)
    assert PASSWORD not in locked.log.getvalue() and "login_refused" in locked.log.getvalue()


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded; charset=nope", "multipart/form-data; boundary=x"])
def test_a_form_that_is_none_is_a_wrong_password(locked, kind):
    assert enter(locked, PASSWORD, **{"Content-Type": kind})[0] == 403


def test_guessing_is_slow(locked):
    assert [enter(locked, f"guess {i} of many")[0] for i in range(login.TRIES + 1)] == [403] * login.TRIES + [429]
    assert enter(locked, PASSWORD)[0] == 429


@pytest.mark.parametrize(
    ("settings", "said_so"),
    [
        ({"host": "0.0.0.0"}, "--password-file"),
        ({"host": "192.0.2.1", "clear_text": True}, "--password-file"),
        ({"host": "0.0.0.0", "password_file": Path("x")}, "--cert"),
        ({"key": Path("x")}, "--cert"),
    ],
)
def test_nobody_off_this_machine_looks_without_a_password_or_reads_along(settings, said_so):
    with pytest.raises(InvalidConfig, match=said_so):
        Settings(**settings)
    Settings(host="0.0.0.0", password_file=Path("x"), clear_text=True)


@pytest.mark.parametrize("password", ["short", None])
def test_a_password_that_is_none_is_refused(tmp_path, password):
    if password:
        (tmp_path / "password").write_text(password)
    with pytest.raises(InvalidConfig, match="--password-file"), UiServer("a:1", password_file=tmp_path / "password"):
        pass


# ------------------------------------------------------------------------------------------------------ what stays


def test_no_log_tells_of_a_patient_and_no_file_is_written(tmp_path, triton):
    written = []
    watching = True

    def watch(event, arguments):
        if watching and event == "open" and not isinstance(arguments[0], int) and arguments[0] != os.devnull:
            is_written = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            written.extend([arguments[0]] if is_written else [])

    sys.addaudithook(watch)  # for good, so that it looks at `watching`
    try:
        with UiServer(triton.url) as server:
            visitor = Visitor(server)
            visitor.picture(CHEST, NAME)
            visitor.give(HOSTILE["half a DICOM file"][0], NAME)
            done = visitor.read(pictures=visitor.pictures[:1], question="Is JANE well?")
            visitor.refused(pictures=visitor.pictures[:1], task="Is JANE well?")
            assert [visitor.export(visitor.readings[0], kind)[0] for kind in ("json", "page", "sr")] == [200, 200, 200]
            visitor.ask("GET", f"{visitor.path}/DOE")
    finally:
        watching = False
    assert written == []
    log = server.log.getvalue()
    assert [event["outcome"] for event in server.events if event["event"] == "picture"] == ["ok", "INVALID_IMAGE"]
    readings = [(e["outcome"], e.get("trace")) for e in server.events if e["event"] == "reading"]
    assert readings == [("ok", done[-1]["reading"]["trace_id"]), ("INVALID_REQUEST", None)]
    for secret in (
        "JANE",
        "DOE",
        PATIENT,
        "Secret",
        "1.2.3.4",
        "heart",
        "Cardiomegaly",
        visitor.session,
        sha256(CHEST),
    ):
        assert secret not in log


def test_every_code_that_a_visitor_meets_has_a_hint():
    assert set(HINTS) <= set(CODES)
    error = Refusal(InvalidRequest("REQUEST.seed: 1 is odd; take another; or none"))
    assert (error.message, error.hint) == ("seed: 1 is odd; take another", "Or none.")
    assert Refusal(InvalidRequest("seed is odd")).told == {
        "code": "INVALID_REQUEST", "message": "seed is odd", "hint": "",
    }  # fmt: skip


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(tmp_path, triton):
    command = [sys.executable, "-m", "cxr_triton.cli", "ui", "--url", triton.url, "--port", "0", "--json", "-"]
    run = [sys.executable, "-c", "from cxr_triton.cli import main; main()", *command[3:]]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    told = ""
    while not told.endswith("}\n"):
        told += process.stdout.readline()
    ready = json.loads(told)
    assert ready["status"] == "ready" and ready["readers"] == [triton.url]
    port = int(ready["address"].rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def is_up() -> bool:  # it may not answer within the second that it is given
        connection.request("GET", "/api/about")
        return json.loads(connection.getresponse().read())["servers"][0]["up"]

    until(is_up)
    connection.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "status", "said_so"),
    [
        (["--host", "0.0.0.0"], 1, "give --password-file"),
        (["--url", "http://host:8000"], 1, "readings travel by gRPC"),
        (["--url", "host:1", "--url", "host:1"], 2, "twice"),
    ],
)
def test_the_command_says_what_is_wrong(options, status, said_so):
    from click.testing import CliRunner

    from cxr_triton.cli import main

    done = CliRunner().invoke(main, ["ui", "--port", "0", *options])
    assert done.exit_code == status and said_so in done.output


def test_a_port_that_is_taken_is_said(triton):
    from cxr_triton.errors import Unavailable

    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(Unavailable, match="stop what listens there"):
            server = UiServer(triton.url)
            server.settings = Settings(port=taken.getsockname()[1], decoders=1)
            with server:
                pass
