"""OpenAI's chat completions in front of an endpoint that answers as the test says."""

import dataclasses
import http.client
import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_type_hints

import pytest
from fake_server import FakeServer, failure, response
from fake_session import until
from front import EC

pytest.importorskip("aiohttp")
pytest.importorskip("openai")

import openai
from openai_door import (
    CHEXONE,
    KEY,
    NV,
    PNG,
    TEXT,
    answering,
    body,
    forever,
    image,
    let_pass_soon,
    never,
    outcomes,
    post,
    reading,
    served,
    user,
)
from openai_server import OpenAIServer

from cxr_triton.client import Timeouts
from cxr_triton.client.openai.answer import Answer
from cxr_triton.client.openai.chat import ChatRequest
from cxr_triton.client.openai.description import description
from cxr_triton.client.openai.keys import Keys
from cxr_triton.client.openai.parameters import PARAMETERS
from cxr_triton.client.openai.refusal import Refusal
from cxr_triton.client.openai.settings import Settings
from cxr_triton.client.wire import FAILED
from cxr_triton.errors import CODES, InvalidConfig, InvalidImage, InvalidRequest
from cxr_triton.reading import NOT_FOR_DIAGNOSIS, Reading

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site():
    """A server whose answers are whole."""
    with served() as (triton, server):
        yield triton, server


@pytest.fixture
def client(site):
    with openai.OpenAI(base_url=site[1].base_url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


# ------------------------------------------------------------------------------------------------------- answers


def test_a_whole_answer_has_reasoning_content_usage_and_the_reading(client):
    answer = client.chat.completions.create(**body())
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("The heart is large.", "Cardiomegaly")
    assert answer.choices[0].finish_reason == "stop" and answer.model == NV.name
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 7, 12)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer.cxr["notice"] == NOT_FOR_DIAGNOSIS
    assert Reading.from_json(json.dumps(answer.cxr["reading"])).findings[0].label == "Cardiomegaly"


def test_a_stream_adds_up_to_the_whole_answer(client):
    whole = client.chat.completions.create(**body()).choices[0].message
    chunks = list(client.chat.completions.create(**body(), stream=True, stream_options={"include_usage": True}))
    *told, last, usage = chunks
    assert told[0].choices[0].delta.role == "assistant"
    assert len(told) > 5
    for name in ("reasoning_content", "content"):
        assert "".join(getattr(c.choices[0].delta, name, None) or "" for c in told) == getattr(whole, name)
    assert last.choices[0].finish_reason == "stop" and last.cxr["notice"] == NOT_FOR_DIAGNOSIS
    assert usage.choices == [] and usage.usage.total_tokens == 12
    assert {c.usage for c in chunks[:-1]} == {None} and len({c.id for c in chunks}) == 1


def test_a_stream_without_usage_ends_in_done(site):
    status, headers, text = post(site[1], body(stream=True))
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and '"usage"' not in events[0]
    assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"


def test_an_answer_that_was_cut_off_says_length():
    text = "<think> The heart"
    with served(answering(text, finish_reason="length")) as (_, server):
        _, _, answer = post(server, body())
    assert answer["choices"][0]["finish_reason"] == "length" and answer["cxr"]["reading"]["status"] == "truncated"
    assert answer["choices"][0]["message"]["reasoning_content"] == "The heart"


@pytest.mark.parametrize("stream", [False, True])
def test_prose_without_a_box_becomes_content_at_the_end(stream):
    facts = {"grammar": "boxed", "answer": "text"}
    with served(answering("Clear lungs.", **facts), CHEXONE) as (_, server):
        _, _, answer = post(server, body(profile=CHEXONE, stream=stream))
    if stream:
        deltas = [json.loads(e.removeprefix("data: "))["choices"][0]["delta"] for e in answer.split("\n\n")[:-2]]
        assert "".join(delta.get("content", "") for delta in deltas) == "Clear lungs."
    else:
        assert answer["choices"][0]["message"]["content"] == "Clear lungs."


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_of_each_token(stream):
    ends = (7, 20, len(TEXT) - 1, len(TEXT))
    plain = Reading.from_json(reading())
    with_them = dataclasses.replace(plain, token_logprobs=(-0.5, -1.0, 0.0, -2.0), token_ends=ends).to_json()
    told = [response(TEXT), response("", with_them, final=True)]
    with served(lambda request, context: iter(told)) as (triton, server):
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(**body(logprobs=True, stream=stream))
            given = [c.choices[0].logprobs for c in answer][-1] if stream else answer.choices[0].logprobs
        assert triton.asked["logprobs"] is True
    assert "".join(token.token for token in given.content) == TEXT
    assert [token.logprob for token in given.content] == [-0.5, -1.0, 0.0, -2.0]
    assert bytes(given.content[1].bytes) == TEXT[7:20].encode()


def test_the_mode_decides_what_is_reasoning():
    with served(answering("Clear lungs.", grammar="plain", answer="text"), CHEXONE) as (triton, server):
        _, _, answer = post(server, body(profile=CHEXONE, mode="instruct"))
        assert triton.asked["mode"] == "instruct"
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Clear lungs.", None)


def test_the_models(client):
    listed = client.models.list().data
    assert [m.id for m in listed] == [NV.name] and listed[0].cxr["notice"] == NOT_FOR_DIAGNOSIS
    assert set(client.models.retrieve(NV.name).cxr["tasks"]) == set(NV.tasks)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


# --------------------------------------------------------------------------------------------------- what is asked


def asked(data, profile=NV):
    chat = ChatRequest.from_body(json.dumps(data).encode(), profile)
    return chat.asked, list(chat.images)


def test_text_and_images_become_a_free_prompt():
    parts = user("One.", image(b"a", "image/jpeg"), "Two.", image(b"b", "application/DICOM"))
    assert asked(body(parts, profile=CHEXONE), CHEXONE) == ({"prompt": "One.\nTwo."}, [b"a", b"b"])


def test_without_a_text_the_task_is_asked():
    assert asked(body(user(image()), task="examine")) == ({"task": "examine"}, [PNG])
    assert asked(body(user(image()))) == ({}, [PNG])
    more = {"variables": {"indication": "Cough."}, "identifiers": "hashed"}
    found, _ = asked(body(user(image()), profile=CHEXONE, task="findings_indication", **more), CHEXONE)
    assert found == {"task": "findings_indication", **more}


def test_sampling_becomes_keys_of_the_request():
    given = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "END", "max_tokens": 9, "repetition_penalty": 1.1}
    found, _ = asked(body(**given, n=1, user="x", frequency_penalty=0.0, tools=[], logprobs=None))
    del given["max_tokens"]
    assert found == {"prompt": "Is the heart large?", **given, "stop": ["END"], "max_new_tokens": 9}
    assert asked(body(max_completion_tokens=9, max_tokens=9))[0]["max_new_tokens"] == 9


def test_earlier_messages_become_the_history():
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "Wide.", "refusal": None, "tool_calls": []}
    found, images = asked(body(user("Large?", image()), answer, user("Why?")))
    assert found == {
        "prompt": "Why?",
        "history": [
            {"role": "user", "content": "Large?"},
            {"role": "assistant", "content": "<think>Wide.</think>\n<answer>Yes.</answer>"},
        ],
    }
    assert images == [PNG]
    first = {"role": "assistant", "content": TEXT}  # to the letter
    found, _ = asked(body(user(image()), first, {"role": "user", "content": ""}, task="differentials"))
    assert found["history"][0]["content"] == NV.tasks["findings"].prompt and found["history"][1]["content"] == TEXT


def test_an_earlier_turn_carries_the_suffix_of_its_mode():
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "Wide."}
    found, _ = asked(body(user("Large?", image()), answer, user("Why?"), profile=CHEXONE), CHEXONE)
    suffix = CHEXONE.modes["reasoning"].suffix
    assert [turn["content"] for turn in found["history"]] == ["Large?" + suffix, "Wide.\n\\boxed{Yes.}"]


def test_only_what_is_asked_travels(site):
    triton, server = site
    post(server, body(seed=1))
    assert triton.asked == {"prompt": "Is the heart large?", "seed": 1}
    assert PNG in triton.requests[-1].raw_input_contents[0]


SYSTEM = {"role": "system", "content": "You are a pirate."}
REMOTE = {"type": "image_url", "image_url": {"url": "https://example.org/DOE.png"}}
HELLO = user("Hello.", image())
ANSWER = {"role": "assistant", "content": "Hi."}
JSON = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
REFUSALS = [
    ({"messages": [SYSTEM, HELLO]}, "messages", "system prompt is the profile's"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "expected user or assistant"),
    ({"messages": []}, "messages", "at least"),
    ({"messages": "x"}, "messages", "expected a list"),
    ({"messages": ["x"]}, "messages", "expected an object"),
    ({"messages": [HELLO, user("x")]}, "messages", "alternate"),
    ({"messages": [HELLO, ANSWER]}, "messages", "alternate"),
    ({"messages": [HELLO, ANSWER, HELLO]}, "messages", "begin another conversation"),
    ({"messages": [HELLO, {**ANSWER, "tool_calls": [1]}, user("x")]}, "messages", "unknown key 'tool_calls'"),
    ({"messages": [HELLO, {**ANSWER, "reasoning_content": 1}, user("x")]}, "messages", "expected text"),
    ({"messages": [user(REMOTE)]}, "messages", "no address or path is ever fetched"),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})]}, "messages", "data:TYPE"),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "/etc/passwd"}})]}, "messages", "data:TYPE"),
    ({"messages": [user({"type": "image_url", "image_url": {"url": 1}})]}, "messages", "expected a data URI"),
    ({"messages": [user({"type": "image_url"})]}, "messages", "expected a data URI"),
    ({"messages": [user(image(kind="image/svg+xml"))]}, "messages", "application/dicom"),
    ({"messages": [user({"type": "input_audio"})]}, "messages", "input_audio"),
    ({"messages": [user(1)]}, "messages", "expected"),
    ({"messages": [user("x")] * 2}, "messages", "alternate"),
    ({"messages": [user("Two?", image(), image())]}, "messages", "2 images given"),
    ({"messages": [user("Half \ud800", image())]}, "messages", "surrogate"),
    ({"messages": [HELLO, ANSWER, *[user("x"), ANSWER] * 19, user("x")]}, "messages", "40 turns, allowed"),
    ({"task": "examine"}, "task", "drop one"),
    ({"messages": [user(image())], "task": "exam"}, "task", "did you mean 'examine'"),
    ({"messages": [user(image())], "task": "differentials"}, "messages", "continues a conversation"),
    ({"mode": "fast"}, "mode", "reasoning"),
    ({"mode": ["fast"]}, "mode", "list"),
    ({"variables": {"a": "b"}}, "variables", "free prompt"),
    ({"temperature": 9}, "temperature", "outside 0.0 to 2.0"),
    ({"temperature": "hot"}, "temperature", "str"),
    ({"seed": -1}, "seed", "outside"),
    ({"max_tokens": 0}, "max_completion_tokens", "outside"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "one of both"),
    ({"stop": ["a"] * 9}, "stop", "at most 8"),
    ({"stop": 1}, "stop", "at most 8"),
    ({"n": 2}, "n", "another seed"),
    ({"n": True}, "n", "another seed"),
    ({"tools": [{}]}, "tools", "call no tools"),
    ({"logit_bias": {"1": 2}}, "logit_bias", "unsupported"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": []}, "stream_options", "expected an object"),
    ({"identifiers": "none"}, "identifiers", "plain, hashed"),
    ({"logprobs": "yes"}, "logprobs", "true or false"),
    ({"response_format": {"type": "json_object"}}, "response_format", 'type "json_schema"'),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
    ({"response_format": "json"}, "response_format", "expected an object"),
    ({"response_format": JSON, "guide": "answer"}, "guide", "drop one"),
    ({"guide": "all"}, "guide", "none"),
]


@pytest.mark.parametrize(("change", "param", "said"), REFUSALS)
def test_what_cannot_be_asked_is_refused_before_the_server_is(change, param, said):
    with pytest.raises(Refusal, match=re.escape(said)) as refused:
        asked(body() | change)
    error = refused.value.as_json()["error"]
    assert (refused.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["code"] == "INVALID_REQUEST" and "REQUEST." not in error["message"]


@pytest.mark.parametrize("encoded", ["", "a", "YQ=", "Y Q==", "YQ==YQ==", "YQ==\n", "é"])
def test_what_is_not_base64_to_its_end_is_no_image(encoded):
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    with pytest.raises(Refusal) as refused:
        asked(body(user(part)))
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "INVALID_IMAGE", "messages")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b"[]", b"1", b'{"seed": NaN}', b'{"seed": 1, "seed": 2}', b"[" * 100_000, b"1" * 10_000],
    ids=range(9),
)
def test_a_body_that_is_no_json_object(site, data):
    status, _, answer = post(site[1], data)
    assert (
        status == 400 and answer["error"]["code"] == "INVALID_REQUEST" and "the body is" in answer["error"]["message"]
    )


SCHEMA = {"type": "object", "properties": {"label": {"type": "string"}}, "required": ["label"]}


def test_a_schema_becomes_the_guide():
    named = {"name": "label", "strict": True, "schema": SCHEMA}
    found, _ = asked(body(response_format={"type": "json_schema", "json_schema": named}, scores=False))
    assert found == {"prompt": "Is the heart large?", "guide": {"json_schema": SCHEMA}, "scores": False}
    assert asked(body(response_format={"type": "text"}))[0] == {"prompt": "Is the heart large?"}
    assert asked(body(user(image()), guide="answer"))[0] == {"guide": "answer"}


def test_every_parameter_of_openais_client_is_in_the_table():
    from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming

    assert set(get_type_hints(CompletionCreateParamsStreaming)) <= set(PARAMETERS)


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_error_of_the_server_has_its_status_and_code(code):
    with served(lambda request, context: iter([failure(f"[{code}] what; do")])) as (_, server):
        status, headers, answer = post(server, body(stream=True))
    error = answer["error"]
    assert (
        error["code"] == code and error["message"] == "what; do" and set(error) == {"message", "type", "param", "code"}
    )
    if code == "QUEUE_FULL":
        assert (status, headers["retry-after"], error["type"]) == (429, "1", "rate_limit_error")
    elif code == "LIMIT_EXCEEDED":
        assert status == 413
    else:
        client_is_at_fault = issubclass(CODES[code], InvalidRequest | InvalidImage)
        assert (400 <= status < 500) == (client_is_at_fault and code != "READING_MISMATCH")
    assert ("retry-after" in headers) == (code in ("QUEUE_FULL", "UNAVAILABLE"))


def test_an_error_in_the_middle_of_a_stream_ends_it_without_done():
    def answer(request, context):
        yield response("<think> The heart")
        yield failure("[INTERNAL] the decoder died; restart it")

    with served(answer) as (_, server):
        _, _, text = post(server, body(stream=True))
        assert "[DONE]" not in text and last_event(text)["error"]["code"] == "INTERNAL"
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="the decoder died"):
                list(client.chat.completions.create(**body(), stream=True))
        until(lambda: outcomes(server) == ["INTERNAL"] * 2)


def last_event(text: str) -> dict:
    return json.loads(text.split("\n\n")[-2].removeprefix("data: "))


@pytest.mark.parametrize("at", [1, 4])
def test_what_nobody_foresaw_is_an_error_of_ours_that_tells_nothing(monkeypatch, at):
    chunk, made = Answer.chunk, []

    def fail(answer, delta):
        made.append(delta)
        if len(made) == at:
            raise RuntimeError("DOE^JANE at /srv/models")
        return chunk(answer, delta)

    monkeypatch.setattr(Answer, "chunk", fail)
    monkeypatch.setattr(Answer, "whole", lambda *_: fail(None, {}))
    with served() as (_, server):
        status, headers, text = post(server, body(stream=True))
        error = last_event(text)["error"]
        assert status == 200 and text.count("HTTP/1.1") == 0 and "[DONE]" not in text
        assert text.count("data: ") == at and set(error) == {"message", "type", "param", "code"}
        made[:] = [{}] * (at - 1)
        refused, _, answer = post(server, body())
        assert (refused, error["code"], answer["error"]["code"]) == (500, "INTERNAL", "INTERNAL")
        for said in (text, json.dumps(answer), server.log.getvalue()):
            assert "JANE" not in said and "/srv" not in said and "Traceback" not in said
        until(lambda: len(server.events) == 4)
        failed = [event for event in server.events if event["event"] == "request_failed"]
        assert [event["error"] for event in failed] == ["RuntimeError"] * 2
        assert failed[0]["id"] == headers["x-request-id"] and failed[0]["id"] in error["message"]
        assert failed[1]["id"] in answer["error"]["message"]
        assert outcomes(server) == ["INTERNAL"] * 2


@pytest.mark.parametrize("begun", [False, True])
def test_what_triton_says_in_its_own_words_is_not_passed_on(begun):
    def answer(request, context):
        if begun:
            yield response("<think> The heart")
        yield failure(
            "Failed to process the request(s) for model 'decoder_0', message: KeyError: 'DOE'\n\nAt:\n  /srv/x.py(9)"
        )

    with served(answer) as (_, server):
        for stream in (False, True):
            _, _, told = post(server, body(stream=stream))
            error = last_event(told)["error"] if stream and begun else told["error"]
            assert (error["code"], error["message"]) == ("INTERNAL", FAILED)


def test_a_server_that_is_away_is_unavailable():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"127.0.0.1:{free.getsockname()[1]}"
    with OpenAIServer(url, timeouts=Timeouts(connect_s=0.3)) as server:
        for method, path, data in (
            ("POST", "/v1/chat/completions", body()),
            ("GET", "/v1/models", None),
            ("GET", "/health", None),
        ):
            status, headers, answer = server.ask(method, path, data)
            assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "UNAVAILABLE", "1")
        assert url not in json.dumps(answer), "health is told to anybody"


def test_those_who_wait_for_a_server_that_is_away_wait_together():
    """Not each for the one before it, nor the probe of a supervisor behind them all."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"127.0.0.1:{free.getsockname()[1]}"
    with OpenAIServer(url, timeouts=Timeouts(connect_s=0.8)) as server, ThreadPoolExecutor(9) as pool:
        began_s = time.monotonic()
        waiting = [pool.submit(server.ask, "POST", "/v1/chat/completions", body()) for _ in range(8)]
        assert server.ask("GET", "/health", None)[0] == 503
        assert {each.result()[0] for each in waiting} == {503}
        assert time.monotonic() - began_s < 8 * 0.8, "one after the other they take 9 times that"


def test_a_repository_without_a_profile_is_a_mismatch():
    with FakeServer(answering()) as triton, OpenAIServer(triton.url) as server:
        status, _, answer = post(server, body())
    assert (status, answer["error"]["code"]) == (502, "SERVER_MISMATCH") and "package" in answer["error"]["message"]


def test_another_model_is_not_found(site):
    status, _, answer = post(site[1], body() | {"model": "gpt-4"})
    assert (status, answer["error"]["param"], answer["error"]["type"]) == (404, "model", "not_found_error")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v1/chat/completions", 405), ("OPTIONS", "/v1/models", 405)],
)
def test_other_doors_are_closed_in_the_same_form(site, method, path, status):
    found, headers, answer = site[1].ask(method, path, headers={"Origin": "https://example.org"})
    assert found == status and answer["error"]["code"] == "INVALID_REQUEST"
    assert not [name for name in headers if name.startswith("access-control-")]


# ---------------------------------------------------------------------------------------------------------- limits


def test_a_body_over_the_limit():
    with served(max_body_mib=1) as (triton, server):
        status, _, answer = post(server, body(user("x", image(bytes(1 << 20)))))
        assert (status, answer["error"]["code"]) == (413, "LIMIT_EXCEEDED") and triton.requests == []


def head(length: int) -> bytes:
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {length}", "", "")).encode()


def test_a_body_that_does_not_come():
    with served(body_s=0.2) as (_, server), socket.create_connection(server.address) as peer:
        peer.settimeout(60)
        peer.sendall(head(9) + b"{")
        assert peer.recv(99).startswith(b"HTTP/1.1 408 ")


def test_more_at_once_than_allowed_is_a_full_queue():
    with served(forever(), max_requests=1) as (triton, server):
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(**body(), stream=True)
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as refused:
                client.chat.completions.create(**body())
            assert refused.value.code == "QUEUE_FULL" and refused.value.response.headers["retry-after"] == "1"
            stream.close()
            triton.answer = answering()
            until(lambda: server.ask("POST", "/v1/chat/completions", body())[0] == 200)


def test_pictures_are_not_kept_while_their_answer_comes():
    rooms = [tracemalloc.Filter(True, f"*/{name}/*") for name in ("client", "aiohttp", "json", "asyncio")]
    with served(forever()) as (triton, server):
        peer = sent(server, body(stream=True))
        until(lambda: triton.active == 1)
        tracemalloc.start()
        try:
            other = sent(server, body(user("Large?", image(bytes(8 << 20))), stream=True))
            other.settimeout(60)
            assert other.recv(99).startswith(b"HTTP/1.1 200 ")
            kept = tracemalloc.take_snapshot().filter_traces(rooms)
            other.close()
        finally:
            tracemalloc.stop()
        peer.close()
    assert sum(trace.size for trace in kept.traces) < 4 << 20


def test_more_bytes_on_their_way_in_than_allowed():
    with served(max_bodies_mib=1, max_body_mib=2) as (_, server):
        with socket.create_connection(server.address) as peer:
            peer.sendall(head(1 << 20) + b"{")
            until(lambda: server.service._completions.under_way == 1)
            status, _, answer = post(server, body(user("Large?", image(bytes(99_999)))))
            assert (status, answer["error"]["code"]) == (429, "QUEUE_FULL")
        until(lambda: server.service._completions.under_way == 0)
        assert post(server, body(user("Large?", image(bytes(99_999)))))[0] == 200


def test_more_connections_than_allowed():
    with served(max_connections=1) as (_, server), socket.create_connection(server.address) as first:
        first.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        first.recv(1)
        assert server.ask("GET", "/openapi.json")[0] == 503


def test_a_reading_over_its_time():
    with served() as (triton, server):
        let_pass_soon(triton, server)
        status, headers, answer = post(server, body())
        assert (status, answer["error"]["code"], headers["x-should-retry"]) == (504, "DEADLINE_EXCEEDED", "false")
        until(lambda: triton.active == 0)


# ---------------------------------------------------------------------------------------------------- who goes away


def sent(server, data) -> socket.socket:
    peer = socket.create_connection(server.address)
    text = json.dumps(data).encode()
    peer.sendall(head(len(text)) + text)
    return peer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("answer", [never, forever()], ids=["queued", "answering"])
def test_a_client_that_leaves_ends_its_reading(answer, stream):
    with served(answer) as (triton, server):
        peer = sent(server, body(stream=stream))
        until(lambda: triton.active == 1)
        time.sleep(0.05)
        peer.close()
        assert triton.cancelled.wait(60)
        until(lambda: triton.active == 0)
        until(lambda: outcomes(server) == ["CANCELLED"])
        assert "request_failed" not in {event["event"] for event in server.events}


def test_a_client_that_takes_nothing_ends_its_reading():
    with served(forever("word " * 20_000), write_s=0.3) as (triton, server):
        peer = sent(server, body(stream=True))
        assert triton.cancelled.wait(60)
        until(lambda: triton.active == 0)
        peer.close()


def test_a_client_closes_its_stream():
    with served(forever()) as (triton, server):
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            with client.chat.completions.create(**body(), stream=True) as stream:
                next(iter(stream))
            assert triton.cancelled.wait(60)


def accepts(address: tuple[str, int]) -> bool:
    with socket.socket() as peer:
        return peer.connect_ex(address) == 0


def test_what_is_under_way_may_end_and_nothing_new_begins():
    go_on = threading.Event()

    def answer(request, context):
        yield response(TEXT[:20])
        go_on.wait(60)
        yield response(TEXT[20:])
        yield response("", reading(), final=True)

    with served(answer) as (_, server):
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            stream = iter(client.chat.completions.create(**body(), stream=True))
            next(stream)
            earlier = http.client.HTTPConnection(*server.address, timeout=60)
            earlier.request("GET", "/openapi.json")
            earlier.getresponse().read()
            server.stop()
            until(lambda: not accepts(server.address))
            earlier.request("POST", "/v1/chat/completions", json.dumps(body()), {"Content-Type": "application/json"})
            assert earlier.getresponse().status == 503
            earlier.close()
            time.sleep(0.5)
            go_on.set()
            assert [c.choices[0].finish_reason for c in stream][-1] == "stop"


def test_what_does_not_end_in_time_is_cut_off():
    with served(forever(), grace_s=0.1) as (triton, server):
        peer = sent(server, body(stream=True))
        until(lambda: triton.active == 1)
        server.stop()
        assert triton.cancelled.wait(60)
        peer.close()


# --------------------------------------------------------------------------------------------------------- who comes


def test_keys_are_asked_for_and_read_again(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of two\n{KEY}\n\nanother-key-of-this\n")
    with served(api_keys_file=file) as (triton, server):
        status, headers, answer = post(server, body())
        assert (status, headers["www-authenticate"], answer["error"]["type"]) == (401, "Bearer", "authentication_error")
        for given in (KEY[:-1], KEY + "x", "", "\xe9" * 20):
            assert post(server, body(), Authorization=f"Bearer {given}".encode("latin-1"))[0] == 401
        assert post(server, body(), Authorization=f"Basic {KEY}")[0] == 401
        assert triton.requests == []
        for given in (KEY, "another-key-of-this"):
            assert post(server, body(), Authorization=f"Bearer {given}")[0] == 200
        assert server.ask("GET", "/health")[0] == server.ask("GET", "/openapi.json")[0] == 200
        assert {server.ask("GET", path)[0] for path in ("/metrics", "/v1/models")} == {401}
        file.write_text("a-key-that-is-newer\n")
        assert post(server, body(), Authorization=f"Bearer {KEY}")[0] == 401
        assert post(server, body(), Authorization="Bearer a-key-that-is-newer")[0] == 200
        file.unlink()
        assert post(server, body(), Authorization="Bearer a-key-that-is-newer")[0] == 401
        file.write_text(f"{KEY}\n")
        assert post(server, body(), Authorization=f"Bearer {KEY}")[0] == 200
        assert KEY not in server.log.getvalue()


@pytest.mark.parametrize("text", ["", "# none\n", "short\n", f"{KEY} {KEY}\n", "ké" * 20, f"{KEY}\n" * 1001])
def test_a_file_without_keys_opens_to_nobody(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(InvalidConfig, match=r"make one|allowed"):
        Keys(tmp_path / "keys")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "--api-keys-file"),
        ({"api_keys_file": Path("keys")}, "--clear-text"),
        ({"without_keys": True}, "--clear-text"),
        ({"cert": Path("cert")}, "--without-keys"),
    ],
)
def test_off_the_loopback_interface_it_is_locked(given, said):
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(InvalidConfig, match=said):
            Settings(host=host, **given)
    Settings(host="0.0.0.0", without_keys=True, clear_text=True)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:8080", 200),
        ("LOCALHOST", 200),
        ("rebound.example.org", 421),
        ("", 421),
        ("127.0.0.1.example.org", 421),
        ("localhost:x", 421),
    ],
)
def test_the_name_of_a_page_elsewhere_is_not_served(site, host, status):
    assert site[1].ask("GET", "/health", headers={"Host": host})[0] == status


def test_other_names_are_served_where_asked():
    with served(allowed_hosts=("Reader.example.org",)) as (_, server):
        assert server.ask("GET", "/health", headers={"Host": "reader.example.org:443"})[0] == 200


@pytest.mark.parametrize("headers", [{"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}])
def test_a_page_elsewhere_can_send_no_body(site, headers):
    assert post(site[1], body(), **headers)[0] == 415


def test_it_encrypts(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", *EC, "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    with served(cert=cert, key=key) as (_, server):
        context = ssl.create_default_context(cafile=str(cert))
        with (
            socket.create_connection(server.address) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as peer,
        ):
            peer.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert peer.recv(99).startswith(b"HTTP/1.1 200 ")


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize("stream", [False, True])
def test_a_callers_trace_goes_on_and_comes_back(stream):
    with served() as (triton, server):
        _, headers, answer = post(server, body(stream=stream), traceparent=f"00-{TRACE}-00f067aa0ba902b7-01")
        assert headers["x-trace-id"] == TRACE and TRACE in (answer if stream else json.dumps(answer))
        assert triton.requests[-1].id.startswith(f"00-{TRACE}-")
        status, headers, _ = post(server, body(stream=stream, n=2), traceparent=f"00-{TRACE}-00f067aa0ba902b7-01")
        assert status == 400 and headers["x-trace-id"] == TRACE
        forged = 'x" level="error' * 99
        _, headers, _ = post(server, body(stream=stream), traceparent=forged)
        assert re.fullmatch("[0-9a-f]{32}", headers["x-trace-id"]) and headers["x-trace-id"] != TRACE
        until(lambda: len(server.events) == 3)
        told = [event["trace"] for event in server.events]
        assert told == [TRACE, TRACE, headers["x-trace-id"]] and "level" not in server.log.getvalue()


def test_nothing_of_a_request_is_logged():
    with served() as (_, server):
        post(server, body(user("MUELLER has a cough", image()), user="MUELLER", metadata={"id": "MUELLER"}))
        post(server, body(user("MUELLER", REMOTE)))
        post(server, body() | {"MUELLER": 1, "model": "MUELLER"})
        post(server, b'{"MUELLER')
        server.ask("GET", "/v1/models/MUELLER?MUELLER")
    assert outcomes(server) == ["ok"] + ["INVALID_REQUEST"] * 3
    assert not re.search("MUELLER|DOE|heart", server.log.getvalue())


def test_the_metrics_count(site):
    post(site[1], body())
    _, headers, text = site[1].ask("GET", "/metrics")
    assert headers["content-type"].startswith("text/plain")
    assert float(re.search(r'cxr_openai_completions_total\{outcome="ok"\} (\S+)', text)[1]) >= 1
    until(lambda: "cxr_openai_under_way 0.0" in site[1].ask("GET", "/metrics")[2])  # a stream's end is read before


# ------------------------------------------------------------------------------------------------------- description


def schema(name: str) -> dict:
    return {
        **description(),
        "$ref": f"#/components/schemas/{name}",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
    }


def test_answers_are_as_described(site):
    jsonschema = pytest.importorskip("jsonschema")
    server = site[1]
    assert server.ask("GET", "/openapi.json")[2] == description()
    answers = {
        "Completion": post(server, body())[2],
        "Models": server.ask("GET", "/v1/models")[2],
        "Model": server.ask("GET", f"/v1/models/{NV.name}")[2],
        "Error": post(server, body(n=2))[2],
    }
    chunks = post(server, body(stream=True, stream_options={"include_usage": True}))[2].split("\n\n")[:-2]
    for name, answer in [*answers.items(), *(("Chunk", json.loads(chunk[6:])) for chunk in chunks)]:
        jsonschema.Draft202012Validator(schema(name)).validate(answer)


def test_what_is_taken_is_what_is_described():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema("Request"))
    validator.check_schema(schema("Request"))
    history = [user("a", image()), {"role": "assistant", "content": "b", "reasoning_content": "c"}, user("d")]
    for good in (
        body(),
        body(*history),
        body(user(image()), task="examine", seed=1, stop=["x"], tools=[], n=1, user=None),
    ):
        asked(good)
        validator.validate(good)
    undescribed = ("alternate", "drop one", "given", "turns", "begin another", "did you mean 'examine'", "conversation")
    for change, _, said in REFUSALS:
        if not any(word in said for word in undescribed) and "REQUEST" not in said:
            is_described = validator.is_valid(body() | change)
            if is_described:  # a limit that depends on the profile or on the other values
                assert set(change) & {"messages", "mode", "variables", "max_tokens"}, change


def test_the_documents_table_is_the_table():
    text = (ROOT / "docs" / "openai.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+)", text, re.MULTILINE))
    assert {name: rows.get(name) for name in PARAMETERS} == {name: found.handling for name, found in PARAMETERS.items()}


# ----------------------------------------------------------------------------------------------------------- command


@pytest.mark.slow
def test_the_command_runs_until_it_is_told_to_stop(tmp_path):
    with FakeServer(answering()) as triton:
        triton.profile = NV.to_json()
        command = [sys.executable, "-c", "from cxr_triton.cli import main; main()"]
        options = ["openai", "--url", triton.url, "--port", "0", "--json", str(tmp_path / "ready.json")]
        with subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout.readline().startswith("ready: http://127.0.0.1:")
                address = json.loads((tmp_path / "ready.json").read_text())["address"]
                with openai.OpenAI(base_url=address, api_key="none") as client:
                    assert client.chat.completions.create(**body()).choices[0].message.content == "Cardiomegaly"
                assert resource.prlimit(process.pid, resource.RLIMIT_CORE) == (0, 0)  # pictures would be in a core
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
                assert [json.loads(line)["event"] for line in process.stderr] == ["completion", "stopped"]
            finally:
                process.kill()


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code = "from cxr_triton.cli import main; main()"
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-c", code, "openai", "--port", port], capture_output=True, text=True, env=os.environ
        )
    assert ended.returncode == 75 and "[UNAVAILABLE] cannot listen" in ended.stderr
