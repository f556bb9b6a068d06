"""Scores of an answer: which lists are compared, their sums against brute force, and the runtime around them."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from fake_session import FakeSession, Receiver, generation, until

from cxr_triton.alternatives import MOST_ITEMS, SCORE_LIMIT, Scoring, alternatives
from cxr_triton.chat import TokenStream
from cxr_triton.engines.runtime.prefix import PrefixCache
from cxr_triton.engines.runtime.remote import RemoteRuntime
from cxr_triton.engines.runtime.sampler import log_softmax
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.scores import MARGIN_NATS
from cxr_triton.engines.runtime.stream import Stream
from cxr_triton.engines.session import DecoderSession
from cxr_triton.errors import InternalError, InvalidRequest

LABELS = ("Edema", "Fracture", "No Finding", "Pneumonia")
OPTIONS = ("Worse", "Stable, more or less", "Better")
LISTS = Scoring(grammar="think_answer", answer="labels", choices=LABELS)
VOCAB, EOS = 128, 1


def compared(text, scoring):
    """By choice: the lists with it and those without it, each as the whole answer that has it."""
    found = alternatives(text, scoring)
    texts = whole(text, found)
    return {name: tuple({texts[i] for i in side} for side in sides) for name, sides in found.choices.items()}


def whole(text, found):
    return [text[: found.start] + each for each in found.texts]


def answer(*items):
    return f"<think> Large. </think>\n<answer> {', '.join(items)} </answer>"


def test_a_label_is_added_at_every_place_and_taken_away_from_its_own():
    pairs = compared(answer("edema", "Pneumonia"), LISTS)
    written = {answer("edema", "Pneumonia")}
    assert pairs["Edema"] == (written, {answer("Pneumonia")})
    assert pairs["Pneumonia"] == (written, {answer("edema")})
    added = [("Fracture", "edema", "Pneumonia"), ("edema", "Fracture", "Pneumonia"), ("edema", "Pneumonia", "Fracture")]
    assert pairs["Fracture"] == ({answer(*items) for items in added}, written)


def test_another_label_may_stand_in_the_place_of_the_only_one():
    pairs = compared(answer("No Finding"), LISTS)
    assert pairs["No Finding"][1] == {answer(label) for label in LABELS if label != "No Finding"}
    assert pairs["Edema"][0] == {answer("Edema", "No Finding"), answer("No Finding", "Edema"), answer("Edema")}


@pytest.mark.parametrize(
    ("grammar", "written", "other"),
    [
        ("boxed", "It grew. \\boxed{A}", "It grew. \\boxed{C}"),
        ("boxed", "It grew. \\boxed{{(A)}}", "It grew. \\boxed{{(C)}}"),
        ("boxed", "It grew. $\\boxed{\\text{(A) Worse}}$.", "It grew. $\\boxed{\\text{(C) Better}}"),
        ("boxed", "It grew. \\boxed{A. Worse}", "It grew. \\boxed{C. Better}"),
        ("plain", "A.", "C."),
        ("think_answer", "<think>It grew.</think><answer>(A)</answer>", "<think>It grew.</think><answer>(C)</answer>"),
    ],
)
def test_options_are_exchanged_in_the_form_that_the_answer_has(grammar, written, other):
    pairs = compared(written, Scoring(grammar=grammar, answer="option", choices=OPTIONS))
    assert set(pairs) == {"A", "B", "C"} and other in pairs["C"][0] and other in pairs["A"][1]


def test_several_options_and_yes_or_no():
    several = compared(
        "\\boxed{(A) Worse, (B) Stable, more or less}", Scoring(grammar="boxed", answer="option", choices=OPTIONS)
    )
    assert several["A"][1] == {"\\boxed{(B) Stable, more or less}"}
    assert several["C"][0] >= {"\\boxed{(A) Worse, (B) Stable, more or less, (C) Better}"}
    yes = compared("\\boxed{yes}", Scoring(grammar="boxed", answer="option"))
    assert yes["Yes"] == ({"\\boxed{yes}"}, {"\\boxed{no}"}) and "\\boxed{no}" in yes["No"][0]


@pytest.mark.parametrize(
    ("text", "scoring"),
    [
        ("<think> Large. </think> <answer> Edema", LISTS),
        ("<think> Large. </think> <answer> nothing that is known </answer>", LISTS),
        ("<think> Large. </think> Edema", LISTS),
        ("\\boxed{D}", Scoring(grammar="boxed", answer="option", choices=OPTIONS)),
        ("\\boxed{(A) Quite different}", Scoring(grammar="boxed", answer="option", choices=OPTIONS)),
        ("\\boxed{perhaps}", Scoring(grammar="boxed", answer="option")),
    ],
)
def test_what_cannot_be_taken_apart_has_no_scores(text, scoring):
    assert alternatives(text, scoring) is None


TEXTS = [answer("Edema"), answer("Edema", "Pneumonia"), answer("Fracture"), answer("Pneumonia", "Edema", "Fracture")]


class Writer(FakeSession):
    """Writes the text that its prompt's first token names, a character a token; all else follows from the whole row."""

    def __init__(self, **options):
        super().__init__(**options)
        self.vocab = VOCAB

    def _logits(self, slot):
        return logits_of(self.cache[slot, : self.lengths[slot]])


def logits_of(row):
    weights = (np.arange(1, len(row) + 1) * 2654435761) % 1000003
    if row[0, 0] >= len(TEXTS):
        return np.where(np.arange(VOCAB) == 50, np.float32(5), np.float32(-5))  # the same for ever
    logits = np.random.default_rng(int((row[:, 0] * weights).sum())).standard_normal(VOCAB).astype(np.float32)
    said, written = "".join(map(chr, row[3:, 0])), TEXTS[row[0, 0]]
    found = alternatives(written, LISTS)
    logits[[ord(text[len(said)]) for text in whole(written, found) if text.startswith(said) and text != said]] += 7
    if written.startswith(said):
        logits[ord(written[len(said)]) if said != written else EOS] += 5
    return logits


class Characters:
    """A token for each character."""

    is_whole = True

    def stream(self):
        return self

    def push(self, ids):
        return "".join(map(chr, ids))

    def finish(self):
        return ""

    def text_ids(self, text):
        return list(map(ord, text))


def scored(number, **sampling):
    made = generation((number, 2, 3), 200, eos_token_ids=(EOS,), **sampling)
    return type(made)(**{**vars(made), "scoring": LISTS})


def by_brute_force(number):
    """Scores from the probability of every list, each computed by itself from the first token on."""
    found, prompt = alternatives(TEXTS[number], LISTS), [number, 2, 3]

    def probability(text):
        row, total = [*prompt, *map(ord, TEXTS[number][: found.start])], 0.0
        for token in map(ord, text):
            total += log_softmax(logits_of(np.stack([row, range(len(row))], 1)))[token]
            row.append(token)
        return total

    logs = [probability(text) for text in found.texts]
    sums = {
        name: [np.logaddexp.reduce([logs[i] for i in side]) for side in sides] for name, sides in found.choices.items()
    }
    return {name: given - lacking for name, (given, lacking) in sums.items()}


@pytest.fixture
def serve():
    opened = []

    def build(**options):
        session = Writer(slots=4)
        runtime = DecoderRuntime(None, session=session, tokenizer=Characters(), **options)
        opened.append((runtime, session))
        return runtime, session

    yield build
    for runtime, session in opened:
        session.gated = False
        session.gate.release(10_000)
        runtime.close()


def read(runtime, *generations):
    receivers = [Receiver() for _ in generations]
    for each, receiver in zip(generations, receivers, strict=True):
        runtime.submit(each, receiver)
    return [receiver.wait() for receiver in receivers]


def test_scores_are_those_of_all_lists_one_by_one(serve):
    runtime, session = serve()
    receivers, inside = [read(runtime, scored(number))[0] for number in range(len(TEXTS))], []
    for number, (receiver, text) in enumerate(zip(receivers, TEXTS, strict=True)):
        completion = receiver.completion
        assert completion.text == receiver.text == text
        expected = by_brute_force(number)
        assert set(completion.scores) == set(LABELS)
        for label, score in completion.scores.items():
            ended = min(max(expected[label], -SCORE_LIMIT), SCORE_LIMIT)
            # Most that the lists which are not computed are of a sum.
            left_out = len(LABELS) * (math.exp(-MARGIN_NATS) + math.exp(abs(ended) - SCORE_LIMIT))
            assert score == pytest.approx(ended, abs=1e-4 + left_out)
            inside.append(abs(score) < SCORE_LIMIT - 3)
        assert completion.timings_ms["scores"] > 0
        assert completion.timings_ms["decode"] + completion.timings_ms["scores"] < completion.timings_ms["total"]
    runs = [call for call in session.calls if call[0] == "score"]
    assert sum(inside) > 8, "many scores are told to their last digit"
    lists = sum(len(alternatives(text, LISTS).texts) for text in TEXTS)
    assert sum(call[3] for call in runs) == sum(receiver.completion.usage["scored_tokens"] for receiver in receivers)
    assert len(runs) <= lists and not session.lengths.any()


def test_an_engine_that_gives_the_logits_of_one_token_in_a_run_gives_the_same_scores(serve):
    """As a compiled graph does, by the prefill of each token."""

    class OneByOne(Writer):
        score = DecoderSession.score

    (fast,) = read(serve()[0], scored(1))
    session = OneByOne(slots=4)
    with DecoderRuntime(None, session=session, tokenizer=Characters()) as runtime:
        (slow,) = read(runtime, scored(1))
    assert slow.completion.scores == fast.completion.scores
    assert not [call for call in session.calls if call[0] == "score"] and not session.lengths.any()


def test_scores_in_a_crowd_are_those_alone_and_others_do_not_notice(serve):
    """Streams that write, and those whose answers are scored, share steps; rows move as streams leave."""
    runtime, session = serve()
    alone = [read(runtime, scored(number, logprobs=True))[0].completion for number in range(4)]
    plain = [read(runtime, generation((number, 2, 3), 200, eos_token_ids=(EOS,)))[0].tokens for number in range(4)]
    session.calls.clear()
    mixed = [
        scored(i % 4, logprobs=True) if i % 3 else generation((i % 4, 2, 3), 200, eos_token_ids=(EOS,))
        for i in range(40)
    ]
    for i, receiver in enumerate(read(runtime, *mixed)):
        completion = receiver.completion
        assert receiver.tokens == plain[i % 4]
        if i % 3:
            assert completion.scores == alone[i % 4].scores
            assert completion.token_logprobs == alone[i % 4].token_logprobs
        else:
            assert completion.scores == {} and completion.token_logprobs == () and "scores" not in completion.timings_ms
    kinds = [call[0] for call in session.calls]
    assert any({a, b} == {"score", "step"} for a, b in itertools.pairwise(kinds)), "they took turns"
    assert not session.lengths.any()


def test_the_text_is_there_before_the_scores(serve):
    runtime, session = serve()
    session.gated = True
    receiver = Receiver()
    runtime.submit(scored(0), receiver)
    session.gate.release(1 + len(TEXTS[0]))
    until(lambda: receiver.text == TEXTS[0])
    assert not receiver.done.is_set()
    session.gate.release(1000)
    assert receiver.completion.scores


def test_a_token_that_the_model_excludes_is_no_number_s_end(serve):
    """Minus infinity beside other lists; a row that is no number is an error, and never a score."""
    runtime, session = serve()
    plain = session.score

    def changed(value):
        def score(*run):
            logits = plain(*run)
            logits[:, ord("F") if value == -np.inf else 0] = value
            return logits

        return score

    session.score = changed(-np.inf)
    (receiver,) = read(runtime, scored(0))
    assert receiver.completion.scores["Fracture"] == -SCORE_LIMIT
    assert all(math.isfinite(score) for score in receiver.completion.scores.values())
    session.score = changed(np.nan)
    (receiver,) = read(runtime, scored(0))
    assert isinstance(receiver.error, InternalError)


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_stream_that_ends_while_it_is_scored_leaves_nothing_behind(serve, how):
    runtime, session = serve(prefix=PrefixCache(1 << 20))
    if how == "failed":
        session.fail_on = lambda call: call[0] == "score"
    session.gated = True
    receiver, beside = Receiver(), Receiver()
    stream = runtime.submit(scored(0), receiver)
    session.gate.release(1 + len(TEXTS[0]))
    until(lambda: receiver.text == TEXTS[0])
    if how == "cancelled":
        runtime.cancel(stream)
    session.gated = False
    session.gate.release(1000)
    if how == "failed":
        assert isinstance(receiver.error, InternalError) and "scoring" in receiver.error.message
    else:
        assert receiver.completion.finish_reason == "cancelled" and receiver.completion.scores == {}
    runtime.submit(generation((1, 2, 3), 200, eos_token_ids=(EOS,)), beside)
    assert beside.completion.text == TEXTS[1]
    until(lambda: not session.lengths.any())


def test_what_is_kept_of_an_answer_that_was_scored_is_what_was_written(serve):
    """The lists that were compared stood in its slot; a prompt that goes on after it must not get them."""
    prefix = PrefixCache(1 << 20)
    runtime, session = serve(prefix=prefix)
    (first,) = read(runtime, scored(1))
    history = (1, 2, 3, *first.tokens, 5)
    session.calls.clear()
    (again,) = read(runtime, generation(history, 4, eos_token_ids=(EOS,)))
    (restored,) = [call for call in session.calls if call[0] == "write"]
    assert restored[3] >= 32, "most of the answer was reused"
    other = Writer(slots=1)
    (alone,) = read(
        DecoderRuntime(None, session=other, tokenizer=Characters()), generation(history, 4, eos_token_ids=(EOS,))
    )
    assert again.tokens == alone.tokens


def test_an_answer_cut_at_the_limit_is_not_scored(serve):
    runtime, session = serve()
    made = scored(0)
    cut = type(made)(**{**vars(made), "sampling": generation(max_new_tokens=20, eos_token_ids=(EOS,)).sampling})
    (receiver,) = read(runtime, cut)
    assert receiver.completion.finish_reason == "length" and receiver.completion.scores == {}
    assert not [call for call in session.calls if call[0] == "score"]


def test_log_probabilities_are_of_the_model_alone_and_say_where_tokens_end(serve):
    """Whatever the penalty and temperature make of them."""
    runtime, _ = serve()
    made = generation(
        (2, 2, 3), 30, eos_token_ids=(EOS,), logprobs=True, repetition_penalty=1.3, temperature=1.5, seed=4
    )
    completion = (receiver := read(runtime, made)[0]).completion
    row, expected = [2, 2, 3], []
    for token in receiver.tokens:
        logits = logits_of(np.stack([row, range(len(row))], 1)).astype(np.float64)
        expected.append(logits[token] - np.log(np.exp(logits).sum()))
        row.append(token)
    assert completion.token_logprobs == pytest.approx(expected, abs=6e-5)
    assert completion.token_ends == tuple(min(i + 1, len(completion.text)) for i in range(len(receiver.tokens)))


def test_a_stop_string_cuts_where_tokens_end_too(serve):
    runtime, _ = serve()
    made = generation((0, 2, 3), 200, eos_token_ids=(EOS,), logprobs=True, stop=("arge",))
    completion = (receiver := read(runtime, made)[0]).completion
    assert completion.text == "<think> L" and len(completion.token_ends) == len(receiver.tokens) == 13
    assert completion.token_ends[-5:] == (9, 9, 9, 9, 9)


def test_an_engine_that_samples_by_itself_refuses_what_it_does_not_give():
    class Nothing:
        def close(self):
            pass

    with RemoteRuntime(
        Nothing(), Characters(), slots=1, vocab=VOCAB, hidden=4, max_sequence=300, queue_size=1
    ) as runtime:
        for made, key in ((scored(0), "scores"), (generation((1,), 4, logprobs=True), "logprobs")):
            with pytest.raises(InvalidRequest, match=f"REQUEST.{key}: .* another engine"):
                runtime.submit(made, Receiver())


def test_a_long_list_is_not_scored():
    """Lists to compare grow with its square: one of 500 items would hold the scheduler for minutes."""
    longest = [LABELS[number % len(LABELS)] for number in range(MOST_ITEMS)]
    assert alternatives(answer(*longest), LISTS) is not None
    assert alternatives(answer(*longest, "Edema"), LISTS) is None


def test_a_label_with_a_full_stop_is_that_label():
    pairs = compared(answer("Edema.", "Fracture"), LISTS)
    assert pairs["Edema"] == ({answer("Edema.", "Fracture")}, {answer("Fracture")})


class Bytes:
    """A token for each byte, and one for the last of a tag with the first of a character behind it."""

    BOTH, EMPTY = 300, 301

    def of(self, token):
        return {self.BOTH: b">\xe8", self.EMPTY: b""}.get(token) or bytes([token] if token < 256 else [])

    def stream(self):
        return TokenStream(self.of)

    def text_ids(self, text):
        return list(text.encode())


def rescored(text, scoring, ids=None):
    """Token ids that the written list is scored as, the answer's own before it and its end token included."""
    tokenizer, ids = Bytes(), [*(ids or text.encode()), EOS]
    stream = Stream(generation((5, 6), 200, eos_token_ids=(EOS,)), None, None, tokenizer.stream(), 200)
    stream.generation = dataclasses.replace(stream.generation, scoring=scoring)
    for token in ids:
        stream.accept(token, 0.0)
    assert stream.whole == text
    stream.begin_scoring(tokenizer, 1000)
    if stream.scorer is None:
        return None
    run = stream.scorer.next()
    return [5, 6, *ids][: run.length] + run.input_ids.tolist() + [run.tokens[-1]]


@pytest.mark.parametrize(
    "form, grammar",
    [
        ("{}", "plain"),
        ("<answer>{}</answer>", "think_answer"),
        ("<answer> {}</answer>", "think_answer"),
        ("é\\boxed{{{}}}", "boxed"),
    ],
)
@pytest.mark.parametrize("items", ["肺炎", "肺炎, Edema", "Edema, 肺炎", "𝗘dema"])
def test_a_list_that_begins_within_a_character_s_tokens_is_scored_as_it_was_written(form, grammar, items):
    scoring = Scoring(grammar=grammar, answer="labels", choices=("肺炎", "Edema", "𝗘dema"))
    text = form.format(items)
    expected = [5, 6, *text.encode(), *([EOS] if grammar == "plain" else [])]
    assert rescored(text, scoring) == expected


def test_tokens_that_hold_more_or_less_than_a_list_s_begin_do_not_change_what_is_scored():
    scoring = Scoring(grammar="think_answer", answer="labels", choices=("肺炎", "Edema"))
    text, rest = "<answer>肺炎</answer>", "肺炎</answer>".encode()
    merged = [*b"<answer", Bytes.BOTH, *rest[1:]]
    assert rescored(text, scoring, merged) == [5, 6, *text.encode()], "what it had of the list is written by itself"
    silent = [*b"<answer>", Bytes.EMPTY, *rest]
    assert rescored(text, scoring, silent) == [5, 6, *silent], "the reasoning stays as it was"
    torn = [*b"<answer>", 0xE8, *b" Edema</answer>"]
    assert rescored("<answer>\ufffd Edema</answer>", scoring, torn) is None


@pytest.mark.parametrize("nth", range(2, 9))
def test_scoring_that_breaks_off_leaves_no_other_list_to_be_restored(serve, nth):
    runtime, session = serve(prefix=PrefixCache(1 << 20))
    session.fail_on = lambda call: call[0] == "score" and sum(each[0] == "score" for each in session.calls) == nth
    receiver = Receiver()
    runtime.submit(scored(3), receiver)
    until(lambda: receiver.error)
    session.fail_on = lambda call: False
    until(lambda: not session.lengths.any())
    restored, write = [], session.write_cache

    def noted(slot, start, rows):
        restored.append((start, rows[0, 0, :, 0].tolist()))
        write(slot, start, rows)

    session.write_cache = noted
    history = (3, 2, 3, *map(ord, TEXTS[3]), EOS, 5)
    read(runtime, generation(history, 2, eos_token_ids=(EOS,)))
    for start, rows in restored:
        assert rows == list(history[start : start + len(rows)])


def test_streams_that_wait_to_be_scored_do_not_outgrow_the_cache():
    class Strict(Writer):
        def step(self, input_ids, positions):
            assert self.lengths[: len(input_ids)].max() < self.max_sequence
            return super().step(input_ids, positions)

    for context in range(82, 92):
        runtime = DecoderRuntime(None, session=Strict(slots=4, max_sequence=context), tokenizer=Characters())
        with runtime:
            long = generation((5, 2, 3), context - 4, eos_token_ids=(EOS,))
            beside = generation((0, 2, 3), 200, eos_token_ids=(EOS,))
            receivers = read(runtime, scored(3), scored(3), scored(3), beside, long)
            assert not [receiver.error for receiver in receivers if receiver.error]
