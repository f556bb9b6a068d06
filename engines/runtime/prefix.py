"""Keys and values of prompts and answers, kept for prompts that begin alike.

A sequence is cut into blocks of `BLOCK` tokens. The digest of a block is over the block before it, its token ids, its
M-RoPE positions and its rows of image embeddings, so blocks form a tree, and an equal digest means an equal beginning.
Rows are copied out of a slot and into one: no stream holds a block, and one that ends in any way leaves nothing behind.

What is reused of prompts changes no bit: it is taken where a run of a prefill ends for both prompts, as if this one had
been given from its start. A picture ends a run, so that another question about it begins there (`run_end`). An answer's
rows come from decode steps, whose sums an engine may round otherwise than a prefill's. A prompt that goes on after an
answer takes them all the same, unless `exact_only`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from cxr_triton.engines.lru import Lru
from cxr_triton.engines.runtime.stream import Generation, Stream

log = logging.getLogger(__name__)
BLOCK = 16
"""Tokens of a block."""
_GROUP = 16  # blocks copied at a time, so that a long sequence is never in memory once more
_OVERHEAD_BYTES = 512  # of a block beside its rows


@dataclass(frozen=True, slots=True)
class Block:
    """Keys and values of `BLOCK` tokens.

    Attributes
    ----------
    rows : (2 * layers, kv_heads, BLOCK, head_dim) array
    run_end : int
        Where the run of a prefill ended that gave the last token: the same runs give the same bits. 0 where the prompt
        ended before its run was full, and of answers and what comes after them.
    has_answer : bool
        Tokens of it were generated, or stand after some that were.
    """

    rows: np.ndarray
    run_end: int
    has_answer: bool = False


class PrefixTree:
    """Blocks by the digests of the sequences that they end, within a limit of bytes.

    A block is never older than one that goes on after it, so what goes first is always the end of a sequence.

    Parameters
    ----------
    limit_bytes : int
    """

    def __init__(self, limit_bytes: int):
        self._blocks: Lru[Block] = Lru(limit_bytes)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, never more than the limit."""
        return self._blocks.nbytes

    @property
    def evicted(self) -> int:
        """Blocks that the limit has cost so far."""
        return self._blocks.evicted

    def find(self, digests: Sequence[bytes]) -> list[Block]:
        """The longest beginning of a sequence that is held; it becomes the newest."""
        found: list[Block] = []
        for digest in digests:
            if (block := self._blocks.peek(digest)) is None:
                break
            found.append(block)
        for digest in reversed(digests[: len(found)]):
            self._blocks.touch(digest)
        return found

    def lacks(self, digest: bytes, run_end: int) -> bool:
        """Whether a block is missing, or is there without the exact rows of such a run, which could take its place."""
        held = self._blocks.peek(digest)
        return held is None or run_end not in (0, held.run_end)

    def put(self, digests: Sequence[bytes], read: Callable[[int], Block], places: Sequence[int]) -> None:
        """Hold blocks of a sequence, as many from its start as the limit allows; what is older goes first.

        Parameters
        ----------
        digests : sequence of bytes
            Of the sequence from its start.
        read : callable
            Gives the block of a place in the sequence.
        places : sequence of int
            Those that are not held, in order; the others are.
        """
        if not places:
            self.find(digests)
            return
        first = read(places[0])
        size = first.rows.nbytes + _OVERHEAD_BYTES
        digests = digests[: self._blocks.limit_bytes // size]
        places = [place for place in places if place < len(digests)]
        self.find(digests)  # what the new blocks go on after is the newest, and stays
        self._blocks.evict(len(places) * size)
        for place in places:
            self._blocks.put(digests[place], first if place == places[0] else read(place), size)
        self.find(digests)

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()


@dataclass
class Lineage:
    """What a stream has in common with others.

    Attributes
    ----------
    digests : list of bytes
        Of the prompt's whole blocks.
    run_ends : list of int
        Of `Block`, for the first of them; 0 for all others.
    """

    digests: list[bytes]
    run_ends: list[int]


def run_end(generation: Generation, start: int, most: int) -> int:
    """Where a run of a prefill ends that begins at a token.

    With the last whole block of a picture, at the latest after so many tokens, or with the prompt.
    """
    end = min(start + most, len(generation.input_ids))
    is_image = generation.image_index[start : end + BLOCK] >= 0
    pictures = start + 1 + np.flatnonzero(is_image[:-1] & ~is_image[1:])  # the tokens after them
    borders = pictures // BLOCK * BLOCK
    return min(int(borders[borders > start].min(initial=end)), end)


def _run_ends(generation: Generation, most: int) -> list[int]:
    """Of each whole block of a prompt that is given from its start; 0 in a run that could have held more."""
    ends: list[int] = []
    start, tokens = 0, len(generation.input_ids)
    while start < tokens:
        end = run_end(generation, start, most)
        is_full = end < tokens or end - start == most
        ends += [end if is_full else 0] * (end // BLOCK - start // BLOCK)
        start = end
    return ends


def chain(generation: Generation) -> list[bytes]:
    """Digests of a prompt's whole blocks."""
    return list(_chain(b"", generation.input_ids, generation.position_ids, _row_digests(generation)))


def _row_digests(generation: Generation) -> np.ndarray:
    """Embedding rows of each token as bytes, empty for text: an object array [S]."""
    rows = np.empty(len(generation.input_ids), object)
    rows[:] = b""
    for token in np.flatnonzero(generation.image_index >= 0):
        rows[token] = generation.image_embeddings[generation.image_index[token]].tobytes()
    return rows


def _chain(before: bytes, ids: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        part = slice(start, start + BLOCK)
        content = hashlib.blake2b(before, digest_size=32)
        content.update(np.ascontiguousarray(ids[part], np.int64).tobytes())
        content.update(np.ascontiguousarray(positions[:, part], np.int64).tobytes())
        for place, row in enumerate(rows[part]):
            if row:
                content.update(b"%d," % place)
                content.update(row)
        before = content.digest()
        yield before


def _whole_runs(blocks: Sequence[Block], run_ends: Sequence[int]) -> int:
    """How many blocks, the first of a prompt, come from the runs that it would have itself, to the end of one."""
    same = 0
    while same < len(blocks) and blocks[same].run_end == run_ends[same] != 0:
        same += 1
    return max((i for i in range(1, same + 1) if run_ends[i - 1] == i * BLOCK), default=0)


class PrefixCache:
    """A tree of blocks between a decoder session and its streams; for the scheduler's thread.

    Parameters
    ----------
    limit_bytes : int
        Memory of the host for blocks.
    exact_only : bool
        Reuse only what changes no bit, so no answers.

    """

    def __init__(self, limit_bytes: int, *, exact_only: bool = False):
        self.tree = PrefixTree(limit_bytes)
        self._exact_only = exact_only
        self._lineages: WeakKeyDictionary[Stream, Lineage] = WeakKeyDictionary()
        self._prompt_tokens = self._tokens = self._hits = 0

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept, never more than the limit."""
        return self.tree.nbytes

    def counts(self) -> dict[str, int]:
        """What came of it so far, for any thread.

        ``prompt_tokens`` of all prompts, ``tokens`` of them that were not computed again, ``hits``: prompts that
        had any, ``evicted``: blocks that the limit has cost.
        """
        return {
            "prompt_tokens": self._prompt_tokens,
            "tokens": self._tokens,
            "hits": self._hits,
            "evicted": self.tree.evicted,
        }

    def restore(self, session, slot: int, stream: Stream, chunk: int) -> int:
        """Fill an empty slot with what is known of a stream's prompt, at most all but its last token.

        Parameters
        ----------
        session : DecoderSession
        slot : int
        stream : Stream
        chunk : int
            Most tokens of a run of a prefill.

        Returns
        -------
        int
            Tokens that the slot holds then; 0 where nothing is known, or copying failed.
        """
        prompt = len(stream.generation.input_ids)
        try:
            lineage = self._lineages[stream] = Lineage(chain(stream.generation), _run_ends(stream.generation, chunk))
            blocks = self.tree.find(lineage.digests[: (prompt - 1) // BLOCK])
            if any(block.has_answer for block in blocks):
                lineage.run_ends = []
            else:
                blocks = blocks[: _whole_runs(blocks, lineage.run_ends)]
            for first in range(0, len(blocks), _GROUP):
                rows = np.concatenate([block.rows for block in blocks[first : first + _GROUP]], axis=2)
                session.write_cache(slot, first * BLOCK, rows)
        except Exception:
            self._give_up("restoring", stream)
            session.free(slot)
            return 0
        tokens = len(blocks) * BLOCK
        self._prompt_tokens += prompt
        self._tokens += tokens
        self._hits += tokens > 0
        return tokens

    def keep(self, session, slot: int, stream: Stream) -> None:
        """Take a copy of what a slot holds of a stream, prompt and answer, where it is not held."""
        if (lineage := self._lineages.get(stream)) is None:
            return  # nothing was restored, as copying failed
        prompt = len(stream.generation.input_ids)

        def read(place: int) -> Block:
            start, stop = place * BLOCK, (place + 1) * BLOCK
            return Block(session.read_cache(slot, start, stop), run_ends[place], has_answer=stop > prompt)

        try:
            digests = self._whole(stream, lineage.digests, int(session.lengths[slot]))
            run_ends = [*lineage.run_ends, *[0] * (len(digests) - len(lineage.run_ends))]
            if self._exact_only:
                digests = digests[: sum(map(bool, run_ends))]
            lacking = [self.tree.lacks(digest, end) for digest, end in zip(digests, run_ends, strict=False)]
            self.tree.put(digests, read, np.flatnonzero(lacking).tolist())
        except Exception:
            self._give_up("keeping", stream)

    def _whole(self, stream: Stream, known: list[bytes], length: int) -> list[bytes]:
        """Digests of all whole blocks of a slot's first `length` tokens, where those of its prompt are known."""
        generation = stream.generation
        start, prompt = len(known) * BLOCK, len(generation.input_ids)
        answer = np.array(stream.answer[: length - prompt], np.int64)
        if length < prompt or not len(answer):
            return known[: length // BLOCK]
        first = int(generation.position_ids.max()) + 1
        ids = np.concatenate([generation.input_ids[start:], answer])
        positions = np.tile(np.arange(first, first + len(answer)), (3, 1))
        positions = np.concatenate([generation.position_ids[:, start:], positions], axis=1)
        rows = np.full(len(ids), b"", object)
        rows[: prompt - start] = _row_digests(generation)[start:]
        return [*known, *_chain(known[-1] if known else b"", ids, positions, rows)]

    def _give_up(self, doing: str, stream: Stream) -> None:
        """What is held may be of a session that failed."""
        log.exception("%s a prefix of stream %s failed; the prefix cache starts anew", doing, stream.id)
        self.tree.clear()
