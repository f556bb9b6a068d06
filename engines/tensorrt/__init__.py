"""TensorRT: plans whose kernels are timed on the GPU that will run them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_triton.engines.interface import Compiled, GpuEngine, Need, plan_bytes
from cxr_triton.engines.tensorrt.library import Library
from cxr_triton.errors import DeviceUnavailable

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
        from cxr_triton.engines.tensorrt.compiler import build_plan

        report = build_plan(self.library, job, folder / f"{job.graph}.plan")
        return Compiled({self.name: report["version"]}, report, self.container(job.recipe, report["version"]))

    def open_vision(self, bundle, *, threads: int | None = None):
        from cxr_triton.engines.tensorrt.session import TensorRTVision, open_plan

        return TensorRTVision(open_plan(self.library, bundle, "vision"), bundle)

    def open_decoder(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        from cxr_triton.engines.tensorrt.session import TensorRTDecoder, open_plan

        return TensorRTDecoder(open_plan(self.library, bundle, "decoder"), bundle, slots=slots)

    def needs(self, bundle, graph: str) -> Iterator[Need]:
        """The library in the version that wrote the plan, and whether the recipe's container has it."""
        yield from super().needs(bundle, graph)
        plan = (bundle.manifest.get("plans") or {}).get(graph) or {}
        wanted = str(plan.get("version"))
        try:
            found = self.library.load(graph).__version__
            how = "" if found == wanted else f"install {self.name} {wanted}, or build the bundle again here"
            yield Need(what=f"{self.name} of the plan", found=found, wanted=wanted, is_met=not how, remedy=how)
        except DeviceUnavailable as error:
            said, _, how = error.message.rpartition("; ")
            yield Need(what=f"{self.name} of the plan", found=said, wanted=wanted, is_met=False, remedy=how)
        if match := bundle.manifest.get("container"):
            said, matches = str(match.get("said")), match.get("matches")
            how = "" if matches else f"build in {match.get('container')}, or serve by the Python sessions alone"
            what = "container and plan"
            yield Need(what=what, found=said, wanted="one version", is_met=matches, remedy=how)

    def run_bytes(self, bundle, graph: str) -> int:
        return plan_bytes(bundle, graph)


ENGINE = TensorRT()
