"""ONNX Runtime with the decoder twice: int4 for the steps of a lone stream, int8 for prompts and crowds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cxr_triton.engines.interface import Compiled, CpuEngine, Need
from cxr_triton.engines.onnxruntime import ENGINE as ONNXRUNTIME
from cxr_triton.engines.onnxruntime import OnnxRuntime


class OnnxRuntimeInt8(OnnxRuntime):
    """Runs the decoder alone. A lone step waits for memory, so it reads int4; prompts wait for products, of int8."""

    name = "onnxruntime-int8"
    graphs = ("decoder",)
    precisions = ("int4", "int4-awq")
    suffixes = (*ONNXRUNTIME.suffixes, "int8.onnx", "int8.onnx.data")
    copies = 3  # int8 is two of int4
    head_copies = 2  # as each of its graphs packs it
    splits_attention = True
    needs_recipe = True
    abilities = CpuEngine.abilities

    def check_installed(self, versions) -> None:
        ONNXRUNTIME.check_installed(versions)

    def compile(self, job, folder: Path) -> Compiled:
        from cxr_triton.engines.onnxruntime_int8.compiler import compile_int8

        compiled = ONNXRUNTIME.compile(job, folder)
        compile_int8(job.source / "decoder.onnx", folder / "decoder.int8.onnx", folder / "decoder.onnx")
        return compiled

    def needs(self, bundle, graph: str) -> Iterator[Need]:
        from cxr_triton.engines.onnxruntime import int8

        yield from super().needs(bundle, graph)
        yield int8.need()

    def open_decoder(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        from cxr_triton.engines.onnxruntime_int8.session import OrtInt8Decoder

        return OrtInt8Decoder(bundle, slots=slots, threads=threads)

    def crowd_bytes(self, bundle, streams: int) -> int:
        from cxr_triton.engines.onnxruntime_int8.few import is_few
        from cxr_triton.engines.rewrite import step_bytes

        if is_few(streams, 1):
            return self.run_bytes(bundle, "decoder")
        return step_bytes(bundle.path / "decoder.int8.onnx")

    def prompt_precision(self, bundle) -> str:
        return "int8"


ENGINE = OnnxRuntimeInt8()
