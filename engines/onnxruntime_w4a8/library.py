"""The compiled library of this room, with the operator `cxr_triton.W4A8MatMul` for ONNX Runtime."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from cxr_triton.engines.interface import Need
from cxr_triton.errors import DeviceUnavailable

REMEDY = "install a C compiler (apt-get install gcc) and install cxr-triton again"


def path() -> Path | None:
    """The library's file; None where there was no C compiler when the package was installed."""
    files = (Path(__file__).with_name("products" + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def require() -> Path:
    """The library's file; raises `DeviceUnavailable` where there is none."""
    if (file := path()) is None:
        raise DeviceUnavailable(f"products of int4 by int8 were not compiled when cxr-triton was installed; {REMEDY}")
    return file


def need() -> Need:
    """The library, as `Engine.needs` tells it."""
    is_met = path() is not None
    return Need(
        what="compiled products",
        found="compiled" if is_met else "not compiled",
        wanted="compiled",
        is_met=is_met,
        remedy=REMEDY,
    )
