"""Software that reads a checkpoint itself, and the requests of a workload as it takes them."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cxr_triton.export.geometry import read_config, tensor_shapes

if TYPE_CHECKING:
    from cxr_triton.profile import ModelProfile

_VERSIONS = """
import importlib.metadata, json
found = {each.metadata["Name"].replace("_", "-"): each.version for each in importlib.metadata.distributions()}
print(json.dumps(found))
"""


class Peer:
    """One of them, made in a process of its own from `prepare`'s folder, a profile and the workload's items.

    One that runs `elsewhere` gets `plain` requests in the place of profile and items, or nothing if it only decodes. It
    imports nothing of ours that needs more than Python's own library and numpy.

    Attributes
    ----------
    title : str
        As a result names it.
    packages : tuple of str
        Distributions, by whose versions a number is to be understood; the first has to be installed.
    scope : str
        What of a reading it does: ``reading``, all of it, or ``decoder``.
    variable : str
        Environment variable that names the Python which has `packages`; ours if it is not set.
    elsewhere : bool
        Its process is of that Python.
    talks : bool
        It has `ask`.
    guesses : bool
        It has `guess`.
    """

    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    scope: ClassVar[str] = "reading"
    variable: ClassVar[str] = ""
    elsewhere: ClassVar[bool] = False
    talks: ClassVar[bool] = False
    guesses: ClassVar[bool] = False

    @classmethod
    def python(cls) -> str:
        """Interpreter with `packages`."""
        return os.environ.get(cls.variable) or sys.executable

    @classmethod
    def missing(cls) -> str:
        """Why it cannot run here; empty if it can."""
        if cls.packages[0] in cls.versions():
            return ""
        hint = f" in {cls.python()}, which {cls.variable} names or may name" if cls.variable else ""
        return f"{cls.packages[0]} is not installed{hint}"

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Of those `packages` that its Python has."""
        found = installed(cls.python())
        return {name: found[name] for name in cls.packages if name in found}

    @classmethod
    def prepare(cls, checkpoint: Path, work: Path) -> Path:
        """What to open for a checkpoint; what has to be made of it is made in `work`, unless it is there."""
        return checkpoint

    @classmethod
    def step_bytes(cls, folder: Path, streams: int = 1) -> int:
        """Weights that a step of so many streams reads, in `prepare`'s folder: here of a checkpoint in bf16."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        shapes = tensor_shapes(*read_config(config), True)
        return sum(2 * math.prod(shape) for name, shape in shapes.items() if name.startswith("language_model."))

    def write(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict:
        """Greedy answers to prompts of token ids, all at once and all of so many tokens: what `told` gives."""
        raise NotImplementedError

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

    def ask(self, index: int, request: dict) -> dict:
        """A turn of a conversation, with whatever earlier turns about the same item left known.

        Parameters
        ----------
        index : int
            Of the item, whose pictures it is about.
        request : dict
            REQUEST, with ``max_new_tokens``.

        Returns
        -------
        dict
            As of `read`, with a ``text``, and the ``prompt`` as the model got it.
        """
        raise NotImplementedError

    def guess(self, index: int, texts: Sequence[list[int]], chosen: int) -> dict:
        """A reading as of `read`, whose answer is one of recorded texts of tokens, the others known to who guesses.

        Parameters
        ----------
        index : int
            Of the item.
        texts : list of list of int
        chosen : int
            Which of them is written.

        Returns
        -------
        dict
            As of `read`, with how many tokens were ``drafted`` and ``accepted``.
        """
        raise NotImplementedError

    def processes(self) -> list[int]:
        """Ids of those whose memory is its own."""
        return [os.getpid()]

    def close(self) -> None:
        """Stop what it started."""


@functools.cache
def installed(python: str) -> dict[str, str]:
    """Versions of all distributions that an interpreter has; none where it does not run."""
    try:
        done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return {}
    return json.loads(done.stdout) if done.returncode == 0 else {}


def told(started_s: float, arrivals: Sequence[Sequence[float]]) -> dict:
    """When the last stream had its first token, and tokens per second of all streams while all wrote, if they did.

    Parameters
    ----------
    started_s : float
        When the prompts were given.
    arrivals : sequence of sequence of float
        When each token of each stream came.
    """
    began_s, ended_s = max(each[0] for each in arrivals), min(each[-1] for each in arrivals)
    tokens = sum(began_s < at_s <= ended_s for each in arrivals for at_s in each)
    return {"first_s": began_s - started_s, "tokens_per_s": tokens / (ended_s - began_s) if tokens else None}


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


def plain(checkpoint: Path, profile: ModelProfile, items: Sequence[tuple[list[bytes], dict]]) -> list:
    """Of each request its pictures, as (rows, columns, 3) and the bytes of that uint8 array, and its whole prompt."""
    from cxr_triton.template import ChatTemplate

    prompts = Prompts(str(checkpoint), profile, items)
    template = ChatTemplate((checkpoint / "chat_template.jinja").read_text("utf-8"))
    return [
        (
            [((each.height, each.width, 3), each.tobytes()) for each in pictures],
            template.render(asked.messages(len(pictures))),
        )
        for pictures, asked in zip(prompts.pictures, prompts.asked, strict=True)
    ]
