"""Grammars that answers follow: all that they allow is read without a fault, and what is read so is allowed."""

import json
import random
import re
import time

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from cxr_triton.engines.runtime.guide import Guide
from cxr_triton.engines.runtime.sampler import Sampler, TopLogits
from cxr_triton.errors import InvalidRequest
from cxr_triton.guide import LIMITS, MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, answer_grammar, schema_grammar
from cxr_triton.profile import GRAMMARS, load_profile
from cxr_triton.reading import parse
from cxr_triton.request import MAX_REQUEST_BYTES, ReadRequest
from cxr_triton.sampling import Sampling

BYTES = LLTokenizer("byte")
(EOS,) = BYTES.eos_tokens
NV, CHEXONE = load_profile("nv-reason-cxr-3b"), load_profile("chexone")
LABELS = NV.labels
OPTIONS = ("no change", "worse (a lot)", "better")
KINDS = ("labels", "option", "boxes", "prose", "text")
PIECES = (
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "\\boxed{",
        "}",
        "{",
        "\\",
        "\\\\{",
        "</thinking >",
        "<ANSWER>",
        ",",
    ),
    *("Edema", "pleural_effusion", "(A)", "(Z)", "B. no change", " and ", "Yes", "No edema detected", "x"),
    *("<|ref|>", "<|/ref|>", "<|box|>(1,2),(30.5,100)<|/box|>", "(1, 2)", '"', '"a"', ":", "[", "]", "7"),
)
SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 40},
        "severity": {"enum": ["none", "</answer>", "} \\boxed{"]},
        "parts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 12}, "maxItems": 3},
    },
    "required": ["text", "severity"],
    "additionalProperties": False,
}


def matcher(grammar):
    found = LLMatcher(BYTES, grammar, limits=LLParserLimits(**LIMITS), log_level=0)
    assert not found.is_error(), found.get_error()
    return found


def guide_of(kind, answer, options=OPTIONS):
    return answer_grammar(grammar=kind, answer=answer, labels=LABELS, options=options)


def written(grammar, seed, most=4000):
    """A text that a grammar allows from its start to an end, of pieces that mislead and of bytes."""
    state, draw, ids = matcher(grammar), random.Random(seed), []
    while len(ids) < most:
        if state.is_accepting() and (draw.random() < 0.3 or state.is_stopped()):
            return BYTES.decode_bytes(ids).decode()
        if draw.random() < 0.6:
            piece = list(draw.choice(PIECES).encode())
            if state.validate_tokens(piece) == len(piece):
                state.consume_tokens(piece)
                ids += piece
                continue
        mask = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")
        allowed = [i for i in np.flatnonzero(mask).tolist() if i != EOS]
        if not allowed:
            return BYTES.decode_bytes(ids).decode()
        ids.append(draw.choice([i for i in allowed if i < 128] or allowed))
        state.consume_token(ids[-1])
    return None


def is_allowed(grammar, text):
    state, ids = matcher(grammar), list(text.encode())
    return state.try_consume_tokens(ids) == len(ids) and state.is_accepting()


@pytest.mark.parametrize("answer", KINDS)
@pytest.mark.parametrize("kind", GRAMMARS)
def test_what_a_grammar_allows_is_read_without_a_fault(kind, answer):
    grammar = guide_of(kind, answer)
    if grammar is None:
        assert (kind, answer) in {("plain", "prose"), ("plain", "text")}
        return
    texts = [text for seed in range(40) if (text := written(grammar, seed)) is not None]
    assert len(texts) > 5
    for text in texts:
        parsed = parse(text, grammar=kind, answer=answer, labels=LABELS, image_sizes=[(100, 100)])
        assert parsed.status == "ok", (text, parsed)
        assert not set(parsed.flags) & {
            "unclosed",
            "multiple_answers",
            "multiple_boxed",
            "box_out_of_range",
            "no_option",
        }
        assert set(parsed.options) <= set("ABC"), text


@pytest.mark.parametrize("kind", GRAMMARS)
def test_json_is_what_its_schema_says_wherever_the_answer_stands(kind):
    grammar = schema_grammar(SCHEMA, grammar=kind)
    texts = [text for seed in range(60) if (text := written(grammar, seed)) is not None]
    assert len(texts) > 5
    for text in texts:
        parsed = parse(text, grammar=kind, answer="json")
        assert parsed.status == "ok", text
        jsonschema.validate(json.loads(parsed.answer), SCHEMA)
    assert parse("<think>a</think><answer>{", grammar="think_answer", answer="json").status == "malformed"


@pytest.mark.parametrize(
    ("kind", "answer", "text"),
    [
        ("think_answer", "labels", "<think>The heart is < 50 % of the chest.</think><answer>Edema, Pneumonia</answer>"),
        ("think_answer", "labels", "<thinking>\nThe lungs.\n</thinking>\n\n<answer>No Finding</answer>\n"),
        ("think_answer", "labels", "<think></think> <answer>\npleural_effusion,edema.\n</answer>"),
        ("think_answer", "labels", f"<think>{{\\frac}}</think><answer>{', '.join(LABELS)}</answer>"),
        ("think_answer", "prose", "Heart failure comes first."),
        ("think_answer", "prose", "<think>Edema.</think>\nHeart failure."),
        ("think_answer", "text", "<think>Edema.</think><answer>Edema, with a doubt.</answer>"),
        ("answer_only", "labels", "<answer>Lung Opacity, Support Devices</answer>"),
        ("boxed", "option", "The set {1, 2} is \\frac{1}{2}.\n\n**Final Answer**\n$\\boxed{{(B) worse}}$."),
        ("boxed", "option", "So \\boxed{A, C}"),
        ("boxed", "option", "So \\boxed{\\text{B}}\n"),
        ("boxed", "option", "\\boxed{A. no change}"),
        ("boxed", "prose", "Hence \\boxed{Lungs {clear}, no \\{x\\} effusion.}"),
        ("boxed", "boxes", "\\boxed{<|ref|>edema<|/ref|><|box|>(12,60),(18.5,87)<|/box|>}"),
        ("boxed", "boxes", "None. \\boxed{No pneumothorax detected.}"),
        ("plain", "option", "(A) no change, (C) better"),
        ("plain", "boxes", "<|box|>(0,0),(100,100)<|/box|><|box|>(1,2),(3,4)<|/box|>"),
    ],
)
def test_an_answer_that_is_read_without_a_fault_may_be_written(kind, answer, text):
    parsed = parse(text, grammar=kind, answer=answer, labels=LABELS, image_sizes=[(100, 100)])
    assert parsed.status == "ok" and not set(parsed.flags) - {"thinking_alias", "missing_reasoning", "missing_answer"}
    assert is_allowed(guide_of(kind, answer), text)


@pytest.mark.parametrize(
    ("kind", "answer", "text"),
    [
        ("think_answer", "labels", "<think>a</think><answer>Edema, Broken Rib</answer>"),
        ("think_answer", "labels", "<think>a</think><answer></answer>"),
        ("think_answer", "labels", "<think>a<answer>Edema</answer>"),
        ("think_answer", "labels", "<answer>Edema</answer>"),
        ("answer_only", "labels", "<think>a</think><answer>Edema</answer>"),
        ("boxed", "option", "So \\boxed{D}"),
        ("boxed", "option", "So \\boxed{yes}"),
        ("boxed", "boxes", "\\boxed{<|box|>(12,60),(18,187)<|/box|>}"),
        ("boxed", "prose", "\\boxed{a } b}"),
        ("plain", "option", "It is (A)."),
    ],
)
def test_what_would_be_a_fault_may_not_be_written(kind, answer, text):
    assert not is_allowed(guide_of(kind, answer), text)


def test_options_are_those_of_the_request():
    def held(task, variables):
        request = {"task": task, "variables": variables, "mode": "instruct", "guide": "answer"}
        return ReadRequest.from_json(json.dumps(request), CHEXONE).guide_grammar

    listed = held("vqa", {"question": "Where?", "options": ["left", "right"]})
    assert is_allowed(listed, "(B)") and not is_allowed(listed, "(C)") and not is_allowed(listed, "Yes")
    spelled = held("vqa", {"question": "Where?", "options": "(A) left (D) both"})
    assert is_allowed(spelled, "(D)") and not is_allowed(spelled, "(B)")
    asked = held("disease", {"disease": "edema"})
    assert is_allowed(asked, "Yes") and is_allowed(asked, "no.") and not is_allowed(asked, "(A)")


def test_a_mode_gives_the_label_list_at_once():
    request = ReadRequest.from_json('{"mode": "labels"}', NV)
    assert (request.guide, request.grammar, request.answer) == ("answer", "answer_only", "labels")
    assert parse("<answer>Edema</answer>", grammar="answer_only", answer="labels", labels=LABELS).status == "ok"
    with pytest.raises(InvalidRequest, match="is for answers of labels, and task 'educational' is answered with text"):
        ReadRequest.from_json('{"mode": "labels", "task": "educational"}', NV)


@pytest.mark.parametrize(
    "guide", ["any", 1, True, [], {}, {"json_schema": 1}, {"json_schema": {}, "more": 1}, {"lark": ""}]
)
def test_a_guide_of_another_form_is_refused(guide):
    with pytest.raises(InvalidRequest, match=r"REQUEST\.guide"):
        ReadRequest.from_json(json.dumps({"guide": guide}), NV)


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def doubling(depth):
    """Each definition stands twice in the one before."""
    twice = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$defs": {**twice, f"d{depth}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def product(factors, choices):
    any_of = [{"anyOf": [{"required": [f"p{i}_{j}"]} for j in range(choices)]} for i in range(factors)]
    return {"type": "object", "allOf": any_of}


HOSTILE = {
    "http": {"$ref": "http://127.0.0.1:1/a.json"},
    "file": {"properties": {"a": {"items": [{"$ref": "file:///etc/passwd"}]}}},
    "dynamic": {"$dynamicRef": "https://example.org/a"},
    "base": {"$id": "http://example.org/a", "properties": {"a": {"$ref": "b.json"}}},
    "dangling": {"$ref": "#/$defs/none"},
    "itself": {"$ref": "#"},
    "circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "deep": nested(MAX_SCHEMA_DEPTH + 1),
    "large": {"enum": ["x" * MAX_SCHEMA_BYTES]},
    "product": product(8, 8),
    "lookahead": {"type": "string", "pattern": "^(?=.*a)b$"},
    "broken pattern": {"type": "string", "pattern": "(("},
    "type": {"type": "picture"},
    "not": {"not": {"type": "string"}},
    "half a pair": {"const": "\ud800"},
    "lenient": {"x-guidance": {"lenient": True}, "not": {}},
    "lenient inside": {"items": {"x-guidance": {"lenient": True}, "not": {}}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_in_time(name):
    began = time.process_time()
    with pytest.raises(InvalidRequest, match=r"REQUEST.guide.json_schema"):
        ReadRequest.from_json(json.dumps({"guide": {"json_schema": HOSTILE[name]}}), NV)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "schema",
    [
        doubling(20),
        {"type": "string", "pattern": "^(a|b){1000}{1000}$"},
        {"type": "string", "pattern": "(x+x+)+y.{500}z.{500}"},
        {"type": "string", "minLength": 10**6},
        {"type": "array", "minItems": 10**6, "items": {"type": "array", "maxItems": 10**9}},
        {"anyOf": [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{n}}}$"} for n in range(1, 200)]},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}},
    ],
)
def test_a_schema_that_costs_much_is_refused_or_ends_its_own_answer_in_time(schema):
    began = time.process_time()
    try:
        state = matcher(schema_grammar(schema, grammar="answer_only"))
        guide = Guide(state)
        for token in b"<answer>":
            guide.accept(token)
        for _ in range(300):
            allowed = guide.allowed()
            guide.accept(int(allowed[len(allowed) // 2]))
    except InvalidRequest as error:
        assert "REQUEST.guide" in error.message
    assert time.process_time() - began < 8


def test_a_request_with_a_schema_may_not_be_larger_than_others():
    with pytest.raises(InvalidRequest, match="allowed"):
        ReadRequest.from_json(json.dumps({"guide": {"json_schema": {"enum": ["x" * MAX_REQUEST_BYTES]}}}), NV)


def sampler(grammar, **sampling):
    return Sampler(Sampling(max_new_tokens=1000, **sampling), np.array([1]), Guide(matcher(grammar)))


def logits_towards(text, strength, seed=0):
    """Logits of a decoder that wants to write `text`, more or less."""
    rng = np.random.default_rng(seed)
    for token in [*text.encode(), EOS]:
        row = rng.standard_normal(BYTES.vocab_size).astype(np.float32)
        row[token] += strength
        yield row


GOOD = "<think>Fluid {on} both sides.</think><answer>Pleural Effusion, Edema</answer>"


@pytest.mark.parametrize("penalty", [1.0, 1.05])
def test_greedy_tokens_of_an_answer_that_is_allowed_are_those_without_a_guide(penalty):
    held = sampler(guide_of("think_answer", "labels"), repetition_penalty=penalty)
    plain = Sampler(Sampling(max_new_tokens=1000, repetition_penalty=penalty), np.array([1]))
    strength = 6 if penalty == 1 else 60
    tokens = [(held.sample(row.copy()), plain.sample(row.copy())) for row in logits_towards(GOOD, strength)]
    assert [a for a, _ in tokens] == [b for _, b in tokens] == [*GOOD.encode(), EOS]


def test_an_answer_ends_only_where_its_grammar_does():
    held = sampler(guide_of("answer_only", "labels"))
    row = np.zeros(BYTES.vocab_size, np.float32)
    row[EOS] = 9
    ids = [held.sample(row.copy()) for _ in range(1000)]
    text = bytes(ids[: ids.index(EOS)]).decode() if EOS in ids else None
    assert text is not None and parse(text, grammar="answer_only", answer="labels", labels=LABELS).status == "ok"
    assert EOS not in ids[: len("<answer>Edema</answer>") - 1]


def test_the_best_logits_alone_decide_only_what_the_guide_allows():
    held, asked = sampler(guide_of("answer_only", "labels")), 0

    def top(row):
        nonlocal asked
        block = int(row.argmax()) // 2

        def whole():
            nonlocal asked
            asked += 1
            return row.copy()

        bound = np.sort(row)[-3] if row.argmax() ^ 1 == np.argsort(row)[-2] else np.sort(row)[-2]
        return TopLogits(np.array([block]), row.reshape(-1, 2)[[block]], float(bound), whole)

    text = "<answer>Edema</answer>"
    assert bytes(held.sample(top(row)) for row in list(logits_towards(text, 20))[: len(text)]).decode() == text
    assert not asked
    row = next(iter(logits_towards("x", 20)))
    assert held.sample(top(row)) != ord("x") and asked == 1


@pytest.mark.parametrize("top_p", [1.0, 0.3])
def test_the_nucleus_is_of_what_the_guide_allows(top_p):
    grammar = "start: /[abc]/"
    row = np.zeros(BYTES.vocab_size, np.float32)
    row[[ord("x"), ord("a"), ord("b"), ord("c")]] = 9, 3, 2, 1  # x alone would fill the nucleus
    drawn = [chr(sampler(grammar, temperature=1.0, top_p=top_p, seed=seed).sample(row.copy())) for seed in range(300)]
    assert set(drawn) == ({"a", "b", "c"} if top_p == 1 else {"a"})


def test_sampled_answers_are_in_the_vocabulary():
    grammar = guide_of("think_answer", "labels")
    for seed in range(20):
        held = sampler(grammar, temperature=1.5, seed=seed)
        rows = logits_towards(GOOD, 9, seed)
        ids = [held.sample(row) for row in rows]
        state = matcher(grammar)
        assert state.try_consume_tokens(ids) == len(ids)


def test_grammars_of_profiles_compile_for_every_task_and_mode():
    for profile in (NV, CHEXONE):
        for name, task in profile.tasks.items():
            for mode, form in profile.modes.items():
                if form.answers and task.answer not in form.answers:
                    continue
                variables = {key: ["a", "b"] if key == "options" else "x" for key in task.placeholders}
                history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * task.follow_up
                asked = {"task": name, "mode": mode, "variables": variables, "history": history, "guide": "answer"}
                request = ReadRequest.from_json(json.dumps(asked), profile)
                if request.guide_grammar is None:
                    assert (request.grammar, request.answer) in {("plain", "prose"), ("plain", "text")}
                else:
                    assert re.search("^start:", request.guide_grammar) and matcher(request.guide_grammar)
