"""Errors as such a service answers them: a status, and the words of its own requests."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from cxr_triton.client.wire import FAILED, Uncoded
from cxr_triton.errors import (
    CODES,
    CxrError,
    DeadlineExceeded,
    InvalidImage,
    InvalidRequest,
    QueueFull,
    Unavailable,
)

STATUSES = {
    "READING_MISMATCH": 502,
    "ACCESS_DENIED": 502,
    "LIMIT_EXCEEDED": 413,
    "QUEUE_FULL": 429,
    "DEADLINE_EXCEEDED": 504,
    "CANCELLED": 503,
    "UNAVAILABLE": 503,
    "SERVER_MISMATCH": 502,
}
TEXT = r"REQUEST\.(?:prompt|history)\b(?:\[\d+\])?(?:\.content)?"
"""Where a message names what is asked."""


class Misdirected(InvalidRequest):
    """A request for a name that is not served."""

    status = 421


class Late(DeadlineExceeded):
    """A body that did not come in time."""

    status = 408


class DoorRefusal(Exception):
    """A request that ends in an error.

    Parameters
    ----------
    error : CxrError
        Gives code and message; names of the REQUEST in it become those of the service.
    status : int, optional
        That of the error, as `Late` has one, or else of its code if left out.
    """

    names: ClassVar[dict[str, str]]
    """Patterns in a message about the REQUEST, and what stands for them; that of an image is ``IMAGE 1`` here."""
    statuses: ClassVar[dict[str, int]] = STATUSES

    def __init__(self, error: CxrError, *, status: int | None = None):
        self.code = error.code
        self.message = FAILED if isinstance(error, Uncoded) else self._in_words(error.message)
        super().__init__(self.message)
        self.status = status or getattr(error, "status", None) or self._status_of(error.code)
        self.headers = {"Retry-After": "1"} if isinstance(error, QueueFull | Unavailable) else {}

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        raise NotImplementedError

    def _status_of(self, code: str) -> int:
        if code in self.statuses:
            return self.statuses[code]
        return 400 if issubclass(CODES[code], InvalidRequest | InvalidImage) else 500

    def _in_words(self, message: str) -> str:
        message = re.sub(r"IMAGES\[(\d+)\]", lambda found: f"IMAGE {int(found[1]) + 1}", message)
        for name, word in {**self.names, r"REQUEST\.(\w+)": r"\1", r"\bREQUEST\b": "the request"}.items():
            message = re.sub(name, word, message)
        return message
