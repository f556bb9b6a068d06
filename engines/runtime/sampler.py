"""Next token from a row of logits: repetition penalty, guide, temperature, top-p, one seeded generator per request.

Order and arithmetic are those of the logits processors of `transformers.generate`; the draw itself is our own
(inverse CDF), since a seed cannot give the same draw in two libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cxr_triton.engines.runtime.guide import Guide
from cxr_triton.errors import InternalError
from cxr_triton.sampling import Sampling

GREEDY_BELOW_TEMPERATURE = 1e-4  # Qwen's generation_config asks for greedy decoding by temperature 1e-6


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
    guide : Guide, optional
        What the tokens follow. A likeliest token that it allows is taken as without it.
    """

    def __init__(self, sampling: Sampling, prompt_ids: np.ndarray, guide: Guide | None = None):
        self.sampling = sampling
        self._guide = guide
        self._penalty = np.float32(sampling.repetition_penalty)
        self._seen = set(np.unique(prompt_ids).tolist()) if self._penalty != 1 else None
        self._seen_ids = np.fromiter(self._seen, np.int64) if self._seen else np.empty(0, np.int64)
        self._greedy = sampling.temperature < GREEDY_BELOW_TEMPERATURE
        self._generator = np.random.default_rng(sampling.seed)

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
        InvalidRequest
            The guide cannot be followed further.
        """
        if isinstance(logits, TopLogits):
            token = self._best(logits)
            if token is not None and self._allows(token):
                return self._see(token)
            logits = logits.all()
        if self._seen is not None:
            logits[self._seen_ids] = self._penalized(logits[self._seen_ids])
        token = int(logits.argmax())
        if not np.isfinite(logits[token]):
            raise InternalError(f"the decoder's largest logit is {logits[token]}, not a number; verify the bundle")
        if self._greedy and self._allows(token):
            return self._see(token)
        if self._guide is None:
            return self._see(self._draw(logits))
        allowed = self._guide.allowed()
        row = logits[allowed]
        return self._see(int(allowed[row.argmax() if self._greedy else self._draw(row)]))

    def sample_with_logprob(self, logits: np.ndarray | TopLogits) -> tuple[int, float]:
        """The next token id, and its log-probability by the model's own logits; as `sample` otherwise."""
        own = log_softmax(logits.all() if isinstance(logits, TopLogits) else logits)  # before the penalty overwrites it
        token = self.sample(logits)
        return token, float(own[token])

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

    def _allows(self, token: int) -> bool:
        return self._guide is None or self._guide.allows(token)

    def _see(self, token: int) -> int:
        if self._guide is not None:
            self._guide.accept(token)
        if self._seen is not None and token not in self._seen:
            self._seen.add(token)
            self._seen_ids = np.append(self._seen_ids, token)
        return token

    def _draw(self, logits: np.ndarray) -> int:
        ids, probabilities = nucleus(logits, self.sampling.temperature, self.sampling.top_p)
        cumulative = np.cumsum(probabilities)
        position = int(np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right"))
        return int(ids[min(position, len(ids) - 1)])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in nats, float64, by the model alone: no penalty, temperature or top-p.

    Parameters
    ----------
    logits : (..., vocab) float32 array
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


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
