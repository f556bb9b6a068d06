"""Streams over an engine that schedules and samples by itself: what `DecoderRuntime` is to a session.

Requests wait for one of its slots, its tokens become text, stop strings cut, and streams that nobody wants any more are
stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from cxr_triton.engines.runtime.scheduler import Runtime
from cxr_triton.engines.runtime.stream import Generation, Stream
from cxr_triton.errors import CxrError, InternalError

log = logging.getLogger(__name__)
POLL_S = 0.05  # between two looks for cancelled streams when the engine says nothing
Listener = Callable[[str, np.ndarray, bool, CxrError | None], None]
"""Called with a stream's id, (n,) int32 tokens since the last call, whether they are the last, and why it failed."""


class Backend(Protocol):
    """The engine, as a runtime talks to it; closed with the runtime."""

    def start(self, request_id: str, request, listener: Listener) -> None:
        """Send a request; `listener`, which must not block, hears of it on a thread of the backend."""

    def stop(self, request_id: str) -> None:
        """Cancel a request; the listener hears of its end. One that has ended is ignored."""

    def close(self) -> None:
        """Drop what runs."""


class RemoteRuntime(Runtime):
    """Serves many generations through an engine's own scheduler.

    Parameters
    ----------
    backend : Backend
    tokenizer : ChatTokenizer
    slots : int
        Streams in the engine at the same time.
    **options
        As `Runtime`.

    Attributes
    ----------
    gives_end_token : bool
        The engine's tokens hold the one that ended the answer.
    """

    gives_end_token = True

    def __init__(self, backend: Backend, tokenizer, *, slots: int, **options):
        self._backend, self._slots = backend, slots
        self._running: dict[str, Stream] = {}  # in the engine, also those that it has yet to stop
        self._outputs: list[tuple[str, np.ndarray, bool, CxrError | None]] = []  # guarded by _wake
        super().__init__(tokenizer, **options)

    def _request(self, generation: Generation):
        """What the backend takes for a generation; raises `CxrError`."""
        raise NotImplementedError

    def _hear(self, stream_id: str, token_ids: np.ndarray, is_last: bool, error: CxrError | None) -> None:
        """An output of the engine, on a thread of the backend."""
        with self._wake:
            self._outputs.append((stream_id, token_ids, is_last, error))
            self._wake.notify()

    # Everything below runs in the scheduler thread.

    def _wait(self) -> bool:
        with self._wake:
            if not (self._closing or self._outputs or (self._waiting and len(self._running) < self._slots)):
                self._wake.wait(self._pause_s() if self._streams else None)
            return not self._closing

    def _pause_s(self) -> float:
        """Time to the next chunk that is due, or to the next look for cancelled streams."""
        now_s = time.monotonic()
        due = [stream.unsent_since_s + self._coalesce_s - now_s for stream in self._running.values() if stream.unsent]
        return max(0.0, min([POLL_S, *due]))

    def _turn(self) -> None:
        with self._wake:
            outputs, self._outputs = self._outputs, []
        for output in outputs:
            self._take(*output)
        self._admit()
        for stream in list(self._running.values()):
            if stream.unsent:
                self._emit(stream)

    def _take(self, stream_id: str, token_ids: np.ndarray, is_last: bool, error: CxrError | None) -> None:
        """Tokens of a stream. What the engine still says of one that has ended for its caller is dropped."""
        stream = (self._running.pop if is_last else self._running.get)(stream_id, None)
        if stream is None or stream_id not in self._streams:
            return
        if error:
            self._refuse(stream, error)
            return
        try:
            self._accept(stream, token_ids, is_last)
        except Exception:
            self._fail([stream], "the tokens")
            return
        self._emit(stream)

    def _accept(self, stream: Stream, token_ids: np.ndarray, is_last: bool) -> None:
        now_s = time.monotonic()
        for token in token_ids.tolist():
            stream.accept(token, now_s)
            if stream.finish_reason:
                return
        if not is_last:
            return
        if (ends := stream.generation.sampling.eos_token_ids) and not self.gives_end_token:
            stream.accept(ends[0], now_s)
            return
        log.error("the engine ended a stream after %d of %d tokens", stream.generated, stream.max_new_tokens)
        self._refuse(stream, InternalError("the engine ended the answer early; see the server's log"))

    def _admit(self) -> None:
        while len(self._running) < self._slots:
            with self._wake:
                if not self._waiting:
                    return
                stream = self._waiting.popleft()
            stream.started_s = time.monotonic()
            try:
                request = self._request(stream.generation)
                self._running[stream.id] = stream
                self._backend.start(stream.id, request, self._hear)
            except Exception as error:
                log.exception("a request did not reach the engine")
                self._running.pop(stream.id, None)
                if not isinstance(error, CxrError):
                    error = InternalError("the engine was not reached; see the server's log")
                self._refuse(stream, error)

    def _silent(self) -> list[Stream]:
        """All of them: Triton tells that a caller left when something is sent to it, and an engine may fall silent."""
        return [stream for stream in self._running.values() if stream.id in self._streams]

    def _release(self, stream: Stream) -> None:
        """Have the engine stop; its slot is free when it says so."""
        if stream.id in self._running:
            try:
                self._backend.stop(stream.id)
            except Exception:
                log.exception(
                    "stream %s was not stopped; its slot is free when the engine has written its answer", stream.id
                )

    def _end(self) -> None:
        self._running.clear()
        self._backend.close()
