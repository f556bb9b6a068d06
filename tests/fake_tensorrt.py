"""A TensorRT and a CUDA runtime whose device is host memory and whose plan is an ONNX graph in ONNX Runtime.

They hold the sessions to what the real ones demand: addresses and shapes set before a run, cache updated in place,
nothing read that was not bound, a captured step that replays what was bound when it was captured.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime

VERSION = "1.7.0"
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class Cuda:
    """`cuda.bindings.runtime` on host memory, as far as it is used."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self):
        self.memory: dict[int, ctypes.Array] = {}
        self.capturing: list | None = None
        self.launched = 0

    def cudaGetDeviceCount(self):
        return 0, 1

    def cudaGetDevice(self):
        return 0, 0

    def cudaGetDeviceProperties(self, device):
        return 0, SimpleNamespace(name=b"Paper GPU", major=8, minor=9, totalGlobalMem=1 << 34)

    def cudaGetErrorString(self, status):
        return 0, b"an error"

    def cudaMalloc(self, size):
        buffer = (ctypes.c_char * size)()
        ctypes.memset(buffer, 0xFF, size)  # NaN where nothing was written
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaFree(self, pointer):
        del self.memory[pointer]
        return (0,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        assert self.capturing is None
        for pointer in ((target,), (source,), (target, source))[kind - 1]:
            self.check(pointer, size)
        ctypes.memmove(target, source, size)
        return (0,)

    def cudaMemsetAsync(self, pointer, value, size, stream):
        self.check(pointer, size)
        ctypes.memset(pointer, value, size)
        return (0,)

    def cudaStreamCreate(self):
        return 0, 7

    def cudaStreamSynchronize(self, stream):
        assert self.capturing is None
        return (0,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing = []
        return (0,)

    def cudaStreamEndCapture(self, stream):
        graph, self.capturing = self.capturing, None
        return 0, graph

    def cudaGraphInstantiate(self, graph, flags):
        assert graph
        return 0, graph

    def cudaGraphDestroy(self, graph):
        return (0,)

    def cudaGraphLaunch(self, graph, stream):
        self.launched += 1
        for run in graph:
            run()
        return (0,)

    def check(self, pointer, size):
        """That so many bytes from here on lie in one buffer."""
        assert any(start <= pointer and pointer + size <= start + len(b) for start, b in self.memory.items())


class Context:
    """An execution context of one profile."""

    def __init__(self, engine, cuda):
        self._engine, self._cuda = engine, cuda
        self._shapes, self._addresses, self._profile, self._scratch = {}, {}, None, False
        self._is_captured = False  # what was captured must not change: TensorRT leaves undefined what happens then

    def set_optimization_profile_async(self, profile, stream):
        self._profile = profile

    def set_device_memory(self, pointer, size):
        self._cuda.check(pointer, size)
        self._scratch = True

    def set_input_shape(self, name, shape):
        assert not self._is_captured
        least, _, most = self._engine.profiles[self._profile][name]
        assert all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)), (name, shape, least, most)
        self._shapes[name] = tuple(shape)

    def set_tensor_address(self, name, pointer):
        self._addresses[name] = pointer

    def is_stream_capturable(self, stream):
        return True

    def execute_async_v3(self, stream):
        assert self._scratch
        shapes, addresses = dict(self._shapes), dict(self._addresses)

        def run():
            session = self._engine.session
            feeds = {
                i.name: self._view(addresses[i.name], shapes[i.name], _TYPES[i.type]) for i in session.get_inputs()
            }
            values = session.run(None, {name: value.copy() for name, value in feeds.items()})
            for output, value in zip(session.get_outputs(), values, strict=True):
                if output.name.startswith("present_"):
                    past = addresses[output.name.replace("present", "past")]
                    assert addresses[output.name] == past  # TensorRT updates the cache in place
                self._view(addresses[output.name], value.shape, value.dtype)[...] = value

        if self._cuda.capturing is None:
            run()
        else:
            self._cuda.capturing.append(run)
            self._is_captured = True
        return True

    def _view(self, pointer, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._cuda.check(pointer, size)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer)).view(dtype).reshape(shape)


class Engine:
    def __init__(self, path, profiles, cuda):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.profiles, self._cuda = profiles, cuda
        self.num_optimization_profiles = len(profiles)
        self.contexts = 0

    def get_tensor_profile_shape(self, name, profile):
        return list(self.profiles[profile][name])

    def get_device_memory_size_for_profile_v2(self, profile):
        return 1024 * (profile + 1)

    def create_runtime_config(self):
        return SimpleNamespace(
            create_runtime_cache=lambda: SimpleNamespace(deserialize=lambda data: True, serialize=lambda: b"kernels"),
            set_runtime_cache=lambda cache: True,
            set_execution_context_allocation_strategy=lambda strategy: None,
        )

    def create_execution_context(self, choice):
        self.contexts += 1
        return Context(self, self._cuda)


def library(cuda: Cuda, graphs: dict[bytes, tuple[Path, list]]):
    """A module in place of `tensorrt_rtx`; a plan's bytes name its graph and profiles in `graphs`."""

    class Runtime:
        def __init__(self, log):
            pass

        def deserialize_cuda_engine(self, plan):
            found = graphs.get(bytes(plan))
            return found and Engine(str(found[0]), found[1], cuda)

    return SimpleNamespace(
        __version__=VERSION,
        Runtime=Runtime,
        ILogger=type("ILogger", (), {"ERROR": 1, "__init__": lambda self: None}),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=1),
    )
