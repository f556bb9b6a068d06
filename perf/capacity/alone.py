"""The graphs of a bundle by themselves, in a process of their own: what a batch, a piece of a prompt, a step takes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from cxr_triton.chat import ChatTokenizer
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.pipeline import Preprocessor
from cxr_triton.perf.capacity.host import token_ms

STEPS, TOKENS = 24, 300
LEAST, LEAST_S = 5, 0.2
"""A point is of so many pieces, and of so long a time, at least."""


class Alone:
    """Both graphs, and prompts with pictures for them.

    Parameters
    ----------
    bundle : str
        Its folder.
    slots, threads : int
        Of the decoder; of each graph, 0 takes all cores.
    items : list of tuple
        Files of the pictures, and the REQUEST, of each prompt.
    """

    def __init__(self, bundle: str, slots: int, threads: int, items: Sequence[tuple[list[bytes], dict]]):
        opened = Bundle.open(bundle, verify=False)
        self._preprocessor, self._items = Preprocessor(bundle), items
        self._tokenizer = ChatTokenizer(bundle)
        self._prompts = [self._prepare(index) for index in range(len(items))]
        self._vision = opened.open_vision(threads=threads or None)
        self._decoder = opened.open_decoder(slots=slots, threads=threads or None)
        self._chunk: int = getattr(self._decoder, "prefill_chunk", 128)
        self._do_step = getattr(self._decoder, "step_top", self._decoder.step)
        self._embeddings = [self._encode([prompt])[0] for prompt in self._prompts]

    def measure(self, batches: Sequence[int]) -> dict:
        """Points of the three curves, medians: pictures of a batch, tokens of a prompt's piece, streams of a step.

        ``token_ms`` is what the decoder's thread takes for a token beside the graph, ``processor_s`` the processor time
        that it all took.
        """
        began_s, streams = time.process_time(), range(1, self._decoder.slots + 1)
        return {
            "tower": [_point(self._batch, size) for size in batches],
            "prefill": [_point(self._piece, size) for size in self._sizes()],
            "step": [_point(self._steps, size) for size in streams],
            "token_ms": token_ms(self._tokenizer, 1, TOKENS),
            "processor_s": time.process_time() - began_s,
        }

    def read(self, seconds: float, tokens: int) -> int:
        """Whole readings one after the other, each of so many tokens and without a server; how many there were."""
        ends_s, count = time.monotonic() + seconds, 0
        while time.monotonic() < ends_s:
            self._encode([self._prepare(count)])
            self._prefill(0, count)
            for _ in range(tokens - 1):
                self._do_step(np.ones(1, np.int64), self._decoder.lengths[:1].copy())
            self._decoder.free(0)
            count += 1
        return count

    def close(self) -> None:
        """End the decoding process."""
        self._preprocessor.close()

    def _prepare(self, index: int):
        images, request = self._items[index % len(self._items)]
        return self._preprocessor.prepare(images, json.dumps(request))

    def facts(self) -> dict:
        """Tokens of a prompt that the decoder takes at a time, and tokens of each prompt that are a picture's."""
        return {
            "prefill_chunk": self._chunk,
            "image_tokens": [int((prompt.image_index >= 0).sum()) for prompt in self._prompts],
        }

    def _sizes(self) -> list[int]:
        """Least, middle and largest piece of the prompts."""
        lengths = [len(prompt.input_ids) for prompt in self._prompts]
        sizes = sorted({min(self._chunk, length - at) for length in lengths for at in range(0, length, self._chunk)})
        return sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})

    def _encode(self, prompts) -> np.ndarray:
        names = ("pixel_windows", "patch_rows_cols", "valid", "merge_order")
        return self._vision.encode(*(np.concatenate([getattr(each, name) for each in prompts]) for name in names))

    def _batch(self, size: int, turn: int) -> list[tuple[float, float]]:
        prompts = [self._prompts[(turn * size + i) % len(self._prompts)] for i in range(size)]
        return [_timed(lambda: self._encode(prompts))]

    def _prefill(self, slot: int, index: int, tokens: int | None = None) -> None:
        prompt = self._prompts[index % len(self._prompts)]
        piece = slice(0, tokens)
        self._decoder.prefill(
            slot,
            prompt.input_ids[piece],
            prompt.image_index[piece],
            self._embeddings[index % len(self._prompts)],
            prompt.position_ids[:, piece],
            is_last=True,
        )

    def _piece(self, size: int, turn: int) -> list[tuple[float, float]]:
        fit = [index for index, prompt in enumerate(self._prompts) if len(prompt.input_ids) >= size]
        taken = _timed(lambda: self._prefill(0, fit[turn % len(fit)], size))
        self._decoder.free(0)
        return [taken]

    def _steps(self, streams: int, turn: int) -> list[tuple[float, float]]:
        for slot in range(streams):
            self._prefill(slot, turn + slot)
        ids = np.ones(streams, np.int64)
        taken = []
        for step in range(STEPS):
            taken.append(_timed(partial(self._do_step, ids, self._decoder.lengths[:streams].copy())))
            if step == 0:
                taken.clear()  # it may have to grow the cache
        for slot in range(streams):
            self._decoder.free(slot)
        return taken


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of wall and of processor."""
    wall_s, processor_s = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - wall_s), 1e3 * (time.process_time() - processor_s)


def _point(pieces: Callable[[int, int], list[tuple[float, float]]], size: int) -> dict:
    """Medians of pieces of a size, which come turn by turn."""
    taken, turn, ends_s = pieces(size, 0), 1, time.monotonic() + LEAST_S
    while len(taken) < LEAST or time.monotonic() < ends_s:
        taken += pieces(size, turn)
        turn += 1
    wall, processor = (statistics.median(column) for column in zip(*taken, strict=True))
    return {"at": size, "ms": round(wall, 4), "cpu_ms": round(processor, 4)}
