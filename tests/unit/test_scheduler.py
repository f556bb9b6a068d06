"""The scheduler over an in-memory decoder whose next token depends on every token and position in its cache row."""

import dataclasses
import gc
import re
import threading
import time
import weakref

import numpy as np
import psutil
import pytest
from fake_session import (
    EOS,
    VOCAB,
    WAIT_S,
    FakeSession,
    Letters,
    LetterStream,
    Receiver,
    expected_tokens,
    generation,
    until,
)

from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.errors import InternalError, InvalidRequest, PromptTooLong, QueueFull, Unavailable


@pytest.fixture
def serve():
    opened = []

    def build(session=None, **options):
        session = session or FakeSession()
        runtime = DecoderRuntime(None, session=session, tokenizer=Letters(), **options)
        opened.append((runtime, session))
        return runtime, session

    yield build
    for runtime, session in opened:
        session.gated = False
        session.gate.release(1000)
        runtime.close()


def prompts(count):
    rng = np.random.default_rng(5)
    return [rng.integers(0, 90, rng.integers(1, 200)) for _ in range(count)]


def test_every_stream_in_a_crowd_gets_what_it_gets_alone(serve):
    runtime, session = serve(prefill_chunk=32)
    generations = [generation(prompt, 5 + 7 * i % 40) for i, prompt in enumerate(prompts(24))]
    receivers = [Receiver() for _ in generations]
    for each, receiver in zip(generations, receivers, strict=True):
        runtime.submit(each, receiver)
    for each, receiver in zip(generations, receivers, strict=True):
        assert receiver.completion.finish_reason == "length"
        assert receiver.tokens == expected_tokens(each)
        assert receiver.text == receiver.completion.text
    assert max(size for _, size in session.steps()) == 4  # they did share steps
    assert not session.lengths.any()


def test_positions_after_an_image_go_on_from_the_largest(serve):
    runtime, _ = serve()
    plain = generation(range(9), 6)
    positions = np.array([[0, 1, 1, 1, 1, 3, 4, 5, 6], [0, 1, 1, 2, 2, 3, 4, 5, 6], [0, 1, 2, 1, 9, 3, 4, 5, 6]])
    image = Generation(
        input_ids=plain.input_ids,
        position_ids=positions,
        image_index=np.array([-1, 0, 1, 2, 3, -1, -1, -1, -1]),
        image_embeddings=np.zeros((4, 4), np.float32),
        sampling=plain.sampling,
    )
    receiver = Receiver()
    runtime.submit(image, receiver)
    assert receiver.completion.usage == {"prompt_tokens": 9, "completion_tokens": 6, "image_tokens": 4}
    assert receiver.tokens == expected_tokens(image)


def test_a_running_stream_steps_between_two_chunks_of_a_long_prompt(serve):
    session = FakeSession(max_sequence=4096)
    session.gated = True
    runtime, _ = serve(session, prefill_chunk=16)
    short, long = Receiver(), Receiver()
    runtime.submit(generation(max_new_tokens=200), short)
    session.gate.release(3)
    until(lambda: len(session.steps()) == 2)
    runtime.submit(generation(range(80), 2), long)
    session.gate.release(40)
    until(lambda: len(session.calls) >= 30)
    # the step that was under way may end before the first chunk
    kinds = "".join(call[0][0] for call in session.calls[3:] if call[0] != "free")
    assert re.match("s?(ps){5}s", kinds)


def test_requests_that_wait_start_in_the_order_they_came(serve):
    runtime, session = serve(FakeSession(slots=1))
    session.gated = True
    order, receivers = [], []
    for index in range(6):
        receiver = Receiver()
        receivers.append(receiver)

        def note(chunk, index=index, receiver=receiver):
            if len(chunk.token_ids) and index not in order:
                order.append(index)
            receiver(chunk)

        runtime.submit(generation((index,), 3), note)
    session.gate.release(100)
    for receiver in receivers:
        receiver.wait()
    assert order == list(range(6))


def test_a_full_queue_refuses_and_recovers(serve):
    runtime, session = serve(FakeSession(slots=1), queue_size=2)
    session.gated = True
    receivers = [Receiver() for _ in range(4)]
    runtime.submit(generation(), receivers[0])
    until(lambda: runtime._prefilling)
    runtime.submit(generation(), receivers[1])
    runtime.submit(generation(), receivers[2])
    with pytest.raises(QueueFull, match="2 may"):
        runtime.submit(generation(), Receiver())
    session.gate.release(1000)
    receivers[0].wait()
    until(lambda: len(runtime._waiting) < 2)
    runtime.submit(generation(), receivers[3])
    assert all(receiver.completion.finish_reason == "length" for receiver in receivers)


@pytest.mark.parametrize("how", ["id", "callable"])
@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_cancel_ends_a_stream_within_two_steps_and_frees_its_slot(serve, phase, how):
    runtime, session = serve(FakeSession(slots=2), prefill_chunk=8)
    session.gated = True
    others = [Receiver(), Receiver()]
    neighbours = [generation((40 + i,), 60) for i in range(1 if phase != "queue" else 2)]
    for neighbour, receiver in zip(neighbours, others, strict=False):
        runtime.submit(neighbour, receiver)
    session.gate.release(4)
    until(lambda: len(session.calls) == 4)
    victim, gone, ended_at = Receiver(), threading.Event(), []

    def heard(chunk):
        ended_at.extend([len(session.steps())] if chunk.completion else [])
        victim(chunk)

    stream_id = runtime.submit(generation(range(40), 100), heard, gone.is_set)
    ran = {"queue": 4, "prefill": 4, "decode": 30}[phase]
    session.gate.release(ran)
    until(lambda: len(session.calls) == 4 + ran)
    assert bool(victim.tokens) == (phase == "decode") and not victim.done.is_set()
    before = len(session.steps())
    gone.set() if how == "callable" else runtime.cancel(stream_id)
    session.gate.release(4)
    assert victim.completion.finish_reason == "cancelled"
    assert ended_at[0] - before <= 2
    assert victim.completion.text == victim.text
    session.gate.release(1000)
    for neighbour, receiver in zip(neighbours, others, strict=False):
        assert receiver.completion and receiver.tokens == expected_tokens(neighbour)
    until(lambda: not session.lengths.any())
    runtime.cancel(stream_id)  # an id that has ended is ignored


def test_a_hole_is_filled_by_the_last_stream(serve):
    runtime, session = serve(FakeSession(slots=4))
    lengths = [3, 40, 20, 30, 9, 25]
    generations = [generation((i + 1, 7), count) for i, count in enumerate(lengths)]
    receivers = [Receiver() for _ in generations]
    session.gated = True
    for each, receiver in zip(generations, receivers, strict=True):
        runtime.submit(each, receiver)
    session.gate.release(10000)
    for each, receiver in zip(generations, receivers, strict=True):
        assert receiver.completion and receiver.tokens == expected_tokens(each)
    moves = [call[1:] for call in session.calls if call[0] == "move"]
    assert moves and all(source > target for source, target in moves)


def test_chunks_hold_at_most_so_many_tokens_and_the_first_comes_at_once(serve):
    runtime, _ = serve(coalesce_tokens=4, coalesce_ms=1e6)
    receiver = Receiver()
    runtime.submit(generation(max_new_tokens=14), receiver)
    receiver.wait()
    assert [len(chunk.token_ids) for chunk in receiver.chunks] == [1, 4, 4, 4, 1]


def test_a_chunk_is_sent_before_it_is_older_than_the_limit(serve):
    runtime, session = serve(coalesce_tokens=10**6, coalesce_ms=250)
    session.step_s = 0.01
    receiver = Receiver()
    runtime.submit(generation(max_new_tokens=60), receiver)
    receiver.wait()
    sizes = [len(chunk.token_ids) for chunk in receiver.chunks[1:-1]]
    assert max(sizes) <= 25 and np.mean(sizes) > 1.5
    runtime, session = serve(coalesce_tokens=10**6, coalesce_ms=50)
    session.step_s = 0.06  # one step is longer than the limit: every token is sent at once
    receiver = Receiver()
    runtime.submit(generation(max_new_tokens=6), receiver)
    receiver.wait()
    assert [len(chunk.token_ids) for chunk in receiver.chunks][-4:] == [1, 1, 1, 1]


def test_what_is_unsent_goes_out_before_a_neighbours_prefill(serve):
    runtime, session = serve(coalesce_tokens=100, coalesce_ms=1e6)
    session.gated = True
    receiver = Receiver()
    runtime.submit(generation(max_new_tokens=50), receiver)
    session.gate.release(6)
    until(lambda: len(session.calls) == 6)
    runtime.submit(generation(range(50)), Receiver())
    session.gate.release(1)  # the step that had begun
    until(lambda: len(receiver.tokens) == 7)
    assert session.calls[-1][0] == "step"


def test_streams_that_wait_or_are_in_prefill_get_heartbeats(serve):
    runtime, session = serve(FakeSession(slots=1, max_sequence=4096), prefill_chunk=8, heartbeat_ms=20)
    session.step_s = 0.008
    first, second = Receiver(), Receiver()
    began_s = time.monotonic()
    runtime.submit(generation([7] * 400, 2), first)
    runtime.submit(generation(max_new_tokens=2), second)
    second.wait()
    most = (time.monotonic() - began_s) / 0.02
    for receiver in (first, second):
        beats = [chunk for chunk in receiver.chunks[:-1] if not len(chunk.token_ids)]
        assert 5 <= len(beats) <= most and all(chunk.text == "" for chunk in beats)


def letters(tokens):
    stream = LetterStream()
    return stream.push(tokens) + stream.finish()


@pytest.mark.parametrize("coalesce_tokens", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_across_chunks_ends_the_text_before_it(serve, coalesce_tokens, length):
    alone = letters(expected_tokens(generation(max_new_tokens=40)))
    stop = alone[17 : 17 + length]
    runtime, session = serve(coalesce_tokens=coalesce_tokens, coalesce_ms=1e6)
    receiver = Receiver()
    runtime.submit(generation(max_new_tokens=40, stop=("never seen", stop)), receiver)
    assert receiver.completion.finish_reason == "stop"
    assert receiver.text == receiver.completion.text == alone[: alone.index(stop)]
    assert len(session.steps()) < 25


def test_the_start_of_a_stop_string_is_sent_when_it_goes_on_differently(serve):
    alone = letters(expected_tokens(generation(max_new_tokens=20)))
    runtime, _ = serve(coalesce_tokens=1)
    receiver = Receiver()
    runtime.submit(generation(max_new_tokens=20, stop=(alone[5:8] + "no", alone[18:] + "no")), receiver)
    assert receiver.completion.finish_reason == "length"
    assert receiver.text == receiver.completion.text == alone
    assert not any(alone[5:7] == chunk.text for chunk in receiver.chunks)


def test_an_end_token_ends_without_text_and_counts(serve):
    alone = expected_tokens(generation(max_new_tokens=20))
    end = alone[9]
    runtime, _ = serve()
    receiver = Receiver()
    runtime.submit(generation(max_new_tokens=20, eos_token_ids=(EOS, end)), receiver)
    tokens = alone[: alone.index(end) + 1]
    assert receiver.completion.finish_reason == "stop"
    assert receiver.tokens == tokens and receiver.text == letters(tokens[:-1])
    assert receiver.completion.usage["completion_tokens"] == len(tokens)


def test_the_context_limits_the_answer_and_refuses_a_prompt_without_room(serve):
    runtime, _ = serve(FakeSession(max_sequence=32))
    receiver = Receiver()
    runtime.submit(generation(range(30), 100), receiver)
    assert receiver.completion.finish_reason == "length"
    assert receiver.completion.usage["completion_tokens"] == 2
    with pytest.raises(PromptTooLong, match=r"32 tokens.*32"):
        runtime.submit(generation(range(32)), Receiver())


def test_a_seed_gives_the_same_tokens_in_a_crowd(serve):
    runtime, _ = serve()
    seeded = generation(max_new_tokens=30, temperature=1.0, top_p=0.9, seed=21)
    alone = Receiver()
    runtime.submit(seeded, alone)
    alone.wait()
    crowd = [Receiver() for _ in range(8)]
    for index, receiver in enumerate(crowd):
        other = generation((index, 9), 40, temperature=1.3, seed=index)
        runtime.submit(seeded if index in (2, 6) else other, receiver)
    for receiver in crowd:
        receiver.wait()
    assert crowd[2].tokens == crowd[6].tokens == alone.tokens
    assert crowd[3].tokens != alone.tokens


def test_a_receiver_that_raises_ends_its_own_stream_only(serve, caplog):
    runtime, session = serve()
    good = [generation((i,), 30) for i in range(3)]
    receivers = [Receiver() for _ in good]
    calls = []

    def broken(chunk):
        calls.append(chunk)
        if len(calls) == 2:
            raise ConnectionError("the client is gone")

    session.gated = True
    for index in range(3):
        runtime.submit(good[index], receivers[index])
        if index == 0:
            runtime.submit(generation(max_new_tokens=40), broken)
    session.gate.release(10000)
    for each, receiver in zip(good, receivers, strict=True):
        assert receiver.completion and receiver.tokens == expected_tokens(each)
    assert len(calls) == 2
    until(lambda: not session.lengths.any())
    assert "the receiver of stream" in caplog.text


@pytest.mark.parametrize("phase", ["accept", "take", "cancelled"])
def test_a_stream_whose_text_fails_ends_alone(serve, monkeypatch, phase):
    """Its tokens are taken, or its text is cut, by code that fails for it; a neighbour decodes beside it."""
    runtime, session = serve()
    session.gated = True
    bad, good, gone = Receiver(), Receiver(), threading.Event()
    fine = generation((2,), 30)
    stream = runtime.submit(generation((1,), 30), bad, gone.is_set)
    runtime.submit(fine, good)

    def fail(*args):
        raise TypeError("/secret")

    monkeypatch.setattr(runtime._streams[stream], "accept" if phase == "accept" else "take", fail)
    if phase == "cancelled":
        gone.set()
    session.gate.release(10000)
    assert isinstance(bad.error, InternalError) and "/secret" not in bad.error.message
    assert good.completion and good.tokens == expected_tokens(fine)
    assert [chunk for chunk in bad.chunks if chunk.error] == bad.chunks[-1:]
    until(lambda: not session.lengths.any())


def test_a_slot_that_cannot_be_freed_fails_what_runs_and_nothing_later(serve):
    runtime, session = serve()
    session.gated = True
    receivers = [Receiver() for _ in range(3)]
    for index, receiver in enumerate(receivers):
        runtime.submit(generation((index,), 4 if index == 0 else 30, eos_token_ids=()), receiver)
    session.fail_on = lambda call: call[0] == "move"
    session.gate.release(10000)
    assert receivers[0].completion
    assert all(isinstance(receiver.error, InternalError) for receiver in receivers[1:])
    assert all(sum(bool(c.error or c.completion) for c in receiver.chunks) == 1 for receiver in receivers)
    session.fail_on = lambda call: False
    last, later = generation((7,), 5), Receiver()
    runtime.submit(last, later)
    assert later.completion and later.tokens == expected_tokens(last)
    until(lambda: not session.lengths.any())


def test_an_engine_error_fails_the_streams_that_it_touched(serve):
    runtime, session = serve(prefill_chunk=8)
    session.gated = True
    session.fail_on = lambda call: call == ("step", 2) and ("prefill", 2, 8) in session.calls
    first, second, waiting = Receiver(), Receiver(), Receiver()
    runtime.submit(generation((1,), 20), first)
    runtime.submit(generation((2,), 20), second)
    third = generation(range(24), 20)
    runtime.submit(third, waiting)
    session.gate.release(10000)
    assert isinstance(first.error, InternalError) and isinstance(second.error, InternalError)
    assert "the engine broke" not in first.error.message  # internals stay in the log
    session.fail_on = lambda call: False
    assert waiting.completion and waiting.tokens == expected_tokens(third)
    until(lambda: not session.lengths.any())


def test_an_engine_error_in_prefill_fails_that_prompt_only(serve):
    runtime, session = serve(prefill_chunk=8)
    session.fail_on = lambda call: call == ("prefill", 1, 5)
    session.gated = True
    running, broken, after = Receiver(), Receiver(), Receiver()
    good = [generation((1,), 50), generation(range(9), 4)]
    runtime.submit(good[0], running)
    runtime.submit(generation(range(13), 4), broken)
    runtime.submit(good[1], after)
    session.gate.release(10000)
    assert isinstance(broken.error, InternalError)
    assert running.completion and running.tokens == expected_tokens(good[0])
    assert after.completion and after.tokens == expected_tokens(good[1])


def test_close_fails_what_is_left_and_joins(serve):
    runtime, session = serve(FakeSession(slots=1))
    session.step_s = 0.002
    running, waiting = Receiver(), Receiver()
    runtime.submit(generation(max_new_tokens=400), running)
    runtime.submit(generation(), waiting)
    until(lambda: running.tokens)
    runtime.close()
    runtime.close()
    assert not runtime._thread.is_alive()
    assert isinstance(running.error, Unavailable) and isinstance(waiting.error, Unavailable)
    with pytest.raises(Unavailable):
        runtime.submit(generation(), Receiver())


def test_a_receiver_may_submit_and_close(serve):
    runtime, _ = serve()
    second = Receiver()

    def chain(chunk):
        if chunk.completion:
            runtime.submit(generation((8,), 3), second)

    runtime.submit(generation(), chain)
    assert second.completion.finish_reason == "length"
    closer = Receiver()

    def close(chunk):
        closer(chunk)
        runtime.close()

    runtime.submit(generation(), close)
    closer.wait()
    runtime._thread.join(WAIT_S)
    assert not runtime._thread.is_alive()


def test_an_idle_runtime_uses_no_cpu(serve):
    runtime, _ = serve()
    receiver = Receiver()
    runtime.submit(generation(), receiver)
    receiver.wait()
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15


@pytest.mark.slow
def test_memory_does_not_grow_over_500_requests(serve):
    runtime, _ = serve(queue_size=500)
    process = psutil.Process()

    def batch(count):
        receivers = [Receiver() for _ in range(count)]
        for index, receiver in enumerate(receivers):
            runtime.submit(generation((index % 90, 1), 3, repetition_penalty=1.1), receiver)
        for receiver in receivers:
            receiver.wait()

    batch(100)
    gc.collect()
    objects, resident = len(gc.get_objects()), [process.memory_info().rss]
    for _ in range(5):
        batch(100)
        resident.append(process.memory_info().rss)
    gc.collect()
    assert len(gc.get_objects()) - objects < 200
    # A leak grows in every hundred; the allocator takes a piece now and then.
    assert np.diff(resident).min() < 64 << 10
    assert not runtime._streams


@pytest.mark.parametrize(
    "change, words",
    [
        ({"position_ids": np.zeros((2, 3), np.int64)}, r"position_ids.*\(3, 3\)"),
        ({"image_index": np.array([-1, 0, -1])}, "image_index"),
        ({"image_index": np.array([-1, -2, -1])}, "image_index"),
        ({"input_ids": np.zeros(0, np.int64)}, "input_ids"),
        ({"image_embeddings": np.zeros(4, np.float32)}, "image_embeddings"),
    ],
)
def test_arrays_that_do_not_agree_are_refused(change, words):
    with pytest.raises(InvalidRequest, match=words):
        dataclasses.replace(generation(), **change)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"input_ids": np.array([1, VOCAB, 2])}, r"input_ids.*97.*96"),
        ({"input_ids": np.array([1, -1, 2])}, r"input_ids.*-1"),
        ({"image_embeddings": np.zeros((2, 5), np.float32)}, r"image_embeddings.*5.*4"),
    ],
)
def test_what_the_decoder_cannot_take_is_refused_before_it_waits(serve, change, words):
    runtime, session = serve()
    with pytest.raises(InvalidRequest, match=words):
        runtime.submit(dataclasses.replace(generation(), **change), Receiver())
    assert not runtime._streams and not session.calls


class Steps:
    """A guide that allows one token less than its last; what is not allowed any more ends it."""

    def __init__(self, fails_at=-1):
        self.next, self.fails_at = 90, fails_at

    def allows(self, token):
        return token == self.next

    def allowed(self):
        if self.next == self.fails_at:
            raise InvalidRequest("REQUEST.guide: no token follows")
        return np.array([self.next])

    def accept(self, token):
        self.next = token - 1


class StepGuides:
    """Remembers its guides as long as somebody else does."""

    def __init__(self):
        self.made = weakref.WeakSet()

    def guide(self, grammar):
        made = Steps(int(grammar))
        self.made.add(made)
        return made


def guided(prompt, tokens, grammar="-1", **sampling):
    plain = generation(prompt, tokens)
    return dataclasses.replace(plain, sampling=dataclasses.replace(plain.sampling, guide=grammar, **sampling))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_p": 0.1, "seed": 1}])
def test_a_guided_stream_follows_its_guide_and_its_neighbours_do_not(serve, sampling):
    runtime, _ = serve(guides=StepGuides())
    held, plain = guided((3, 4), 12, **sampling), generation((5, 6), 12)
    receivers = Receiver(), Receiver()
    for each, receiver in zip((held, plain), receivers, strict=True):
        runtime.submit(each, receiver)
    assert [receiver.completion.finish_reason for receiver in receivers] == ["length", "length"]
    assert receivers[0].tokens == list(range(90, 78, -1))
    assert receivers[1].tokens == expected_tokens(plain)


def test_a_guide_that_cannot_go_on_ends_its_stream_alone(serve):
    runtime, session = serve(guides=StepGuides())
    plain = generation((5, 6), 40)
    failed, other = Receiver(), Receiver()
    runtime.submit(plain, other)
    runtime.submit(guided((3, 4), 40, grammar="80"), failed)
    failed.wait()
    assert isinstance(failed.error, InvalidRequest) and "no token follows" in failed.error.message
    assert other.completion.finish_reason == "length" and other.tokens == expected_tokens(plain)
    until(lambda: not session.lengths.any())


def test_a_guided_stream_that_is_cancelled_leaves_nothing_behind(serve):
    guides = StepGuides()
    session = FakeSession()
    session.gated = True
    runtime, _ = serve(session, guides=guides)
    receiver = Receiver()
    stream = runtime.submit(guided((3, 4), 60), receiver)
    session.gate.release(5)
    until(lambda: len(session.steps()) >= 2)
    assert len(guides.made) == 1
    runtime.cancel(stream)
    session.gate.release(1000)
    assert receiver.completion.finish_reason == "cancelled"
    until(lambda: not session.lengths.any())
    gc.collect()
    assert not guides.made


def test_a_runtime_without_grammars_refuses_a_guide(serve):
    runtime, _ = serve()
    with pytest.raises(InvalidRequest, match=r"REQUEST\.guide: the engine of this server follows no grammar"):
        runtime.submit(guided((3, 4), 12), Receiver())
