"""A decoder in int4 and int8 on one cache."""

from __future__ import annotations

from cxr_triton.engines.onnxruntime.int8 import require_exact
from cxr_triton.engines.onnxruntime.session import OrtGraph
from cxr_triton.engines.session import EitherGraph, HostDecoder

FEW = 3
"""New tokens in one run up to which int4 is as fast."""


class OrtInt8Decoder(HostDecoder):
    """The decoder of a bundle.

    Raises
    ------
    DeviceUnavailable
        This CPU does not multiply integers of 8 bits exactly.
    """

    def __init__(self, bundle, *, slots: int, threads: int | None = None):
        require_exact("the decoder's prompts are")
        few = OrtGraph(bundle, threads=threads)
        many = OrtGraph(bundle, threads=threads, file="decoder.int8.onnx")
        super().__init__(bundle, EitherGraph(few, many, is_few), slots=slots)
        self.checks = 1  # attention takes several tokens of one sequence only


def is_few(sequences: int, tokens: int) -> bool:
    """Whether the graph in int4 runs so many sequences of so many new tokens each."""
    return sequences * tokens <= FEW
