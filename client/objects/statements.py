"""What a reading says in words, the same in every object: findings, boxes, flags, notice."""

from __future__ import annotations

from typing import Any

from cxr_triton.client.objects.codes import ABSENT, PRESENT, presence
from cxr_triton.client.objects.study import UNVERIFIED
from cxr_triton.pixels.flags import FLAGS as IMAGE_FLAGS
from cxr_triton.reading import FLAGS as READING_FLAGS
from cxr_triton.reading import NOT_FOR_DIAGNOSIS
from cxr_triton.reading import STATUSES as STATUS_TEXTS

SCORES_ARE = (
    "They are log-odds, in nats, of the algorithm's answer with each and without it, given the reasoning that it "
    "wrote: not calibrated, and no probability of a disease."
)


def notice(reading: dict[str, Any]) -> str:
    """What has to be shown wherever a reading is shown."""
    return f"{NOT_FOR_DIAGNOSIS} {UNVERIFIED}. {reading['notice']}"


def statements(reading: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The reading as sentences for people: findings, and impression.

    A reading that is not well formed says so first. Prose of a task with "impression" in its name is the impression,
    other prose the findings; a list of labels or options is the impression as the model wrote it.
    """
    findings, impression = [], []
    if reading["status"] != "ok":
        findings.append(f"This reading is {STATUS_TEXTS[reading['status']]}.")
    called = presence(reading)
    findings += [f"Present: {label}" for label, value in called.items() if value is PRESENT]
    if absent := [label for label, value in called.items() if value is ABSENT]:
        findings.append(f"Absent, as the algorithm does not list them: {', '.join(absent)}")
    findings += [f"Not in the vocabulary: {label}" for label in reading["unknown_labels"]]
    for box in reading["boxes"]:
        findings.append(f"Box: {box_text(box, len(reading['images']))}")
    prose = reading["report"]
    if prose and "impression" in (reading["task"] or ""):
        impression.append(prose)
    elif prose:
        findings.append(prose)
    elif reading["answer"] and not reading["boxes"]:
        impression.append(reading["answer"])
    return findings or ["None stated."], impression


def untouched(reading: dict[str, Any]) -> list[str]:
    """The model's own text where the reading is not well formed, so that nothing of it is lost."""
    return [reading["text"]] if reading["status"] != "ok" and reading["text"].strip() else []


def told_scores(scores: dict[str, float]) -> list[str]:
    """Scores in words, the highest first, with what they are; nothing without any."""
    ranked = sorted(scores.items(), key=lambda pair: -pair[1])
    said = ", ".join(f"{name} {score:+.1f}" for name, score in ranked)
    return [f"Scores: {said}. {SCORES_ARE}"] if said else []


def box_text(box: dict[str, Any], images: int) -> str:
    """A box in words: label, percent and pixels."""
    text = f"{box['label'] or 'unnamed'}, {' '.join(f'{v:g}' for v in box['percent'])} % of width and height"
    if box["pixels"]:
        left, top, right, bottom = box["pixels"]
        text += f", columns {left:g} to {right:g}, rows {top:g} to {bottom:g}"
    if box["image"] is not None and images > 1:
        text += f", image {box['image'] + 1} of {images}"
    return text if has_area(box) else f"{text}; it has no area inside the image"


def has_area(box: dict[str, Any]) -> bool:
    """Whether a box can be drawn."""
    if box["pixels"] is None or box["image"] is None:
        return False
    left, top, right, bottom = box["pixels"]
    return left < right and top < bottom


def corners(box: dict[str, Any]) -> list[list[float]]:
    """Closed outline, (column, row) with 0, 0 at the top left corner of the top left pixel (PS3.3 C.18.6.1.1)."""
    left, top, right, bottom = box["pixels"]
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def flags(reading: dict[str, Any]) -> list[str]:
    """What is doubtful about the answer and the images."""
    texts = [READING_FLAGS.get(flag, flag) for flag in reading["flags"]]
    for i, facts in enumerate(reading["images"], 1):
        where = f"image {i}: " if len(reading["images"]) > 1 else ""
        texts += [where + IMAGE_FLAGS.get(flag, flag) for flag in facts.get("flags", ())]
    return [f"Flag: {text}" for text in texts]
