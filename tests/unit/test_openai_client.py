"""Every error of the API as OpenAI's own client raises it: sync and async, of whole answers and of streams."""

import asyncio
import contextlib
import socket
import threading

import pytest
from fake_server import FakeServer, failure, response
from fake_session import until

pytest.importorskip("aiohttp")
pytest.importorskip("openai")

import openai
from openai_door import KEY, answering, body, forever, image, let_pass_soon, never, outcomes, served, user
from openai_server import OpenAIServer

from cxr_triton.client import Timeouts
from cxr_triton.errors import CODES

STATUSES = dict.fromkeys(CODES, 500) | {
    **dict.fromkeys(("INVALID_REQUEST", "PROMPT_TOO_LONG", "INVALID_IMAGE", "NOT_A_RADIOGRAPH", "NOT_A_CHEST"), 400),
    **dict.fromkeys(("FOR_PROCESSING", "MULTI_FRAME", "NO_PIXELS", "UNSUPPORTED_SYNTAX", "HEADER_MISMATCH"), 400),
    "LIMIT_EXCEEDED": 413,
    "QUEUE_FULL": 429,
    **dict.fromkeys(("SERVER_MISMATCH", "READING_MISMATCH", "ACCESS_DENIED"), 502),
    **dict.fromkeys(("UNAVAILABLE", "CANCELLED"), 503),
    "DEADLINE_EXCEEDED": 504,
}
"""As docs/openai.md has them."""
TYPES = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    404: openai.NotFoundError,
    429: openai.RateLimitError,
    **dict.fromkeys((500, 502, 503, 504), openai.InternalServerError),
}
"""The client's own exception of a status; `openai.APIStatusError` of any other."""


OPTIONS = {"api_key": "none", "max_retries": 0, "timeout": 60}


def ask_sync(address: str, data: dict, **options):
    # Nothing is encrypted here, and to load the certificates of all authorities takes 0.05 s.
    http_client = openai.DefaultHttpxClient(verify=False)
    with openai.OpenAI(base_url=address, http_client=http_client, **{**OPTIONS, **options}) as client:
        answer = client.chat.completions.create(**data)
        return list(answer) if data["stream"] else answer


def ask_async(address: str, data: dict, **options):
    async def ask():
        http_client = openai.DefaultAsyncHttpxClient(verify=False)
        async with openai.AsyncOpenAI(base_url=address, http_client=http_client, **{**OPTIONS, **options}) as client:
            answer = await client.chat.completions.create(**data)
            return [chunk async for chunk in answer] if data["stream"] else answer

    return asyncio.run(ask())


@pytest.fixture(params=[ask_sync, ask_async], ids=["sync", "async"])
def ask(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["whole", "stream"])
def stream(request):
    return request.param


@pytest.fixture
def refused(ask, stream):
    """What a call raises, which has to be of the status's own type."""

    def refused(server, data: dict | None = None, address: str = "", **options) -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as found:
            ask(address or server.base_url, {**body(), **(data or {}), "stream": stream}, **options)
        assert type(found.value) is TYPES.get(found.value.status_code, openai.APIStatusError)
        return found.value

    return refused


@pytest.mark.slow
def test_every_code_before_the_first_text(refused):
    said = {}
    with served() as (triton, server):
        for code in CODES:
            triton.answer = lambda request, context, code=code: iter([failure(f"[{code}] what; do")])
            error = refused(server)
            assert (error.code, error.body["message"]) == (code, "what; do")
            said[code] = error.status_code
    assert said == STATUSES


@pytest.mark.slow
def test_every_code_after_the_first_text(ask):
    """The status has been sent by then: the client raises its error of a stream."""

    def answer(request, context):
        yield response("<think> The heart")
        yield failure(f"[{code}] what; do")

    with served(answer) as (_, server):
        for code in CODES:
            with pytest.raises(openai.APIError) as found:
                ask(server.base_url, body(stream=True))
            assert type(found.value) is openai.APIError
            assert (found.value.code, found.value.message) == (code, "what; do")


@pytest.mark.parametrize(
    ("data", "status", "code", "param"),
    [
        ({"n": 2}, 400, "INVALID_REQUEST", "n"),
        ({"model": "gpt-4"}, 404, "INVALID_REQUEST", "model"),
        ({"extra_headers": {"Content-Type": "text/plain"}}, 415, "INVALID_REQUEST", None),
        ({"extra_headers": {"Host": "rebound.example.org"}}, 421, "INVALID_REQUEST", None),
        ({"messages": [user("Large?", image(bytes(1 << 20)))]}, 413, "LIMIT_EXCEEDED", "messages"),
        ({"messages": [user("Large?", image(b""))]}, 400, "INVALID_IMAGE", "messages"),
    ],
)
def test_what_the_door_refuses_by_itself(refused, data, status, code, param):
    with served(max_body_mib=1) as (triton, server):
        error = refused(server, data)
        assert (error.status_code, error.code, error.param) == (status, code, param)
        assert triton.requests == []


def test_a_key_that_is_not_valid(refused, ask, stream, tmp_path):
    (tmp_path / "keys").write_text(f"{KEY}\n")
    with served(api_keys_file=tmp_path / "keys") as (_, server):
        error = refused(server)
        assert (error.status_code, error.code, error.type) == (401, "INVALID_REQUEST", "authentication_error")
        assert ask(server.base_url, body(stream=stream), api_key=KEY)


def test_a_door_that_is_not_there():
    """Of another method, and of another path."""
    with served() as (_, server), openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as found:
            client.post("/models", cast_to=object)
        assert found.value.status_code == 405 and found.value.code == "INVALID_REQUEST"
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="x", input="x")


@contextlib.contextmanager
def stalling(address: tuple[str, int]):
    """A way to a server on which all but the first byte of a body is lost; its own base URL."""

    def relay() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as peer:  # both ends may go first
            told = b""
            while b"\r\n\r\n" not in told:
                more = peer.recv(1 << 16)
                if not more:
                    return
                told += more
            door.sendall(told.partition(b"\r\n\r\n")[0] + b"\r\n\r\n{")
            while answer := door.recv(1 << 16):
                peer.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(address) as door:
        thread = threading.Thread(target=relay)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            for each in (door, listener):  # the server would wait for the rest a while, the relay for who never came
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_body_that_does_not_come_in_time(refused):
    with served(body_s=0.2) as (triton, server), stalling(server.address) as address:
        error = refused(server, address=address)
        assert (error.status_code, error.code) == (408, "DEADLINE_EXCEEDED") and triton.requests == []


def test_more_than_allowed_at_once(refused):
    with served(forever(), max_requests=1) as (_, server):
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as other:
            with other.chat.completions.create(**body(), stream=True) as first:
                next(first)
                error = refused(server)
                assert (error.status_code, error.code) == (429, "QUEUE_FULL")
                assert error.response.headers["retry-after"] == "1"


def test_more_connections_than_allowed(refused):
    """The listener closes them before anything is heard, so nothing is told but the status."""
    with served(max_connections=1) as (_, server), socket.create_connection(server.address) as first:
        first.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        first.recv(1)
        error = refused(server)
        assert (error.status_code, error.code, error.response.headers["retry-after"]) == (503, None, "1")


def test_what_nobody_foresaw(refused, monkeypatch):
    from cxr_triton.client.openai import completions

    monkeypatch.setattr(completions, "Splitter", None)
    with served() as (_, server):
        error = refused(server)
        assert (error.status_code, error.code, error.type) == (500, "INTERNAL", "server_error")


def test_a_repository_without_a_profile(refused):
    with FakeServer(answering()) as triton, OpenAIServer(triton.url) as server:
        error = refused(server)
        assert (error.status_code, error.code) == (502, "SERVER_MISMATCH")


def test_a_server_that_is_away(refused):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"127.0.0.1:{free.getsockname()[1]}"
    with OpenAIServer(url, timeouts=Timeouts(connect_s=0.3)) as server:
        error = refused(server)
        assert (error.status_code, error.code, error.response.headers["retry-after"]) == (503, "UNAVAILABLE", "1")


def test_a_reading_over_its_time_is_not_asked_again(refused):
    """By a client with its own number of retries, which asks again after every other status over 500."""
    with served() as (triton, server):
        let_pass_soon(triton, server)
        error = refused(server, max_retries=2)
        assert (error.status_code, error.code) == (504, "DEADLINE_EXCEEDED")
    assert outcomes(server) == ["ok", "DEADLINE_EXCEEDED"]


@pytest.mark.slow
@pytest.mark.parametrize(("ask", "code"), [(ask_sync, "QUEUE_FULL"), (ask_async, "UNAVAILABLE")])
def test_what_may_be_sent_later_the_client_sends_again_by_itself(ask, code):
    def first(request, context):
        triton.answer = answering()
        yield failure(f"[{code}] what; send it later")

    with served(first) as (triton, server):
        answer = ask(server.base_url, body(stream=False), max_retries=2)
        assert answer.choices[0].message.content == "Cardiomegaly" and len(triton.requests) == 2


def test_a_client_that_is_closed_or_cancelled_ends_its_reading():
    """Whole answers: there is nothing that the client could have taken before."""

    async def leave(how: str) -> None:
        client = openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=60)
        call = asyncio.create_task(client.chat.completions.create(**body()))
        while not triton.active:
            await asyncio.sleep(0.005)
        if how == "cancelled":
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        await client.close()
        if how == "closed":
            with pytest.raises(openai.APIConnectionError):
                await call

    for how in ("cancelled", "closed"):
        with served(never) as (triton, server):
            asyncio.run(leave(how))
            assert triton.cancelled.wait(60)
            until(lambda: triton.active == 0)
            until(lambda: server.service._completions.under_way == 0)
