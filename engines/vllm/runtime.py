"""Streams of a decoder that vLLM batches."""

from __future__ import annotations

import os
import signal
import time

from cxr_triton.engines.geometry import Geometry
from cxr_triton.engines.runtime.remote import RemoteRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.vllm.request import message

DEATH_S = 1.0


class VLLMRuntime(RemoteRuntime):
    """Serves many generations through vLLM.

    Parameters
    ----------
    geometry : Geometry
    backend : EngineProcess
        Or its like; closed with the runtime.
    tokenizer : ChatTokenizer
    slots : int
        Streams in the engine at the same time.
    queue_size, **pace
        As `Runtime`.
    """

    def __init__(self, geometry: Geometry, backend, tokenizer, *, slots: int, queue_size: int, **pace: float):
        self._geometry, self._check = geometry, backend.check
        super().__init__(
            backend,
            tokenizer,
            slots=slots,
            vocab=geometry.vocab,
            hidden=geometry.hidden,
            max_sequence=geometry.max_sequence,
            queue_size=queue_size,
            **pace,
        )

    def submit(self, generation: Generation, on_chunk, is_cancelled=None) -> str:
        """Queue a generation; as `Runtime.submit`, which an engine that died refuses with `Unavailable`."""
        self._check()
        return super().submit(generation, on_chunk, is_cancelled)

    def _guide(self, grammar: str) -> None:
        """The engine follows it."""

    def _request(self, generation: Generation):
        return message(generation, self._geometry)


def end_soon() -> None:
    """End this process: a decoder without its engine reads nothing, and whoever started the server has to know.

    Its streams heard of it; they get a moment in which that goes out.
    """
    time.sleep(DEATH_S)
    os.kill(os.getpid(), signal.SIGKILL)
