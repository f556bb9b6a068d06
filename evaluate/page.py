"""A result as one self-contained HTML page that a reader of radiographs understands, without a patient's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cxr_triton.evaluate.gallery import Shown
from cxr_triton.evaluate.rows import Box, Row
from cxr_triton.evaluate.summary import known, said
from cxr_triton.evaluate.terms import TERMS, is_aside, meaning, short, title, told
from cxr_triton.numbers import number, percent
from cxr_triton.page import paragraphs, render
from cxr_triton.page.plot import Plot
from cxr_triton.reading import STATUSES, parse

PARTED = 12
"""Studies on which two engines part that a page shows."""
_COUNTS = ("support", "said")
_BY_LABEL = ("recall", "specificity", "precision", "f1", "auroc", "average_precision", "ece", "ap_30", "ap_50")
_NOT_OF_GROUPS = ("average_precision", "ece", "brier")
_UNITY = [(0.0, "0"), (0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %"), (1.0, "100 %")]

Chart = tuple[str, Plot, Sequence[tuple[str, str]]]
Pictures = Mapping[int, Sequence[Shown | None]]


def evaluation_page(
    summary: Mapping[str, Any],
    rows: Iterable[Row],
    pictures: Pictures | None = None,
    *,
    comparison: Mapping[str, Any] | None = None,
    other: Iterable[Row] = (),
) -> str:
    """HTML of a result.

    Parameters
    ----------
    summary : mapping
        As `cxr_triton.evaluate.summary.summarize` gives it. Identifiers stand on the page where they stand in it.
    rows : iterable of Row
        The result's.
    pictures : mapping, optional
        Of the cases that `shown_cases` names, see `cxr_triton.evaluate.gallery.pictures`; none leaves them out.
    comparison : mapping, optional
        What `cxr_triton.evaluate.compare.compare` says of an earlier result and this one.
    other : iterable of Row
        The earlier result's.
    """
    result = summary["result"]
    model, data = result["model"], result["data"]
    chosen = shown_cases(summary, comparison)
    ours, theirs = ({row.number: row for row in each if row.number in chosen} for each in (rows, other))
    return render(
        "evaluation.html",
        title=f"{model.get('title') or model.get('profile') or 'Reader'}: accuracy on {data['name']}",
        notice=summary["notice"],
        subtitle=" · ".join(
            (
                f"{model.get('engine', '')}, {model.get('precision', '')}",
                f"{data['name']}, {data.get('split') or 'all'}",
            )
        ),
        studies=_studies(summary),
        measures=[_measure(name, each) for name, each in summary["measures"].items() if not is_aside(name)],
        asides=[_measure(name, each) for name, each in summary["measures"].items() if is_aside(name)],
        codes=[_code(entry) for entry in summary["codes"]],
        labels=_labels(summary),
        roc=_curves(summary["curves"], "roc"),
        precision_recall=_curves(summary["curves"], "precision_recall", _prevalences(summary)),
        calibration=[_reliability(entry) for entry in summary["calibration"]],
        confusion=_confusion(summary),
        groups=_groups(summary),
        group_labels=[_group_label(group, label) for group in summary["groups"] for label in group["labels"]],
        comparison=_comparison(comparison) if comparison else None,
        gallery="Where both engines part, and the worst cases" if comparison else "Worst cases",
        cases=[_case(summary, ours[i], theirs.get(i), (pictures or {}).get(i, ())) for i in chosen if i in ours],
        has_boxes=result["kind"] == "boxes" and bool(pictures),
        facts=_facts(summary),
        meanings=[(name, words) for name, words in TERMS.values()],
    )


def shown_cases(summary: Mapping[str, Any], comparison: Mapping[str, Any] | None = None) -> list[int]:
    """Numbers of the studies that a page shows: those on which two engines part, then the worst ones."""
    parted = [case["number"] for case in comparison["parted"]["cases"][:PARTED]] if comparison else []
    return list(dict.fromkeys([*parted, *(case["number"] for case in summary["worst"])]))


def _studies(summary: Mapping[str, Any]) -> str:
    studies, resamples = summary["studies"], summary["bootstrap"]["resamples"]
    words = f"{number(studies['asked'])} studies of {number(studies['patients'])} patients"
    if left := studies["all"] - studies["asked"]:
        words += f"; {number(left)} more lack a picture or what is known of them, and count nowhere"
    if studies["failed"]:
        words += f"; {number(studies['failed'])} could not be read, which counts as wrong"
    return f"{words}. 95 % intervals by {number(resamples)} resamples of the patients."


def _measure(name: str, estimate: Mapping[str, float | None]) -> dict[str, object]:
    return {"measure": title(name), "value (95 % interval)": told(estimate), "meaning": meaning(name)}


def _code(entry: Mapping[str, Any]) -> dict[str, object]:
    share = entry["share"]
    return {
        "what": STATUSES.get(entry["code"], entry["code"]),
        "studies": entry["studies"],
        "share": told(share) if share else number(None),
    }


def _labels(summary: Mapping[str, Any]) -> list[dict[str, object]]:
    names = [name for name in _BY_LABEL if any(name in entry["measures"] for entry in summary["labels"])]
    counts = [name for name in _COUNTS if any(name in entry for entry in summary["labels"])]
    titles = {"support": "have it", "said": "said"}
    return [
        {"label": entry["label"], **{titles[name]: entry[name] for name in counts}}
        | {title(name): told(entry["measures"][name]) for name in names}
        for entry in summary["labels"]
    ]


def _prevalences(summary: Mapping[str, Any]) -> dict[str, float]:
    return {entry["label"]: entry["measures"]["prevalence"]["value"] for entry in summary["labels"] if "tp" in entry}


def _curves(curves: Sequence[Mapping], name: str, guesses: Mapping[str, float] | None = None) -> list[Chart]:
    charts: list[Chart] = []
    axes = ("false alarms", "sensitivity") if name == "roc" else ("sensitivity", "positive predictive value")
    for curve in curves:
        plot = Plot([0, 1], [0, 1], *axes, x_ticks=_UNITY, y_ticks=_UNITY)
        guess = (guesses or {}).get(curve["label"], 0.0)
        plot.line([(0, 0), (1, 1)] if name == "roc" else [(0, guess), (1, guess)], "soft dashed")
        plot.line([(x, y) for x, y in curve[name]], "one")
        charts.append((curve["label"], plot, ()))
    return charts


def _reliability(entry: Mapping[str, Any]) -> Chart:
    plot = Plot([0, 1], [0, 1], "score", "share that is true", x_ticks=_UNITY, y_ticks=_UNITY)
    plot.line([(0, 0), (1, 1)], "soft dashed")
    for each in entry["bins"]:
        observed, x = each["observed"], each["score"]
        if observed["low"] is not None:
            plot.box(x - 0.012, x + 0.012, observed["low"], observed["high"], "one pale")
        words = f"{number(each['count'])} studies, score {short(x)}, true {told(observed)}"
        plot.dot(x, observed["value"], "one", title=words)
    return entry["label"] or "Answers", plot, ()


def _confusion(summary: Mapping[str, Any]) -> dict[str, object] | None:
    counts, names = summary["confusion"], summary["result"]["labels"]
    if not counts:
        return None
    rows = []
    for i, row in enumerate(counts):
        has = summary["labels"][i]["support"]
        cells = [(count, "right" if i == j else _heat(count, has)) for j, count in enumerate(row)]
        rows.append((names[i], cells))
    return {"names": names, "rows": rows}


def _heat(count: int, whole: int) -> str:
    """How much of the studies that have a label it is."""
    share = count / whole if whole else 0.0
    return "many" if share >= 0.2 else "some" if share >= 0.05 else ""


def _groups(summary: Mapping[str, Any]) -> list[dict[str, object]]:
    names = [name for name in summary["measures"] if not (is_aside(name) or name.startswith(_NOT_OF_GROUPS))]
    return [
        {"group": f"{entry['group'].replace('_', ' ')}: {entry['value']}", "studies": entry["studies"]}
        | {"patients": entry["patients"]}
        | {title(name): told(entry["measures"][name]) for name in names if name in entry["measures"]}
        for entry in summary["groups"]
    ]


def _group_label(group: Mapping[str, Any], label: Mapping[str, Any]) -> dict[str, object]:
    names = [name for name in _BY_LABEL if name in label["measures"]]
    return {
        "group": f"{group['group'].replace('_', ' ')}: {group['value']}, {label['label']}",
        "have it": label.get("support"),
        **{title(name): told(label["measures"][name]) for name in names},
    }


def _comparison(comparison: Mapping[str, Any]) -> dict[str, object]:
    model, parted = comparison["a"]["model"], comparison["parted"]
    words = {
        "worse": "This engine is less accurate than the other one by more than the margin.",
        "no worse": "Whatever it loses is within the margin.",
        "not shown": "Neither a loss over the margin nor its absence is shown; more studies would tell.",
    }[comparison["verdict"]]
    return {
        "against": f"{model.get('engine', '')}, {model.get('precision', '')}",
        "verdict": comparison["verdict"],
        "words": f"{words} The margin is {short(comparison['margin'])}.",
        "measures": [_compared(entry) for entry in comparison["measures"] if entry["decides"]],
        "others": [_compared(entry) for entry in comparison["measures"] if not entry["decides"]],
        "labels": [_tested(entry) for entry in comparison["labels"]],
        "parted": f"Both say different things of {number(parted['studies'])} studies ({percent(parted['share'])}): "
        f"the other is more right on {number(parted['a_better'])}, this one on {number(parted['b_better'])}.",
    }


def _compared(entry: Mapping[str, Any]) -> dict[str, object]:
    compared = {
        "measure": title(entry["measure"]),
        "other": short(entry["a"]),
        "this": short(entry["b"]),
        "difference": told(entry["difference"]),
        "p": _p(entry.get("p_corrected", entry["p"])),
    }
    return compared | ({"verdict": entry["verdict"]} if entry["decides"] else {})


def _tested(entry: Mapping[str, Any]) -> dict[str, object]:
    return {
        "label": entry["label"],
        "only the other right": entry["only_a"],
        "only this one right": entry["only_b"],
        "p": _p(entry["p_corrected"]),
    }


def _p(p: float | None) -> str:
    if p is None:
        return number(None)
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _case(
    summary: Mapping[str, Any], row: Row, other: Row | None, pictures: Sequence[Shown | None]
) -> dict[str, object]:
    names = {case["number"]: case for case in summary["worst"]}.get(row.number, {})
    identity = [f"{key} {names[key]}" for key in ("study", "patient") if key in names]
    truth = known(row)
    sides: list[tuple[str, Row, Sequence[str] | None]] = [("true", row, truth), ("said", row, said(row))]
    if other:
        sides.append(("other", other, said(other)))
    return {
        "number": row.number,
        "name": ", ".join([f"Study {row.number}", *identity]),
        "pictures": [
            shown and _picture(shown, [_boxes(boxes, i, shown) for boxes in (row.truth.boxes, _placed(row))])
            for i, shown in enumerate(pictures)
        ],
        "sides": [(name, _marks(each, texts, truth, name)) for name, each, texts in sides],
        "reasoning": [
            (name, thoughts)
            for name, each in (("reasoning", row), ("the other's reasoning", other))
            if each and (thoughts := _reasoning(each))
        ],
    }


def _marks(row: Row, texts: Sequence[str] | None, truth: Sequence[str], side: str) -> list[tuple[str, str]]:
    """Words of one side, and whether the other side has them."""
    if texts is None:
        return [(STATUSES.get(row.code, row.code) or "no answer", "wrong")]
    if row.kind in ("boxes", "report"):
        return [(text, "plain") for text in texts]
    if side == "true":
        return [(text, "hit" if text in (said(row) or ()) else "missed") for text in texts]
    unknown = {label for label, value in row.truth.labels.items() if value is None}
    return [(text, "hit" if text in truth else "plain" if text in unknown else "wrong") for text in texts]


def _placed(row: Row) -> Sequence[Box]:
    return row.answer.boxes if row.answer else ()


def _boxes(boxes: Sequence[Box], image: int, shown: Shown) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height in percent of a picture."""
    drawn = []
    for box in boxes:
        if box.image == image:
            across, down = (100, 100) if box.unit == "percent" else (shown.width, shown.height)
            x1, y1, x2, y2 = box.corners
            drawn.append((100 * x1 / across, 100 * y1 / down, 100 * (x2 - x1) / across, 100 * (y2 - y1) / down))
    return drawn


def _picture(shown: Shown, boxes: Sequence[Sequence[tuple[float, float, float, float]]]) -> dict[str, object]:
    return {"png": shown.png, "true": boxes[0], "said": boxes[1]}


def _reasoning(row: Row) -> list[list[str]]:
    """What the model wrote before its answer; all that it wrote where the two cannot be told apart."""
    whole = row.answer.whole if row.answer else ""
    parsed = parse(whole, grammar="boxed" if "\\boxed" in whole else "think_answer", answer="text")
    return paragraphs(parsed.reasoning or whole)


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, object]]:
    result = summary["result"]
    facts = {
        "model": _words(result["model"]),
        "data": _words(result["data"]),
        "asked": result["request"].get("sent") or _words(result["request"]),
        "uncertain labels count as": result["uncertain"],
        "labels left empty count as": result["blank"],
        "several readers": result["readers"],
        "seed": result["seed"],
        "versions": _words(result["versions"]),
    }
    return [(name, value) for name, value in facts.items() if value not in (None, "")]


def _words(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value not in (None, "", [], {}))
