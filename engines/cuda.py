"""The little of CUDA's runtime that sessions use, with its errors as exceptions."""

from __future__ import annotations

from dataclasses import dataclass

from cxr_triton.errors import DeviceUnavailable, InternalError
from cxr_triton.extras import EXTRAS, remedy


def runtime():
    """The module `cuda.bindings.runtime`; raises `DeviceUnavailable` if it is not installed."""
    try:
        from cuda.bindings import runtime as cuda
    except ImportError as error:
        first, *more = (extra for extra, facts in EXTRAS.items() if "cuda" in facts["modules"])
        others = " or ".join(f"[{extra}]" for extra in more)
        raise DeviceUnavailable(
            f"CUDA's Python bindings cannot be loaded ({error}); {remedy(first)}, or with {others}"
        ) from None
    return cuda


def call(function: str, *arguments):
    """What a runtime function returns besides its status: nothing, a value or a tuple.

    Raises
    ------
    InternalError
        The call failed.
    """
    cuda = runtime()
    status, *values = getattr(cuda, function)(*arguments)
    if int(status):
        text = cuda.cudaGetErrorString(status)[1].decode()
        raise InternalError(f"{function} failed with CUDA error {int(status)} ({text}); restart the server")
    return values[0] if len(values) == 1 else tuple(values) or None


@dataclass(frozen=True)
class Device:
    """The current GPU."""

    name: str
    compute_capability: str
    memory_bytes: int


def device() -> Device:
    """The current GPU; raises `DeviceUnavailable` if there is none that the driver and this library can use."""
    cuda = runtime()
    status, count = cuda.cudaGetDeviceCount()
    if int(status) or not count:
        text = cuda.cudaGetErrorString(status)[1].decode() if int(status) else "none found"
        raise DeviceUnavailable(
            f"no NVIDIA GPU can be used here ({text}); run on a machine with a GPU and its driver, or use a recipe "
            "for a CPU"
        )
    properties = call("cudaGetDeviceProperties", call("cudaGetDevice"))
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Device(name.rstrip("\0"), f"{properties.major}.{properties.minor}", int(properties.totalGlobalMem))
