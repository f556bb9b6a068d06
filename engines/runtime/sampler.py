"""Next token from a row of logits: repetition penalty, temperature, top-p, one seeded generator per request.

Order and arithmetic are those of the logits processors of `transformers.generate`; the draw itself is our own
(inverse CDF), since a seed cannot give the same draw in two libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from cxr_triton.errors import InternalError, InvalidRequest

GREEDY_BELOW_TEMPERATURE = 1e-4  # Qwen's generation_config asks for greedy decoding by temperature 1e-6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen and when it ends.

    Parameters
    ----------
    max_new_tokens : int
        Most tokens to generate, the end-of-sequence token included; at least 1.
    temperature : float
        Below 1e-4 the most likely token is taken (greedy).
    top_p : float
        Smallest set of most likely tokens whose probability reaches it; in (0, 1], 1 keeps all.
    repetition_penalty : float
        Over prompt and generated ids (arXiv 1909.05858, section 4.1); 1 is off.
    seed : int, optional
        Of the request's own generator; None draws a fresh one.
    stop : tuple of str
        The text ends before the first of these.
    eos_token_ids : tuple of int
        Tokens that end the generation.

    Raises
    ------
    InvalidRequest
        A value is of another type, or out of its range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, (allowed, holds) in _ALLOWED.items():
            if not holds(getattr(self, name)):
                raise InvalidRequest(f"sampling: {name} is {getattr(self, name)!r:.80}, must be {allowed}")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    """Of a size that a float32 takes; NaN is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_list(value: object, of: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(of, value))


_LARGEST = float(np.finfo(np.float32).max)
_ALLOWED: dict[str, tuple[str, Callable[[object], bool]]] = {
    "max_new_tokens": ("a whole number, at least 1", lambda value: _is_whole(value, 1)),
    "temperature": ("a number, 0 or more", lambda value: _is_number(value) and value >= 0),
    "top_p": ("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1),
    "repetition_penalty": ("a number, more than 0", lambda value: _is_number(value) and value > 0),
    "seed": ("a whole number, 0 or more, or None", lambda value: value is None or _is_whole(value, 0)),
    "stop": ("strings that are not empty", lambda value: _is_list(value, lambda text: isinstance(text, str) and text)),
    "eos_token_ids": ("token ids", lambda value: _is_list(value, lambda id_: _is_whole(id_, 0) and id_ < 1 << 31)),
}


@dataclass(frozen=True)
class TopLogits:
    """The best part of a row of logits, where the row lies on a device that is slow to read.

    Attributes
    ----------
    blocks : (k,) int64 array
        Numbers of the blocks of neighbouring ids that hold the k largest logits of all blocks, the best first.
    logits : (k, size) float32 array
        Logits of their ids; minus infinity beyond the vocabulary.
    bound : float
        No id outside these blocks has a larger logit.
    all : callable
        Gives the (vocab,) float32 row.
    """

    blocks: np.ndarray
    logits: np.ndarray
    bound: float
    all: Callable[[], np.ndarray]


class Sampler:
    """State of one request's sampling: its generator and the ids that it has seen.

    Parameters
    ----------
    sampling : Sampling
    prompt_ids : (S,) int64 array
        Prompt, image pads included: transformers penalizes them too.
    """

    def __init__(self, sampling: Sampling, prompt_ids: np.ndarray):
        self.sampling = sampling
        self._penalty = np.float32(sampling.repetition_penalty)
        self._seen = set(np.unique(prompt_ids).tolist()) if self._penalty != 1 else None
        self._seen_ids = np.fromiter(self._seen, np.int64) if self._seen else np.empty(0, np.int64)
        self._greedy = sampling.temperature < GREEDY_BELOW_TEMPERATURE
        self._generator = None if self._greedy else np.random.default_rng(sampling.seed)

    def sample(self, logits: np.ndarray | TopLogits) -> int:
        """The next token id.

        Parameters
        ----------
        logits : (vocab,) float32 array or TopLogits
            An array is overwritten where the repetition penalty applies.

        Raises
        ------
        InternalError
            The largest logit is not a finite number.
        """
        if isinstance(logits, TopLogits):
            token = self._best(logits)
            if token is not None:
                return self._see(token)
            logits = logits.all()
        if self._seen is not None:
            logits[self._seen_ids] = self._penalized(logits[self._seen_ids])
        token = int(logits.argmax())
        if not np.isfinite(logits[token]):
            raise InternalError(f"the decoder's largest logit is {logits[token]}, not a number; verify the bundle")
        if not self._greedy:
            token = self._draw(logits)
        return self._see(token)

    def _best(self, top: TopLogits) -> int | None:
        """The likeliest id, if greedy decoding can tell it from the best logits alone."""
        if not self._greedy or self._penalty < 1:
            return None
        logits, size = top.logits, top.logits.shape[1]
        if self._seen is not None:
            logits, seen = logits.copy(), self._seen_ids // size
            for row, block in zip(logits, top.blocks, strict=True):
                index = self._seen_ids[seen == block] - block * size
                row[index] = self._penalized(row[index])
        best = logits.max()
        # A penalty only lowers a logit: what is not among these stays below the bound.
        if not np.isfinite(best) or best <= top.bound:
            return None
        rows, columns = np.nonzero(logits == best)
        return int((top.blocks[rows] * size + columns).min())

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        return np.where(logits < 0, logits * self._penalty, logits / self._penalty)

    def _see(self, token: int) -> int:
        if self._seen is not None and token not in self._seen:
            self._seen.add(token)
            self._seen_ids = np.append(self._seen_ids, token)
        return token

    def _draw(self, logits: np.ndarray) -> int:
        ids, probabilities = nucleus(logits, self.sampling.temperature, self.sampling.top_p)
        cumulative = np.cumsum(probabilities)
        position = np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right")
        return int(ids[min(position, len(ids) - 1)])


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Ids that top-p keeps, in a stable order, and their probabilities before renormalization.

    Parameters
    ----------
    logits : (vocab,) float32 array
    temperature : float
        More than 0.
    top_p : float
        In (0, 1].

    Returns
    -------
    ids : (kept,) int64 array
    probabilities : (kept,) float64 array
    """
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if top_p >= 1:
        return np.arange(len(probabilities)), probabilities
    # Tokens this rare cannot reach 1 - top_p all together: they are out, and only the others need sorting.
    candidates = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    ascending = candidates[np.argsort(probabilities[candidates], kind="stable")]
    rest = max(0.0, 1.0 - probabilities[ascending].sum())
    kept = rest + np.cumsum(probabilities[ascending]) > 1 - top_p
    kept[-1] = True
    ids = ascending[kept][::-1]
    return ids, probabilities[ids]
