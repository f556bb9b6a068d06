"""Continuous batching of streams: prompts in, coalesced chunks of text out.

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
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from cxr_triton.engines.runtime.drafts import NONE, Drafts
from cxr_triton.engines.runtime.guide import Guide, Guides
from cxr_triton.engines.runtime.prefix import PrefixCache, run_end
from cxr_triton.engines.runtime.stream import Chunk, Generation, Stream
from cxr_triton.errors import CxrError, InternalError, InvalidRequest, PromptTooLong, QueueFull, Unavailable

log = logging.getLogger(__name__)
_NO_GUIDE = "the engine of this server follows no grammar; leave guide out, and choose a mode without one"


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
    coalesce_tokens, coalesce_ms : float
        A chunk is sent when it holds so many tokens, or would be older than this after another step. The first token
        is sent at once.
    heartbeat_ms : float
        Silence after which a stream that waits, is in prefill, or has an engine that says nothing gets an empty chunk.

    Attributes
    ----------
    steps : int or None
        Decode steps made so far; None where the engine does not tell.
    prefix : PrefixCache or None
        What prompts that begin alike share; None where nothing is, or the engine does not tell.
    gives : frozenset of str
        ``logprobs``, ``scores``: what a request may ask for beside its answer.
    drafts : Drafts or None
        What guesses tokens; None where nothing does, or the engine does not tell.
    """

    steps: int | None = None
    prefix: PrefixCache | None = None
    gives: frozenset[str] = frozenset()
    drafts: Drafts | None = None

    def __init__(
        self,
        tokenizer,
        *,
        vocab: int,
        hidden: int,
        max_sequence: int,
        queue_size: int,
        coalesce_tokens: float = 8,
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
            Token ids outside the vocabulary, embeddings of another width, a guide that is not taken, or something asked
            for that the engine does not give.
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
        asked = {"logprobs": generation.sampling.logprobs, "scores": generation.scoring is not None}
        for key, is_asked in asked.items():
            if is_asked and key not in self.gives:
                raise InvalidRequest(
                    f"REQUEST.{key}: the engine behind this server gives none; leave it out, or serve a bundle of "
                    "another engine"
                )
        limit = min(generation.sampling.max_new_tokens, context - prompt)
        guide = self._guide(generation.sampling.guide) if generation.sampling.guide else None
        stream = Stream(generation, on_chunk, is_cancelled, self._tokenizer.stream(), limit, guide=guide)
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

    def _guide(self, grammar: str) -> Guide | None:
        """What a stream's own tokens follow; None where the engine sees to it."""
        raise InvalidRequest(f"REQUEST.guide: {_NO_GUIDE}")

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
        """Streams that get a heartbeat: in prefill, or with an engine that says nothing."""
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
        Most prompt tokens per turn, so the longest pause of the running streams; what the session asks for, or 128.
        It is the same whatever else runs: the numbers that a prompt gives must not depend on its neighbours.
    threads : int, optional
        CPU threads of the session; all cores if None.
    session : DecoderSession, optional
        Used instead of one on the bundle.
    tokenizer : ChatTokenizer, optional
        Used instead of the bundle's.
    prefix : PrefixCache, optional
        What prompts that begin alike share; each is computed as a whole without.
    guides : Guides, optional
        Of the bundle's tokens; none is taken without.
    drafts : Drafts, optional
        Guesses tokens, which a step then checks, where the session can.
    queue_size, coalesce_tokens, coalesce_ms, heartbeat_ms
        As in `Runtime`.
    """

    steps: int = 0
    gives = frozenset({"logprobs", "scores"})

    def __init__(
        self,
        bundle,
        *,
        slots: int = 4,
        prefill_chunk: int | None = None,
        threads: int | None = None,
        session=None,
        tokenizer=None,
        prefix: PrefixCache | None = None,
        guides: Guides | None = None,
        drafts: Drafts | None = None,
        queue_size: int = 64,
        **pace: float,
    ):
        if session is None:
            session = bundle.open_decoder(slots=slots, threads=threads)
        if tokenizer is None:
            from cxr_triton.chat import ChatTokenizer

            tokenizer = ChatTokenizer(bundle.path)
        self.prefix = prefix
        self._guides = guides
        self._session = session
        self._step = getattr(session, "step_top", session.step)
        self._slots = session.slots
        self._checks: int = getattr(session, "checks", 0)
        self.drafts = drafts if self._checks else None
        self._prefill_chunk: int = prefill_chunk if prefill_chunk else getattr(session, "prefill_chunk", 128)
        self._prefilling: Stream | None = None
        self._decoding: list[Stream] = []
        super().__init__(
            tokenizer,
            vocab=session.vocab,
            hidden=session.hidden,
            max_sequence=session.max_sequence,
            queue_size=queue_size,
            **pace,
        )

    def _guide(self, grammar: str) -> Guide | None:
        return self._guides.guide(grammar) if self._guides else super()._guide(grammar)

    # Everything below runs in the scheduler thread.

    def _wait(self) -> bool:
        with self._wake:
            while not (self._closing or self._waiting or self._prefilling or self._decoding):
                self._wake.wait()
            return not self._closing

    def _turn(self) -> None:
        self._admit()
        self._prefill()
        self._score()
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
        generation, slot = stream.generation, len(self._decoding)
        if self.prefix and not stream.prefilled:
            stream.prefilled = stream.cached = self.prefix.restore(self._session, slot, stream, self._prefill_chunk)
        chunk = slice(stream.prefilled, run_end(generation, stream.prefilled, self._prefill_chunk))
        is_last = chunk.stop == len(generation.input_ids)
        try:
            logits = self._session.prefill(
                slot,
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
            if self.prefix and stream in self._decoding:
                self.prefix.keep(self._session, self._decoding.index(stream), stream)

    def _decode(self) -> None:
        """One step for every stream that decodes, with tokens that were guessed where that should be worth it."""
        streams = list(self._decoding)
        if all(stream.scorer for stream in streams):
            return
        started_s = time.monotonic()
        can_check = len(streams) <= self._checks and not any(stream.scorer for stream in streams)
        drafts = self.drafts if can_check else None
        held = self._session.lengths[: len(streams)].tolist()
        guesses = drafts.propose(streams, self._max_sequence - max(held)) if drafts else None
        try:
            logits = self._logits(streams, guesses)
        except Exception:
            self._fail(streams, "a step")
            return
        self.steps += 1
        for row, stream in enumerate(streams):
            if stream.scorer:
                self._session.lengths[row] = held[row]  # nobody needs what the step wrote there
        if drafts:
            width = 1 if guesses is None else 1 + guesses.shape[1]
            drafts.took(len(streams), width, time.monotonic() - started_s)
        stepped = [(row, stream) for row, stream in enumerate(streams) if not stream.scorer]
        for row, stream in stepped:
            if guesses is None:
                stream.next_position += 1
                self._accept(stream, logits[row])
            else:
                self._take(stream, logits[row], guesses[row].tolist(), held[row])
        self._step_s = time.monotonic() - started_s
        for _, stream in stepped:
            self._emit(stream)

    def _logits(self, streams: list[Stream], guesses: np.ndarray | None) -> Sequence:
        """Logits after the last token of each stream, or after that and each guess [n, k]."""
        last = np.array([stream.last_token for stream in streams], np.int64)
        first = np.array([stream.next_position for stream in streams], np.int64)
        if guesses is None:
            return self._step(last, first)
        ids = np.column_stack([last, np.where(guesses == NONE, last[:, None], guesses)])
        return self._session.check(ids, first[:, None] + np.arange(ids.shape[1]))

    def _take(self, stream: Stream, rows: Sequence, guessed: list[int], held: int) -> None:
        """Sample a token, and while it was guessed the next one; a slot keeps nothing of what was guessed wrongly."""
        taken = 0
        for row, guess in zip(rows, [*guessed, NONE], strict=True):
            taken += 1
            stream.next_position += 1
            self._accept(stream, row)
            if stream not in self._decoding:
                return
            if stream.last_token != guess or stream.finish_reason:
                break
        self._session.shorten(self._decoding.index(stream), held + taken)
        if self.drafts:
            self.drafts.count(len(guessed) - guessed.count(NONE), taken - 1)

    def _pass_on(self, stream: Stream, finish_reason: str | None = None) -> None:
        """As `Runtime`'s; an answer that has ended by itself is scored first, where that is asked for.

        Its row stays where it is, and steps go over it: what they write there lies beyond what scores stand on.
        """
        is_asked = stream.generation.scoring is not None and not stream.scorer
        if finish_reason != "stop" or not is_asked:
            super()._pass_on(stream, finish_reason)
            return
        try:
            stream.begin_scoring(self._tokenizer, self._session.max_sequence)
        except Exception:
            self._fail([stream], "scoring")
            return
        super()._pass_on(stream, None if stream.scorer else finish_reason)

    def _score(self) -> None:
        """One run of the scores of one answer."""
        stream = next((stream for stream in self._decoding if stream.scorer), None)
        if stream is None or stream.scorer is None:
            return
        row, made = self._decoding.index(stream), stream.scorer
        try:
            if run := made.next():
                made.take(run, self._session.score(row, run.length, run.input_ids, run.positions))
                return
            stream.scores = made.scores()
        except Exception:
            self._fail([stream], "scoring")
            return
        self._session.lengths[row] = made.length  # what other lists wrote is not of this answer
        self._pass_on(stream, stream.finish_reason)

    def _accept(self, stream: Stream, logits: np.ndarray) -> None:
        sampler, logprob = stream.sampler, None
        try:
            if sampler.sampling.logprobs:
                token, logprob = sampler.sample_with_logprob(logits)
            else:
                token = sampler.sample(logits)
            stream.accept(token, time.monotonic(), logprob)
        except InvalidRequest as error:  # of its guide
            self._refuse(stream, error)
        except Exception:
            self._fail([stream], "sampling")

    def _silent(self) -> list[Stream]:
        scoring = [stream for stream in self._decoding if stream.scorer]
        return [self._prefilling, *scoring] if self._prefilling else scoring

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
        # While an answer is scored, its slot holds other lists.
        is_whole = stream.scorer is None or bool(stream.scores)
        if is_whole and stream.finish_reason in ("stop", "length"):
            if self.prefix:
                self.prefix.keep(self._session, row, stream)
            if self.drafts:
                self.drafts.keep(stream)
        last = self._decoding.pop()
        free = len(self._decoding)
        if last is not stream:
            self._decoding[row] = last
            self._session.move(free, row)
        if self._prefilling:
            self._session.move(free + 1, free)
            free += 1
        self._session.free(free)
