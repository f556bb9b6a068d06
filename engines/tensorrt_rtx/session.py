"""What TensorRT-RTX compiles on a machine for a plan, kept for the next start."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from cxr_triton.engines.plan_cache import default_folder


class Kernels:
    """The runtime cache of a plan; a damaged file is ignored.

    Attributes
    ----------
    config : IRuntimeConfig
        For execution contexts that use the cache.
    """

    def __init__(self, trt, engine, plan: Path, gpu: str):
        key = hashlib.sha256(f"{plan.stat().st_size} {gpu} {trt.__version__}".encode())
        with open(plan, "rb") as file:
            key.update(file.read(1 << 20))
        self._path = default_folder().with_name("kernels") / key.hexdigest()
        self.config = engine.create_runtime_config()
        self._cache = self.config.create_runtime_cache()
        with contextlib.suppress(OSError):
            self._cache.deserialize(self._path.read_bytes())
        self.config.set_runtime_cache(self._cache)

    def write(self) -> None:
        """Keep what was compiled so far."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            partial.write_bytes(bytes(self._cache.serialize()))
            os.replace(partial, self._path)
