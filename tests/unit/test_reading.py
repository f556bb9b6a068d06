"""The answer grammars, and the READING JSON against its schema."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from cxr_triton.errors import ServerMismatch
from cxr_triton.profile import load_profile
from cxr_triton.reading import FLAGS, STATUSES, Reading, parse

LABELS = load_profile("nv-reason-cxr-3b").labels
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "reading.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
FACTS = {
    "task": "findings",
    "prompt": "Find abnormalities and support devices.",
    "model": {"profile": "nv-reason-cxr-3b", "precision": "fp32"},
    "images": ({"preset": "mimic_jpg", "flags": ["lossy"]},),
    "usage": {"prompt_tokens": 316, "completion_tokens": 20},
    "timings_ms": {"decode": 12.5},
    "notice": "not for diagnosis",
}


def nv(text, answer="labels", finish_reason="stop"):
    return parse(text, grammar="think_answer", answer=answer, labels=LABELS, finish_reason=finish_reason)


def cx(text, answer="prose", **more):
    return parse(text, grammar="boxed", answer=answer, **more)


def names(parsed):
    return [finding.label for finding in parsed.findings]


def test_training_form():
    parsed = nv("<think> The heart is large. </think>\n<answer> Cardiomegaly, Support Devices </answer>")
    assert (parsed.status, parsed.flags) == ("ok", ())
    assert parsed.reasoning == "The heart is large."
    assert names(parsed) == ["Cardiomegaly", "Support Devices"]


def test_thinking_is_an_alias():
    parsed = nv("<thinking>a</thinking><answer>Edema</answer>")
    assert (parsed.status, parsed.reasoning, names(parsed)) == ("ok", "a", ["Edema"])
    assert parsed.flags == ("thinking_alias",)


def test_labels_are_tolerant_ordered_and_once():
    parsed = nv("<think>a</think><answer>  pleural  EFFUSION,Edema , edema,\nLung_Opacity.</answer>")
    assert (parsed.status, names(parsed)) == ("ok", ["Pleural Effusion", "Edema", "Lung Opacity"])
    assert parsed.findings[0].written == "pleural  EFFUSION"


def test_a_label_outside_the_vocabulary_is_listed():
    parsed = nv("<think>a</think><answer>Edema, Pleural_Thinking</answer>")
    assert (parsed.status, names(parsed), parsed.unknown_labels) == (
        "out_of_vocabulary",
        ["Edema"],
        ("Pleural_Thinking",),
    )


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("", "missing_answer"),
        ("The lungs are clear.", "missing_answer"),
        ("<think> clear </think>", "missing_answer"),
        ("<think> clear </think> <answer> No Finding", "unclosed"),
        ("<think> clear <answer> No Finding </answer>", "unclosed"),
        ("<think> clear", "unclosed"),
        ("<answer> No Finding </answer>", "missing_reasoning"),
        ("<think>a</think><answer>  </answer>", "empty_answer"),
        ("<think>a</think><answer> , ,</answer>", "empty_answer"),
        ("<think>a</think></answer>Edema<answer>", "unclosed"),
    ],
)
def test_missing_pieces_are_malformed(text, flag):
    parsed = nv(text)
    assert parsed.status == "malformed"
    assert flag in parsed.flags


def test_an_unclosed_answer_gives_no_labels():
    assert nv("<think>a</think><answer> Pleural Effusion, Edema").findings == ()


def test_the_last_of_several_answers_counts():
    parsed = nv("<think>a</think><answer>Edema</answer> or <answer>Fracture</answer>")
    assert names(parsed) == ["Fracture"]
    assert set(parsed.flags) == {"multiple_answers", "text_outside"}


@pytest.mark.parametrize("grammar", ["think_answer", "boxed", "plain"])
def test_the_token_limit_is_told_whatever_was_written(grammar):
    for text in ("<think> The hea", "<think>a</think><answer>Edema</answer>", r"so \boxed{Edema}", r"so \boxed{Ede"):
        parsed = parse(text, grammar=grammar, answer="labels", labels=LABELS, finish_reason="length")
        assert parsed.status == "truncated"
    assert nv("<think> The hea", finish_reason="length").reasoning == "The hea"


def test_follow_up_prose_needs_no_tags():
    report = "**Findings**\n- Lungs: clear\n\n**Impression**\n1. Normal."
    assert (nv(report, "prose").status, nv(report, "prose").report) == ("ok", report)
    both = nv(f"<think>walk</think>\n{report}", "prose")
    assert (both.status, both.reasoning, both.report) == ("ok", "walk", report)
    assert nv("<think> never ends", "prose").status == "malformed"
    assert nv("  \n", "prose").status == "malformed"


def test_free_text_takes_labels_when_they_are_there():
    parsed = nv("<think>a</think><answer>Edema, Fracture</answer>", "text")
    assert (parsed.status, names(parsed)) == ("ok", ["Edema", "Fracture"])
    parsed = nv("<think>a</think><answer>The left lung, mostly.</answer>", "text")
    assert (parsed.status, parsed.findings, parsed.report) == ("ok", (), "The left lung, mostly.")


def test_boxed_report_with_headings():
    parsed = cx(
        "**Thinking Process:**\n\n1. **Lungs:** clear {sic}.\n\n**Final Answer:**\n\\boxed{The lungs {both} are clear.}"
    )
    assert (parsed.status, parsed.flags) == ("ok", ())
    assert parsed.report == "The lungs {both} are clear."
    assert parsed.reasoning == "1. **Lungs:** clear {sic}."


def test_dangling_dollars_are_dropped():
    parsed = cx("The chest X-ray shows an effusion. $$ \\boxed{C} $$", "option")
    assert (parsed.status, parsed.flags, parsed.reasoning) == ("ok", (), "The chest X-ray shows an effusion.")
    assert parsed.options == ("C",)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{A} no, \boxed{B}", "B"),
        (r"so \boxed{\boxed{A}}", "A"),
        (r"so \boxed {A}", "A"),
        (r"so \boxed{{A}}", "A"),
        (r"so \boxed{\text{A}}", "A"),
        (r"so \boxed{{a} and {b}}", "{a} and {b}"),
        (r"so \boxed{a \} b}", r"a \} b"),
    ],
)
def test_box_by_depth_and_last(text, answer):
    parsed = cx(text)
    assert (parsed.status, parsed.answer) == ("ok", answer)
    assert ("multiple_boxed" in parsed.flags) == (text.count("boxed") > 1)


@pytest.mark.parametrize(
    "text", ["no box", r"so \boxed{never closed", r"so \boxed{}", r"so \boxed{{}}", r"\boxed{A} \boxed{B"]
)
def test_bad_boxes_are_malformed(text):
    assert cx(text).status == "malformed"


def test_instruct_mode_is_the_answer():
    parsed = parse(" Lungs are clear. ", grammar="plain", answer="prose")
    assert (parsed.status, parsed.report, parsed.reasoning) == ("ok", "Lungs are clear.", None)
    assert parse(" ", grammar="plain", answer="prose").status == "malformed"


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("(A) worsening", ("A",)),
        ("(A), (C)", ("A", "C")),
        ("B", ("B",)),
        ("A, C", ("A", "C")),
        ("A and C", ("A", "C")),
        ("C. Left lower lobe", ("C",)),
        ("D: none", ("D",)),
        ("Yes", ("Yes",)),
        ("no, it does not", ("No",)),
        ("A small effusion", ()),
        ("worsening", ()),
    ],
)
def test_options(content, options):
    parsed = parse(content, grammar="plain", answer="option")
    assert parsed.options == options
    assert ("no_option" in parsed.flags) == (not options)


def test_percent_boxes_become_source_pixels():
    text = "It is at \\boxed{<|ref|>pneumothorax<|/ref|><|box|>(12,60),(18,87)<|/box|>}"
    parsed = cx(text, "boxes", image_sizes=[(2544, 3056)])
    (box,) = parsed.boxes
    assert (parsed.status, parsed.flags, box.label, box.image) == ("ok", (), "pneumothorax", 0)
    assert box.percent == (12, 60, 18, 87)
    assert box.pixels == pytest.approx((366.72, 1526.4, 550.08, 2213.28))


def test_a_label_holds_for_the_boxes_after_it():
    text = "<|ref|>rib<|/ref|><|box|>(0,0),(10,10)<|/box|><|box|>(20,20),(100,100)<|/box|>"
    parsed = parse(text, grammar="plain", answer="boxes", image_sizes=[(10, 20)])
    assert [box.label for box in parsed.boxes] == ["rib", "rib"]
    assert parsed.boxes[1].pixels == (4, 2, 20, 10)


@pytest.mark.parametrize(
    ("box", "flags", "pixels"),
    [
        ("(30,40),(10,20)", {"box_reversed"}, (20, 20, 60, 40)),
        ("(-5,0),(120,50)", {"box_out_of_range"}, (0, 0, 200, 50)),
        ("(10,10),(10,90)", {"box_empty"}, (20, 10, 20, 90)),
        ("(150,0),(160,10)", {"box_out_of_range", "box_empty"}, (200, 0, 200, 10)),
    ],
)
def test_odd_boxes_are_flagged(box, flags, pixels):
    parsed = parse(f"<|box|>{box}<|/box|>", grammar="plain", answer="boxes", image_sizes=[(100, 200)])
    assert (parsed.status, set(parsed.flags)) == ("ok", flags)
    assert parsed.boxes[0].pixels == pixels
    assert parsed.boxes[0].percent == tuple(float(n) for n in box.replace("(", "").replace(")", "").split(","))


@pytest.mark.parametrize(
    "text",
    ["<|box|>(1,2),(3)<|/box|>", "<|box|>(1,2),(3,4)", "somewhere left", f"<|box|>({'9' * 5000},0),(1,1)<|/box|>"],
)
def test_unreadable_boxes_are_malformed(text):
    assert parse(text, grammar="plain", answer="boxes", image_sizes=[(9, 9)]).status == "malformed"


def test_nothing_detected_is_an_answer():
    parsed = parse("No chest tubes detected.", grammar="plain", answer="boxes", image_sizes=[(9, 9)])
    assert (parsed.status, parsed.boxes) == ("ok", ())


def test_boxes_of_several_images_are_on_the_last_and_say_so():
    parsed = parse("<|box|>(0,0),(50,50)<|/box|>", grammar="plain", answer="boxes", image_sizes=[(1, 1), (100, 100)])
    assert (parsed.boxes[0].image, parsed.boxes[0].pixels) == (1, (0, 0, 50, 50))
    assert "box_image_assumed" in parsed.flags


@pytest.mark.parametrize(
    "piece",
    [
        r"\boxed{",
        "{",
        "}",
        "$",
        "$ ",
        "<think>",
        "</think>",
        "<answer>",
        "<|ref|>",
        "<|box|>(1,",
        "A,",
        "**",
        "no detected ",
    ],
)
@pytest.mark.parametrize("grammar", ["think_answer", "boxed", "plain"])
def test_a_looping_model_is_taken_apart_in_linear_time(piece, grammar):
    text = piece * (60_000 // len(piece)) + "x"
    start = time.process_time()
    for answer in ("labels", "option", "boxes"):
        parse(text, grammar=grammar, answer=answer, labels=LABELS, image_sizes=[(9, 9)])
    assert time.process_time() - start < 2


PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<thinking>",
        "</thinking>",
        "<answer>",
        "</answer>",
        r"\boxed{",
        "{",
        "}",
        "$$",
        "Edema",
        ", ",
        "No Finding",
        "**Final Answer:**",
        "<|ref|>",
        "<|/ref|>",
        "<|box|>(1,2),(30,4)<|/box|>",
        "<|box|>",
        "(1,2)",
        "(A)",
        "Yes",
        "\n",
        "No x detected.",
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=14).map("".join)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    text=TEXTS,
    grammar=st.sampled_from(["think_answer", "boxed", "plain"]),
    answer=st.sampled_from(["labels", "prose", "option", "boxes", "text"]),
    finish_reason=st.sampled_from(["stop", "stop", "stop", "length"]),
    image_sizes=st.lists(st.tuples(st.integers(1, 9999), st.integers(1, 9999)), max_size=2),
)
def test_every_text_gives_a_reading_that_the_schema_knows(text, grammar, answer, finish_reason, image_sizes):
    parsed = parse(
        text, grammar=grammar, answer=answer, labels=LABELS, finish_reason=finish_reason, image_sizes=image_sizes
    )
    assert parsed.text == text
    assert set(parsed.flags) <= set(FLAGS)
    assert parsed.status != "ok" or parsed.answer
    assert parsed.status != "ok" or answer != "labels" or parsed.findings
    reading = Reading.of(parsed, **FACTS)
    wire = reading.to_json()
    VALIDATOR.validate(json.loads(wire))
    assert Reading.from_json(wire) == reading
    assert Reading.from_json(wire.encode()) == reading


def test_schema_and_code_name_the_same_statuses_and_flags():
    Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["properties"]["flags"]["items"]["enum"]) == set(FLAGS)
    assert tuple(SCHEMA["properties"]["status"]["enum"]) == tuple(STATUSES)


def test_schema_refuses_what_is_no_reading():
    good = json.loads(Reading.of(nv("<think>a</think><answer>Edema</answer>"), **FACTS).to_json())
    VALIDATOR.validate(good)
    for key, value in {
        "status": "fine",
        "findings": ["Edema"],
        "notice": "",
        "boxes": [{"percent": [1, 2, 3]}],
        "more": 1,
        "images": [{"identity": {"file_sha256": "0" * 64}}],
    }.items():
        assert not VALIDATOR.is_valid({**good, key: value})
    for key in good.keys() - {"guide"}:  # servers before it had none
        assert not VALIDATOR.is_valid({k: v for k, v in good.items() if k != key})


def test_what_was_asked_for_besides_is_there_only_then():
    plain = Reading.of(nv("<think>a</think><answer>Edema</answer>"), **FACTS)
    assert not {"scores", "token_logprobs", "token_ends"} & set(json.loads(plain.to_json()))
    assert "score" not in json.loads(plain.to_json())["findings"][0]
    findings = tuple(dataclasses.replace(finding, score=3.5) for finding in plain.findings)
    asked = {"token_logprobs": (-0.25, 0.0), "token_ends": (10, 37), "scores": {"Edema": 3.5, "Fracture": -7.0}}
    full = dataclasses.replace(plain, findings=findings, **asked)
    wire = json.loads(full.to_json())
    VALIDATOR.validate(wire)
    assert Reading.from_json(full.to_json()) == full
    for change in ({"token_logprobs": [0.1]}, {"token_ends": [-1]}, {"scores": {}}, {"scores": {"Edema": None}}):
        assert not VALIDATOR.is_valid({**wire, **change})
    assert not VALIDATOR.is_valid({key: value for key, value in wire.items() if key != "token_ends"})


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"scores": {"Edema": "high"}},
        {"scores": [1.0]},
        {"token_logprobs": ["-1"]},
        {"token_ends": {"a": 1}},
        {"findings": [{"label": "Edema", "written": "Edema", "score": True}]},
        {"text": 3},
        {"findings": [1]},
        {"findings": {}},
        {"boxes": [{"label": "x"}]},
        {"notice": None},
        {"timings_ms": {"total": "soon"}},
        {"usage": {"prompt_tokens": None}},
        {"images": ["x"]},
    ],
)
def test_a_client_refuses_what_is_no_reading(change):
    good = json.loads(Reading.of(nv("<think>a</think><answer>Edema</answer>"), **FACTS).to_json())
    assert Reading.from_json(json.dumps({**good, "new_key": 1})).findings[0].label == "Edema"
    with pytest.raises(ServerMismatch):
        Reading.from_json(json.dumps({**good, **change}))
    for text in ("", "[]", "[" * 100_000, b"\xff", '"x"'):
        with pytest.raises(ServerMismatch):
            Reading.from_json(text)
