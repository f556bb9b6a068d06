"""A verification record as one self-contained HTML page: no script, no font, no request to anywhere, no file name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from cxr_triton.client.page import _STYLE as BASE_STYLE
from cxr_triton.client.page import NOT_FOR_DIAGNOSIS, document
from cxr_triton.client.page import _text as text
from cxr_triton.engines.verify.thresholds import THRESHOLDS
from cxr_triton.numbers import glued, moment, number, shortest

CHART_BINS = 12
PARTS = {
    "files": "Tokenizer, template, configs, profile and weights are those of the checkpoint",
    "vision": "Image embeddings, token by token, on the images and on every kind of aspect ratio",
    "decoder": "Next-token distributions on the reference's own text",
    "readings": "What both say of the same images",
    "controls": "Occluded, blank and flipped images: the engine reacts as the reference does",
}


def verification_page(record: dict) -> str:
    """HTML of what `verify_bundle` gives.

    Parameters
    ----------
    record : dict
        With its `details`; without them (as in a manifest) the page has no readings.
    """
    details = record.get("details") or {}
    passed = record["passed"] is True
    verdict = "passed" if passed else "refused"
    name = f"{details.get('title') or 'Engine'}: verification"
    parts = "".join(_part(name, record["parts"].get(name)) for name in PARTS)
    images = "".join(_image(i, image) for i, image in enumerate(details.get("images", ())))
    runtime = record["runtime"]
    standin = f'<p class="why">{text(runtime["said"])}</p>' if runtime.get("said") else ""
    body = f"""\
<aside class="notice" role="note"><strong>{NOT_FOR_DIAGNOSIS}</strong> {text(details.get("notice", ""))}
That an engine agrees with its checkpoint does not mean that the checkpoint is right.</aside>
<header>
<h1>{text(name)} {_badge(passed)}</h1>
<p class="asked">{text(_sentence(record))}</p>
{standin}
</header>
<div class="parts">{parts}</div>
{_distributions(record)}
{_labels(record)}
{_rewards(record)}
{_controls(record)}
<section><h2>What was run on what</h2>{_facts(record)}</section>
<h2 class="readings">Readings, reference and engine</h2>
{images or '<p class="none">The record in a manifest holds no readings.</p>'}
"""
    return document(f"{name} {verdict}", BASE_STYLE + _STYLE, body)


def _badge(passed: bool) -> str:
    return f'<span class="badge {"ok" if passed else "bad"}">{"passed" if passed else "refused"}</span>'


def _sentence(record: dict) -> str:
    reference, images = record["reference"], record["images"]["count"]
    return (
        f"{record['runtime']['engine']} against {reference['runtime']} {reference['dtype']} on {reference['device']}, "
        f"{images} images, {glued(moment(record['made']))}"
    )


def _part(name: str, part: dict | None) -> str:
    if part is None:
        return f'<section><h2>{name}{_badge(False)}</h2><p class="why">This part is missing.</p></section>'
    body = f'<p class="small">{PARTS[name]}</p>'
    if part["error"]:
        body += f'<p class="why">{text(part["error"])}</p>'
    rows = ""
    for check in part["checks"]:
        if "limit" in check:
            value = _held(check)
            limit = f"{'≥' if check['at_least'] else '≤'} {shortest(check['limit'])}"
            meaning = THRESHOLDS.get(check["name"].partition(",")[0])
            hint = f' title="{text(meaning.meaning)}"' if meaning else ""
        else:
            value, limit, hint = check.get("said") or "same", "", ""
        kind = "" if check["passed"] else ' class="bad"'
        rows += f"<tr{kind}><td{hint}>{text(check['name'])}</td><td>{text(value)}</td><td>{text(limit)}</td></tr>"
    if rows:
        body += f'<div class="scroll"><table class="numbers"><tbody>{rows}</tbody></table></div>'
    return f"<section><h2>{name}{_badge(part['passed'] is True)}</h2>{body}</section>"


def _held(check: dict) -> str:
    """What was measured, in as many digits as show on which side of its limit it lies."""
    limit = check["limit"]
    return _number(check["value"], lambda value: value >= limit if check["at_least"] else value <= limit)


def _measured(record: dict, part: str) -> dict:
    return (record["parts"].get(part) or {}).get("measured") or {}


def _distributions(record: dict) -> str:
    figures = ""
    vision, decoder = _measured(record, "vision"), _measured(record, "decoder")
    if "histogram" in vision:
        figures += _histogram("1 − cosine of image tokens", vision["histogram"])
    for whose, values in decoder.items():
        if isinstance(values, dict) and "histogram" in values:
            figures += _histogram(f"KL of tokens in nats, {whose}", values["histogram"])
    rows = ""
    for name, values in vision.items():
        if isinstance(values, dict) and "cosine" in values:
            grid = f" <small>{glued(' × '.join(map(str, values['grid'])))}</small>" if values.get("grid") else ""
            cells = (*(_missing(values[key]) for key in ("cosine", "cosine_min")), _number(values["norm_error"]))
            rows += f"<tr><td>{text(name)}{grid}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    names = ("images <small>tokens</small>", "1 − cosine, mean", "1 − cosine, worst token", "norm error")
    head = "".join(f"<th>{name}</th>" for name in names)
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>' if rows else ""
    if not figures and not table:
        return ""
    body = f'<div class="figures">{figures}</div><div class="scroll">{table}</div>'
    return f"<section><h2>Distributions</h2>{body}</section>"


def _histogram(title: str, histogram: dict) -> str:
    counts, low = histogram["counts"], histogram["log10_from"]
    width, height, bar = 30, 90, 24
    highest = max(max(counts), 1)
    shapes = ""
    for i, count in enumerate(counts):
        tall = height * count / highest
        shapes += (
            f'<rect x="{i * width + 3}" y="{height - tall + 14:.1f}" width="{bar}" height="{tall:.1f}"/>'
            f'<text x="{i * width + 3 + bar / 2:g}" y="{height - tall + 11:.1f}">{number(count or "")}</text>'
        )
    for i in range(0, len(counts) + 1, 2):
        shapes += f'<text x="{i * width}" y="{height + 28}">{shortest(10.0 ** (low + i))}</text>'
    shapes += f'<path d="M0 {height + 14.5}H{len(counts) * width}"/>'
    # As many units for every chart, so that all have letters of one size.
    box = f"-20 0 {max(len(counts), CHART_BINS) * width + 40} {height + 34}"
    label = text(f"{title}: {', '.join(map(str, counts))} from 1e{low}")
    return (
        f'<figure class="chart"><figcaption>{text(title)}</figcaption>'
        f'<svg viewBox="{box}" role="img" aria-label="{label}">{shapes}</svg></figure>'
    )


def _labels(record: dict) -> str:
    labels = _measured(record, "readings").get("labels")
    if not labels:
        return ""
    rows = "".join(
        f"<tr{' class=bad' if flip['flips'] else ''}><td>{text(name)}</td><td>{flip['reference']}</td>"
        f"<td>{flip['engine']}</td><td>{flip['flips']}</td></tr>"
        for name, flip in labels.items()
    )
    head = "".join(f"<th>{name}</th>" for name in ("label", "reference", "engine", "flips"))
    return _table("Labels, on how many images", head, rows)


def _rewards(record: dict) -> str:
    measured = _measured(record, "readings")
    pairs = [(f"reward {name}", pair) for name, pair in (measured.get("rewards") or {}).items()]
    names = {
        "ok": "well formed",
        "truncated": "truncated",
        "out_of_vocabulary": "out of vocabulary",
        "tokens": "tokens",
    }
    pairs += [(label, measured[key]) for key, label in names.items() if key in measured]
    rows = "".join(
        f"<tr><td>{text(name)}</td><td>{_number(pair['reference'])}</td><td>{_number(pair['engine'])}</td></tr>"
        for name, pair in pairs
    )
    return _table("Means over the images", "<th></th><th>reference</th><th>engine</th>", rows) if rows else ""


def _controls(record: dict) -> str:
    keys = ("agreement", "change_reference", "change_engine", "change_difference")
    rows = "".join(
        f"<tr><td>{text(name)}</td>{''.join(f'<td>{_number(values[key])}</td>' for key in keys)}</tr>"
        for name, values in _measured(record, "controls").items()
    )
    head = "".join(f"<th>{name}</th>" for name in ("control", "agree", "reference", "engine", "difference"))
    words = "How well both agree on the changed images, and how much that changes what either says: means over images."
    return _table("Controls", head, rows, words) if rows else ""


def _table(title: str, head: str, rows: str, words: str = "") -> str:
    words = f'<p class="small">{words}</p>' if words else ""
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<section><h2>{title}</h2>{words}<div class="scroll">{table}</div></section>'


def _facts(record: dict) -> str:
    bundle, reference = (record.get("details") or {}).get("bundle") or {}, record["reference"]
    source = bundle.get("source") or {}
    pairs = [
        ("bundle", f"{bundle.get('precision', '')} for {bundle.get('engine', '')}".strip()),
        ("made from", " ".join(str(source[key]) for key in ("name", "revision") if source.get(key))),
        ("manifest without record", record["subject"]),
        ("run in", record["runtime"]["engine"]),
        ("stand-in", record["runtime"].get("standin") or "none"),
        ("profile", reference["profile"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in {**record["versions"], **reference["versions"]}.items())),
        ("images, SHA-256 over theirs", record["images"]["sha256"]),
    ]
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs if value not in (None, ""))
    return f'<dl class="pairs">{rows}</dl>'


def _image(index: int, image: dict) -> str:
    reference, engine = image["reference"], image.get("engine")
    facts = [f"SHA-256 {image['sha256'][:12]}"]
    for key, name in (("agreement", "agreement"), ("top1_engine", "top-1"), ("kl_engine", "KL")):
        if image.get(key) is not None:
            facts.append(glued(f"{name} {_number(image[key])}"))
    if image["request"]:
        facts.append(", ".join(f"{key} {value}" for key, value in image["request"].items()))
    body = ""
    if engine is None:
        body = f'<p class="why">The engine gave no reading.</p><pre>{text(reference["text"])}</pre>'
    else:
        left, right = _marked(reference["text"], engine["text"])
        columns = "".join(
            f"<div><h3>{name}<small>{said['tokens']} tokens, "
            f"{text(said.get('status', said['finish_reason']))}</small></h3><pre>{marked}</pre></div>"
            for name, said, marked in (("reference", reference, left), ("engine", engine, right))
        )
        body = f'<div class="two">{columns}</div>'
    for name, control in (image.get("controls") or {}).items():
        says = ["; ".join(control[whose]["says"]) or control[whose]["status"] for whose in ("reference", "engine")]
        same = says[0] == says[1]
        shown = text(says[0]) if same else f"{text(says[0])} → <mark>{text(says[1])}</mark>"
        body += f'<p class="control"><span>{text(name)}</span> {shown}</p>'
    same = engine is not None and reference["text"] == engine["text"]
    opened = "" if same else " open"
    word = "same text" if same else "differs"
    if not same and image.get("agreement") == 1:
        word = "same answer, other words"
    return (
        f"<details class='raw'{opened}><summary>Image {index + 1} · {word} · {text(' · '.join(facts))}</summary>"
        f"{body}</details>"
    )


def _marked(reference: str, engine: str) -> tuple[str, str]:
    """Both texts in HTML, with the words that differ marked."""
    a, b = (re.findall(r"\s+|[^\s]+", said) for said in (reference, engine))
    left, right = [], []
    for kind, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for out, words in ((left, a[a1:a2]), (right, b[b1:b2])):
            piece = text("".join(words))
            out.append(piece if kind == "equal" or not piece else f"<mark>{piece}</mark>")
    return "".join(left), "".join(right)


def _number(value: float | None, holds: Callable[[float], bool] = lambda value: True) -> str:
    """Three digits, or as many as leave the answer of `holds` as it is; what is all but 1 as what it lacks."""
    if value is None:
        return "not finite"
    is_near_one = 0 < 1 - value < 1e-4
    told, digits = (1 - value, 2) if is_near_one else (value, 4 if 0.99 < value < 1 else 3)
    while digits < 17:
        rounded = float(f"{told:.{digits - 1}e}")
        if holds(1 - rounded if is_near_one else rounded) == holds(value):
            break
        digits += 1
    return f"1 − {number(told, digits)}" if is_near_one else number(told, digits)


def _missing(cosine: float | None) -> str:
    return _number(None) if cosine is None else number(max(1 - cosine, 0.0), 2)


_STYLE = """
.parts { columns: 3 330px; column-gap: 18px; margin-bottom: 18px; }
section { margin: 0 0 18px; break-inside: avoid; }
.parts section:last-child { margin-bottom: 0; }
.numbers :is(td, th):not(:first-child) { text-align: right; padding: 4px 0 4px 14px; }
.numbers td:not(:first-child) { white-space: nowrap; }
.numbers :is(td, th):first-child { padding-right: 0; }
tr.bad td { color: var(--bad); font-weight: 600; }
.small { color: var(--soft); font-size: .9rem; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 18px; margin-bottom: 14px;
}
.chart { background: none; border-radius: 0; margin: 0; }
.chart figcaption { color: var(--soft); border: 0; padding: 0 0 4px; }
.chart svg { width: 100%; max-width: 520px; height: auto; display: block; }
.chart path { stroke: var(--line); }
.chart rect { fill: var(--bar); stroke: none; }
.chart text { fill: var(--soft); font: 11px system-ui, sans-serif; text-anchor: middle; }
h2.readings { margin: 26px 0 12px; }
h3 { font-size: .9rem; margin: 10px 0 0; }
h3 small { font-weight: 400; margin-left: .7em; }
.raw { margin-bottom: 10px; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 22px; }
.control { margin: 8px 0 0; font-size: .9rem; }
.control span { color: var(--soft); display: inline-block; min-width: 5.5em; }
mark { background: var(--bad-bg); color: var(--bad); padding: 0 .1em; border-radius: 2px; }
h1 .badge { float: none; font-size: .95rem; vertical-align: 2px; margin-left: .3em; }
@media (max-width: 820px) {
  .two { grid-template-columns: 1fr; }
  .numbers { font-size: .8rem; }
  .numbers :is(td, th):not(:first-child) { padding-left: 8px; }
}
.numbers td:empty:not(:first-child) { padding: 0; }
"""
