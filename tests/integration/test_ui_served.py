"""The reading room in front of the demonstration model on the real served ensemble: many visitors, stops, exports."""

import asyncio
import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import jsonschema
import numpy as np
import pytest
from chromium import browser
from fake_session import until
from served import Raw

pytest.importorskip("aiohttp")
pytest.importorskip("highdicom")

from browser import Browser
from ui_server import UiServer, Visitor, said

from cxr_triton import phantom_file
from cxr_triton.client import Reader
from cxr_triton.profile import load_profile
from cxr_triton.reading import NOT_FOR_DIAGNOSIS, Reading

pytestmark = pytest.mark.triton
ROOT = Path(__file__).resolve().parents[2]
PHANTOM = ROOT / "tests" / "phantom"
VISITORS = 16


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    """A warm server of the demonstration model."""
    pytest.importorskip("pytriton")
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    folder = tmp_path_factory.mktemp("ui")
    profile = load_profile(PHANTOM / "profile.yaml")
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", profile, precision="int4", progress=False)
    bundle = build_bundle(folder / "export", folder / "bundle")
    write_repository(bundle.path, folder / "repository", Settings(threads=1), unverified=True)
    with Server(folder / "repository", grpc_port=0, metrics_port=0, http_port=0) as server:
        yield server


@pytest.fixture(scope="module")
def room(triton):
    with UiServer(triton.grpc) as server:
        yield server


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [
        phantom_file.write_dicom(each, photometric="MONOCHROME2", syntax="jpeg_lossless")
        for each in evaluate.held_out(VISITORS)
    ]


@pytest.fixture(scope="module")
def wanted(triton, files) -> list[Reading]:
    """What the gRPC client gets."""
    with Reader(triton.grpc) as reader, ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda data: reader.read(data).result(), files))


def test_sixteen_visitors_at_once_get_what_the_grpc_client_gets(room, files, wanted):
    def visit(data: bytes) -> list[dict]:
        visitor = Visitor(room)
        lines = visitor.read(pictures=[visitor.picture(data)], scores=None)
        visitor.ask("DELETE", visitor.path)
        return lines

    with ThreadPoolExecutor(VISITORS) as visitors:
        told = list(visitors.map(visit, files))
    assert len({reading.text for reading in wanted}) > VISITORS // 2
    for lines, reading in zip(told, wanted, strict=True):
        done = Reading.from_json(json.dumps(lines[-1]["reading"]))
        assert (done.text, done.images, done.findings) == (reading.text, reading.images, reading.findings)
        assert said(lines, "reasoning") == reading.reasoning and said(lines, "answer") == reading.answer
        assert [line["type"] for line in lines].count("text") > 3, "as it is written, not at the end"


def test_a_conversation_is_that_of_the_grpc_client_and_is_saved(room, triton, files, wanted):
    import pydicom

    with Reader(triton.grpc) as reader:
        ours = reader.open(files[0], follow=wanted[:1]).ask(task="differentials").result()
    visitor = Visitor(room)
    visitor.picture(files[0])
    visitor.read(pictures=visitor.pictures[:1])
    done = visitor.read(pictures=visitor.pictures[:1], task="differentials", follow=visitor.readings[0])[-1]
    assert (done["reading"]["text"], done["reading"]["prompt"]) == (ours.text, ours.prompt)
    schema = json.loads((ROOT / "docs" / "reading.schema.json").read_text())
    jsonschema.validate(visitor.export(visitor.readings[1], "json")[2], schema)
    page = visitor.export(visitor.readings[1], "page")[2]
    assert NOT_FOR_DIAGNOSIS in page and "data:image/png;base64," in page
    report = pydicom.dcmread(io.BytesIO(visitor.export(visitor.readings[0], "sr")[2]))
    assert report.StudyInstanceUID == pydicom.dcmread(io.BytesIO(files[0])).StudyInstanceUID


def test_visitors_who_stop_and_leave_free_the_server(room, triton, files):
    def visit(number: int) -> str:
        visitor = Visitor(room)
        visitor.picture(files[number])
        with visitor.asking(pictures=visitor.pictures[:1]) as lines:
            next(line for line in lines if line["type"] == "text")
            if number % 2:
                return ""  # leaves
            visitor.ask("POST", f"{visitor.path}/readings/{visitor.readings[0]}/stop")
            return list(lines)[-1]["type"]

    with ThreadPoolExecutor(8) as visitors:
        ends = list(visitors.map(visit, range(8)))
    assert set(ends[::2]) <= {"stopped", "done"}  # the answers are short, and may be faster
    until(lambda: Raw(triton).metric("cxr_decoder_streams") == 0)
    until(lambda: room.service.sessions.under_way == 0)
    assert Visitor(room).read(pictures=[], question="Hello?")[-1]["type"] == "done"


def test_what_the_server_refuses_is_said(room):
    """Text that leaves no room for an answer is only found by who counts its tokens."""
    visitor = Visitor(room)
    error = visitor.read(pictures=[], question="heart " * 5000)[-1]
    assert (error["type"], error["code"]) == ("error", "PROMPT_TOO_LONG") and error["hint"]


@browser
def test_a_browser_shows_what_the_grpc_client_gets_of_five_megapixels(room, triton, tmp_path):
    (drawn,) = evaluate.held_out(1)
    rows, columns = (
        np.arange(wide) * side // wide for wide, side in zip((2500, 2048), drawn.stored.shape, strict=True)
    )
    large = dataclasses.replace(drawn, stored=np.ascontiguousarray(drawn.stored[rows][:, columns]), masks={})
    (tmp_path / "large.dcm").write_bytes(phantom_file.write_dicom(large, syntax="jpeg_lossless"))
    with Reader(triton.grpc) as reader:
        conversation = reader.open(tmp_path / "large.dcm")
        ours = [conversation.ask(task=task).result() for task in ("findings", "differentials")]

    async def visit():
        async with Browser(tmp_path) as chromium, chromium.tab() as page:
            await page.go(room.origin, "document.querySelector('#question button')")
            await page.choose("#files", tmp_path / "large.dcm")
            await page.until("document.querySelector('.pane figcaption')?.textContent.includes('2048 × 2500 px')")
            await page.evaluate("document.querySelector('#question .primary').click()")
            await page.until("document.querySelector('.files')")
            await page.evaluate("document.querySelector('#follow .row button').click()")
            await page.until("document.querySelectorAll('.files').length === 2")
            each = "[...document.querySelectorAll('{}')].map((each) => each.{})".format
            told = [await page.evaluate(each("article .reasoning .prose", "textContent"))]
            told += [await page.evaluate(each(".chips .present", "firstChild.textContent"))]
            return *told, await page.evaluate(each("article .answer", "innerText")), page.complaints

    reasoning, findings, answers, complaints = asyncio.run(visit())
    assert findings == [finding.label for finding in ours[0].findings] and findings
    assert " ".join(reasoning[0].split()) == " ".join(ours[0].reasoning.replace("**", "").split())
    assert " ".join(answers[1].split()) == " ".join(ours[1].answer.replace("**", "").split())
    assert complaints == []
