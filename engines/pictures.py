"""Embeddings of pictures that were encoded before, by the digest of all that the tower was given for each."""

from __future__ import annotations

import hashlib

import numpy as np

from cxr_triton.engines.lru import Lru
from cxr_triton.engines.session import VisionSession
from cxr_triton.pixels.image import MERGE

_OVERHEAD_BYTES = 512  # of a picture beside its rows


class PictureCache:
    """A vision session that encodes a picture once, as long as there is room; for one thread.

    Parameters
    ----------
    session : VisionSession
    limit_bytes : int
        Memory for embeddings; 0 remembers none.

    Attributes
    ----------
    pictures, hits : int
        Pictures that were asked for so far, and those of them that were not encoded.
    """

    def __init__(self, session: VisionSession, limit_bytes: int):
        self._session = session
        self._rows: Lru[np.ndarray] = Lru(limit_bytes)
        self.pictures = self.hits = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings that are held, never more than the limit."""
        return self._rows.nbytes

    def encode(
        self, pixel_windows: np.ndarray, patch_rows_cols: np.ndarray, valid: np.ndarray, merge_order: np.ndarray
    ) -> np.ndarray:
        """As `VisionSession.encode`; rows beyond an image's tokens are 0 where it was not encoded now."""
        inputs = (pixel_windows, patch_rows_cols, valid, merge_order)
        if not self._rows.limit_bytes:
            encoded = self._session.encode(*inputs)
            self.pictures += len(valid)
            return encoded
        digests = [_digest(*(array[i] for array in inputs)) for i in range(len(valid))]
        known = {digest: self._rows.peek(digest) for digest in digests}
        new = {digest: i for i, digest in reversed(list(enumerate(digests))) if known[digest] is None}
        if new:
            places = list(new.values())
            encoded = self._session.encode(*(array[places] for array in inputs))
            for digest, place, rows in zip(new, places, encoded, strict=True):
                known[digest] = rows[: int(valid[place].sum()) // MERGE**2].copy()
        self.pictures += len(digests)
        self.hits += len(digests) - len(new)
        for digest, rows in known.items():
            self._rows.put(digest, rows, rows.nbytes + _OVERHEAD_BYTES)
        self._rows.evict()
        result = np.zeros((*merge_order.shape, next(iter(known.values())).shape[-1]), np.float32)
        for image, digest in zip(result, digests, strict=True):
            image[: len(known[digest])] = known[digest]
        return result


def _digest(windows: np.ndarray, places: np.ndarray, valid: np.ndarray, merge_order: np.ndarray) -> bytes:
    """Of a picture's windows up to the last one in use: those behind it change nothing."""
    used = int(np.flatnonzero(valid.any(axis=1)).max(initial=0)) + 1
    content = hashlib.blake2b(digest_size=32)
    for array in (windows[:used], places[:used], valid[:used], merge_order):
        content.update(str((array.dtype.str, array.shape)).encode())
        content.update(np.ascontiguousarray(array).data)
    return content.digest()
