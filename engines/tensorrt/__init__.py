"""TensorRT: plans whose kernels are timed on the GPU that will run them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_triton.engines.interface import Compiled, GpuEngine, without_table
from cxr_triton.engines.tensorrt.library import Library
from cxr_triton.errors import InvalidBundle

if TYPE_CHECKING:
    from cxr_triton.engines.recipe import Recipe


class TensorRT(GpuEngine):
    """TensorRT, or what has its Python interface, as `library` says."""

    name = Library.name
    extra = Library.extra
    distributions = ("tensorrt-cu13",)
    suffixes = ("plan",)
    library = Library()

    def container(self, recipe: Recipe, version: str) -> dict | None:
        """Whether the recipe's container runs plans of a version."""
        from cxr_triton.engines.tensorrt.compiler import container_match

        return container_match(recipe.container, version)

    def compile(self, job, folder: Path) -> Compiled:
        from cxr_triton import __version__
        from cxr_triton.engines.bundle import sha256
        from cxr_triton.engines.plan_cache import PlanCache, plan_key
        from cxr_triton.engines.tensorrt.compiler import compile_graph, shape_ranges
        from cxr_triton.profile import load_profile

        version, plan, source = self.library.load(job.graph).__version__, folder / f"{job.graph}.plan", job.source
        chosen, sequence = self.library.target(job.recipe), job.geometry.max_sequence
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
                    "version": version,
                    "cxr_triton": __version__,
                    **dataclasses.asdict(chosen),
                }
            )
            if self.library.keeps_times:
                name = f"timing-{self.name}-{version}-{chosen.compute_capability}.cache"
                timing = kept.folder / name
        report = kept.get(key, plan) if kept else None
        if report is None:
            report = compile_graph(
                self.library,
                source / f"{job.graph}.onnx",
                plan,
                profiles=ranges,
                max_sequence=sequence,
                target=chosen,
                timing_cache=timing,
            )
            if kept:
                kept.put(key, plan, report)
        return Compiled({self.name: report["version"]}, report, self.container(job.recipe, report["version"]))

    def open_vision(self, bundle, *, threads: int | None = None):
        from cxr_triton.engines.tensorrt.session import TensorRTVision, open_plan

        return TensorRTVision(open_plan(self.library, bundle, "vision"), bundle)

    def open_decoder(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        from cxr_triton.engines.tensorrt.session import TensorRTDecoder, open_plan

        return TensorRTDecoder(open_plan(self.library, bundle, "decoder"), bundle, slots=slots)

    def run_bytes(self, bundle, graph: str) -> int:
        try:
            return without_table(bundle, graph, int(bundle.manifest["plans"][graph]["weights_bytes"]))
        except (KeyError, TypeError, ValueError):
            raise InvalidBundle(
                f"manifest.json: plans.{graph}.weights_bytes is missing, so the bytes of a step are not known; "
                "build the bundle again"
            ) from None


ENGINE = TensorRT()
