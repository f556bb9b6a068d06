"""Tokens guessed from what was written before, for a decoder that checks several in one step.

Readings are formulaic, so where a text has begun as an earlier one it often goes on as that did (suffix decoding,
arXiv 2411.04975). A wrong guess costs time only: every token is sampled from the decoder's own logits, so greedy and
random sampling give what they give without. Nothing of the texts is ever written to a disk.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from cxr_triton.engines.runtime.stream import Stream

log = logging.getLogger(__name__)
NONE = -1
"""In the place of a token: nothing is guessed."""
WIDTHS = (1, 2, 3, 4, 6, 8)
"""Tokens of each stream that a step may take: the one that was sampled last, and guesses."""
BYTES_PER_TOKEN = 16
LONGEST = 12  # tokens; a longer context tells no more
_MIX = 1000003
_PLACES = 8  # newest ones of a context that are looked at
_RUNS = 5  # of a width, of which the least counts
_PLAIN_EVERY = 16  # steps
_STALE = 200  # steps after which a plain one is too old to compare with
_HALF_LIFE = 200  # steps, of the belief in a run
_ROW = 0.1  # of a plain step, for a token more of one stream, before that was measured
_MARGIN = 1.1  # by which a wider step has to be worth more
_IN_VAIN, _SHARE, _LONGEST_REST = 16, 0.005, 64  # guesses in a row; of a step's time, for more of them; steps


class Texts:
    """A ring of texts, in which a context of one or two tokens is found again.

    A place is that of a token in the ring, 0 none. All links may be of a text that is overwritten by now, so what they
    lead to is compared before it is believed.

    Parameters
    ----------
    limit_bytes : int
        Of everything; `BYTES_PER_TOKEN` a token.
    """

    def __init__(self, limit_bytes: int):
        self._size = limit_bytes // BYTES_PER_TOKEN - 2

        def numbers() -> memoryview:
            return np.zeros(self._size + 2, np.intc).data  # pages that are never written cost nothing

        self._text, self._older, self._after_one, self._after_two = (numbers() for _ in range(4))
        self._text[0] = self._text[-1] = NONE  # between all texts, and before the first one
        self._next = 1

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return 4 * self._text.nbytes

    def add(self, tokens: Sequence[int]) -> None:
        """Hold a text, or its end where the ring is smaller, in the place of the oldest."""
        tokens = tokens[-(self._size - 1) :]
        if self._next + len(tokens) > self._size:
            self._next = 1
        self.go_on(tokens)
        self._next += 1

    def go_on(self, tokens: Sequence[int]) -> None:
        """Add to the text that is written now; a ring that is full to its end takes no more."""
        size, text, older, after_one, after_two = self._size, self._text, self._older, self._after_one, self._after_two
        place = self._next
        one_before, last = text[place - 2], text[place - 1]
        for token in tokens[: size + 1 - place]:
            text[place] = token
            if last != NONE:
                after_one[last % size] = place
                if one_before != NONE:
                    key = (one_before * _MIX + last) % size
                    older[place], after_two[key] = after_two[key], place
            one_before, last = last, token
            place += 1
        text[place] = NONE
        self._next = place

    def find(self, tail: Sequence[int]) -> tuple[int, int]:
        """The newest place before which the longest end of `tail` stands, up to `LONGEST` tokens, and its length."""
        best = longest = 0
        if len(tail) > 1:
            place = self._after_two[self._key(tail[-2], tail[-1])]
            for _ in range(_PLACES):
                if not place or longest == LONGEST:
                    break
                if (length := self._common(place, tail)) > longest:
                    best, longest = place, length
                place = self._older[place]
        if not longest and tail:
            place = self._after_one[tail[-1] % self._size]
            if place and self._text[place - 1] == tail[-1]:
                return place, 1
        return best, longest

    def holds(self, tokens: Sequence[int]) -> bool:
        """Whether a whole text, or the end of one, is among the newest that end with its last three tokens."""
        if len(tokens) < 3:
            return False
        text, wanted = self._text, memoryview(array("i", tokens))
        place = self._after_two[self._key(tokens[-3], tokens[-2])]
        for _ in range(_PLACES):
            first = place + 1 - len(tokens)
            if first > 0 and text[place] == tokens[-1] and text[first : place + 1] == wanted:
                return True
            place = self._older[place]
        return False

    def at(self, place: int) -> int:
        """The token of a place, or `NONE`."""
        return self._text[place]

    def following(self, place: int, most: int) -> list[int]:
        """Up to so many tokens from a place to the end of its text."""
        tokens = self._text[place : place + most].tolist()
        return tokens[: tokens.index(NONE)] if NONE in tokens else tokens

    def _key(self, one: int, two: int) -> int:
        return (one * _MIX + two) % self._size

    def _common(self, place: int, tail: Sequence[int]) -> int:
        """Tokens before a place that are the last ones of `tail`."""
        text, length, most = self._text, 0, min(len(tail), LONGEST)
        while length < most and text[place - 1 - length] == tail[-1 - length]:
            length += 1
        return length


class Costs:
    """What a step takes, by its streams and the tokens of each: the least of its latest runs, as others only add to it.

    Of one token it is seconds; of several, shares of what one took at that time, as a machine may have become slower or
    faster when they are compared.
    """

    def __init__(self):
        self._runs: dict[tuple[int, int], deque[float]] = {}
        self._least: dict[tuple[int, int], float] = {}
        self._last: dict[tuple[int, int], int] = {}  # step at which it was run
        self._steps = 0

    def take(self, streams: int, width: int, seconds: float) -> None:
        """Count a step. The first of its kind is left out, as engines prepare for a new shape."""
        self._steps += 1
        kind = (streams, width)
        if width == 1 and self._is_stale(kind, _STALE):
            self._least.pop(kind, None)
            self._runs.get(kind, deque()).clear()
        self._last[kind] = self._steps
        unit = 1.0 if width == 1 else self.step_s(streams)
        if kind not in self._runs or unit is None:
            self._runs.setdefault(kind, deque(maxlen=_RUNS))
            return
        runs = self._runs[kind]
        runs.append(seconds / unit)
        self._least[kind] = min(runs)

    def step_s(self, streams: int) -> float | None:
        """Seconds of a step of one token each; None where that was not measured."""
        return self._least.get((streams, 1))

    def share(self, streams: int, width: int) -> float | None:
        """What a step takes as a share of one of one token each; None where that was not measured."""
        return 1.0 if width == 1 else self._least.get((streams, width))

    def best(self, streams: int, tokens: Sequence[float]) -> int:
        """The width that gives most tokens a second.

        What a width took is believed less with every step since, and sooner after few runs, so that it is tried again
        the sooner the closer it was to being worth it. One that was never run comes after all that are narrower, and
        counts as if each token more took half of what one did in the widest of those, or of `_ROW` a stream.

        Parameters
        ----------
        streams : int
        tokens : sequence of float
            Expected of all streams together, for each of `WIDTHS` that may be taken.
        """
        if self._is_stale((streams, 1), _PLAIN_EVERY) or (streams, 1) not in self._least:
            return 1
        chosen, most = 1, tokens[0] * _MARGIN
        narrower, share, a_token = 1, 1.0, _ROW * streams
        for width, expected in zip(WIDTHS[1:], tokens[1:], strict=False):
            kind = (streams, width)
            if is_known := kind in self._least:
                age = (self._steps - self._last[kind]) / (_HALF_LIFE * len(self._runs[kind]))
                share = self._least[kind] * 0.5**age
                a_token = max(0.0, share - 1) / (width - 1)
            else:
                share += a_token / 2 * (width - narrower)
            if expected / share > most:
                chosen, most = width, expected / share
            if not is_known:
                break
            narrower = width
        return chosen

    def rest(self, streams: int, seconds: float) -> int:
        """Steps to make without a look at what could be guessed, where a look takes so long and was in vain."""
        step_s = self.step_s(streams)
        return min(int(seconds / (_SHARE * step_s)), _LONGEST_REST) if step_s else 0

    def _is_stale(self, kind: tuple[int, int], steps: int) -> bool:
        return self._steps - self._last.get(kind, 0) > steps


class Rates:
    """How often a guess is right, by the length of the context that it follows: moving averages."""

    def __init__(self):
        self._right = [0.5] * (LONGEST + 1)
        self._seen = [2] * (LONGEST + 1)

    def learn(self, length: int, is_right: bool) -> None:
        """Count a guess, whether or not a step was made for it."""
        length = min(length, LONGEST)
        seen = self._seen[length] = min(self._seen[length] + 1, 40)
        self._right[length] += (is_right - self._right[length]) / seen

    def all_right(self, length: int, guesses: int) -> list[float]:
        """Probabilities that the first 1, 2, … guesses after a context are right."""
        probabilities, product = [], 1.0
        for n in range(guesses):
            product *= self._right[min(length + n, LONGEST)]
            probabilities.append(product)
        return probabilities


@dataclass
class _Follower:
    """Where an earlier text, or the stream's own, goes on as a stream does."""

    own: Texts
    texts: Texts
    place: int = 0
    length: int = 0  # tokens before the place that are the stream's last
    taken: int = 0  # of the answer

    def follow(self, answer: Sequence[int], earlier: Texts, rates: Rates) -> None:
        """Take what the answer has more than before."""
        if (looked := len(answer) - WIDTHS[-1]) > self.taken:  # said while nobody looked
            self.own.go_on(answer[self.taken : looked])
            self.taken, self.place, self.length = looked, 0, 0
        for end in range(self.taken + 1, len(answer) + 1):
            token = answer[end - 1]
            guess = self.texts.at(self.place)
            if guess != NONE:
                rates.learn(self.length, guess == token)
            if guess == token:
                self.place, self.length = self.place + 1, self.length + 1
            else:
                tail = answer[max(0, end - LONGEST) : end]
                self.texts, (self.place, self.length) = earlier, earlier.find(tail)
                if (mine := self.own.find(tail))[1] > self.length:
                    self.texts, (self.place, self.length) = self.own, mine
            self.own.go_on((token,))
        self.taken = len(answer)


@dataclass
class Drafts:
    """Guesses for the streams of a runtime, and what came of them; for the scheduler's thread.

    Parameters
    ----------
    limit_bytes : int
        Memory of the host for earlier answers.
    """

    limit_bytes: int
    costs: Costs = field(default_factory=Costs)

    def __post_init__(self):
        self.texts, self._rates = Texts(self.limit_bytes), Rates()
        self._followers: WeakKeyDictionary[Stream, _Follower] = WeakKeyDictionary()
        self._drafted = self._accepted = 0
        self._in_vain = self._rest = 0

    def counts(self) -> dict[str, int]:
        """Tokens that were ``drafted`` and, of them, ``accepted``, for any thread."""
        return {"drafted": self._drafted, "accepted": self._accepted}

    def count(self, drafted: int, accepted: int) -> None:
        """Count what a step has checked of a stream."""
        self._drafted += drafted
        self._accepted += accepted

    def propose(self, streams: Sequence[Stream], room: int) -> np.ndarray | None:
        """Guesses of what comes next, if checking them should be worth it.

        Parameters
        ----------
        streams : sequence of Stream
            Those of the next step.
        room : int
            Positions that each of them has in the cache.

        Returns
        -------
        (n, k) int64 array or None
            `NONE` after a stream's last guess.
        """
        if self._rest:
            self._rest -= 1
            return None
        started_s = time.monotonic()
        try:
            guesses = self._worth_a_check(streams, min(room, WIDTHS[-1]) - 1)
        except Exception:
            self._give_up("guessing")
            return None
        self._in_vain = self._in_vain + 1 if guesses is None else 0
        if self._in_vain >= _IN_VAIN:
            self._rest = self.costs.rest(len(streams), time.monotonic() - started_s)
        return guesses

    def took(self, streams: int, width: int, seconds: float) -> None:
        """Count what a step took, guessing included."""
        if not self._rest:
            self.costs.take(streams, width, seconds)

    def keep(self, stream: Stream) -> None:
        """Hold the answer of a stream that has ended, once."""
        try:
            if not self.texts.holds(stream.answer):
                self.texts.add(stream.answer)
        except Exception:
            self._give_up("keeping an answer")

    def forget(self) -> None:
        """Forget all texts; what steps take and how often guesses are right stays."""
        self.texts = Texts(self.limit_bytes)
        self._followers.clear()

    def _follower(self, stream: Stream) -> _Follower:
        if stream not in self._followers:
            own = Texts((stream.max_new_tokens + 3) * BYTES_PER_TOKEN)
            self._followers[stream] = _Follower(own, self.texts)
        return self._followers[stream]

    def _worth_a_check(self, streams: Sequence[Stream], most: int) -> np.ndarray | None:
        guesses = [self._guess(stream, most) for stream in streams]
        longest = max(len(tokens) for tokens, _ in guesses)
        if not longest:
            return None
        gains = [self._rates.all_right(length, len(tokens)) for tokens, length in guesses]
        widths = [width for width in WIDTHS if width <= longest + 1]
        expected = [len(streams) + sum(sum(gain[: width - 1]) for gain in gains) for width in widths]
        width = self.costs.best(len(streams), expected)
        if width == 1:
            return None
        return np.array([(tokens + [NONE] * width)[: width - 1] for tokens, _ in guesses], np.int64)

    def _guess(self, stream: Stream, most: int) -> tuple[list[int], int]:
        """Tokens that may come next, as many as the answer has room for beside one, and the length of their context."""
        follower = self._follower(stream)
        follower.follow(stream.answer, self.texts, self._rates)
        most = min(most, stream.max_new_tokens - stream.generated - 1)
        if most < 1 or not follower.place:
            return [], 0
        return follower.texts.following(follower.place, most), follower.length

    def _give_up(self, doing: str) -> None:
        log.exception("%s failed; drafts start anew", doing)
        self.forget()
