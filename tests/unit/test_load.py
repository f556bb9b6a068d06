"""The load driver against a server whose answers the test writes."""

import contextlib
import json
import os
import threading
import time
from itertools import islice

import pytest
from fake_server import FakeServer, empty_final, failure, pause, response

from cxr_triton.client.wire import infer_request
from cxr_triton.errors import Unavailable
from cxr_triton.perf.load import Load, offer, prompt_threads
from cxr_triton.perf.workload import arrivals

DEADLINE_S = 60
STAGES = ("image_decode", "preprocess", "vision", "queue", "prefill", "decode", "report", "first_token", "total")
READING = json.dumps(
    {
        "status": "ok",
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
        "timings_ms": dict.fromkeys(STAGES, 1.0),
    }
)


def messages(count: int = 2) -> list[bytes]:
    requests = (infer_request("cxr_reader", [b"picture"], {"seed": i}, max_message_mib=2) for i in range(count))
    return [request.SerializeToString() for request in requests]


def answer(request, context):
    yield response("one ")
    yield response("")  # a heartbeat
    yield response("two")
    yield response("", READING)
    yield empty_final()


def run(server, load, seconds=0.0, requests=1, **more):
    return offer(server.url, messages(), load, min_seconds=seconds, min_requests=requests, timeout_s=DEADLINE_S, **more)


def test_a_record_holds_when_text_came_and_what_the_reading_said():
    def slow(request, context):
        for message in answer(request, context):
            yield message
            pause(context, 0.05)

    with FakeServer(slow) as server:
        (record,), failure = run(server, Load("concurrency", 1))
    assert failure is None and (record.status, record.prompt_tokens, record.tokens) == ("ok", 7, 3)
    assert len(record.deltas_s) == 2  # neither the heartbeat nor the reading
    first_s, second_s = record.deltas_s
    assert record.scheduled_s <= record.sent_s < first_s
    # The server pauses after each response, so these are lower bounds whatever the machine does. What came late itself
    # has less before the next.
    assert second_s - record.sent_s >= 0.09 and record.end_s - record.sent_s >= 0.14 and first_s < second_s
    assert record.itl_ms == pytest.approx(1e3 * (second_s - first_s) / 2)


def test_an_open_loop_sends_by_its_schedule_whatever_the_server_does():
    """The server answers nothing before all requests are there: a client that waits for answers never ends."""
    everybody = threading.Barrier(6, timeout=DEADLINE_S)

    def stalled(request, context):
        everybody.wait()
        yield from answer(request, context)

    with FakeServer(stalled) as server:
        records, failure = run(server, Load("rate_per_s", 200.0, "poisson"), requests=6, seed=3)
    assert failure is None
    assert [record.scheduled_s for record in records] == list(islice(arrivals("poisson", 200.0, [3]), 6))
    assert [record.item for record in records] == [0, 1, 0, 1, 0, 1]
    assert all(record.sent_s >= record.scheduled_s for record in records)


@pytest.mark.slow
def test_latencies_count_from_the_schedule():
    """A server that takes one request at a time, and more are due than it can take: the wait is in the latency."""
    alone, busy_s = threading.Lock(), 0.1

    def serial(request, context):
        with alone:
            pause(context, busy_s)
        yield from answer(request, context)

    with FakeServer(serial) as server:
        records, _ = run(server, Load("rate_per_s", 100.0, "constant"), requests=8)
    ends = sorted(record.end_s for record in records)
    assert all(end_s >= busy_s * (i + 1) * 0.95 for i, end_s in enumerate(ends))
    # The last to end was due at 0.07 s at the latest, and the seven others were served before.
    assert max(record.latency_ms for record in records) >= 1e3 * (8 * busy_s * 0.95 - 0.07)


def test_a_closed_loop_keeps_its_concurrency():
    together, most = threading.Barrier(3, timeout=DEADLINE_S), []

    def counted(request, context):
        together.wait()  # three at once, or nothing goes on
        most.append(server.active)
        yield from answer(request, context)

    with FakeServer(counted) as server:
        records, failure = run(server, Load("concurrency", 3), requests=9)
    assert failure is None and len(records) == 9 and max(most) <= 3


@pytest.mark.slow
def test_both_minima_are_kept():
    with FakeServer(answer) as server:
        began_s = time.monotonic()
        run(server, Load("concurrency", 1), seconds=0.5, requests=1)
        assert time.monotonic() - began_s >= 0.5
        records, _ = run(server, Load("rate_per_s", 100.0, "constant"), seconds=0.1, requests=4)
        assert len(records) == 10  # due at 0, 0.01, ... 0.09


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "code"),
    [("[QUEUE_FULL] 64 requests wait", "QUEUE_FULL"), ("[INVALID_REQUEST] unknown key", "INVALID_REQUEST")],
)
@pytest.mark.parametrize("ending", [(), (empty_final(),)])
def test_the_first_failure_ends_the_load(text, code, ending):
    def third(request, context):
        if len(server.requests) == 3:
            yield failure(text)
            yield from ending
        else:
            yield from answer(request, context)

    with FakeServer(third) as server:
        records, error = run(server, Load("concurrency", 1), requests=50)
    assert error.code == code and [record.status for record in records] == ["ok", "ok", code]
    assert records[-1].failed and not records[0].failed


def test_a_stream_without_a_reading_is_a_failure():
    with FakeServer(lambda request, context: iter([response("one")])) as server:
        (record,), error = run(server, Load("concurrency", 1))
    assert (record.status, error.code) == ("INTERNAL", "INTERNAL")


def test_a_lost_connection_is_a_failure():
    def lost(request, context):
        yield response("one")
        threading.Thread(target=server._server.stop, args=(0,)).start()
        pause(context, DEADLINE_S)

    with FakeServer(lost) as server:
        records, error = run(server, Load("concurrency", 2), requests=2)
    ends = {"UNAVAILABLE", "CANCELLED"}  # a server that stops may reset a stream before it closes the connection
    assert error.code in ends and records and {record.status for record in records} <= ends


@pytest.mark.slow
def test_a_fault_of_the_client_ends_the_load(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("cxr_triton.perf.load._Run._check", broken)
    for load in (Load("concurrency", 2), Load("rate_per_s", 50.0)):
        with FakeServer(answer) as server, pytest.raises(ZeroDivisionError):
            run(server, load, seconds=DEADLINE_S)


def test_no_server_is_said():
    with pytest.raises(Unavailable, match="no server at"):
        offer("127.0.0.1:1", messages(), Load("concurrency", 1), min_seconds=0, min_requests=1, timeout_s=0.5)


def policies() -> set[int]:
    found = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # gRPC's threads come and go
            found.add(os.sched_getscheduler(int(thread)))
    return found


def test_every_thread_has_the_priority_and_gives_it_back():
    ended, inner = threading.Event(), []
    waiting = threading.Thread(target=ended.wait)
    waiting.start()
    before = policies()
    with prompt_threads() as priority:
        started = threading.Thread(target=lambda: inner.append(os.sched_getscheduler(0)))
        started.start()
        started.join()
        expected = {os.SCHED_FIFO} if priority == "real-time" else before
        assert policies() == expected and set(inner) <= expected and inner
        with pytest.raises(OSError, match="of the body"), prompt_threads() as inherited:
            assert inherited == priority
            raise OSError("of the body")
        assert policies() == expected
    assert policies() == before
    ended.set()
    waiting.join()


def test_a_process_that_began_in_the_background_goes_back_there(monkeypatch):
    given = []
    monkeypatch.setattr(os, "sched_getscheduler", lambda thread: os.SCHED_BATCH)
    monkeypatch.setattr(os, "sched_setscheduler", lambda thread, policy, priority: given.append(policy))
    with prompt_threads():
        assert set(given) == {os.SCHED_FIFO}
        given.clear()
    assert set(given) == {os.SCHED_BATCH}


def test_a_load_goes_on_where_priority_is_not_permitted(monkeypatch):
    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with FakeServer(answer) as server:
        records, failure = offer(server.url, messages(), Load("concurrency", 1), min_seconds=0, min_requests=2)
    assert failure is None and len(records) == 2
    with prompt_threads() as priority:
        assert priority == "normal"
