"""Sessions of a bundle's two graphs: what they do alike, and the KV cache in the host's memory that some share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np

from cxr_triton.errors import InvalidRequest
from cxr_triton.pixels.image import WINDOW

CAPACITY_STEP = 64  # cache positions; the cache grows and shrinks by so many
MANY_TOKENS = 16
"""New tokens of a sequence in one run for which the cache is copied without what nobody holds."""
DTYPES: dict[str, np.dtype] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


class VisionSession:
    """The vision graph of a bundle; an engine says how a batch is run."""

    def _run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Embeddings [B, T, hidden] of a batch, by the graph's input names."""
        raise NotImplementedError

    def encode(
        self, pixel_windows: np.ndarray, patch_rows_cols: np.ndarray, valid: np.ndarray, merge_order: np.ndarray
    ) -> np.ndarray:
        """Embeddings of a batch of images.

        Windows after the last one that any image of the batch uses are dropped.

        Parameters
        ----------
        pixel_windows : (B, W, 64, 588) uint8 array
        patch_rows_cols : (B, W, 64, 2) int32 array
        valid : (B, W, 64) bool array
        merge_order : (B, T) int32 array

        Returns
        -------
        (B, T, hidden) float32 array
            Rows beyond an image's tokens are meaningless.

        Raises
        ------
        InvalidRequest
            An image has no valid patch, or its `merge_order` leaves the windows, where some engines would read on.
        """
        used = int(np.flatnonzero(valid.any(axis=(0, 2))).max(initial=0)) + 1
        units = used * WINDOW**2
        if not valid.any(axis=(1, 2)).all() or merge_order.min() < 0 or merge_order.max() >= units:
            raise InvalidRequest(
                f"MERGE_ORDER must stay within 0 and {units - 1}, and a patch of each image be VALID; "
                "call the ensemble cxr_reader"
            )
        feeds = {
            "pixel_windows": pixel_windows[:, :used],
            "patch_rows_cols": patch_rows_cols[:, :used],
            "valid": valid[:, :used],
            "merge_order": merge_order,
        }
        return self._run(feeds).astype(np.float32, copy=False)


class DecoderSession:
    """The decoder of a bundle with a KV cache of a fixed number of slots.

    Each slot holds one sequence. `step` works on the first slots, so the caller keeps the active sequences there. A
    session may have `step_top` too, which gives `TopLogits`, and `prefill_chunk`, the prompt tokens that it is best
    given at a time.

    Attributes
    ----------
    slots : int
        Sequences that the cache holds.
    max_sequence : int
        Positions of a slot.
    vocab, hidden : int
    lengths : (rows,) int64 array
        Positions in use, of the slots first.
    checks : int
        Slots of which `check` takes several tokens in one run; 0: it is not to be called.
    """

    slots: int
    max_sequence: int
    vocab: int
    hidden: int
    lengths: np.ndarray
    checks: int = 0

    def prefill(
        self,
        slot: int,
        input_ids: np.ndarray,
        image_index: np.ndarray,
        image_embeddings: np.ndarray,
        position_ids: np.ndarray,
        *,
        is_last: bool,
    ) -> np.ndarray | None:
        """Append prompt tokens to a slot.

        Parameters
        ----------
        slot : int
        input_ids : (S,) int64 array
        image_index : (S,) int64 array
        image_embeddings : (N, hidden) float32 array
        position_ids : (3, S) int64 array
        is_last : bool
            The prompt ends here.

        Returns
        -------
        (vocab,) float32 array or None
            Logits of the last token of a prompt, valid until the next call.
        """
        raise NotImplementedError

    def step(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Append one generated token to each of the first n slots.

        Parameters
        ----------
        input_ids : (n,) int64 array
        positions : (n,) int64 array
            The same for time, height and width.

        Returns
        -------
        (n, vocab) float32 array
            Valid until the next call.
        """
        raise NotImplementedError

    def score(self, slot: int, length: int, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Append tokens to the first positions of a slot, and forget what it held beyond these.

        Parameters
        ----------
        slot : int
        length : int
            Positions that stay.
        input_ids : (S,) int64 array
            Of text.
        positions : (S,) int64 array
            The same for time, height and width.

        Returns
        -------
        (S, vocab) float32 array
            Logits of every token, valid until the next call.
        """
        self.lengths[slot] = length
        logits = np.empty((len(input_ids), self.vocab), np.float32)
        nothing, no_image = np.zeros((0, self.hidden), np.float32), np.full(1, -1, np.int64)
        for i, position in enumerate(positions):  # a compiled graph gives the logits of one token in a run
            at = np.full((3, 1), position, np.int64)
            logits[i] = self.prefill(slot, input_ids[i : i + 1], no_image, nothing, at, is_last=True)
        return logits

    def check(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Append S tokens to each of the first n slots, of which all but the first are guesses.

        Parameters
        ----------
        input_ids : (n, S) int64 array
            n at most `checks`.
        positions : (n, S) int64 array
            The same for time, height and width.

        Returns
        -------
        (n, S, vocab) float32 array
            Logits after each token, valid until the next call.
        """
        raise NotImplementedError

    def shorten(self, slot: int, length: int) -> None:
        """Forget what a slot holds beyond so many positions."""
        self.lengths[slot] = length

    def move(self, source: int, target: int) -> None:
        """Copy what a slot holds to another one."""
        raise NotImplementedError

    def free(self, slot: int) -> None:
        """Forget what a slot holds."""
        self.lengths[slot] = 0

    def read_cache(self, slot: int, start: int, stop: int) -> np.ndarray:
        """Keys and values of a slot's positions from `start` to `stop`, which it holds.

        Returns
        -------
        (2 * layers, kv_heads, stop - start, head_dim) array
            A copy in the host's memory, in the cache's type.
        """
        raise NotImplementedError

    def write_cache(self, slot: int, start: int, rows: np.ndarray) -> None:
        """Give a slot that holds `start` positions those that come next, as `read_cache` gave them."""
        raise NotImplementedError


def device_rows(
    rows: np.ndarray, pointers: Iterable[int], positions: int, slot: int, start: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Where the rows of `DecoderSession.read_cache` lie in caches on a device, piece by contiguous piece.

    Parameters
    ----------
    rows : (2 * layers, kv_heads, tokens, head_dim) array
    pointers : iterable of int
        Address of each cache [slots, kv_heads, positions, head_dim].
    positions : int
        Of a slot.
    slot, start : int

    Yields
    ------
    int, (tokens, head_dim) array
        An address, and the part of `rows` that belongs there.
    """
    _, heads, _, width = rows.shape
    for part, pointer in zip(rows, pointers, strict=True):
        for head, values in enumerate(part):
            yield pointer + ((slot * heads + head) * positions + start) * width * rows.itemsize, values


class HostGraph:
    """A decoder's graph as an engine on the CPU runs it, over the cache of a `HostDecoder`."""

    def run(
        self, cache: Mapping[str, np.ndarray], rows: slice, lengths: np.ndarray, inputs: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Logits of new tokens of some sequences, whose rows of the cache then hold these too.

        Parameters
        ----------
        cache : dict of (slots, kv_heads, C, head_dim) float32 array
            ``key.0``, ``value.0``, ``key.1`` and so on.
        rows : slice
            Of the cache, n of them.
        lengths : (n,) int64 array
            Positions that each of them holds.
        inputs : dict
            The graph's other inputs; ``logits_index`` is [n, T].

        Returns
        -------
        (n, T, vocab) float32 array
            Valid until the next run.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Let go of the cache's arrays: there will be others."""
        raise NotImplementedError

    @property
    def for_scores(self) -> HostGraph:
        """What runs whatever is scored: probabilities that are compared have to come from one graph."""
        return self

    @staticmethod
    def held(cache: Mapping[str, np.ndarray], rows: slice, lengths: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
        """Rows of the cache as a run of so many new tokens each is to read them.

        Products with positions that nobody holds yet take a quarter of a prompt's time, so many tokens get a copy
        without them. It is as long as the longest of the rows says, whatever the others of the cache hold.
        """
        capacity = next(iter(cache.values())).shape[2]
        used = min(_whole_steps(int(lengths.max())), capacity) if tokens >= MANY_TOKENS else capacity
        return {name: np.ascontiguousarray(part[rows, :, :used]) for name, part in cache.items()}

    @staticmethod
    def append(
        cache: Mapping[str, np.ndarray], rows: slice, lengths: np.ndarray, new: Mapping[str, np.ndarray]
    ) -> None:
        """Put keys and values of new tokens, (n, kv_heads, S, head_dim) by the cache's names, behind those of `run`."""
        for name, part in cache.items():
            for slot, length, values in zip(range(rows.start, rows.stop), lengths, new[name], strict=True):
                part[slot, :, length : length + values.shape[1]] = values


class EitherGraph(HostGraph):
    """Two graphs over one cache.

    Who runs depends on the shape of a run alone, so a prompt that is cut into the same pieces gives the same bits.

    Parameters
    ----------
    few, many : HostGraph
    is_few : callable
        Whether `few` runs so many sequences of so many new tokens each.
    """

    def __init__(self, few: HostGraph, many: HostGraph, is_few: Callable[[int, int], bool]):
        self._few, self._many, self._is_few = few, many, is_few

    def run(
        self, cache: Mapping[str, np.ndarray], rows: slice, lengths: np.ndarray, inputs: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """See `HostGraph.run`."""
        graph = self._few if self._is_few(*inputs["input_ids"].shape) else self._many
        return graph.run(cache, rows, lengths, inputs)

    def forget(self) -> None:
        """See `HostGraph.forget`."""
        self._few.forget()
        self._many.forget()

    @property
    def for_scores(self) -> HostGraph:
        """See `HostGraph.for_scores`."""
        return self._many


class HostDecoder(DecoderSession):
    """A decoder in fp32 on the CPU, whose cache grows and shrinks with what it holds.

    Parameters
    ----------
    bundle : Bundle
    graph : HostGraph
    slots : int
    together : int
        A step takes a multiple of so many rows.
    """

    def __init__(self, bundle, graph: HostGraph, *, slots: int, together: int = 1):
        geometry = bundle.geometry
        self.slots = self.checks = slots
        self.max_sequence = geometry.max_sequence
        self.vocab, self.hidden = geometry.vocab, geometry.hidden
        self._together = together
        rows = self._rounded(slots)
        self.lengths = np.zeros(rows, np.int64)
        self._graph = graph
        self._names = [f"{part}.{layer}" for layer in range(geometry.layers) for part in ("key", "value")]
        self._row = (geometry.kv_heads, geometry.head_dim)
        self._text_only = np.zeros((1, geometry.hidden), np.float32)
        self._capacity = 0
        self._cache: dict[str, np.ndarray] = {}
        self._reserve(1)

    def prefill(
        self,
        slot: int,
        input_ids: np.ndarray,
        image_index: np.ndarray,
        image_embeddings: np.ndarray,
        position_ids: np.ndarray,
        *,
        is_last: bool,
    ) -> np.ndarray | None:
        """See `DecoderSession.prefill`."""
        tokens = len(input_ids)
        self._reserve(int(self.lengths[slot]) + tokens)
        logits = self._run(
            slice(slot, slot + 1),
            input_ids=input_ids[None],
            image_index=image_index[None],
            image_embeddings=image_embeddings if len(image_embeddings) else self._text_only,
            position_ids=position_ids[:, None],
            logits_index=np.full((1, 1), tokens - 1, np.int64),
        )
        self.lengths[slot] += tokens
        return logits[0, 0] if is_last else None

    def score(self, slot: int, length: int, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `DecoderSession.score`."""
        tokens = len(input_ids)
        self.lengths[slot] = length
        self._reserve(length + tokens)
        inputs = {
            "input_ids": input_ids[None],
            "image_index": np.full((1, tokens), -1, np.int64),
            "image_embeddings": self._text_only,
            "position_ids": np.broadcast_to(positions, (3, 1, tokens)),
            "logits_index": np.arange(tokens, dtype=np.int64)[None],
        }
        rows = slice(slot, slot + 1)
        logits = self._graph.for_scores.run(self._cache, rows, self.lengths[rows], inputs)
        self.lengths[slot] += tokens
        return logits[0]

    def step(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `DecoderSession.step`."""
        return self.check(input_ids[:, None], positions[:, None])[:, 0]

    def check(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `DecoderSession.check`."""
        active, tokens = input_ids.shape
        rows = self._rounded(active)
        if rows > active:  # what the row more writes lies beyond its length
            input_ids, positions = (np.append(each, each[-1:], axis=0) for each in (input_ids, positions))
        self._reserve(int(self.lengths[:rows].max()) + tokens)
        logits = self._run(
            slice(0, rows),
            input_ids=input_ids,
            image_index=np.full((rows, tokens), -1, np.int64),
            image_embeddings=self._text_only,
            position_ids=np.broadcast_to(positions, (3, rows, tokens)),
            logits_index=np.tile(np.arange(tokens), (rows, 1)),
        )
        self.lengths[:active] += tokens
        return logits[:active]

    def move(self, source: int, target: int) -> None:
        """See `DecoderSession.move`."""
        length = self.lengths[target] = self.lengths[source]
        for cache in self._cache.values():
            cache[target, :, :length] = cache[source, :, :length]

    def free(self, slot: int) -> None:
        """Forget what a slot holds; the cache shrinks when half of it is enough."""
        super().free(slot)
        longest = int(self.lengths.max())
        if longest < self._capacity // 2:
            self._allocate(longest + 1)

    def read_cache(self, slot: int, start: int, stop: int) -> np.ndarray:
        """See `DecoderSession.read_cache`."""
        return np.stack([cache[slot, :, start:stop] for cache in self._cache.values()])

    def write_cache(self, slot: int, start: int, rows: np.ndarray) -> None:
        """See `DecoderSession.write_cache`."""
        stop = start + rows.shape[2]
        self._reserve(stop)
        for cache, values in zip(self._cache.values(), rows, strict=True):
            cache[slot, :, start:stop] = values
        self.lengths[slot] = stop

    def _run(self, rows: slice, **inputs: np.ndarray) -> np.ndarray:
        return self._graph.run(self._cache, rows, self.lengths[rows], inputs)

    def _rounded(self, rows: int) -> int:
        return -(-rows // self._together) * self._together

    def _reserve(self, positions: int) -> None:
        if positions > self._capacity:
            self._allocate(positions)

    def _allocate(self, positions: int) -> None:
        """Give the cache at least so many positions a slot, and keep what the slots hold."""
        capacity = _whole_steps(positions)
        if capacity == self._capacity:
            return
        self._graph.forget()
        for name in self._names:
            # Zeros, not garbage: a masked position must not be NaN. Pages that are never written cost nothing.
            grown = np.zeros((len(self.lengths), self._row[0], capacity, self._row[1]), np.float32)
            for slot in np.flatnonzero(self.lengths):
                length = self.lengths[slot]
                grown[slot, :, :length] = self._cache[name][slot, :, :length]
            self._cache[name] = grown
        self._capacity = capacity


def _whole_steps(positions: int) -> int:
    """Whole steps, beyond `max_sequence` too: sums over rows of another length may be rounded otherwise."""
    return -(-positions // CAPACITY_STEP) * CAPACITY_STEP
