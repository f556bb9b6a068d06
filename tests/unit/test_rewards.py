"""Rewards of both models on the edge cases that their authors' code decides."""

import pytest

from cxr_triton import rewards
from cxr_triton.errors import InvalidRequest
from cxr_triton.profile import load_profile
from cxr_triton.rewards import Sample

LABELS = load_profile("nv-reason-cxr-3b").labels
GOOD = "<think> Heart wide. </think>\n<answer> Cardiomegaly, Edema </answer>"


def sample(text, gold="Cardiomegaly, Edema", tokens=500):
    return Sample(text=text, gold=gold, tokens=tokens, labels=LABELS)


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        (GOOD, "Edema,cardiomegaly", 1.0),
        (GOOD, "Cardiomegaly", 0.5),
        ("<answer>Edema, Pleural_Thinking</answer>", "Edema", 1.0),  # outside the vocabulary is dropped
        ("<answer>Nonsense</answer>", "nothing", 1.0),  # both empty
        ("<answer></answer>", "Edema", 0.0),
        ("Edema", "Edema", 0.0),  # no block
        ("<answer>Edema", "Edema", 0.0),
        ("<answer>Edema</answer><answer>Fracture</answer>", "Edema", 1.0),  # the first block counts
        ("<answer>Lung\nOpacity</answer>", "Lung Opacity", 0.0),
    ],
)
def test_accuracy(text, gold, expected):
    assert rewards.accuracy(sample(text, gold)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1.0),
        ("<think>a\nb</think><answer>c\nd</answer>", 1.0),
        (GOOD + "\n", 0.0),
        (GOOD + " ", 0.0),
        (" " + GOOD, 0.0),
        ("<think>a</think> and <answer>b</answer>", 0.0),
        ("<thinking>a</thinking><answer>b</answer>", 0.0),
        ("<think>a<answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(text, expected):
    assert rewards.format_think(sample(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1.0),
        ("<think><think></think><answer></answer>", 0.75),
        ("<thinking></thinking><answer></answer>", 0.5),
        ("<answer>", 0.25),
        ("", 0.0),
    ],
)
def test_tag_count(text, expected):
    assert rewards.tag_count(sample(text)) == expected


def test_hard_accuracy_needs_format_and_tags():
    assert rewards.accuracy_hard(sample(GOOD, "Cardiomegaly")) == 0.5
    assert rewards.accuracy_hard(sample(GOOD + "\n")) == 0.0
    repeated = "<think>a</think><answer>Edema</answer><answer>Edema</answer>"
    assert rewards.format_think(sample(repeated)) == 1.0 and rewards.accuracy(sample(repeated, "Edema")) == 1.0
    assert rewards.accuracy_hard(sample(repeated, "Edema")) == 0.0


@pytest.mark.parametrize(("tokens", "expected"), [(0, -1.0), (100, -0.75), (399, -0.0025), (400, 0.0), (1800, 0.0)])
def test_short_answers_are_penalized(tokens, expected):
    assert rewards.overshort(sample(GOOD, tokens=tokens)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"Reasoned. $$ \boxed{C} $$", 1.0),
        (r"\boxed{C}", 0.0),  # no reasoning
        (r"   \boxed{C}", 0.0),
        (r"Reasoned. \boxed{ }", 0.0),
        (r"Reasoned. \boxed{A} \boxed{B}", 0.0),
        (r"Reasoned. \boxed{A", 0.0),
        ("Reasoned.", 0.0),
    ],
)
def test_format_boxed(text, expected):
    assert rewards.format_boxed(sample(text)) == expected


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(A), (C)", {"A", "C"}),
        ("(A) PA, B. AP", {"A"}),  # brackets win
        ("A. PA, C: LATERAL", {"A", "C"}),
        ("B", {"B"}),
        ("Yes", {"Yes"}),
        ("A and B", {"A"}),  # a letter before a space wins over a lone one
        ("Pleural effusion", {"Pleural effusion"}),
    ],
)
def test_options(text, found):
    assert rewards.options(text) == found


def test_option_iou():
    assert rewards.option_iou(sample(r"So \boxed{(A), (B)}", "B, C")) == pytest.approx(1 / 2)  # gold reads as {B}
    assert rewards.option_iou(sample(r"So \boxed{(A), (B)}", "(B), (C)")) == pytest.approx(1 / 3)
    assert rewards.option_iou(sample(r"So \boxed{B} or \boxed{C}", "C")) == 0.0  # the first box counts
    assert rewards.option_iou(sample("B", "B")) == 0.0  # no box
    assert rewards.option_iou(sample(r"So \boxed{}", "B")) == 0.0


def place(name, corners):
    return f"<|ref|>{name}<|/ref|><|box|>{corners}<|/box|>"


@pytest.mark.parametrize(
    ("said", "gold", "expected"),
    [
        (place("Tube", "(0,0),(10,10)"), place("tube", "(0,0),(10,10)"), 1.0),  # names without regard to case
        (place("Line", "(0,0),(10,10)"), place("Tube", "(0,0),(10,10)"), 0.95),
        (place("Tube", "(0,0),(10,10)"), place("Tube", "(5,0),(15,10)"), 1 / 3),
        (place("Tube", "(0,0),(10,10)"), place("Tube", "(20,20),(30,30)"), 0.0),
        (place("Tube", "(0,0),(10,10.0)"), place("Tube", "(0,0),(10,10)"), 0.0),  # integers only
        (place("Tube", "(0,0),(10)"), place("Tube", "(0,0),(10,10)"), 0.0),  # four numbers
        ("<|box|>(0,0),(10,10)<|/box|>", place("Tube", "(0,0),(10,10)"), 0.0),  # a box without a name
        ("No Tube detected.", place("Tube", "(0,0),(10,10)"), 0.0),
    ],
)
def test_grounding(said, gold, expected):
    assert rewards.grounding_iou(sample(rf"Seen. \boxed{{{said}}}", gold)) == pytest.approx(expected)
    assert rewards.grounding_iou(sample(said, gold)) == 0.0, "there is no boxed answer"


def test_grammar_and_answer_choose_the_rewards():
    assert set(rewards.rewards_for("think_answer", "labels")) == {
        *("accuracy", "format", "tag_count", "accuracy_hard", "overshort")
    }
    assert set(rewards.rewards_for("boxed", "option")) == {"format_boxed", "option_iou"}
    assert set(rewards.rewards_for("boxed", "boxes")) == {"format_boxed", "grounding_iou"}
    assert set(rewards.rewards_for("boxed", "prose")) == {"format_boxed"}
    assert rewards.rewards_for("plain", "prose") == {}


def test_a_report_metric_plugs_in():
    rewards.register("words", lambda s: float(len(s.text.split())), grammar="boxed", answers=("prose",))
    try:
        assert rewards.rewards_for("boxed", "prose")["words"](sample("one two")) == 2
        assert "words" not in rewards.rewards_for("boxed", "option")
        with pytest.raises(InvalidRequest, match="exists already"):
            rewards.register("words", len, grammar="boxed")
    finally:
        rewards.unregister("words")
    with pytest.raises(InvalidRequest, match="grammar"):
        rewards.register("words", len, grammar="rhyme")


@pytest.mark.parametrize(
    ("grammar", "text", "gold"),
    [
        ("think_answer", GOOD, "Cardiomegaly, Edema"),
        ("think_answer", "nothing", ""),
        ("boxed", r"So \boxed{ B }", "B"),
        ("boxed", "nothing", ""),
        ("plain", " Clear lungs. ", "Clear lungs."),
    ],
)
def test_gold_of_a_completion(grammar, text, gold):
    assert rewards.gold_of(text, grammar) == gold
