"""Errors as OpenAI's API gives them: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from cxr_triton.client.door.refusal import TEXT, DoorRefusal
from cxr_triton.errors import CxrError, InvalidImage, InvalidRequest, PromptTooLong

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Refusal(DoorRefusal):
    """A request that ends in an error.

    Parameters
    ----------
    error, status
        See `DoorRefusal`.
    param : str, optional
        What the message begins with, where that is a parameter's name, if left out.
    """

    names: ClassVar[dict[str, str]] = {
        TEXT: "messages",
        r"REQUEST\.max_new_tokens": "max_completion_tokens",
        r"REQUEST\.guide\.json_schema": "response_format",
        r"\bIMAGES: (\d+) given": r"messages: \1 images given",
        r"\bIMAGE (\d+)": r"image \1 of messages",
    }

    def __init__(self, error: CxrError, *, status: int | None = None, param: str | None = None):
        super().__init__(error, status=status)
        self.param = param or _param(error, self.message)
        if error.code == "DEADLINE_EXCEEDED":  # OpenAI's clients would ask again, and wait as long
            self.headers["x-should-retry"] = "false"

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _param(error: CxrError, message: str) -> str | None:
    if isinstance(error, InvalidImage | PromptTooLong):
        return "messages"
    found = re.match(r"(?:unknown key '(\w+)'|([a-z_]+)(?=[:.\[]))", message)
    return (found[1] or found[2]) if found and isinstance(error, InvalidRequest) else None
