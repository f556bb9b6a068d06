"""How much later than in the gRPC client the first text of a reading stands in the page of the reading room.

    python tests/integration/ui_first_text.py build/demo/repository --json docs/results/ui-first-text.json

Chromium has a phantom read again and again: alone, and beside visitors who ask again once they are answered. The
reading room is a process of its own, which tells when the first text of each reading came out of its gRPC client; the
page tells when it was in the document, and when the next frame was drawn. Both read the clock of this machine; how far
apart their readings of it may be is told too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import click
import numpy as np
from ui_memory import ask

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from browser import Browser, Tab
from chromium import CHROMIUM

from cxr_triton import phantom
from cxr_triton.cli import json_option, write_json
from cxr_triton.perf.environment import environment
from cxr_triton.phantom_file import write_dicom
from cxr_triton.triton_repo.serve import Server

PER_TAB = 25
NOW = "performance.timeOrigin + performance.now()"
WATCH = f"""(() => {{
  const drawn = () => new Promise((go) => requestAnimationFrame(() => setTimeout(() => go({NOW}))));
  const known = new WeakSet();
  window.first = [];
  new MutationObserver(() => {{
    const place = document.querySelector("article[aria-busy] .coming");
    if (!place?.textContent || known.has(place.closest("article"))) return;
    known.add(place.closest("article"));
    const seen = {{ document: {NOW} }};
    drawn().then((at) => first.push({{ ...seen, frame: at }}));
  }}).observe(document.body, {{ childList: true, subtree: true, characterData: true }});
}})()"""
"""Keeps, of each reading, when its first text was in the document, and when it was drawn; ms since 1970."""


def tell_first_texts() -> None:
    """Make readings of this process tell on standard output when the first text of each came: not a tag around it."""
    from cxr_triton.client.aio import AsyncReadingStream
    from cxr_triton.client.ui.readings import Readings
    from cxr_triton.split import Splitter

    begun, following, known = Readings._begun, AsyncReadingStream.__anext__, {}

    async def named(self, session, body):
        writing = await begun(self, session, body)
        known[id(writing.stream)] = writing.asked.name, Splitter(writing.checked.grammar)
        return writing

    async def timed(self):
        text = await following(self)
        at_s = time.time()
        if id(self) in known:
            name, splitter = known[id(self)]
            if any(part for _, part in splitter.push(text)):
                print(json.dumps({"reading": name, "at_s": at_s}), flush=True)
                del known[id(self)]
        return text

    Readings._begun, AsyncReadingStream.__anext__ = named, timed


class Room:
    """`cxr-triton ui` as a process; `first_s` has when the first text of each reading was in its client."""

    def __init__(self, url: str):
        start = "import ui_first_text as it; it.tell_first_texts(); from cxr_triton.cli import main; main()"
        command = [sys.executable, "-c", start, "ui", "--url", url, "--port", "0", "--json", "-"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parent
        )
        told = ""
        while not told.endswith("\n}\n"):
            line = self._process.stdout.readline()
            if not line:
                raise click.ClickException(f"cxr-triton ui ended with {self._process.wait()} before it listened")
            told += line
        self.address = json.loads(told)["address"]
        self.first_s: dict[str, float] = {}
        self._listening = threading.Thread(target=self._listen)
        self._listening.start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            told = json.loads(line)
            self.first_s[told["reading"]] = told["at_s"]

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *exception) -> None:
        self._process.terminate()
        self._listening.join()
        self._process.wait()


@contextlib.contextmanager
def others(door: str, count: int):
    """So many visitors who read a picture of their own; the names of their readings."""
    names, is_over = set(), threading.Event()

    def visit(number: int) -> None:
        data = write_dicom(phantom.draw(np.random.default_rng(90_000 + number)))
        while not is_over.is_set():
            path = "/api/sessions/" + json.loads(ask(door, "/api/sessions", b"{}"))["session"]
            picture = json.loads(ask(door, path + "/pictures", data, "application/octet-stream"))["picture"]
            for _ in range(PER_TAB):
                lines = ask(door, path + "/readings", json.dumps({"pictures": [picture]}).encode()).splitlines()
                names.add(json.loads(lines[0])["reading"])
                if is_over.is_set():
                    break
            ask(door, path + "/end", b"")

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield names
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


async def apart_ms(page: Tab) -> list[float]:
    """Least and most that the page's clock may be ahead of ours."""
    least, most = -np.inf, np.inf
    for _ in range(50):
        before = time.time()
        theirs = await page.evaluate(NOW)
        least, most = max(least, theirs - 1e3 * time.time()), min(most, theirs - 1e3 * before)
    return [round(float(least), 2), round(float(most), 2)]


async def read(folder: Path, address: str, readings: int) -> tuple[list[dict], list[list[float]]]:
    """When the first text of each of so many readings was in the document; how far apart the clocks were."""
    (folder / "chest.dcm").write_bytes(write_dicom(phantom.draw(np.random.default_rng(89_999))))
    seen, apart = [], []
    async with Browser(folder) as chromium:
        while len(seen) < readings:
            async with chromium.tab() as page:
                await page.go(address, "document.querySelector('#question .choices')")
                await page.choose("#files", folder / "chest.dcm")
                await page.until("document.querySelector('.pane figcaption')?.textContent.includes('%')")
                await page.evaluate(WATCH)
                for count in range(1, PER_TAB + 1):
                    await page.evaluate("document.querySelector('#question .primary').click()")
                    await page.until(f"first.length === {count} && document.querySelector('.files')")
                seen += await page.evaluate("first")
                apart.append(await apart_ms(page))
    return seen, apart


def measured(url: str, readings: int, visitors: int) -> dict:
    with (
        Room(url) as room,
        tempfile.TemporaryDirectory() as folder,
        others(urlsplit(room.address).netloc, visitors) as names,
    ):
        seen, apart = asyncio.run(read(Path(folder), room.address, readings))
    came_s = [at_s for name, at_s in room.first_s.items() if name not in names]
    if len(came_s) != len(seen):
        raise click.ClickException(f"{len(came_s)} readings were begun, and {len(seen)} seen")
    told = {
        "others": visitors,
        "readings": len(seen),
        "clocks_apart_ms": [min(low for low, _ in apart), max(high for _, high in apart)],
    }
    for place in ("document", "frame"):
        late = [at[place] - 1e3 * came for at, came in zip(seen, came_s, strict=True)]
        told[f"{place}_ms"] = {f"p{share}": round(float(np.percentile(late, share)), 2) for share in (50, 95, 99)}
    return told


@click.command(help=__doc__)
@click.argument("repository", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--readings", default=200, show_default=True)
@click.option("--others", "counts", type=int, multiple=True, default=(0, 15), show_default=True)
@json_option
def main(repository, readings, counts, json_path):
    runs = []
    with Server(repository, grpc_port=0, metrics_port=0) as server:
        for count in counts:
            runs.append(measured(server.grpc, readings, count))
            click.echo(json.dumps(runs[-1]), err=True)
    chromium = subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True).stdout.strip()
    result = {
        "schema": 1,
        "command": ["python", *sys.argv],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**environment(), "chromium": chromium},
        "runs": runs,
    }
    write_json(result, json_path)


if __name__ == "__main__":
    main()
