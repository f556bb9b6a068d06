"""Peers for tests: each says in a file when its process began, which others were alive then, and what it was asked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from cxr_triton.perf.peers.peer import Peer


class Fake(Peer):
    """As fast as it says."""

    title, packages, first_s, tokens_per_s = "fake", ("numpy",), 0.5, 8.0

    @classmethod
    def step_bytes(cls, folder: Path, streams: int = 1) -> int:
        return 1_000_000

    def __init__(self, folder: str, profile, items):
        self.log = Path(folder) / "log"
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        before = {json.loads(line)["pid"] for line in lines}
        self._say(began=self.title, alive=[pid for pid in before if Path(f"/proc/{pid}").exists()])

    def write(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, float]:
        self._say(streams=len(prompts), lengths=sorted({len(ids) for ids in prompts}), tokens=tokens)
        return {"first_s": self.first_s * len(prompts), "tokens_per_s": self.tokens_per_s * len(prompts)}

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        self._say(read=tokens)
        return {"prompt_tokens": 7, "tokens": tokens, "first_s": 1.0, "seconds": 1.25}

    def close(self) -> None:
        self._say(closed=self.title)

    def _say(self, **what) -> None:
        with self.log.open("a") as file:
            print(json.dumps({"pid": os.getpid(), **what}), file=file)


class Guessing(Fake):
    """One that writes recorded texts too."""

    title, guesses = "guessing", True

    def guess(self, index: int, texts: Sequence[list[int]], chosen: int) -> dict:
        self._say(guess=texts[chosen])
        return self.read(index, 0, len(texts[chosen])) | {"seconds": 0.75, "drafted": 4, "accepted": 3}


class Other(Fake):
    """Half as fast, without pictures."""

    title, scope, first_s, tokens_per_s = "other", "decoder", 1.0, 4.0


class Foreign(Exception):
    """Of a library that the parent need not have."""


Foreign.__module__ = "a_library"


class Unready(Fake):
    """Does not load, and takes its time to go."""

    def __init__(self, folder: str, profile, items):
        super().__init__(folder, profile, items)
        raise Foreign("no weights")


class Failing(Fake):
    """Takes no crowd."""

    title = "failing"

    def write(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, float]:
        if len(prompts) == 8:
            raise Foreign("no room for 8")
        return super().write(prompts, tokens)
