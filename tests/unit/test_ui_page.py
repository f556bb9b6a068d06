"""The reading room's page in a browser, in front of an endpoint that answers as the test says."""

import asyncio
import contextlib
import dataclasses
import io
import json
import re
import threading
from urllib.parse import urlsplit

import numpy as np
import pytest
from chromium import Page
from chromium import browser as needs_chromium
from dicom_files import dataset_of, file_bytes, pattern
from fake_server import FakeServer, pause, response
from fake_session import until

pytest.importorskip("aiohttp")
pytest.importorskip("highdicom")

from browser import Browser
from test_ui import CHEXONE, NV, PASSWORD, answering, dicom, forever, reading_of
from ui_room import (
    COLUMNS,
    DRAWN,
    READ,
    ROWS,
    SAVE,
    STAGE,
    WIDE,
    drag,
    fit,
    given,
    sides,
    texts,
    until_boxed,
    wait,
)
from ui_server import UiServer

from cxr_triton.client.page import reading_page
from cxr_triton.phantom_file import store
from cxr_triton.pixels.dicom import read_image
from cxr_triton.pixels.display import render
from cxr_triton.reading import NOT_FOR_DIAGNOSIS, Reading

pytestmark = [needs_chromium, pytest.mark.slow]
TEXT = (
    "<think>The heart is large. The lungs are clear.</think>"
    "<answer><|ref|>Heart<|/ref|><|box|>(20,30),(60,80)<|/box|></answer>"
)
FAILED_LOADS = "Failed to load resource: the server responded with a status of 4"


def radiograph() -> bytes:
    """5 megapixels in 12 bits, with a dark border and a bright middle."""
    y, x = np.mgrid[0:ROWS, 0:COLUMNS]
    stored = (3500 * np.exp(-(((x / COLUMNS - 0.5) / 0.3) ** 2 + ((y / ROWS - 0.5) / 0.4) ** 2))).astype(np.uint16)
    dataset = dataset_of(pattern(12), 12, BodyPartExamined="CHEST", StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.4")
    dataset.Rows, dataset.Columns = stored.shape
    store(dataset, stored, "jpeg_lossless")
    return file_bytes(dataset)


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def chromium(runner, tmp_path_factory):
    stack = contextlib.AsyncExitStack()
    yield runner.run(stack.enter_async_context(Browser(tmp_path_factory.mktemp("browser"))))
    runner.run(stack.aclose())


@pytest.fixture(scope="module")
def servers():
    """Two endpoints, and the room in front of them; the second one is only up where a test asks for it."""
    with FakeServer(answering()) as first, FakeServer(answering()) as second, UiServer(first.url, second.url) as room:
        yield first, second, room


@pytest.fixture
def triton(servers):
    first, second, _ = servers
    until(lambda: not first.active)  # what the test before left has ended
    first.profile, second.profile, first.answer = NV.to_json(), "", answering()
    first.cancelled.clear()
    return first


@pytest.fixture
def seen(runner, chromium, servers):
    """Runs a coroutine with a page of the room; nothing but this room may have been asked, and no complaint made."""
    *_, room = servers

    async def visit(do, limit_s):
        for server in room.service._servers.values():
            server.profile._known = None
        async with chromium.tab(limit_s) as page:
            await page.go(room.origin, "document.querySelector('#question .choices')")
            result = await do(page)
            assert {urlsplit(url).netloc for url in page.asked if url.startswith("http")} == {
                urlsplit(room.origin).netloc
            }
            assert [said for said in page.complaints if not said.startswith(FAILED_LOADS)] == []
            return result

    return lambda do, limit_s=300: runner.run(visit(do, limit_s))


def held(text, gate, after=2 / 3, **facts):
    """An answer whose rest, after so much of it, comes once `gate` is set."""

    def answer(request, context):
        at = round(after * len(text))
        yield response(text[:at])
        while context.is_active() and not gate.is_set():
            pause(context, 0.01)
        yield response(text[at:])
        yield response("", reading_of(request, text, **facts), final=True)

    return answer


def test_a_radiograph_is_shown_read_and_asked_about(tmp_path, triton, seen, chromium):
    gate, data = threading.Event(), radiograph()
    triton.profile, triton.answer = CHEXONE.to_json(), held(TEXT, gate, answer="boxes")
    expected = render(read_image(data), CHEXONE.pixel_preset).pixels

    async def do(page):
        await page.choose("#files", given(tmp_path, data))
        await page.until(DRAWN)
        shown, stage = await page.pixels(), await page.evaluate(STAGE)
        scale, x, y = fit(stage)
        for row in range(100, ROWS, 300):
            for column in range(100, COLUMNS, 300):
                at = shown[round(y + row * scale), round(x + column * scale)]
                assert abs(at[0] - int(expected[row, column])) < 12, (row, column)

        await page.evaluate(READ)
        await page.until("document.querySelector('.reasoning')?.innerText.includes('The heart is large.')")
        assert await page.evaluate("document.querySelector('article').hasAttribute('aria-busy')"), "while it is written"
        gate.set()
        await page.until("document.querySelector('.files')")
        stage = await page.evaluate(STAGE)
        await until_boxed(page, sides(stage))
        assert await page.evaluate(texts(".boxes li")) == ["Heart 400, 750, 1200, 2000 px"]
        press = "[...document.querySelectorAll('.tools button')].find((each) => each.innerText === {!r}).click()"
        await page.evaluate(press.format("+"))
        await until_boxed(page, sides(stage, 1.25), but_not=sides(stage))
        await page.evaluate(press.format("Boxes"))
        await until_boxed(page, [], but_not=sides(stage, 1.25))

        triton.answer = answering("<think>It is wide.</think><answer>Yes, it is large.</answer>", answer="text")
        await page.evaluate("document.querySelector('#follow textarea').focus()")
        await page.call("Input.insertText", text="Is the heart large?")
        await page.press("Enter")
        await page.until("document.querySelectorAll('.files').length === 2")
        assert (await page.evaluate(texts("article .answer")))[1] == "Yes, it is large."
        assert await page.evaluate(texts(".turn")) == ["Is the heart large?"]
        assert triton.asked["prompt"] == "Is the heart large?" and len(triton.asked["history"]) == 2

        for kind in ("JSON", "Page", "DICOM SR"):
            await page.evaluate(SAVE.format(kind))
        await wait(lambda: {file.suffix for file in chromium.saved.glob("*")} == {".json", ".html", ".dcm"})
        return {file.suffix: file.read_bytes() for file in chromium.saved.iterdir()}

    import pydicom

    files = seen(do)
    assert Reading.from_json(files[".json"].decode()).text == TEXT
    assert NOT_FOR_DIAGNOSIS in files[".html"].decode()
    assert pydicom.dcmread(io.BytesIO(files[".dcm"])).Modality == "SR"


def test_it_fits_a_phone_and_a_desk_with_the_notice_always_in_sight(tmp_path, triton, seen):
    gate = threading.Event()
    gate.set()
    triton.profile, triton.answer = CHEXONE.to_json(), held(TEXT, gate, answer="boxes")
    shot = "document.elementFromPoint(innerWidth / 2, 12).closest('.notice')?.innerText"

    async def do(page):
        for name in ("now.dcm", "before.dcm"):
            await page.choose("#files", given(tmp_path, dicom(PatientID="1"), name))
            await page.until(f"{texts('#strip strong')}.includes('{name}')")
        await page.evaluate(
            "[...document.querySelectorAll('.check')].find((each) => /Compare/.test(each.innerText)).click()"
        )
        await page.evaluate(READ)
        await page.until("document.querySelectorAll('.files').length === 2")
        for width in (1280, 375):
            await page.size(width, 800)
            for where in (0, "document.documentElement.scrollHeight"):
                await page.evaluate(f"scrollTo(0, {where})")
                assert await page.evaluate(shot) == NOT_FOR_DIAGNOSIS
            assert await page.evaluate(f"{WIDE}.map((each) => each.outerHTML.slice(0, 80))") == []
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
        assert triton.asked["task"] == "findings"

    seen(do)


def test_a_reading_is_stopped(tmp_path, triton, seen):
    triton.answer = forever("<think> word ")

    async def do(page):
        await page.choose("#files", given(tmp_path, dicom()))
        await page.until("document.querySelector('.pane')")
        await page.evaluate(READ)
        await page.until("document.querySelector('.reasoning')?.innerText.includes('word')")
        await page.evaluate("document.querySelector('.stop').click()")
        await page.until("document.querySelector('.state')?.innerText === 'Stopped'")
        assert "word" in (await page.evaluate(texts(".reasoning")))[0], "what was written stays"
        assert await page.evaluate(texts(".answer")) == ["Stopped before its answer."]
        kinds = await page.evaluate(texts(".files button"))
        assert "JSON" in kinds and "DICOM SR" not in kinds, "what is not whole becomes no report"
        assert await page.evaluate("document.querySelector('#follow').hidden"), "nor is it gone on from"
        await wait(lambda: triton.cancelled.is_set())

    seen(do)


MARKUP = '<img src=x onerror="window.taken=1"><script>window.taken=1</script>'


def test_texts_from_elsewhere_are_texts(tmp_path, triton, seen):
    """Of a file, its name, a model's answer and a profile."""
    text = f"<think>{MARKUP} \u202e</think>\n<answer>{MARKUP}</answer>"
    triton.answer = answering(text, answer="text")
    triton.profile = dataclasses.replace(NV, title=MARKUP, notice=MARKUP).to_json()
    name = "<img src=x onerror=window.taken=1>.png"

    async def do(page):
        await page.choose("#files", given(tmp_path, MARKUP.encode(), name))
        await page.until("document.querySelector('.refused .refusal')")
        refused = await page.evaluate("document.querySelector('.refused').innerText")
        assert name in refused and "INVALID_IMAGE" in refused
        assert "DICOM, PNG or JPEG" in refused and "Export the file again" in refused, "in words, with what to do"
        await page.choose("#files", given(tmp_path, dicom(), name))
        await page.until("document.querySelector('.pane')")
        await page.evaluate(READ)
        await page.until("document.querySelector('.files')")
        assert MARKUP in (await page.evaluate(texts(".answer")))[0]
        assert "\u202e" not in await page.evaluate("document.body.innerText")
        assert await page.evaluate("[document.querySelectorAll('img, main script').length, typeof taken]") == [
            0,
            "undefined",
        ]

    seen(do)


def sure(reading: str, **asked) -> str:
    return json.dumps(json.loads(reading) | asked)


def test_uncertain_words_are_shaded_as_on_the_page_that_is_saved_and_findings_say_how_sure(tmp_path, triton, seen):
    lungs = 4 * "\U0001fac1"  # two code units each
    text = f"<think> Größe {lungs} **very large** heart. </think>\n<answer> Cardiomegaly, Edema </answer>"
    words = text.split(" ")
    ends = list(np.cumsum([len(word) + 1 for word in words]))
    ends[-1] -= 1
    chances = [0.99, 0.1, 0.4, 0.8, 0.95, 0.15, *[0.99] * (len(words) - 6)]
    facts = {
        "token_logprobs": list(np.log(chances)),
        "token_ends": [int(end) for end in ends],
        "scores": {"Cardiomegaly": 6.5, "Edema": 0.5, "Pneumonia": -0.4, "Fracture": -9.0},
    }

    def answer(request, context):
        yield response(text)
        whole = json.loads(reading_of(request, text))
        whole["findings"] = [
            {"label": label, "written": label, "score": facts["scores"][label]} for label in ("Cardiomegaly", "Edema")
        ]
        whole["unknown_labels"], whole["status"] = [], "ok"
        whole["model"] = {"profile": "x", "labels": list(facts["scores"])}
        answer.reading = json.dumps(whole | facts)
        yield response("", answer.reading, final=True)

    triton.answer = answer

    async def do(page):
        await page.choose("#files", given(tmp_path, dicom()))
        await page.until("document.querySelector('.pane')")
        for asked in ("How sure", "Shade"):
            await page.evaluate(
                f"[...document.querySelectorAll('.check')].find((each) => each.textContent.includes('{asked}')).click()"
            )
        await page.evaluate(READ)
        await page.until("document.querySelector('.files')")
        assert triton.asked["scores"] is triton.asked["logprobs"] is True
        marks = await page.evaluate(
            "[...document.querySelectorAll('.reasoning mark')]"
            ".map((each) => [each.className, each.textContent, each.title])"
        )
        return (
            marks,
            await page.evaluate(texts(".chips li", "textContent")),
            await page.evaluate(texts(".reasoning .prose p")),
        )

    marks, chips, prose = seen(do)
    ours = Page(reading_page(Reading.from_json(answer.reading)))
    wanted = [value for tag, name, value in ours.attributes if tag == "mark" and name == "title"]
    assert [title for _, _, title in marks if title] == wanted and len(wanted) == 4
    assert [(shade, word) for shade, word, title in marks if title] == [
        ("shade3", "Größe"), ("shade2", lungs), ("shade1", "very"), ("shade3", "heart."),
    ]  # fmt: skip
    assert prose[0].strip() == f"Größe {lungs} very large heart."
    assert chips == [
        "Cardiomegalypresent · +6.5", "Edemapresent, uncertain · +0.5", "Pneumoniaabsent, uncertain · −0.4",
        "Fractureabsent · −9.0",
    ]  # fmt: skip


def test_two_servers_are_compared_and_earlier_readings_shown_again(tmp_path, triton, seen, servers):
    second = servers[1]
    second.profile, second.answer = NV.to_json(), answering("<think> No. </think>\n<answer> Edema </answer>")

    async def do(page):
        await page.choose("#files", given(tmp_path, dicom()))
        await page.until("document.querySelector('.pane')")
        await page.evaluate(READ)
        await page.until("document.querySelectorAll('.files').length === 1")
        await page.evaluate(
            "[...document.querySelectorAll('.check')].find((each) => /Compare/.test(each.textContent)).click()"
        )
        await page.evaluate(READ)
        await page.until("document.querySelectorAll('.files').length === 2")
        columns = await page.evaluate(texts(".column"))
        assert triton.url in columns[0] and "The heart is large." in columns[0]
        assert second.url in columns[1] and "No." in columns[1]
        await page.evaluate("[...document.querySelectorAll('#earlier button')].at(-1).click()")
        assert [triton.url in each for each in await page.evaluate(texts(".column"))] == [True]
        assert (
            await page.evaluate(texts("#earlier [aria-current]"))
            == (await page.evaluate(texts("#earlier button")))[-1:]
        )

    seen(do)


def test_a_keyboard_and_a_screen_reader_are_enough(tmp_path, triton, seen):
    focused = "document.activeElement.innerText || document.activeElement.id"

    async def do(page):
        await page.press("Tab")
        assert await page.evaluate(focused) == "Skip to asking"
        await page.press("Tab")
        assert await page.evaluate(focused) == "files"
        outline = "getComputedStyle(document.querySelector('label[for=files]')).outlineStyle"
        assert await page.evaluate(outline) == "solid"
        await page.choose("#files", given(tmp_path, dicom()))
        await page.until(DRAWN)
        await page.evaluate("document.querySelector('.stage canvas:last-of-type').focus()")
        before = await page.evaluate("document.querySelector('.pane figcaption').innerText")
        await page.press("+")
        await page.until(f"document.querySelector('.pane figcaption').innerText !== {json.dumps(before)}")
        await page.press("0")
        await page.until(f"document.querySelector('.pane figcaption').innerText === {json.dumps(before)}")
        await page.press("i")
        await page.until("document.querySelector('.stage canvas').style.filter.includes('invert')")
        await page.evaluate("document.querySelector('#question .primary').focus()")
        await page.evaluate(
            "window.told = []; new MutationObserver((all) => all.forEach(({ addedNodes }) => addedNodes.forEach("
            "(node) => told.push(node.textContent)))).observe(document.querySelector('#say'), { childList: true })"
        )
        await page.press("Enter")
        await page.until("document.querySelector('.files')")
        assert await page.evaluate("told") == ["The heart is large.", "Cardiomegaly", "Findings: Complete."]
        assert await page.evaluate("document.querySelector('#say').getAttribute('aria-live')") == "polite"
        names = await page.evaluate(
            "[...document.querySelectorAll('button, input, textarea, canvas[tabindex]')].map((each) => "
            "each.getAttribute('aria-label') || each.labels?.[0]?.textContent || each.textContent)"
        )
        assert all(name.strip() for name in names)

    seen(do)


def test_a_mouse_and_two_fingers_move_zoom_and_change_greys(tmp_path, triton, seen):
    shown = "Number(/(\\d+) %/.exec(document.querySelector('.pane figcaption').innerText)[1])"
    filtered = "document.querySelector('.stage canvas').style.filter"

    async def do(page):
        await page.size(1280, 600)
        await page.choose("#files", given(tmp_path, dicom(rows=480, columns=400)))
        await page.until(f"{DRAWN} && document.documentElement.scrollHeight > innerHeight")
        left, top, width, height = await page.evaluate(STAGE)
        x, y = left + width / 2, top + height / 2
        fitted = await page.evaluate(shown)
        await page.mouse("mouseWheel", x, y, deltaX=0, deltaY=100)
        await page.until(f"{shown} < {0.9 * fitted}")
        await page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-200)
        await page.until(f"{shown} > {1.2 * fitted}")
        assert await page.evaluate("scrollY + document.querySelector('#pictures').scrollTop") == 0, "nothing scrolls"
        before = await page.pixels()
        await drag(page, (x, y), (x + 40, y + 20), "left")
        ours = before[int(y) - 60 : int(y) + 60, int(x) - 60 : int(x) + 60]
        while True:
            moved = (await page.pixels())[int(y) - 40 : int(y) + 80, int(x) - 20 : int(x) + 100]
            if np.abs(moved - ours).mean() < 2:
                break
        await drag(page, (x, y), (x + 40, y), "right")
        await page.until(f"{filtered}.startsWith('contrast(1.2)')")
        await page.evaluate("document.querySelector('.stage canvas:last-of-type').focus()")
        await page.press("0")
        await page.until(f"{shown} === {fitted}")
        for kind, apart in (("touchStart", 40), ("touchMove", 60), ("touchMove", 80), ("touchEnd", None)):
            points = [] if apart is None else [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
            await page.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
        await page.until(f"{shown} > {1.8 * fitted} && {shown} < {2.2 * fitted}")

    seen(do)


MARKED = """new Promise(requestAnimationFrame).then(() => {
  const isMarked = (canvas) => {
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    return copy.getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean);
  };
  return [...document.querySelectorAll(".stage canvas:last-of-type")].filter(isMarked).length;
})"""
"""How many pictures in sight have a box."""
SEEN = texts(".pane figcaption > :first-child", "textContent.trim()")
EARLIER = "[...document.querySelectorAll('#earlier button')].at({}).click()"
ELSEWHERE = "document.querySelector('#elsewhere:not([hidden])')?.innerText"
HOLD = """{
  const ask = fetch;
  Object.assign(window, { holding: null, isHeld: false });
  const pass = async (name) => {
    for (; holding === name; await new Promise((go) => setTimeout(go, 5))) window.isHeld = true;
    window.isHeld = false;
  };
  window.fetch = async (path, options) => {
    const answer = await ask(path, options);
    if (path.endsWith("/pictures")) await pass(options.headers["X-File-Name"]);
    if (!path.endsWith("/readings")) return answer;
    const slow = new TransformStream({ transform: (piece, to) => pass("readings").then(() => to.enqueue(piece)) });
    return new Response(answer.body.pipeThrough(slow), answer);
  };
}"""
"""While `holding` is the name of a file, what answers its upload waits; while "readings", lines of readings do."""


async def end_all(room) -> None:
    room._loop.call_soon_threadsafe(room.service.sessions.end_all)
    await wait(lambda: not len(room.service.sessions))


def test_a_session_ends_with_its_tab_and_a_new_one_shows_nothing_of_one_that_the_server_ended(
    tmp_path, triton, seen, servers
):
    room = servers[2]
    triton.answer = answering(TEXT, answer="boxes")

    async def do(page):
        sessions = room.service.sessions
        await page.choose("#files", given(tmp_path, dicom(PatientID="A")))
        await page.until(DRAWN)
        await page.evaluate(READ)
        await page.until("document.querySelector('.files')")
        assert await page.evaluate(MARKED) == 1
        await end_all(room)
        await page.evaluate(SAVE.format("JSON"))
        await page.until("document.querySelector('#alarm').innerText.includes('SESSION_OVER')")
        assert await page.evaluate("document.querySelectorAll('.pane, .files').length") == 0
        for _ in range(2):
            await page.choose("#files", given(tmp_path, dicom(PatientID="B")))
            await wait(lambda: len(sessions) == 1)
            await page.until(f"{DRAWN} && !document.querySelector('#coming *')")
            for _ in range(2):
                assert await page.evaluate(SEEN) == ["chest.dcm"]
                assert await page.evaluate(MARKED) == 0, "a box of A on B"
                assert "The heart is large." in (await page.evaluate(texts("article")))[0], "what was read stays"
                assert await page.evaluate(ELSEWHERE) == "In sight, but not read here: chest.dcm."
                assert await page.evaluate(texts("article button")) == [], "names are of the new session's readings now"
                await page.evaluate(EARLIER.format(0))
            await end_all(room)
        await page.choose("#files", given(tmp_path, dicom(PatientID="B")))
        await wait(lambda: len(sessions) == 1)
        await page.until(f"{DRAWN} && !document.querySelector('#coming *')")
        await page.evaluate(READ)
        await page.until("document.querySelector('.files')")
        marked = []
        for at in (0, 1, 0):
            await page.evaluate(EARLIER.format(at))
            marked.append((await page.evaluate(MARKED), await page.evaluate(ELSEWHERE) is None))
        assert marked == [(1, True), (0, False), (1, True)]
        assert await page.evaluate("document.querySelectorAll('.refused').length") == 0
        await page.call("Page.navigate", url="about:blank")
        await wait(lambda: not len(sessions))

    seen(do)


def test_answers_of_a_session_that_ended_do_not_get_into_the_next_one(tmp_path, triton, seen, servers):
    room, gate = servers[2], threading.Event()
    triton.answer = held(TEXT, gate, answer="boxes")

    async def choose(page, name):
        await page.choose("#files", given(tmp_path, dicom(), name))

    def names():
        return [sorted(each.file_name for each in session.pictures.values()) for session in room.service.sessions]

    async def do(page):
        await page.evaluate(HOLD)
        await choose(page, "old.dcm")
        await page.until(DRAWN)
        await page.evaluate(READ)
        await page.until("document.querySelector('.reasoning').innerText.includes('large')")
        await page.evaluate("window.holding = 'readings'")
        await end_all(room)
        await page.until("isHeld")
        await choose(page, "new.dcm")
        await page.until(f"{SEEN}.join() === 'new.dcm'")
        await page.evaluate("document.querySelector('.stop')?.click()")
        await page.evaluate("window.holding = null")
        await page.until("document.querySelector('.state').innerText === 'Stopped'")
        assert await page.evaluate(texts("article button")) == [], "the end of the old one came late"
        assert not any("/readings/" in url for url in page.asked), "the old one is over"

        await end_all(room)
        await page.evaluate("window.holding = 'late.dcm'")
        await choose(page, "late.dcm")
        await page.until("isHeld")
        await choose(page, "a.dcm")
        await page.until(f"{texts('#strip strong')}.join() === 'a.dcm'")
        await page.evaluate("window.holding = null")
        await page.until("!document.querySelector('#coming *')")
        assert sorted(await page.evaluate(texts("#strip strong"))) == ["a.dcm", "late.dcm"]
        assert names() == [["a.dcm", "late.dcm"]], "refused late, and given again in the session that is open by then"

        await page.evaluate("window.holding = 'taken.dcm'")
        await choose(page, "taken.dcm")
        await page.until("isHeld")
        await end_all(room)
        await choose(page, "b.dcm")
        await page.until(f"{texts('#strip strong')}.join() === 'b.dcm'")
        await page.evaluate("window.holding = null")
        await page.until("!document.querySelector('#coming *')")
        assert sorted(await page.evaluate(texts("#strip strong"))) == ["b.dcm", "taken.dcm"]
        assert names() == [["b.dcm", "taken.dcm"]], "taken by the session that ended before its answer came"

    seen(do)


def test_readings_that_are_written_at_once_stay_with_their_pictures(tmp_path, triton, seen):
    first, second = threading.Event(), threading.Event()

    async def begin(page, name, answer):
        triton.answer = answer
        await page.choose("#files", given(tmp_path, dicom(), name))
        await page.until(f"{SEEN}.join() === '{name}' && {DRAWN}")
        await page.evaluate(READ)
        await page.until("document.querySelector('.reasoning').innerText.includes('large')")

    def writing(count):
        return f"{texts('#earlier small')}.filter((each) => each.includes('being written')).length === {count}"

    async def do(page):
        await begin(page, "a.dcm", held(TEXT, first, 1 / 4, answer="boxes"))
        await begin(page, "b.dcm", held(TEXT.replace("The lungs", "Its lungs"), second, 1 / 4, answer="boxes"))
        first.set()
        await page.until(writing(1))
        assert await page.evaluate(MARKED) == 0 and await page.evaluate(SEEN) == ["b.dcm"], "a box of a on b"
        assert await page.evaluate("document.querySelector('article').hasAttribute('aria-busy')")
        heard = await page.evaluate(texts("#say p", "textContent"))
        assert heard[-1] == "Another reading, of a.dcm, Findings: Complete." and "The lungs are clear." not in heard
        await page.evaluate(EARLIER.format(1))
        await page.until(DRAWN)
        assert await page.evaluate(SEEN) == ["a.dcm"] and await page.evaluate(MARKED) == 1
        await page.evaluate("document.querySelector('[aria-label=\"Remove b.dcm\"]').click()")
        await page.until(f"{texts('#strip strong')}.join() === 'a.dcm'")
        second.set()
        await page.until(writing(0))
        assert await page.evaluate(MARKED) == 1 and "The lungs" in (await page.evaluate(texts("article")))[0]
        await page.evaluate(EARLIER.format(0))
        assert await page.evaluate(SEEN) == [] and "Its lungs" in (await page.evaluate(texts("article")))[0]
        await page.evaluate("document.querySelector('.boxes button').click()")
        assert await page.evaluate(MARKED) == 0

    seen(do)


def test_logging_out_ends_the_session_while_it_may(tmp_path, triton, runner, chromium):
    (tmp_path / "password").write_text(PASSWORD)

    async def do(room):
        async with chromium.tab() as page:
            await page.go(f"{room.origin}/login", "document.querySelector('#password')")
            await page.evaluate("document.querySelector('#password').focus()")
            await page.call("Input.insertText", text=PASSWORD)
            await page.press("Enter")
            await page.until("document.querySelector('#question button')")
            await page.choose("#files", given(tmp_path, dicom()))
            await page.until("document.querySelector('.pane')")
            assert [len(session.pictures) for session in room.service.sessions] == [1]
            await page.evaluate("document.querySelectorAll('#logout button')[0].click()")
            await page.until("document.querySelector('#password')")
            assert len(room.service.sessions) == 0
            paths = [urlsplit(url).path for url in page.asked]
            ended, left = [path for path in paths if re.fullmatch(r"/logout|/api/sessions/[^/]+(/end)?", path)]
            assert ended.startswith("/api/sessions/") and left == "/logout"

    with UiServer(triton.url, password_file=tmp_path / "password") as room:
        runner.run(do(room))
