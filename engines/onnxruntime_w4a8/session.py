"""Sessions of a bundle whose decoder multiplies int4 by int8 in the compiled library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from cxr_triton.engines.onnxruntime import session
from cxr_triton.engines.onnxruntime_w4a8 import library
from cxr_triton.engines.onnxruntime_w4a8.compiler import use_panels
from cxr_triton.engines.rewrite import rewrite


class W4A8Decoder(session.OrtDecoder):
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


def product(model: bytes, feeds: Mapping[str, np.ndarray], threads: int) -> Callable[[], object]:
    """A run of an ONNX model with `MatMulNBits` in int4, by the library's products."""
    graph = onnx.load_from_string(model)
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "source.onnx"), Path(folder, "target.onnx")
        onnx.save(graph, source, save_as_external_data=True, location=f"{source.name}.data", size_threshold=0)
        rewrite(source, target, use_panels)
        return session.product(str(target), feeds, threads, library.require())
