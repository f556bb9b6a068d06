"""Two engines on one KV cache: ONNX Runtime for the steps of a stream that runs alone, OpenVINO for all else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cxr_triton.engines.interface import Compiled
from cxr_triton.engines.onnxruntime import ENGINE as ONNXRUNTIME
from cxr_triton.engines.openvino import ENGINE as OPENVINO
from cxr_triton.engines.openvino import OpenVINO

PARTS = OPENVINO, ONNXRUNTIME


class OnnxRuntimeOpenVINO(OpenVINO):
    """Runs the decoder alone, and holds its layers twice: once as each of the two packs them."""

    name = "onnxruntime-openvino"
    distributions = ("onnxruntime", "openvino")
    graphs = ("decoder",)
    suffixes = OPENVINO.suffixes + ONNXRUNTIME.suffixes
    copies = head_copies = 2
    products = ("fp32", "int8", "int4")

    def check_installed(self, versions: Mapping[str, object]) -> None:
        for each in PARTS:
            each.check_installed(versions)

    def compile(self, job, folder: Path) -> Compiled:
        versions: dict[str, str] = {}
        for each in PARTS:
            versions |= each.compile(job, folder).versions
        return Compiled(versions)

    def open_decoder(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        from cxr_triton.engines.onnxruntime_openvino.session import OrtOpenVINODecoder

        return OrtOpenVINODecoder(bundle, slots=slots, threads=threads)

    def run_bytes(self, bundle, graph: str) -> int:
        return ONNXRUNTIME.run_bytes(bundle, graph)

    def product(self, model: bytes, feeds: Mapping, precision: str, threads: int) -> Callable[[], object]:
        part = OPENVINO if precision in OPENVINO.products else ONNXRUNTIME
        return part.product(model, feeds, precision, threads)


ENGINE = OnnxRuntimeOpenVINO()
