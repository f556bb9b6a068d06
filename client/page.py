"""One reading as one self-contained HTML page: no script, no font, no request to anywhere.

`draw` makes the pictures that the page shows from the files that were sent; `reading_page` writes the page.
"""

from __future__ import annotations

import base64
import datetime
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from cxr_triton import __version__
from cxr_triton.cli import printable
from cxr_triton.identity import UIDS, require_same_images
from cxr_triton.numbers import duration, glued, moment, number, percent
from cxr_triton.pixels.flags import DOUBTFUL
from cxr_triton.pixels.flags import FLAGS as IMAGE_FLAGS
from cxr_triton.pixels.image import PATCH
from cxr_triton.reading import FLAGS as READING_FLAGS
from cxr_triton.reading import Box, Reading, parse

PAGE_PIXELS, DOCUMENT_PIXELS = 1024 * 1024, 640 * 640
"""Most pixels of a picture on a page and in a document."""
NOT_FOR_DIAGNOSIS = "Research only. Not for diagnosis."

STATUSES = {
    "ok": "well formed",
    "malformed": "malformed: a part of the expected form is missing, so an empty list of findings does not mean none",
    "truncated": "truncated: the token limit came before the end of the answer",
    "out_of_vocabulary": "out of vocabulary: the answer lists labels that the model was not trained to give",
    "doubtful_image": "of a doubtful image: it may be damaged, no chest, or of a view new to the model; see the flags",
}
STAGES = {
    "image_decode": "decode image",
    "preprocess": "preprocess",
    "vision": "vision",
    "queue": "queue",
    "prefill": "prefill",
    "decode": "decode",
    "report": "report",
}
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
LATERALITIES = {"L": "left", "R": "right", "U": "unpaired", "B": "both"}


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
    title = f"{reading.model.get('title') or reading.model.get('profile') or 'Chest X-ray'} reading"
    figures = "".join(_figure(reading, i, picture, len(pictures)) for i, picture in enumerate(pictures))
    rest = _reasoning(reading) + _boxes(reading) + _conversation(reading, history)
    body = f"""\
<aside class="notice" role="note"><strong>{NOT_FOR_DIAGNOSIS}</strong> {_text(reading.notice)}</aside>
<header>
<h1>{_text(title)}</h1>
{_which(pictures, read_at)}
<p class="asked">{_text(reading.task or "free prompt")}<span>{_text(_shorten(reading.prompt))}</span></p>
</header>
<main{"" if pictures else ' class="text-only"'}>
{_result(reading)}
{f'<div class="pictures">{figures}</div>' if pictures else ""}
{f'<div class="rest">{rest}</div>' if rest else ""}
</main>
<div class="facts">
{_flags(reading)}
{_timings(reading)}
{_model(reading)}
{_images(reading, pictures)}
</div>
<details class="raw"><summary>The model's text, untouched</summary><pre>{_text(reading.text)}</pre></details>
"""
    return document(title, _STYLE, body)


def document(title: str, style: str, body: str) -> str:
    """A self-contained HTML page that fetches nothing and runs no script; `style` and `body` are trusted."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="robots" content="noindex">
<title>{_text(title)}</title>
<style>{style}{_TABLES}</style>
</head>
<body>
{body}<footer>cxr-triton {__version__}</footer>
</body>
</html>
"""


def _text(value: object) -> str:
    """Anything from a model, a server or a file, harmless in HTML."""
    return escape(printable(str(value)))


def _shorten(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else f"{text[:limit]} …"


def _paragraphs(text: str) -> str:
    blocks = [_text(block.strip()) for block in re.split(r"\n\s*\n", text) if block.strip()]
    blocks = [re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", block) for block in blocks]
    return "".join(f"<p>{block}</p>" for block in blocks)


def image_name(index: int, count: int) -> str:
    """What an image of a reading is called: prior ones come first, the current one last."""
    if count == 1:
        return "Image"
    return f"Image {index + 1}, {'current' if index == count - 1 else 'prior'}"


def _which(pictures: Sequence[Shown], read_at: datetime.datetime | None) -> str:
    """Which radiographs were read, and when."""
    told = [_origin(picture, i, len(pictures)) for i, picture in enumerate(pictures)]
    told = [f'<span class="image">{_text(origin)}</span>' for origin in told if origin]
    if read_at:
        told.append(f'read <time datetime="{read_at.isoformat()}">{_text(glued(moment(read_at)))}</time>')
    return f'<p class="which">{" · ".join(told)}</p>' if told else ""


def _origin(picture: Shown, index: int, count: int) -> str:
    """Name and study date of an image; empty where neither may be told."""
    told = [picture.name, f"study of {glued(picture.study_date)}" if picture.study_date else ""]
    told = ", ".join(part for part in told if part)
    return f"{image_name(index, count)}: {told}" if told and count > 1 else told


def _size(facts: dict) -> str:
    """Columns and rows of the file's image; empty where a server does not say them."""
    rows, columns = facts.get("rows"), facts.get("columns")
    return glued(f"{columns} × {rows} px") if isinstance(rows, int) and isinstance(columns, int) else ""


def _figure(reading: Reading, index: int, picture: Shown, count: int) -> str:
    facts = reading.images[index] if index < len(reading.images) else {}
    boxes = [box for box in reading.boxes if box.image == index]
    # A stretched SVG keeps percent coordinates whatever the picture's size on the screen; text would be stretched too.
    shapes = labels = toggle = ""
    for box in boxes:
        x1, y1, x2, y2 = _corners(box)
        shapes += f'<rect x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"/>'
        side = "under" if y1 < 6 else "over"
        end = f"right:{100 - x2:g}%" if x1 > 60 else f"left:{x1:g}%"
        at = f"top:{y2:g}%" if side == "under" else f"top:{y1:g}%"
        labels += f'<span class="{side}" style="{at};{end}">{_text(box.label or "unnamed")}</span>'
    if boxes:
        toggle = '<label><input type="checkbox" checked> boxes</label>'
        shapes = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{shapes}</svg>'
    caption = [image_name(index, count), picture.name, _size(facts)]
    if isinstance(grid := facts.get("grid"), list) and len(grid) == 2:
        caption.append(glued(f"read at {PATCH * grid[1]} × {PATCH * grid[0]} px"))
    if facts.get("preset"):
        caption.append(f"preset {facts['preset']}")
    caption = [part for part in caption if part]
    png = base64.b64encode(picture.png).decode()
    image = f'<img alt="{image_name(index, count)}" src="data:image/png;base64,{png}">'
    return f"""<figure>
<div class="stack">{image}{shapes}{labels}</div>
<figcaption><span>{_text(" · ".join(caption))}</span>{toggle}</figcaption>
</figure>"""


def _corners(box: Box) -> tuple[float, float, float, float]:
    """Percent corners in order and inside the picture."""
    x1, y1, x2, y2 = (min(max(value, 0.0), 100.0) for value in box.percent)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _result(reading: Reading) -> str:
    chips = [finding.label for finding in reading.findings] + list(reading.options)
    if not chips:
        chips = list(dict.fromkeys(box.label or "unnamed" for box in reading.boxes))
    items = "".join(f"<li>{_text(chip)}</li>" for chip in chips)
    for label in reading.unknown_labels:
        items += f'<li class="unknown">{_text(label)}<small>not in the vocabulary</small></li>'
    heading = "Findings" if reading.findings or reading.unknown_labels else "Located" if reading.boxes else "Answer"
    if items:
        body = f'<ul class="chips">{items}</ul>'
    elif reading.answer:
        body = f'<div class="prose">{_paragraphs(reading.answer)}</div>'
    else:
        body = '<p class="none">The model gave no answer that could be read.</p>'
    kind = "ok" if reading.status == "ok" else "bad"
    badge = f'<span class="badge {kind}">{_text(reading.status.replace("_", " "))}</span>'
    if kind == "bad":
        why = f'<p class="why">This answer is {_text(STATUSES.get(reading.status, reading.status))}.</p>'
        body = f"{why}{_doubts(reading)}{body}"
    return f'<section class="result"><h2>{heading}{badge}</h2>{body}</section>'


def _doubts(reading: Reading) -> str:
    """Why an image is doubtful, whatever else is wrong with the answer."""
    items = ""
    for i, facts in enumerate(reading.images):
        where = f"{image_name(i, len(reading.images))}: " if len(reading.images) > 1 else ""
        items += "".join(
            f"<li>{_text(where + IMAGE_FLAGS[flag])}</li>" for flag in facts.get("flags", ()) if flag in DOUBTFUL
        )
    return f'<ul class="why">{items}</ul>' if items else ""


def _reasoning(reading: Reading) -> str:
    if not reading.reasoning:
        return ""
    return (
        f'<section><details open class="reasoning"><summary><h2>Reasoning</h2></summary>'
        f'<div class="prose">{_paragraphs(reading.reasoning)}</div></details></section>'
    )


def _boxes(reading: Reading) -> str:
    if not reading.boxes:
        return ""
    rows = ""
    for box in reading.boxes:
        percent = " ".join(f"{value:g}" for value in box.percent)
        pixels = " ".join(f"{value:.0f}" for value in box.pixels) if box.pixels else "unknown"
        where = "" if box.image is None else f"{box.image + 1}"
        rows += f"<tr><td>{_text(box.label or 'unnamed')}</td><td>{where}</td><td>{percent}</td><td>{pixels}</td></tr>"
    head = "".join(f"<th>{name}</th>" for name in ("label", "image", "x1 y1 x2 y2, %", "x1 y1 x2 y2, source px"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<section><h2>Boxes</h2><div class="scroll">{table}</div></section>'


def _conversation(reading: Reading, history: Sequence[Mapping[str, str]]) -> str:
    """Every turn before the answer, of a reading that goes on from earlier ones."""
    if not history:
        return ""
    turns = ""
    for turn in history:
        is_question = turn["role"] == "user"
        body = f'<div class="prose">{_paragraphs(turn["content"])}</div>' if is_question else _answer(turn["content"])
        turns += f'<li class="{"question" if is_question else "answer"}">{body}</li>'
    turns += f'<li class="question"><div class="prose">{_paragraphs(reading.prompt)}</div></li>'
    turns += '<li class="answer none">Answered above.</li>'
    return f'<section><h2>Conversation</h2><ol class="turns">{turns}</ol></section>'


def _answer(text: str) -> str:
    """An earlier answer: without its tags where they can be taken off and nothing gets lost, else untouched."""
    parsed = parse(text, grammar="boxed" if "\\boxed" in text else "think_answer", answer="text")
    if parsed.status != "ok" or parsed.flags:
        return f'<div class="prose">{_text(text.strip())}</div>'
    reasoning = parsed.reasoning and f'<div class="prose thought">{_paragraphs(parsed.reasoning)}</div>'
    return f'{reasoning or ""}<div class="prose">{_paragraphs(parsed.answer)}</div>'


def _flags(reading: Reading) -> str:
    rows = [("answer", flag, READING_FLAGS.get(flag, flag)) for flag in reading.flags]
    for i, facts in enumerate(reading.images):
        where = image_name(i, len(reading.images)).lower()
        rows += [(where, flag, IMAGE_FLAGS.get(flag, flag)) for flag in facts.get("flags", ())]
    items = ""
    for where, flag, meaning in rows:
        items += f"<li>{_text(meaning[:1].upper() + meaning[1:])}<small>{where} · {_text(flag)}</small></li>"
    body = f'<ul class="flags">{items}</ul>' if items else '<p class="none">None.</p>'
    return f"<section><h2>Flags</h2>{body}</section>"


def _timings(reading: Reading) -> str:
    times = reading.timings_ms
    known = [(name, times[key]) for key, name in STAGES.items() if key in times]
    total = max(times.get("total", 0.0), sum(ms for _, ms in known), 1e-3)
    bars, at = "", 0.0
    for name, ms in known:
        width = max(100 * ms / total, 0.5)
        bar = f'<i style="margin-left:{min(100 * at / total, 100 - width):.2f}%;width:{width:.2f}%"></i>'
        bars += f"<dt>{name}</dt><dd>{bar}</dd><dd>{duration(ms)}</dd>"
        at += ms
    pairs = [(key.replace("_", " "), duration(ms)) for key, ms in times.items() if key not in STAGES]
    pairs += [(key.replace("_", " "), value) for key, value in reading.usage.items()]
    if rate := decode_rate(reading):
        pairs.append(("decode speed", f"{number(rate)} tokens/s"))
    pairs.append(("finished by", reading.finish_reason))
    return f'<section><h2>Time and tokens</h2><dl class="waterfall">{bars}</dl>{_pairs(pairs)}</section>'


def decode_rate(reading: Reading) -> float | None:
    """Tokens per second after the first one, which prefill gives."""
    tokens, ms = reading.usage.get("completion_tokens", 0), reading.timings_ms.get("decode", 0.0)
    return 1000 * (tokens - 1) / ms if tokens > 1 and ms > 0 else None


def _model(reading: Reading) -> str:
    model = reading.model
    pairs = [(label, model[key]) for key, label in _MODEL.items() if model.get(key)]
    pairs += [
        ("bundle digest" if key == "bundle" else key, value)
        for key, value in model.items()
        if key not in (*_MODEL, "labels")
    ]
    return f"<section><h2>Model</h2>{_pairs(pairs)}</section>"


def _images(reading: Reading, pictures: Sequence[Shown]) -> str:
    sections = ""
    for i, facts in enumerate(reading.images):
        picture = pictures[i] if i < len(pictures) else Shown(png=b"")
        pairs = [("file", picture.name), ("study date", picture.study_date), ("size", _size(facts))]
        pairs += [(label, _fact(key, facts.get(key))) for key, label in _IMAGE.items()]
        pairs = [pair for pair in pairs if pair[1]] + _identity(facts.get("identity"))
        sections += f"<section><h2>{image_name(i, len(reading.images))}</h2>{_pairs(pairs)}</section>"
    return sections


def _fact(key: str, value: object) -> str:
    """A fact in words; empty for one that is not known, or is as it always is."""
    if value in (None, "", []) or (key, value) in (("padding_share", 0), ("pixel_aspect_ratio", 1)):
        return ""
    if key == "padding_share" and isinstance(value, int | float):
        return percent(value)
    if key == "laterality":
        return LATERALITIES.get(value, str(value))
    return " and ".join(map(number, value)) if isinstance(value, list) else number(value)


def _identity(identity: object) -> list[tuple[str, str]]:
    if not isinstance(identity, dict):
        return []
    of = "SHA-256 of its " if identity.get("identifiers") == "hashed" else ""
    names = {"file_sha256": "SHA-256 of the file", "sop_instance_uid": f"{of}{UIDS['sop_instance_uid']}"}
    return [(name, str(identity[key])) for key, name in names.items() if identity.get(key)]


def _pairs(pairs: Iterable[tuple[str, object]]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs)
    return f'<dl class="pairs">{rows}</dl>'


_STYLE = """
:root {
  --page: #f4f5f6; --card: #fff; --ink: #16191d; --soft: #5c6670; --line: #dde1e5; --bar: #5b9bd1;
  --ok: #1d6f42; --ok-bg: #e2f3e8; --bad: #9a3412; --bad-bg: #fdeadf;
  --notice: #7a4b00; --notice-bg: #fff2d6; --notice-line: #eac071;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1114; --card: #171b20; --ink: #e6e9ec; --soft: #97a2ad; --line: #2a3138; --bar: #3f7fb5;
    --ok: #7fd6a2; --ok-bg: #12301f; --bad: #ffb68f; --bad-bg: #3a1d10;
    --notice: #ffd58a; --notice-bg: #2f2410; --notice-line: #6b4f1a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1280px; padding: 16px 20px 40px; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; margin: 0; line-height: 1.25; }
h2 {
  font-size: .78rem; font-weight: 650; text-transform: uppercase; letter-spacing: .07em; color: var(--soft);
  margin: 0 0 12px;
}
p { margin: 0 0 .8em; }
p:last-child { margin-bottom: 0; }
small, .none, summary, footer { color: var(--soft); }
.notice {
  background: var(--notice-bg); color: var(--notice); border: 1px solid var(--notice-line); border-radius: 8px;
  padding: 10px 14px; font-size: .94rem; line-height: 1.45;
}
.notice strong { display: block; font-size: 1.02rem; }
header { margin: 22px 0 16px; }
.asked { margin: 6px 0 0; color: var(--soft); font-size: .95rem; overflow-wrap: anywhere; }
.asked span::before { content: "· "; padding-left: .35em; }
.which { margin: 6px 0 0; overflow-wrap: anywhere; }
.which .image { font-weight: 600; }
main {
  display: grid; grid-template-columns: minmax(0, 1.15fr) minmax(0, 1fr); grid-template-rows: auto 1fr; gap: 18px;
  align-items: start;
}
main.text-only { display: block; }
main.text-only > * { margin-bottom: 18px; }
.result, .rest { grid-column: 2; }
.pictures { grid-column: 1; grid-row: 1 / span 2; }
section, .raw { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.rest { display: grid; grid-template-columns: minmax(0, 1fr); gap: 18px; }
.facts { columns: 3 330px; column-gap: 18px; margin: 18px 0; }
.facts section { break-inside: avoid; margin-bottom: 18px; }
.facts section:last-child { margin-bottom: 0; }
figure { margin: 0 0 18px; background: #000; border-radius: 10px; overflow: hidden; }
figure:last-child { margin-bottom: 0; }
.stack { position: relative; width: fit-content; max-width: 100%; margin: 0 auto; line-height: 0; }
.stack img { display: block; max-width: 100%; height: auto; max-height: 86vh; }
.stack svg { position: absolute; inset: 0; width: 100%; height: 100%; }
rect { fill: none; stroke: #ffd23f; stroke-width: 2; vector-effect: non-scaling-stroke; }
.stack span {
  position: absolute; background: #ffd23f; color: #1a1500; font: 600 12px/1 system-ui, sans-serif; padding: 3px 6px;
  border-radius: 2px; max-width: 70%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
}
.stack .over { transform: translateY(-100%); }
figure:has(input:not(:checked)) :is(svg, .over, .under) { display: none; }
figcaption {
  display: flex; justify-content: space-between; gap: 14px; color: #aab4be; font-size: .82rem; padding: 9px 14px;
  border-top: 1px solid #222;
}
figcaption label { color: #fff; white-space: nowrap; cursor: pointer; }
figcaption input { accent-color: #ffd23f; margin: 0; vertical-align: -1px; }
.badge {
  float: right; text-transform: none; letter-spacing: 0; font-size: .8rem; padding: 1px 10px; border-radius: 99px;
}
.badge.ok { color: var(--ok); background: var(--ok-bg); }
.badge.bad { color: var(--bad); background: var(--bad-bg); }
.why { color: var(--bad); font-size: .93rem; }
ul.why { margin: 0 0 .8em; padding-left: 1.2em; }
.turns { display: grid; gap: 10px; margin: 0; padding: 0; list-style: none; }
.turns .question { border-left: 3px solid var(--bar); padding-left: 10px; }
.turns .answer { padding-left: 13px; }
.turns .thought { color: var(--soft); font-size: .93rem; margin-bottom: .6em; }
.chips { display: flex; flex-wrap: wrap; gap: 8px; margin: 0; padding: 0; list-style: none; }
.chips li {
  font-size: 1.12rem; font-weight: 620; line-height: 1.3; padding: 6px 12px; border: 1px solid var(--line);
  border-radius: 8px; overflow-wrap: anywhere;
}
.chips .unknown { border-style: dashed; color: var(--bad); }
.chips small { display: block; font-weight: 400; font-size: .75rem; color: inherit; }
.prose { white-space: pre-line; overflow-wrap: anywhere; max-width: 68ch; }
summary { cursor: pointer; }
summary h2 { display: inline; }
.reasoning[open] summary { margin-bottom: 12px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--soft); text-align: left; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border: 0; }
.flags { margin: 0; padding: 0; list-style: none; display: grid; gap: 10px; line-height: 1.4; }
.flags small { display: block; overflow-wrap: anywhere; }
.pairs {
  display: grid; grid-template-columns: fit-content(45%) minmax(0, 1fr); gap: 4px 16px; margin: 0; font-size: .93rem;
}
.pairs dt, .waterfall dt { color: var(--soft); }
.pairs dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.waterfall {
  display: grid; grid-template-columns: max-content minmax(0, 1fr) max-content; gap: 5px 12px; margin: 0 0 14px;
  font-size: .93rem; align-items: center;
}
.waterfall dd { margin: 0; white-space: nowrap; font-variant-numeric: tabular-nums; text-align: right; }
.waterfall i { display: block; height: 11px; border-radius: 2px; background: var(--bar); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; margin: 12px 0 0; }
footer { font-size: .82rem; margin-top: 14px; }
@media (max-width: 820px) {
  body { padding: 12px 12px 32px; }
  main { display: block; }
  main > * { margin-bottom: 18px; }
  section, .raw { padding: 14px; }
  th, td { padding-right: 8px; }
  .stack img { max-height: none; }
}
@media print {
  :root { --page: #fff; }
  body { max-width: none; }
  main { display: block; }
  main > * { margin-bottom: 18px; }
  section, figure { break-inside: avoid; }
  figcaption label { display: none; }
}
"""

_TABLES = """
.scroll {
  overflow-x: auto; background:
    linear-gradient(90deg, var(--card) 30%, transparent) 0 0 / 40px 100% no-repeat local,
    linear-gradient(-90deg, var(--card) 30%, transparent) 100% 0 / 40px 100% no-repeat local,
    linear-gradient(90deg, var(--line), transparent) 0 0 / 12px 100% no-repeat scroll,
    linear-gradient(-90deg, var(--line), transparent) 100% 0 / 12px 100% no-repeat scroll;
}
"""
"""What can be scrolled has a shadow at the side where more of it is."""
