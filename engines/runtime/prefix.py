"""Keys and values of prompts and answers, kept for prompts that begin alike.

A sequence is cut into blocks of `BLOCK` tokens. The digest of a block is over the block before it, its token ids, its
M-RoPE positions and its rows of image embeddings, so blocks form a tree, and an equal digest means an equal beginning.
Rows are copied out of a slot and into one: no stream holds a block, and one that ends in any way leaves nothing behind.

What is reused of prompts changes no bit: it is taken at the ends of whole prefill chunks, as if the prompt had been
given from its start. An answer's rows come from decode steps, whose sums an engine may round otherwise than a
prefill's; a prompt that goes on after an answer takes them all the same, unless `exact_only`.
"""

from __future__ import annotations

import hashlib
import logging
import math
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
    is_exact : bool
        A prompt gives these bits wherever it begins: they come from a whole chunk, and all before them do.
    has_answer : bool
        Tokens of it were generated, or stand after some that were.
    """

    rows: np.ndarray
    is_exact: bool = True
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

    def lacks(self, digest: bytes, *, is_exact: bool) -> bool:
        """Whether a block is missing, or is there without the exact rows that could be put in its place."""
        held = self._blocks.peek(digest)
        return held is None or (is_exact and not held.is_exact)

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
    exact : int
        First tokens of the prompt whose rows have the bits that they would have without reuse, in whole chunks.
    """

    digests: list[bytes]
    exact: int


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
            Tokens of a prefill.

        Returns
        -------
        int
            Tokens that the slot holds then; 0 where nothing is known, or copying failed.
        """
        prompt = len(stream.generation.input_ids)
        try:
            lineage = self._lineages[stream] = Lineage(chain(stream.generation), prompt // chunk * chunk)
            blocks = self.tree.find(lineage.digests[: (prompt - 1) // BLOCK])
            if any(block.has_answer for block in blocks):
                lineage.exact = 0
            else:
                exact = next((i for i, block in enumerate(blocks) if not block.is_exact), len(blocks))
                whole = math.lcm(chunk, BLOCK)
                blocks = blocks[: exact * BLOCK // whole * whole // BLOCK]
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
        prompt, exact = len(stream.generation.input_ids), lineage.exact

        def read(place: int) -> Block:
            start, stop = place * BLOCK, (place + 1) * BLOCK
            rows = session.read_cache(slot, start, stop)
            return Block(rows, is_exact=stop <= exact, has_answer=stop > prompt)

        try:
            digests = self._whole(stream, lineage.digests, int(session.lengths[slot]))
            if self._exact_only:
                digests = digests[: exact // BLOCK]
            ends = range(BLOCK, len(digests) * BLOCK + 1, BLOCK)
            lacking = [self.tree.lacks(d, is_exact=end <= exact) for d, end in zip(digests, ends, strict=True)]
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
