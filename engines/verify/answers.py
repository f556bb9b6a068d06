"""Answers of an engine and of the reference, and how far two of them agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cxr_triton.profile import ModelProfile
from cxr_triton.reading import Parsed, parse
from cxr_triton.request import ReadRequest
from cxr_triton.rewards import box_iou

MEASURES = {
    "labels": "label_iou",
    "option": "label_iou",
    "boxes": "label_iou",
    "prose": "prose_f1",
    "text": "prose_f1",
}
"""Threshold that the agreement of answers of a kind is held against."""


@dataclass(frozen=True)
class Answer:
    """What an engine or the reference says of a case.

    Attributes
    ----------
    text : str
    tokens : int
    finish_reason : str
        ``stop`` or ``length``.
    grammar, kind : str
        Of what was asked, see `cxr_triton.profile`.
    parsed : Parsed
        The text by its grammar; boxes in percent.
    """

    text: str
    tokens: int
    finish_reason: str
    grammar: str
    kind: str
    parsed: Parsed

    @classmethod
    def of(cls, text: str, tokens: int, finish_reason: str, asked: ReadRequest, profile: ModelProfile) -> Answer:
        """Parse a text as the answer to what was asked, with a profile's labels."""
        grammar, kind, sizes = asked.grammar, asked.answer, [(100, 100)]
        labels = profile.labels if kind in ("labels", "text") else ()
        parsed = parse(
            text, grammar=grammar, answer=kind, labels=labels, finish_reason=finish_reason, image_sizes=sizes
        )
        return cls(text, tokens, finish_reason, grammar, kind, parsed)

    def raw(self) -> dict:
        """Text, number of tokens and reason of its end, as a record holds them."""
        return {"text": self.text, "tokens": self.tokens, "finish_reason": self.finish_reason}

    def short(self) -> dict:
        """Status and the answer in short, as a record holds them."""
        return {"status": self.parsed.status, "says": _says(self.kind, self.parsed)}

    def agreement(self, other: Answer) -> float:
        """`agreement_of` with another answer to the same."""
        return agreement_of(self.kind, self.parsed, other.parsed)


def agreement_of(kind: str, ours: Parsed, theirs: Parsed) -> float:
    """How far two answers agree, 0 to 1: sets of labels or options, first boxes, or words."""
    if kind in ("prose", "text"):
        return _word_f1(ours.answer or ours.text, theirs.answer or theirs.text)
    if kind == "boxes":
        if not ours.boxes or not theirs.boxes:
            return float(not ours.boxes and not theirs.boxes and ours.status == theirs.status)
        if ours.boxes[0].percent == theirs.boxes[0].percent:  # equal even where they are no box, as (90,0),(10,5)
            return 1.0
        return box_iou(ours.boxes[0].percent, theirs.boxes[0].percent)
    mine, its = (set(_says(kind, parsed)) for parsed in (ours, theirs))
    if not mine and not its:  # both lists may be empty for different reasons
        return float(ours.status == theirs.status)
    return len(mine & its) / len(mine | its)


def _says(kind: str, parsed: Parsed) -> list[str]:
    if kind == "labels":
        return [*(finding.label for finding in parsed.findings), *parsed.unknown_labels]
    if kind == "option":
        return list(parsed.options)
    if kind == "boxes":
        return [f"{box.label or 'unnamed'} {' '.join(f'{v:g}' for v in box.percent)}" for box in parsed.boxes]
    return [parsed.answer or ""]


def _word_f1(a: str, b: str) -> float:
    mine, its = (Counter(text.casefold().split()) for text in (a, b))
    if not mine or not its:
        return float(mine == its)
    return 2 * (mine & its).total() / (mine.total() + its.total())
