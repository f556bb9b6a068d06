"""An HTML page for tests: its tags and texts, and Chromium to draw it."""

import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium")


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


def chromium(tmp_path, html: str, *args, size=(1280, 900)) -> subprocess.CompletedProcess:
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-default-apps", "--disable-sync", "--no-first-run",
        "--hide-scrollbars", "--force-device-scale-factor=1", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size[0]},{size[1]}", *args, path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def screenshot(tmp_path, html: str, **kwargs) -> np.ndarray:
    out = tmp_path / "page.png"
    chromium(tmp_path, html, f"--screenshot={out}", **kwargs)
    return np.asarray(Image.open(out).convert("RGB")).astype(int)


def is_color(pixels: np.ndarray, color, tolerance: int = 40) -> np.ndarray:
    return (np.abs(pixels - np.array(color)) <= tolerance).all(axis=-1)
