"""Sessions of a bundle's two graphs on ONNX Runtime's CPU. ONNX Runtime is imported here only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from cxr_triton.engines.onnxruntime.int8 import require_exact
from cxr_triton.engines.session import HostDecoder, HostGraph, VisionSession


def open_graph(path: Path, threads: int | None, operators: Path | None = None) -> ort.InferenceSession:
    """A CPU session whose threads wait for each other awake while a run goes on, and sleep when none does.

    `operators` is a library of those that ONNX Runtime lacks.

    Weights stay prepacked, though mapped ones would save as much memory as the graph has: on packed weights a row of
    a product is the same bit by bit whatever the number of rows and threads, on others it is not.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # float8 rounding then runs node by node: the CPU has no fused kernels for it, and fails where it looks for them.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if operators:
        options.register_custom_ops_library(str(operators))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def product(
    model: bytes | str, feeds: Mapping[str, np.ndarray], threads: int, operators: Path | None = None
) -> Callable[[], object]:
    """A run of an ONNX model or file, with kernels and options as ONNX Runtime chooses them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if operators:
        options.register_custom_ops_library(str(operators))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


class OrtVision(VisionSession):
    """The vision graph of a bundle.

    Parameters
    ----------
    bundle : Bundle
    threads : int, optional
        CPU threads; all cores if None.

    Raises
    ------
    DeviceUnavailable
        The tower is in int8, which this CPU does not multiply exactly.
    """

    def __init__(self, bundle, *, threads: int | None = None):
        if bundle.vision_precision == "int8":
            require_exact("the tower is")
        self._session = open_graph(bundle.path / "vision.onnx", threads)

    def _run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return self._session.run(["image_embeddings"], feeds)[0]


class OrtGraph(HostGraph):
    """The decoder graph of a bundle; it takes several tokens of one sequence only."""

    def __init__(self, bundle, *, threads: int | None = None, operators: Path | None = None):
        self._session = open_graph(bundle.path / "decoder.onnx", threads, operators)
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._logits = np.zeros((1, bundle.geometry.vocab), np.float32)
        self._results: dict[tuple[int, int], tuple[np.ndarray, ort.OrtValue]] = {}

    def run(
        self, cache: Mapping[str, np.ndarray], rows: slice, lengths: np.ndarray, inputs: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """See `HostGraph.run`."""
        binding = self._binding(cache, rows)
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        binding.bind_cpu_input("write_index", lengths.copy())
        logits, value = self._result(*inputs["logits_index"].shape)
        binding.bind_ortvalue_output("logits", value)
        self._session.run_with_iobinding(binding)
        return logits

    def forget(self) -> None:
        """See `HostGraph.forget`."""
        self._bindings.clear()

    def _binding(self, cache: Mapping[str, np.ndarray], rows: slice) -> ort.IOBinding:
        """Cache rows bound as past and present at once: attention then writes in place."""
        key = (rows.start, rows.stop)
        if key not in self._bindings:
            binding = self._session.io_binding()
            for name, part in cache.items():
                value = ort.OrtValue.ortvalue_from_numpy(part[rows])
                binding.bind_ortvalue_input(f"past_{name}", value)
                binding.bind_ortvalue_output(f"present_{name}", value)
            self._bindings[key] = binding
        return self._bindings[key]

    def _result(self, rows: int, tokens: int) -> tuple[np.ndarray, ort.OrtValue]:
        """Memory for logits [rows, tokens, vocab], and the same as ONNX Runtime takes it."""
        count = rows * tokens
        if count > len(self._logits):
            self._results.clear()
            self._logits = np.zeros((count, self._logits.shape[1]), np.float32)
        if (rows, tokens) not in self._results:
            logits = self._logits[:count].reshape(rows, tokens, -1)
            self._results[rows, tokens] = logits, ort.OrtValue.ortvalue_from_numpy(logits)
        return self._results[rows, tokens]


class OrtDecoder(HostDecoder):
    """The decoder of a bundle.

    Parameters
    ----------
    bundle : Bundle
    slots : int
    threads : int, optional
        CPU threads; all cores if None.
    batch_invariant : bool
        Give a stream the same numbers bit by bit whatever runs beside it. With int4 weights a step of one stream
        then takes longer, but for products of `operators`.
    operators : Path, optional
        Library of operators that the graph has and ONNX Runtime lacks.
    """

    def __init__(
        self,
        bundle,
        *,
        slots: int,
        threads: int | None = None,
        batch_invariant: bool = False,
        operators: Path | None = None,
    ):
        # The int4 kernel takes rows in pairs, and sums one that is left over in another order.
        in_pairs = batch_invariant and bundle.precision.startswith("int4") and not operators
        graph = OrtGraph(bundle, threads=threads, operators=operators)
        super().__init__(bundle, graph, slots=slots, together=2 if in_pairs else 1)
        # Attention takes several tokens of one sequence only, and sums them otherwise than one.
        self.checks = 0 if batch_invariant else 1
