"""Streams of a decoder: prompts in, coalesced chunks of text out, and continuous batching over a session's slots.

`Runtime` queues, cancels and sends for whatever decodes. `DecoderRuntime` is the one over a decoder session: one thread
owns the session. Each turn it runs one chunk of one prompt, then one step for all streams that decode, so requests join
and leave between steps. The streams that decode hold the first rows of the cache, the one that is in prefill the row
after them; a row that becomes free is filled with the last one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cxr_triton.engines.runtime.sampler import Sampler
from cxr_triton.errors import CxrError, InternalError, InvalidRequest, PromptTooLong, QueueFull, Unavailable
from cxr_triton.sampling import Sampling

__all__ = ["Chunk", "Completion", "DecoderRuntime", "Generation", "Runtime", "Sampling"]

log = logging.getLogger(__name__)


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

    Raises
    ------
    InvalidRequest
        Shapes do not agree, or `image_index` points outside `image_embeddings`.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    image_index: np.ndarray
    image_embeddings: np.ndarray
    sampling: Sampling

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
        ``prompt_tokens`` (image tokens included), ``completion_tokens``, ``image_tokens``.
    timings_ms : dict of str to float
        ``queue``, ``prefill``, ``decode``, ``time_to_first_token``, ``total``; phases not reached are 0.
    """

    text: str
    finish_reason: str
    usage: dict[str, int]
    timings_ms: dict[str, float]


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
    error : CxrError, optional
    """

    text: str = ""
    token_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    completion: Completion | None = None
    error: CxrError | None = None


class Stream:
    """A request on its way through queue, prefill and decode: its tokens in, chunks of text out."""

    def __init__(self, generation: Generation, on_chunk, is_cancelled, detokenizer, max_new_tokens: int):
        self.id = f"s{uuid.uuid4().hex}"  # a letter first: TensorRT-LLM takes leading digits for a number
        self.generation = generation
        self.on_chunk = on_chunk
        self.is_cancelled = is_cancelled
        self.cancelled = False
        self.max_new_tokens = max_new_tokens
        self.sampler = Sampler(generation.sampling, generation.input_ids)
        self.next_position = int(generation.position_ids.max()) + 1
        self.prefilled = 0  # prompt tokens in the cache
        self.generated = 0
        self.last_token = -1
        self.finish_reason: str | None = None
        self.submitted_s = self.sent_s = time.monotonic()
        self.started_s = self.first_token_s = None
        self.unsent_since_s = 0.0
        self._detokenizer = detokenizer
        self._sent_text: list[str] = []
        self._text = ""  # decoded, not sent
        self._token_ids: list[int] = []  # not sent

    @property
    def unsent(self) -> int:
        return len(self._token_ids)

    def accept(self, token: int, now_s: float) -> None:
        """Take the token that was sampled: extend the text, and set `finish_reason` if it ends the stream."""
        sampling = self.generation.sampling
        if self.first_token_s is None:
            self.first_token_s = now_s
        if not self._token_ids:
            self.unsent_since_s = now_s
        self._token_ids.append(token)
        self.last_token = token
        self.generated += 1
        if token in sampling.eos_token_ids:
            self.finish_reason = "stop"
        else:
            self._text += self._detokenizer.push([token])
            if self.generated == self.max_new_tokens:
                self.finish_reason = "length"
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
        now_s = time.monotonic()
        started_s = self.started_s or now_s
        first_token_s = self.first_token_s or now_s
        seconds = {
            "queue": started_s - self.submitted_s,
            "prefill": first_token_s - started_s,
            "decode": now_s - first_token_s,
            "time_to_first_token": first_token_s - self.submitted_s if self.first_token_s else 0.0,
            "total": now_s - self.submitted_s,
        }
        chunk.completion = Completion(
            text="".join(self._sent_text),
            finish_reason=finish_reason,
            usage={
                "prompt_tokens": len(self.generation.input_ids),
                "completion_tokens": self.generated,
                "image_tokens": int((self.generation.image_index >= 0).sum()),
            },
            timings_ms={phase: round(1e3 * value, 3) for phase, value in seconds.items()},
        )
        return chunk


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


class Runtime:
    """Serves many generations; what decodes them, a subclass says.

    Parameters
    ----------
    tokenizer : ChatTokenizer
    vocab, hidden : int
        Ids that the decoder takes, and values of an image embedding.
    max_sequence : int
        Tokens of prompt and answer.
    queue_size : int
        Requests that may wait for a slot.
    coalesce_tokens, coalesce_ms : int, float
        A chunk is sent when it holds so many tokens, or would be older than this after another step. The first token
        is sent at once.
    heartbeat_ms : float
        Silence after which a stream that waits or is in prefill gets an empty chunk.

    Attributes
    ----------
    steps : int or None
        Decode steps made so far; None where the engine does not tell.
    """

    steps: int | None = None

    def __init__(
        self,
        tokenizer,
        *,
        vocab: int,
        hidden: int,
        max_sequence: int,
        queue_size: int,
        coalesce_tokens: int = 8,
        coalesce_ms: float = 30.0,
        heartbeat_ms: float = 500.0,
    ):
        self._tokenizer = tokenizer
        self._vocab, self._hidden, self._max_sequence = vocab, hidden, max_sequence
        self._queue_size = queue_size
        self._coalesce_tokens = coalesce_tokens
        self._coalesce_s = coalesce_ms / 1e3
        self._heartbeat_s = heartbeat_ms / 1e3
        self._step_s = 0.0  # of the last step: how long a chunk that is not sent now would still wait
        self._wake = threading.Condition()
        self._closing = False
        self._streams: dict[str, Stream] = {}  # guarded by _wake, as _waiting is
        self._waiting: deque[Stream] = deque()
        self._thread = threading.Thread(target=self._run, name="decoder-runtime", daemon=True)
        self._thread.start()

    def submit(
        self,
        generation: Generation,
        on_chunk: Callable[[Chunk], None],
        is_cancelled: Callable[[], bool] | None = None,
    ) -> str:
        """Queue a generation.

        Parameters
        ----------
        generation : Generation
        on_chunk : callable
            Called with each `Chunk` from the scheduler thread, so it must not block; the last chunk holds a completion
            or an error. If it raises, its stream ends and no other.
        is_cancelled : callable, optional
            Polled every step from the scheduler thread.

        Returns
        -------
        str
            Stream id, for `cancel`.

        Raises
        ------
        InvalidRequest
            Token ids outside the vocabulary, or embeddings of another width.
        PromptTooLong
            The prompt leaves no room for an answer.
        QueueFull
            `queue_size` requests wait already.
        Unavailable
            The runtime is closed.
        """
        ids, vocab, hidden = generation.input_ids, self._vocab, self._hidden
        if ids.min() < 0 or ids.max() >= vocab:
            raise InvalidRequest(f"input_ids run from {ids.min()} to {ids.max()}, must stay within 0 and {vocab - 1}")
        if generation.image_embeddings.shape[1] != hidden:
            width = generation.image_embeddings.shape[1]
            raise InvalidRequest(f"image_embeddings has rows of {width} values, this decoder takes {hidden}")
        prompt, context = len(ids), self._max_sequence
        if prompt >= context:
            raise PromptTooLong(
                f"the prompt has {prompt} tokens, the decoder's context holds {context} with at least 1 of the answer; "
                "shorten the prompt or the history, send fewer images, or export with a larger context"
            )
        limit = min(generation.sampling.max_new_tokens, context - prompt)
        stream = Stream(generation, on_chunk, is_cancelled, self._tokenizer.stream(), limit)
        with self._wake:
            if self._closing:
                raise Unavailable("the decoder is shut down; send the request again later")
            if len(self._waiting) >= self._queue_size:
                raise QueueFull(
                    f"{len(self._waiting)} requests wait for the decoder, {self._queue_size} may; retry later"
                )
            self._waiting.append(stream)
            self._streams[stream.id] = stream
            self._wake.notify()
        return stream.id

    def cancel(self, stream_id: str) -> None:
        """End a stream before the next step; an id that has ended already is ignored."""
        with self._wake:
            stream = self._streams.get(stream_id)
        if stream:
            stream.cancelled = True

    def close(self) -> None:
        """Fail what waits or runs with `Unavailable`, and join the scheduler thread. May be called twice."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # Everything below runs in the scheduler thread.

    def _run(self) -> None:
        error: CxrError = Unavailable("the decoder was shut down while it worked on the request; send it again later")
        try:
            while self._wait():
                self._drop_cancelled()
                self._turn()
                self._beat()
        except Exception:
            log.exception("the decoder's scheduler failed")
            error = InternalError("the decoder's scheduler failed; see the server's log, then restart the server")
        with self._wake:
            self._closing = True
            streams = list(self._streams.values())
            self._streams.clear()
            self._waiting.clear()
        self._end()
        for stream in streams:
            self._send(stream, Chunk(error=error))

    def _wait(self) -> bool:
        """Sleep until there is work; False when the runtime closes."""
        raise NotImplementedError

    def _turn(self) -> None:
        """Give waiting streams free slots, let the running ones go on, and `_emit` what they have."""
        raise NotImplementedError

    def _silent(self) -> list[Stream]:
        """Streams in prefill."""
        raise NotImplementedError

    def _release(self, stream: Stream) -> None:
        """Free what a stream that ends holds; it is not among `_streams` any more. Must not raise."""
        raise NotImplementedError

    def _end(self) -> None:
        """Let go of all running streams and of the engine."""
        raise NotImplementedError

    def _drop_cancelled(self) -> None:
        with self._wake:
            streams = list(self._streams.values())
        for stream in streams:
            if stream.cancelled or self._asks_to_cancel(stream):
                self._pass_on(stream, "cancelled")

    def _asks_to_cancel(self, stream: Stream) -> bool:
        try:
            return bool(stream.is_cancelled and stream.is_cancelled())
        except Exception:
            log.exception("the cancellation check of stream %s failed; the stream ends", stream.id)
            return True

    def _emit(self, stream: Stream) -> None:
        """Send what a stream has, if it ended, is due, or has just got its first token."""
        if stream.id not in self._streams:
            return  # sampling failed
        if (
            stream.finish_reason
            or stream.generated == 1
            or stream.unsent >= self._coalesce_tokens
            or time.monotonic() + self._step_s > stream.unsent_since_s + self._coalesce_s
        ):
            self._pass_on(stream, stream.finish_reason)

    def _pass_on(self, stream: Stream, finish_reason: str | None = None) -> None:
        """Send what a stream has decoded; with a reason it is the last chunk."""
        try:
            chunk = stream.complete(finish_reason) if finish_reason else stream.take()
        except Exception:
            self._fail([stream], "the text")
            return
        if finish_reason:
            self._leave(stream)
        self._send(stream, chunk)

    def _beat(self) -> None:
        with self._wake:
            silent = [*self._waiting]
        silent += self._silent()
        now_s = time.monotonic()
        for stream in silent:
            if now_s - stream.sent_s >= self._heartbeat_s:
                self._send(stream, Chunk())

    def _send(self, stream: Stream, chunk: Chunk) -> None:
        stream.sent_s = time.monotonic()
        try:
            stream.on_chunk(chunk)
        except Exception:
            log.exception("the receiver of stream %s failed; the stream ends", stream.id)
            self._leave(stream)

    def _fail(self, streams: list[Stream], phase: str) -> None:
        """End the streams that a failure touched; called where it was caught."""
        log.exception("the engine failed in %s of %d stream(s)", phase, len(streams))
        error = InternalError(f"the engine failed in {phase} of the request; see the server's log")
        for stream in streams:
            self._refuse(stream, error)

    def _refuse(self, stream: Stream, error: CxrError) -> None:
        if self._leave(stream):
            self._send(stream, Chunk(error=error))

    def _leave(self, stream: Stream) -> bool:
        """Forget a stream; False when it had left before."""
        with self._wake:
            if self._streams.pop(stream.id, None) is None:
                return False
            if stream in self._waiting:
                self._waiting.remove(stream)
                return True
        self._release(stream)
        return True


class DecoderRuntime(Runtime):
    """Serves many generations from one decoder session.

    Parameters
    ----------
    bundle : Bundle
        Engine bundle; its folder holds the tokenizer.
    slots : int
        Streams that decode at the same time.
    prefill_chunk : int, optional
        Prompt tokens per turn, so the longest pause of the running streams; what the session asks for, or 128. It is
        the same whatever else runs: the numbers that a prompt gives must not depend on its neighbours.
    threads : int, optional
        CPU threads of the session; all cores if None.
    session : DecoderSession, optional
        Used instead of one on the bundle.
    tokenizer : ChatTokenizer, optional
        Used instead of the bundle's.
    queue_size, coalesce_tokens, coalesce_ms, heartbeat_ms
        As in `Runtime`.
    """

    def __init__(
        self,
        bundle,
        *,
        slots: int = 4,
        prefill_chunk: int | None = None,
        threads: int | None = None,
        session=None,
        tokenizer=None,
        queue_size: int = 64,
        **pace: float,
    ):
        if session is None:
            session = bundle.open_decoder(slots=slots, threads=threads)
        if tokenizer is None:
            from cxr_triton.chat import ChatTokenizer

            tokenizer = ChatTokenizer(bundle.path)
        self._session = session
        self._step = getattr(session, "step_top", session.step)
        self._slots = session.slots
        self._prefill_chunk = prefill_chunk or getattr(session, "prefill_chunk", 128)
        self._prefilling: Stream | None = None
        self._decoding: list[Stream] = []
        self.steps = 0
        sizes = {"vocab": session.vocab, "hidden": session.hidden, "max_sequence": session.max_sequence}
        super().__init__(tokenizer, **sizes, queue_size=queue_size, **pace)

    # Everything below runs in the scheduler thread.

    def _wait(self) -> bool:
        with self._wake:
            while not (self._closing or self._waiting or self._prefilling or self._decoding):
                self._wake.wait()
            return not self._closing

    def _turn(self) -> None:
        self._admit()
        self._prefill()
        self._decode()

    def _end(self) -> None:
        self._prefilling, self._decoding = None, []

    def _admit(self) -> None:
        if self._prefilling or len(self._decoding) >= self._slots:
            return
        with self._wake:
            if self._waiting:
                self._prefilling = self._waiting.popleft()
                self._prefilling.started_s = time.monotonic()

    def _prefill(self) -> None:
        """One chunk of the prompt that is in prefill; after the last one the stream decodes."""
        stream = self._prefilling
        if stream is None:
            return
        for running in list(self._decoding):
            if running.unsent:
                self._pass_on(running)
        if self._prefilling is not stream:
            return  # the engine failed as one of them left
        generation = stream.generation
        chunk = slice(stream.prefilled, stream.prefilled + self._prefill_chunk)
        is_last = chunk.stop >= len(generation.input_ids)
        try:
            logits = self._session.prefill(
                len(self._decoding),
                generation.input_ids[chunk],
                generation.image_index[chunk],
                generation.image_embeddings,
                generation.position_ids[:, chunk],
                is_last=is_last,
            )
        except Exception:
            self._fail([stream], "prefill")
            return
        stream.prefilled = chunk.stop
        if is_last:
            self._prefilling = None
            self._decoding.append(stream)
            self._accept(stream, logits)
            self._emit(stream)

    def _decode(self) -> None:
        """One step for every stream that decodes."""
        streams = list(self._decoding)
        if not streams:
            return
        started_s = time.monotonic()
        try:
            logits = self._step(
                np.array([stream.last_token for stream in streams], np.int64),
                np.array([stream.next_position for stream in streams], np.int64),
            )
        except Exception:
            self._fail(streams, "a step")
            return
        self.steps += 1
        for stream, row in zip(streams, logits, strict=True):
            stream.next_position += 1
            self._accept(stream, row)
        self._step_s = time.monotonic() - started_s
        for stream in streams:
            self._emit(stream)

    def _accept(self, stream: Stream, logits: np.ndarray) -> None:
        try:
            stream.accept(stream.sampler.sample(logits), time.monotonic())
        except Exception:
            self._fail([stream], "sampling")

    def _silent(self) -> list[Stream]:
        return [self._prefilling] if self._prefilling else []

    def _release(self, stream: Stream) -> None:
        try:
            self._vacate(stream)
        except Exception:  # nobody's row can be trusted
            self._fail([*self._decoding, *self._silent()], "freeing a slot")
            for slot in range(self._slots):
                with contextlib.suppress(Exception):
                    self._session.free(slot)

    def _vacate(self, stream: Stream) -> None:
        """Keep the active rows of the cache the first ones."""
        if stream is self._prefilling:
            self._prefilling = None
            self._session.free(len(self._decoding))
            return
        row = self._decoding.index(stream)
        last = self._decoding.pop()
        free = len(self._decoding)
        if last is not stream:
            self._decoding[row] = last
            self._session.move(free, row)
        if self._prefilling:
            self._session.move(free + 1, free)
            free += 1
        self._session.free(free)
