"""A decoder whose cache two engines read and write in turn."""

from __future__ import annotations

from cxr_triton.engines.onnxruntime.session import OrtGraph
from cxr_triton.engines.openvino.session import OpenVINOGraph
from cxr_triton.engines.session import EitherGraph, HostDecoder

FEW = 4
"""Tokens of one sequence that ONNX Runtime runs: in short runs of a 3B on an EPYC drafts cost less so."""


class OrtOpenVINODecoder(HostDecoder):
    """The decoder of a bundle.

    A few tokens of one sequence run on ONNX Runtime, whose step of one row is at the memory's limit, all else on
    OpenVINO.

    Raises
    ------
    DeviceUnavailable, InvalidBundle
        OpenVINO is missing, or cannot load its graph.
    """

    def __init__(self, bundle, *, slots: int, threads: int | None = None):
        many = OpenVINOGraph(bundle, threads=threads)
        graph = EitherGraph(OrtGraph(bundle, threads=threads), many, is_few)
        super().__init__(bundle, graph, slots=slots)


def is_few(sequences: int, tokens: int) -> bool:
    """Whether ONNX Runtime runs so many sequences of so many new tokens each."""
    return sequences == 1 and tokens <= FEW
