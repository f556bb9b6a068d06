"""The HTML page of a reading: harmless whatever a server sends, complete, and right when a browser draws it."""

import dataclasses
import io
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from test_dicom import dataset_of, file_bytes

from cxr_triton.client.page import draw, reading_page
from cxr_triton.dicom import read_image
from cxr_triton.display import render
from cxr_triton.reading import Box, Finding, Reading

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium")

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
    images=({"rows": 200, "columns": 100, "size": [200, 100], "grid": [34, 16], "preset": "as_is", "flags": ["lossy"],
             "photometric": "MONOCHROME2", "percentiles": [3, 250]},),
    usage={"prompt_tokens": 300, "completion_tokens": 101, "image_tokens": 136},
    timings_ms={"image_decode": 10.0, "preprocess": 20.0, "vision": 70.0, "queue": 0.0, "prefill": 100.0,
                "decode": 800.0, "report": 0.5, "first_token": 200.0, "total": 1000.5},
    notice="A test double answered.",
)  # fmt: skip
BLUE = (0, 0, 255)


def png(width: int, height: int, color=BLUE) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), color).save(out, "PNG")
    return out.getvalue()


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self._hidden = [], [], [], False
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]
        self._hidden = tag in ("style", "script")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.texts.append(data)


def test_the_page_says_everything_a_reader_needs():
    text = Page(reading_page(READING, [png(50, 100)])).text
    for part in (
        "Not for diagnosis", "A test double answered.", "Test Model reading", "findings", READING.prompt,
        "Cardiomegaly", "Heart:", "No effusion.", "Lossy compression", "r1", "fp32", "sha256:00", "100 × 200 px",
        "read at 224 × 476 px", "as_is", "MONOCHROME2", "800.0 ms", "1.00 s", "300", "125.0 tokens/s",
        "<think> raw <b>text</b> </think>",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("status", ["malformed", "truncated", "out_of_vocabulary", "doubtful_image"])
def test_a_status_other_than_ok_is_explained(status):
    bare = dataclasses.replace(READING, status=status, findings=(), answer=None, reasoning=None)
    text = Page(reading_page(bare)).text
    assert f"This answer is {status.replace('_', ' ')}:" in text and "no answer that could be read" in text


def test_every_kind_of_answer_is_shown():
    kinds = {
        "Yes": dataclasses.replace(READING, findings=(), options=("Yes",)),
        "Clear lungs.": dataclasses.replace(READING, findings=(), answer="Clear lungs.", report="Clear lungs."),
        "Kardiomegaly": dataclasses.replace(READING, findings=(), unknown_labels=("Kardiomegaly",)),
        "pneumothorax": dataclasses.replace(READING, findings=(), boxes=(BOX,)),
    }
    for shown, reading in kinds.items():
        assert shown in Page(reading_page(reading, [png(50, 100)])).text


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
    pictures = [png(50, 100)]
    page, harmless = (Page(reading_page(poisoned(reading, text), pictures)) for text in (poison, "harmless"))
    assert [tag for tag in page.tags if tag != "strong"] == [tag for tag in harmless.tags if tag != "strong"]
    assert page.attributes == harmless.attributes
    assert not set("\x00\x1b\u202e\ud800") & set(page.text)
    for char in poison:
        assert char in page.text or char in "\x00\x1b\u202e\ud800 *"


def test_nothing_on_the_page_points_elsewhere():
    html = reading_page(dataclasses.replace(READING, boxes=(BOX,)), [png(50, 100)])
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
    shown = np.asarray(Image.open(io.BytesIO(picture)))
    assert shown.dtype == np.uint8 and 1000_000 < shown.size <= 1024 * 1024
    full = Image.fromarray(render(read_image(data), preset).pixels)
    expected = np.asarray(full.resize(shown.shape[::-1], Image.Resampling.BICUBIC))
    assert np.array_equal(shown, expected)


def test_a_box_frames_the_same_pixels_where_they_are_not_square():
    stored = np.zeros((100, 200), np.uint16)
    stored[20:60, 50:150] = 4000
    data = file_bytes(dataset_of(stored, 12, PixelSpacing=["0.3", "0.1"]))
    reading = dataclasses.replace(READING, images=({"preset": "voi_display"},))
    (picture,) = draw([data], reading, unchecked_reading=True)
    shown = np.asarray(Image.open(io.BytesIO(picture)))
    assert shown.shape == (300, 200)
    y, x = np.nonzero(shown > 128)
    assert [x.min() / 2, y.min() / 3, (x.max() + 1) / 2, (y.max() + 1) / 3] == [25, 20, 75, 60]


def chromium(tmp_path, html: str, *args, size=(1280, 900)) -> subprocess.CompletedProcess:
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-default-apps", "--disable-sync", "--no-first-run",
        "--hide-scrollbars", "--force-device-scale-factor=1", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size[0]},{size[1]}", *args, path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def screenshot(tmp_path, html: str, **kwargs) -> np.ndarray:
    out = tmp_path / "page.png"
    chromium(tmp_path, html, f"--screenshot={out}", **kwargs)
    return np.asarray(Image.open(out).convert("RGB")).astype(int)


def is_color(pixels: np.ndarray, color, tolerance: int = 40) -> np.ndarray:
    return (np.abs(pixels - np.array(color)) <= tolerance).all(axis=-1)


@browser
@pytest.mark.parametrize(("picture", "window"), [((300, 600), (1280, 1200)), ((900, 700), (500, 1200))])
def test_boxes_land_where_the_model_put_them(tmp_path, picture, window):
    reading = dataclasses.replace(READING, boxes=(BOX,))
    pixels = screenshot(tmp_path, reading_page(reading, [png(*picture)]), size=window)
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


@browser
def test_light_and_dark_follow_the_reader(tmp_path):
    html = reading_page(READING)
    light = screenshot(tmp_path, html)
    dark = screenshot(tmp_path, html.replace("(prefers-color-scheme: dark)", "all"))
    assert light.mean() > 200 and dark.mean() < 60


@browser
def test_the_page_is_never_wider_than_the_window(tmp_path):
    long = dataclasses.replace(
        READING, boxes=(BOX,), reasoning="x" * 3000, text="y" * 3000, prompt="p" * 300, unknown_labels=("z" * 300,)
    )
    page = escape(reading_page(long, [png(3000, 300)]))
    widths = (360, 820, 1280)
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{page}"></iframe>' for width in widths)
    script = "d.textContent = [...document.querySelectorAll('iframe')].map(f => f.contentDocument.body.scrollWidth)"
    wrapper = f'{frames}<p id="d"></p><script>onload = () => {{ {script} }}</script>'
    dom = chromium(tmp_path, wrapper, "--dump-dom").stdout
    found = [int(width) for width in re.search(r'<p id="d">([\d,]+)</p>', dom)[1].split(",")]
    assert all(0 < width <= frame for width, frame in zip(found, widths, strict=True)), found


@browser
def test_a_browser_finds_no_fault_and_asks_nobody(tmp_path):
    log = tmp_path / "net.json"
    asked = "http://127.0.0.1:9/x"
    hostile = poisoned(READING, f"<img src={asked}>")
    out = chromium(tmp_path, reading_page(hostile, [png(50, 100)]), f"--log-net-log={log}", "--dump-dom")
    assert "CONSOLE" not in out.stderr and f'"url":"{asked}"' not in log.read_text()
    # The same two checks see a page that does err and does ask.
    out = chromium(tmp_path, f"<script>x</script><img src={asked}>", f"--log-net-log={log}", "--dump-dom")
    assert "CONSOLE" in out.stderr and f'"url":"{asked}"' in log.read_text()
