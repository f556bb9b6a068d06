"""Graphs to a running engine: bundle manifest, sessions, continuous-batching decoder runtime.

An engine is a room: a package whose `ENGINE` says all that there is to say of it, see `interface.Engine`. Nothing but
this table names one.
"""

from __future__ import annotations

from importlib import import_module

from cxr_triton.engines.interface import ABILITIES, Engine
from cxr_triton.errors import InvalidRequest, unknown_key

ROOMS = {
    "onnxruntime": "cxr_triton.engines.onnxruntime",
    "onnxruntime-int8": "cxr_triton.engines.onnxruntime_int8",
    "onnxruntime-w4a8": "cxr_triton.engines.onnxruntime_w4a8",
    "openvino": "cxr_triton.engines.openvino",
    "onnxruntime-openvino": "cxr_triton.engines.onnxruntime_openvino",
    "onnxruntime-cuda": "cxr_triton.engines.onnxruntime_cuda",
    "tensorrt": "cxr_triton.engines.tensorrt",
    "tensorrt-rtx": "cxr_triton.engines.tensorrt_rtx",
    "tensorrt-llm": "cxr_triton.engines.tensorrt_llm",
    "vllm": "cxr_triton.engines.vllm",
}
"""Name of an engine, as recipes and manifests write it, and its room."""
DEFAULT = "onnxruntime"
"""What runs both graphs where there is no recipe, and stands in for an engine that cannot run here."""


def engine(name: str) -> Engine:
    """The engine of a name; imports its room, which imports no library.

    Raises
    ------
    InvalidRequest
        There is none of this name.
    """
    if name not in ROOMS:
        raise InvalidRequest(unknown_key(name, ROOMS, "engines").replace("key", "engine", 1))
    found: Engine = import_module(ROOMS[name]).ENGINE
    return found


def engine_names(graph: str = "decoder") -> tuple[str, ...]:
    """Names of the engines that run a graph, ``vision`` or ``decoder``."""
    return tuple(name for name in ROOMS if graph in engine(name).graphs)


def without_adapter(name: str, adapter: str) -> str | None:
    """Why an engine does not run a decoder with a LoRA adapter, and what to do; None of one that does."""
    if engine(name).takes_adapter:
        return None
    able = " or ".join(other for other in ROOMS if engine(other).takes_adapter)
    return (
        f"LoRA adapter {adapter:.80} was asked for, {name} takes none; use {able}, or merge it into the checkpoint and "
        "export that by a profile that names no adapter"
    )


def require_ability(name: str, ability: str) -> None:
    """Refuse to ask of an engine what it cannot do.

    Parameters
    ----------
    name : str
        Of the engine.
    ability : str
        A key of `ABILITIES`.

    Raises
    ------
    InvalidRequest
        Names the engines that can.
    """
    able = [other for other in ROOMS if ability in engine(other).abilities]
    if name not in able:
        raise InvalidRequest(f"{ABILITIES[ability]} asked for, {name} has none; use {' or '.join(able)}")
