"""What the parts of the gate share: an engine, a reference, the cases that both are asked and what they answered."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsFloat

import numpy as np

from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.verify.answers import Answer
from cxr_triton.engines.verify.engine_under_test import EngineUnderTest
from cxr_triton.engines.verify.reference import Case, Reference
from cxr_triton.engines.verify.thresholds import THRESHOLDS

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is."""
Judged = tuple[list[dict], Mapping[str, object]]
"""What a part gives: its checks, and what else it measured."""


@dataclass(kw_only=True, eq=False)
class Trial:
    """One run of the gate; each part takes it and gives a `Judged`.

    Attributes
    ----------
    bundle, runs : Bundle
        What is judged, and what runs here: itself or its stand-in.
    reference : Reference
    cases : sequence of Case
        What both are asked; the reference at once.
    limits : dict
        Of every threshold.
    quantized : path or None
        Checkpoint that the engine was exported from, if it is not the reference's.
    threads : int or None
        CPU threads of the engine.
    say : Progress
    theirs : list of Answer
        The reference's.
    details : list of dict
        Of each case what a page shows; the parts add to it.
    """

    bundle: Bundle
    runs: Bundle
    reference: Reference
    cases: Sequence[Case]
    limits: dict[str, float]
    quantized: str | Path | None
    threads: int | None
    say: Progress

    def __post_init__(self):
        self.theirs = self.reference.read(self.cases, self.counter("reference reads", len(self.cases)))
        self.details: list[dict] = [
            {
                "sha256": hashlib.sha256(case.image).hexdigest(),
                "request": json.loads(case.request),
                "reference": answer.raw(),
            }
            for case, answer in zip(self.cases, self.theirs, strict=True)
        ]

    @functools.cached_property
    def engine(self) -> EngineUnderTest:
        """Opened by the first part that needs it, so that what cannot be opened fails its parts."""
        return EngineUnderTest(self.runs, self.threads)

    @functools.cached_property
    def ours(self) -> list[Answer]:
        """The engine's answers to the cases."""
        return self.read(self.cases, "engine reads")

    def read(self, cases: Sequence[Case], what: str) -> list[Answer]:
        """The engine's answers to any cases; `what` is for who looks on."""
        return self.engine.read(cases, self.reference.profile, self.counter(what, len(cases)))

    def check(self, name: str, value: SupportsFloat, what: str = "") -> dict:
        """One measurement against its threshold; a value that is not finite fails."""
        limit, value, at_least = self.limits[name], float(value) + 0.0, THRESHOLDS[name].at_least  # no minus zero
        return {
            "name": name + (f", {what}" if what else ""),
            "value": value if math.isfinite(value) else None,
            "limit": limit,
            "at_least": at_least,
            "passed": math.isfinite(value) and (value >= limit if at_least else value <= limit),
        }

    def counter(self, what: str, total: int) -> Callable[[int], None]:
        """Something to call with how much more is done."""
        done = 0
        self.say(what, 0, total)

        def count(more: int) -> None:
            nonlocal done
            done += more
            self.say(what, done, total)

        return count

    def close(self) -> None:
        """End the processes of the engine, if it was opened."""
        if "engine" in self.__dict__:
            self.engine.close()


def finite(value):
    """Plain values for JSON, which has no NaN: what is not finite becomes None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
