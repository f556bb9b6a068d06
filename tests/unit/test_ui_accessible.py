"""What the reading room's page shows, in each of its states, keeps nobody from using it: axe-core finds no barrier."""

import json
import re
import threading

import pytest
from axe import barriers, needs_axe
from chromium import browser as needs_chromium
from fake_server import pause, response

pytest.importorskip("aiohttp")
pytest.importorskip("highdicom")

from test_ui import CHEXONE, PASSWORD, dicom, reading_of
from test_ui_page import TEXT, chromium, runner, seen, servers, triton  # noqa: F401
from ui_room import DRAWN, READ, given, texts
from ui_server import UiServer

pytestmark = [needs_chromium, needs_axe, pytest.mark.slow]
SCORES = {"Cardiomegaly": 6.5, "Edema": 0.5, "Fracture": -9.0}
CHECK = "[...document.querySelectorAll('.check')].find((each) => each.textContent.includes('{}')).click()"
UNFOLD = "document.querySelectorAll('details').forEach((each) => (each.open = true))"


async def look(page, found: dict, state: str) -> None:
    """Adds what keeps people from using a state: on a phone in light colours, at a desk in dark ones."""
    for width, scheme in ((375, "light"), (1280, "dark")):
        await page.size(width, 900)
        for told in (await barriers(page, [scheme])).values():
            found[f"{state}, {width} px, {scheme}"] = told


def everything(gate):
    """An answer with all that a reading can have; its second half comes once `gate` is set."""

    def answer(request, context):
        yield response(TEXT[: len(TEXT) // 2])
        while context.is_active() and not gate.is_set():
            pause(context, 0.01)
        yield response(TEXT[len(TEXT) // 2 :])
        ends = [place.end() for place in re.finditer(r"\S+\s*", TEXT)]
        whole = json.loads(reading_of(request, TEXT, answer="boxes"))
        whole |= {"scores": SCORES, "token_ends": ends, "token_logprobs": [-0.6 * (i % 4) for i in range(len(ends))]}
        whole |= {
            "findings": [{"label": "Cardiomegaly", "written": "Cardiomegaly", "score": 6.5}],
            "status": "malformed",
        }
        yield response("", json.dumps(whole | {"model": {"profile": "x", "labels": list(SCORES)}}), final=True)

    return answer


@pytest.mark.timeout(2400)
def test_every_state_of_the_page(tmp_path, triton, seen):  # noqa: F811
    gate = threading.Event()
    triton.profile, triton.answer = CHEXONE.to_json(), everything(gate)

    async def do(page):
        found: dict[str, list] = {}
        await look(page, found, "empty")
        await page.choose("#files", given(tmp_path, b"no picture", "hostile.dcm"))
        await page.until("document.querySelector('.refused .refusal')")
        await look(page, found, "refused")
        for name in ("now.dcm", "before.dcm"):
            await page.choose("#files", given(tmp_path, dicom(PatientID="1"), name))
            await page.until(f"{texts('#strip strong')}.includes('{name}')")
        await page.until(DRAWN)
        await page.evaluate(f"{CHECK.format('Compare')}; {UNFOLD}")
        await look(page, found, "given")
        await page.evaluate(READ)
        await page.until("document.querySelectorAll('.coming').length > 1")
        await look(page, found, "being written")
        gate.set()
        await page.until("document.querySelectorAll('.files').length === 2")
        await page.evaluate(UNFOLD)
        assert await page.evaluate("document.querySelectorAll('.chips .present, .bars, mark, .boxes li').length > 3")
        await look(page, found, "read")
        return found

    assert seen(do, limit_s=1800) == {}  # ten runs of axe, on a core that others use too


def test_the_login(tmp_path, triton, runner, chromium):  # noqa: F811
    (tmp_path / "password").write_text(PASSWORD)

    async def do(room):
        found: dict[str, list] = {}
        async with chromium.tab() as page:
            await page.go(f"{room.origin}/login", "document.querySelector('#password')")
            await look(page, found, "login")
            await page.evaluate("document.querySelector('label').remove()")
            assert any("label" in told[0] for told in (await barriers(page, ["light"]))["light"]), "a barrier is found"
        return found

    with UiServer(triton.url, password_file=tmp_path / "password") as room:
        assert runner.run(do(room)) == {}
