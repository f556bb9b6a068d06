"""Errors as OpenAI's API gives them: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import re

from cxr_triton.client.wire import FAILED, Uncoded
from cxr_triton.errors import (
    CODES,
    CxrError,
    InvalidImage,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    Unavailable,
)

RETRY_AFTER_S = 1
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
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_NAMES = (
    (r"REQUEST\.(?:prompt|history)\b(?:\[\d+\])?(?:\.content)?", "messages"),
    (r"REQUEST\.max_new_tokens", "max_completion_tokens"),
    (r"REQUEST\.guide\.json_schema", "response_format"),
    (r"REQUEST\.(\w+)", r"\1"),
    (r"\bIMAGES: (\d+) given", r"messages: \1 images given"),
    (r"\bREQUEST\b", "the request"),
)


class Refusal(Exception):
    """A request that ends in an error.

    Parameters
    ----------
    error : CxrError
        Gives code and message; names of the REQUEST in it become those of this API.
    status : int, optional
        That of the code if left out.
    param : str, optional
        What the message begins with, where that is a parameter's name, if left out.
    """

    def __init__(self, error: CxrError, *, status: int | None = None, param: str | None = None):
        self.code = error.code
        self.message = FAILED if isinstance(error, Uncoded) else in_parameters(error.message)
        super().__init__(self.message)
        self.status = status or status_of(error.code)
        self.param = param or _param(error, self.message)
        self.headers = {"Retry-After": str(RETRY_AFTER_S)} if isinstance(error, QueueFull | Unavailable) else {}
        if error.code == "DEADLINE_EXCEEDED":  # OpenAI's clients would ask again, and wait as long
            self.headers["x-should-retry"] = "false"

    def as_json(self) -> dict:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def status_of(code: str) -> int:
    """HTTP status of one of `cxr_triton.errors.CODES`."""
    if code in STATUSES:
        return STATUSES[code]
    return 400 if issubclass(CODES[code], InvalidRequest | InvalidImage) else 500


def in_parameters(message: str) -> str:
    """A message about the REQUEST in the words of this API."""
    for name, parameter in _NAMES:
        message = re.sub(name, parameter, message)
    return re.sub(r"IMAGES\[(\d+)\]", lambda found: f"image {int(found[1]) + 1} of messages", message)


def _param(error: CxrError, message: str) -> str | None:
    if isinstance(error, InvalidImage | PromptTooLong):
        return "messages"
    found = re.match(r"(?:unknown key '(\w+)'|([a-z_]+)(?=[:.\[]))", message)
    return (found[1] or found[2]) if found and isinstance(error, InvalidRequest) else None
