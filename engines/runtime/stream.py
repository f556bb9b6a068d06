"""One request to a decoder: what it asks for, its tokens in, chunks of text out."""

from __future__ import annotations

import bisect
import time
import uuid
from dataclasses import dataclass, field

import numpy as np

from cxr_triton.alternatives import Scoring, alternatives
from cxr_triton.engines.runtime.guide import Guide
from cxr_triton.engines.runtime.sampler import Sampler
from cxr_triton.engines.runtime.scores import Scorer
from cxr_triton.errors import InvalidRequest
from cxr_triton.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One request to the decoder.

    Parameters
    ----------
    input_ids : (S,) int64 array
        Prompt with its image pads expanded.
    position_ids : (3, S) int64 array
        M-RoPE time, height and width.
    image_index : (S,) int64 array
        Row of `image_embeddings` for each token, or -1 for text.
    image_embeddings : (N, hidden) float32 array
        N may be 0.
    sampling : Sampling
    scoring : Scoring, optional
        What of the answer is scored once it is written; see `cxr_triton.engines.runtime.scores`.

    Raises
    ------
    InvalidRequest
        Shapes do not agree, `image_index` points outside `image_embeddings`, or a row that it names is not finite.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    image_index: np.ndarray
    image_embeddings: np.ndarray
    sampling: Sampling
    scoring: Scoring | None = None

    def __post_init__(self):
        tokens = len(self.input_ids)
        if self.input_ids.shape != (tokens,) or tokens == 0:
            raise InvalidRequest(f"input_ids has shape {self.input_ids.shape}, must be (S,) with S at least 1")
        if self.position_ids.shape != (3, tokens):
            raise InvalidRequest(f"position_ids has shape {self.position_ids.shape}, must be (3, {tokens})")
        if self.image_index.shape != (tokens,):
            raise InvalidRequest(f"image_index has shape {self.image_index.shape}, must be ({tokens},)")
        if self.image_embeddings.ndim != 2:
            raise InvalidRequest(f"image_embeddings has shape {self.image_embeddings.shape}, must be (N, hidden)")
        if self.image_index.min() < -1 or self.image_index.max() >= len(self.image_embeddings):
            raise InvalidRequest(
                f"image_index runs from {self.image_index.min()} to {self.image_index.max()}, "
                f"must stay within -1 and {len(self.image_embeddings) - 1}, the last row of image_embeddings"
            )
        # Kernels of integers would make plausible numbers of them, and a cache keep them for whoever comes next.
        if not np.isfinite(self.image_embeddings[self.image_index[self.image_index >= 0]]).all():
            raise InvalidRequest("image_embeddings holds values that are not finite; the vision encoder failed")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """How a stream ended.

    Attributes
    ----------
    text : str
        The whole answer.
    finish_reason : str
        ``stop`` (end-of-sequence token or stop string), ``length`` or ``cancelled``.
    usage : dict of str to int
        ``prompt_tokens`` (image tokens included), ``completion_tokens``, ``image_tokens``, and where prompts are reused
        ``cached_tokens``: those of the prompt that were not computed again. ``scored_tokens``, where the answer was
        scored: those of the lists that it was compared with.
    timings_ms : dict of str to float
        ``queue``, ``prefill``, ``decode``, ``time_to_first_token``, ``total``; phases not reached are 0. ``scores``
        where the answer was scored.
    token_logprobs : tuple of float
        Of every token, the one that ended the answer included, where they were asked for; in nats, see
        `cxr_triton.engines.runtime.sampler.log_softmax`.
    token_ends : tuple of int
        Where in `text` each of them ends, in characters; a character counts where its last byte does.
    scores : dict of str to float
        By label or option, where they were asked for and can be told; see `cxr_triton.engines.runtime.scores`.
    """

    text: str
    finish_reason: str
    usage: dict[str, int]
    timings_ms: dict[str, float]
    token_logprobs: tuple[float, ...] = ()
    token_ends: tuple[int, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Chunk:
    """What a stream gives its caller; the last one holds a completion or an error.

    Attributes
    ----------
    text : str
        Text since the last chunk; empty in a heartbeat.
    token_ids : (n,) int32 array
        Tokens since the last chunk.
    completion : Completion, optional
    error : Exception, optional
    """

    text: str = ""
    token_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    completion: Completion | None = None
    error: Exception | None = None


class Stream:
    """A request on its way through queue, prefill and decode: its tokens in, chunks of text out."""

    def __init__(
        self,
        generation: Generation,
        on_chunk,
        is_cancelled,
        detokenizer,
        max_new_tokens: int,
        *,
        guide: Guide | None = None,
    ):
        self.id = f"s{uuid.uuid4().hex}"  # a letter first: leading digits may be taken for a number
        self.generation = generation
        self.on_chunk = on_chunk
        self.is_cancelled = is_cancelled
        self.cancelled = False
        self.max_new_tokens = max_new_tokens
        self.sampler = Sampler(generation.sampling, generation.input_ids, guide)
        self.next_position = int(generation.position_ids.max()) + 1
        self.prefilled = 0  # prompt tokens in the cache
        self.cached: int | None = None  # of them, those that an earlier request had computed, where that is known
        self.answer: list[int] = []
        self.generated = 0
        self.last_token = -1
        self.finish_reason: str | None = None
        self.submitted_s = self.sent_s = time.monotonic()
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.unsent_since_s = 0.0
        self.token_ends: list[int] = []  # where each token's text ends, in characters
        self._are_whole: list[bool] = []  # whether a character ends where a token does
        self.scorer: Scorer | None = None  # of an answer that is written
        self.scoring_since_s: float | None = None
        self.scores: dict[str, float] = {}
        self._logprobs: list[float] = []
        self._detokenizer = detokenizer
        self._sent_text: list[str] = []
        self._text = ""  # decoded, not sent
        self._token_ids: list[int] = []  # not sent

    @property
    def unsent(self) -> int:
        """Tokens that no chunk has held yet."""
        return len(self._token_ids)

    @property
    def whole(self) -> str:
        """The text so far."""
        return "".join(self._sent_text) + self._text

    def accept(self, token: int, now_s: float, logprob: float | None = None) -> None:
        """Take the token that was sampled: extend the text, and set `finish_reason` if it ends the stream."""
        sampling = self.generation.sampling
        if self.first_token_s is None:
            self.first_token_s = now_s
        if not self._token_ids:
            self.unsent_since_s = now_s
        self._token_ids.append(token)
        self.answer.append(token)
        self.last_token = token
        self.generated += 1
        if logprob is not None:
            self._logprobs.append(logprob)
        self.token_ends.append(self.token_ends[-1] if self.token_ends else 0)
        if token in sampling.eos_token_ids:
            self.finish_reason = "stop"
        else:
            text = self._detokenizer.push([token])
            self._text += text
            self.token_ends[-1] += len(text)
            if self.generated == self.max_new_tokens:
                self.finish_reason = "length"
        self._are_whole.append(self._detokenizer.is_whole)
        if self.finish_reason:
            self._text += self._detokenizer.finish()
        if (cut := first_stop(self._text, sampling.stop)) is not None:
            self._text, self.finish_reason = self._text[:cut], "stop"

    def take(self) -> Chunk:
        """What was decoded since the last chunk, less what may be the start of a stop string."""
        held = 0 if self.finish_reason else held_back(self._text, self.generation.sampling.stop)
        split = len(self._text) - held
        chunk = Chunk(text=self._text[:split], token_ids=np.array(self._token_ids, np.int32))
        self._text, self._token_ids = self._text[split:], []
        self._sent_text.append(chunk.text)
        return chunk

    def complete(self, finish_reason: str) -> Chunk:
        """The last chunk."""
        self.finish_reason = finish_reason
        chunk = self.take()
        now_s, text = time.monotonic(), self.whole
        started_s = self.started_s or now_s
        first_token_s = self.first_token_s or now_s
        written_s = self.scoring_since_s or now_s
        seconds = {
            "queue": started_s - self.submitted_s,
            "prefill": first_token_s - started_s,
            "decode": written_s - first_token_s,
            **({} if self.scoring_since_s is None else {"scores": now_s - written_s}),
            "time_to_first_token": first_token_s - self.submitted_s if self.first_token_s else 0.0,
            "total": now_s - self.submitted_s,
        }
        chunk.completion = Completion(
            text=text,
            finish_reason=finish_reason,
            usage={
                "prompt_tokens": len(self.generation.input_ids),
                "completion_tokens": self.generated,
                "image_tokens": int((self.generation.image_index >= 0).sum()),
                **({} if self.cached is None else {"cached_tokens": self.cached}),
                **({"scored_tokens": self.scorer.tokens} if self.scorer else {}),
            },
            timings_ms={phase: round(1e3 * value, 3) for phase, value in seconds.items()},
            token_logprobs=tuple(round(value, 4) for value in self._logprobs),
            token_ends=self._ends_within(len(text)) if self._logprobs else (),
            scores={name: round(value, 4) for name, value in self.scores.items()},
        )
        return chunk

    def begin_scoring(self, tokenizer, max_sequence: int) -> None:
        """Set `scorer`, where the answer has something that can be scored; it has ended by itself."""
        self.scoring_since_s = time.monotonic()
        generation, text, ends = self.generation, self.whole, self.token_ends
        if generation.scoring is None or (found := alternatives(text, generation.scoring)) is None:
            return
        kept = bisect.bisect_right(ends, found.start)  # tokens of the answer before the list
        while kept and not self._are_whole[kept - 1]:  # it has the first bytes of the list
            kept -= 1
        bridge = text[ends[kept - 1] if kept else 0 : found.start]
        if "\ufffd" in bridge + found.texts[0]:
            return  # bytes that are no text cannot be written again
        if found.has_end and self.last_token not in generation.sampling.eos_token_ids:
            return  # a stop string cut it
        end = self.answer[-1:] if found.has_end else []
        made = Scorer(
            found,
            [(*tokenizer.text_ids(bridge + each), *end) for each in found.texts],
            last=([int(generation.input_ids[-1]), *self.answer])[kept],
            length=len(generation.input_ids) - 1 + kept,
            position=int(generation.position_ids.max()) + kept,
        )
        if made.longest < max_sequence:  # a step of other streams writes one token more
            self.scorer = made

    def _ends_within(self, length: int) -> tuple[int, ...]:
        """`token_ends` of a text that a stop string may have cut; the last token has what was left of a character."""
        ends = [min(end, length) for end in self.token_ends]
        return (*ends[:-1], length)


def first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first stop string begins in `text`."""
    return min((cut for cut in map(text.find, stop) if cut >= 0), default=None)


def held_back(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which a stop string may begin."""
    longest = max((len(string) for string in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-length:]) for string in stop):
            return length
    return 0
