"""vLLM as the gate drives it: the engine that serves, which takes forced answers too."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from cxr_triton.chat import ChatTokenizer
from cxr_triton.engines.runtime.judged import JudgedDecoder
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.vllm.options import adapter, arguments
from cxr_triton.engines.vllm.process import EngineProcess, LogitsListener
from cxr_triton.engines.vllm.request import message
from cxr_triton.engines.vllm.runtime import VLLMRuntime
from cxr_triton.errors import CxrError, InternalError


class JudgedVLLM(JudgedDecoder):
    """Of a bundle.

    Parameters
    ----------
    bundle : Bundle
    slots : int
    threads : int or None
    """

    def __init__(self, bundle, slots: int, threads: int | None):
        self.slots, self._bundle = slots, bundle
        self._process = EngineProcess(
            arguments(bundle, slots, {}), threads=threads, adapter=adapter(bundle), judges=True
        )

    def runtime(self, queue_size: int) -> VLLMRuntime:
        """See `JudgedDecoder.runtime`."""
        tokenizer = ChatTokenizer(self._bundle.path)
        lent = _Lent(self._process)
        return VLLMRuntime(self._bundle.geometry, lent, tokenizer, slots=self.slots, queue_size=queue_size)

    def forced(self, prompts: Sequence[Generation], answers: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `JudgedDecoder.forced`."""
        heard = []
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            asked, rows = message(prompt, self._bundle.geometry)
            asked["sampling"] = {"temperature": 0.0, "max_tokens": len(answer)}
            heard.append(_Heard())
            self._process.start(f"forced-{number}", (asked | {"forced": answer.tolist()}, rows), heard[-1])
        return [each.result() for each in heard]

    def close(self) -> None:
        """End the engine's process."""
        self._process.close()


class _Lent:
    """A process that outlives the runtime that it is lent to."""

    def __init__(self, process: EngineProcess):
        self.start, self.stop, self.check = process.start, process.stop, process.check

    def close(self) -> None:
        """Leave it to its owner."""


class _Heard(LogitsListener):
    def __init__(self):
        self._ended, self._error = threading.Event(), None

    def __call__(self, request_id: str, token_ids: np.ndarray, is_last: bool, error: CxrError | None) -> None:
        if is_last:
            self._error = error
            self._ended.set()

    def result(self) -> np.ndarray:
        self._ended.wait()
        if self._error:
            raise self._error
        if self.logits is None:
            raise InternalError("the engine gave no logits for a forced answer; see its log")
        return self.logits
