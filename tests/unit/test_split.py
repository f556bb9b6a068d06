"""Reasoning and content told apart while the text comes: as the parser judges it afterwards, however it is cut."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_triton.profile import GRAMMARS
from cxr_triton.reading import parse
from cxr_triton.split import CONTENT, REASONING, Splitter

PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<thinking>",
        "</thinking >",
        "<answer>",
        "</answer>",
        "<",
        "</",
        "<th",
        "<b>",
        "\\boxed{",
        "\\boxed {",
        "{",
        "}",
        "\\{",
        "\\}",
        "\\",
        "\\box",
        "$",
        "$$",
        ".",
        " ",
        "\n",
        "word",
        "Lungs are clear.",
        "é",
    ]
)
TEXTS = st.lists(PIECES, max_size=14).map("".join)


def split(grammar: str, chunks) -> dict[str, str]:
    splitter = Splitter(grammar)
    parts = [part for chunk in chunks for part in splitter.push(chunk)]
    parts += splitter.finish()
    assert all(text for _, text in parts)
    return {name: "".join(text for part, text in parts if part == name) for name in (REASONING, CONTENT)}


@pytest.mark.parametrize("grammar", GRAMMARS)
@settings(deadline=None)  # a busy machine
@given(text=TEXTS, cuts=st.lists(st.integers(0, 60), max_size=8))
def test_how_the_text_is_cut_changes_nothing(grammar, text, cuts):
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    chunks = [text[a:b] for a, b in itertools.pairwise(places)]
    whole = split(grammar, [text])
    assert split(grammar, chunks) == whole
    assert split(grammar, text) == whole


@pytest.mark.parametrize("grammar", GRAMMARS)
@settings(deadline=None)  # a busy machine
@given(text=TEXTS)
def test_no_word_is_dropped(grammar, text):
    kept = "".join(split(grammar, [text]).values())
    for word in ("word", "Lungs are clear.", "é", "<b>"):
        assert kept.count(word) == text.count(word)


WORDS = st.text(st.sampled_from("ab .,()\n"), min_size=1).filter(str.strip)


@settings(deadline=None)  # a busy machine
@given(
    reasoning=WORDS, answer=WORDS, tag=st.sampled_from(["think", "thinking", "THINK"]), gap=st.sampled_from(["", "\n"])
)
def test_a_well_formed_answer_is_split_as_it_is_parsed(reasoning, answer, tag, gap):
    text = f"<{tag}>{reasoning}</{tag}>{gap}<answer>{answer}</answer>{gap}"
    parsed = parse(text, grammar="think_answer", answer="prose")
    assert parsed.status == "ok"
    assert split("think_answer", text) == {REASONING: parsed.reasoning, CONTENT: parsed.answer}


@settings(deadline=None)  # a busy machine
@given(reasoning=WORDS, answer=WORDS, frame=st.sampled_from(["{}", "${}$", "$${}$$.", "\n{}.\n"]))
def test_a_boxed_answer_is_split_as_it_is_parsed(reasoning, answer, frame):
    text = reasoning + frame.format(rf"\boxed{{{answer}}}")
    parsed = parse(text, grammar="boxed", answer="prose")
    assert parsed.status == "ok"
    assert split("boxed", text) == {REASONING: parsed.reasoning, CONTENT: parsed.answer}


@pytest.mark.parametrize(
    ("grammar", "text", "reasoning", "content"),
    [
        ("think_answer", "The heart is large.", "", "The heart is large."),
        ("think_answer", "<think>cut off <", "cut off <", ""),
        ("think_answer", "<think>a<answer>b", "a", "b"),
        ("think_answer", "<think>a</think>Then: <answer>b</answer>", "a", "Then:\nb"),
        ("think_answer", "<think>5 < 6 </answer> </think> x", "5 < 6 </answer>", "x"),
        ("boxed", r"a {b} \boxed{A {c} \} d}", "a {b}", r"A {c} \} d"),
        ("boxed", r"First \boxed{A}. Then \boxed{B}.", "First\n. Then", "A\nB"),
        ("boxed", "no box at all", "no box at all", ""),
        ("plain", " <think>a</think> ", "", "<think>a</think>"),
    ],
)
def test_answers_out_of_form(grammar, text, reasoning, content):
    assert split(grammar, text) == {REASONING: reasoning, CONTENT: content}


def test_text_is_given_as_soon_as_it_can_be_no_mark():
    splitter = Splitter("think_answer")
    assert list(splitter.push("<think>The heart <")) == [(REASONING, "The heart")]
    assert list(splitter.push("i")) == [(REASONING, " <i")]
    assert list(splitter.push("</thi")) == []
    assert list(splitter.push("nk>")) == [] and not splitter.has_content
    assert list(splitter.push("<answer> No")) == [(CONTENT, "No")] and splitter.has_content
