"""OpenAI's own client in front of the served demonstration model: 200 calls, a fifth of them left; stop sequences."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import pytest
from fake_session import until
from served import Raw

pytest.importorskip("aiohttp")
pytest.importorskip("openai")

import openai
from openai_door import image, user
from openai_server import OpenAIServer

from cxr_triton import phantom_file
from cxr_triton.client import Reader
from cxr_triton.client.aio import AsyncReadingStream
from cxr_triton.profile import load_profile
from cxr_triton.reading import Reading

pytestmark = pytest.mark.triton
PHANTOM = Path(__file__).resolve().parents[1] / "phantom"
CALLS, AT_ONCE, PICTURES = 100, 8, 8
KINDS = ("whole", "stream", "whole", "stream", "leave")
# An answer that only its limit ends, so that the model is still writing when most of them are left.
LISTED = {"type": "array", "items": {"type": "boolean"}, "minItems": 400, "maxItems": 400}
LONG = {
    "max_completion_tokens": 800,
    "response_format": {"type": "json_schema", "json_schema": {"name": "list", "schema": LISTED}},
    "extra_body": {"mode": "labels"},
}


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    """A warm server of the demonstration model."""
    pytest.importorskip("pytriton")
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    folder = tmp_path_factory.mktemp("calls")
    profile = load_profile(PHANTOM / "profile.yaml")
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", profile, precision="fp32", progress=False)
    bundle = build_bundle(folder / "export", folder / "bundle")
    write_repository(bundle.path, folder / "repository", Settings(threads=1), unverified=True)
    with Server(folder / "repository", grpc_port=0, metrics_port=0, http_port=0) as server:
        yield server
    assert "in-flight inferences" not in server.log.read_text().replace("that have in-flight inferences", "")


@pytest.fixture(scope="module")
def site(triton):
    with OpenAIServer(triton.grpc) as site:
        yield site


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [
        phantom_file.write_dicom(each, photometric="MONOCHROME2", syntax="jpeg_lossless")
        for each in evaluate.held_out(PICTURES)
    ]


@pytest.fixture(scope="module")
def wanted(triton, files) -> list[Reading]:
    """What the gRPC client gets."""
    with Reader(triton.grpc) as reader:
        return [reader.read(data).result() for data in files]


def asked(file: bytes) -> dict:
    return {"model": "phantom", "messages": [user(image(file, "application/dicom"))]}


def trace(number: int) -> str:
    """By which the log has what became of a call."""
    return f"{number + 1:032x}"


LEFT = [trace(number) for number in range(CALLS) if KINDS[number % len(KINDS)] == "leave"]


def traced(number: int) -> dict:
    return {"extra_headers": {"traceparent": f"00-{trace(number)}-00f067aa0ba902b7-01"}}


def text_of(chunk) -> str:
    return "".join(
        (getattr(choice.delta, "reasoning_content", None) or "") + (choice.delta.content or "")
        for choice in chunk.choices
    )


def told(chunks) -> tuple[str, str, dict]:
    """Reasoning, content and reading of a whole stream."""
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    parts = ("".join(getattr(delta, name, None) or "" for delta in deltas) for name in ("reasoning_content", "content"))
    (extension,) = [chunk.cxr for chunk in chunks if getattr(chunk, "cxr", None)]
    return *parts, extension["reading"]


def said(answer) -> tuple[str, str, dict]:
    message = answer.choices[0].message
    return message.reasoning_content or "", message.content, answer.cxr["reading"]


def sync_calls(base_url: str, files: list[bytes], begun: set[str]) -> list[tuple | None]:
    """Of threads that share a client. A stream is left after its first text, a whole answer not waited for."""
    options = {"base_url": base_url, "api_key": "none", "max_retries": 0, "timeout": 120}

    def call(number: int) -> tuple | None:
        kind, request = KINDS[number % len(KINDS)], asked(files[number % len(files)])
        if kind == "whole":
            return said(client.chat.completions.create(**request))
        if kind == "stream":
            return told(list(client.chat.completions.create(**request, stream=True)))
        request |= {**LONG, **traced(number)}
        if number % 2:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.05).chat.completions.create(**request)
        else:
            with client.chat.completions.create(**request, stream=True) as stream:
                next(chunk for chunk in stream if text_of(chunk))
        return None

    with openai.OpenAI(**options) as client, ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(call, range(CALLS)))


def async_calls(base_url: str, files: list[bytes], begun: set[str]) -> list[tuple | None]:
    """The same of tasks; a whole answer is left by a task that is cancelled, or by a client that is closed."""
    options = {"base_url": base_url, "api_key": "none", "max_retries": 0, "timeout": 120}

    async def leave_stream(request: dict) -> None:
        async with await client.chat.completions.create(**request, stream=True) as stream:
            async for chunk in stream:
                if text_of(chunk):
                    return

    async def leave_whole(request: dict, number: int) -> None:
        own = openai.AsyncOpenAI(**options) if number % 4 == 1 else None
        task = asyncio.create_task((own or client).chat.completions.create(**request))
        while trace(number) not in begun:
            await asyncio.sleep(0.001)
        if own:
            await own.close()
        else:
            task.cancel()
        with pytest.raises(openai.APIConnectionError if own else asyncio.CancelledError):
            await task

    async def call(number: int) -> tuple | None:
        kind, request = KINDS[number % len(KINDS)], asked(files[number % len(files)])
        async with gate:
            if kind == "whole":
                return said(await client.chat.completions.create(**request))
            if kind == "stream":
                stream = await client.chat.completions.create(**request, stream=True)
                return told([chunk async for chunk in stream])
            request |= {**LONG, **traced(number)}
            return await (leave_whole(request, number) if number % 2 else leave_stream(request))

    async def run() -> list[tuple | None]:
        nonlocal client, gate
        gate = asyncio.Semaphore(AT_ONCE)
        async with openai.AsyncOpenAI(**options) as client:
            return await asyncio.gather(*map(call, range(CALLS)))

    client = gate = None
    return asyncio.run(run())


class Endless(AsyncReadingStream):
    """A reading whose text comes and whose end does not: where the model is faster, who asked can still leave it."""

    async def __anext__(self) -> str:
        try:
            return await super().__anext__()
        except StopAsyncIteration:
            return await asyncio.Future()


@pytest.fixture
def begun(site, monkeypatch) -> set[str]:
    """Traces of what the server was asked to read; what will be left does not end by itself."""
    reader, traces = site.service._reader, set()
    read = reader.read

    def spied(*args, traceparent, **asked):
        stream = read(*args, traceparent=traceparent, **asked)
        traces.add(place := traceparent.split("-")[1])
        if place in LEFT:
            stream.__class__ = Endless
        return stream

    monkeypatch.setattr(reader, "read", spied)
    return traces


@pytest.mark.parametrize("calls", [sync_calls, async_calls])
def test_a_hundred_calls_get_what_the_grpc_client_gets_and_those_left_leave_nothing(
    calls, site, triton, files, wanted, begun
):
    def held() -> tuple[int, int]:
        """Files and sockets of this process, which is client and server; tasks of the server."""
        return len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks(site._loop))

    site.ask("POST", "/v1/chat/completions", asked(files[0]))  # the connection to Triton stays
    raw, before, seen = Raw(triton), held(), len(site.events)
    answers = calls(site.base_url, files, begun)
    assert len({reading.text for reading in wanted}) > PICTURES // 2
    for number, answer in enumerate(answers):
        assert (answer is None) == (KINDS[number % len(KINDS)] == "leave")
        if answer:
            ours = wanted[number % len(files)]
            reasoning, content, reading = answer
            assert (reasoning, content, reading["text"]) == (ours.reasoning, ours.answer, ours.text)
            assert reading["status"] == ours.status == "ok"
    until(lambda: raw.metric("cxr_decoder_streams") == 0)
    until(lambda: site.service._completions.under_way == 0)
    until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))
    completions = [event for event in site.events[seen:] if event["event"] == "completion"]
    outcomes = {event["trace"]: event["outcome"] for event in completions}
    assert {outcomes[each] for each in LEFT if each in begun} == {"CANCELLED"}
    # A client that does not wait may be gone before its request is read: those of threads that ask for a whole answer.
    assert len(begun & set(LEFT)) >= len(LEFT) // 2
    triton.check()


def test_the_text_ends_before_a_stop_sequence(site, triton, files, wanted):
    """Also one that begins in one token and ends in another, in reasoning and in the answer; the first of several."""
    text = wanted[0].text
    middle, later = (text[len(text) * share // 8 :][:9] for share in (3, 5))
    stops = [[middle], [later, middle], ["</think>\n"], [wanted[0].answer[:4]], ["\n<ans", "never"], ["never"]]
    with (
        openai.OpenAI(base_url=site.base_url, api_key="none", max_retries=0, timeout=120) as client,
        Reader(triton.grpc) as reader,
    ):
        for stop in stops:
            wanted_text = text[: min((text.find(each) for each in stop if each in text), default=len(text))]
            ours = reader.read(files[0], stop=stop).result()
            whole = client.chat.completions.create(**asked(files[0]), stop=stop)
            chunks = list(client.chat.completions.create(**asked(files[0]), stop=stop, stream=True))
            for reasoning, content, reading in (said(whole), told(chunks)):
                assert reading["text"] == ours.text == wanted_text
                shown = wanted_text
                for tag in ("<think>", "</think>", "<answer>", "</answer>"):
                    shown = shown.replace(tag, "")
                assert "".join((reasoning + content).split()) == "".join(shown.split())
            assert whole.choices[0].finish_reason == "stop" == chunks[-1].choices[0].finish_reason
            assert whole.usage.completion_tokens <= wanted[0].usage["completion_tokens"]
        one = client.chat.completions.create(**asked(files[0]), stop=middle)
        assert one.cxr["reading"]["text"] == text[: text.find(middle)], "a text alone is a list of one"
        assert one.usage.completion_tokens < wanted[0].usage["completion_tokens"]
