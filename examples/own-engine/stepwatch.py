"""A room of one's own: ONNX Runtime on the CPU, which says on standard error how long each step of the decoder took."""

import sys
import time

from cxr_triton.engines.onnxruntime import OnnxRuntime


class Stepwatch(OnnxRuntime):
    """Takes, compiles and serves what ONNX Runtime does; only its decoder is opened in another way."""

    name = "stepwatch"

    def open_decoder(self, bundle, *, slots, threads=None, batch_invariant=False):
        """ONNX Runtime's session, with a watch around its steps."""
        session = super().open_decoder(bundle, slots=slots, threads=threads, batch_invariant=batch_invariant)
        check = session.check  # a step is a check of one token each

        def watched(input_ids, positions):
            started = time.perf_counter()
            logits = check(input_ids, positions)
            streams, tokens = input_ids.shape
            took_ms = 1e3 * (time.perf_counter() - started)
            print(f"step of {streams} with {tokens} tokens each: {took_ms:.2f} ms", file=sys.stderr)
            return logits

        session.check = watched
        return session


ENGINE = Stepwatch()
