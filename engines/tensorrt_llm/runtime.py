"""Streams of a decoder that TensorRT-LLM's C++ backend batches in flight."""

from __future__ import annotations

from cxr_triton.engines.runtime.remote import RemoteRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.tensorrt_llm.request import EngineConfig, check_request, request_tensors


class TensorRTLLMRuntime(RemoteRuntime):
    """Serves many generations through the served model `tensorrt_llm`.

    Parameters
    ----------
    config : EngineConfig
    backend : TensorRTLLMBackend
        Or its like; closed with the runtime.
    tokenizer : ChatTokenizer
    slots : int, optional
        Streams in the engine at the same time; all that it was built for if None.
    prefix_reuse : bool
        See `request_tensors`.
    queue_size, **pace
        As `Runtime`.
    """

    gives_end_token = False

    def __init__(
        self,
        config: EngineConfig,
        backend,
        tokenizer,
        *,
        slots: int | None = None,
        prefix_reuse: bool = False,
        queue_size: int,
        **pace: float,
    ):
        self._config, self._prefix_reuse = config, prefix_reuse
        super().__init__(
            backend,
            tokenizer,
            slots=slots or config.max_batch,
            vocab=config.vocab_size,
            hidden=config.hidden,
            max_sequence=config.max_sequence,
            queue_size=queue_size,
            **pace,
        )

    def submit(self, generation: Generation, on_chunk, is_cancelled=None) -> str:
        """Queue a generation; as `Runtime.submit`, which refuses more than the engine takes too."""
        check_request(generation, self._config)
        return super().submit(generation, on_chunk, is_cancelled)

    def _request(self, generation: Generation):
        return request_tensors(generation, self._config, prefix_reuse=self._prefix_reuse)
