"""What is asked about a case, and what its readings make of its row."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cxr_triton.evaluate.config import Data
from cxr_triton.evaluate.dataset import Case
from cxr_triton.evaluate.rows import Answer, Box, Row
from cxr_triton.profile import PLACEHOLDER
from cxr_triton.reading import STATUSES, Reading, parse

DEFAULTS: dict[str, tuple[str | None, dict[str, str]]] = {
    "labels": (None, {}),
    "report": (None, {}),
    "options": ("vqa", {"question": "{question}", "options": "{options}"}),
    "boxes": ("phrase_grounding", {"phrase": "{phrase}"}),
}
"""Task, and its variables, of a kind where the data set names neither task nor prompt; None is the profile's own."""
OF_LABELS: dict[str, tuple[str | None, dict[str, str]]] = {
    "set": DEFAULTS["labels"],
    "options": ("diseases", {"options": "{options}"}),
    "each": ("disease", {"disease": "{disease}"}),
}
SAMPLING = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
Values = Mapping[str, str | list[str]]


class Questions:
    """How the cases of a data set are asked, and their answers judged by its vocabulary.

    Attributes
    ----------
    request : dict
        As `cxr_triton.evaluate.rows.Header.request`, without what was sent.
    """

    def __init__(self, data: Data, labels: Sequence[str]):
        self.data, self.labels = data, tuple(labels)
        self.by_label = data.kind == "labels" and data.ask == "each"
        self.by_options = data.kind == "labels" and data.ask == "options"
        task, variables = OF_LABELS[data.ask] if data.kind == "labels" else DEFAULTS[data.kind]
        self._task = data.task or (None if data.prompt else task)
        self._variables = data.variables or ({} if data.prompt or (data.task and data.task != task) else variables)
        self.request: dict[str, Any] = {
            "task": self._task,
            "prompt": data.prompt,
            "mode": data.mode,
            "ask": data.ask if data.kind == "labels" else None,
            "variables": dict(self._variables),
            **{name: getattr(data, name) for name in SAMPLING},
            **({"scores": True} if data.scores else {}),
        }

    def of(self, case: Case) -> Iterator[dict[str, Any]]:
        """Keyword arguments of `cxr_triton.client.AsyncReader.read`, one set for each question."""
        if self.by_label:
            for label in self.labels:
                yield self._asked({**case.variables, "disease": label.lower(), "label": label})
        elif self.by_options:
            yield self._asked({**case.variables, "options": list(self.labels)})
        else:
            yield self._asked(case.variables)

    def _asked(self, values: Values) -> dict[str, Any]:
        data = self.data
        return {
            "task": self._task,
            "prompt": _filled(data.prompt, values) if data.prompt else None,
            "mode": data.mode,
            "variables": {name: _value(text, values) for name, text in self._variables.items()} or None,
            "seed": data.seed if data.temperature else None,
            "identifiers": "hashed",
            "scores": data.scores or None,
            **{name: getattr(data, name) for name in SAMPLING},
        }

    def row(self, case: Case, readings: Sequence[Reading], asked_ms: float) -> Row:
        """The case's row, with the answers to all its questions."""
        answer, fault = self._answer(readings)
        codes = [reading.status for reading in readings if reading.status != "ok"] + ([fault] if fault else [])
        code = min(codes, key=list(STATUSES).index, default="")  # the one that says most against the answer
        flags = dict.fromkeys(flag for reading in readings for flag in _flags(reading))
        sizes = [(facts.get("columns"), facts.get("rows")) for facts in readings[0].images]
        boxes = tuple(_in_pixels(box, sizes) for box in case.row.truth.boxes)
        times = [reading.timings_ms for reading in readings]
        return dataclasses.replace(
            case.row,
            truth=dataclasses.replace(case.row.truth, boxes=boxes),
            answer=answer,
            status="flagged" if code else "ok",
            code=code,
            flags=tuple(flags),
            prompt_tokens=sum(reading.usage.get("prompt_tokens", 0) for reading in readings),
            completion_tokens=sum(reading.usage.get("completion_tokens", 0) for reading in readings),
            times={
                "asked_ms": round(asked_ms, 3),
                **{stage: round(sum(t.get(stage, 0.0) for t in times), 3) for stage in times[0]},
            },
        )

    def _answer(self, readings: Sequence[Reading]) -> tuple[Answer, str]:
        """The answer, and the status that it has for what it lacks."""
        whole = "\n\n".join(reading.text for reading in readings)
        last = readings[-1]
        if self.data.kind == "labels":
            labels, unknown = self._labels(readings)
            fault = "malformed" if labels is None or (self.by_label and None in labels.values()) else ""
            scores = self._scores(readings)
            return Answer(labels=labels, unknown_labels=unknown, text=last.answer, whole=whole, scores=scores), fault
        if self.data.kind == "options":
            options, scores = _options(last), _likely(last.scores)
            return Answer(options=options, text=last.answer, whole=whole, scores=scores), "" if options else "malformed"
        if self.data.kind == "boxes":
            return Answer(boxes=tuple(_box(box) for box in last.boxes), text=last.answer, whole=whole), ""
        text = last.report or last.answer
        return Answer(text=text, whole=whole), "" if text else "malformed"

    def _scores(self, readings: Sequence[Reading]) -> dict[str, float] | None:
        if self.by_label:
            each = zip(self.labels, readings, strict=True)
            return _likely({label: reading.scores["Yes"] for label, reading in each if "Yes" in reading.scores})
        said = readings[0].scores
        if self.by_options:
            letters = {chr(65 + i): label for i, label in enumerate(self.labels)}
            return _likely({letters[letter]: score for letter, score in said.items() if letter in letters})
        return _likely({label: score for label, score in said.items() if label in self.labels})

    def _labels(self, readings: Sequence[Reading]) -> tuple[dict[str, int | None] | None, tuple[str, ...]]:
        if self.by_label:
            said = {"Yes": 1, "No": 0}
            each = [_options(reading) for reading in readings]
            return {k: said.get(v[0]) if len(v) == 1 else None for k, v in zip(self.labels, each, strict=True)}, ()
        reading = readings[0]
        if self.by_options:
            letters = _options(reading)
            present = {self.labels[ord(v) - 65] for v in letters if len(v) == 1 and ord(v) - 65 < len(self.labels)}
            return {label: int(label in present) for label in self.labels} if letters else None, ()
        present, unknown = {finding.label for finding in reading.findings}, reading.unknown_labels
        if not (present or unknown):
            return None, ()
        return {label: int(label in present) for label in self.labels}, unknown


def _likely(scores: Mapping[str, float]) -> dict[str, float] | None:
    """Log-odds as shares from 0 to 1, in the same order; None without any."""
    shares = {name: math.exp(min(score, 0.0)) / (1 + math.exp(-abs(score))) for name, score in scores.items()}
    return shares or None


def _value(text: str, values: Values) -> str | list[str]:
    """A variable's value: a lone placeholder gives what it stands for, a list too."""
    lone = PLACEHOLDER.fullmatch(text)
    return values[lone[1]] if lone and lone[1] in values else _filled(text, values)


def _filled(text: str, values: Values) -> str:
    """A prompt with what its placeholders stand for; others, such as ``{}``, stay."""

    def fill(match: re.Match[str]) -> str:
        value = values.get(match[1], match[0])
        return value if isinstance(value, str) else "\n".join(f"({chr(65 + i)}) {v}" for i, v in enumerate(value))

    return PLACEHOLDER.sub(fill, text)


def _options(reading: Reading) -> tuple[str, ...]:
    """Letters, Yes or No; of a free prompt's answer too, which the server does not take apart."""
    if reading.options or not reading.answer:
        return reading.options
    return parse(reading.answer, grammar="plain", answer="option").options


def _flags(reading: Reading) -> list[str]:
    return [*reading.flags, *(flag for facts in reading.images for flag in facts.get("flags", ()))]


def _box(box) -> Box:
    corners, unit = (box.pixels, "pixels") if box.pixels else (box.percent, "percent")
    return Box(label=box.label, corners=corners, unit=unit, image=box.image or 0)


def _in_pixels(box: Box, sizes: Sequence[tuple[Any, Any]]) -> Box:
    if box.unit != "percent" or box.image >= len(sizes) or not all(sizes[box.image]):
        return box
    width, height = sizes[box.image]
    x1, y1, x2, y2 = box.corners
    corners = (x1 * width / 100, y1 * height / 100, x2 * width / 100, y2 * height / 100)
    return dataclasses.replace(box, corners=corners, unit="pixels")
