"""The reading room in a browser: pictures dropped and pasted, drawn by presets; columns that sample differently."""

import base64
import io
import json

import numpy as np
import pytest
from chromium import browser as needs_chromium
from dicom_files import dataset_of, file_bytes, pattern
from fake_server import asked_of

pytest.importorskip("aiohttp")
pytest.importorskip("highdicom")

from test_ui import dicom
from test_ui_page import chromium, runner, seen, servers, triton  # noqa: F401
from ui_room import DRAWN, READ, STAGE, fit, given, texts

from cxr_triton.phantom_file import store

pytestmark = [needs_chromium, pytest.mark.slow]
SIDE = 480
HARD = "Window 2: “HARD”"
PRESS = "[...document.querySelectorAll('.tools button')].find((each) => each.innerText === '{}').click()"
NAMES = texts("#strip strong")


def wedge() -> bytes:
    """Stored values from 0 at the left to 4095 at the right, with two windows."""
    windows = {
        "WindowCenter": [2048, 1024],
        "WindowWidth": [4096, 512],
        "WindowCenterWidthExplanation": ["SOFT", "HARD"],
    }
    dataset = dataset_of(pattern(12), 12, BodyPartExamined="CHEST", **windows)
    dataset.Rows = dataset.Columns = SIDE
    store(dataset, np.tile(np.linspace(0, 4095, SIDE).astype(np.uint16), (SIDE, 1)), "explicit")
    return file_bytes(dataset)


def test_presets_and_invert_change_the_greys_in_sight(tmp_path, triton, seen):  # noqa: F811
    """pydicom gives the greys."""
    import pydicom
    from pydicom.pixels import apply_windowing

    data = wedge()
    dataset = pydicom.dcmread(io.BytesIO(data))
    soft, hard = (apply_windowing(dataset.pixel_array, dataset, index)[0] * 255 / 4095 for index in range(2))

    async def until_greys(page, wanted) -> None:
        scale, x, y = fit(await page.evaluate(STAGE), SIDE, SIDE)
        columns = np.arange(10, SIDE, 20)
        while True:
            row = (await page.pixels())[round(y + SIDE / 2 * scale)]
            greys = row[np.rint(x + (columns + 0.5) * scale).astype(int), 0]
            if np.abs(greys - wanted[columns]).max() < 24:  # a step of the steep one is 2 pixels wide
                return

    async def do(page):
        await page.choose("#files", given(tmp_path, data))
        await page.until(DRAWN)
        for press, wanted in (("As the file asks for", soft), (HARD, hard), ("Invert", 255 - hard)):
            await page.evaluate(PRESS.format(press))
            await until_greys(page, wanted)
        pressed = texts(".tools [aria-pressed=true]:not([hidden])")
        assert await page.evaluate(pressed) == [HARD, "Invert"]
        await page.evaluate(PRESS.format("As the file asks for"))
        await until_greys(page, 255 - soft)

    seen(do)


def test_files_are_dropped_and_pasted(tmp_path, triton, seen):  # noqa: F811
    dropped, pasted = given(tmp_path, dicom(PatientID="1"), "dropped.dcm"), dicom(PatientID="1", rows=96)

    async def do(page):
        left, top, width, height = await page.evaluate(STAGE.replace(".stage", "#drop"))
        where = {"x": left + width / 2, "y": top + height / 2}
        files = {"items": [], "files": [str(dropped)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver"):
            await page.call("Input.dispatchDragEvent", type=kind, data=files, **where)
        await page.until("document.querySelector('#drop.over')")
        await page.call("Input.dispatchDragEvent", type="drop", data=files, **where)
        await page.until(f"{NAMES}.join() === 'dropped.dcm' && {DRAWN}")
        assert await page.evaluate("document.querySelector('#drop.over')") is None
        await page.evaluate(
            f"""{{
              const clipboardData = new DataTransfer();
              const bytes = Uint8Array.from(atob("{base64.b64encode(pasted).decode()}"), (each) => each.charCodeAt(0));
              clipboardData.items.add(new File([bytes], "pasted.dcm"));
              document.body.dispatchEvent(new ClipboardEvent("paste", {{ clipboardData, bubbles: true }}));
            }}"""
        )
        await page.until(f"{NAMES}.includes('pasted.dcm')")
        assert await page.evaluate(texts("#strip .name small")) == ["DICOM · 40 × 48 px", "DICOM · 40 × 96 px"]

    seen(do)


def test_a_window_that_cannot_be_drawn_leaves_the_one_in_sight_pressed(tmp_path, triton, seen):  # noqa: F811
    pressed = texts(".tools [aria-label=Window] [aria-pressed=true]:not([hidden])")
    fail = """{
      const real = window.fetch;
      const broken = async () => new Response("", { status: 500 });
      window.fetch = (path, ...rest) => (path.includes("=voi_display") ? broken() : real(path, ...rest));
    }"""

    async def do(page):
        await page.choose("#files", given(tmp_path, wedge()))
        await page.until(DRAWN)
        assert await page.evaluate(pressed) == ["Equalized greys"]
        await page.evaluate(fail)
        await page.evaluate(PRESS.format("As the file asks for"))
        await page.until("document.querySelector('.stage .refusal')")
        assert await page.evaluate(pressed) == ["Equalized greys"]
        await page.evaluate(PRESS.format(HARD))
        await page.until(f"{pressed}.join() === '{HARD}'")
        assert await page.evaluate("document.querySelector('.stage .refusal')") is None

    seen(do)


def test_any_temperature_is_sent_and_one_that_is_none_is_pointed_at(tmp_path, triton, seen):  # noqa: F811
    before = len(triton.requests)
    temperature = "document.querySelectorAll('.numbers input')[1]"

    async def do(page):
        await page.choose("#files", given(tmp_path, dicom()))
        await page.until(DRAWN)
        assert not await page.evaluate("document.querySelector('.asked-of details').open")
        await page.evaluate(f"{temperature}.value = 7")
        await page.evaluate(READ)
        await page.until(
            f"document.querySelector('.asked-of details').open && document.activeElement === {temperature}"
        )
        await page.evaluate(f"{temperature}.value = 0.75")
        await page.evaluate(READ)
        await page.until("document.querySelector('.files')")

    seen(do)
    assert [asked_of(each)["temperature"] for each in triton.requests[before:]] == [0.75]


def test_two_columns_of_one_model_may_sample_differently(tmp_path, triton, seen):  # noqa: F811
    """A seed and a temperature of their own, which their follow-ups keep."""
    before = len(triton.requests)
    fill = "[...document.querySelectorAll('.numbers')][{}].querySelectorAll('input')[{}].value = {}"

    async def do(page):
        await page.choose("#files", given(tmp_path, dicom()))
        await page.until(DRAWN)
        await page.evaluate(
            "[...document.querySelectorAll('.check')].find((each) => /Compare/.test(each.textContent)).click()"
        )
        for column, (seed, temperature) in enumerate(((7, ""), (8, 0.7))):
            await page.evaluate(fill.format(column, 0, json.dumps(seed)))
            await page.evaluate(fill.format(column, 1, json.dumps(temperature)))
        await page.evaluate(READ)
        await page.until("document.querySelectorAll('.files').length === 2")
        named = await page.evaluate(texts(".of"))
        assert named[0].endswith("seed 7") and named[1].endswith("seed 8 · temperature 0.7")
        await page.evaluate("document.querySelector('#follow .row button').click()")
        await page.until("document.querySelectorAll('.files').length === 4")

    seen(do)
    asked = list(map(asked_of, triton.requests[before:]))
    for some in (asked[:2], asked[2:]):
        sampling = [(each.get("seed"), each.get("temperature")) for each in some]
        assert sorted(sampling, key=str) == [(7, None), (8, 0.7)]
    assert not any(each.get("history") for each in asked[:2]) and all(each["history"] for each in asked[2:])
