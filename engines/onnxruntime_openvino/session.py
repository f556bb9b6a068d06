"""A decoder whose cache two engines read and write in turn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cxr_triton.engines.onnxruntime.session import OrtGraph
from cxr_triton.engines.openvino.session import OpenVINOGraph
from cxr_triton.engines.session import HostDecoder, HostGraph

FEW = 4
"""Tokens of one sequence that ONNX Runtime runs: in short runs of a 3B on an EPYC drafts cost less so."""


class EitherGraph(HostGraph):
    """A few tokens of one sequence by ONNX Runtime, whose step of one row is at the memory's limit; else by OpenVINO.

    Who runs depends on the shape of a run alone, so a prompt cut into the same pieces gives the same bits.

    Raises
    ------
    DeviceUnavailable, InvalidBundle
        OpenVINO is missing, or cannot load its graph.
    """

    def __init__(self, bundle, *, threads: int | None = None):
        self._many, self._one = OpenVINOGraph(bundle, threads=threads), OrtGraph(bundle, threads=threads)

    def run(
        self, cache: Mapping[str, np.ndarray], rows: slice, lengths: np.ndarray, inputs: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """See `HostGraph.run`."""
        sequences, tokens = inputs["input_ids"].shape
        graph = self._one if sequences == 1 and tokens <= FEW else self._many
        return graph.run(cache, rows, lengths, inputs)

    def forget(self) -> None:
        """See `HostGraph.forget`."""
        self._many.forget()
        self._one.forget()


class OrtOpenVINODecoder(HostDecoder):
    """The decoder of a bundle; see `EitherGraph`."""

    def __init__(self, bundle, *, slots: int, threads: int | None = None):
        super().__init__(bundle, EitherGraph(bundle, threads=threads), slots=slots)
