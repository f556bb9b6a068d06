"""The closed set of error codes, and the exception each one maps to on every side of the wire.

    CxrError
    ├── InvalidRequest        INVALID_REQUEST
    │   ├── PromptTooLong     PROMPT_TOO_LONG
    │   └── ReadingMismatch   READING_MISMATCH       a reading of other images than those it is put with
    ├── InvalidImage          INVALID_IMAGE          unreadable, truncated or inconsistent
    │   ├── NotARadiograph    NOT_A_RADIOGRAPH
    │   ├── NotAChest         NOT_A_CHEST            a radiograph of another part of the body, or no radiograph
    │   ├── ForProcessing     FOR_PROCESSING
    │   ├── MultiFrame        MULTI_FRAME
    │   ├── NoPixels          NO_PIXELS
    │   ├── UnsupportedSyntax UNSUPPORTED_SYNTAX
    │   ├── HeaderMismatch    HEADER_MISMATCH        header and codestream disagree
    │   └── LimitExceeded     LIMIT_EXCEEDED         over the size, memory or time limit
    ├── QueueFull             QUEUE_FULL             may be retried
    ├── DeadlineExceeded      DEADLINE_EXCEEDED
    ├── Cancelled             CANCELLED
    ├── Unavailable           UNAVAILABLE            may be retried
    ├── ServerMismatch        SERVER_MISMATCH
    ├── InternalError         INTERNAL
    ├── InvalidProfile        INVALID_PROFILE
    ├── InvalidRecipe         INVALID_RECIPE
    ├── InvalidConfig         INVALID_CONFIG
    ├── UnsupportedCheckpoint UNSUPPORTED_CHECKPOINT
    ├── LicenceNotAccepted    LICENCE_NOT_ACCEPTED
    ├── BuildFailed           BUILD_FAILED           a compiler refused a graph
    ├── DeviceUnavailable     DEVICE_UNAVAILABLE     no GPU, or no library for it
    └── InvalidBundle         INVALID_BUNDLE
        └── NotVerified       NOT_VERIFIED           no passing record of the verification gate

On the wire an error is the text ``[CODE] what, where, measured against allowed, what to do``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_WIRE = re.compile(r"\[([A-Z_]+)\] (.*)", re.DOTALL)


class CxrError(Exception):
    """Base of every error that cxr-triton raises on purpose.

    Attributes
    ----------
    code : str
        One of `CODES`, stable across releases.
    message : str
        What is wrong, where, measured against allowed, and what to do; without the code.
    """

    code = "INTERNAL"

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    def wire(self) -> str:
        """The text that crosses the server boundary: ``[CODE] message``."""
        return f"[{self.code}] {self.message}"


class InvalidRequest(CxrError):
    code = "INVALID_REQUEST"


class PromptTooLong(InvalidRequest):
    code = "PROMPT_TOO_LONG"


class ReadingMismatch(InvalidRequest):
    code = "READING_MISMATCH"


class InvalidImage(CxrError):
    code = "INVALID_IMAGE"


class NotARadiograph(InvalidImage):
    code = "NOT_A_RADIOGRAPH"


class NotAChest(InvalidImage):
    code = "NOT_A_CHEST"


class ForProcessing(InvalidImage):
    code = "FOR_PROCESSING"


class MultiFrame(InvalidImage):
    code = "MULTI_FRAME"


class NoPixels(InvalidImage):
    code = "NO_PIXELS"


class UnsupportedSyntax(InvalidImage):
    code = "UNSUPPORTED_SYNTAX"


class HeaderMismatch(InvalidImage):
    code = "HEADER_MISMATCH"


class LimitExceeded(InvalidImage):
    code = "LIMIT_EXCEEDED"


class QueueFull(CxrError):
    code = "QUEUE_FULL"


class DeadlineExceeded(CxrError):
    code = "DEADLINE_EXCEEDED"


class Cancelled(CxrError):
    code = "CANCELLED"


class Unavailable(CxrError):
    code = "UNAVAILABLE"


class ServerMismatch(CxrError):
    code = "SERVER_MISMATCH"


class InternalError(CxrError):
    code = "INTERNAL"


class InvalidProfile(CxrError):
    code = "INVALID_PROFILE"


class InvalidRecipe(CxrError):
    code = "INVALID_RECIPE"


class InvalidConfig(CxrError):
    code = "INVALID_CONFIG"


class UnsupportedCheckpoint(CxrError):
    code = "UNSUPPORTED_CHECKPOINT"


class LicenceNotAccepted(CxrError):
    code = "LICENCE_NOT_ACCEPTED"


class BuildFailed(CxrError):
    code = "BUILD_FAILED"


class DeviceUnavailable(CxrError):
    code = "DEVICE_UNAVAILABLE"


class InvalidBundle(CxrError):
    code = "INVALID_BUNDLE"


class NotVerified(InvalidBundle):
    code = "NOT_VERIFIED"


def _tree(cls: type[CxrError]) -> Iterable[type[CxrError]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _tree(sub)


CODES: dict[str, type[CxrError]] = {cls.code: cls for cls in _tree(CxrError)}


def from_wire(text: str) -> CxrError:
    """The exception for a server's error text; text without a known code becomes `InternalError`.

    Triton prefixes an ensemble's errors ("in ensemble 'cxr_reader', ..."); the prefix is dropped.
    """
    match = _WIRE.search(text)
    if match and match[1] in CODES:
        return CODES[match[1]](match[2])
    return InternalError(text)


def unknown_key(key: str, allowed: Iterable[str], where: str) -> str:
    """Message for an unknown key that names the nearest valid one."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
    return f"unknown key {key!r} in {where}; {hint}"
