"""A decoder as the gate drives it: readings through its runtime, and the logits of given answers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.runtime.scheduler import DecoderRuntime, Runtime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.session import DecoderSession

if TYPE_CHECKING:
    from cxr_triton.engines.runtime.guide import Guides


class JudgedDecoder:
    """What an engine gives the gate.

    Attributes
    ----------
    slots : int
        Sequences that it decodes together.
    """

    slots: int

    def runtime(self, queue_size: int) -> contextlib.AbstractContextManager[Runtime]:
        """What serves generations, for as long as the context lasts."""
        raise NotImplementedError

    def forced(self, prompts: Sequence[Generation], answers: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Logits with which each token of given answers is predicted: prefill, then one step a token, as in serving.

        The last answer is written alone, the others together: an engine may run the two by other kernels.

        Parameters
        ----------
        prompts : sequence of Generation
            At most `slots`; how they are sampled does not matter.
        answers : sequence of (A,) int64 array

        Returns
        -------
        list of (A, vocab) float32 array
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the engine."""


class JudgedSession(JudgedDecoder):
    """Of a decoder session.

    Parameters
    ----------
    bundle : Bundle
    session : DecoderSession
    """

    def __init__(self, bundle, session: DecoderSession):
        self.slots = session.slots
        self._bundle, self._session = bundle, session

    def runtime(self, queue_size: int) -> contextlib.AbstractContextManager[Runtime]:
        """See `JudgedDecoder.runtime`."""
        return DecoderRuntime(self._bundle, session=self._session, guides=self._guides, queue_size=queue_size)

    @functools.cached_property
    def _guides(self) -> Guides:
        from cxr_triton.engines.runtime.guide import Guides

        return Guides(self._bundle)

    def forced(self, prompts: Sequence[Generation], answers: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `JudgedDecoder.forced`."""
        return [*self._together(prompts[:-1], answers[:-1]), *self._together(prompts[-1:], answers[-1:])]

    def _together(self, prompts: Sequence[Generation], answers: Sequence[np.ndarray]) -> list[np.ndarray]:
        # The longest first: a step runs the first slots, so the answers that still go on have to be these.
        order = sorted(range(len(answers)), key=lambda i: -len(answers[i]))
        session = self._session
        results = [np.empty((len(ids), session.vocab), np.float32) for ids in answers]
        try:
            for slot, i in enumerate(order):
                prompt = prompts[i]
                inputs = prompt.input_ids, prompt.image_index, prompt.image_embeddings, prompt.position_ids
                results[i][0] = session.prefill(slot, *inputs, is_last=True)
            for t in range(1, max(map(len, answers), default=0)):
                active = [i for i in order if len(answers[i]) > t]
                tokens = np.array([answers[i][t - 1] for i in active], np.int64)
                positions = np.array([int(prompts[i].position_ids.max()) + t for i in active], np.int64)
                for row, i in zip(session.step(tokens, positions), active, strict=True):
                    results[i][t] = row
        finally:
            for slot in range(self.slots):
                session.free(slot)
        return results
