"""What prompts that begin alike share: the tree of blocks against a slow model of it, and the runtime that uses it."""

import dataclasses
import gc
import random

import numpy as np
import pytest
from fake_session import FakeSession, Letters, Receiver, expected_tokens, generation, until

from cxr_triton.engines.runtime.prefix import BLOCK, Block, PrefixCache, PrefixTree, chain
from cxr_triton.engines.runtime.scheduler import DecoderRuntime

CHUNK = 2 * BLOCK
BYTES = BLOCK * 16  # of a block of `FakeSession`'s rows
OVERHEAD = 512


def block(run_end=BLOCK):
    return Block(np.zeros((1, 1, BLOCK, 2), np.int64), run_end)


class SlowTree:
    """Sequences of digests and when each was last used; of those that nothing goes on after, the oldest goes first."""

    def __init__(self, most):
        self.most, self.used, self.now = most, {}, 0

    def find(self, digests):
        self.now += 1
        for length in range(1, len(digests) + 1):
            if digests[:length] not in self.used:
                return length - 1
            self.used[digests[:length]] = self.now
        return len(digests)

    def put(self, digests):
        digests = digests[: self.most]
        self.find(digests)
        for length in range(1, len(digests) + 1):
            self.used[digests[:length]] = self.now
        while len(self.used) > self.most:
            ends = [each for each in self.used if not any(o[:-1] == each for o in self.used if o)]
            del self.used[min(ends, key=self.used.get)]


def digests_of(sequence):
    return ["/".join(sequence[: i + 1]).encode() for i in range(len(sequence))]


@pytest.mark.parametrize("seed", range(8))
def test_a_tree_holds_what_a_slow_model_of_it_holds(seed):
    rng, most = random.Random(seed), 3 + 5 * seed
    tree, slow = PrefixTree(most * (BYTES + OVERHEAD) + 100), SlowTree(most)
    for _ in range(600):
        sequence = tuple(rng.choice("abc") for _ in range(rng.randint(1, 6 if seed else 4)))
        digests = digests_of(sequence)
        if rng.random() < 0.5:
            assert len(tree.find(digests)) == slow.find(sequence)
        else:
            places = [place for place, digest in enumerate(digests) if tree.lacks(digest, BLOCK)]
            tree.put(digests, lambda place: block(), places)
            slow.put(sequence)
        assert len(tree) == len(slow.used)
        assert tree.nbytes == len(tree) * (BYTES + OVERHEAD)
    assert tree.evicted > 50


def test_a_tree_too_small_for_a_block_holds_none():
    tree = PrefixTree(BYTES)
    tree.put(digests_of("ab"), lambda place: block(), [0, 1])
    assert len(tree) == tree.nbytes == 0


def test_exact_rows_take_the_place_of_others():
    tree, digests = PrefixTree(1 << 20), digests_of("ab")
    tree.put(digests, lambda place: block(run_end=0), [0, 1])
    assert tree.lacks(digests[0], BLOCK) and not tree.lacks(digests[0], 0)
    tree.put(digests, lambda place: block(), [0])
    assert [each.run_end for each in tree.find(digests)] == [BLOCK, 0]
    assert tree.nbytes == 2 * (BYTES + OVERHEAD)


def pictures(values, at=5, count=20, tokens=range(64)):
    """A prompt with rows of embeddings of a picture."""
    given = generation(tokens)
    index = given.image_index.copy()
    index[at : at + count] = np.arange(count)
    return dataclasses.replace(given, image_index=index, image_embeddings=np.full((count, 4), values, np.float32))


def test_a_digest_is_of_ids_positions_and_embeddings_and_of_all_before():
    first = chain(pictures(1.0))
    assert len(first) == 64 // BLOCK and len(set(first)) == len(first)
    assert chain(pictures(1.0)) == first
    other = pictures(1.0)
    other.image_embeddings[15, 2] = np.nextafter(np.float32(1), np.float32(2))  # token 20, in the second block
    assert [a == b for a, b in zip(first, chain(other), strict=True)] == [True, False, False, False]
    moved = pictures(1.0).position_ids.copy()
    moved[1, 40] += 1
    other = dataclasses.replace(pictures(1.0), position_ids=moved)
    assert [a == b for a, b in zip(first, chain(other), strict=True)] == [True, True, False, False]
    ids = pictures(1.0).input_ids.copy()
    ids[0] = 90
    assert not set(first) & set(chain(dataclasses.replace(pictures(1.0), input_ids=ids)))
    # Rows that lie elsewhere among the request's embeddings are the same rows.
    other = pictures(1.0)
    swapped = dataclasses.replace(
        other,
        image_index=np.where(other.image_index >= 0, other.image_index + 7, -1),
        image_embeddings=np.concatenate([np.zeros((7, 4), np.float32), other.image_embeddings]),
    )
    assert chain(swapped) == first
    assert chain(pictures(1.0, at=6)) != first


@pytest.fixture
def serve():
    """A runtime over a session of paper, with a prefix cache of 1 MiB unless told otherwise."""
    runtimes = []

    def make(session=None, prefix=None, **options):
        session, prefix = session or FakeSession(max_sequence=1024), prefix or PrefixCache(1 << 20)
        options.setdefault("prefill_chunk", CHUNK)
        runtimes.append(DecoderRuntime(None, session=session, tokenizer=Letters(), prefix=prefix, **options))
        return runtimes[-1], session

    yield make
    for runtime in runtimes:
        runtime.close()


def read(runtime, given):
    receiver = Receiver()
    runtime.submit(given, receiver)
    assert receiver.completion
    assert receiver.tokens == expected_tokens(given)
    return receiver


def cached(receiver):
    return receiver.completion.usage["cached_tokens"]


def follow_up(given, receiver, question=(7, 8, 9)):
    """The next turn: all before, the answer, a question."""
    return generation([*given.input_ids, *receiver.tokens, *question], given.sampling.max_new_tokens)


def test_a_follow_up_computes_only_what_is_new(serve):
    runtime, session = serve()
    first = generation(range(50), 40)
    answer = read(runtime, first)
    assert cached(answer) == 0
    second = follow_up(first, answer)
    session.calls.clear()
    told = read(runtime, second)
    assert cached(told) == 80  # of 50 and 40 tokens, the last of which was never given to the engine
    assert sum(call[2] for call in session.calls if call[0] == "prefill") == 93 - 80
    answered = runtime.prefix.tree.find(chain(second))[50 // BLOCK :]
    assert [(block.run_end, block.has_answer) for block in answered] == [(0, True)] * 2  # what steps gave stays so
    third = follow_up(second, told)
    assert cached(read(runtime, third)) == (93 + 39) // BLOCK * BLOCK
    assert runtime.prefix.counts() == {"prompt_tokens": 50 + 93 + 136, "tokens": 80 + 128, "hits": 2, "evicted": 0}


def test_prompts_alone_are_taken_at_the_ends_of_whole_chunks(serve):
    """So that every run of the engine has the shape that it would have without reuse."""
    runtime, session = serve()
    read(runtime, generation([*range(80), 1], 4))
    session.calls.clear()
    assert cached(read(runtime, generation([*range(80), 2, 3], 4))) == 64
    assert [call[2] for call in session.calls if call[0] == "prefill"] == [18]
    same = generation(range(64), 4)
    assert cached(read(runtime, same)) == 32  # not all: the last token has to give logits


def runs(session):
    return [call[2] for call in session.calls if call[0] == "prefill"]


@pytest.mark.parametrize("chunk", [8, CHUNK, 40, 1000])
def test_another_question_about_a_picture_computes_the_question_only(serve, chunk):
    """From the last whole block of the picture, which every prompt about it computes as the end of a run."""
    first = pictures(1.0, at=5, count=90, tokens=[*range(95), *range(30)])
    other = pictures(1.0, at=5, count=90, tokens=[*range(95), *range(40, 55)])
    runtime, session = serve(prefill_chunk=chunk)
    read(runtime, first)
    session.calls.clear()
    assert cached(read(runtime, other)) == 80
    assert sum(runs(session)) == 95 + 15 - 80
    alone, fresh = serve(prefill_chunk=chunk)
    read(alone, other)
    ends = np.cumsum(runs(fresh))
    assert runs(fresh)[list(ends).index(80) + 1 :] == runs(session)


def test_runs_of_a_prompt_with_two_pictures_end_with_each(serve):
    given = pictures(1.0, at=5, count=30, tokens=[*range(90), *range(30)])
    index = given.image_index.copy()
    index[40:90] = np.arange(50) % 30
    runtime, session = serve()
    read(runtime, dataclasses.replace(given, image_index=index))
    assert runs(session) == [32, 32, 16, 32, 8]  # to 32, 64, 80, where the second one ends in the sixth block, ...


def test_rows_of_other_runs_are_not_reused(serve):
    """A picture may begin as a smaller one, as two black ones do: the runs differ, and so may the bits."""
    runtime, _ = serve(prefill_chunk=64)
    small = pictures(0.0, at=0, count=40, tokens=range(90))  # runs to 32, 90
    large = pictures(0.0, at=0, count=90, tokens=[*range(90), *range(10)])  # to 64, 80, 100
    for given, first, again in ((small, 0, 32), (large, 0, 80), (small, 0, 32)):
        assert cached(read(runtime, given)) == first
        assert cached(read(runtime, given)) == again


def test_a_part_of_a_chunk_that_is_computed_as_a_whole_later_counts_from_then_on(serve):
    runtime, _ = serve()
    read(runtime, generation(range(60), 4))  # 32 + 28
    assert cached(read(runtime, generation([*range(60), *range(30, 60)], 4))) == 32
    assert cached(read(runtime, generation([*range(60), *range(30, 58), 9], 4))) == 64


def test_only_what_changes_no_bit_is_reused_where_that_is_asked_for(serve):
    runtime, _ = serve(prefix=PrefixCache(1 << 20, exact_only=True))
    first = generation(range(50), 40)
    assert cached(read(runtime, follow_up(first, read(runtime, first)))) == 32
    assert all(b.run_end and not b.has_answer for b in runtime.prefix.tree.find(chain(generation(range(50)))))


def test_equal_prompts_in_flight_are_computed_once(serve):
    runtime, session = serve(queue_size=20)
    given = generation(range(70), 30)
    receivers = [Receiver() for _ in range(9)]
    session.gated = True
    for receiver in receivers:
        runtime.submit(given, receiver)
    session.gate.release(100000)
    for receiver in receivers:
        assert receiver.completion and receiver.tokens == expected_tokens(given)
    assert [cached(receiver) for receiver in receivers] == [0] + [64] * 8
    assert sum(call[2] for call in session.calls if call[0] == "prefill") == 70 + 8 * 6


def test_other_embeddings_or_positions_are_other_prompts(serve):
    runtime, _ = serve()
    for given, expected in [(pictures(1.0), 0), (pictures(2.0), 0), (pictures(1.0), 48)]:
        receiver = Receiver()
        runtime.submit(given, receiver)
        assert cached(receiver.wait()) == expected
    moved = dataclasses.replace(pictures(1.0), position_ids=pictures(1.0).position_ids + 1)
    receiver = Receiver()
    runtime.submit(moved, receiver)
    assert cached(receiver.wait()) == 0


def test_a_cancelled_stream_leaves_no_answer_behind(serve):
    runtime, session = serve()
    session.step_s = 0.002
    given, receiver = generation(range(40), 500), Receiver()
    runtime.submit(given, receiver, lambda: len(receiver.tokens) > 60)
    assert receiver.completion.finish_reason == "cancelled"
    session.step_s = 0
    until(lambda: not session.lengths.any())
    assert len(runtime.prefix.tree) == 40 // BLOCK  # its prompt was computed, and is right
    assert cached(read(runtime, follow_up(given, receiver))) == 32
    gc.collect()
    assert not runtime.prefix._lineages


@pytest.mark.parametrize("phase", ["prefill", "step"])
def test_a_stream_that_failed_leaves_no_answer_behind(serve, phase):
    runtime, session = serve()
    failing = ("prefill", 0, 8) if phase == "prefill" else ("step", 1)
    session.fail_on = lambda call: call == failing and len(session.steps()) in (0, 30)
    receiver = Receiver()
    given = generation(range(40), 60)
    runtime.submit(given, receiver)
    assert receiver.error
    session.fail_on = lambda call: False
    assert len(runtime.prefix.tree) == (0 if phase == "prefill" else 2)
    assert read(runtime, given)


@pytest.mark.parametrize("call", ["read", "write"])
def test_a_copy_that_fails_costs_the_cache_and_no_reading(serve, call, caplog):
    runtime, session = serve()
    given = generation([*range(40), 1], 4)
    read(runtime, given)
    session.fail_on = lambda made: made[0] == call
    assert cached(read(runtime, generation([*range(40), *range(40)], 20))) == (32 if call == "read" else 0)
    assert "prefix cache starts anew" in caplog.text
    runtime.prefix.tree.clear()
    session.fail_on = lambda made: False
    assert cached(read(runtime, given)) == 0 and cached(read(runtime, given)) == 32


def test_a_moved_slot_takes_its_restored_rows_along(serve):
    runtime, session = serve()
    shared, short = generation([*range(64), 1], 30), generation((5, 6), 2)
    read(runtime, shared)
    session.gated = True
    receivers = [Receiver() for _ in range(3)]
    for given, receiver in zip((short, shared, short), receivers, strict=True):
        runtime.submit(given, receiver)
    session.gate.release(100000)
    for given, receiver in zip((short, shared, short), receivers, strict=True):
        assert receiver.completion and receiver.tokens == expected_tokens(given)
    assert cached(receivers[1]) == 64


def test_memory_keeps_its_limit_over_conversations_that_share_and_end_in_every_way(serve):
    most = 40
    runtime, session = serve(prefix=PrefixCache(most * (BYTES + OVERHEAD)), queue_size=200)
    rng, known, asked = random.Random(3), [], []
    for turn in range(200):
        if known and rng.random() < 0.6:
            given = follow_up(*rng.choice(known), [rng.randrange(90) for _ in range(rng.randint(1, 30))])
        else:
            given = generation([*range(rng.choice((20, 40, 70))), turn % 90], rng.randint(1, 40))
        if len(given.input_ids) > 600:
            continue
        receiver = Receiver()
        is_cancelled = (lambda seen=receiver: len(seen.tokens) > 5) if rng.random() < 0.2 else None
        runtime.submit(given, receiver, is_cancelled)
        asked.append((given, receiver))
        if turn % 4 == 3:
            for each, got in asked:
                if got.wait().completion.finish_reason != "cancelled":
                    assert got.tokens == expected_tokens(each)
                    known.append((each, got))
            asked.clear()
        assert runtime.prefix.tree.nbytes <= most * (BYTES + OVERHEAD)
    assert min(runtime.prefix.counts()[name] for name in ("hits", "evicted")) > 50
    runtime.close()
    del asked, known
    gc.collect()
    assert not runtime.prefix._lineages and not session.lengths.any()
