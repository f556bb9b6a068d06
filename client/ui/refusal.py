"""Errors as the page gets them: a status, and ``{"error": {"code", "message", "hint"}}``."""

from __future__ import annotations

import re

from cxr_triton.client.wire import FAILED, Uncoded
from cxr_triton.errors import CODES, CxrError, InvalidImage, InvalidRequest, QueueFull, Unavailable

STATUSES = {
    "READING_MISMATCH": 409,
    "ACCESS_DENIED": 502,
    "LIMIT_EXCEEDED": 413,
    "QUEUE_FULL": 429,
    "DEADLINE_EXCEEDED": 504,
    "CANCELLED": 503,
    "UNAVAILABLE": 503,
    "SERVER_MISMATCH": 502,
}
HINTS = {
    "PROMPT_TOO_LONG": "Ask in fewer words, with fewer pictures, or begin a new conversation.",
    "READING_MISMATCH": "Take the pictures that the earlier reading was made of, in their order, or begin anew.",
    "INVALID_IMAGE": "Export the file again from where it came from, and give the complete original.",
    "NOT_A_RADIOGRAPH": "Give a radiograph: Computed Radiography or Digital X-Ray.",
    "NOT_A_CHEST": "Give a chest radiograph; the model knows no other part of the body.",
    "FOR_PROCESSING": "Give the image for presentation of the same exposure.",
    "MULTI_FRAME": "Give one frame in a file of its own.",
    "NO_PIXELS": "Give the image; this object is about one and has no pixels.",
    "UNSUPPORTED_SYNTAX": "Export the file uncompressed, or as JPEG lossless or JPEG 2000.",
    "HEADER_MISMATCH": "Have the header corrected where the file comes from.",
    "LIMIT_EXCEEDED": "Give a smaller file, or remove a picture first.",
    "QUEUE_FULL": "Try again in a moment.",
    "DEADLINE_EXCEEDED": "Try again; if it stays so, tell who runs the server.",
    "CANCELLED": "Ask again.",
    "UNAVAILABLE": "Try again in a moment; if it stays so, tell who runs the server.",
    "ACCESS_DENIED": "Tell who runs this page: its access to the model's server has to be renewed.",
    "SERVER_MISMATCH": "Tell who runs this page: page and model's server are of different releases.",
    "INTERNAL": "Tell who runs the server; its log has the details.",
}
"""What to do, of each code that a visitor can meet; of others the message says it."""
_NAMES = (
    (r"REQUEST\.(?:prompt|history)\b(?:\[\d+\])?(?:\.content)?", "question"),
    (r"REQUEST\.max_new_tokens", "max_tokens"),
    (r"REQUEST\.(\w+)", r"\1"),
    (r"\bIMAGES: (\d+) given", r"pictures: \1 given"),
    (r"\bREQUEST\b", "the request"),
)


class Refusal(Exception):
    """A request that ends in an error.

    Parameters
    ----------
    error : CxrError
        Gives code and message; names of the REQUEST in it become those of the page.
    status : int, optional
        That of the code if left out.
    hint : str, optional
        That of the code, or what the message says to do, if left out.
    """

    def __init__(self, error: CxrError, *, status: int | None = None, hint: str | None = None):
        said, _, remedy = (FAILED if isinstance(error, Uncoded) else in_words(error.message)).rpartition("; ")
        self.code = error.code
        self.message = said or remedy
        self.hint = hint or HINTS.get(error.code) or (f"{remedy[:1].upper()}{remedy[1:]}." if said else "")
        super().__init__(self.message)
        self.status = status or status_of(error.code)
        self.headers = {"Retry-After": "1"} if isinstance(error, QueueFull | Unavailable) else {}

    @property
    def told(self) -> dict[str, str]:
        """Code, message and hint."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


def status_of(code: str) -> int:
    """HTTP status of one of `cxr_triton.errors.CODES`."""
    if code in STATUSES:
        return STATUSES[code]
    return 400 if issubclass(CODES[code], InvalidRequest | InvalidImage) else 500


def in_words(message: str) -> str:
    """A message about the REQUEST in the words of the page."""
    for name, word in _NAMES:
        message = re.sub(name, word, message)
    return re.sub(r"IMAGES\[(\d+)\]", lambda found: f"picture {int(found[1]) + 1}", message)
