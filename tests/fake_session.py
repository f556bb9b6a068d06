"""A decoder session of paper and what is asked of it: the next token follows from all before."""

import threading
import time

import numpy as np

from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.sampling import Sampling

VOCAB = 97

EOS = 96

WAIT_S = 60


class FakeSession:
    """A cache of (token, position) pairs; logits are a hash of a row, so a row mixed up with another one shows."""

    def __init__(self, slots=4, max_sequence=512):
        self.slots, self.max_sequence, self.vocab, self.hidden = slots, max_sequence, VOCAB, 4
        self.lengths = np.zeros(slots, np.int64)
        self.cache = np.zeros((slots, max_sequence, 2), np.int64)
        self.calls = []
        self.gate = threading.Semaphore(0)
        self.gated = False
        self.fail_on = lambda call: False
        self.step_s = 0.0
        self.checks = slots

    def _log(self, *call):
        if self.gated:
            assert self.gate.acquire(timeout=WAIT_S)
        time.sleep(self.step_s)
        self.calls.append(call)
        if self.fail_on(call):
            raise RuntimeError("the engine broke")

    def _append(self, slot, ids, positions):
        length = self.lengths[slot]
        self.cache[slot, length : length + len(ids), 0] = ids
        self.cache[slot, length : length + len(ids), 1] = positions
        self.lengths[slot] += len(ids)

    def _logits(self, slot):
        return reference_logits(self.cache[slot, : self.lengths[slot]])

    def prefill(self, slot, input_ids, image_index, image_embeddings, position_ids, *, is_last):
        self._log("prefill", slot, len(input_ids))
        self._append(slot, input_ids, position_ids[0])
        return self._logits(slot) if is_last else None

    def step(self, input_ids, positions):
        self._log("step", len(input_ids))
        for slot, (token, position) in enumerate(zip(input_ids, positions, strict=True)):
            self._append(slot, [token], position)
        return np.stack([self._logits(slot) for slot in range(len(input_ids))])

    def score(self, slot, length, input_ids, positions):
        self._log("score", slot, length, len(input_ids))
        assert length <= self.lengths[slot]
        self.lengths[slot] = length
        rows = []
        for token, position in zip(input_ids, positions, strict=True):
            self._append(slot, [token], position)
            rows.append(self._logits(slot))
        return np.stack(rows)

    def check(self, input_ids, positions):
        self._log("check", *input_ids.shape)
        assert len(input_ids) <= self.checks
        rows = []
        for slot, (tokens, places) in enumerate(zip(input_ids, positions, strict=True)):
            rows.append([])
            for token, place in zip(tokens, places, strict=True):
                assert self.lengths[slot] < self.max_sequence and 0 <= token < VOCAB
                self._append(slot, [token], place)
                rows[-1].append(self._logits(slot))
        return np.array(rows)

    def shorten(self, slot, length):
        assert length <= self.lengths[slot]
        self.lengths[slot] = length

    def move(self, source, target):
        self.calls.append(("move", source, target))
        if self.fail_on(self.calls[-1]):
            raise RuntimeError("the engine broke")
        self.cache[target], self.lengths[target] = self.cache[source], self.lengths[source]

    def free(self, slot):
        self.calls.append(("free", slot))
        self.lengths[slot] = 0

    def read_cache(self, slot, start, stop):
        self.calls.append(("read", slot, start, stop))
        if self.fail_on(self.calls[-1]):
            raise RuntimeError("the engine broke")
        assert start < stop <= self.lengths[slot]
        return self.cache[slot, start:stop][None, None].copy()

    def write_cache(self, slot, start, rows):
        self.calls.append(("write", slot, start, start + rows.shape[2]))
        if self.fail_on(self.calls[-1]):
            raise RuntimeError("the engine broke")
        assert start == self.lengths[slot]
        self.cache[slot, start : start + rows.shape[2]] = rows[0, 0]
        self.lengths[slot] += rows.shape[2]

    def steps(self):
        return [call for call in self.calls if call[0] in ("step", "check")]


def reference_logits(row):
    weights = (np.arange(1, len(row) + 1) * 2654435761) % 1000003
    state = int((row[:, 0] * weights + row[:, 1] * 31).sum())
    logits = np.random.default_rng(state).standard_normal(VOCAB).astype(np.float32)
    logits[EOS] = -10
    return logits


def expected_tokens(generation, sampler=np.argmax):
    """The tokens of a generation run alone, without any scheduler."""
    row = np.stack([generation.input_ids, generation.position_ids[0]], 1)
    tokens = []
    for k in range(generation.sampling.max_new_tokens):
        tokens.append(int(sampler(reference_logits(row))))
        row = np.vstack([row, [tokens[-1], generation.position_ids.max() + 1 + k]])
    return tokens


class Letters:
    """Token id → one character; ids above 90 are the bytes of a two-byte character, which appears with the second."""

    def stream(self):
        return LetterStream()


class LetterStream:
    def __init__(self):
        self.open = False

    def push(self, ids):
        text = ""
        for token in ids:
            if token > 90:
                text += "é" if self.open else ""
                self.open = not self.open
            else:
                text += ("\ufffd" if self.open else "") + chr(33 + token)
                self.open = False
        return text

    @property
    def is_whole(self):
        return not self.open

    def finish(self):
        return "\ufffd" if self.open else ""


def generation(prompt=(1, 2, 3), max_new_tokens=12, **sampling):
    ids = np.array(prompt, np.int64)
    sampling.setdefault("eos_token_ids", (EOS,))
    return Generation(
        input_ids=ids,
        position_ids=np.tile(np.arange(len(ids)), (3, 1)),
        image_index=np.full(len(ids), -1, np.int64),
        image_embeddings=np.zeros((0, 4), np.float32),
        sampling=Sampling(max_new_tokens=max_new_tokens, **sampling),
    )


class Receiver:
    """Collects a stream's chunks and waits for the last one."""

    def __init__(self):
        self.chunks, self.done = [], threading.Event()

    def __call__(self, chunk):
        self.chunks.append(chunk)
        if chunk.completion or chunk.error:
            self.done.set()

    def wait(self):
        assert self.done.wait(WAIT_S), "the stream did not end"
        return self

    @property
    def tokens(self):
        return [int(token) for chunk in self.chunks for token in chunk.token_ids]

    @property
    def text(self):
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def completion(self):
        return self.wait().chunks[-1].completion

    @property
    def error(self):
        return self.wait().chunks[-1].error


def until(holds):
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)
