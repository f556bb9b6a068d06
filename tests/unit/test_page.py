"""The HTML page of a reading: harmless whatever a server sends, complete, and right when a browser draws it."""

import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import math
import re
import time
import tomllib
from html import escape
from pathlib import Path

import numpy as np
import pytest
from chromium import Page, browser, chromium, is_color, screenshot
from dicom_files import dataset_of, file_bytes
from PIL import Image
from pydicom import dcmread
from served import write_paper_bundle

from cxr_triton import phantom, phantom_file
from cxr_triton.client.page import _IMAGE, Shown, draw, reading_page
from cxr_triton.engines.pipeline import Preprocessor, build_reading, completion_json
from cxr_triton.engines.runtime.stream import Completion
from cxr_triton.numbers import number
from cxr_triton.pixels.dicom import read_image
from cxr_triton.pixels.display import render
from cxr_triton.pixels.flags import FLAGS as IMAGE_FLAGS
from cxr_triton.reading import FLAGS as READING_FLAGS
from cxr_triton.reading import Box, Finding, Reading

ROOT = Path(__file__).resolve().parents[2]
READING = Reading(
    status="ok",
    finish_reason="stop",
    text="<think> raw <b>text</b> </think>\n<answer> Cardiomegaly </answer>",
    reasoning="**Heart:** large.\n\nNo effusion.",
    answer="Cardiomegaly",
    findings=(Finding(label="Cardiomegaly", written="cardiomegaly"),),
    task="findings",
    prompt="Find abnormalities and support devices.",
    model={"title": "Test Model", "profile": "test", "revision": "r1", "engine": "none", "precision": "fp32",
           "bundle": "sha256:00"},
    images=({"rows": 200, "columns": 100, "grid": [34, 16], "preset": "as_is", "flags": ["lossy"],
             "photometric": "MONOCHROME2", "percentiles": [3, 250]},),
    usage={"prompt_tokens": 300, "completion_tokens": 101, "image_tokens": 136},
    timings_ms={"image_decode": 10.0, "preprocess": 20.0, "vision": 70.0, "queue": 0.0, "prefill": 100.0,
                "decode": 800.0, "report": 0.5, "first_token": 200.0, "total": 1000.5},
    notice="A test double answered.",
)  # fmt: skip
BLUE = (0, 0, 255)


def shown(width: int, height: int, **told) -> Shown:
    """A blue picture."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), BLUE).save(out, "PNG")
    return Shown(png=out.getvalue(), **told)


def test_the_page_says_everything_a_reader_needs():
    text = Page(reading_page(READING, [shown(50, 100)])).text
    for part in (
        "Not for diagnosis", "A test double answered.", "Test Model reading", "findings", READING.prompt,
        "Cardiomegaly", "Heart:", "No effusion.", "Lossy compression", "r1", "fp32", "sha256:00", "100 × 200 px",
        "read at 224 × 476 px", "as_is", "MONOCHROME2", "800.0 ms", "1.00 s", "300", "125 tokens/s",
        "<think> raw <b>text</b> </think>",
    ):  # fmt: skip
        assert part in text, part


def test_uncertain_words_are_shaded_and_every_label_has_a_bar():
    text = "<think> The **heart is wide**, no <i>fluid</i>. </think>\n<answer> Cardiomegaly </answer>"
    pieces = ["<think>", " The", " **", "heart", " is", " wi", "de", "**", ",", " no", " <i>fluid</i>", "."]
    pieces.append(text[len("".join(pieces)) :])
    likely = {"heart": 0.85, " is": 0.4, " wi": 0.6, "de": 0.3, " <i>fluid</i>": 0.1}
    reading = dataclasses.replace(
        READING,
        text=text,
        reasoning="The **heart is wide**, no <i>fluid</i>.",
        token_logprobs=tuple(math.log(likely.get(piece, 1.0)) for piece in pieces),
        token_ends=tuple(itertools.accumulate(map(len, pieces))),
        scores={"Edema": -15.0, "Cardiomegaly": 4.5},
    )
    html = reading_page(reading)
    shaded = re.findall(r'<mark class="shade(\d)" title="([^"]+)">([^<]+)</mark>', html)
    assert shaded == [
        ("1", "85 % likely to the model", "heart"),
        ("2", "40 % likely to the model", "is"),
        ("3", "18 % likely to the model", "wide"),
        ("3", "10 % likely to the model", "&lt;i&gt;fluid&lt;/i&gt;."),
    ]
    assert "<strong>" in html and "**" not in html.split('class="raw"')[0]
    assert "The heart is wide , no <i>fluid</i>." in Page(html).text
    bar = r'<dt>(\w+)</dt><dd><i style="margin-left:([\d.]+)%;width:([\d.]+)%"></i></dd><dd>([^<]+)</dd>'
    bars = re.findall(bar, html)
    assert bars[:2] == [("Cardiomegaly", "50.00", "15.00", "+4.5"), ("Edema", "0.00", "50.00", "-15.0")]
    assert "no probability of a disease" in Page(html).text
    without = reading_page(READING)
    assert "<mark" not in without and "How sure" not in without


@pytest.mark.parametrize("status", ["malformed", "truncated", "out_of_vocabulary", "doubtful_image"])
def test_a_status_other_than_ok_is_explained(status):
    bare = dataclasses.replace(READING, status=status, findings=(), answer=None, reasoning=None)
    text = Page(reading_page(bare)).text
    named = "of a doubtful image" if status == "doubtful_image" else status.replace("_", " ")
    assert f"This answer is {named}:" in text and "no answer that could be read" in text


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Makes readings as a server does, without its engines: of files, and of what a model says about them."""
    bundle = write_paper_bundle(tmp_path_factory.mktemp("page") / "bundle")
    preprocessor = Preprocessor(bundle, not_a_chest="flag")

    def read(*images, text="<think>Large.</think><answer>Cardiomegaly</answer>", **asked) -> Reading:
        completion = Completion(
            text=text,
            finish_reason="stop",
            usage={"completion_tokens": 6},
            timings_ms={"queue": 1.0, "prefill": 2.0, "decode": 3.0, "time_to_first_token": 3.0, "total": 6.0},
        )
        context = preprocessor.prepare(images, json.dumps(asked)).context
        return build_reading(json.loads(completion_json(completion, context, time.monotonic())))

    yield read
    preprocessor.close()


def chest(**elements) -> bytes:
    """A phantom as a DICOM file of one study."""
    picture = phantom.draw(np.random.default_rng(3))
    dataset = dcmread(io.BytesIO(phantom_file.write_dicom(picture, seed="page")))
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def test_a_served_reading_s_facts_are_all_shown(served):
    """What the server writes and what the page looks for are the same keys."""
    data = chest(ImageLaterality="U", StudyDate="20040119")
    reading = served(data)
    (facts,) = reading.images
    assert set(_IMAGE) <= set(facts)
    text = Page(reading_page(reading, draw([data], reading))).text
    size = f"{facts['columns']} × {facts['rows']} px"
    assert text.count(size) == 2 and f"size {size}" in text
    for told in ("laterality unpaired", f"likeness to a chest, 0 to 1 {number(facts['chest_likeness'])}",
                 "part of the body by its header chest", facts["identity"]["file_sha256"]):  # fmt: skip
        assert told in text, told


def test_the_page_says_which_radiograph_was_read_and_when(served):
    data = chest(StudyDate="20040119")
    read_at = datetime.datetime(2026, 11, 22, 9, 30, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))
    uid = dcmread(io.BytesIO(data)).SOPInstanceUID
    digest = hashlib.sha256(data).hexdigest()
    reading = served(data)
    assert "2004-01-19" not in reading.to_json() and "20040119" not in reading.to_json()
    text = Page(reading_page(reading, draw([data], reading, names=["a.dcm"]), read_at=read_at)).text
    assert "a.dcm, study of 2004-01-19 · read 2026-11-22 09:30 UTC+01:00" in text
    assert uid in text and digest in text

    hashed = served(data, identifiers="hashed")
    text = Page(reading_page(hashed, draw([data], hashed, names=["a.dcm"]), read_at=read_at)).text
    assert not any(told in text for told in ("a.dcm", "2004-01", "20040119", uid))
    assert digest in text and "read 2026-11-22" in text
    assert hashlib.sha256(uid.encode()).hexdigest() in text

    both = served(data, chest(), task="compare", text="<think>a</think><answer>Same.</answer>")
    pictures = draw([data, chest()], both, names=["a.dcm", "b.dcm"])
    text = Page(reading_page(both, pictures)).text
    assert "Image 1, prior: a.dcm, study of 2004-01-19 · Image 2, current: b.dcm" in text


def test_no_date_is_made_up():
    for value, told in (("20040119", "2004-01-19"), ("20040231", ""), ("2004011", ""), ("", ""), (None, "")):
        stored = np.zeros((64, 64), np.uint16)
        elements = {} if value is None else {"StudyDate": value}
        assert read_image(file_bytes(dataset_of(stored, 12, **elements))).metadata.study_date == told


def test_a_follow_up_s_page_has_the_whole_conversation(served):
    data = chest()
    history = [
        {"role": "user", "content": "Find abnormalities."},
        {"role": "assistant", "content": "<think>The **heart** is large.</think>\n<answer>Cardiomegaly</answer>"},
        {"role": "user", "content": "How <sure>?"},
        {"role": "assistant", "content": "Cut <think>off"},
    ]
    reading = served(data, prompt="And the lungs?", history=history, text="They are clear.")
    page = Page(reading_page(reading, draw([data], reading), history=history))
    said = page.text[page.text.index("Conversation") :]
    turns = ["Find abnormalities.", "The heart is large. Cardiomegaly", "How <sure>?", "Cut <think>off", "And the"]
    places = [said.index(turn) for turn in turns]
    assert places == sorted(places)
    assert page.text.index("They are clear.") < page.text.index("Conversation")
    assert "Conversation" not in Page(reading_page(reading, draw([data], reading))).text


@pytest.mark.parametrize(
    ("elements", "status", "flag"),
    [
        ({"BodyPartExamined": "KNEE"}, "doubtful_image", "not_a_chest"),
        ({"BodyPartExamined": "CHEST", "StudyDescription": "KNEE"}, "doubtful_image", "region_conflict"),
        ({"ImagerPixelSpacing": ["0.2", "0.1"]}, "ok", "pixels_not_square"),
        ({"ImagerPixelSpacing": ["0.2"]}, "doubtful_image", "pixel_shape_doubtful"),
    ],
)
def test_doubts_and_flags_of_a_served_reading_are_said_in_words(served, elements, status, flag):
    data = chest(**elements)
    reading = served(data)
    assert reading.status == status and flag in reading.images[0]["flags"]
    pictures = draw([data], reading)
    html = reading_page(reading, pictures)
    meaning = IMAGE_FLAGS[flag]
    assert meaning[:1].upper() + meaning[1:] in Page(html).text and f"image · {flag}" in Page(html).text
    for status_of in (reading, dataclasses.replace(reading, status="malformed")):
        page = reading_page(status_of, pictures)
        result = Page(page[page.index('class="result"') : page.index('class="pictures"')]).text
        assert (meaning in result) == (status == "doubtful_image")
    if flag == "pixels_not_square":
        assert "height of a pixel over its width 2" in Page(html).text


def test_every_flag_has_words():
    for flag in (*IMAGE_FLAGS, *READING_FLAGS):
        images = ({"flags": [flag]},) if flag in IMAGE_FLAGS else ()
        flags = (flag,) if flag in READING_FLAGS else ()
        text = Page(reading_page(dataclasses.replace(READING, images=images, flags=flags))).text
        meaning = IMAGE_FLAGS.get(flag) or READING_FLAGS[flag]
        assert (meaning[:1].upper() + meaning[1:]) in text and len(meaning.split()) > 1, flag


def test_every_kind_of_answer_is_shown():
    kinds = {
        "Yes": dataclasses.replace(READING, findings=(), options=("Yes",)),
        "Clear lungs.": dataclasses.replace(READING, findings=(), answer="Clear lungs.", report="Clear lungs."),
        "Kardiomegaly": dataclasses.replace(READING, findings=(), unknown_labels=("Kardiomegaly",)),
        "pneumothorax": dataclasses.replace(READING, findings=(), boxes=(BOX,)),
    }
    for said, reading in kinds.items():
        assert said in Page(reading_page(reading, [shown(50, 100)])).text


BOX = Box(label="pneumothorax", percent=(20.0, 40.0, 70.0, 80.0), pixels=(20.0, 80.0, 70.0, 160.0), image=0)
HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' style='background:url(http://127.0.0.1/x)",
    "</pre></details><iframe src=http://127.0.0.1/></iframe>",
    "<!--",
    "]]>",
    "&lt;b&gt;",
    "**<b>**",
    "\x00\x1b[2J\u202e\ud800",
)


def poisoned(value, poison):
    """A copy of a reading in which every text, however deep, is `poison`."""
    if isinstance(value, str):
        return poison
    if dataclasses.is_dataclass(value):
        fields = {f.name: poisoned(getattr(value, f.name), poison) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        extra = 1.0 if all(isinstance(item, int | float) for item in value.values()) else poison
        return {key: poisoned(item, poison) for key, item in value.items()} | {poison: extra}
    if isinstance(value, (tuple, list)):
        return type(value)(poisoned(item, poison) for item in value)
    return value


@pytest.mark.parametrize("poison", HOSTILE)
def test_hostile_text_stays_text(poison):
    reading = dataclasses.replace(READING, boxes=(BOX,), unknown_labels=("x",), flags=("x",), options=("x",))
    pictures = [shown(50, 100)]
    page, harmless = (Page(reading_page(poisoned(reading, text), pictures)) for text in (poison, "harmless"))
    assert [tag for tag in page.tags if tag != "strong"] == [tag for tag in harmless.tags if tag != "strong"]
    assert page.attributes == harmless.attributes
    assert not set("\x00\x1b\u202e\ud800") & set(page.text)
    for char in poison:
        assert char in page.text or char in "\x00\x1b\u202e\ud800 *"


def test_templates_and_styles_travel_in_the_wheel():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    kinds = {f"*{path.suffix}" for path in (ROOT / "cxr_triton" / "page").iterdir() if path.is_file()}
    assert "cxr_triton.page" in setuptools["packages"] and "*.html" in kinds
    assert kinds - {"*.py"} == set(setuptools["package-data"]["cxr_triton.page"])


def test_nothing_on_the_page_points_elsewhere():
    html = reading_page(dataclasses.replace(READING, boxes=(BOX,)), [shown(50, 100)])
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


@pytest.mark.parametrize("preset", ["mimic_jpg", "voi_display"])
def test_the_picture_has_the_greys_that_the_model_saw(shared_data, preset):
    data = (shared_data / "dicom" / "RG1_UNC_explicitLE.dcm").read_bytes()
    reading = dataclasses.replace(READING, images=({"preset": preset},))
    (picture,) = draw([data], reading, unchecked_reading=True)
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)))
    assert pixels.dtype == np.uint8 and 1000_000 < pixels.size <= 1024 * 1024
    full = Image.fromarray(render(read_image(data), preset).pixels)
    expected = np.asarray(full.resize(pixels.shape[::-1], Image.Resampling.BICUBIC))
    assert np.array_equal(pixels, expected)


def test_a_box_frames_the_same_pixels_where_they_are_not_square():
    stored = np.zeros((100, 200), np.uint16)
    stored[20:60, 50:150] = 4000
    data = file_bytes(dataset_of(stored, 12, PixelSpacing=["0.3", "0.1"]))
    reading = dataclasses.replace(READING, images=({"preset": "voi_display"},))
    (picture,) = draw([data], reading, unchecked_reading=True)
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)))
    assert pixels.shape == (300, 200)
    y, x = np.nonzero(pixels > 128)
    assert [x.min() / 2, y.min() / 3, (x.max() + 1) / 2, (y.max() + 1) / 3] == [25, 20, 75, 60]


@pytest.mark.slow
@browser
@pytest.mark.parametrize(("picture", "window"), [((300, 600), (1280, 1200)), ((900, 700), (500, 1200))])
def test_boxes_land_where_the_model_put_them(tmp_path, picture, window):
    reading = dataclasses.replace(READING, boxes=(BOX,))
    pixels = screenshot(tmp_path, reading_page(reading, [shown(*picture)]), size=window)
    blue, yellow = is_color(pixels, BLUE), is_color(pixels, (255, 210, 63))
    rows, columns = np.flatnonzero(blue.any(axis=1)), np.flatnonzero(blue.any(axis=0))
    top, height = rows[0], rows[-1] + 1 - rows[0]
    left, width = columns[0], columns[-1] + 1 - columns[0]
    assert abs(width / height - picture[0] / picture[1]) < 0.02 * picture[0] / picture[1]
    x1, y1, x2, y2 = BOX.percent
    across = np.flatnonzero(yellow[round(top + height * (y1 + y2) / 200), left : left + width])
    down = np.flatnonzero(yellow[top : top + height, round(left + width * (x1 + x2) / 200)])
    # The stroke is 2 px wide, half of it on either side of the edge. The label stands over the top left corner.
    assert abs(across[0] + 1 - width * x1 / 100) <= 1.5 and abs(across[-1] - width * x2 / 100) <= 1.5
    assert abs(down[-1] - height * y2 / 100) <= 1.5
    assert np.abs(down + 1 - height * y1 / 100).min() <= 1.5


@pytest.mark.slow
@browser
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_findings_come_first_on_a_phone_and_beside_the_picture_on_a_desktop(tmp_path, width):
    pictures = [shown(300, 400, name="prior.dcm"), shown(300, 400, name="n" * 200 + ".dcm")]
    images = (*READING.images, *READING.images)
    history = [{"role": "user", "content": "q" * 300}, {"role": "assistant", "content": "a" * 300}]
    page = reading_page(dataclasses.replace(READING, images=images, boxes=(BOX,)), pictures, history=history)
    script = """
        const d = document.querySelector('iframe').contentDocument;
        const at = s => d.querySelector(s).getBoundingClientRect();
        document.body.dataset.found = JSON.stringify([at('.chips').bottom, at('.pictures').top, at('.pictures').bottom,
            at('.rest').top, at('.result').top, at('.chips').left - at('.pictures').right, d.body.scrollWidth,
            ...[...d.querySelectorAll('.scroll, figcaption')].map(s => s.scrollWidth - s.clientWidth)]);
    """
    frame = f'<iframe width="{width}" height="800" srcdoc="{escape(page)}"></iframe>'
    dom = chromium(tmp_path, f"{frame}<script>onload = () => {{ {script} }}</script>", "--dump-dom").stdout
    chips, picture, end, rest, top, beside, wide, *hidden = json.loads(re.search(r'data-found="([^"]+)"', dom)[1])
    assert wide <= width and hidden and max(hidden) == 0
    if width < 820:
        assert chips < picture and end < rest and chips < 800
    else:
        assert top == picture and beside > 0


@pytest.mark.slow
@browser
def test_light_and_dark_follow_the_reader(tmp_path):
    html = reading_page(READING)
    light = screenshot(tmp_path, html)
    dark = screenshot(tmp_path, html.replace("(prefers-color-scheme: dark)", "all"))
    assert light.mean() > 200 and dark.mean() < 60


@pytest.mark.slow
@browser
def test_the_page_is_never_wider_than_the_window(tmp_path):
    long = dataclasses.replace(
        READING, boxes=(BOX,), reasoning="x" * 3000, text="y" * 3000, prompt="p" * 300, unknown_labels=("z" * 300,)
    )
    page = escape(reading_page(long, [shown(3000, 300)]))
    widths = (360, 820, 1280)
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{page}"></iframe>' for width in widths)
    script = "d.textContent = [...document.querySelectorAll('iframe')].map(f => f.contentDocument.body.scrollWidth)"
    wrapper = f'{frames}<p id="d"></p><script>onload = () => {{ {script} }}</script>'
    dom = chromium(tmp_path, wrapper, "--dump-dom").stdout
    found = [int(width) for width in re.search(r'<p id="d">([\d,]+)</p>', dom)[1].split(",")]
    assert all(0 < width <= frame for width, frame in zip(found, widths, strict=True)), found


@pytest.mark.slow
@browser
def test_a_browser_finds_no_fault_and_asks_nobody(tmp_path):
    log = tmp_path / "net.json"
    asked = "http://127.0.0.1:9/x"
    hostile = poisoned(READING, f"<img src={asked}>")
    out = chromium(tmp_path, reading_page(hostile, [shown(50, 100)]), f"--log-net-log={log}", "--dump-dom")
    assert "CONSOLE" not in out.stderr and f'"url":"{asked}"' not in log.read_text()
    # The same two checks see a page that does err and does ask.
    out = chromium(tmp_path, f"<script>x</script><img src={asked}>", f"--log-net-log={log}", "--dump-dom")
    assert "CONSOLE" in out.stderr and f'"url":"{asked}"' in log.read_text()
