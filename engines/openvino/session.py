"""Sessions of a bundle's two graphs on OpenVINO."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cxr_triton.engines.openvino.compiler import load_library, open_core
from cxr_triton.engines.session import MANY_TOKENS, HostDecoder, HostGraph, VisionSession
from cxr_triton.errors import InvalidBundle

INT8_GROUP = 128  # activations that share one scale where weights are int4
_GIVE_BACK_S = 0.05
_MADV_DONTNEED = 4  # madvise(2)


def open_request(model: Path | bytes, threads: int | None, precision: str):
    """A graph, or an ONNX model's bytes, compiled for this CPU, with the buffers of one request.

    Raises
    ------
    DeviceUnavailable
        OpenVINO is not installed.
    RuntimeError
        It cannot load the graph.
    """
    core = open_core()
    # Where a processor has no bf16, OpenVINO would imitate it.
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    properties = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" and has_bf16 else "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": INT8_GROUP,
        "INFERENCE_NUM_THREADS": threads or 0,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # other processes of the server share the cores
    }
    return core.compile_model(core.read_model(model), "CPU", properties).create_infer_request()


def _request(path: Path, threads: int | None, precision: str) -> tuple[Any, _Packing]:
    """A request of a bundle's graph, and what gives back its mapped weights."""
    weights = path.with_suffix(".bin")
    before = _mapped(weights)
    try:
        request = open_request(path, threads, precision)
    except RuntimeError as error:
        raise InvalidBundle(
            f"openvino cannot load {path.name} ({' '.join(str(error).split())[-300:]}); build the bundle again here"
        ) from None
    return request, _Packing(_mapped(weights) - before)


def _mapped(file: Path) -> set[tuple[int, int]]:
    """Where a file is mapped to be read: first address and the one after the last."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:  # another system
        return set()
    fields = (line.split(maxsplit=5) for line in lines)
    places = (place for place, access, *_, path in fields if access == "r--s" and path == os.path.realpath(file))
    return {(int(start, 16), int(end, 16)) for start, _, end in (place.partition("-") for place in places)}


class _Packing:
    """First runs of a graph, in which OpenVINO copies mapped weights into the order of its kernels.

    What it has read of the file would stay resident beside the copies. So it is given back meanwhile: pages of a file
    that is mapped for reading come again from the disk's cache, should they be needed.

    Parameters
    ----------
    places : set of (int, int)
        Addresses of the mapping, which lasts as long as the request.
    """

    def __init__(self, places: set[tuple[int, int]]):
        self._places = places
        self._done: set[bool] = set()

    @contextlib.contextmanager
    def around(self, *, is_one: bool = False) -> Iterator[None]:
        """What runs within may be the first run of its kind; a product of one row has kernels of its own."""
        if is_one in self._done:
            yield
            return
        over = threading.Event()
        thread = threading.Thread(target=self._keep_giving_back, args=(over,), daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread is to be had: all is given back at the end
            thread.start()
        try:
            yield
        finally:
            over.set()
            if thread.ident:
                thread.join()
            self._give_back()
            self._done.add(is_one)

    def _keep_giving_back(self, over: threading.Event) -> None:
        while not over.wait(_GIVE_BACK_S):
            self._give_back()

    def _give_back(self) -> None:
        with contextlib.suppress(AttributeError):  # a system without madvise keeps them
            madvise = ctypes.CDLL(None).madvise
            for start, end in self._places:
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


class OpenVINOVision(VisionSession):
    """The vision graph of a bundle, in the recipe's precision.

    Raises
    ------
    DeviceUnavailable, InvalidBundle
        OpenVINO is missing, or cannot load the graph.
    """

    def __init__(self, bundle, *, threads: int | None = None):
        self._request, self._packing = _request(bundle.path / "vision.xml", threads, bundle.vision_precision)

    def _run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        with self._packing.around():
            return self._request.infer(feeds, share_inputs=True)["image_embeddings"]


class OpenVINOGraph(HostGraph):
    """The decoder graph of a bundle, fp32; where weights are int4 and the CPU has VNNI, activations are int8 by groups.

    Raises
    ------
    DeviceUnavailable, InvalidBundle
        OpenVINO is missing, or cannot load the graph.
    """

    def __init__(self, bundle, *, threads: int | None = None):
        self._tensor = load_library().Tensor
        self._request, self._packing = _request(bundle.path / "decoder.xml", threads, "fp32")
        self._bound: tuple[int, int] | None = None
        self._shared: list = []

    def run(
        self, cache: Mapping[str, np.ndarray], rows: slice, lengths: np.ndarray, inputs: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """See `HostGraph.run`."""
        tokens = inputs["input_ids"].shape[1]
        if tokens >= MANY_TOKENS:
            self._bind(self.held(cache, rows, lengths, tokens))
            self._bound = None
        elif self._bound != (rows.start, rows.stop):
            self._bind({name: part[rows] for name, part in cache.items()})
            self._bound = (rows.start, rows.stop)
        for name, value in {**inputs, "write_index": lengths}.items():
            self._request.set_tensor(name, self._tensor(np.ascontiguousarray(value)))
        with self._packing.around(is_one=inputs["input_ids"].size == 1):
            self._request.infer()
        new = {name: self._request.get_tensor(f"present_{name}").data for name in cache}
        self.append(cache, rows, lengths, new)
        return self._request.get_tensor("logits").data

    def forget(self) -> None:
        """See `HostGraph.forget`."""
        self._bound, self._shared = None, []

    def _bind(self, held: Mapping[str, np.ndarray]) -> None:
        """Have the graph read these rows of the cache where they lie."""
        self._shared = [self._tensor(part, shared_memory=True) for part in held.values()]
        for name, tensor in zip(held, self._shared, strict=True):
            self._request.set_tensor(f"past_{name}", tensor)


class OpenVINODecoder(HostDecoder):
    """The decoder of a bundle; see `OpenVINOGraph`."""

    def __init__(self, bundle, *, slots: int, threads: int | None = None):
        super().__init__(bundle, OpenVINOGraph(bundle, threads=threads), slots=slots)
