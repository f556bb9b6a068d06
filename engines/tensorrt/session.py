"""Sessions of a bundle's two plans, on one GPU.

The KV cache lives on the device and is updated in place. A decode step is captured as a CUDA graph for each number of
sequences, and replayed after that.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import numpy as np

from cxr_triton.engines.cuda import call, device, runtime
from cxr_triton.engines.interface import PREFILL_TOKENS
from cxr_triton.engines.session import DTYPES, DecoderSession, VisionSession, device_rows
from cxr_triton.engines.tensorrt.library import Library, logger, released
from cxr_triton.errors import DeviceUnavailable, InvalidBundle, InvalidRequest

log = logging.getLogger(__name__)
PREFILL, DECODE = 0, 1  # optimization profiles, see `tensorrt.shape_ranges`


class Buffer:
    """Device memory that grows.

    Parameters
    ----------
    nbytes : int
        Reserved at once.
    """

    def __init__(self, nbytes: int = 0):
        self.pointer, self.nbytes = 0, 0
        self.reserve(nbytes)

    def reserve(self, nbytes: int) -> bool:
        """Have at least so many bytes; True if the address changed. What it held is lost then."""
        if nbytes <= self.nbytes:
            return False
        self.free()
        self.pointer, self.nbytes = int(call("cudaMalloc", nbytes)), nbytes
        return True

    def free(self) -> None:
        if self.pointer:
            call("cudaFree", self.pointer)
        self.pointer, self.nbytes = 0, 0

    def __del__(self):
        with contextlib.suppress(Exception):  # CUDA may be gone when the process ends
            self.free()


class Plan:
    """A plan on the GPU: engine, execution contexts that share their scratch memory, one stream.

    Parameters
    ----------
    path : Path
    library : Library
    version : str
        Of the library that built it.
    compute_capability : str
        That it was built for.

    Raises
    ------
    DeviceUnavailable
        The library or a GPU is missing, or the GPU is another one.
    InvalidBundle
        The plan is of another version of the library, or does not load.
    """

    def __init__(self, path: Path, library: Library, version: str, compute_capability: str):
        trt, engine = library.load(), library.name
        if released(trt.__version__) != released(version):
            raise InvalidBundle(
                f"{path.name} was built with {engine} {version}, {trt.__version__} is installed; "
                f"install {engine} {version}, or build the bundle again here"
            )
        found = device()
        if found.compute_capability != compute_capability:
            raise DeviceUnavailable(
                f"{path.name} was built for compute capability {compute_capability}, this machine has a {found.name} "
                f"with {found.compute_capability}; build the bundle for it with another recipe"
            )
        self._log = logger(trt, engine)
        try:
            self._runtime = trt.Runtime(self._log)
        except (TypeError, RuntimeError):
            raise DeviceUnavailable(
                f"{engine} {trt.__version__} does not start on this {found.name} ({self._log.last or 'no message'}); "
                "update the GPU's driver"
            ) from None
        # Mapped, so that the file is not in memory a second time.
        self.engine = self._runtime.deserialize_cuda_engine(np.memmap(path, np.uint8, "r"))
        if self.engine is None:
            raise InvalidBundle(f"{engine} cannot load {path.name} ({self._log.last}); build the bundle again here")
        self.stream = int(call("cudaStreamCreate"))
        self._choice = strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._kernels = library.kernels(trt, self.engine, path, found.name)
        if self._kernels:
            self._choice = self._kernels.config
            self._choice.set_execution_context_allocation_strategy(strategy)
        profiles = range(self.engine.num_optimization_profiles)
        self._scratch = Buffer(max(self.engine.get_device_memory_size_for_profile_v2(p) for p in profiles))
        self._contexts: dict[tuple[int, int], object] = {}
        self._is_capturable = True

    def context(self, profile: int, number: int = 0):
        """An execution context; what was captured from one must not see it change, so each capture has its own."""
        if (profile, number) not in self._contexts:
            context = self.engine.create_execution_context(self._choice)
            if context is None:
                raise RuntimeError(f"no memory for an execution context: {self._log.last or 'no message'}")
            context.set_device_memory(self._scratch.pointer, self._scratch.nbytes)
            context.set_optimization_profile_async(profile, self.stream)
            self.synchronize()
            self._contexts[profile, number] = context
        return self._contexts[profile, number]

    def synchronize(self) -> None:
        call("cudaStreamSynchronize", self.stream)

    def upload(self, pointer: int, value: np.ndarray) -> None:
        """Copy an array to device memory that is large enough, in the stream's order."""
        value = np.ascontiguousarray(value)
        kind = runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", pointer, value.ctypes.data, value.nbytes, kind, self.stream)

    def download(self, value: np.ndarray, pointer: int) -> None:
        """Copy device memory to an array, and wait for it."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", value.ctypes.data, pointer, value.nbytes, kind, self.stream)
        self.synchronize()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy device memory to device memory that does not overlap it."""
        call("cudaMemcpyAsync", target, source, nbytes, runtime().cudaMemcpyKind.cudaMemcpyDeviceToDevice, self.stream)

    def enqueue(self, context) -> None:
        if not context.execute_async_v3(self.stream):
            raise RuntimeError(f"the engine failed: {self._log.last or 'no message'}")

    def capture(self, context):
        """A run of a context as an executable CUDA graph, which nothing runs yet; None where it cannot be captured.

        A library that keeps its kernels says beforehand whether it can be. Another is tried once, as trtexec does.
        """
        if not self._is_capturable or (self._kernels and not context.is_stream_capturable(self.stream)):
            return None
        mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.stream, mode)
        was_recorded = context.execute_async_v3(self.stream)
        status, graph = runtime().cudaStreamEndCapture(self.stream)
        if was_recorded and not int(status):
            executable = call("cudaGraphInstantiate", graph, 0)
            call("cudaGraphDestroy", graph)
            return executable
        self._is_capturable = False
        if not int(status):  # what TensorRT refused may have left a graph of a part
            call("cudaGraphDestroy", graph)
        runtime().cudaGetLastError()  # forgets the error
        log.warning("steps of this plan are launched kernel by kernel, no CUDA graph takes them: %s", self._log.last)
        return None

    def keep(self) -> None:
        """Write down what the library compiled for this GPU, so that the next start finds it."""
        if self._kernels:
            self._kernels.write()


def open_plan(library: Library, bundle, graph: str) -> Plan:
    """The plan of a bundle's graph; errors as `Plan`."""
    try:
        report = bundle.manifest["plans"][graph]
        version, capability = str(report["version"]), str(report["compute_capability"])
    except (KeyError, TypeError):
        raise InvalidBundle(f"manifest.json: plans.{graph} is missing; build the bundle again") from None
    return Plan(bundle.path / f"{graph}.plan", library, version, capability)


class TensorRTVision(VisionSession):
    """The vision plan of a bundle; a batch goes in runs of as many images as the plan takes.

    Parameters
    ----------
    plan : Plan
    bundle : Bundle
    """

    def __init__(self, plan: Plan, bundle):
        self._plan = plan
        geometry = bundle.geometry
        self._dtype, self._hidden = DTYPES[geometry.compute], geometry.hidden
        self._most = self._plan.engine.get_tensor_profile_shape("pixel_windows", 0)[2][0]
        self._buffers = {name: Buffer() for name in (*_VISION_INPUTS, "image_embeddings")}
        self._is_warm = False

    def _run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        starts = range(0, len(feeds["merge_order"]), self._most)
        return np.concatenate([self._run_part({n: v[i : i + self._most] for n, v in feeds.items()}) for i in starts])

    def _run_part(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        context = self._plan.context(0)
        for name, value in feeds.items():
            self._buffers[name].reserve(value.nbytes)
            self._plan.upload(self._buffers[name].pointer, value)
            context.set_input_shape(name, value.shape)
            context.set_tensor_address(name, self._buffers[name].pointer)
        out = np.empty((*feeds["merge_order"].shape, self._hidden), self._dtype)
        self._buffers["image_embeddings"].reserve(out.nbytes)
        context.set_tensor_address("image_embeddings", self._buffers["image_embeddings"].pointer)
        self._plan.enqueue(context)
        self._plan.download(out, self._buffers["image_embeddings"].pointer)
        if not self._is_warm:
            self._is_warm = True
            self._plan.keep()
        return out


_VISION_INPUTS = ("pixel_windows", "patch_rows_cols", "valid", "merge_order")


class TensorRTDecoder(DecoderSession):
    """The decoder plan of a bundle with its KV cache on the GPU; a prompt goes in pieces that the plan takes.

    Parameters
    ----------
    plan : Plan
    bundle : Bundle
    slots : int
        Sequences that the cache holds; at most the plan's.

    Raises
    ------
    InvalidRequest
        More slots than the plan was built for.
    """

    def __init__(self, plan: Plan, bundle, *, slots: int):
        geometry = bundle.geometry
        self._plan = plan
        most = self._plan.engine.get_tensor_profile_shape("input_ids", DECODE)[2][0]
        if slots > most:
            raise InvalidRequest(f"{slots} slots were asked for, decoder.plan takes {most}; build with another recipe")
        self.slots, self.max_sequence = slots, geometry.max_sequence
        self.vocab, self.hidden = geometry.vocab, geometry.hidden
        self.lengths = np.zeros(slots, np.int64)
        self._dtype = DTYPES[geometry.compute]
        self._slot_bytes = geometry.kv_heads * geometry.max_sequence * geometry.head_dim * self._dtype.itemsize
        self._cache = {
            f"{part}.{layer}": Buffer(slots * self._slot_bytes)
            for layer in range(geometry.layers)
            for part in ("key", "value")
        }
        for cache in self._cache.values():  # a masked position must not be NaN
            call("cudaMemsetAsync", cache.pointer, 0, cache.nbytes, self._plan.stream)
        self._shape = (geometry.kv_heads, geometry.max_sequence, geometry.head_dim)
        self._inputs = {name: Buffer(8 * 3 * max(slots, PREFILL_TOKENS)) for name in _DECODER_INPUTS}
        self._embeddings, self._text_only = Buffer(self.hidden * 4), Buffer(self.hidden * 4)
        call("cudaMemsetAsync", self._text_only.pointer, 0, self._text_only.nbytes, self._plan.stream)
        self._held: np.ndarray | None = None  # the prompt's embeddings that are on the device
        self._logits = np.zeros((slots, geometry.vocab), np.float32)
        self._device_logits = Buffer(self._logits.nbytes)
        self._graphs: dict[int, object] = {}  # captured step of so many sequences
        self._is_warm = False

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
        rows = len(image_embeddings)
        if rows and image_embeddings is not self._held:  # the pieces of a prompt come with the same array
            value = image_embeddings.astype(self._dtype)
            self._plan.synchronize()
            self._embeddings.reserve(value.nbytes)
            self._plan.upload(self._embeddings.pointer, value)
            self._held = image_embeddings
        context = self._plan.context(PREFILL)
        for start in range(0, len(input_ids), PREFILL_TOKENS):
            piece = slice(start, start + PREFILL_TOKENS)
            tokens = len(input_ids[piece])
            self._feed(
                input_ids=input_ids[None, piece],
                image_index=image_index[None, piece],
                position_ids=position_ids[:, None, piece],
                write_index=self.lengths[slot : slot + 1],
                logits_index=np.full((1, 1), tokens - 1),
            )
            embeddings = self._embeddings if rows else self._text_only
            self._bind(context, 1, tokens, slot=slot, embeddings=embeddings, rows=max(rows, 1))
            self._plan.enqueue(context)
            self.lengths[slot] += tokens
        if not is_last:
            return None
        self._plan.download(self._logits[:1], self._device_logits.pointer)
        return self._logits[0]

    def step(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        active = len(input_ids)
        self._feed(
            input_ids=input_ids[:, None],
            image_index=np.full((active, 1), -1),
            position_ids=np.broadcast_to(positions[:, None], (3, active, 1)),
            write_index=self.lengths[:active],
            logits_index=np.zeros((active, 1)),
        )
        if active in self._graphs:
            call("cudaGraphLaunch", self._graphs[active], self._plan.stream)
        else:
            context = self._plan.context(DECODE, active)
            self._bind(context, active, 1, slot=0, embeddings=self._text_only, rows=1)
            self._plan.enqueue(context)  # once as it is: kernels are chosen and loaded now, which a capture forbids
            if (graph := self._plan.capture(context)) is not None:
                self._graphs[active] = graph
        self._plan.download(self._logits[:active], self._device_logits.pointer)
        self.lengths[:active] += 1
        if not self._is_warm:
            self._is_warm = True
            self._plan.keep()
        return self._logits[:active]

    def move(self, source: int, target: int) -> None:
        self.lengths[target] = self.lengths[source]
        size = self._slot_bytes
        for cache in self._cache.values():
            self._plan.copy(cache.pointer + target * size, cache.pointer + source * size, size)

    def read_cache(self, slot: int, start: int, stop: int) -> np.ndarray:
        heads, positions, width = self._shape
        rows = np.empty((len(self._cache), heads, stop - start, width), self._dtype)
        for pointer, values in device_rows(rows, self._pointers(), positions, slot, start):
            self._plan.download(values, pointer)
        return rows

    def write_cache(self, slot: int, start: int, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, self._dtype)
        for pointer, values in device_rows(rows, self._pointers(), self._shape[1], slot, start):
            self._plan.upload(pointer, values)
        self._plan.synchronize()  # `rows` is gone when this returns
        self.lengths[slot] = start + rows.shape[2]

    def _pointers(self) -> list[int]:
        return [cache.pointer for cache in self._cache.values()]

    def _feed(self, **inputs: np.ndarray) -> None:
        """Upload int64 inputs; their addresses stay, as a captured step reads them again."""
        for name, value in inputs.items():
            self._plan.upload(self._inputs[name].pointer, value.astype(np.int64))
        self._plan.synchronize()  # the arrays are gone when this returns

    def _bind(self, context, batch: int, tokens: int, *, slot: int, embeddings: Buffer, rows: int) -> None:
        """Shapes and addresses of a run; past and present of a layer are one buffer, so that attention updates it."""
        shapes = {
            "input_ids": (batch, tokens),
            "image_index": (batch, tokens),
            "position_ids": (3, batch, tokens),
            "write_index": (batch,),
            "logits_index": (batch, 1),
        }
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
            context.set_tensor_address(name, self._inputs[name].pointer)
        context.set_input_shape("image_embeddings", (rows, self.hidden))
        context.set_tensor_address("image_embeddings", embeddings.pointer)
        for name, cache in self._cache.items():
            context.set_input_shape(f"past_{name}", (batch, *self._shape))
            for end in ("past", "present"):
                context.set_tensor_address(f"{end}_{name}", cache.pointer + slot * self._slot_bytes)
        context.set_tensor_address("logits", self._device_logits.pointer)


_DECODER_INPUTS = ("input_ids", "image_index", "position_ids", "write_index", "logits_index")
