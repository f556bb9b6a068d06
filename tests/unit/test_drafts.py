"""Guesses from earlier texts: where they are found, what they may cost, and that no token is another one for them."""

import gc
import random
import sys

import numpy as np
import pytest
from fake_session import EOS, FakeSession, Letters, Receiver, expected_tokens, generation, until

from cxr_triton.engines.runtime.drafts import BYTES_PER_TOKEN, LONGEST, WIDTHS, Costs, Drafts, Rates, Texts
from cxr_triton.engines.runtime.prefix import PrefixCache
from cxr_triton.engines.runtime.sampler import Sampler
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Stream


class Free(Costs):
    """A step of any width takes the same, so all that is guessed is checked."""

    def best(self, streams, tokens):
        return WIDTHS[len(tokens) - 1]

    def rest(self, streams, seconds):
        return 0


def texts_of(seed, alphabet, count=30):
    rng = random.Random(seed)
    return [[rng.randrange(alphabet) for _ in range(rng.randint(1, 60))] for _ in range(count)]


def after_longest(texts, tail):
    """What may stand after the longest end of `tail` that is in a text, looking at everything."""
    for length in range(min(LONGEST, len(tail)), 0, -1):
        end = tail[-length:]
        found = [t[i + length] for t in texts for i in range(len(t) - length) if t[i : i + length] == end]
        if found:
            return length, set(found)
    return 0, set()


@pytest.mark.parametrize("alphabet", [12, 40, 5000])
def test_a_context_is_found_where_a_search_of_everything_finds_it(alphabet):
    held, ring = texts_of(1, alphabet), Texts(1 << 16)
    for text in held:
        ring.add(text)
    rng, longest = random.Random(2), 0
    for _ in range(300):
        text = rng.choice(held)
        start = rng.randrange(len(text))
        tail = text[start : start + rng.randint(1, 20)]
        if rng.random() < 0.3:
            tail = [rng.randrange(alphabet), *tail]
        place, length = ring.find(tail)
        expected, following = after_longest(held, tail)
        # Of a context that stands in many places only the newest are looked at.
        assert length == expected if alphabet > 12 else length <= expected
        assert bool(place) == bool(expected)
        if place and length == expected:
            assert ring.at(place) in following
            assert ring.following(place, 5)[0] == ring.at(place)
        longest = max(longest, length)
    assert longest == LONGEST
    assert ring.find([alphabet + 1]) == ring.find([]) == (0, 0)


def test_a_ring_is_bounded_and_the_oldest_text_goes_first():
    ring, texts = Texts(200 * BYTES_PER_TOKEN), texts_of(3, 1 << 30, 200)
    nbytes = ring.nbytes
    for text in texts:
        ring.add(text)
        if len(text) > LONGEST:
            assert ring.find(text[:-1])[1] == LONGEST
    assert ring.nbytes == nbytes == 200 * BYTES_PER_TOKEN
    assert all(ring.find(text[:-1])[1] == min(LONGEST, len(text) - 1) for text in texts[-3:])
    assert not any(ring.find(text[:-1])[1] for text in texts[:150])
    ring.add(list(range(5000)))
    assert ring.following(ring.find([4900, 4901])[0], 500) == list(range(4902, 5000))


def test_what_stands_in_a_ring_that_was_written_over_is_never_said_of_another_text():
    ring = Texts(300 * BYTES_PER_TOKEN)
    for text in texts_of(5, 6, 400):
        ring.add(text)
        place, length = ring.find(text)
        if place:
            before = [ring.at(place - 1 - i) for i in range(length)]
            assert before == text[: -length - 1 : -1]


def test_a_text_that_is_held_is_not_held_twice():
    ring = Texts(1 << 16)
    first, second = [5, 6, 7, 8, 9], [1, 2, 7, 8, 9]
    ring.add(first)
    assert ring.holds(first) and not ring.holds(second)
    ring.add(second)
    assert ring.holds(first) and ring.holds(second) and not ring.holds([6, *first]) and not ring.holds([9, 9])


def cost_of(table, streams=1, times=20):
    costs = Costs()
    for _ in range(times):
        for width, seconds in table.items():
            costs.take(streams, width, seconds)
    return costs


def expected_of(*right):
    """Tokens of one stream for each width, where guesses are right with these probabilities."""
    sums = [1 + sum(np.cumprod(right)[: width - 1]) for width in WIDTHS if width <= len(right) + 1]
    return [float(each) for each in sums]


ORT = {1: 1.0, 2: 1.14, 3: 1.58, 4: 1.64, 6: 1.99, 8: 2.85}


@pytest.mark.parametrize(
    ("table", "right", "width"),
    [
        (ORT, [0.1] * 7, 1),
        (ORT, [0.5], 2),
        (ORT, [0.6, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3], 2),
        (ORT, [0.99] * 7, 6),
        ({1: 1.0, 2: 0.8, 3: 0.9, 4: 0.95}, [0.1] * 3, 2),  # a row more that costs less than nothing
        ({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 6: 6.0, 8: 8.0}, [0.9] * 7, 1),
    ],
)
def test_the_width_is_the_one_with_most_tokens_a_second(table, right, width):
    assert cost_of(table).best(1, expected_of(*right)) == width


def test_a_width_that_was_not_run_is_tried_after_the_narrower_ones_and_its_first_run_does_not_count():
    costs, expected = cost_of({1: 1.0}), expected_of(*[0.9] * 7)
    tried = []
    for _ in range(12):
        tried.append(costs.best(1, expected))
        costs.take(1, tried[-1], 50.0 if tried[-1] not in tried[:-1] else 1.1)
    assert tried == [2, 2, 3, 3, 4, 4, 6, 6, 8, 8, 8, 8]
    assert costs.best(2, expected) == 1, "what two streams take is not known yet"


def test_no_width_is_tried_that_would_cost_more_than_it_could_gain():
    """Eight streams of a small decoder on OpenVINO: a wide step is bound by arithmetic."""
    table = {1: 1.0, 2: 1.6, 3: 2.5, 4: 3.4, 6: 4.3, 8: 6.9}
    costs, expected, spent = cost_of({1: 1.0}, streams=8), [8 * each for each in expected_of(*[0.65] * 7)], 0.0
    tokens = 0.0
    for _ in range(2000):
        width = costs.best(8, expected)
        costs.take(8, width, table[width])
        spent, tokens = spent + table[width], tokens + expected[WIDTHS.index(width)] / 8
    assert tokens / spent > 0.99


def test_slow_steps_do_not_change_what_is_believed_and_a_change_that_lasts_does():
    costs = cost_of(ORT)
    for _ in range(4):
        costs.take(1, 2, 100.0)
    assert costs.best(1, expected_of(0.5)) == 2
    costs.take(1, 2, 100.0)
    assert costs.best(1, expected_of(0.5)) == 1


def test_a_width_whose_first_run_was_slow_is_soon_tried_again():
    costs = cost_of({1: 1.0})
    for seconds in (5.0, 4.0):
        costs.take(1, 2, seconds)
    chosen = chosen_over(costs, 0.9, {1: 1.0, 2: 1.2}, 600)
    assert chosen[:100].count(2) == 0 and chosen[400:].count(2) > 150


def test_a_machine_that_becomes_slower_makes_no_width_dearer():
    costs = cost_of(ORT)
    for _ in range(50):
        costs.take(1, 1, 40.0)
    assert costs.best(1, expected_of(0.6)) == 2 and costs.share(1, 2) == 1.14 and costs.step_s(1) == 40
    for _ in range(10):
        costs.take(1, 2, 40 * 1.14)
    assert costs.share(1, 2) == pytest.approx(1.14)


def chosen_over(costs, right, table, steps):
    chosen = []
    for _ in range(steps):
        chosen.append(costs.best(1, expected_of(right)))
        costs.take(1, chosen[-1], table[chosen[-1]])
    return chosen


def test_plain_steps_and_dear_widths_are_measured_again():
    dear = {1: 1.0, 2: 3.0}
    costs = cost_of(dear)
    assert 4 <= chosen_over(costs, 0.9, dear, 5000).count(2) <= 8
    cheap = chosen_over(costs, 0.9, {1: 1.0, 2: 1.1}, 2000)
    assert cheap[:1000].count(2) and cheap[1000:].count(1) < 80, "a width that has become cheap is found out"
    assert cheap[1000:].count(1) >= 50, "and held against a plain step all the time"


def test_a_busy_minute_is_not_held_against_plain_steps_for_long():
    table, costs = {1: 1.0, 2: 1.6, 3: 2.5}, Costs()
    for busy in (1, 1, 1, 1, 30, 30, 30, 30, 30):
        costs.take(8, 1, busy * table[1])
    chosen = []
    for _ in range(400):
        chosen.append(costs.best(8, [8, 12, 14]))
        costs.take(8, chosen[-1], table[chosen[-1]])
    assert chosen.count(1) > 330


def test_rates_follow_what_came():
    rates = Rates()
    for _ in range(200):
        rates.learn(3, True)
        rates.learn(40, False)
    three, four = rates.all_right(3, 2)
    assert three > 0.95 and 0.4 < four < 0.5
    assert max(rates.all_right(LONGEST, 3)) < 0.05


@pytest.fixture
def serve():
    opened = []

    def build(session=None, drafts=None, **options):
        session = session or FakeSession(max_sequence=1024)
        drafts = drafts or Drafts(1 << 20, costs=Free())
        runtime = DecoderRuntime(None, session=session, tokenizer=Letters(), drafts=drafts, **options)
        opened.append((runtime, session))
        return runtime, session, drafts

    yield build
    for runtime, session in opened:
        session.gated = False
        session.gate.release(1000)
        runtime.close()


def read(runtime, given):
    receiver = Receiver()
    runtime.submit(given, receiver)
    assert receiver.completion
    return receiver


def crowd(count=24):
    """Requests of which many are asked twice, so that their answers are guessed the second time."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 90, rng.integers(1, 60)) for _ in range(count // 3)]
    return [generation(prompts[i % len(prompts)], 5 + 9 * i % 50) for i in range(count)]


@pytest.mark.parametrize("checks", [1, 4])
def test_every_stream_in_a_crowd_gets_what_it_gets_without_drafts(serve, checks):
    session = FakeSession(max_sequence=1024)
    session.checks = checks
    runtime, _, drafts = serve(session, prefill_chunk=32)
    asked = [(each, Receiver()) for each in crowd()]
    for given, receiver in asked:
        runtime.submit(given, receiver)
    for given, receiver in asked:
        assert receiver.completion.finish_reason == "length"
        assert receiver.tokens == expected_tokens(given)
        assert receiver.completion.usage["completion_tokens"] == len(receiver.tokens)
    counts = drafts.counts()
    assert counts["drafted"] > counts["accepted"] > (50 if checks > 1 else 0)
    assert max(call[1] for call in session.calls if call[0] == "check") <= checks
    assert not session.lengths.any()
    del asked, receiver
    until(lambda: not gc.collect() and not drafts._followers)


def test_an_answer_that_is_known_takes_a_fraction_of_the_steps(serve):
    runtime, _, drafts = serve()
    given = generation(range(20), 100)
    read(runtime, given)
    plain = runtime.steps
    assert read(runtime, given).tokens == expected_tokens(given)
    assert runtime.steps - plain < plain / 5
    assert drafts.counts()["accepted"] > 70


def test_a_stream_that_repeats_itself_is_guessed_from_its_own_text(serve):
    class Loop(FakeSession):
        def _logits(self, slot):
            return np.eye(97, dtype=np.float32)[(self.lengths[slot] % 6) + 10]

    runtime, _, _ = serve(Loop(max_sequence=1024))
    receiver = read(runtime, generation((1, 2, 3), 120))
    assert receiver.tokens == [10 + (3 + i) % 6 for i in range(120)]
    assert runtime.steps < 40


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.8, "seed": 4}, {"repetition_penalty": 1.3}],
    ids=str,
)
def test_sampled_tokens_are_those_of_the_same_seed_without_drafts(serve, sampling):
    runtime, _, drafts = serve()
    given = generation(range(30), 60, **sampling)
    sampler = Sampler(given.sampling, given.input_ids)
    expected = expected_tokens(given, lambda logits: sampler.sample(logits.copy()))
    for _ in range(3):
        assert read(runtime, given).tokens == expected
    assert drafts.counts()["accepted"] > 60
    other = generation(range(30), 60, **(sampling | {"seed": 9}))
    sampler = Sampler(other.sampling, other.input_ids)
    assert read(runtime, other).tokens == expected_tokens(other, lambda logits: sampler.sample(logits.copy()))


def test_an_end_among_the_guesses_ends_the_stream_there(serve):
    """By its end token, by a stop string, and by its length; what the slot holds is what was said."""
    runtime, session, drafts = serve()
    given = generation(range(20), 60)
    tokens = read(runtime, given).tokens
    end = next(i for i in range(21, 60) if tokens[i] not in tokens[:i] and tokens[i] < 90)
    stopped = read(runtime, generation(range(20), 60, eos_token_ids=(EOS, tokens[end])))
    assert (stopped.tokens, stopped.completion.finish_reason) == (tokens[: end + 1], "stop")
    stopped = read(runtime, generation(range(20), 60, stop=(chr(33 + tokens[end]),)))
    assert (stopped.tokens, stopped.completion.finish_reason) == (tokens[: end + 1], "stop")
    assert stopped.completion.text == Letters().stream().push(tokens[:end])
    for length in range(25, 34):
        assert read(runtime, generation(range(20), length)).tokens == tokens[:length]
    assert drafts.counts()["accepted"] > 100 and not session.lengths.any()


def test_a_follow_up_reuses_what_was_said_and_nothing_that_was_guessed(serve):
    prefix = PrefixCache(1 << 20)
    runtime, _, drafts = serve(prefix=prefix, prefill_chunk=32)
    first = generation(range(50), 40)
    answers = [read(runtime, first) for _ in range(2)]
    assert [answer.tokens for answer in answers] == [expected_tokens(first)] * 2
    second = generation([*first.input_ids, *answers[1].tokens, 7, 8, 9], 30)
    follow_up = read(runtime, second)
    assert follow_up.tokens == expected_tokens(second)
    assert follow_up.completion.usage["cached_tokens"] == 80
    assert drafts.counts()["accepted"] > 25


def test_a_context_is_filled_to_its_end_and_never_beyond(serve):
    session = FakeSession(slots=2, max_sequence=64)
    runtime, _, drafts = serve(session)
    full, short = generation(range(20), 100), generation(range(30, 34), 40)
    for given in (full, short):
        read(runtime, given)
    receivers = [Receiver(), Receiver()]
    session.gated = True
    for given, receiver in zip((full, short), receivers, strict=True):
        runtime.submit(given, receiver)
    session.gate.release(10000)
    assert receivers[0].completion.usage["completion_tokens"] == 44
    assert receivers[0].tokens == expected_tokens(generation(range(20), 44))
    assert receivers[1].completion and receivers[1].tokens == expected_tokens(short)
    assert drafts.counts()["accepted"] > 40


def test_a_cancelled_stream_leaves_nothing_behind(serve):
    runtime, session, drafts = serve()
    session.step_s = 0.002
    receiver = Receiver()
    runtime.submit(generation(range(40), 500), receiver, lambda: len(receiver.tokens) > 30)
    assert receiver.completion.finish_reason == "cancelled"
    session.step_s = 0
    assert all(drafts.texts.find([token]) == (0, 0) for token in receiver.tokens)
    until(lambda: not gc.collect() and not drafts._followers)
    assert not session.lengths.any()


def test_a_check_that_fails_ends_its_streams_and_leaves_nothing_behind(serve):
    runtime, session, _ = serve()
    given = generation(range(20), 60)
    read(runtime, given)
    session.fail_on = lambda call: call[0] == "check"
    receiver = Receiver()
    runtime.submit(given, receiver)
    assert "a step" in str(receiver.error)
    session.fail_on = lambda call: False
    assert read(runtime, given).tokens == expected_tokens(given)
    assert not session.lengths.any()


def test_sampling_that_fails_among_guesses_ends_its_stream_and_no_other(serve, monkeypatch):
    runtime, session, _ = serve()
    asked = [generation(range(start, start + 20), 60) for start in (0, 20, 40)]
    for given in asked:
        read(runtime, given)
    sample, failing, sampled = Sampler.sample, asked[0].sampling, []

    def broken(self, logits):
        if self.sampling is failing:
            sampled.append(logits)
            if len(sampled) == 30:
                raise RuntimeError("no number")
        return sample(self, logits)

    monkeypatch.setattr(Sampler, "sample", broken)
    receivers = [Receiver() for _ in asked]
    session.gated = True
    for given, receiver in zip(asked, receivers, strict=True):
        runtime.submit(given, receiver)
    session.gate.release(10000)
    assert receivers[0].error and len(sampled) == 30
    for given, receiver in zip(asked[1:], receivers[1:], strict=True):
        assert receiver.completion and receiver.tokens == expected_tokens(given)
    assert not session.lengths.any()


def test_guessing_that_fails_costs_the_drafts_and_no_reading(serve, monkeypatch, caplog):
    runtime, _, drafts = serve()
    given = generation(range(20), 30)
    read(runtime, given)

    def broken(*_):
        raise RuntimeError("no text")

    with monkeypatch.context() as patch:
        patch.setattr(Texts, "find", broken)
        assert read(runtime, given).tokens == expected_tokens(given)
    assert "drafts start anew" in caplog.text
    drafts.forget()
    assert drafts.texts.find(expected_tokens(given)[:5]) == (0, 0)
    assert read(runtime, given).tokens == expected_tokens(given)


def test_memory_keeps_its_limit_over_many_answers(serve):
    limit = 1200 * BYTES_PER_TOKEN
    runtime, _, drafts = serve(drafts=Drafts(limit, costs=Free()), queue_size=500)
    asked = [(generation((i % 90, i // 90 % 90, i % 7), 40), Receiver()) for i in range(60)]
    for given, receiver in asked:
        runtime.submit(given, receiver)
    for given, receiver in asked:
        assert receiver.completion and receiver.tokens == expected_tokens(given)
        assert drafts.texts.nbytes == limit
    tails = [receiver.tokens[:12] for _, receiver in asked]
    del asked, given, receiver
    until(lambda: not gc.collect() and not drafts._followers)
    assert drafts.texts.find(tails[-1])[1] == 12 and drafts.texts.find(tails[0])[1] != 12


_OPENED: list | None = None


def _hear(event, args):
    if _OPENED is not None and event == "open":
        _OPENED.append(args)


def test_nothing_that_was_said_is_written_to_a_disk(serve):
    global _OPENED
    runtime, _, drafts = serve()
    sys.addaudithook(_hear)
    _OPENED = opened = []
    try:
        for given in crowd(12):
            read(runtime, given)
        drafts.forget()
    finally:
        _OPENED = None
    assert drafts.counts()["accepted"] and not opened


def test_a_session_that_checks_nothing_gets_no_drafts(serve):
    session = FakeSession()
    session.checks = 0
    runtime, _, _ = serve(session)
    assert runtime.drafts is None
    given = generation(range(20), 30)
    assert [read(runtime, given).tokens for _ in range(2)] == [expected_tokens(given)] * 2


def test_no_more_is_guessed_or_kept_than_a_stream_may_still_write():
    drafts = Drafts(1 << 16, costs=Free())
    stream = Stream(generation(range(5), 50), None, None, Letters().stream(), 50)
    left = []
    for count in range(12, 51):
        stream.answer, stream.generated = [i % 5 for i in range(count)], count
        guesses = drafts.propose([stream], 100)
        left.append(0 if guesses is None else guesses.shape[1])
    assert left[-4:] == [2, 1, 0, 0] and set(left) == {5, 3, 2, 1, 0}
    assert drafts._followers[stream].own.nbytes <= 60 * BYTES_PER_TOKEN
