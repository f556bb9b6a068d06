"""The page of an evaluation: complete, harmless, without names, and right when a browser draws it on a phone."""

import copy
import dataclasses
import io
import json
import re
from html import escape, unescape

import evaluations
import numpy as np
import pytest

pytest.importorskip("sklearn")

from chromium import Page, browser, chromium, is_color, screenshot
from PIL import Image

from cxr_triton.evaluate.compare import compare
from cxr_triton.evaluate.gallery import Shown, pictures
from cxr_triton.evaluate.kinds import Columns
from cxr_triton.evaluate.page import evaluation_page, shown_cases
from cxr_triton.evaluate.rows import KINDS, Answer, Box, Truth
from cxr_triton.evaluate.summary import summarize
from cxr_triton.evaluate.terms import title

BLUE = (30, 60, 200)


def png(height=200, width=300) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), BLUE, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def made():
    """Of each kind: the summary, its rows, another engine's, what a comparison says of both, and pictures."""
    found = {}
    for kind in KINDS:
        ours, theirs = (
            Columns(*evaluations.result(kind, 80, engine=engine, skill=0.7, broken=0.2)) for engine in (0, 1)
        )
        summary, comparison = summarize(ours, count=60), compare(theirs, ours, count=60)
        shown = {number: [Shown(png(), 300, 200)] for number in shown_cases(summary, comparison)}
        found[kind] = summary, ours.rows, theirs.rows, comparison, shown
    return found


def page_of(made, kind="labels") -> str:
    summary, rows, other, comparison, shown = made[kind]
    return evaluation_page(summary, rows, shown, comparison=comparison, other=other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_what_a_radiologist_needs(made, kind):
    summary, _, _, comparison, shown = made[kind]
    page = Page(page_of(made, kind))
    for part in (
        "Not for diagnosis", summary["notice"], "Phantom reader: accuracy on phantoms", "Against paper, fp32",
        comparison["verdict"], "80 studies of", "95 % intervals by 60 resamples of the patients", "sex: F",
        "sha256:000", "truncated: the token limit", *map(title, summary["measures"]),
    ):  # fmt: skip
        assert part in page.text, part
    assert page.tags.count("article") == len(shown) == page.tags.count("img")
    if kind == "labels":
        for entry in summary["labels"]:
            assert f"{entry['measures']['recall']['value']:.2f}" in page.text
        assert page.tags.count("svg") == 3 * len(evaluations.LABELS)  # both curves, calibration
        assert "McNemar" in page.text and "seen." in page.text
    alone = Page(evaluation_page(summary, made[kind][1]))
    assert "Against" not in alone.text and "img" not in alone.tags and alone.tags.count("article") == 12


def test_nobody_is_named_unless_asked_for():
    result = Columns(*evaluations.result(studies=60, skill=0.6))
    html = evaluation_page(summarize(result, count=5), result.rows)
    assert not any(name in html for row in result.rows for name in (row.study, row.patient, *row.images))
    summary = summarize(result, count=5, identifiers=True)
    named = evaluation_page(summary, result.rows)
    assert all(f"study {case['study']}, patient {case['patient']}" in named for case in summary["worst"])


HOSTILE = ("<script>alert(1)</script>", '"><img src=http://127.0.0.1:9/x onerror=alert(1)>', "</style><svg onload=a()>")


def poisoned(value, poison):
    """A copy in which every text that a model, a server or a table could have written is `poison`."""
    if dataclasses.is_dataclass(value):
        names = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(
            **{name: each if name in ("kind", "unit") else poisoned(each, poison) for name, each in names.items()}
        )
    if isinstance(value, dict):
        return {
            key: each if key in ("kind", "verdict", "measure") else poisoned(each, poison)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(poisoned(each, poison) for each in value)
    return poison if isinstance(value, str) else value


@pytest.mark.parametrize("poison", HOSTILE)
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_a_tag(made, kind, poison):
    summary, rows, other, comparison, shown = made[kind]
    html = evaluation_page(
        poisoned(summary, poison),
        poisoned(rows, poison),
        shown,
        comparison=poisoned(comparison, poison),
        other=poisoned(other, poison),
    )
    page, clean = Page(html), Page(page_of(made, kind))
    assert poison in unescape(html) and "script" not in page.tags and set(page.tags) <= {*clean.tags, "p"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("href", "srcset")]
    assert all(value.startswith("data:image/png;base64,") for _, name, value in page.attributes if name == "src")


def test_pictures_are_those_of_the_data_set_and_a_missing_one_is_said(tmp_path):
    result = Columns(*evaluations.result(studies=3, broken=0))
    rows = [dataclasses.replace(row, images=(f"{i}.png",)) for i, row in enumerate(result.rows)]
    (tmp_path / "0.png").write_bytes(png(600, 900))
    (tmp_path / "1.png").write_bytes(b"no picture")
    found = pictures(rows, tmp_path)
    assert (found[0][0].width, found[0][0].height) == (900, 600) and found[1] == found[2] == [None]
    assert np.prod(Image.open(io.BytesIO(found[0][0].png)).size) <= 480 * 480
    summary = summarize(result, count=5) | {"worst": [{"number": i, "rightness": 0.0, "code": ""} for i in range(3)]}
    assert Page(evaluation_page(summary, rows, found)).text.count("cannot be shown") == 2


@pytest.mark.slow
@browser
def test_boxes_land_where_they_were_drawn(tmp_path):
    header, (row,) = evaluations.result("boxes", 1, broken=0)
    true, said = (
        Box(label="Nodule", corners=corners) for corners in ((60.0, 40.0, 150.0, 100.0), (180.0, 120.0, 270.0, 180.0))
    )
    result = Columns(header, [dataclasses.replace(row, truth=Truth(boxes=(true,)), answer=Answer(boxes=(said,)))])
    html = evaluation_page(summarize(result, count=5), result.rows, {0: [Shown(png(), 300, 200)]})
    html = re.sub(r"<main>.*?<h2 class=\"gallery\"", '<main><h2 class="gallery"', html, flags=re.DOTALL)
    pixels = screenshot(tmp_path, html, size=(700, 1000))
    blue = is_color(pixels, BLUE)
    rows, columns = np.flatnonzero(blue.any(axis=1)), np.flatnonzero(blue.any(axis=0))
    scale = (columns[-1] + 1 - columns[0]) / 300
    for color, box in (((79, 211, 138), true), ((255, 177, 63), said)):
        drawn = is_color(pixels, color, 30)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        down, across = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        found = np.array([across[0], down[0], across[-1] + 1, down[-1] + 1])
        assert np.abs(found - np.array(box.corners) * scale).max() <= 2


@pytest.mark.slow
@browser
@pytest.mark.parametrize("kind", ["labels", "report"])
def test_the_page_fits_a_phone_and_the_tables_become_lists(made, tmp_path, kind):
    page, script = escape(page_of(made, kind)), """
        const found = [...document.querySelectorAll('iframe')].map(f => {
            const d = f.contentDocument, s = d.querySelectorAll('details'); s.forEach(e => e.open = true);
            const side = [...d.querySelectorAll('.scroll:not(:has(.confusion))')]
                .map(e => e.scrollWidth - e.clientWidth);
            const head = d.querySelector('.cards thead').getBoundingClientRect().height;
            return [d.body.scrollWidth, Math.max(...side), head];
        });
        document.body.dataset.found = JSON.stringify(found);
    """  # fmt: skip
    widths = (320, 390, 820, 1280)
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{page}"></iframe>' for width in widths)
    dom = chromium(tmp_path, f"{frames}<script>onload = () => {{ {script} }}</script>", "--dump-dom").stdout
    found = json.loads(re.search(r'data-found="([^"]+)"', dom)[1])
    for width, (wide, side, head) in zip(widths, found, strict=True):
        assert wide <= width and (head == 0) == (width <= 820)
        assert width > 820 or side == 0


@pytest.mark.slow
@browser
def test_a_browser_finds_no_fault_and_asks_nobody(made, tmp_path):
    asked, log = "http://127.0.0.1:9/x", tmp_path / "net.json"
    summary, rows, other, comparison, shown = copy.deepcopy(made["labels"])
    poison = f"<img src={asked}>"
    html = evaluation_page(
        poisoned(summary, poison),
        poisoned(rows, poison),
        shown,
        comparison=poisoned(comparison, poison),
        other=poisoned(other, poison),
    )
    out = chromium(tmp_path, html, f"--log-net-log={log}", "--dump-dom")
    assert "CONSOLE" not in out.stderr and f'"url":"{asked}"' not in log.read_text()
    out = chromium(tmp_path, f"<script>x</script><img src={asked}>", f"--log-net-log={log}", "--dump-dom")
    assert "CONSOLE" in out.stderr and f'"url":"{asked}"' in log.read_text()
