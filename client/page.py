"""One reading as one self-contained HTML page.

`draw` makes the pictures that the page shows from the files that were sent; `reading_page` writes the page.
"""

from __future__ import annotations

import bisect
import datetime
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cxr_triton.alternatives import SCORE_LIMIT
from cxr_triton.identity import UIDS, require_same_images
from cxr_triton.numbers import duration, glued, moment, number, percent
from cxr_triton.page import paragraphs, render
from cxr_triton.page.plot import waterfall
from cxr_triton.pixels.flags import DOUBTFUL
from cxr_triton.pixels.flags import FLAGS as IMAGE_FLAGS
from cxr_triton.pixels.image import PATCH
from cxr_triton.reading import FLAGS as READING_FLAGS
from cxr_triton.reading import LATERALITIES, STAGES, STATUSES, Box, Reading, image_name, parse

PAGE_PIXELS, DOCUMENT_PIXELS = 1024 * 1024, 640 * 640
"""Most pixels of a picture on a page and in a document."""

SHADES = (0.9, 0.5, 0.2)
"""A word is shaded once more for each of these that its probability is below."""

_BOLD = re.compile(r"\*\*.+?\*\*")
_WORD = re.compile(r"\*\*|\s+|(?:(?!\*\*)\S)+")
_MODEL = {"title": "model", "profile": "profile", "revision": "revision", "engine": "engine", "precision": "precision"}
_IMAGE = {
    "transfer_syntax_name": "transfer syntax",
    "photometric": "photometric",
    "modality": "modality",
    "view": "view",
    "laterality": "laterality",
    "region": "part of the body by its header",
    "chest_likeness": "likeness to a chest, 0 to 1",
    "bits_stored": "bits stored",
    "pixel_aspect_ratio": "height of a pixel over its width",
    "preset": "pixel preset",
    "percentiles": "0.5 %, 99.5 % value",
    "padding_share": "padding",
}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image of a reading as a page or a document shows it.

    Attributes
    ----------
    png : bytes
        With square pixels.
    name : str
        Of its file; empty where it may not be told.
    study_date : str
        YYYY-MM-DD; empty where it may not be told, or the file does not tell it.
    """

    png: bytes
    name: str = ""
    study_date: str = ""


def draw(
    images: Sequence[bytes],
    reading: Reading,
    *,
    names: Sequence[str] = (),
    max_pixels: int = PAGE_PIXELS,
    unchecked_reading: bool = False,
) -> list[Shown]:
    """Each image with the greys that the model saw.

    Parameters
    ----------
    images : sequence of bytes
        The files that were read.
    reading : Reading
        One with hashed identifiers keeps file names and study dates out.
    names : sequence of str
        Of the files; none leaves them out.
    max_pixels : int
        Of a picture.
    unchecked_reading : bool
        See `cxr_triton.identity.require_same_images`.

    Raises
    ------
    InvalidImage
        An image cannot be read here; see `cxr_triton.errors`.
    ReadingMismatch
        The reading is of other images, or does not say of which; see `cxr_triton.identity.require_same_images`.
    """
    from PIL import Image

    from cxr_triton.pixels.sandbox import Sandbox

    may_name = not any((facts.get("identity") or {}).get("identifiers") == "hashed" for facts in reading.images)
    shown, identities = [], []
    with Sandbox() as sandbox:
        for i, data in enumerate(images):
            facts = reading.images[i] if i < len(reading.images) else {}
            # A display-ready file stays as it is whatever the preset.
            preset = "voi_display" if facts.get("preset") == "voi_display" else "mimic_jpg"
            prepared = sandbox.prepare(data, preset=preset, min_pixels=1, max_pixels=max_pixels, factor=1)
            png = io.BytesIO()
            Image.fromarray(prepared.pixels).save(png, "PNG")
            name = names[i] if names and may_name else ""
            shown.append(Shown(png=png.getvalue(), name=name, study_date=prepared.study_date if may_name else ""))
            identities.append(prepared.facts["identity"])
    names = names or [f"image {i}" for i in range(1, len(images) + 1)]
    require_same_images(reading.images, identities, names=names, unchecked_reading=unchecked_reading)
    return shown


def reading_page(
    reading: Reading,
    pictures: Sequence[Shown] = (),
    *,
    read_at: datetime.datetime | None = None,
    history: Sequence[Mapping[str, str]] = (),
) -> str:
    """HTML of a reading.

    Parameters
    ----------
    reading : Reading
    pictures : sequence of Shown
        Each image of the request, in its order, as `draw` gives them; none leaves the pictures out.
    read_at : datetime.datetime, optional
        When the reading was made; it has to know its time zone.
    history : sequence of mapping
        The turns that the request carried, oldest first, as ``role`` and ``content``.
    """
    times = reading.timings_ms
    stages = {stage: times[stage] for stage in STAGES if stage in times}
    origins = [_origin(picture, i, len(pictures)) for i, picture in enumerate(pictures)]
    return render(
        "reading.html",
        title=f"{reading.model.get('title') or reading.model.get('profile') or 'Chest X-ray'} reading",
        notice=reading.notice,
        reading=reading,
        origins=[origin for origin in origins if origin],
        read_at=read_at,
        read=glued(moment(read_at)) if read_at else "",
        asked=reading.prompt if len(reading.prompt) <= 400 else f"{reading.prompt[:400]} …",
        kind="Findings" if reading.findings or reading.unknown_labels else "Located" if reading.boxes else "Answer",
        status=STATUSES.get(reading.status, reading.status),
        doubts=_doubts(reading),
        chips=_chips(reading),
        scores=_scores(reading),
        words=_words(reading),
        pictures=[_picture(reading, i, picture, len(pictures)) for i, picture in enumerate(pictures)],
        boxes=[_box(box) for box in reading.boxes],
        turns=_turns(reading, history),
        flags=_flags(reading),
        stages=waterfall(stages, max(times.get("total", 0.0), sum(stages.values()), 1e-3)),
        counts=_counts(reading),
        model=_model(reading),
        images=[_image(reading, i, pictures) for i in range(len(reading.images))],
    )


def decode_rate(reading: Reading) -> float | None:
    """Tokens per second after the first one, which prefill gives."""
    tokens, ms = reading.usage.get("completion_tokens", 0), reading.timings_ms.get("decode", 0.0)
    return 1000 * (tokens - 1) / ms if tokens > 1 and ms > 0 else None


def _origin(picture: Shown, index: int, count: int) -> str:
    """Name and study date of an image; empty where neither may be told."""
    parts = [picture.name, f"study of {glued(picture.study_date)}" if picture.study_date else ""]
    told = ", ".join(part for part in parts if part)
    return f"{image_name(index, count)}: {told}" if told and count > 1 else told


def _chips(reading: Reading) -> list[str]:
    chips = [finding.label for finding in reading.findings] + list(reading.options)
    return chips or list(dict.fromkeys(box.label or "unnamed" for box in reading.boxes))


def _scores(reading: Reading) -> list[tuple[str, float, float, str]]:
    """A bar for each label or option from the middle on, the likeliest first, for the macro ``bars`` of parts.html."""
    ranked = sorted(reading.scores.items(), key=lambda pair: -pair[1])
    bars = [(name, score, min(abs(score), SCORE_LIMIT) / (2 * SCORE_LIMIT)) for name, score in ranked]
    return [(name, 0.5 - length if score < 0 else 0.5, length, f"{score:+.1f}") for name, score, length in bars]


def _words(reading: Reading) -> list[tuple[str, bool, int, str]]:
    """The reasoning in pieces: its text, whether it stood in ``**``, how uncertain it is as an index of `SHADES`.

    A word is as likely as all its tokens together. Empty where the reading does not say it.
    """
    reasoning = reading.reasoning
    if not (reading.token_logprobs and reasoning) or (begin := reading.text.find(reasoning)) < 0:
        return []
    bold = [match.span() for match in _BOLD.finditer(reasoning)]
    pieces: list[tuple[str, bool, int, str]] = []
    for match in _WORD.finditer(reasoning):
        start, stop = match.span()
        is_bold = any(first <= start and stop <= last for first, last in bold)
        if match[0] == "**" and is_bold:
            continue
        shade, told = 0, ""
        if not match[0].isspace():
            first = bisect.bisect_right(reading.token_ends, begin + start)
            last = bisect.bisect_left(reading.token_ends, begin + stop)
            likely = math.exp(sum(reading.token_logprobs[first : last + 1]))
            shade = sum(likely < limit for limit in SHADES)
            told = f"{100 * likely:.0f} % likely to the model" if shade else ""
        if pieces and not shade and not pieces[-1][2] and pieces[-1][1] == is_bold:
            pieces[-1] = (pieces[-1][0] + match[0], is_bold, 0, "")
        else:
            pieces.append((match[0], is_bold, shade, told))
    return pieces


def _doubts(reading: Reading) -> list[str]:
    """Why an image is doubtful, whatever else is wrong with the answer."""
    count = len(reading.images)
    return [
        (f"{image_name(i, count)}: " if count > 1 else "") + IMAGE_FLAGS[flag]
        for i, facts in enumerate(reading.images)
        for flag in facts.get("flags", ())
        if flag in DOUBTFUL
    ]


def _size(facts: dict) -> str:
    """Columns and rows of the file's image; empty where a server does not say them."""
    rows, columns = facts.get("rows"), facts.get("columns")
    return glued(f"{columns} × {rows} px") if isinstance(rows, int) and isinstance(columns, int) else ""


def _picture(reading: Reading, index: int, picture: Shown, count: int) -> dict[str, object]:
    facts = reading.images[index] if index < len(reading.images) else {}
    caption = [image_name(index, count), picture.name, _size(facts)]
    if isinstance(grid := facts.get("grid"), list) and len(grid) == 2:
        caption.append(glued(f"read at {PATCH * grid[1]} × {PATCH * grid[0]} px"))
    if facts.get("preset"):
        caption.append(f"preset {facts['preset']}")
    return {
        "name": image_name(index, count),
        "png": picture.png,
        "boxes": [(box.label or "unnamed", *_corners(box)) for box in reading.boxes if box.image == index],
        "caption": " · ".join(part for part in caption if part),
    }


def _corners(box: Box) -> tuple[float, float, float, float]:
    """Percent corners in order and inside the picture."""
    x1, y1, x2, y2 = (min(max(value, 0.0), 100.0) for value in box.percent)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _box(box: Box) -> dict[str, str]:
    return {
        "label": box.label or "unnamed",
        "image": "" if box.image is None else f"{box.image + 1}",
        "x1 y1 x2 y2, %": " ".join(f"{value:g}" for value in box.percent),
        "x1 y1 x2 y2, source px": " ".join(f"{value:.0f}" for value in box.pixels) if box.pixels else "unknown",
    }


def _turns(reading: Reading, history: Sequence[Mapping[str, str]]) -> list[dict[str, object]]:
    """Every turn before the answer, of a reading that goes on from earlier ones."""
    if not history:
        return []
    turns = [*history, {"role": "user", "content": reading.prompt}]
    return [_question(turn["content"]) if turn["role"] == "user" else _answer(turn["content"]) for turn in turns]


def _question(text: str) -> dict[str, object]:
    return {"role": "question", "thought": None, "said": paragraphs(text)}


def _answer(text: str) -> dict[str, object]:
    """An earlier answer: without its tags where they can be taken off and nothing gets lost, else untouched."""
    parsed = parse(text, grammar="boxed" if "\\boxed" in text else "think_answer", answer="text")
    if parsed.status != "ok" or parsed.flags:
        return {"role": "answer", "thought": None, "said": [[text.strip()]]}
    return {"role": "answer", "thought": parsed.reasoning, "said": paragraphs(parsed.answer or "")}


def _flags(reading: Reading) -> list[tuple[str, str, str]]:
    """Where, which flag and what it means."""
    told = [("answer", flag, READING_FLAGS.get(flag, flag)) for flag in reading.flags]
    for i, facts in enumerate(reading.images):
        where = image_name(i, len(reading.images)).lower()
        told += [(where, flag, IMAGE_FLAGS.get(flag, flag)) for flag in facts.get("flags", ())]
    return told


def _counts(reading: Reading) -> list[tuple[str, object]]:
    counts: dict[str, object] = {key: duration(ms) for key, ms in reading.timings_ms.items() if key not in STAGES}
    counts |= reading.usage
    if rate := decode_rate(reading):
        counts["decode speed"] = f"{number(rate)} tokens/s"
    counts["finished by"] = reading.finish_reason
    return [(key.replace("_", " "), value) for key, value in counts.items()]


def _model(reading: Reading) -> list[tuple[str, object]]:
    model, words = reading.model, {**_MODEL, "bundle": "bundle digest"}
    known = [(label, model[key]) for key, label in _MODEL.items() if model.get(key)]
    return known + [(words.get(key, key), value) for key, value in model.items() if key not in (*_MODEL, "labels")]


def _image(reading: Reading, index: int, pictures: Sequence[Shown]) -> tuple[str, list[tuple[str, str]]]:
    facts = reading.images[index]
    picture = pictures[index] if index < len(pictures) else Shown(png=b"")
    pairs = [("file", picture.name), ("study date", picture.study_date), ("size", _size(facts))]
    pairs += [(label, _fact(key, facts.get(key))) for key, label in _IMAGE.items()]
    told = [pair for pair in pairs if pair[1]] + _identity(facts.get("identity"))
    return image_name(index, len(reading.images)), told


def _fact(key: str, value: object) -> str:
    """A fact in words; empty for one that is not known, or is as it always is."""
    if value in (None, "", []) or (key, value) in (("padding_share", 0), ("pixel_aspect_ratio", 1)):
        return ""
    if key == "padding_share" and isinstance(value, int | float):
        return percent(value)
    if key == "laterality":
        return LATERALITIES.get(str(value), str(value))
    return " and ".join(map(number, value)) if isinstance(value, list) else number(value)


def _identity(identity: object) -> list[tuple[str, str]]:
    if not isinstance(identity, dict):
        return []
    of = "SHA-256 of its " if identity.get("identifiers") == "hashed" else ""
    names = {"file_sha256": "SHA-256 of the file", "sop_instance_uid": f"{of}{UIDS['sop_instance_uid']}"}
    return [(name, str(identity[key])) for key, name in names.items() if identity.get(key)]
