"""A verification record as one self-contained HTML page, without a file name."""

from __future__ import annotations

import difflib
import re

from cxr_triton.engines.verify.thresholds import THRESHOLDS
from cxr_triton.numbers import glued, measured, moment, number, shortest
from cxr_triton.page import render
from cxr_triton.page.plot import Plot

PARTS = {
    "files": "Tokenizer, template, configs, profile and weights are those of the checkpoint",
    "vision": "Image embeddings, token by token, on the images and on every kind of aspect ratio",
    "decoder": "Next-token distributions on the reference's own text",
    "readings": "What both say of the same images",
    "controls": "Occluded, blank and flipped images: the engine reacts as the reference does",
}
_MEANS = {"ok": "well formed", "truncated": "truncated", "out_of_vocabulary": "out of vocabulary", "tokens": "tokens"}


def verification_page(record: dict) -> str:
    """HTML of what `verify_bundle` gives.

    Parameters
    ----------
    record : dict
        With its `details`; without them (as in a manifest) the page has no readings.
    """
    details, passed = record.get("details") or {}, record["passed"] is True
    vision, decoder, readings, controls = (
        (record["parts"].get(part) or {}).get("measured") or {}
        for part in ("vision", "decoder", "readings", "controls")
    )
    return render(
        "verification.html",
        title=f"{details.get('title') or 'Engine'}: verification",
        notice=details.get("notice", ""),
        passed=passed,
        verdict="passed" if passed else "refused",
        sentence=_sentence(record),
        said=record["runtime"].get("said"),
        parts=[_part(name, record["parts"].get(name)) for name in PARTS],
        histograms=_histograms(vision, decoder),
        distances=[_distance(name, values) for name, values in vision.items() if "cosine" in _mapping(values)],
        labels=[
            {"label": name, **_both(flip), "flips": flip["flips"]}
            for name, flip in (readings.get("labels") or {}).items()
        ],
        means=_means(readings),
        controls=[_control(name, values) for name, values in controls.items()],
        facts=_facts(record),
        images=[_image(i, image) for i, image in enumerate(details.get("images", ()), 1)],
    )


def _sentence(record: dict) -> str:
    reference, images = record["reference"], record["images"]["count"]
    return (
        f"{record['runtime']['engine']} against {reference['runtime']} {reference['dtype']} on {reference['device']}, "
        f"{images} images, {glued(moment(record['made']))}"
    )


def _part(name: str, part: dict | None) -> dict[str, object]:
    if part is None:
        return {"name": name, "passed": False, "words": "", "error": "This part is missing.", "checks": []}
    checks = [_check(check) for check in part["checks"]]
    return {
        "name": name,
        "passed": part["passed"] is True,
        "words": PARTS[name],
        "error": part["error"],
        "checks": checks,
    }


def _check(check: dict) -> dict[str, object]:
    """What was measured, in as many digits as show on which side of its limit it lies."""
    told = {"name": check["name"], "passed": check["passed"]}
    if "limit" not in check:
        return told | {"value": check.get("said") or "same", "limit": "", "hint": ""}
    limit, at_least = check["limit"], check["at_least"]
    threshold = THRESHOLDS.get(check["name"].partition(",")[0])
    return told | {
        "value": measured(check["value"], lambda value: value >= limit if at_least else value <= limit),
        "limit": f"{'≥' if at_least else '≤'} {shortest(limit)}",
        "hint": threshold.meaning if threshold else "",
    }


def _mapping(values: object) -> dict:
    return values if isinstance(values, dict) else {}


def _histograms(vision: dict, decoder: dict) -> list[tuple[str, Plot]]:
    named = {"1 − cosine of image tokens": vision.get("histogram")}
    named |= {f"KL of tokens in nats, {whose}": _mapping(values).get("histogram") for whose, values in decoder.items()}
    return [(name, _histogram(histogram)) for name, histogram in named.items() if histogram]


def _histogram(histogram: dict) -> Plot:
    """A bin for every power of ten."""
    counts, low = histogram["counts"], histogram["log10_from"]
    edges = [(i, shortest(10.0 ** (low + i))) for i in range(0, len(counts) + 1, 2)]
    plot = Plot([0, len(counts)], [0, max(counts)], x_ticks=edges, y_ticks=(), height=160)
    for i, count in enumerate(counts):
        plot.box(i + 0.1, i + 0.9, 0, count, "one", top=number(count or ""))
    return plot


def _distance(name: str, values: dict) -> dict[str, object]:
    grid = glued(" × ".join(map(str, values.get("grid") or ())))
    mean, worst = (
        measured(None) if cosine is None else number(max(1 - cosine, 0.0), 2)
        for cosine in (values["cosine"], values["cosine_min"])
    )
    return {
        "images, tokens": f"{name}, {grid}" if grid else name,
        "1 − cosine, mean": mean,
        "1 − cosine, worst token": worst,
        "norm error": measured(values["norm_error"]),
    }


def _both(pair: dict) -> dict[str, float | None]:
    return {whose: pair[whose] for whose in ("reference", "engine")}


def _means(readings: dict) -> list[dict[str, object]]:
    pairs = {f"reward {name}": pair for name, pair in (readings.get("rewards") or {}).items()}
    pairs |= {label: readings[key] for key, label in _MEANS.items() if key in readings}
    return [
        {"": name, **{whose: measured(value) for whose, value in _both(pair).items()}} for name, pair in pairs.items()
    ]


def _control(name: str, values: dict) -> dict[str, object]:
    return {
        "control": name,
        "agree": measured(values["agreement"]),
        "reference": measured(values["change_reference"]),
        "engine": measured(values["change_engine"]),
        "difference": measured(values["change_difference"]),
    }


def _facts(record: dict) -> list[tuple[str, str]]:
    bundle, reference = (record.get("details") or {}).get("bundle") or {}, record["reference"]
    source = bundle.get("source") or {}
    pairs = [
        ("bundle", f"{bundle.get('precision', '')} for {bundle.get('engine', '')}" if bundle else ""),
        ("made from", " ".join(str(source[key]) for key in ("name", "revision") if source.get(key))),
        ("manifest without record", record["subject"]),
        ("run in", record["runtime"]["engine"]),
        ("stand-in", record["runtime"].get("standin") or "none"),
        ("profile", reference["profile"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in {**record["versions"], **reference["versions"]}.items())),
        ("images, SHA-256 over theirs", record["images"]["sha256"]),
    ]
    return [(name, value) for name, value in pairs if value]


def _image(index: int, image: dict) -> dict[str, object]:
    reference, engine = image["reference"], image.get("engine")
    is_same = engine is not None and reference["text"] == engine["text"]
    words = "same text" if is_same else "same answer, other words" if image.get("agreement") == 1 else "differs"
    facts = [f"Image {index}", words, f"SHA-256 {image['sha256'][:12]}"]
    for key, name in (("agreement", "agreement"), ("top1_engine", "top-1"), ("kl_engine", "KL")):
        if image.get(key) is not None:
            facts.append(glued(f"{name} {measured(image[key])}"))
    if image["request"]:
        facts.append(", ".join(f"{key} {value}" for key, value in image["request"].items()))
    said = None
    if engine is not None:
        texts = _compared(reference["text"], engine["text"])
        said = [
            (name, f"{each['tokens']} tokens, {each.get('status', each['finish_reason'])}", pieces)
            for name, each, pieces in zip(("reference", "engine"), (reference, engine), texts, strict=True)
        ]
    controls = [
        (name, _says(both["reference"]), _says(both["engine"])) for name, both in (image.get("controls") or {}).items()
    ]
    return {
        "summary": " · ".join(facts),
        "is_same": is_same,
        "text": reference["text"],
        "said": said,
        "controls": controls,
    }


def _says(reading: dict) -> str:
    return "; ".join(reading["says"]) or reading["status"]


def _compared(reference: str, engine: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in pieces, and which of them differ."""
    a, b = (re.findall(r"\s+|[^\s]+", said) for said in (reference, engine))
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    left = [("".join(a[begin:end]), kind != "equal") for kind, begin, end, _, _ in blocks if begin < end]
    right = [("".join(b[begin:end]), kind != "equal") for kind, _, _, begin, end in blocks if begin < end]
    return left, right
