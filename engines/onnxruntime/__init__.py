"""ONNX Runtime on the CPU: both graphs rewritten for its kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

from cxr_triton.engines.interface import Compiled, CpuEngine


class OnnxRuntime(CpuEngine):
    """Needs no recipe, and runs everything that is exported for a CPU."""

    name = "onnxruntime"
    extra = "local"
    distributions = ("onnxruntime",)
    needs_recipe = False
    abilities = frozenset({"batch_invariant", "prefix_reuse", "drafts"})
    products = ("fp32", "int4")
    cpu_features = ("avx512_vnni", "avx_vnni", "avx512f", "avx2")

    def compile(self, job, folder: Path) -> Compiled:
        from cxr_triton.engines.onnxruntime.compiler import compile_decoder

        if job.graph == "decoder":
            compile_decoder(job.source / "decoder.onnx", folder / "decoder.onnx")
        return Compiled({self.name: metadata.version("onnxruntime")})

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
