"""ONNX Runtime's CUDA provider: both graphs written for the kernels that it has, bound to no one GPU."""

from __future__ import annotations

from pathlib import Path

from cxr_triton.engines.interface import Compiled, GpuEngine
from cxr_triton.errors import InvalidRecipe


class OnnxRuntimeCuda(GpuEngine):
    """Needs no compiler: its bundle holds graphs."""

    name = "onnxruntime-cuda"
    extra = "cuda"
    distributions = ("onnxruntime-gpu",)

    def check_decoder(self, recipe) -> None:
        super().check_decoder(recipe)
        if "fp8" in (recipe.decoder.precision, recipe.decoder.head):
            raise InvalidRecipe("decoder.precision: fp8 on onnxruntime-cuda; choose bf16, int4 or int4-awq")

    def compile(self, job, folder: Path) -> Compiled:
        from cxr_triton.engines.onnxruntime_cuda.compiler import compile_graph

        compile_graph(job.source / f"{job.graph}.onnx", folder, job.geometry.max_sequence)
        return Compiled({})

    def open_vision(self, bundle, *, threads: int | None = None):
        from cxr_triton.engines.onnxruntime_cuda.session import CudaVision

        return CudaVision(bundle)

    def open_decoder(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        from cxr_triton.engines.onnxruntime_cuda.session import CudaDecoder

        return CudaDecoder(bundle, slots=slots)


ENGINE = OnnxRuntimeCuda()
