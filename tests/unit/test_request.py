"""The REQUEST JSON: defaults, refusals, and the chat messages."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_triton.alternatives import Scoring
from cxr_triton.errors import InvalidRequest
from cxr_triton.profile import load_profile, profile_names
from cxr_triton.request import MAX_REQUEST_BYTES, MAX_TEXT_CHARS, ReadRequest

NV, CX = load_profile("nv-reason-cxr-3b"), load_profile("chexone")
SUFFIX = CX.modes["reasoning"].suffix
EARLIER = [{"role": "user", "content": "Find it."}, {"role": "assistant", "content": "<think>a</think>"}]


def ask(profile=CX, **keys):
    return ReadRequest.from_json(json.dumps(keys), profile)


@pytest.mark.parametrize("text", ["", "  ", "{}", b"{}"])
def test_nothing_asked_is_the_default_task(text):
    request = ReadRequest.from_json(text, NV)
    assert (request.task, request.text, request.answer) == (
        "findings",
        "Find abnormalities and support devices.",
        "labels",
    )
    assert (request.max_new_tokens, request.temperature, request.seed) == (2048, 0.0, None)


def test_mode_decides_suffix_and_grammar():
    assert ask().text == "Write an example findings section for the CXR." + SUFFIX
    assert (ask().grammar, ask(mode="instruct").grammar) == ("boxed", "plain")
    assert ask(mode="instruct").text == "Write an example findings section for the CXR."


def test_placeholders_are_filled_once_and_lists_become_lettered_options():
    request = ask(task="vqa", mode="instruct", variables={"question": "What of {options}?", "options": ["PA", "AP"]})
    assert request.text == "What of {options}? Options:\n(A) PA\n(B) AP"
    request = ask(task="vqa", mode="instruct", variables={"question": "q", "options": "A. yes\nB. no"})
    assert request.text == "q Options:\nA. yes\nB. no"


def test_scores_are_of_the_profile_s_labels_or_of_the_question_s_options():
    assert ask().scoring is None and not ask().logprobs and ask(logprobs=True).logprobs
    nv = load_profile("nv-reason-cxr-3b")
    for keys, answer in (({}, "labels"), ({"task": "educational"}, "text"), ({"prompt": "Is it wide?"}, "text")):
        assert ask(nv, scores=True, **keys).scoring == Scoring(grammar="think_answer", answer=answer, choices=nv.labels)
    variables = {"question": "Which?", "options": ["left", "right"]}
    scoring = ask(task="vqa", variables=variables, scores=True).scoring
    assert scoring == Scoring(grammar="boxed", answer="option", choices=("left", "right"))
    variables["options"] = "(A) left\n(B) right"
    assert ask(task="vqa", variables=variables, scores=True).scoring == scoring
    yes_no = ask(task="disease", variables={"disease": "edema"}, scores=True, mode="instruct").scoring
    assert yes_no == Scoring(grammar="plain", answer="option")


def test_free_prompt_replaces_the_tasks_prompt():
    assert ask(prompt="Is {it} broken?").text == "Is {it} broken?" + SUFFIX
    assert (ask(prompt="x").task, ask(prompt="x").answer) == (None, "text")
    assert ask(NV, task="findings", prompt="Look.").answer == "labels"


def test_images_stand_on_the_first_user_turn_before_its_text():
    request = ask(task="progression", history=EARLIER)
    system, first, assistant, last = request.messages(2)
    assert system == {"role": "system", "content": "You are a helpful assistant."}
    assert first["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Find it."}]
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": "<think>a</think>"}]}
    assert last["content"] == [{"type": "text", "text": request.text}]
    assert [message["role"] for message in ask(NV).messages(1)] == ["user"]


@pytest.mark.parametrize(
    ("keys", "count", "message"),
    [
        ({}, 0, "IMAGES: 0 given, task 'findings' takes 1 to 4"),
        ({}, 5, "IMAGES: 5 given"),
        ({"task": "progression"}, 1, "task 'progression' takes 2; send that many"),
        ({"task": "findings_summary", "variables": {"findings": "clear"}}, 1, "takes 0"),
        ({"prompt": "x"}, 5, "a free prompt takes 0 to 4"),
    ],
)
def test_the_task_says_how_many_images(keys, count, message):
    with pytest.raises(InvalidRequest, match=message):
        ask(**keys).messages(count)


def test_follow_up_needs_a_history():
    with pytest.raises(InvalidRequest, match="history: is empty, but task 'differentials' continues"):
        ask(NV, task="differentials")
    request = ask(NV, task="differentials", history=EARLIER)
    assert (request.text, request.answer) == ("Provide differentials", "prose")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temprature": 1}, "unknown key 'temprature' in REQUEST; did you mean 'temperature'?"),
        ({"task": "finding"}, "REQUEST.task: unknown key 'finding' in tasks of chexone; did you mean"),
        ({"task": 3}, "REQUEST.task: is int, expected text"),
        ({"mode": "instrukt"}, "did you mean 'instruct'?"),
        ({"prompt": " "}, "REQUEST.prompt: is empty"),
        ({"prompt": "x" * (MAX_TEXT_CHARS + 1)}, f"{MAX_TEXT_CHARS + 1} characters, allowed {MAX_TEXT_CHARS}"),
        ({"prompt": "x", "variables": {"a": "b"}}, "REQUEST.variables: belong to a task's prompt"),
        ({"task": "disease"}, "REQUEST.variables.disease: is missing"),
        ({"task": "disease", "variables": {"diseas": "x"}}, "did you mean 'disease'?"),
        ({"task": "disease", "variables": {"disease": 1}}, "REQUEST.variables.disease: is int, expected text"),
        ({"task": "disease", "variables": {"disease": ""}}, "REQUEST.variables.disease: is empty"),
        ({"task": "disease", "variables": {"disease": []}}, "0 options, allowed 1 to 26"),
        ({"task": "disease", "variables": {"disease": ["x"] * 27}}, "27 options, allowed 1 to 26"),
        ({"variables": []}, "REQUEST.variables: is list"),
        ({"history": {}}, "REQUEST.history: is dict"),
        ({"history": ["hi"]}, "REQUEST.history[0]: is str"),
        ({"history": [{"role": "system", "content": "x"}]}, "history[0].role: is 'system', expected 'user'"),
        ({"history": EARLIER[:1]}, "ends with the user's turn"),
        ({"history": [{"role": "user", "contents": "x"}]}, "did you mean 'content'?"),
        ({"history": [{"role": "user"}]}, "REQUEST.history[0].content: is NoneType"),
        ({"history": EARLIER * 17}, "34 turns, allowed 32"),
        ({"max_new_tokens": 0}, "REQUEST.max_new_tokens: 0 is outside 1 to 4096"),
        ({"max_new_tokens": 1.5}, "is float, expected int"),
        ({"max_new_tokens": 10**400}, "is outside 1 to 4096"),
        ({"temperature": True}, "is bool, expected float"),
        ({"temperature": -0.1}, "-0.1 is outside 0.0 to 2.0"),
        ({"top_p": 0}, "is outside 0.001 to 1.0"),
        ({"repetition_penalty": 5}, "is outside 0.5 to 2.0"),
        ({"seed": -1}, "is outside 0 to"),
        ({"seed": 2**63}, "is outside 0 to"),
        ({"identifiers": "secret"}, "REQUEST.identifiers: 'secret' is none of plain, hashed"),
        ({"logprobs": "yes"}, "REQUEST.logprobs: is str, expected true or false"),
        ({"scores": 1}, "REQUEST.scores: is int, expected true or false"),
        ({"scores": True, "guide": {"json_schema": {}}}, "REQUEST.scores: the guide makes the answer JSON"),
        ({"scores": True}, "REQUEST.scores: the task answers in prose; scores are of labels and of options"),
        ({"scores": True, "prompt": "Is it?"}, "REQUEST.scores: a free prompt's answer has no labels in the served"),
        ({"stop": "x"}, "expected a list of at most 8 texts"),
        ({"stop": [""]}, "0 characters, allowed 1 to 64"),
        ({"x" * 9999: 1}, "unknown key 'xxx"),
    ],
)
def test_refusals_name_the_key_and_what_is_allowed(keys, message):
    with pytest.raises(InvalidRequest) as error:
        ask(**keys)
    assert message in error.value.message
    assert len(error.value.message) < 500


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"prompt": ' * 5_000,
        '{"temperature": NaN}',
        '{"temperature": -Infinity}',
        '{"temperature": 1e999}',
        '{"seed": ' + "9" * 5_000 + "}",
        '{"task": "view", "task": "vqa"}',
        '{"variables": {"a": "1", "a": "2"}}',
        b'{"prompt": "\xff"}',
        '{"prompt": "x"}'.encode("utf-16"),
        '{"prompt": "\\ud800"}',
        '{"prompt": "\ud800"}',
        '{"\\ud800": 1}',
        "[]",
        '"x"',
        "null",
        "{",
        "{} {}",
        " " * (MAX_REQUEST_BYTES + 1),
    ],
)
def test_hostile_json_is_refused(text):
    with pytest.raises(InvalidRequest) as error:
        ReadRequest.from_json(text, CX)
    error.value.wire().encode()
    assert len(error.value.message) < 500


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["task", "prompt", "variables", "mode", "history", "seed", "stop", "top_p", "temperature"])


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.dictionaries(KEYS, VALUES, max_size=4), name=st.sampled_from(profile_names()))
def test_any_json_is_a_request_or_a_typed_refusal(data, name):
    profile = load_profile(name)
    try:
        request = ReadRequest.from_json(json.dumps(data), profile)
    except InvalidRequest:
        return
    assert request.text.strip()
    assert 0.0 <= request.temperature <= 2.0


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_a_typed_refusal(data):
    with contextlib.suppress(InvalidRequest):
        ReadRequest.from_json(data, NV)
