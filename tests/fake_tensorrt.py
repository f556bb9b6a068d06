"""A TensorRT and a CUDA runtime whose device is host memory and whose plan is an ONNX graph in ONNX Runtime.

They hold compiler and sessions to what the real ones demand: addresses and shapes set before a run, cache updated in
place, nothing read that was not bound, a captured step that replays what was bound when it was captured. TensorRT is
played in the versions of `tensorrt_api.json`: a class has the names that this version's class has, and no other.
"""

from __future__ import annotations

import ctypes
import enum
import json
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import tensorrt_api

API = tensorrt_api.read()
_LAYERS = {
    "Attention": "ATTENTION_INPUT",
    "MatMul": "MATRIX_MULTIPLY",
    "RotaryEmbedding": "ROTARY_EMBEDDING",
    "TensorScatter": "KV_CACHE_UPDATE",
}
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
        self.launched = self.captures = 0
        self.forbids_capture = self.is_too_old = False

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
        self.captures += 1
        return (0,)

    def cudaStreamEndCapture(self, stream):
        graph, self.capturing = self.capturing, None
        return (901, None) if self.forbids_capture else (0, graph)

    def cudaGetLastError(self):
        return (901 if self.forbids_capture else 0,)

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


class _Bound:
    """As an object of C++: it takes no attribute that its class does not have."""

    def __setattr__(self, name, value):
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)


class IExecutionContext(_Bound):
    def __init__(self, engine, cuda):
        self._engine, self._cuda = engine, cuda
        self._shapes, self._addresses, self._profile, self._scratch = {}, {}, None, False
        self._is_captured = False  # what was captured must not change: TensorRT leaves undefined what happens then

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self._profile = profile_index
        return True

    def set_device_memory(self, memory, size):
        self._cuda.check(memory, size)
        assert size >= self._engine.get_device_memory_size_for_profile_v2(0)
        self._scratch = True

    def set_input_shape(self, name, shape):
        assert not self._is_captured
        least, _, most = self._engine._profiles[self._profile][name]
        assert all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)), (name, shape, least, most)
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return True

    def is_stream_capturable(self, stream):
        return not self._cuda.forbids_capture

    def execute_async_v3(self, stream_handle):
        assert self._scratch
        shapes, addresses = dict(self._shapes), dict(self._addresses)

        def run():
            session = self._engine._session
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
        elif self._cuda.forbids_capture:
            return False
        else:
            self._cuda.capturing.append(run)
            self._is_captured = True
        return True

    def _view(self, pointer, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._cuda.check(pointer, size)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer)).view(dtype).reshape(shape)


class IRuntimeCache(_Bound):
    def deserialize(self, data):
        return True

    def serialize(self):
        return b"kernels"


class IRuntimeConfig(_Bound):
    def create_runtime_cache(self):
        return self._trt.IRuntimeCache()

    def set_runtime_cache(self, cache):
        return True

    def set_execution_context_allocation_strategy(self, strategy):
        self._strategy = strategy


class ICudaEngine(_Bound):
    def __init__(self, plan, cuda):
        self._session = onnxruntime.InferenceSession(plan["graph"], providers=["CPUExecutionProvider"])
        self._profiles, self._cuda = plan["profiles"], cuda

    @property
    def num_optimization_profiles(self):
        return len(self._profiles)

    def get_tensor_profile_shape(self, name, profile_index):
        return list(self._profiles[profile_index][name])

    def get_device_memory_size_for_profile_v2(self, profile_index):
        return 1024 * (profile_index + 1)

    def create_runtime_config(self):
        return self._trt.IRuntimeConfig()

    def create_execution_context(self, strategy):
        chosen = getattr(strategy, "_strategy", strategy)
        assert chosen is self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._trt.IExecutionContext(self, self._cuda)


class Runtime(_Bound):
    def __init__(self, logger):
        if self._cuda.is_too_old:
            logger.log(1, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            plan = {}
        if plan.get("version") != self._trt.__version__:
            self._logger.log(1, "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.")
            return None
        return self._trt.ICudaEngine(plan, self._cuda)


class ITensor(_Bound):
    def __init__(self, value):
        tensor = value.type.tensor_type
        self._value, self._type = value, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        self._shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)

    name = property(lambda self: self._value.name)
    shape = property(lambda self: self._shape)
    dtype = property(lambda self: self._type)


class ILayer(_Bound):
    def __init__(self, kind):
        self._kind = kind

    type = property(lambda self: self._kind)


class INetworkDefinition(_Bound):
    def __init__(self, is_strongly_typed):
        self._is_strongly_typed, self._path, self._inputs, self._layers = is_strongly_typed, None, [], []

    num_inputs = property(lambda self: len(self._inputs))
    num_layers = property(lambda self: len(self._layers))

    def get_input(self, index):
        return self._inputs[index]

    def get_layer(self, index):
        return self._layers[index]


class ParserError(_Bound):
    def __init__(self, node):
        self._node = node

    def node(self):
        return 0

    def node_name(self):
        return self._node.name

    def node_operator(self):
        return self._node.op_type

    def desc(self):
        return f"No importer registered for op: {self._node.op_type}"


class OnnxParser(_Bound):
    def __init__(self, network, logger):
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index):
        return self._errors[index]

    def parse(self, model, path=None):
        graph, kinds = onnx.load_from_string(model).graph, self._trt.LayerType
        used = [node for node in graph.node if node.op_type in _LAYERS]
        self._errors = [self._trt.ParserError(n) for n in used if not hasattr(kinds, _LAYERS[n.op_type])]
        self._network._path = path
        self._network._inputs = [self._trt.ITensor(value) for value in graph.input]
        if not self._errors:
            self._network._layers = [self._trt.ILayer(kinds[_LAYERS[node.op_type]]) for node in used]
        return not self._errors


class IOptimizationProfile(_Bound):
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)), (input, min, opt, max)
        self._shapes[input] = (min, opt, max)


class ITimingCache(_Bound):
    def __init__(self, card):
        self._card = card

    def serialize(self):
        return b"times of " + self._card


class IBuilderConfig(_Bound):
    progress_monitor = None
    num_compute_capabilities = 0

    def __init__(self):
        self._profiles, self._target, self._times = [], None, None

    def add_optimization_profile(self, profile):
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    def set_compute_capability(self, compute_capability, index):
        assert index < self.num_compute_capabilities
        self._target = compute_capability

    def create_timing_cache(self, serialized_timing_cache):
        if not serialized_timing_cache:
            return self._trt.ITimingCache(b"Paper GPU")
        start, found, card = bytes(serialized_timing_cache).partition(b"times of ")
        return self._trt.ITimingCache(card) if found and not start else None

    def set_timing_cache(self, cache, ignore_mismatch):
        if not ignore_mismatch and cache._card != b"Paper GPU":
            return False
        self._times = cache
        return True

    def get_timing_cache(self):
        return self._times


class Builder(_Bound):
    def __init__(self, logger):
        self._logger = logger

    def create_network(self, flags=0):
        trt = self._trt
        asked = bool(flags >> int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) & 1)
        return trt.INetworkDefinition(asked or not hasattr(trt.BuilderFlag, "FP16"))

    def create_builder_config(self):
        return self._trt.IBuilderConfig()

    def create_optimization_profile(self):
        return self._trt.IOptimizationProfile()

    def build_serialized_network_to_stream(self, network, config, writer):
        names = {tensor.name for tensor in network._inputs}
        assert config._profiles and all(profile.keys() == names for profile in config._profiles)
        assert config._target is not None or not hasattr(self._trt, "ComputeCapability")
        config.progress_monitor.phase_start("Building Engine", None, 1)
        plan = {
            "version": self._trt.__version__,
            "graph": network._path,
            "profiles": config._profiles,
            "is_strongly_typed": network._is_strongly_typed,
        }
        data = json.dumps(plan).encode()
        done = all(writer.write(part) == len(part) for part in (data[:7], data[7:]))
        if not config.progress_monitor.step_complete("Building Engine", 0):
            return False
        config.progress_monitor.phase_finish("Building Engine")
        return done


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IStreamWriter:
    pass


class IProgressMonitor:
    pass


_ENUMERATIONS = (
    *("BuilderFlag", "ComputeCapability", "ExecutionContextAllocationStrategy", "LayerType"),
    "NetworkDefinitionCreationFlag",
)
_CLASSES = (
    *(Builder, IBuilderConfig, ICudaEngine, IExecutionContext, ILayer, ILogger, INetworkDefinition),
    *(IOptimizationProfile, IProgressMonitor, IRuntimeCache, IRuntimeConfig, IStreamWriter, ITensor, ITimingCache),
    *(OnnxParser, ParserError, Runtime),
)


def library(version: str, cuda: Cuda):
    """A module in place of `tensorrt` or `tensorrt_rtx`, in a version of `API`."""
    names, trt = API[version], SimpleNamespace(__version__=version)
    for implementation in _CLASSES:
        name = implementation.__name__
        if name in names:
            own = {k: v for k, v in vars(implementation).items() if k not in ("__dict__", "__weakref__")}
            kept = {k: v for k, v in own.items() if k.startswith("_") or k in names[name]}
            kept |= {"_trt": trt, "_cuda": cuda}
            setattr(trt, name, type(name, implementation.__bases__, kept))
    for name in _ENUMERATIONS:
        if name in names:
            members = sorted(names[name] - {"name", "value"})
            setattr(trt, name, enum.IntEnum(name, members, start=0))
    return trt
