"""ONNX Runtime on the CPU: graphs rewritten for its kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from cxr_triton.engines.interface import Compiled, CpuEngine, Need


class OnnxRuntime(CpuEngine):
    """Needs no recipe, and runs everything that is exported for a CPU; the tower in int8 if a recipe asks for it."""

    name = "onnxruntime"
    extra = "local"
    distributions = ("onnxruntime",)
    needs_recipe = False
    abilities = frozenset({"batch_invariant", "prefix_reuse", "drafts"})
    products = ("fp32", "int8", "int4")
    cpu_features = ("avx512_vnni", "avx_vnni", "avx512f", "avx2")

    def types(self, graph: str) -> tuple[str, ...]:
        return ("fp32", "int8") if graph == "vision" else self.computes

    def exchanges(self, vision_precision: str, compute: str) -> bool:
        """Embeddings of a tower in int8 are fp32."""
        return (vision_precision, compute) == ("int8", "fp32") or super().exchanges(vision_precision, compute)

    def compile(self, job, folder: Path) -> Compiled:
        from cxr_triton.engines.onnxruntime.compiler import compile_decoder
        from cxr_triton.engines.onnxruntime.tower import compile_tower

        if job.graph == "decoder":
            compile_decoder(job.source / "decoder.onnx", folder / "decoder.onnx")
        else:
            precision = job.chosen.vision.precision if job.chosen else "fp32"
            compile_tower(job.source / "vision.onnx", folder / "vision.onnx", precision)
        return Compiled({self.name: metadata.version("onnxruntime")})

    def needs(self, bundle, graph: str) -> Iterator[Need]:
        from cxr_triton.engines.onnxruntime import int8

        yield from super().needs(bundle, graph)
        if graph == "vision" and bundle.vision_precision == "int8":
            yield int8.need()

    def open_vision(self, bundle, *, threads: int | None = None):
        from cxr_triton.engines.onnxruntime.session import OrtVision

        return OrtVision(bundle, threads=threads)

    def open_decoder(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        from cxr_triton.engines.onnxruntime.session import OrtDecoder

        return OrtDecoder(bundle, slots=slots, threads=threads, batch_invariant=batch_invariant)

    def product(self, model: bytes, feeds: Mapping, precision: str, threads: int) -> Callable[[], object]:
        from cxr_triton.engines.onnxruntime.session import product

        return product(model, feeds, threads)


ENGINE = OnnxRuntime()
