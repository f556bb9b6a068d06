"""Sessions of a bundle whose decoder multiplies int4 by int8 in the compiled library."""

from __future__ import annotations

from cxr_triton.engines.onnxruntime.session import OrtDecoder
from cxr_triton.engines.onnxruntime_w4a8 import library


class W4A8Decoder(OrtDecoder):
    """The decoder of a bundle; see `OrtDecoder`.

    Raises
    ------
    DeviceUnavailable
        The library was not compiled.
    """

    prefill_chunk = 320
    """An image of 476 by 476 pixels, 289 tokens, and what stands before it in one run: each run reads all weights."""

    def __init__(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        super().__init__(
            bundle, slots=slots, threads=threads, batch_invariant=batch_invariant, operators=library.require()
        )
