"""ONNX Runtime with products of its own: weights in int4, activations rounded to int8, at the memory's limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from cxr_triton.engines.interface import Compiled, Need
from cxr_triton.engines.onnxruntime import ENGINE as ONNXRUNTIME
from cxr_triton.engines.onnxruntime import OnnxRuntime


class OnnxRuntimeW4A8(OnnxRuntime):
    """Runs the decoder alone, whose weights are read where their file is mapped, by prompts and steps alike."""

    name = "onnxruntime-w4a8"
    graphs = ("decoder",)
    precisions = ("int4", "int4-awq")
    needs_recipe = True

    @property
    def is_installed(self) -> bool:
        from cxr_triton.engines.onnxruntime_w4a8 import library

        return super().is_installed and library.path() is not None

    def check_installed(self, versions) -> None:
        ONNXRUNTIME.check_installed(versions)

    def compile(self, job, folder: Path) -> Compiled:
        from cxr_triton.engines.onnxruntime_w4a8.compiler import compile_w4a8

        compile_w4a8(job.source / "decoder.onnx", folder / "decoder.onnx")
        return Compiled({ONNXRUNTIME.name: metadata.version("onnxruntime")})

    def needs(self, bundle, graph: str) -> Iterator[Need]:
        from cxr_triton.engines.onnxruntime_w4a8 import library

        yield from super().needs(bundle, graph)
        yield library.need()

    def open_decoder(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        from cxr_triton.engines.onnxruntime_w4a8.session import W4A8Decoder

        return W4A8Decoder(bundle, slots=slots, threads=threads, batch_invariant=batch_invariant)

    def product(self, model: bytes, feeds: Mapping, precision: str, threads: int) -> Callable[[], object]:
        if precision != "int4":
            return ONNXRUNTIME.product(model, feeds, precision, threads)
        from cxr_triton.engines.onnxruntime_w4a8.session import product

        return product(model, feeds, threads)


ENGINE = OnnxRuntimeW4A8()
