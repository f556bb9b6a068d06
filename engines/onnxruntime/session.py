"""Sessions of a bundle's two graphs: those of ONNX Runtime, and the choice between them and the other engines'.

ONNX Runtime is imported here only, so reading a bundle stays cheap.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from cxr_triton.errors import DeviceUnavailable, InvalidRequest

CAPACITY_STEP = 64  # cache positions; the cache grows and shrinks by so many


def open_vision(bundle, *, threads: int | None = None):
    """A `VisionSession`, or its like for the bundle's engine.

    Parameters
    ----------
    bundle : Bundle
    threads : int, optional
        CPU threads; all cores if None.

    Raises
    ------
    DeviceUnavailable, InvalidBundle
        The engine's library or GPU is missing, or is another one than the bundle was built for.
    """
    if bundle.vision_engine == "onnxruntime":
        return VisionSession(bundle, threads=threads)
    if bundle.vision_engine == "openvino":
        from cxr_triton.engines.openvino.session import OpenVINOVision

        return OpenVINOVision(bundle, threads=threads)
    if bundle.vision_engine == "onnxruntime-cuda":
        from cxr_triton.engines.onnxruntime_cuda.session import CudaVision

        return CudaVision(bundle)
    from cxr_triton.engines.tensorrt.session import TensorRTVision

    return TensorRTVision(bundle)


def open_decoder(bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
    """A `DecoderSession`, or its like for the bundle's engine; arguments as there, errors as `open_vision`.

    `batch_invariant` is to be had from ONNX Runtime only; the others choose kernels by the number of rows.
    """
    if bundle.engine == "onnxruntime":
        return DecoderSession(bundle, slots=slots, threads=threads, batch_invariant=batch_invariant)
    if bundle.engine == "tensorrt-llm":
        raise DeviceUnavailable(
            "an engine of tensorrt-llm runs in Triton's tensorrtllm backend only; package the bundle and serve it in "
            "its container"
        )
    if batch_invariant:
        raise InvalidRequest(f"batch-invariant readings were asked for, {bundle.engine} has none; use onnxruntime")
    if bundle.engine == "openvino":
        from cxr_triton.engines.openvino.session import OpenVINODecoder

        return OpenVINODecoder(bundle, slots=slots, threads=threads)
    if bundle.engine == "onnxruntime-cuda":
        from cxr_triton.engines.onnxruntime_cuda.session import CudaDecoder

        return CudaDecoder(bundle, slots=slots)
    from cxr_triton.engines.tensorrt.session import TensorRTDecoder

    return TensorRTDecoder(bundle, slots=slots)


def open_graph(path: Path, threads: int | None) -> ort.InferenceSession:
    """A CPU session whose threads wait for each other awake while a run goes on, and sleep when none does.

    Weights stay prepacked, though mapped ones would save as much memory as the graph has: on packed weights a row of
    a product is the same bit by bit whatever the number of rows and threads, on others it is not.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # float8 rounding then runs node by node: the CPU has no fused kernels for it, and fails where it looks for them.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class VisionSession:
    """The vision graph of a bundle.

    Parameters
    ----------
    bundle : Bundle
    threads : int, optional
        CPU threads; all cores if None.
    """

    def __init__(self, bundle, *, threads: int | None = None):
        self._open(bundle, threads)

    def _open(self, bundle, threads: int | None) -> None:
        self._session = open_graph(bundle.path / "vision.onnx", threads)

    def _run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return self._session.run(["image_embeddings"], feeds)[0]

    def encode(
        self, pixel_windows: np.ndarray, patch_rows_cols: np.ndarray, valid: np.ndarray, merge_order: np.ndarray
    ) -> np.ndarray:
        """Embeddings of a batch of images.

        Windows after the last one that any image of the batch uses are dropped.

        Parameters
        ----------
        pixel_windows : (B, W, 64, 588) uint8 array
        patch_rows_cols : (B, W, 64, 2) int32 array
        valid : (B, W, 64) bool array
        merge_order : (B, T) int32 array

        Returns
        -------
        (B, T, hidden) float32 array
            Rows beyond an image's tokens are meaningless.
        """
        used = int(np.flatnonzero(valid.any(axis=(0, 2)))[-1]) + 1
        feeds = {
            "pixel_windows": pixel_windows[:, :used],
            "patch_rows_cols": patch_rows_cols[:, :used],
            "valid": valid[:, :used],
            "merge_order": merge_order,
        }
        return self._run(feeds).astype(np.float32, copy=False)


class DecoderSession:
    """The decoder graph of a bundle with a KV cache of a fixed number of slots.

    Each slot holds one sequence. `step` works on the first slots, so the caller keeps the active sequences there.

    Parameters
    ----------
    bundle : Bundle
    slots : int
        Sequences that the cache holds.
    threads : int, optional
        CPU threads; all cores if None.
    batch_invariant : bool
        Give a stream the same numbers bit by bit whatever runs beside it. With int4 weights a step of one stream
        then takes longer.

    Attributes
    ----------
    slots : int
    max_sequence : int
        Positions of a slot.
    vocab, hidden : int
    lengths : (slots,) int64 array
        Positions in use; one row more where `slots` is odd and a step takes pairs.
    """

    def __init__(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        geometry = bundle.geometry
        self.slots = slots
        self.max_sequence = geometry.max_sequence
        self.vocab, self.hidden = geometry.vocab, geometry.hidden
        # The int4 kernel takes rows in pairs, and sums one that is left over in another order.
        self._together = 2 if batch_invariant and bundle.precision.startswith("int4") else 1
        rows = self._rounded(slots)
        self.lengths = np.zeros(rows, np.int64)
        self._open(bundle, threads)
        self._names = [f"{part}.{layer}" for layer in range(geometry.layers) for part in ("key", "value")]
        self._row = (geometry.kv_heads, geometry.head_dim)
        self._logits = np.zeros((rows, 1, geometry.vocab), np.float32)
        self._text_only = np.zeros((1, geometry.hidden), np.float32)
        self._capacity = 0
        self._cache: dict[str, np.ndarray] = {}
        self._bindings: dict[tuple[int, int], object] = {}  # of the engine to cache rows
        self._reserve(1)

    def _open(self, bundle, threads: int | None) -> None:
        self._session = open_graph(bundle.path / "decoder.onnx", threads)

    def prefill(
        self,
        slot: int,
        input_ids: np.ndarray,
        image_index: np.ndarray,
        image_embeddings: np.ndarray,
        position_ids: np.ndarray,
        *,
        is_last: bool,
    ) -> np.ndarray | None:
        """Append prompt tokens to a slot.

        Parameters
        ----------
        slot : int
        input_ids : (S,) int64 array
        image_index : (S,) int64 array
        image_embeddings : (N, hidden) float32 array
        position_ids : (3, S) int64 array
        is_last : bool
            The prompt ends here.

        Returns
        -------
        (vocab,) float32 array or None
            Logits of the last token of a prompt, valid until the next call.
        """
        tokens = len(input_ids)
        self._reserve(int(self.lengths[slot]) + tokens)
        logits = self._run(
            slice(slot, slot + 1),
            input_ids=input_ids[None],
            image_index=image_index[None],
            image_embeddings=image_embeddings if len(image_embeddings) else self._text_only,
            position_ids=position_ids[:, None],
            logits_index=np.full((1, 1), tokens - 1, np.int64),
        )
        self.lengths[slot] += tokens
        return logits[0, 0] if is_last else None

    def step(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Append one generated token to each of the first n slots.

        Parameters
        ----------
        input_ids : (n,) int64 array
        positions : (n,) int64 array
            The same for time, height and width.

        Returns
        -------
        (n, vocab) float32 array
            Valid until the next call.
        """
        active = len(input_ids)
        rows = self._rounded(active)
        if rows > active:  # what the row more writes lies beyond its length
            input_ids, positions = np.append(input_ids, input_ids[-1]), np.append(positions, positions[-1])
        self._reserve(int(self.lengths[:rows].max()) + 1)
        logits = self._run(
            slice(0, rows),
            input_ids=input_ids[:, None],
            image_index=np.full((rows, 1), -1, np.int64),
            image_embeddings=self._text_only,
            position_ids=np.broadcast_to(positions[:, None], (3, rows, 1)),
            logits_index=np.zeros((rows, 1), np.int64),
        )
        self.lengths[:active] += 1
        return logits[:active, 0]

    def move(self, source: int, target: int) -> None:
        """Copy what a slot holds to another one."""
        length = self.lengths[target] = self.lengths[source]
        for cache in self._cache.values():
            cache[target, :, :length] = cache[source, :, :length]

    def free(self, slot: int) -> None:
        """Forget what a slot holds; the cache shrinks when half of it is enough."""
        self.lengths[slot] = 0
        longest = int(self.lengths.max())
        if longest < self._capacity // 2:
            self._allocate(longest + 1)

    def _rounded(self, rows: int) -> int:
        return -(-rows // self._together) * self._together

    def _reserve(self, positions: int) -> None:
        if positions > self._capacity:
            self._allocate(positions)

    def _allocate(self, positions: int) -> None:
        """Give the cache at least so many positions a slot, and keep what the slots hold."""
        capacity = min(-(-positions // CAPACITY_STEP) * CAPACITY_STEP, self.max_sequence)
        if capacity == self._capacity:
            return
        self._bindings.clear()  # they hold the old arrays
        for name in self._names:
            # Zeros, not garbage: a masked position must not be NaN. Pages that are never written cost nothing.
            grown = np.zeros((len(self.lengths), self._row[0], capacity, self._row[1]), np.float32)
            for slot in np.flatnonzero(self.lengths):
                length = self.lengths[slot]
                grown[slot, :, :length] = self._cache[name][slot, :, :length]
            self._cache[name] = grown
        self._capacity = capacity

    def _binding(self, rows: slice) -> ort.IOBinding:
        """Cache rows bound as past and present at once: attention then writes in place."""
        key = (rows.start, rows.stop)
        if key not in self._bindings:
            binding = self._session.io_binding()
            for name, cache in self._cache.items():
                value = ort.OrtValue.ortvalue_from_numpy(cache[rows])
                binding.bind_ortvalue_input(f"past_{name}", value)
                binding.bind_ortvalue_output(f"present_{name}", value)
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits[rows]))
            self._bindings[key] = binding
        return self._bindings[key]

    def _run(self, rows: slice, **inputs: np.ndarray) -> np.ndarray:
        binding = self._binding(rows)
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        binding.bind_cpu_input("write_index", self.lengths[rows].copy())
        self._session.run_with_iobinding(binding)
        return self._logits[rows]
