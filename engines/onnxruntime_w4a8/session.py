"""Sessions of a bundle whose decoder multiplies int4 by int8 in the compiled library."""

from __future__ import annotations

from cxr_triton.engines.onnxruntime.session import OrtGraph
from cxr_triton.engines.onnxruntime_w4a8 import library
from cxr_triton.engines.session import HostDecoder


class W4A8Decoder(HostDecoder):
    """The decoder of a bundle.

    Raises
    ------
    DeviceUnavailable
        The library was not compiled.
    """

    prefill_chunk = 320
    """An image of 476 by 476 pixels, 289 tokens, and what stands before it in one run: each run reads all weights."""

    def __init__(self, bundle, *, slots: int, threads: int | None = None):
        graph = OrtGraph(bundle, threads=threads, operators=library.require())
        super().__init__(bundle, graph, slots=slots)
        self.checks = 1
