"""A decoder in int4 and int8 on one cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cxr_triton.engines.onnxruntime.int8 import require_exact
from cxr_triton.engines.onnxruntime.session import OrtGraph, open_graph
from cxr_triton.engines.onnxruntime_int8.few import is_few
from cxr_triton.engines.session import EitherGraph, HostDecoder, HostGraph


class Int8Graph(HostGraph):
    """The decoder graph of a bundle in int8; it takes several tokens of several sequences."""

    def __init__(self, bundle, *, threads: int | None = None):
        self._session = open_graph(bundle.path / "decoder.int8.onnx", threads)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(
        self, cache: Mapping[str, np.ndarray], rows: slice, lengths: np.ndarray, inputs: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """See `HostGraph.run`."""
        held = self.held(cache, rows, lengths, inputs["input_ids"].shape[1])
        past = {f"past_{name}": part for name, part in held.items()}
        results = self._session.run(self._outputs, {**past, **inputs, "write_index": lengths})
        given = dict(zip(self._outputs, results, strict=True))
        self.append(cache, rows, lengths, {name: given[f"present_{name}"] for name in cache})
        return given["logits"]

    def forget(self) -> None:
        """See `HostGraph.forget`; it holds none."""


class OrtInt8Decoder(HostDecoder):
    """The decoder of a bundle.

    Raises
    ------
    DeviceUnavailable
        This CPU does not multiply integers of 8 bits exactly.
    """

    prefill_chunk = 320
    """An image of 476 by 476 pixels, 289 tokens, and what stands before it in one run: each run reads all weights."""

    def __init__(self, bundle, *, slots: int, threads: int | None = None):
        require_exact("the decoder's prompts are")
        few, many = OrtGraph(bundle, threads=threads), Int8Graph(bundle, threads=threads)
        super().__init__(bundle, EitherGraph(few, many, is_few), slots=slots)
