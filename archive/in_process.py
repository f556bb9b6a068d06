"""Readings from a bundle's engine in this process, without a server: the stages that Triton's models adapt."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from cxr_triton import __version__
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.interface import GpuEngine
from cxr_triton.engines.pipeline import Preprocessor, build_reading, completion_json, sampling_of
from cxr_triton.engines.runtime.stream import Chunk, Completion, Generation
from cxr_triton.reading import Reading

SERVER = f"in-process {__version__}"
_INPUTS = ("pixel_windows", "patch_rows_cols", "valid", "merge_order")


class InProcess:
    """Readings of any number of threads; the decoder takes `slots` of them together.

    Parameters
    ----------
    bundle : path
    slots : int
    threads : int or None
        CPU threads; all cores if None.

    Raises
    ------
    InvalidBundle, DeviceUnavailable
        The bundle is damaged, or its engine cannot run here.
    """

    def __init__(self, bundle: str | Path, slots: int, threads: int | None):
        opened = Bundle.open(bundle)
        self._resources = contextlib.ExitStack()
        self._preprocessor = Preprocessor(opened.path)
        self._resources.callback(self._preprocessor.close)
        self._vision, self._encoding = opened.open_vision(threads=threads), threading.Lock()
        decoder = engine(opened.engine).open_judged(opened, slots=slots, threads=threads)
        self._resources.callback(decoder.close)
        self._runtime = self._resources.enter_context(decoder.runtime(4 * slots))

    def read(self, data: bytes, asked: dict[str, Any]) -> tuple[Reading, str]:
        """As `cxr_triton.archive.served.Served.read`."""
        request = {key: value for key, value in asked.items() if value is not None}
        step = self._preprocessor.prepare([data], json.dumps(request))
        with self._encoding:
            embeddings = self._vision.encode(**{name: getattr(step, name) for name in _INPUTS})  # [1, T, hidden]
        generation = Generation(
            input_ids=step.input_ids,
            position_ids=step.position_ids,
            image_index=step.image_index,
            image_embeddings=np.array(embeddings).reshape(-1, embeddings.shape[-1]),
            sampling=sampling_of(step.context),
        )
        arrived_s, end = time.monotonic(), Future[Completion]()
        self._runtime.submit(generation, lambda chunk: _settle(end, chunk))
        return build_reading(json.loads(completion_json(end.result(), step.context, arrived_s))), SERVER

    def close(self) -> None:
        """Let go of the engine."""
        self._resources.close()


def needs_gpu(bundle: str | Path) -> bool:
    """Whether a bundle's engines run on a GPU."""
    return isinstance(engine(Bundle.open(bundle, verify=False).engine), GpuEngine)


def _settle(end: Future[Completion], chunk: Chunk) -> None:
    if chunk.error is not None:
        end.set_exception(chunk.error)
    elif chunk.completion is not None:
        end.set_result(chunk.completion)
