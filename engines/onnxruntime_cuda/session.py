"""ONNX Runtime's CUDA provider: sessions of a bundle's two graphs, with the methods of the CPU ones.

The KV cache lies on the GPU and is updated in place. A decode step is captured as a CUDA graph for each batch size of
`BATCHES`; a number of sequences between two runs as the larger one.
"""

from __future__ import annotations

import ctypes
import logging
import math
from pathlib import Path

import numpy as np

from cxr_triton.engines.cuda import call, device, runtime
from cxr_triton.engines.runtime.sampler import TopLogits
from cxr_triton.engines.session import DTYPES, DecoderSession, VisionSession, device_rows
from cxr_triton.errors import DeviceUnavailable, InvalidBundle, InvalidRequest
from cxr_triton.extras import remedy

log = logging.getLogger(__name__)

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
PROVIDER = "CUDAExecutionProvider"
LEAST_VERSION = (1, 31)
"""Of ONNX Runtime: the first one that was run on a GPU here."""
PREFILL_TOKENS = 512
_ALIGNMENT = 256


class Gpu:
    """Memory of the current GPU, and the stream on which graphs run and copies are made, in order.

    Raises
    ------
    DeviceUnavailable
        CUDA's bindings or a GPU are missing.
    """

    kind = "cuda"

    def __init__(self):
        device()
        self.stream = int(call("cudaStreamCreateWithFlags", int(runtime().cudaStreamNonBlocking)))
        directions = runtime().cudaMemcpyKind
        self._to_device, self._to_host = directions.cudaMemcpyHostToDevice, directions.cudaMemcpyDeviceToHost
        self._within = directions.cudaMemcpyDeviceToDevice

    def providers(self, *, graphs: bool) -> list:
        options = {
            "user_compute_stream": str(self.stream),
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": "1" if graphs else "0",
        }
        return [(PROVIDER, options), "CPUExecutionProvider"]

    def allocate(self, nbytes: int) -> int:
        """Address of zeroed memory."""
        pointer = int(call("cudaMalloc", max(nbytes, 1)))
        call("cudaMemsetAsync", pointer, 0, max(nbytes, 1), self.stream)
        return pointer

    def free(self, pointer: int) -> None:
        call("cudaFree", pointer)

    def array(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """Zeroed memory of the host that the GPU copies from and to directly."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = (ctypes.c_byte * nbytes).from_address(int(call("cudaHostAlloc", nbytes, 0)))
        value = np.frombuffer(memoryview(memory), dtype).reshape(shape)
        value[...] = 0
        return value

    def upload(self, pointer: int, value: np.ndarray) -> None:
        """Copy a contiguous array to the GPU; it must stay as it is until `synchronize`."""
        call("cudaMemcpyAsync", pointer, value.ctypes.data, value.nbytes, self._to_device, self.stream)

    def download(self, value: np.ndarray, pointer: int) -> None:
        """Copy to a contiguous array; it is there after `synchronize`."""
        call("cudaMemcpyAsync", value.ctypes.data, pointer, value.nbytes, self._to_host, self.stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        call("cudaMemcpyAsync", target, source, nbytes, self._within, self.stream)

    def synchronize(self) -> None:
        call("cudaStreamSynchronize", self.stream)


class Host:
    """Memory of the host in the GPU's place, for tests of the sessions where there is none."""

    kind = "cpu"

    def __init__(self):
        self._held: dict[int, ctypes.Array] = {}

    def providers(self, *, graphs: bool) -> list:
        return ["CPUExecutionProvider"]

    def allocate(self, nbytes: int) -> int:
        memory = (ctypes.c_byte * (nbytes + _ALIGNMENT))()
        pointer = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
        self._held[pointer] = memory
        return pointer

    def free(self, pointer: int) -> None:
        del self._held[pointer]

    def array(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        return np.zeros(shape, dtype)

    def upload(self, pointer: int, value: np.ndarray) -> None:
        ctypes.memmove(pointer, value.ctypes.data, value.nbytes)

    def download(self, value: np.ndarray, pointer: int) -> None:
        ctypes.memmove(value.ctypes.data, pointer, value.nbytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def synchronize(self) -> None:
        pass


def open_graph(path: Path, memory: Gpu | Host, *, graphs: bool = False):
    """A session whose nodes run where `memory` is.

    Raises
    ------
    DeviceUnavailable
        The installed ONNX Runtime has no CUDA provider, or the provider does not load.
    InvalidBundle
        It does not take the graph.
    """
    import onnxruntime as ort

    if memory.kind == "cuda":
        if PROVIDER not in ort.get_available_providers():
            raise DeviceUnavailable(
                f"onnxruntime {ort.__version__} has no CUDA provider; `pip uninstall onnxruntime`, then "
                f"{remedy('cuda')}"
            )
        if tuple(int(part) for part in ort.__version__.split(".")[:2]) < LEAST_VERSION:
            raise DeviceUnavailable(
                f"onnxruntime {ort.__version__} is too old for these graphs, {'.'.join(map(str, LEAST_VERSION))} is "
                f"needed; {remedy('cuda')}"
            )
        ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # int4 products by the kernels that read each weight once, whatever the number of rows.
    options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")
    try:
        session = ort.InferenceSession(str(path), options, providers=memory.providers(graphs=graphs))
    except Exception as error:  # those of ONNX Runtime have no common base
        raise InvalidBundle(
            f"onnxruntime cannot load {path.name} ({' '.join(str(error).split())[:400]}); build the bundle again here"
        ) from None
    if memory.kind == "cuda" and PROVIDER not in session.get_providers():
        raise DeviceUnavailable(
            f"onnxruntime's CUDA provider does not load here: CUDA 13 or cuDNN 9 is missing; {remedy('cuda')}"
        )
    return session


class CudaVision(VisionSession):
    """The vision graph of a bundle.

    Parameters
    ----------
    bundle : Bundle
    memory : Gpu or Host, optional
        The current GPU by default.

    Raises
    ------
    DeviceUnavailable, InvalidBundle
        See `open_graph`.
    """

    def __init__(self, bundle, *, memory: Gpu | Host | None = None):
        self._session = open_graph(bundle.path / "vision.onnx", memory or Gpu())

    def _run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return self._session.run(["image_embeddings"], feeds)[0]


class CudaDecoder(DecoderSession):
    """The decoder graph of a bundle with its KV cache on the GPU.

    Parameters
    ----------
    bundle : Bundle
    slots : int
        Sequences that the cache holds.
    memory : Gpu or Host, optional
        The current GPU by default.

    Raises
    ------
    DeviceUnavailable, InvalidBundle
        See `open_graph`.
    InvalidRequest
        More slots than `BATCHES` allows.

    Attributes
    ----------
    prefill_chunk : int
        Prompt tokens that are best given at a time.
    """

    prefill_chunk = PREFILL_TOKENS

    def __init__(self, bundle, *, slots: int, memory: Gpu | Host | None = None):
        if slots > BATCHES[-1]:
            raise InvalidRequest(f"{slots} slots were asked for, onnxruntime-cuda takes {BATCHES[-1]}; ask for fewer")
        geometry, self._memory = bundle.geometry, memory or Gpu()
        self.slots, self.max_sequence = slots, geometry.max_sequence
        self.vocab, self.hidden = geometry.vocab, geometry.hidden
        rows = next(batch for batch in BATCHES if batch >= slots)
        self.lengths = np.zeros(rows, np.int64)
        self._session = self._open(bundle.path / "decoder.onnx")
        self._dtype = DTYPES[geometry.compute]
        self._cache_shape = (geometry.kv_heads, geometry.max_sequence, geometry.head_dim)
        self._slot_bytes = int(np.prod(self._cache_shape)) * self._dtype.itemsize
        self._cache = {
            f"{part}.{layer}": self._memory.allocate(rows * self._slot_bytes)
            for layer in range(geometry.layers)
            for part in ("key", "value")
        }
        shapes = {output.name: output.shape for output in self._session.get_outputs()}
        blocks, size = shapes["top_logits"][1:]
        self._has_all = blocks * size >= self.vocab  # in the blocks of a step
        self._results = {
            "logits": self._memory.array((rows, self.vocab), np.float32),
            "top_blocks": self._memory.array((rows, blocks), np.int64),
            "top_logits": self._memory.array((rows, blocks, size), np.float32),
        }
        self._result_pointers = {n: self._memory.allocate(value.nbytes) for n, value in self._results.items()}
        self._feeds: dict[tuple[int, int], _Feed] = {}  # by batch and tokens; a captured step reads its where it lies
        self._text_only = self._memory.allocate(self.hidden * self._dtype.itemsize)
        self._embeddings, self._embeddings_bytes = 0, 0
        self._held: np.ndarray | None = None  # the prompt's embeddings that are on the GPU
        self._steps: dict[int, object] = {}  # binding of a step of so many sequences
        self._options: dict[int, object] = {}  # of a run, by the number of its graph

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
        tokens, rows = len(input_ids), len(image_embeddings)
        if rows and image_embeddings is not self._held:  # the pieces of a prompt come with the same array
            self._hold(image_embeddings)
        feed, length = self._feed(1, tokens), int(self.lengths[slot])
        feed.upload(
            input_ids=input_ids,
            image_index=image_index,
            position_ids=position_ids[:, None],
            logits_index=tokens - 1,
            last_index=length + tokens - 1,
        )
        binding = self._bind(feed, slot, self._embeddings if rows else self._text_only, max(rows, 1), length + tokens)
        self._run(binding, -1)
        self.lengths[slot] += tokens
        if is_last:
            return self._download("logits", 1)[0]
        self._memory.synchronize()
        return None

    def step(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self._download("logits", self._step(input_ids, positions))

    def step_top(self, input_ids: np.ndarray, positions: np.ndarray) -> list[TopLogits]:
        """`step` that leaves most logits on the GPU: those of the best ids of each sequence, valid until the next call.

        Parameters
        ----------
        input_ids : (n,) int64 array
        positions : (n,) int64 array
        """
        active = self._step(input_ids, positions)
        blocks, logits = (self._results[name][:active] for name in ("top_blocks", "top_logits"))
        for name, value in (("top_blocks", blocks), ("top_logits", logits)):
            self._memory.download(value, self._result_pointers[name])
        self._memory.synchronize()
        return [self._top(blocks, logits, row) for row in range(active)]

    def _top(self, blocks: np.ndarray, logits: np.ndarray, row: int) -> TopLogits:
        # Whatever is in another block is no larger than the least of these blocks' largest.
        bound = -np.inf if self._has_all else float(logits[row, -1].max())
        return TopLogits(blocks[row], logits[row], bound, lambda: self._download("logits", 1, row)[0])

    def move(self, source: int, target: int) -> None:
        self.lengths[target] = self.lengths[source]
        size = self._slot_bytes
        for pointer in self._cache.values():
            self._memory.copy(pointer + target * size, pointer + source * size, size)

    def read_cache(self, slot: int, start: int, stop: int) -> np.ndarray:
        heads, positions, width = self._cache_shape
        rows = np.empty((len(self._cache), heads, stop - start, width), self._dtype)
        for pointer, values in device_rows(rows, self._cache.values(), positions, slot, start):
            self._memory.download(values, pointer)
        self._memory.synchronize()
        return rows

    def write_cache(self, slot: int, start: int, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, self._dtype)
        for pointer, values in device_rows(rows, self._cache.values(), self._cache_shape[1], slot, start):
            self._memory.upload(pointer, values)
        self._memory.synchronize()
        self.lengths[slot] = start + rows.shape[2]

    def _open(self, path: Path):
        """With captured steps where the provider takes every node."""
        try:
            return open_graph(path, self._memory, graphs=True)
        except InvalidBundle as error:
            log.warning("steps run without CUDA graphs: %s", error.message)
            return open_graph(path, self._memory)

    def _step(self, input_ids: np.ndarray, positions: np.ndarray) -> int:
        active = len(input_ids)
        rows = next(batch for batch in BATCHES if batch >= active)
        feed = self._feed(rows, 1)
        # What the rows more write lies beyond their lengths.
        feed.upload(
            input_ids=np.resize(input_ids, rows)[:, None],
            image_index=-1,
            logits_index=np.arange(rows),
            position_ids=np.resize(positions, rows)[:, None],
            last_index=np.minimum(self.lengths[:rows], self.max_sequence - 1),
        )
        if rows not in self._steps:
            self._steps[rows] = self._bind(feed, 0, self._text_only, 1, self.max_sequence)
        self._run(self._steps[rows], rows)
        self.lengths[:active] += 1
        return active

    def _hold(self, image_embeddings: np.ndarray) -> None:
        value = np.ascontiguousarray(image_embeddings.astype(self._dtype))
        if value.nbytes > self._embeddings_bytes:
            if self._embeddings:
                self._memory.synchronize()
                self._memory.free(self._embeddings)
            self._embeddings, self._embeddings_bytes = self._memory.allocate(value.nbytes), value.nbytes
        self._memory.upload(self._embeddings, value)
        self._memory.synchronize()
        self._held = image_embeddings

    def _feed(self, batch: int, tokens: int) -> _Feed:
        if (batch, tokens) not in self._feeds:
            self._feeds[batch, tokens] = _Feed(self._memory, batch, tokens)
        return self._feeds[batch, tokens]

    def _bind(self, feed: _Feed, slot: int, embeddings: int, rows: int, longest: int):
        """Addresses of a run; past and present of a layer are one, so that attention updates the cache."""
        binding, kind, batch = self._session.io_binding(), self._memory.kind, feed.batch
        for name, (dtype, shape, offset) in feed.fields.items():
            binding.bind_input(name, kind, 0, dtype, shape, feed.pointer + offset)
        element = _element(self._dtype)
        binding.bind_input("image_embeddings", kind, 0, element, (rows, self.hidden), embeddings)
        binding.bind_cpu_input("longest", np.array([longest], np.int32))
        shape = (batch, *self._cache_shape)
        for name, whole in self._cache.items():
            pointer = whole + slot * self._slot_bytes
            binding.bind_input(f"past_{name}", kind, 0, element, shape, pointer)
            binding.bind_output(f"present_{name}", kind, 0, element, shape, pointer)
        for name, value in self._results.items():
            shape = (batch, *value.shape[1:])
            binding.bind_output(name, kind, 0, value.dtype.type, shape, self._result_pointers[name])
        return binding

    def _run(self, binding, graph: int) -> None:
        """Run, as the captured graph of this number where there is one; -1 is never captured."""
        import onnxruntime as ort

        if graph not in self._options:
            options = self._options[graph] = ort.RunOptions()
            if self._memory.kind == "cuda":
                options.add_run_config_entry("gpu_graph_id", str(graph))
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._session.run_with_iobinding(binding, self._options[graph])

    def _download(self, name: str, count: int, start: int = 0) -> np.ndarray:
        value = self._results[name][start : start + count]
        self._memory.download(value, self._result_pointers[name] + start * value[0].nbytes)
        self._memory.synchronize()
        return value


class _Feed:
    """Inputs of a run of `batch` sequences of `tokens` each, in one buffer that one copy takes to the GPU.

    Attributes
    ----------
    fields : dict
        Type, shape and offset of each input.
    pointer : int
        The buffer on the GPU; it stays where it is.
    """

    def __init__(self, memory: Gpu | Host, batch: int, tokens: int):
        self.batch, self.tokens, self._memory = batch, tokens, memory
        shapes = {
            "input_ids": (np.int64, (batch, tokens)),
            "image_index": (np.int64, (batch, tokens)),
            "position_ids": (np.int64, (3, batch, tokens)),
            "rotary_index": (np.int64, (batch, tokens)),
            "logits_index": (np.int64, (batch,)),
            "last_index": (np.int32, (batch,)),
        }
        self.fields, nbytes = {}, 0
        for name, (dtype, shape) in shapes.items():
            self.fields[name] = (dtype, shape, nbytes)
            nbytes += -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        self._buffer, self.pointer = memory.array((nbytes,), np.uint8), memory.allocate(nbytes)
        self._views = {}
        for name, (dtype, shape, offset) in self.fields.items():
            part = self._buffer[offset : offset + math.prod(shape) * np.dtype(dtype).itemsize]
            self._views[name] = part.view(dtype).reshape(shape)
        self._views["rotary_index"][...] = np.arange(batch * tokens).reshape(batch, tokens)

    def upload(self, **values) -> None:
        """Set inputs, and copy all of them; earlier runs have ended."""
        for name, value in values.items():
            self._views[name][...] = value
        self._memory.upload(self.pointer, self._buffer)


def _element(dtype: np.dtype):
    """What ONNX Runtime takes for a type; numpy has no bf16."""
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(dtype) if dtype == DTYPES["bf16"] else dtype.type
