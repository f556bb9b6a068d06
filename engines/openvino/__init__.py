"""OpenVINO, which uses the matrix units (AMX) of recent x86 CPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from cxr_triton.engines.interface import Compiled, CpuEngine, without_table
from cxr_triton.errors import InvalidRecipe


class OpenVINO(CpuEngine):
    """Computes the decoder in fp32, and the tower in bf16 where the recipe asks for it and the CPU multiplies it."""

    name = "openvino"
    extra = "openvino"
    distributions: ClassVar[tuple[str, ...]] = ("openvino",)
    suffixes: ClassVar[tuple[str, ...]] = ("xml", "bin")
    splits_attention = True
    products = ("fp32", "bf16", "int4")
    cpu_features = ("amx_bf16", "amx_int8", "avx512_vnni", "avx_vnni")

    def types(self, graph: str) -> tuple[str, ...]:
        return ("fp32", "bf16") if graph == "vision" else self.computes

    def exchanges(self, vision_precision: str, compute: str) -> bool:
        """Weights and embeddings of a tower in bf16 are fp32."""
        return (vision_precision, compute) == ("bf16", "fp32") or super().exchanges(vision_precision, compute)

    def check_decoder(self, recipe) -> None:
        super().check_decoder(recipe)
        if recipe.decoder.precision == "fp8":
            raise InvalidRecipe(f"decoder.precision: fp8 on {self.name}; choose fp32, int4 or int4-awq")

    def compile(self, job, folder: Path) -> Compiled:
        from cxr_triton.engines.openvino.compiler import compile_graph

        precision = job.recipe.vision.precision if job.graph == "vision" else "fp32"
        return Compiled({self.name: compile_graph(job.source / f"{job.graph}.onnx", folder, precision)})

    def open_vision(self, bundle, *, threads: int | None = None):
        from cxr_triton.engines.openvino.session import OpenVINOVision

        return OpenVINOVision(bundle, threads=threads)

    def open_decoder(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        from cxr_triton.engines.openvino.session import OpenVINODecoder

        return OpenVINODecoder(bundle, slots=slots, threads=threads)

    def run_bytes(self, bundle, graph: str) -> int:
        return without_table(bundle, graph, (bundle.path / f"{graph}.bin").stat().st_size)

    def product(self, model: bytes, feeds: Mapping, precision: str, threads: int) -> Callable[[], object]:
        from cxr_triton.engines.openvino.session import open_request

        request = open_request(model, threads, "bf16" if precision == "bf16" else "fp32")
        return lambda: request.infer(feeds, share_inputs=True)


ENGINE = OpenVINO()
