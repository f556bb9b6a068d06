"""OpenAI's own client against the real served ensemble: answers, conversations, refusals."""

import base64
import json

import pytest
from served import radiograph

pytest.importorskip("aiohttp")
pytest.importorskip("openai")

import openai
from openai_server import OpenAIServer

from cxr_triton.client import Reader
from cxr_triton.reading import Reading

pytestmark = pytest.mark.triton
SHORT = {"max_completion_tokens": 12, "temperature": 2.0, "seed": 7}
NO_IDENTITY = ("timings_ms", "trace_id", "usage")


@pytest.fixture(scope="module")
def site(server):
    with OpenAIServer(server.grpc) as site:
        yield site


@pytest.fixture
def client(site):
    with openai.OpenAI(base_url=site.base_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def asked(*files: bytes, text: str = "", kind: str = "application/dicom") -> dict:
    urls = [f"data:{kind};base64,{base64.b64encode(file).decode()}" for file in files]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"model": "random", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}


def said(message) -> tuple[str, str]:
    return getattr(message, "reasoning_content", None) or "", message.content or ""


def streamed(chunks) -> tuple[tuple[str, str], dict]:
    """Reasoning and content of a whole stream, and its reading."""
    parts = [said(choice.delta) for chunk in chunks for choice in chunk.choices]
    (extension,) = [chunk.cxr for chunk in chunks if getattr(chunk, "cxr", None)]
    return tuple(map("".join, zip(*parts, strict=True))), extension["reading"]


def alike(reading: dict) -> dict:
    return {key: value for key, value in reading.items() if key not in NO_IDENTITY}


def test_it_gives_what_the_grpc_client_gets(client, server):
    pair = [radiograph(1), radiograph(2, rows=160, columns=300)]
    with Reader(server.grpc) as reader:
        ours = reader.read(pair, task="compare", max_new_tokens=12, temperature=2.0, seed=7).result()
    answer = client.chat.completions.create(**asked(*pair), **SHORT, extra_body={"task": "compare"})
    reading = Reading.from_json(json.dumps(answer.cxr["reading"]))
    assert (reading.text, reading.prompt, reading.images) == (ours.text, ours.prompt, ours.images)
    assert answer.usage.prompt_tokens == ours.usage["prompt_tokens"]
    assert answer.usage.completion_tokens == 12 and answer.choices[0].finish_reason == "length"
    assert "".join("".join(said(answer.choices[0].message)).split()) in "".join(ours.text.split())
    chunks = list(client.chat.completions.create(**asked(*pair), **SHORT, stream=True, extra_body={"task": "compare"}))
    parts, last = streamed(chunks)
    assert parts == said(answer.choices[0].message) and alike(last) == alike(answer.cxr["reading"])


def test_log_probabilities_are_those_of_the_grpc_client(client, server):
    with Reader(server.grpc) as reader:
        ours = reader.read(radiograph(1), max_new_tokens=12, temperature=2.0, seed=7, logprobs=True).result()
    answer = client.chat.completions.create(**asked(radiograph(1)), **SHORT, logprobs=True)
    given = answer.choices[0].logprobs.content
    assert [token.logprob for token in given] == pytest.approx(list(ours.token_logprobs), rel=1e-3)
    assert len(given) == 12 and "".join(token.token for token in given) == ours.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_by_a_schema(client, stream):
    choices = {"type": "object", "properties": {"label": {"enum": ["Edema", "None"]}}, "required": ["label"]}
    given = {
        "type": "json_schema",
        "json_schema": {"name": "label", "schema": {**choices, "additionalProperties": False}},
    }
    asking = {**asked(radiograph(1)), "extra_body": {"mode": "labels"}, "max_completion_tokens": 200, "stream": stream}
    answer = client.chat.completions.create(**asking, response_format=given)
    content = streamed(list(answer))[0][1] if stream else answer.choices[0].message.content
    assert json.loads(content)["label"] in ("Edema", "None")
    given["json_schema"]["schema"] = {"$ref": "https://example.org/schema"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asking, response_format=given)
    assert refused.value.param == "response_format"


def test_a_conversation_goes_on_as_the_grpc_client_has_it(client, server):
    first = client.chat.completions.create(**asked(radiograph(3)), **SHORT)
    reading, more = first.cxr["reading"], asked(radiograph(3))
    turns = [{"role": "user", "content": reading["prompt"]}, {"role": "assistant", "content": reading["text"]}]
    more["messages"] += [turns[1], {"role": "user", "content": ""}]
    second = client.chat.completions.create(**more, **SHORT, extra_body={"task": "differentials"})
    with Reader(server.grpc) as reader:
        stream = reader.read(
            radiograph(3), task="differentials", history=turns, max_new_tokens=12, temperature=2.0, seed=7
        )
        ours = stream.result()
    assert second.cxr["reading"]["text"] == ours.text
    assert second.usage.prompt_tokens == ours.usage["prompt_tokens"] > first.usage.total_tokens - 1


@pytest.mark.parametrize(
    ("request_", "code", "status"),
    [
        (asked(b"no picture"), "INVALID_IMAGE", 400),
        (asked(b"\x89PNG\r\n\x1a\n cut off", kind="image/png"), "INVALID_IMAGE", 400),
        (asked(radiograph(1)[:-999]), "INVALID_IMAGE", 400),
        (asked(radiograph(1), text="word " * 6000), "PROMPT_TOO_LONG", 400),
        (asked(), "INVALID_REQUEST", 400),
        (asked(*[radiograph(1)] * 3, text="?"), "INVALID_REQUEST", 400),
    ],
    ids=["junk", "png", "cut", "long", "none", "three"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_typed_and_the_next_reading_succeeds(client, request_, code, status, stream):
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**request_, stream=stream)
    assert (refused.value.code, refused.value.status_code) == (code, status)
    assert refused.value.param == "messages"
    assert client.chat.completions.create(**asked(radiograph(1)), **SHORT).usage.completion_tokens == 12
