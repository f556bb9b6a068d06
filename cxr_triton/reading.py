"""A model's answer → a typed reading, and the READING JSON of the wire (``docs/reading.schema.json``).

`parse` never raises and never drops text: what it cannot take apart is said by `status` and `flags`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from cxr_triton.errors import ServerMismatch

VERSION = 1
NOT_FOR_DIAGNOSIS = "Research only. Not for diagnosis."
STATUSES = {
    "ok": "well formed",
    "malformed": "malformed: a part of the expected form is missing, so an empty list of findings does not mean none",
    "truncated": "truncated: the token limit came before the end of the answer",
    "out_of_vocabulary": "out of vocabulary: the answer lists labels that the model was not trained to give",
    "doubtful_image": "of a doubtful image: it may be damaged, no chest, or of a view new to the model; see the flags",
}
STAGES = ("image_decode", "preprocess", "vision", "queue", "prefill", "decode", "scores", "report")
"""Of `Reading.timings_ms`, one after the other; ``scores`` only where they were asked for."""
ASKED = ("token_logprobs", "token_ends", "scores")
"""Keys that only a reading has for which they were asked."""
LATERALITIES = {"L": "left", "R": "right", "U": "unpaired", "B": "both"}
FLAGS = {
    "thinking_alias": "the reasoning block is written <thinking>",
    "missing_reasoning": "there is no closed reasoning block, or nothing before the boxed answer",
    "missing_answer": "there is no closed answer block or boxed answer",
    "unclosed": "a block or a box is opened and not closed",
    "empty_answer": "the answer is blank",
    "multiple_answers": "more than one answer block; the last one counts",
    "multiple_boxed": "more than one \\boxed; the last one counts",
    "text_outside": "text stands outside the blocks, or after the boxed answer",
    "no_option": "no option letter, yes or no was found in the answer",
    "unreadable_box": "a box is not written <|box|>(x1,y1),(x2,y2)<|/box|>",
    "box_reversed": "a box has its corners swapped; pixels are put in order",
    "box_out_of_range": "a box reaches outside 0 to 100 percent; pixels are clipped to the image",
    "box_empty": "a box has no area inside the image",
    "box_image_assumed": "boxes are taken to be on the last (current) of several images",
}


Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2"""


def image_name(index: int, count: int) -> str:
    """What an image of a reading is called: prior ones come first, the current one last."""
    if count == 1:
        return "Image"
    return f"Image {index + 1}, {'current' if index == count - 1 else 'prior'}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A label of the vocabulary that the answer lists.

    Attributes
    ----------
    label : str
        As the profile spells it.
    written : str
        As the model spelled it.
    score : float or None
        As in `Reading.scores`; None where none was asked for.
    """

    label: str
    written: str
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box that the answer places.

    Attributes
    ----------
    label : str or None
    percent : tuple of float
        x1, y1, x2, y2 as the model wrote them, percent of width and height.
    pixels : tuple of float or None
        x1, y1, x2, y2 on the original image, in order and inside it: pixel edges from the top left corner, so that the
        whole image is (0, 0, width, height). None when the image's size is unknown.
    image : int or None
        Index of the image in the request; None without images.
    """

    label: str | None
    percent: Corners
    pixels: Corners | None
    image: int | None


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What the grammar gives.

    Attributes
    ----------
    status : str
        ``ok``; ``malformed``: a piece of the grammar is missing or unreadable; ``truncated``: the token limit came
        first; ``out_of_vocabulary``: well formed, but `unknown_labels` are none of the profile's; ``doubtful_image``:
        well formed, but an image has one of `cxr_triton.pixels.flags.DOUBTFUL` (of a `Reading` only).
    text : str
        The model's text, untouched.
    reasoning, answer : str or None
        The parts, trimmed; headings and ``$$`` around a boxed answer are dropped.
    findings : tuple of Finding
        Labels in the order given, each once. Empty means "none" only when the status is ``ok``.
    options : tuple of str
        Letters, ``Yes`` or ``No`` of an ``option`` answer.
    report : str or None
        The answer when it is prose.
    flags : tuple of str
        Keys of `FLAGS`.
    """

    status: str
    finish_reason: str
    text: str
    reasoning: str | None = None
    answer: str | None = None
    findings: tuple[Finding, ...] = ()
    unknown_labels: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    report: str | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reading(Parsed):
    """The last message of a served reading.

    Attributes
    ----------
    task : str or None
    prompt : str
        The user's turn as the model got it; with `text` it is the next turn's history.
    model : dict
        Profile, revision, engine, precision, bundle digest.
    images : tuple of dict
        Per image: identity (see `cxr_triton.identity`), syntax, photometric interpretation, preset that ran, size,
        grid, flags.
    usage : dict of str to int
    timings_ms : dict of str to float
    notice : str
        Research-only notice; show it wherever the reading is shown.
    guide : str
        What the answer was held to while it was written, of `cxr_triton.guide.GUIDES`.
    token_logprobs : tuple of float
        Log-probability of each token in nats, by the model's own logits; empty where they were not asked for.
    token_ends : tuple of int
        Where in `text` each of them ends, in characters.
    scores : dict of str to float
        Log-odds, in nats, of the answer with each label or option and without it, given the reasoning that was written;
        from -15 to 15 (`cxr_triton.alternatives.SCORE_LIMIT`). Not calibrated, and no probability of a disease. Empty
        where they were not asked for, or where the answer has no list that could be taken apart.
    trace_id : str
        Of the request, as the logs and spans on its way have it (`cxr_triton.trace`); readings that differ in it alone
        are equal. Empty where the request had none.
    """

    task: str | None
    prompt: str
    model: dict[str, Any]
    images: tuple[dict[str, Any], ...] = ()
    usage: dict[str, int] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)
    notice: str
    guide: str = "none"
    token_logprobs: tuple[float, ...] = ()
    token_ends: tuple[int, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    trace_id: str = field(default="", compare=False)

    @classmethod
    def of(cls, parsed: Parsed, **facts) -> Reading:
        """A reading of a parsed answer and the facts around it (`task` to `notice`)."""
        return cls(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(Parsed)}, **facts)

    def to_json(self) -> str:
        """READING, one JSON object as ``docs/reading.schema.json`` describes it."""
        data = dataclasses.asdict(self)
        data["findings"] = [{k: v for k, v in each.items() if v is not None} for each in data["findings"]]
        data = {key: value for key, value in data.items() if value or key not in (*ASKED, "trace_id")}
        return json.dumps({"version": VERSION, **data}, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Reading:
        """A reading from READING; keys that this version does not know are ignored.

        Raises
        ------
        ServerMismatch
            Not JSON, of another version, or a key is missing or of the wrong type.
        """
        try:
            data = json.loads(text)
            version = data["version"]
            if version != VERSION:
                raise ServerMismatch(f"READING: version {version}, this client reads {VERSION}; install the server's")
            optional = (*ASKED, "guide", "trace_id")  # servers before it had none
            names = [f.name for f in dataclasses.fields(cls) if f.name in data or f.name not in optional]
            return cls(**{name: _typed(name, data[name]) for name in names})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ServerMismatch(
                f"READING: is not a reading: {type(error).__name__} {error}; use a client of the server's version"
            ) from None


def parse(
    text: str,
    *,
    grammar: str,
    answer: str,
    labels: Sequence[str] = (),
    finish_reason: str = "stop",
    image_sizes: Sequence[tuple[int, int]] = (),
) -> Parsed:
    r"""Take a model's answer apart.

    Parameters
    ----------
    text : str
    grammar : str
        ``think_answer`` (``<think>`` or ``<thinking>``, then ``<answer>``), ``answer_only`` (``<answer>`` alone),
        ``boxed`` (reasoning, then ``\boxed{}``) or ``plain``.
    answer : str
        What the answer is: ``labels``, ``prose``, ``option``, ``boxes`` or ``text`` (see `cxr_triton.profile.Task`), or
        ``json``, which a guide holds to a schema.
        Prose in ``think_answer`` and text in any grammar may come without tags.
    labels : sequence of str
        The vocabulary.
    finish_reason : str
        Anything but ``stop`` makes the status ``truncated``.
    image_sizes : sequence of (height, width)
        Pixels of the original images, for the boxes.
    """
    flags: dict[str, None] = {}  # an ordered set
    reasoning, content = (_json_blocks if answer == "json" else _blocks)(text, grammar, answer, flags)
    ill = {"unclosed", "missing_answer", *(["missing_reasoning"] if grammar == "think_answer" else [])}
    well_formed = not flags.keys() & ill
    content = content.strip() if content is not None else None
    if content == "":
        content = None
        flags["empty_answer"] = None
    found = _contents(content, answer, labels, image_sizes, flags) if content is not None else _Contents(readable=False)
    status = "ok"
    if finish_reason != "stop":
        status = "truncated"
    elif not (well_formed and found.readable):
        status = "malformed"
    elif found.unknown:
        status = "out_of_vocabulary"
    return Parsed(
        status=status,
        finish_reason=finish_reason,
        text=text,
        reasoning=reasoning.strip() or None if reasoning is not None else None,
        answer=content,
        findings=found.findings,
        unknown_labels=found.unknown,
        options=found.options,
        boxes=found.boxes,
        report=content if answer in ("prose", "text") and not found.findings else None,
        flags=tuple(flags),
    )


def _blocks(text: str, grammar: str, answer: str, flags: dict) -> tuple[str | None, str | None]:
    """Reasoning and answer; None where the grammar calls for one and there is none."""
    if grammar == "plain":
        return None, text
    reasoning, content = (_boxed if grammar == "boxed" else _think_answer)(text, flags)
    if grammar == "answer_only":
        flags.pop("missing_reasoning", None)
    if answer == "text" or (answer == "prose" and grammar == "think_answer"):
        # Follow-ups and free prompts are answered in prose, after a reasoning block or without one.
        if "missing_answer" in flags and "unclosed" not in flags:
            content = _without_tags(text, grammar)
            reasoning = None if grammar == "boxed" else reasoning
            for flag in ("missing_answer", "text_outside"):
                flags.pop(flag, None)
        flags.pop("missing_reasoning", None)
    return reasoning, content


def _json_blocks(text: str, grammar: str, _: str, flags: dict) -> tuple[str | None, str | None]:
    """Reasoning and the first JSON value where the answer begins, whatever stands in its texts."""
    opening = {"boxed": "\\boxed{", "plain": ""}.get(grammar, "<answer>")
    reasoning, content = text.partition(opening)[::2] if opening else ("", text)
    content = content.lstrip()
    try:
        content = content[: json.JSONDecoder().raw_decode(content)[1]]
    except (ValueError, RecursionError):
        flags["missing_answer"] = None
        return None, None
    return _strip_headings(_TAG.sub("", reasoning)), content


class _Contents(NamedTuple):
    findings: tuple[Finding, ...] = ()
    unknown: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    readable: bool = True


def _contents(
    content: str, answer: str, labels: Sequence[str], sizes: Sequence[tuple[int, int]], flags: dict
) -> _Contents:
    found = _Contents()
    if answer in ("labels", "text"):
        findings, unknown = _labels(content, labels)
        if answer == "labels":
            found = _Contents(findings, unknown, readable=bool(findings or unknown))
            if not found.readable:  # nothing but commas
                flags["empty_answer"] = None
        elif not unknown:
            found = _Contents(findings)
    elif answer == "option":
        found = _Contents(options=_options(content))
        if not found.options:
            flags["no_option"] = None
    boxes, readable = _boxes(content, sizes, flags)
    if answer == "boxes":
        return _Contents(boxes=boxes, readable=readable and bool(boxes or _NOT_DETECTED.fullmatch(content)))
    return found._replace(boxes=boxes)


_TAG = re.compile(r"<(/?)(think|thinking|answer)\s*>", re.IGNORECASE)


def _think_answer(text: str, flags: dict) -> tuple[str | None, str | None]:
    """Text of the reasoning block and of the last answer block; None where there is no closed one."""
    blocks: dict[str, list[str]] = {"think": [], "answer": []}
    outside, start = [], 0  # of the open block, or of the text outside
    block: str | None = None  # the block that is open
    for tag in _TAG.finditer(text):
        name = "answer" if tag[2].lower() == "answer" else "think"
        if tag[2].lower() == "thinking":
            flags["thinking_alias"] = None
        closes = bool(tag[1]) and name == block
        opens = not tag[1] and (block is None or (block, name) == ("think", "answer"))
        if not (closes or opens):
            continue
        if block is None:
            outside.append(text[start : tag.start()])
        else:
            if block == "answer" and blocks["answer"]:
                flags["multiple_answers"] = None
            blocks[block].append(text[start : tag.start()])
            if opens:
                flags["unclosed"] = None
        block, start = name if opens else None, tag.end()
    reasoning, content = (parts[-1] if parts else None for parts in blocks.values())
    if block is None:
        outside.append(text[start:])
    else:
        flags["unclosed"] = None
        reasoning, content = (text[start:], content) if block == "think" else (reasoning, None)
    missing = {"missing_reasoning": reasoning is None, "missing_answer": content is None}
    missing["text_outside"] = any(part.strip() for part in outside)
    flags.update(dict.fromkeys(flag for flag, holds in missing.items() if holds))
    return reasoning, content


_BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_HEAD = re.compile(r"\A\s*(?:\*\*|#+\s*)?Thinking Process:?(?:\*\*)?:?", re.IGNORECASE)
_TAIL = re.compile(r"(?:(?:\*\*|#+[ \t]*)?Final Answer:?(?:\*\*)?:?|\$+|\\\[|\\\()\s*\Z", re.IGNORECASE)
_TAIL_CHARS = 40
_AFTER_BOX = re.compile(r"(?:\s|\$|\\\]|\\\)|\.)*")
_ECHOED_BRACES = re.compile(r"\{([^{}]*)\}")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}")


def _boxed(text: str, flags: dict) -> tuple[str | None, str | None]:
    r"""Text before the last ``\boxed{...}`` and its content by brace depth; None where there is no closed one."""
    last = _last_box(text, flags)
    if last is None:
        flags["missing_answer"] = None
        return _strip_headings(text), None
    reasoning = _strip_headings(text[: last.outermost])
    if not reasoning:
        flags["missing_reasoning"] = None
    if not _AFTER_BOX.fullmatch(text, last.end):
        flags["text_outside"] = None
    content = text[last.start : last.stop].strip()
    for wrapper in (_ECHOED_BRACES, _LATEX_TEXT):
        if whole := wrapper.fullmatch(content):
            content = whole[1]
    return reasoning, content


def answer_span(text: str, grammar: str) -> tuple[int, int, int] | None:
    """Where the last answer begins and ends, and where what closes it ends; None where there is no closed one."""
    if grammar == "plain":
        return 0, len(text), len(text)
    if grammar == "boxed":
        last = _last_box(text, {})
        return (last.start, last.stop, last.end) if last else None
    start, span = None, None
    for tag in _TAG.finditer(text):
        if tag[2].lower() != "answer":
            continue
        if tag[1] and start is not None:
            span = start, tag.start(), tag.end()
        start = None if tag[1] else tag.end()
    return span


class _Boxed(NamedTuple):
    start: int  # of the content
    stop: int
    outermost: int  # where the outermost box around it starts
    end: int


def _last_box(text: str, flags: dict) -> _Boxed | None:
    """The closed box that starts last."""
    stack: list[tuple[bool, int, int]] = []  # is a box; start of the outermost box or -1; start of the content
    last: _Boxed | None = None
    openings = 0
    for brace in _BRACE.finditer(text):
        if brace[0] == "}":
            box, outermost, start = stack.pop() if stack else (False, -1, 0)
            if box and (last is None or start > last.start):
                last = _Boxed(start, brace.start(), outermost, brace.end())
        elif brace[0] not in (r"\{", r"\}"):
            box, outermost = brace[0] != "{", stack[-1][1] if stack else -1
            openings += box
            stack.append((box, brace.start() if box and outermost < 0 else outermost, brace.end()))
    if openings > 1:
        flags["multiple_boxed"] = None
    if any(box for box, _, _ in stack):
        flags["unclosed"] = None
    return last


def _strip_headings(text: str) -> str:
    text = _HEAD.sub("", text.strip(), count=1).rstrip()
    while tail := _TAIL.search(text, max(0, len(text) - _TAIL_CHARS)):
        text = text[: tail.start()].rstrip()
    return text.strip()


def _without_tags(text: str, grammar: str) -> str:
    """The answer of a text without answer block: all that is not reasoning."""
    if grammar == "boxed":
        return _strip_headings(text)
    closings = [tag for tag in _TAG.finditer(text) if tag[1]]
    return _TAG.sub("", text[closings[-1].end() :] if closings else text).strip()


def _labels(content: str, vocabulary: Sequence[str]) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
    known = {_label_key(label): label for label in vocabulary}
    findings: dict[str, Finding] = {}
    unknown: dict[str, str] = {}
    for part in content.split(","):
        written, key = part.strip(), _label_key(part)
        if key in known:
            findings.setdefault(key, Finding(label=known[key], written=written))
        elif key:
            unknown.setdefault(key, written)
    return tuple(findings.values()), tuple(unknown.values())


def _label_key(label: str) -> str:
    return " ".join(label.replace("_", " ").split()).rstrip(".").rstrip().casefold()


_PARENTHESISED = re.compile(r"\(([A-Z])\)")
_LETTER_LIST = re.compile(r"([A-Z])(?:[.:)](?=\s|\Z)|\s*\Z)")
_YES_NO = re.compile(r"\s*(yes|no)\b", re.IGNORECASE)


def _options(content: str) -> tuple[str, ...]:
    letters = _PARENTHESISED.findall(content)
    if not letters:
        parts = (_LETTER_LIST.match(part.strip()) for part in re.split(r",|\n|\band\b", content))
        letters = [match[1] for match in parts if match]
    if letters:
        return tuple(dict.fromkeys(letters))
    yes_no = _YES_NO.match(content)
    return (yes_no[1].capitalize(),) if yes_no else ()


_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
_CORNER = rf"\({_NUMBER},{_NUMBER}\)"
_REF_OR_BOX = re.compile(rf"<\|ref\|>([^<]*)<\|/ref\|>|<\|box\|>\s*{_CORNER}\s*,?\s*{_CORNER}\s*<\|/box\|>")
_BOX_TAG = re.compile(r"<\|/?box\|>")
_NOT_DETECTED = re.compile(r"no\b.*\bdetected\.?", re.IGNORECASE | re.DOTALL)


def _boxes(content: str, sizes: Sequence[tuple[int, int]], flags: dict) -> tuple[tuple[Box, ...], bool]:
    """Boxes, and whether every box tag belongs to one."""
    boxes, label = [], None
    for match in _REF_OR_BOX.finditer(content):
        if match[1] is not None:
            label = match[1].strip() or None
            continue
        x1, y1, x2, y2 = map(float, match.groups()[1:])
        boxes.append(_box(label, (x1, y1, x2, y2), sizes, flags))
    readable = len(_BOX_TAG.findall(content)) == 2 * len(boxes)
    if not readable:
        flags["unreadable_box"] = None
    if boxes and len(sizes) > 1:
        flags["box_image_assumed"] = None
    return tuple(boxes), readable


def _box(label: str | None, percent: Corners, sizes: Sequence[tuple[int, int]], flags: dict) -> Box:
    x1, y1, x2, y2 = percent
    if x1 > x2 or y1 > y2:
        flags["box_reversed"] = None
    if min(percent) < 0 or max(percent) > 100:
        flags["box_out_of_range"] = None
    left, right, top, bottom = (min(max(v, 0.0), 100.0) for v in (min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)))
    if left == right or top == bottom:
        flags["box_empty"] = None
    pixels = None
    if sizes:
        height, width = sizes[-1]
        pixels = (left * width / 100, top * height / 100, right * width / 100, bottom * height / 100)
    return Box(label=label, percent=percent, pixels=pixels, image=len(sizes) - 1 if sizes else None)


@functools.cache
def _kinds() -> dict[str, Any]:
    """What `isinstance` takes for the JSON value of each field of a `Reading`."""
    kinds: dict[str, Any] = {}
    for name, hint in get_type_hints(Reading).items():
        origin = get_origin(hint)
        kinds[name] = list if origin is tuple else dict if origin is dict else get_args(hint) or hint
    return kinds


def _score(value: object) -> float | None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise TypeError(f"findings.score is {type(value).__name__}")
    return value


def _typed(name: str, value: Any) -> Any:
    if not isinstance(value, _kinds()[name]):
        raise TypeError(f"{name} is {type(value).__name__}")
    if name in ("usage", "timings_ms", *ASKED):
        for key, number in value.items() if isinstance(value, dict) else enumerate(value):
            if not isinstance(number, int | float) or isinstance(number, bool):
                raise TypeError(f"{name}.{key} is {type(number).__name__}")
    if name == "images" and not all(isinstance(facts, dict) for facts in value):
        raise TypeError("images has an item that is no object")
    if name == "findings":
        return tuple(Finding(label=f["label"], written=f["written"], score=_score(f.get("score"))) for f in value)
    if name == "boxes":
        return tuple(
            Box(
                label=item["label"],
                percent=tuple(item["percent"]),
                pixels=tuple(item["pixels"]) if item["pixels"] is not None else None,
                image=item["image"],
            )
            for item in value
        )
    return tuple(value) if isinstance(value, list) else value
