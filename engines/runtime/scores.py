"""Scores of a written answer: what the model itself gives the answers that differ from it in one choice.

The answer's reasoning stays as it was written; only the list after it is exchanged (`cxr_triton.alternatives`), and
each text is given to the model as if it had written it. With P(list) the product of the probabilities of all tokens
from the list's begin to the end of what closes it, a choice's score is

    log Σ P(lists with it) - log Σ P(lists without it)

in nats, by the model's own logits in float64: no penalty, no temperature. It ends at ±`SCORE_LIMIT`. A list is not
computed where its first words show that it lies beyond that, or that it adds less than a share of exp(-`MARGIN_NATS`)
to its sum; so a choice takes one or two short continuations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxr_triton.alternatives import SCORE_LIMIT, Alternatives
from cxr_triton.engines.runtime.sampler import log_softmax
from cxr_triton.errors import InternalError

MARGIN_NATS = 5.0
LEAST_NATS = -1e6  # in place of minus infinity, which has no difference
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """What `DecoderSession.score` is asked for next: `length`, `input_ids`, `positions`; and of which text it is."""

    tokens: Tokens
    length: int
    input_ids: np.ndarray
    positions: np.ndarray


class Scorer:
    """Scores of one answer, run by run.

    Parameters
    ----------
    found : Alternatives
    texts : sequence of tuple of int
        Tokens of `Alternatives.texts`, from where they leave the answer.
    last : int
        The token before these.
    length : int
        Positions of the slot before `last`.
    position : int
        Of `last`.

    Attributes
    ----------
    length : int
        Positions of the slot that stay as they were.
    longest : int
        Most positions of the slot in use.
    tokens : int
        Computed so far.
    """

    def __init__(self, found: Alternatives, texts: Sequence[Tokens], *, last: int, length: int, position: int):
        self.length, self.longest = length, length + max(map(len, texts))
        self.tokens = 0
        self._choices, self._texts = found.choices, texts
        self._last, self._position = last, position
        self._held: Tokens = ()  # what the slot holds beyond `length`
        # After each beginning of a text, the tokens that go on in one of them, and their log-probabilities.
        self._wanted: dict[Tokens, set[int]] = {}
        self._known: dict[Tokens, dict[int, float]] = {}
        for tokens in texts:
            for i, token in enumerate(tokens):
                self._wanted.setdefault(tokens[:i], set()).add(token)

    def next(self) -> Run | None:
        """The next run; None when the scores are known."""
        if not self._is_known(0):
            return self._run(self._texts[0])
        written = self._bound(self._texts[0])[0]
        for side in dict.fromkeys(side for sides in self._choices.values() for side in sides):
            if (open_ := self._open(side, written - SCORE_LIMIT)) is not None:
                return self._run(self._texts[open_])
        return None

    def take(self, run: Run, logits: np.ndarray) -> None:
        """Take the logits of a run, (S, vocab); raises `InternalError` where the largest is not a finite number."""
        if not np.isfinite(logits.max(axis=-1)).all():
            raise InternalError("the decoder's largest logit is not a number; verify the bundle")
        fed = (self._last, *run.tokens)
        first = run.length - self.length
        self.tokens += len(logits)
        for i, row in enumerate(logits, first):
            before = run.tokens[:i]
            if before not in self._known:
                own = log_softmax(row)
                self._known[before] = {token: max(float(own[token]), LEAST_NATS) for token in self._wanted[before]}
        self._held = fed[: first + len(logits)]

    def scores(self) -> dict[str, float]:
        """Log-odds of every choice, once `next` gives None."""
        sums = {name: [self._sum(side) for side in sides] for name, sides in self._choices.items()}
        odds = {name: given - lacking for name, (given, lacking) in sums.items()}
        return {name: max(-SCORE_LIMIT, min(SCORE_LIMIT, value)) for name, value in odds.items()}

    def _run(self, tokens: Tokens) -> Run:
        fed = (self._last, *tokens[:-1])
        shared = next((i for i, (a, b) in enumerate(zip(fed, self._held, strict=False)) if a != b), len(self._held))
        first = min(self._bound(tokens)[1], shared, len(fed) - 1)
        positions = np.arange(self._position + first, self._position + len(fed), dtype=np.int64)
        return Run(tokens, self.length + first, np.array(fed[first:], np.int64), positions)

    def _bound(self, tokens: Tokens) -> tuple[float, int]:
        """Most that the log-probability of a text can be, and how many of its tokens that is known of."""
        total = 0.0
        for i, token in enumerate(tokens):
            if (known := self._known.get(tokens[:i])) is None:
                return total, i
            total += known[token]
        return total, len(tokens)

    def _is_known(self, number: int) -> bool:
        return self._bound(self._texts[number])[1] == len(self._texts[number])

    def _open(self, side: Sequence[int], least: float) -> int | None:
        """The likeliest text that can still change the sum of some; below `least` none matters."""
        bounds = {i: self._bound(self._texts[i])[0] for i in side}
        open_ = [i for i in side if not self._is_known(i)]
        best = max((bounds[i] for i in side if i not in open_), default=-math.inf)
        likeliest = max(open_, key=lambda i: bounds[i], default=None)
        if likeliest is None or bounds[likeliest] <= max(least, best - MARGIN_NATS):
            return None
        return likeliest

    def _sum(self, side: Sequence[int]) -> float:
        """Log of the summed probabilities of the texts that were computed."""
        logs = [self._bound(self._texts[i])[0] for i in side if self._is_known(i)]
        best = max(logs, default=-math.inf)
        return best + math.log(sum(math.exp(each - best) for each in logs)) if logs else best
