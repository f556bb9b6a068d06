"""What every served model does alike inside Triton's Python backend: find its bundle, log, answer with an error."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import triton_python_backend_utils as pb_utils

from cxr_triton.pipeline import wire_error


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


def array(request, name: str):
    """An input as an array that outlives the request, or None when it was not sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().copy()


def text(request, name: str) -> str:
    """The only element of a BYTES input."""
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)[0].decode()


def error_response(error: Exception):
    """The error as Triton passes it on: ``[CODE] message``."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(wire_error(error)))
