"""Software that reads a checkpoint itself, and the requests of a workload as it takes them."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from cxr_triton.profile import ModelProfile


class Peer:
    """One of them, made in a process of its own from `prepare`'s folder, a profile and the workload's items.

    Attributes
    ----------
    title : str
        As a result names it.
    packages : tuple of str
        Distributions, by whose versions a number is to be understood; the first has to be installed.
    module : str
        Of the first.
    scope : str
        What of a reading it does: ``reading``, all of it, or ``decoder``.
    """

    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    module: ClassVar[str]
    scope: ClassVar[str] = "reading"

    @classmethod
    def missing(cls) -> str:
        """Why it cannot run here; empty if it can."""
        return "" if importlib.util.find_spec(cls.module) else f"{cls.packages[0]} is not installed"

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Of `packages`."""
        return {package: metadata.version(package) for package in cls.packages}

    @staticmethod
    def prepare(folder: Path, stack: ExitStack) -> Path:
        """What to open for a checkpoint; anything made for it goes with `stack`."""
        return folder

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        """One reading of so many tokens.

        Parameters
        ----------
        index : int
            Of the item.
        prompt_tokens, tokens : int
            As our reading of the item had.

        Returns
        -------
        dict
            ``prompt_tokens``, ``tokens``, ``first_s`` (None where it cannot be told) and ``seconds``; ``text`` of who
            writes one.
        """
        raise NotImplementedError

    def processes(self) -> list[int]:
        """Ids of those whose memory is its own."""
        return [os.getpid()]

    def close(self) -> None:
        """Stop what it started."""


class Prompts:
    """The workload's requests as a peer takes them; decoding of files is done before, and costs it nothing.

    Parameters
    ----------
    checkpoint : str
        Folder with tokenizer and template.
    profile : ModelProfile
    items : sequence of (list of bytes, dict)
        Image files and REQUEST of each.
    """

    def __init__(self, checkpoint: str, profile: ModelProfile, items: Sequence[tuple[list[bytes], dict]]):
        from PIL import Image

        from cxr_triton.chat import ChatTokenizer
        from cxr_triton.pixels.sandbox import Sandbox
        from cxr_triton.request import ReadRequest

        generation = Path(checkpoint) / "generation_config.json"
        self.profile = profile.merge_generation_config(json.loads(generation.read_text("utf-8")))
        self.tokenizer = ChatTokenizer(checkpoint)
        self.asked = [ReadRequest.from_json(json.dumps(request), self.profile) for _, request in items]
        preset = profile.pixel_preset
        with Sandbox() as sandbox:

            def picture(data: bytes) -> Image.Image:
                whole = sandbox.prepare(data, preset=preset, min_pixels=1, max_pixels=2**31, factor=1)
                return Image.fromarray(whole.pixels).convert("RGB")

            self.pictures = [[picture(data) for data in images] for images, _ in items]
