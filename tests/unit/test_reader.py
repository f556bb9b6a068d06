"""The blocking and the asyncio client against an endpoint that misbehaves on purpose; both must behave the same."""

import asyncio
import gc
import inspect
import itertools
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import grpc
import pytest
from fake_server import FakeServer, empty_final, failure, pause, response
from fake_session import until
from front import EC
from tritonclient.utils import deserialize_bytes_tensor

from cxr_triton.client import AsyncReader, Reader, Timeouts, Tls, limits, wire
from cxr_triton.client.limits import DEFAULT_TIMEOUTS
from cxr_triton.errors import (
    CODES,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LimitExceeded,
    QueueFull,
    ServerMismatch,
    Unavailable,
)
from cxr_triton.profile import load_profile, profile_names
from cxr_triton.reading import Reading, parse

TEXT = "<think> Lungs are clear. </think>\n<answer> No Finding </answer>"
READING = Reading.of(
    parse(TEXT, grammar="think_answer", answer="labels", labels=("No Finding",)),
    task="findings",
    prompt="Find abnormalities and support devices.",
    model={"profile": "test"},
    notice="A test double answered.",
).to_json()


def collect(kind, server, *args, timeouts=DEFAULT_TIMEOUTS, tls=None, **kwargs):
    """Deltas and reading through one of the twins."""
    if kind is Reader:
        with Reader(server.url, timeouts=timeouts, tls=tls) as reader:
            stream = reader.read(*args, **kwargs)
            return list(stream), stream.reading

    async def run():
        async with AsyncReader(server.url, timeouts=timeouts, tls=tls) as reader:
            stream = reader.read(*args, **kwargs)
            return [delta async for delta in stream], stream.reading

    return asyncio.run(run())


both = pytest.mark.parametrize("kind", [Reader, AsyncReader])


def streamed(request, context):
    yield response()
    yield response(TEXT[:10], swap=True)
    yield response()
    yield response(TEXT[10:])
    yield response("", READING, final=True)


@both
def test_text_comes_without_heartbeats_and_ends_in_a_typed_reading(kind):
    with FakeServer(streamed) as server:
        deltas, reading = collect(kind, server, [b"prior", b"current"])
    assert deltas == [TEXT[:10], TEXT[10:]]
    assert reading.text == TEXT and reading.status == "ok"


@both
def test_empty_final_response_after_the_reading(kind):
    def answer(request, context):
        yield response(TEXT, READING)
        yield empty_final()

    with FakeServer(answer) as server:
        assert collect(kind, server, b"x")[0] == [TEXT]


@both
def test_a_reading_of_another_release_is_a_mismatch(kind):
    newer = READING.replace('"version": 1', '"version": 99')
    with (
        FakeServer(lambda request, context: iter([response(TEXT, newer)])) as server,
        pytest.raises(ServerMismatch, match="99"),
    ):
        collect(kind, server, b"x")


@both
def test_images_travel_as_length_prefixed_contents_and_only_given_keys_are_sent(kind, tmp_path):
    path = tmp_path / "secret-name.dcm"
    path.write_bytes(b"from a path")
    with FakeServer(streamed) as server:
        collect(kind, server, [b"", b"bytes\x00\xff", path, str(path)], task="findings", variables={"a": "b"}, seed=0)
        request = server.requests[0]
        assert server.asked == {"task": "findings", "variables": {"a": "b"}, "seed": 0}
    images = request.inputs[0]
    assert (images.name, images.datatype, list(images.shape)) == ("IMAGES", "BYTES", [4])
    assert list(deserialize_bytes_tensor(request.raw_input_contents[0])) == [
        b"",
        b"bytes\x00\xff",
        b"from a path",
        b"from a path",
    ]
    assert b"secret-name" not in request.SerializeToString()


@both
def test_what_is_asked_is_what_was_given_though_it_changes_before_it_is_sent(kind):
    history = [{"role": "user", "content": "Large?"}, {"role": "assistant", "content": "Yes."}]
    asked = list(history)
    with FakeServer(streamed) as server:
        if kind is Reader:
            with Reader(server.url) as reader:
                stream = reader.read(b"x", history=asked)
                asked.clear()
                stream.result()
        else:

            async def run():
                async with AsyncReader(server.url) as reader:
                    stream = reader.read(b"x", history=asked)
                    asked.clear()
                    await stream.result()

            asyncio.run(run())
        assert server.asked["history"] == history


@both
def test_one_image_needs_no_list_and_none_is_an_empty_tensor(kind, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"png")
    with FakeServer(streamed) as server:
        for images, shape in (((str(path),), [1]), ((b"x",), [1]), ((), [0])):
            collect(kind, server, *images)
            assert list(server.requests[-1].inputs[0].shape) == shape


@both
@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_of_the_server_comes_back_as_its_exception(kind, code):
    def answer(request, context):
        yield response("partly")
        yield failure(f"[{code}] what, where")

    with FakeServer(answer) as server, pytest.raises(CODES[code]) as caught:
        collect(kind, server, b"x")
    assert type(caught.value) is CODES[code] and caught.value.message == "what, where"


@both
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, QueueFull),
        (grpc.StatusCode.UNIMPLEMENTED, ServerMismatch),
        (grpc.StatusCode.UNKNOWN, InternalError),
    ],
)
def test_every_grpc_status_becomes_an_exception_and_the_request_is_sent_once(kind, status, error):
    def answer(request, context):
        context.abort(status, "said the test")
        yield

    with FakeServer(answer) as server:
        with pytest.raises(error):
            collect(kind, server, b"x")
        assert len(server.requests) == 1


@both
def test_a_stream_without_a_reading_is_an_error(kind):
    with (
        FakeServer(lambda request, context: iter([response("text"), empty_final()])) as server,
        pytest.raises(InternalError, match="without a reading"),
    ):
        collect(kind, server, b"x")


@both
def test_a_garbled_tensor_is_named(kind):
    def answer(request, context):
        message = response("text")
        message.infer_response.raw_output_contents[0] = b"\xff\xff\x00\x00text"
        yield message

    with FakeServer(answer) as server, pytest.raises(ServerMismatch, match="cut off"):
        collect(kind, server, b"x")


@pytest.mark.slow
@both
def test_connecting_is_retried_until_the_server_is_ready(kind):
    with FakeServer(streamed) as server:
        server.refuse = [grpc.StatusCode.UNAVAILABLE] * 3
        assert collect(kind, server, b"x")[1].status == "ok"
        assert server.refuse == [] and len(server.requests) == 1


@both
def test_no_server_is_unavailable_within_the_limit(kind):
    with FakeServer(streamed) as server:
        pass
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"connect_s = 0.6 s.*cxr-triton serve"):
        collect(kind, server, b"x", timeouts=Timeouts(connect_s=0.6))
    assert time.monotonic() - started < 30


@both
def test_a_silent_server_is_unavailable_within_the_limit(kind):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        server = SimpleNamespace(url=f"127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(Unavailable):
            collect(kind, server, b"x", timeouts=Timeouts(connect_s=0.5))


@both
def test_another_contract_is_a_mismatch_that_names_the_tensors(kind):
    with FakeServer(streamed) as server:
        server.outputs = ("TEXT",)
        with pytest.raises(ServerMismatch, match=r"TEXT BYTES.*DELTA BYTES, READING BYTES"):
            collect(kind, server, b"x")
        assert server.requests == []


def test_an_unknown_model_is_a_mismatch():
    with FakeServer(streamed) as server, Reader(server.url, model="other") as reader:
        with pytest.raises(ServerMismatch, match="'other'"):
            reader.read(b"x").result()
        with pytest.raises(ServerMismatch):
            reader.server_info()


@pytest.mark.slow
@both
@pytest.mark.parametrize(
    ("limit", "answer"),
    [
        ("first_delta_s", lambda request, context: (pause(context, 0.02) or response() for _ in range(3000))),
        ("first_delta_s", lambda request, context: (pause(context, 60) or response() for _ in range(1))),
        ("idle_s", lambda request, context: (pause(context, 60 * i) or response("text") for i in range(2))),
        ("idle_s", lambda request, context: (pause(context, 60 * i) or response() for i in range(2))),
        ("total_s", lambda request, context: (pause(context, 0.02) or response("text") for _ in range(3000))),
    ],
)
def test_each_limit_ends_the_reading_and_frees_the_server(kind, limit, answer):
    with FakeServer(answer) as server:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=f"{limit} = 0.4 s"):
            collect(kind, server, b"x", timeouts=Timeouts(**{limit: 0.4}))
        assert 0.35 < time.monotonic() - started < 30
        assert server.cancelled.wait(60)


def taken(kind, url, timeouts, prepare=lambda reader, stream: None, after=lambda delta: None):
    """The stream of one reading and its deltas; `prepare` has it before the first, `after` comes after each."""
    if kind is Reader:
        with Reader(url, timeouts=timeouts) as reader:
            stream = reader.read(b"x")
            prepare(reader, stream)
            return stream, [after(delta) or delta for delta in stream]

    async def run():
        async with AsyncReader(url, timeouts=timeouts) as reader:
            stream = reader.read(b"x")
            prepare(reader, stream)
            return stream, [after(delta) or delta async for delta in stream]

    return asyncio.run(run())


@both
def test_what_the_caller_does_between_two_reads_is_not_idle_time(kind, monkeypatch):
    """When the caller asks for the second text, the first one came 1,000 s ago."""

    def answer(request, context):
        yield response(TEXT[:10])
        pause(context, 0.3)
        yield response(TEXT[10:], READING)

    ago_s = [1000]
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: time.monotonic() - sum(ago_s)))
    with FakeServer(answer) as server:
        timeouts = Timeouts(first_delta_s=None, idle_s=30)
        assert taken(kind, server.url, timeouts, after=lambda delta: ago_s.clear())[1] == [TEXT[:10], TEXT[10:]]


def running_out(response_at):
    """Makes a limit run out at the moment at which a stream's response of this number comes."""

    def prepare(reader, stream):
        count = itertools.count()
        if isinstance(reader, Reader):
            watchdog = reader._watchdog
            forget = watchdog.forget

            def forget_late(call):
                if next(count) == response_at:
                    watchdog._expire(float("inf"))
                return forget(call)

            watchdog.forget = forget_late
            return
        start = reader._start

        async def start_late(request):
            call = await start(request)
            read = call.read

            async def read_late():
                message = await read()
                if next(count) == response_at:
                    stream._expire("idle_s")
                return message

            call.read = read_late
            return call

        reader._start = start_late

    return prepare


@both
def test_a_limit_that_runs_out_as_a_text_comes_loses_no_text_and_is_told_by_its_name(kind):
    def answer(request, context):
        yield response(TEXT[:10])
        yield response(TEXT[10:])
        pause(context, 9)

    deltas = []
    with FakeServer(answer) as server, pytest.raises(DeadlineExceeded, match="idle_s = 5"):
        taken(kind, server.url, Timeouts(idle_s=5), running_out(1), deltas.append)
    assert deltas == [TEXT[:10], TEXT[10:]]


@both
@pytest.mark.parametrize("breaks", [False, True])
def test_a_complete_reading_is_kept_whatever_ends_its_stream(kind, breaks):
    """A limit runs out as it comes; or the server breaks off after it."""

    def answer(request, context):
        yield response(TEXT)
        yield response("", READING)
        if breaks:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the test said so")
        pause(context, 9)

    with FakeServer(answer) as server:
        stream, deltas = taken(kind, server.url, Timeouts(idle_s=5), running_out(9 if breaks else 1))
    assert deltas == [TEXT] and stream.reading.text == TEXT


@pytest.mark.parametrize("name", ["connect_s", "first_delta_s", "idle_s", "total_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_limit_that_is_no_time_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Timeouts(**{name: value})


def test_no_limits_at_all():
    none = Timeouts(connect_s=None, first_delta_s=None, idle_s=None, total_s=None)
    with FakeServer(streamed) as server:
        for kind in (Reader, AsyncReader):
            assert collect(kind, server, b"x", timeouts=none)[1].status == "ok"


def endless(request, context):
    while context.is_active():
        yield response("text ")
        pause(context, 0.01)


@pytest.mark.parametrize("how", ["close", "with", "garbage", "reader"])
def test_leaving_a_stream_cancels_on_the_server_at_once(how):
    with FakeServer(endless) as server, Reader(server.url) as reader:
        stream = reader.read(b"x")
        assert next(stream) == "text "
        if how == "close":
            stream.close()
            assert list(stream) == []
            with pytest.raises(Cancelled):
                stream.result()
        elif how == "with":
            with stream:
                pass
        elif how == "garbage":
            del stream
            gc.collect()
        else:
            reader.close()
        assert server.cancelled.wait(60)


@pytest.mark.parametrize("how", ["close", "with", "garbage", "reader", "task"])
def test_leaving_an_async_stream_cancels_on_the_server_at_once(how):
    async def run(server):
        async with AsyncReader(server.url) as reader:
            stream = reader.read(b"x")
            assert await anext(stream) == "text "
            if how == "close":
                await stream.close()
                assert [delta async for delta in stream] == []
                with pytest.raises(Cancelled):
                    await stream.result()
            elif how == "with":
                async with stream:
                    pass
            elif how == "garbage":
                del stream
                gc.collect()
            elif how == "reader":
                await reader.close()
            else:
                task = asyncio.create_task(stream.result())
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await asyncio.to_thread(server.cancelled.wait, 60)

    with FakeServer(endless) as server:
        asyncio.run(run(server))


@pytest.mark.parametrize("kind", [Reader, AsyncReader])
def test_a_stream_that_is_left_at_its_beginning_is_cancelled_with_its_first_response(kind, monkeypatch):
    monkeypatch.setattr(wire, "END_S", 60.0)
    begins = threading.Event()

    def answer(request, context):
        assert begins.wait(60)
        yield response()
        pause(context, 60)

    async def run():
        async with AsyncReader(server.url, timeouts=Timeouts(first_delta_s=None)) as reader:
            stream = reader.read(b"x")
            stream._follow(await reader._start(stream._taken_request()))
            await stream.close()
            assert not await asyncio.to_thread(server.cancelled.wait, 0.3)
            begins.set()

    with FakeServer(answer) as server:
        if kind is AsyncReader:
            asyncio.run(run())
        else:
            with Reader(server.url) as reader:
                stream = reader.read(b"x")
                stream._follow(reader._start(stream._taken_request()))
                stream.close()
                assert not server.cancelled.wait(0.3)
                begins.set()
        assert server.cancelled.wait(60)


@pytest.mark.parametrize("kind", [Reader, AsyncReader])
def test_a_refusal_is_read_to_the_end_of_its_stream(kind, monkeypatch):
    monkeypatch.setattr(wire, "END_S", 60.0)

    def answer(request, context):
        yield failure("[INVALID_REQUEST] what, where")
        pause(context, 0.3)

    with FakeServer(answer) as server:
        with pytest.raises(InvalidRequest):
            collect(kind, server, b"x")
        until(lambda: server.active == 0)
        assert not server.cancelled.is_set()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Reader, AsyncReader])
def test_a_refusal_does_not_wait_for_a_server_that_goes_on(kind):
    def answer(request, context):
        yield failure("[INVALID_REQUEST] what, where")
        pause(context, 60)

    with FakeServer(answer) as server:
        started = time.monotonic()
        with pytest.raises(InvalidRequest):
            collect(kind, server, b"x")
        assert time.monotonic() - started < 30
        assert server.cancelled.wait(60)


def quiet(request, context):
    yield response("text")
    pause(context, 60)


def test_closing_from_another_thread_wakes_the_reader():
    with FakeServer(quiet) as server, Reader(server.url) as reader:
        stream = reader.read(b"x")
        next(stream)
        threading.Timer(0.1, stream.close).start()
        with pytest.raises(Cancelled):
            next(stream)


def test_closing_from_another_task_wakes_the_reader():
    async def run(server):
        async with AsyncReader(server.url) as reader:
            stream = reader.read(b"x")
            await anext(stream)
            asyncio.get_running_loop().call_later(0.1, lambda: asyncio.ensure_future(stream.close()))
            with pytest.raises(Cancelled):
                await anext(stream)

    with FakeServer(quiet) as server:
        asyncio.run(run(server))


@pytest.mark.parametrize("what", ["stream", "reader"])
def test_what_is_closed_while_its_request_is_packed_asks_nothing(what, monkeypatch):
    packing, go_on = threading.Event(), threading.Event()

    async def run(server):
        async with AsyncReader(server.url) as reader:
            stream = reader.read(b"x")
            whole = stream._taken_request

            def slowly():
                request = whole()
                packing.set()
                assert go_on.wait(60)
                return request

            monkeypatch.setattr(stream, "_taken_request", slowly)
            waiting = asyncio.ensure_future(anext(stream))
            assert await asyncio.to_thread(packing.wait, 60)
            await (stream if what == "stream" else reader).close()
            go_on.set()
            with pytest.raises(Cancelled):
                await waiting

    with FakeServer(streamed) as server:
        asyncio.run(run(server))
        assert not server.requests


def test_a_dropped_reader_ends_its_thread():
    with FakeServer(streamed) as server:
        reader = Reader(server.url)
        reader.read(b"x").result()
        assert "cxr-reader-watchdog" in {thread.name for thread in threading.enumerate()}
        del reader
        gc.collect()
        assert "cxr-reader-watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_closed_reader_says_so():
    with FakeServer(streamed) as server:
        reader = Reader(server.url)
        reader.close()
        with pytest.raises(RuntimeError, match="closed"):
            reader.read(b"x").result()


def closed_while_it_connects(kind, url, monkeypatch, *, between_attempts):
    """What the caller of a reader gets that another thread or task closes."""

    def backoff_s():
        if between_attempts:
            close()
        while True:
            yield 0.05

    async def run():
        nonlocal close
        reader = AsyncReader(url)
        loop = asyncio.get_running_loop()
        close = lambda: loop.create_task(reader.close())  # noqa: E731
        if not between_attempts:
            loop.call_later(0.2, close)
        return await reader.read(b"x").result()

    close = None
    monkeypatch.setattr(wire, "backoff_s", backoff_s)
    if kind is AsyncReader:
        return asyncio.run(run())
    reader = Reader(url)
    close = reader.close
    if not between_attempts:
        threading.Timer(0.2, close).start()
    return reader.read(b"x").result()


@both
def test_closing_a_reader_between_two_attempts_to_connect_cancels(kind, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(Cancelled, match="closed before the server answered"):
        closed_while_it_connects(kind, url, monkeypatch, between_attempts=True)


@both
def test_closing_a_reader_in_the_middle_of_an_attempt_to_connect_cancels(kind, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Cancelled):
            closed_while_it_connects(kind, url, monkeypatch, between_attempts=False)


def test_readings_run_side_by_side():
    gate = threading.Barrier(4, timeout=60)

    def answer(request, context):
        gate.wait()
        yield from streamed(request, context)

    with FakeServer(answer) as server, Reader(server.url) as reader:
        results = []
        threads = [threading.Thread(target=lambda: results.append(reader.read(b"x").result().status)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == ["ok"] * 4

        async def run():
            async with AsyncReader(server.url) as twin:
                return await asyncio.gather(*(twin.read(b"x").result() for _ in range(4)))

        assert [reading.status for reading in asyncio.run(run())] == ["ok"] * 4


def test_too_large_a_request_is_refused_before_it_is_sent():
    with (
        FakeServer(streamed) as server,
        Reader(server.url, max_message_mib=2) as reader,
        pytest.raises(LimitExceeded, match=r"1\.5 MiB together, allowed 1 MiB"),
    ):
        reader.read([bytes(3 << 18), bytes(3 << 18)])


@pytest.mark.slow
@both
def test_a_server_with_a_smaller_limit_is_told_apart_from_a_full_queue(kind):
    with (
        FakeServer(streamed, max_receive_bytes=1 << 16) as server,
        pytest.raises(LimitExceeded, match="larger than max"),
    ):
        collect(kind, server, bytes(1 << 17))


def test_a_large_image_and_a_large_reading_fit():
    with FakeServer(lambda request, context: iter([response(TEXT * 100_000, READING)])) as server:
        deltas, _ = collect(Reader, server, bytes(16 << 20))
    assert deltas == [TEXT * 100_000]


def test_the_environments_web_proxy_is_not_used(monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FakeServer(streamed) as server:
        for kind in (Reader, AsyncReader):
            assert collect(kind, server, b"x")[1].status == "ok"


def profile_of(kind, server):
    if kind is Reader:
        with Reader(server.url) as reader:
            return reader.profile()

    async def run():
        async with AsyncReader(server.url) as reader:
            return await reader.profile()

    return asyncio.run(run())


@both
@pytest.mark.parametrize("name", profile_names())
def test_the_served_profile(kind, name):
    with FakeServer(streamed) as server:
        server.profile = load_profile(name).to_json()
        assert profile_of(kind, server) == load_profile(name)


@both
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("", "package its bundle again"),
        ("{", "not JSON"),
        ("[]", "expected a mapping"),
        ('{"name": "x"}', "is missing"),
    ],
)
def test_a_server_without_a_profile_of_this_release_is_a_mismatch(kind, said, message):
    with FakeServer(streamed) as server:
        server.profile = said
        with pytest.raises(ServerMismatch, match=message):
            profile_of(kind, server)


def test_server_info():
    with FakeServer(streamed) as server:
        with Reader(server.url) as reader:
            info = reader.server_info()

        async def run():
            async with AsyncReader(server.url) as twin:
                return await twin.server_info()

        assert asyncio.run(run()) == info
    assert (info.name, info.version, info.model, info.model_versions) == ("fake", "0.0", "cxr_reader", ("1",))


@both
def test_tls(kind, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", *EC, "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [*command, "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    with FakeServer(streamed, tls=credentials, host="localhost") as server:
        assert collect(kind, server, b"x", tls=Tls(ca=cert))[1].status == "ok"
        with pytest.raises(Unavailable):
            collect(kind, server, b"x", tls=Tls(), timeouts=Timeouts(connect_s=0.5))


def test_the_twins_have_the_same_methods():
    for name in ("read", "server_info", "profile", "close", "__init__"):
        ours, twins = (inspect.signature(getattr(kind, name)).parameters for kind in (Reader, AsyncReader))
        assert list(ours) == list(twins)


ABANDON = {
    "reader": """
import sys
from cxr_triton.client import Reader
reader = Reader(sys.argv[1]); stream = reader.read(b"x"); print(next(stream))
""",
    "aio": """
import asyncio, sys
from cxr_triton.client import AsyncReader
async def run():
    global reader, stream
    reader = AsyncReader(sys.argv[1]); stream = reader.read(b"x"); print(await anext(stream))
asyncio.run(run())
""",
}


@pytest.mark.parametrize("kind", ABANDON)
def test_a_program_may_end_in_the_middle_of_a_reading(kind):
    with FakeServer(quiet) as server:
        command = [sys.executable, "-c", ABANDON[kind], server.url]
        out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        assert (out.stdout, out.stderr) == ("text\n", "")
        assert server.cancelled.wait(60)


LEAK = """
import asyncio, gc, os, sys, threading, time
import psutil
from cxr_triton.client.limits import DEFAULT_TIMEOUTS
from cxr_triton.client import AsyncReader, Reader
from cxr_triton.errors import CxrError

me, image, url = psutil.Process(), bytes(100_000), sys.argv[1]

def state(fds=0, within_s=1):
    # gRPC closes the pollers and the socket of a closed channel from a thread of its own, some 40 ms later.
    gc.collect()
    end = time.monotonic() + within_s
    while me.num_fds() > fds and time.monotonic() < end:
        time.sleep(0.01)
    return me.num_fds(), threading.active_count(), me.memory_info().rss / 2**20

def blocking(n):
    with Reader(url) as reader:
        for i in range(n):
            stream = reader.read(image, prompt=("error" if i % 5 == 1 else None))
            if i % 5 == 2:
                next(stream)            # left to the garbage collector
            else:
                try:
                    stream.result()
                except CxrError:
                    pass

async def asynchronous(n):
    async with AsyncReader(url) as reader:
        for i in range(n):
            stream = reader.read(image, prompt=("error" if i % 5 == 1 else None))
            if i % 5 == 2:
                await anext(stream)
                del stream
            else:
                try:
                    await stream.result()
                except CxrError:
                    pass

def opened(n):
    for _ in range(n):
        with Reader(url) as reader:
            reader.read(image).result()

run = {"reader": blocking, "aio": lambda n: asyncio.run(asynchronous(n)), "opened": opened}[sys.argv[2]]
run(int(sys.argv[3]))
before = state()
run(int(sys.argv[4]))
print(*before, *state(before[0], within_s=10))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "warm", "calls"), [("reader", 50, 1000), ("aio", 50, 1000), ("opened", 10, 50)])
def test_a_thousand_readings_leave_no_thread_no_descriptor_and_no_memory(kind, warm, calls):
    def answer(request, context):
        if b"error" in request.raw_input_contents[1]:
            yield failure("[INVALID_REQUEST] what, where")
        yield from streamed(request, context)

    with FakeServer(answer) as server:
        out = subprocess.run(
            [sys.executable, "-c", LEAK, server.url, kind, str(warm), str(calls)],
            check=True,
            capture_output=True,
            text=True,
        )
    assert out.stderr == ""
    fds, threads, mib, fds_after, threads_after, mib_after = map(float, out.stdout.split())
    assert fds_after <= fds and threads_after <= threads
    # 1,000 requests carry 95 MiB; a leak of one message in twenty would show.
    assert mib_after < mib + 4.5


@both
@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE])
def test_a_server_that_puts_its_models_away_is_not_taken_for_another(kind, code):
    """So Triton answers while it ends: it is worth another attempt, which a proxy may give to another server."""
    ends = "Request for unknown model: 'cxr_reader' has no available versions"
    with FakeServer(streamed) as server:
        server.refuse, server.refusal = [code], ends
        assert collect(kind, server, b"x")[1].status == "ok"

    def gone(request, context):
        context.abort(grpc.StatusCode.UNAVAILABLE, ends)
        yield

    with FakeServer(gone) as server, pytest.raises(Unavailable):
        collect(kind, server, b"x")
    with FakeServer(lambda request, context: iter([failure(ends)])) as server:
        with pytest.raises(Unavailable, match="starting or ending"):
            collect(kind, server, b"x")
