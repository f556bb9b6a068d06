"""Uploaded files are decoded and drawn in processes of their own, several at the same time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import queue
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from cxr_triton.client.objects.source import source_header
from cxr_triton.client.ui.sessions import Picture, Preset
from cxr_triton.errors import InvalidImage
from cxr_triton.pixels.display import PRESETS
from cxr_triton.pixels.plausibility import VIEWS
from cxr_triton.pixels.sandbox import Prepared, Sandbox
from cxr_triton.profile import ModelProfile

MODEL = "model"
"""The preset with which the model sees a picture."""
TITLES = {"mimic_jpg": "Equalized greys", "voi_display": "As the file asks for", "as_is": "As the file has it"}
KINDS = {"window": "Window", "lut": "LUT"}
MOST_PIXELS = 24_000_000
"""Of a picture that is shown; the file of one with more is shown smaller."""
Result = TypeVar("Result")


class Decoders:
    """`Sandbox`es, each with a thread that waits for it.

    Parameters
    ----------
    count : int
    """

    def __init__(self, count: int):
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="cxr-ui-decoder")
        self._free = asyncio.Semaphore(count)
        self._sandboxes: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
        self._all = [Sandbox() for _ in range(count)]
        for sandbox in self._all:
            self._sandboxes.put(sandbox)
        self._key = secrets.token_bytes(32)

    @property
    def most_bytes(self) -> int:
        """Of a file."""
        return self._all[0].limits.max_file_bytes

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for sandbox in self._all:
            sandbox.close()

    async def look(self, data: bytes, file_name: str, profile: ModelProfile | None) -> Picture:
        """What a file shows, drawn as the model of `profile` would see it.

        Raises
        ------
        InvalidImage
            Or one of its subclasses, as `Sandbox.prepare` does; `NotAChest` where the profile refuses what is none.
        """
        preset = profile.pixel_preset if profile else PRESETS[0]
        policy, views = (profile.not_a_chest, profile.views) if profile else ("flag", VIEWS)

        def looked(sandbox: Sandbox) -> Picture:
            prepared = _prepared(sandbox, data, Preset(preset), policy, views)
            shown = prepared.facts["preset"]
            height, width = prepared.pixels.shape[:2]
            return Picture(
                file_name=file_name,
                data=data,
                facts=prepared.facts,
                width=width,
                height=height,
                presets=_presets(shown, prepared.windows),
                patient=self._patient(data) if prepared.facts["format"] == "dicom" else "",
                pngs={MODEL: _png(prepared.pixels)},
            )

        return await self._run(looked)

    async def draw(self, picture: Picture, preset: str) -> bytes:
        """PNG of a picture by one of its presets; raises as `Sandbox.prepare` does."""
        return await self._run(
            lambda sandbox: _png(_prepared(sandbox, picture.data, picture.presets[preset], None, VIEWS).pixels)
        )

    async def beside(self, function: Callable[[], Result]) -> Result:
        """What a function gives that takes long, run on one of the threads once one is free.

        None queues for a thread, as what is given up there would stay in memory until its turn.
        """
        await self._free.acquire()
        work = asyncio.get_running_loop().run_in_executor(self._threads, function)
        work.add_done_callback(self._freed)
        return await asyncio.shield(work)

    def _freed(self, work: asyncio.Future) -> None:
        self._free.release()
        if not work.cancelled():
            work.exception()  # whoever asked for it may have left

    async def _run(self, use: Callable[[Sandbox], Result]) -> Result:
        def used() -> Result:
            sandbox = self._sandboxes.get()  # there are as many as threads
            try:
                return use(sandbox)
            finally:
                self._sandboxes.put(sandbox)

        return await self.beside(used)

    def _patient(self, data: bytes) -> str:
        """Digest of a file's Patient ID, by a key that ends with the process."""
        try:
            patient = str(source_header(data).get("PatientID") or "").strip()
        except InvalidImage:  # its pixels are read all the same
            return ""
        return hmac.new(self._key, patient.encode("utf-8", "replace"), hashlib.sha256).hexdigest() if patient else ""


def presets(picture: Picture, is_models: bool) -> list[dict[str, str]]:
    """What the page is told of the ways to show a picture, of which the first `is_models` for every server, or not."""
    titles = {name: preset.title or TITLES[preset.render] for name, preset in picture.presets.items()}
    if is_models and picture.presets[MODEL].render != "as_is":
        titles[MODEL] = "As the model sees it"
    return [{"name": name, "title": title} for name, title in titles.items()]


def _presets(shown: str, windows: Sequence[tuple[str, int, str]]) -> dict[str, Preset]:
    """Those of a picture that the model sees by the preset `shown`, and whose file has such further windows."""
    model = {MODEL: Preset(shown)}
    if shown == "as_is":
        return model
    others = {other: Preset(other) for other in PRESETS if other != shown}
    return (
        model
        | others
        | {f"window-{index}": Preset("voi_display", index, _titled(*window)) for index, window in enumerate(windows)}
    )


def _titled(kind: str, number: int, words: str) -> str:
    """A title that shows which words are the file's, whatever they are."""
    numbered = f"{KINDS[kind]} {number}"
    return f"{numbered}: “{words}”" if words else numbered


def _prepared(sandbox: Sandbox, data: bytes, preset: Preset, not_a_chest: str | None, views: Sequence[str]) -> Prepared:
    return sandbox.prepare(
        data,
        preset="mimic_jpg" if preset.render == "as_is" else preset.render,  # of a display-ready file it changes nothing
        min_pixels=1,
        max_pixels=MOST_PIXELS,
        factor=1,
        not_a_chest=not_a_chest,
        views=views,
        window=preset.window,
    )


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
