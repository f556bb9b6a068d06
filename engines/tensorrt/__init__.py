"""TensorRT: plans whose kernels are timed on the GPU that will run them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cxr_triton.engines.interface import Compiled, GpuEngine, without_table
from cxr_triton.errors import InvalidBundle

if TYPE_CHECKING:
    from cxr_triton.engines.recipe import Recipe
    from cxr_triton.engines.tensorrt.compiler import Target


class TensorRT(GpuEngine):
    """TensorRT, and what a library with its Python interface does differently.

    Attributes
    ----------
    module : str
        Python module of the library.
    least_version : (int, int)
        The first with the decoder's layers: `KV_CACHE_UPDATE`, `ATTENTION` and `ROTARY_EMBEDDING`.
    least_for_vision : (int, int)
        The first for the vision graph, which has none of those.
    last_major : int
        Last major version whose interface is known to have what is called here; the next one may remove it.
    keeps_times : bool
        It times kernels, and a later build may use the times.
    """

    name = "tensorrt"
    extra = "trt"
    distributions = ("tensorrt-cu13",)
    suffixes = ("plan",)
    module: ClassVar[str] = "tensorrt"
    least_version: ClassVar[tuple[int, int]] = (10, 15)
    least_for_vision: ClassVar[tuple[int, int]] = (10, 14)  # as beside TensorRT-LLM's last engines
    last_major: ClassVar[int] = 11
    keeps_times: ClassVar[bool] = True

    def target(self, recipe: Recipe) -> Target:
        """What a recipe's plans are built for; raises `DeviceUnavailable`."""
        from cxr_triton.engines.tensorrt.compiler import device_target

        return device_target(recipe)

    def configure(self, trt, config, target: Target) -> None:
        """Set in a builder's config what the library wants to be told of the target."""

    def kernels(self, trt, engine, plan: Path, gpu: str):
        """What the library compiles when a plan is opened, kept with `write`; None if nothing."""
        return None

    def container(self, recipe: Recipe, version: str) -> dict | None:
        """Whether the recipe's container runs plans of a version."""
        from cxr_triton.engines.tensorrt.compiler import container_match

        return container_match(recipe.container, version)

    def compile(self, job, folder: Path) -> Compiled:
        from cxr_triton import __version__
        from cxr_triton.engines.bundle import sha256
        from cxr_triton.engines.plan_cache import PlanCache, plan_key
        from cxr_triton.engines.tensorrt.compiler import compile_graph, load_library, shape_ranges
        from cxr_triton.profile import load_profile

        library, plan, source = load_library(self, job.graph), folder / f"{job.graph}.plan", job.source
        chosen, sequence = self.target(job.recipe), job.geometry.max_sequence
        images = load_profile(source / "profile.yaml").max_images
        ranges = shape_ranges(job.graph, job.geometry, job.recipe, images)
        kept, timing, key = PlanCache(Path(job.cache)) if job.cache else None, None, ""
        if kept:
            names = (f"{job.graph}.onnx", f"{job.graph}.onnx.data")
            key = plan_key(
                {
                    "graphs": [sha256(source / name, job.progress) for name in names],
                    "shapes": ranges,
                    "max_sequence": sequence,
                    "engine": self.name,
                    "version": library.__version__,
                    "cxr_triton": __version__,
                    **dataclasses.asdict(chosen),
                }
            )
            if self.keeps_times:
                name = f"timing-{self.name}-{library.__version__}-{chosen.compute_capability}.cache"
                timing = kept.folder / name
        report = kept.get(key, plan) if kept else None
        if report is None:
            report = compile_graph(
                self,
                source / f"{job.graph}.onnx",
                plan,
                ranges,
                max_sequence=sequence,
                target=chosen,
                timing_cache=timing,
            )
            if kept:
                kept.put(key, plan, report)
        return Compiled({self.name: report["version"]}, report, self.container(job.recipe, report["version"]))

    def open_vision(self, bundle, *, threads: int | None = None):
        from cxr_triton.engines.tensorrt.session import TensorRTVision, open_plan

        return TensorRTVision(open_plan(self, bundle, "vision"), bundle)

    def open_decoder(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        from cxr_triton.engines.tensorrt.session import TensorRTDecoder, open_plan

        return TensorRTDecoder(open_plan(self, bundle, "decoder"), bundle, slots=slots)

    def run_bytes(self, bundle, graph: str) -> int:
        try:
            return without_table(bundle, graph, int(bundle.manifest["plans"][graph]["weights_bytes"]))
        except (KeyError, TypeError, ValueError):
            raise InvalidBundle(
                f"manifest.json: plans.{graph}.weights_bytes is missing, so the bytes of a step are not known; "
                "build the bundle again"
            ) from None


ENGINE = TensorRT()
