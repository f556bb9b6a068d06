"""The models' own verifiable rewards: an answer and the right answer in, a number out; pure text, no model.

NV-Reason-CXR-3B's five (grammar ``think_answer``) and CheXOne's format, option and grounding rewards (grammar
``boxed``), as their authors trained with them. Rewards that need models of their own (RadCliQ, CheXbert) are not made
up here: `register` takes a callable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cxr_triton.errors import InvalidRequest
from cxr_triton.profile import ANSWERS, GRAMMARS

SHORT_TOKENS = 400
"""Answers of fewer tokens are penalized (NV-Reason's `get_soft_overshort_punishment`)."""
OTHER_NAME = 0.95
"""Factor of a box whose name differs from the right one (CheXOne's `Iou_ORM`)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer to be rewarded.

    Attributes
    ----------
    text : str
        The whole completion.
    gold : str
        Right answer as the grammar writes it inside its answer block or box: labels with commas between them, option
        letters, or ``<|ref|>...<|/ref|><|box|>(x1,y1),(x2,y2)<|/box|>``.
    tokens : int
        Length of the completion.
    labels : tuple of str
        The closed vocabulary; empty where the task has none.
    """

    text: str
    gold: str
    tokens: int
    labels: tuple[str, ...] = ()


Reward = Callable[[Sample], float]


@dataclass(frozen=True)
class _Entry:
    reward: Reward
    grammar: str
    answers: frozenset[str]


_REWARDS: dict[str, _Entry] = {}


def register(name: str, reward: Reward, *, grammar: str, answers: Iterable[str] = ANSWERS) -> None:
    """Add a reward, for instance a report metric that needs models of its own.

    Parameters
    ----------
    name : str
        Key in the results.
    reward : callable
        `Sample` to float; must not draw at random.
    grammar : str
        One of `cxr_triton.profile.GRAMMARS`.
    answers : iterable of str
        Kinds of answers that it applies to, of `cxr_triton.profile.ANSWERS`; by default all.

    Raises
    ------
    InvalidRequest
        The name is taken, or grammar or answers are unknown.
    """
    answers = frozenset(answers)
    if name in _REWARDS:
        raise InvalidRequest(f"reward {name!r} exists already; choose another name")
    if grammar not in GRAMMARS or not answers or not answers <= set(ANSWERS):
        raise InvalidRequest(
            f"reward {name!r}: grammar {grammar!r} and answers {sorted(answers)}, allowed are {GRAMMARS} and {ANSWERS}"
        )
    _REWARDS[name] = _Entry(reward, grammar, answers)


def unregister(name: str) -> None:
    """Remove a reward that `register` added; a name that is unknown is ignored."""
    _REWARDS.pop(name, None)


def rewards_for(grammar: str, answer: str) -> dict[str, Reward]:
    """Rewards that apply to a grammar and a kind of answer, by name."""
    return {
        name: entry.reward for name, entry in _REWARDS.items() if entry.grammar == grammar and answer in entry.answers
    }


def gold_of(text: str, grammar: str) -> str:
    """What a completion holds as its answer, for use as `Sample.gold`; empty where it has none."""
    if grammar == "think_answer":
        return (_answer_block(text) or "").strip()
    if grammar == "boxed":
        return boxed(text)[1] or ""
    return text.strip()


# NV-Reason-CXR-3B: train/vlm_rewards.py of NVIDIA-Medtech/NV-Reason-CXR.

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def _answer_block(text: str) -> str | None:
    match = _ANSWER.search(text)
    return match[1] if match else None


def _label_set(text: str, labels: Iterable[str]) -> frozenset[str]:
    known = {label.lower() for label in labels}
    return frozenset(part.strip().lower() for part in text.split(",")) & known


def accuracy(sample: Sample) -> float:
    """Intersection over union of the label sets after everything outside the vocabulary is dropped.

    Both empty give 1.0, a completion without ``<answer>`` block 0.
    """
    block = _answer_block(sample.text)
    if block is None:
        return 0.0
    gold, said = _label_set(sample.gold, sample.labels), _label_set(block, sample.labels)
    return len(gold & said) / len(gold | said) if gold | said else 1.0


def format_think(sample: Sample) -> float:
    """1 if the completion is a think block, white space and an answer block, and nothing before or after.

    The authors' pattern ends in ``$``, which lets one line feed pass at the end; here it fails as a space does.
    """
    return float(_FORMAT.fullmatch(sample.text) is not None)


def tag_count(sample: Sample) -> float:
    """A quarter for each of the four tags that appears exactly once."""
    return sum(0.25 for tag in _TAGS if sample.text.count(tag) == 1)


def accuracy_hard(sample: Sample) -> float:
    """`accuracy` where `format_think` and `tag_count` are 1, else 0: what the model was trained on."""
    return accuracy(sample) if format_think(sample) == tag_count(sample) == 1 else 0.0


def overshort(sample: Sample) -> float:
    """0 from 400 tokens on, below it (n - 400) / 400."""
    return 0.0 if sample.tokens >= SHORT_TOKENS else max(-1.0, (sample.tokens - SHORT_TOKENS) / SHORT_TOKENS)


# CheXOne: examples/train/grpo/plugin/plugin.py of its repository.

_FIRST_BOX = re.compile(r"(.*?)\\boxed\{([^}]*)\}", re.DOTALL)
_ANY_BOX = re.compile(r"\\boxed\{([^}]*)\}")
_OPTION_FORMS = (
    re.compile(r"\(([A-Za-z0-9])\)"),
    re.compile(r"\b([A-Za-z0-9])[.:：,\s]"),
    re.compile(r"\b([A-Za-z0-9])\b"),
)
_REF = re.compile(r"<\|ref\|>(.*?)<\|/ref\|>")
_BOX = re.compile(r"<\|box\|>(.*?)<\|/box\|>")


def boxed(text: str) -> tuple[str | None, str | None]:
    r"""Text before the first ``\boxed{`` and its content up to the first ``}``; None for what is absent or blank."""
    match = _FIRST_BOX.search(text)
    before, inside = match.groups() if match else (text, "")
    return before.strip() or None, inside.strip() or None


def format_boxed(sample: Sample) -> float:
    r"""1 if there is exactly one ``\boxed{...}``, not blank, with text before it that is not blank."""
    before, inside = boxed(sample.text)
    return float(len(_ANY_BOX.findall(sample.text)) == 1 and before is not None and inside is not None)


def options(text: str) -> frozenset[str]:
    """Option letters: ``(X)``, else a letter before one of ``. : ,`` or space, else lone letters, else the text."""
    for form in _OPTION_FORMS:
        if found := form.findall(text):
            return frozenset(found)
    return frozenset([text])


def option_iou(sample: Sample) -> float:
    """Intersection over union of the options in the box and the right ones; 0 without a box."""
    inside = boxed(sample.text)[1]
    if inside is None:
        return 0.0
    said, gold = options(inside), options(sample.gold)
    return len(said & gold) / len(said | gold)


def grounding_iou(sample: Sample) -> float:
    """Intersection over union of the first named box and the first right one, times 0.95 if the names differ.

    Four integers each, anything else gives 0.
    """
    inside = boxed(sample.text)[1]
    gold = gold_of(sample.gold, "boxed") or sample.gold
    said, right = (_first_box(text) for text in (inside or "", gold))
    if said is None or right is None or said[1] is None or right[1] is None:
        return 0.0
    return box_iou(said[1], right[1]) * (1.0 if said[0] == right[0] else OTHER_NAME)


def _first_box(text: str) -> tuple[str, tuple[int, ...] | None] | None:
    """Name and corners of the first pair of name and box; the corners are None unless they are four integers."""
    names, boxes = _REF.findall(text), _BOX.findall(text)
    if not names or not boxes:
        return None
    try:
        parts = boxes[0].replace("(", "").replace(")", "").split(",")
        corners = tuple(int(part) for part in parts if part.strip())
    except ValueError:
        corners = ()
    return names[0].lower(), corners if len(corners) == 4 else None


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return overlap / (areas - overlap + 1e-16)


for _name, _reward, _grammar, _answers in (
    ("accuracy", accuracy, "think_answer", ("labels",)),
    ("format", format_think, "think_answer", ("labels",)),
    ("tag_count", tag_count, "think_answer", ("labels",)),
    ("accuracy_hard", accuracy_hard, "think_answer", ("labels",)),
    ("overshort", overshort, "think_answer", ("labels",)),
    ("format_boxed", format_boxed, "boxed", ANSWERS),
    ("option_iou", option_iou, "boxed", ("option",)),
    ("grounding_iou", grounding_iou, "boxed", ("boxes",)),
):
    register(_name, _reward, grammar=_grammar, answers=_answers)
