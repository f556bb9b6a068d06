"""Where a checkpoint lies in a bundle, and where the Python is that has vLLM."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from cxr_triton.errors import DeviceUnavailable

NAME = FOLDER = "vllm"
FILES = ("config.json", "tokenizer.json")
INTERPRETER = "CXR_VLLM_PYTHON"
"""Variable of the environment: the Python that has vLLM, where the one that asks has not."""
TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def engine_type(precision: str, compute: str) -> str:
    """Type that vLLM computes in: the weights' own; of quantized ones the tower's, and bf16 beside one in fp32."""
    return precision if precision in TYPES else "bf16" if compute == "fp32" else compute


def interpreters() -> Iterator[str]:
    """Pythons that should have vLLM, likeliest first."""
    if named := os.environ.get(INTERPRETER):
        yield named
        return
    if importlib.util.find_spec("vllm"):
        from cxr_triton.pixels.sandbox import interpreters as own

        yield from own()


def interpreter() -> str:
    """The Python that has vLLM.

    Raises
    ------
    DeviceUnavailable
        There is none.
    """
    for path in interpreters():
        if os.access(path, os.X_OK) and Path(path).is_file():
            return path
    named = os.environ.get(INTERPRETER)
    raise DeviceUnavailable(
        f"{INTERPRETER} names {named}, which is no program; name the Python that has vLLM"
        if named
        else f"vLLM is not installed in this Python; install it in an environment of its own, see docs/install.md, and "
        f"name its Python in {INTERPRETER}"
    )
