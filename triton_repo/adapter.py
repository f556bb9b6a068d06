"""What every served model does alike inside Triton's Python backend: find its bundle, log, answer with an error."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from cxr_triton.engines import engine
from cxr_triton.engines.pipeline import wire_error
from cxr_triton.errors import InvalidRequest
from cxr_triton.trace import trace_id_of
from cxr_triton.triton_repo.serve import GRPC_ADDRESS


def parameters(args: dict) -> dict[str, str]:
    """The parameters of a model's ``config.pbtxt``; ``bundle`` as the absolute path.

    Logging is set up too: what goes to standard error stands in the server's log.
    """
    logging.basicConfig(stream=sys.stderr, format=f"%(levelname)s {args['model_instance_name']} %(message)s")
    configured = json.loads(args["model_config"])["parameters"]
    values = {name: entry["string_value"] for name, entry in configured.items()}
    if "bundle" in values:
        # `model_repository` is the model's own folder.
        values["bundle"] = str(Path(args["model_repository"]).parent / values["bundle"])
    return values


def open_runtime(bundle, values: dict[str, str]):
    """The `Runtime` of a bundle's decoder engine, as the parameters of `decoder` ask for it."""
    return engine(bundle.engine).open_runtime(bundle, values, os.environ.get(GRPC_ADDRESS, "127.0.0.1:8001"))


def input_types(args: dict) -> dict[str, str]:
    """Type of each input of a model, as ``TYPE_FP32``."""
    return {tensor["name"]: tensor["data_type"] for tensor in json.loads(args["model_config"])["input"]}


def array(request, name: str, kind: str):
    """An input of a type as an array that outlives the request, or None when it was not sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    return _bfloat16(tensor) if kind == "TYPE_BF16" else tensor.as_numpy().copy()


class _DLTensor(ctypes.Structure):
    """Head of a DLPack tensor (dmlc/dlpack, version 0)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _bfloat16(tensor) -> np.ndarray:
    """A BF16 tensor in host memory; the backend gives numpy none, only DLPack."""
    import ml_dtypes

    capsule = tensor.to_dlpack()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    head = _DLTensor.from_address(pointer(capsule, b"dltensor"))
    shape = head.shape[: head.ndim]
    words = (ctypes.c_uint16 * math.prod(shape)).from_address(head.data + head.byte_offset)
    return np.frombuffer(words, ml_dtypes.bfloat16).reshape(shape).copy()


def text(request, name: str) -> str:
    """The only element of a BYTES input.

    Raises
    ------
    InvalidRequest
        It is not one element of UTF-8.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    elements = [] if tensor is None else tensor.as_numpy().reshape(-1)
    if len(elements) != 1:
        raise InvalidRequest(f"{name}: {len(elements)} elements, must be 1; call the ensemble cxr_reader")
    try:
        return elements[0].decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name}: not UTF-8 at byte {error.start}; call the ensemble cxr_reader") from None


def trace_of(request) -> str:
    """The trace id in a request's id, which its client chose; "" where that is no ``traceparent``."""
    return trace_id_of(request.request_id())


def error_response(error: Exception, request=None):
    """The error of a request as Triton passes it on: ``[CODE] message``.

    The models of a repository that an earlier release packaged say no request; theirs names no trace.
    """
    trace_id = trace_of(request) if request else ""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(wire_error(error, trace_id)))
