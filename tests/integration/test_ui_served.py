"""The reading room in front of the demonstration model on the real served ensemble: many visitors, and a browser."""

import asyncio
import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import evaluate
import jsonschema
import numpy as np
import pytest
import yaml
from chromium import browser
from directed_decoder import direct
from fake_session import until
from served import Raw

pytest.importorskip("aiohttp")
pytest.importorskip("highdicom")

from browser import Browser
from ui_room import COLUMNS, DRAWN, READ, ROWS, SAVE, STAGE, WIDE, given, sides, texts, until_boxed, wait
from ui_server import UiServer, Visitor, said

from cxr_triton import phantom_file
from cxr_triton.client import Reader
from cxr_triton.profile import load_profile
from cxr_triton.reading import NOT_FOR_DIAGNOSIS, Reading

pytestmark = pytest.mark.triton
ROOT = Path(__file__).resolve().parents[2]
PHANTOM = ROOT / "tests" / "phantom"
VISITORS = 16
TASKS = {
    "localisation": {"prompt": "Locate them.", "answer": "boxes", "description": "Boxes that the test gives."},
    "comparison": {
        "prompt": "Compare them.",
        "answer": "text",
        "description": "Two.",
        "min_images": 2,
        "max_images": 2,
    },
}
"""What the demonstration model has no tasks for."""
BOXES = "<think>It is wide.</think><answer><|ref|>Heart<|/ref|><|box|>(20,30),(60,80)<|/box|></answer>"


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    """A warm server of the demonstration model."""
    pytest.importorskip("pytriton")
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    folder = tmp_path_factory.mktemp("ui")
    described = yaml.safe_load((PHANTOM / "profile.yaml").read_text())
    described["tasks"] |= TASKS
    (folder / "profile.yaml").write_text(yaml.safe_dump(described))
    profile = load_profile(folder / "profile.yaml")
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", profile, precision="int4", progress=False)
    bundle = build_bundle(folder / "export", folder / "bundle")
    write_repository(bundle.path, folder / "repository", Settings(threads=1), unverified=True)
    direct(folder / "repository", folder / "hold", BOXES)
    with Server(folder / "repository", grpc_port=0, metrics_port=0, http_port=0, modified=True) as server:
        server.hold = folder / "hold"
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


@pytest.fixture(scope="module")
def radiograph() -> bytes:
    """A phantom as a DICOM file of 5 megapixels."""
    (drawn,) = evaluate.held_out(1)
    rows, columns = (
        np.arange(wide) * side // wide for wide, side in zip((ROWS, COLUMNS), drawn.stored.shape, strict=True)
    )
    large = dataclasses.replace(drawn, stored=np.ascontiguousarray(drawn.stored[rows][:, columns]), masks={})
    return phantom_file.write_dicom(large, syntax="jpeg_lossless")


@pytest.fixture
def visiting(triton, room, tmp_path):
    """Runs a coroutine with a page of the room and the browser; it may ask nobody else, and make no complaint."""

    async def visit(do):
        async with Browser(tmp_path) as chromium, chromium.tab() as page:
            await page.go(room.origin, "document.querySelector('#question .choices')")
            result = await do(page, chromium)
            assert {urlsplit(url).netloc for url in page.asked if url.startswith("http")} == {
                urlsplit(room.origin).netloc
            }
            assert [said for said in page.complaints if not said.startswith(REFUSED)] == []
            return result

    yield lambda do: asyncio.run(visit(do))
    triton.hold.unlink(missing_ok=True)


REFUSED = "Failed to load resource: the server responded with a status of 4"
TASK = "document.querySelector('#ask0-task-{}').click()"
STATES = texts("article .state")
CHECK = "[...document.querySelectorAll('.check')].find((each) => each.textContent.includes('{}')).click()"
PARTS = "[...document.querySelectorAll('{}')].map((each) => [each.firstChild.textContent, each.lastChild.textContent])"
CHIPS, BARS = PARTS.format(".chips li"), PARTS.format(".bars div")
SHOWN = 0.1
"""Scores are shown to a tenth, and hang in their last digits on what is computed at the same time."""


def log_odds(said: str) -> float:
    """Of a score as it is shown."""
    return float(said.replace("−", "-"))


async def shot(page, folder: Path, name: str) -> None:
    """The page at both widths, as files to be looked at; nothing is wider than it."""
    for width in (375, 1280):
        await page.size(width, 900)
        high = await page.evaluate("document.documentElement.scrollHeight") if width == 375 else 900
        await page.size(width, high)
        await page.pixels(folder / f"{name}-{width}.png")
        assert await page.evaluate(f"{WIDE}.map((each) => each.outerHTML.slice(0, 80))") == [], (name, width)


@browser
def test_a_browser_does_with_five_megapixels_what_the_grpc_client_does(visiting, triton, radiograph, tmp_path):
    """Upload, text before the end, scores, boxes, follow-ups, a stop, files, a refusal."""
    import pydicom

    with Reader(triton.grpc) as reader:
        conversation = reader.open(radiograph)
        found = conversation.ask(scores=True).result()
        ours = conversation.ask(task="differentials").result()
        asked = conversation.ask(prompt="Is the heart large?").result()

    async def do(page, chromium):
        await page.choose("#files", given(tmp_path, b"MZ" + bytes(10_000), "hostile.dcm"))
        await page.until("document.querySelector('.refused .refusal')")
        assert "INVALID_IMAGE" in (await page.evaluate(texts(".refused")))[0]
        await shot(page, tmp_path, "refused")
        await page.evaluate("document.querySelector('.refused button').click()")
        await page.choose("#files", given(tmp_path, radiograph))
        await page.until(f"{DRAWN} && document.querySelector('.pane').innerText.includes('{COLUMNS} × {ROWS} px')")

        await page.evaluate(CHECK.format("How sure"))
        triton.hold.touch()
        await page.evaluate(READ)
        await page.until("document.querySelector('.reasoning .prose')?.textContent.trim()")
        assert await page.evaluate("document.querySelector('article').hasAttribute('aria-busy')"), "while it is written"
        first = (await page.evaluate(texts(".reasoning .prose", "textContent")))[0]
        assert found.reasoning.startswith(first.strip()) and first.strip() != found.reasoning
        await shot(page, tmp_path, "writing")
        triton.hold.unlink()
        await page.until("document.querySelector('.files')")
        await shot(page, tmp_path, "found")
        chips = {label: said.split(" · ") for label, said in await page.evaluate(CHIPS) if said.startswith("present")}
        assert {label: log_odds(said[-1]) for label, said in chips.items()} == pytest.approx(
            {finding.label: finding.score for finding in found.findings}, abs=SHOWN
        )
        bars = {label: log_odds(said) for label, said in await page.evaluate(BARS)}
        assert bars == pytest.approx(found.scores, abs=SHOWN)

        await page.evaluate("document.querySelector('#follow .row button').click()")
        await page.until("document.querySelectorAll('.files').length === 2")
        await page.evaluate("document.querySelector('#follow textarea').focus()")
        await page.call("Input.insertText", text="Is the heart large?")
        await page.press("Enter")
        await page.until("document.querySelectorAll('.files').length === 3")
        for kind in ("JSON", "Page", "DICOM SR"):
            await page.evaluate(SAVE.format(kind))
        await wait(lambda: {file.suffix for file in chromium.saved.glob("*")} == {".json", ".html", ".dcm"})
        await shot(page, tmp_path, "followed")
        told = await page.evaluate(texts("article .reasoning .prose", "textContent"))
        told += await page.evaluate(texts("article .answer"))

        await page.evaluate(TASK.format("localisation"))
        await page.evaluate(READ)
        await page.until("document.querySelector('.boxes')")
        await page.evaluate("scrollTo(0, 0)")
        await until_boxed(page, sides(await page.evaluate(STAGE)))
        await shot(page, tmp_path, "boxed")

        await page.evaluate(TASK.format("findings"))
        triton.hold.touch()
        await page.evaluate(READ)
        await page.until("document.querySelector('.reasoning .prose')?.textContent.trim()")
        await page.evaluate("document.querySelector('.stop').click()")
        await page.until(f"{STATES}.join() === 'Stopped'")
        triton.hold.unlink()
        assert (await page.evaluate(texts(".reasoning .prose", "textContent")))[0].strip(), "what was written stays"
        await shot(page, tmp_path, "stopped")
        return told, {file.suffix: file.read_bytes() for file in chromium.saved.iterdir()}

    told, files = visiting(do)
    until(lambda: Raw(triton).metric("cxr_decoder_streams") == 0)
    for written, wanted in zip(
        told, [found.reasoning, ours.reasoning, asked.reasoning, None, ours.answer, asked.answer], strict=True
    ):
        assert wanted is None or " ".join(written.split()) == " ".join(wanted.replace("**", "").split())
    saved = Reading.from_json(files[".json"].decode())
    assert saved.text == found.text and saved.scores == pytest.approx(found.scores, abs=SHOWN)
    assert NOT_FOR_DIAGNOSIS in files[".html"].decode()
    (report, source) = (pydicom.dcmread(io.BytesIO(data)) for data in (files[".dcm"], radiograph))
    assert (report.Modality, report.StudyInstanceUID) == ("SR", source.StudyInstanceUID)


@browser
def test_a_prior_is_compared_in_its_order(visiting, triton, files, tmp_path):
    """The server gets the prior first, whichever came first."""
    with Reader(triton.grpc) as reader:
        wanted = reader.read([files[1], files[0]], task="comparison").result()

    async def do(page, chromium):
        for name, data in (("now.dcm", files[0]), ("before.dcm", files[1])):
            await page.choose("#files", given(tmp_path, data, name))
            await page.until(f"{texts('#strip strong')}.includes('{name}')")
        assert await page.evaluate(texts(".pane figcaption > :first-child")) == ["Prior before.dcm", "Current now.dcm"]
        await page.evaluate(TASK.format("comparison"))
        await page.evaluate(READ)
        await page.until("document.querySelector('.files')")
        await page.evaluate(SAVE.format("JSON"))
        await wait(lambda: list(chromium.saved.glob("*.json")))
        await shot(page, tmp_path, "compared")
        assert await page.evaluate(texts("#follow .row button")) == [], "those of the profile are of one picture"
        return Reading.from_json(next(chromium.saved.glob("*.json")).read_text())

    told = visiting(do)
    assert (told.task, told.text) == ("comparison", wanted.text)
    assert [image["identity"] for image in told.images] == [image["identity"] for image in wanted.images]
