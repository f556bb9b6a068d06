"""Values by digest within a limit of bytes: the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Lru(Generic[Value]):
    """A bounded store; for one thread.

    Parameters
    ----------
    limit_bytes : int

    Attributes
    ----------
    nbytes : int
        Of what is held now, never more than the limit.
    evicted : int
        Values that went so far.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.nbytes = self.evicted = 0
        self._held: OrderedDict[bytes, tuple[Value, int]] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._held)

    def peek(self, key: bytes) -> Value | None:
        """A value, whose age stays."""
        held = self._held.get(key)
        return held[0] if held else None

    def touch(self, key: bytes) -> None:
        """Make a value the newest."""
        self._held.move_to_end(key)

    def put(self, key: bytes, value: Value, nbytes: int) -> None:
        """Hold a value as the newest, in the place of one that has its key; `evict` is called when all are there."""
        if key in self._held:
            self.nbytes -= self._held.pop(key)[1]
        self._held[key] = value, nbytes
        self.nbytes += nbytes

    def evict(self, room: int = 0) -> None:
        """Forget the oldest until the limit holds, and leaves so many bytes free."""
        while self._held and self.nbytes + room > self.limit_bytes:
            _, (_, nbytes) = self._held.popitem(last=False)
            self.nbytes -= nbytes
            self.evicted += 1

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self.nbytes = 0
