"""OpenAI's chat completions in front of an endpoint that answers as the test says."""

import base64
import contextlib
import dataclasses

from fake_server import FakeServer, pause, response
from openai_server import OpenAIServer

from cxr_triton.profile import load_profile
from cxr_triton.reading import Reading, parse

NV, CHEXONE = load_profile("nv-reason-cxr-3b"), load_profile("chexone")
PNG = b"\x89PNG\r\n\x1a\n of DOE^JANE"
TEXT = "<think> The heart is large. </think>\n<answer> Cardiomegaly </answer>"
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "cached_tokens": 2}
KEY = "a-key-of-this-test"


def reading(text=TEXT, *, grammar="think_answer", answer="labels", finish_reason="stop") -> str:
    parsed = parse(text, grammar=grammar, answer=answer, labels=("Cardiomegaly",), finish_reason=finish_reason)
    facts = {"task": "findings", "prompt": "Asked.", "model": {"profile": "x"}, "usage": USAGE, "notice": "A double."}
    return Reading.of(parsed, **facts).to_json()


def answering(text=TEXT, size=7, **facts):
    """An answer in pieces."""

    def answer(request, context):
        yield response()
        for at in range(0, len(text), size):
            yield response(text[at : at + size])
        yield response("", reading(text, **facts), final=True)

    return answer


def never(request, context):
    """Heartbeats until the client goes."""
    while context.is_active():
        pause(context, 0.01)
        yield response()


def forever(delta="word "):
    def answer(request, context):
        while context.is_active():
            yield response(delta)
            pause(context, 0.005)

    return answer


def let_pass_soon(triton, server) -> None:
    """From now on answers never end, and their time is short: one call before had all that comes before a reading."""
    assert post(server, body())[0] == 200
    server.service._reader.timeouts = dataclasses.replace(server.timeouts, total_s=0.3)
    triton.answer = never


@contextlib.contextmanager
def served(answer=None, profile=NV, **settings):
    with FakeServer(answer or answering()) as triton:
        triton.profile = profile.to_json()
        with OpenAIServer(triton.url, **settings) as server:
            yield triton, server


def uri(data=PNG, kind="image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data=PNG, kind="image/png") -> dict:
    return {"type": "image_url", "image_url": {"url": uri(data, kind)}}


def user(*parts) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def body(*messages, profile=NV, **more) -> dict:
    return {"model": profile.name, "messages": list(messages or [user("Is the heart large?", image())]), **more}


def outcomes(server) -> list[str]:
    """Of completions, in the log; that a client was gone may stand beside one."""
    return [event["outcome"] for event in server.events if event["event"] == "completion"]


def post(server, data, **headers):
    return server.ask("POST", "/v1/chat/completions", data, headers)
