"""TensorRT-RTX: plans compiled ahead of time for a compute capability, which takes no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cxr_triton.engines.tensorrt import TensorRT
from cxr_triton.engines.tensorrt.library import Library, Target
from cxr_triton.errors import InvalidRecipe

if TYPE_CHECKING:
    from cxr_triton.engines.recipe import Recipe

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX 1.7 builds for: its enumeration `ComputeCapability`."""


class RtxLibrary(Library):
    """TensorRT-RTX, which compiles its kernels on the machine that opens a plan."""

    name, extra, module = "tensorrt-rtx", "rtx", "tensorrt_rtx"
    least_version = least_for_vision = (1, 7)  # what is tested
    last_major = 1
    keeps_times = False

    def target(self, recipe: Recipe) -> Target:
        return Target(str(recipe.compute_capability), None)

    def configure(self, trt, config, target: Target) -> None:
        capability = target.compute_capability  # or "current": of the GPU that is here
        name = "CURRENT" if capability == "current" else f"SM{capability.replace('.', '')}"
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[name], 0)

    def kernels(self, trt, engine, plan: Path, gpu: str):
        from cxr_triton.engines.tensorrt_rtx.session import Kernels

        return Kernels(trt, engine, plan, gpu)


class TensorRTRTX(TensorRT):
    """TensorRT with another library."""

    name = RtxLibrary.name
    extra = RtxLibrary.extra
    distributions = ("tensorrt-rtx-cu13",)
    library = RtxLibrary()

    def check_target(self, recipe, graph: str) -> None:
        super().check_target(recipe, graph)
        if recipe.compute_capability not in CAPABILITIES:
            raise InvalidRecipe(
                f"compute_capability: tensorrt-rtx builds for {', '.join(CAPABILITIES)}, not for "
                f"{recipe.compute_capability}; use tensorrt"
            )

    def container(self, recipe: Recipe, version: str) -> dict | None:
        return None  # no container of Triton has it


ENGINE = TensorRTRTX()
