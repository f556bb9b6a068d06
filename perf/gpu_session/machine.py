"""What the machine of a session has, and which steps it is ready for."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
from importlib import metadata

from cxr_triton.perf.environment import nvidia_smi

ALL = "prepare providers parity speed stack"
PARTS = {  # distribution: (module, steps that need it, MiB of its wheel for Python 3.12)
    "torch": ("torch", ALL, None),
    "transformers": ("transformers", "parity speed", None),
    "onnx": ("onnx", ALL, None),
    "onnxruntime-gpu": ("onnxruntime", "providers parity speed stack", 243.7),
    "ml-dtypes": ("ml_dtypes", ALL, None),
    "tokenizers": ("tokenizers", "prepare parity speed stack", None),
    "click": ("click", ALL, None),
    "tqdm": ("tqdm", ALL, None),
    "cuda-bindings": ("cuda.bindings.runtime", "providers parity speed stack", None),
    "imagecodecs": ("imagecodecs", "stack", 27.0),
    "pydicom": ("pydicom", "stack", 2.3),
    "tritonclient": ("tritonclient", "stack", 13.3),
    "nvidia-pytriton": ("pytriton", "stack", 52.8),
    "scipy": ("scipy", "stack", None),
}
"""Sizes are None where a machine with torch is expected to have it."""
OPTIONAL = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Engines that are tried where they are installed."""


def check(is_dry: bool) -> dict:
    """What this machine has, and which steps it is ready for."""
    present: dict[str, str | None] = {}
    missing: dict[str, list[str]] = {}
    for name, (module, steps, _) in PARTS.items():
        # Of Triton only the server is used, not its module, which needs more packages.
        found, why = (_installed if name == "nvidia-pytriton" else importable)(module)
        if found:
            present[name] = version(name)
            continue
        for step in steps.split() if not (is_dry and name.startswith("cuda")) else ():
            missing.setdefault(step, []).append(f"{name} ({why})")
    found_gpu = gpu()
    if found_gpu is None and not is_dry:
        for step in ALL.split():
            missing.setdefault(step, []).append("an NVIDIA GPU that torch can use")
    return {
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "gpu": found_gpu},
        "free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "present": present,
        "optional": {name: version(f"{name}-cu13") or version(name) for name in OPTIONAL},
        "providers": _providers(),
        "missing": missing,
    }


def importable(module: str) -> tuple[bool, str]:
    """Whether a module loads, and why not."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return True, ""


def _installed(module: str) -> tuple[bool, str]:
    return bool(importlib.util.find_spec(module)), "not installed"


def version(name: str) -> str | None:
    """Of a distribution; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def gpu() -> dict | None:
    """The first GPU that torch can use."""
    if not importable("torch")[0]:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": next((found["driver_version"] for found in nvidia_smi("driver_version")), None),
    }


def _providers() -> list[str]:
    if not importable("onnxruntime")[0]:
        return []
    import onnxruntime

    return onnxruntime.get_available_providers()
