"""Errors as the page gets them: a status, and ``{"error": {"code", "message", "hint"}}``."""

from __future__ import annotations

from typing import Any, ClassVar

from cxr_triton.client.door.refusal import STATUSES, TEXT, DoorRefusal
from cxr_triton.errors import CxrError

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


class Refusal(DoorRefusal):
    """A request that ends in an error.

    Parameters
    ----------
    error, status
        See `DoorRefusal`.
    hint : str, optional
        That of the code, or what the message says to do, if left out.
    """

    names: ClassVar[dict[str, str]] = {
        TEXT: "question",
        r"REQUEST\.max_new_tokens": "max_tokens",
        r"\bIMAGES: (\d+) given": r"pictures: \1 given",
        r"\bIMAGE (\d+)": r"picture \1",
    }
    statuses: ClassVar[dict[str, int]] = {**STATUSES, "READING_MISMATCH": 409}

    def __init__(self, error: CxrError, *, status: int | None = None, hint: str | None = None):
        super().__init__(error, status=status)
        said, _, remedy = self.message.rpartition("; ")
        self.message = said or remedy
        self.hint = hint or HINTS.get(error.code) or (f"{remedy[:1].upper()}{remedy[1:]}." if said else "")

    @property
    def told(self) -> dict[str, str]:
        """Code, message and hint."""
        return {"code": self.code, "message": self.message, "hint": self.hint}

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": self.told}
