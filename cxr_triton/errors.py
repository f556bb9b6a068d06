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
    ├── AccessDenied          ACCESS_DENIED
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
from typing import Self

_WIRE = re.compile(r"\[([A-Z_]+)\] (.*)", re.DOTALL)


class CxrError(Exception):
    """Base of every error that cxr-triton raises on purpose.

    Attributes
    ----------
    code : str
        One of `CODES`, stable across releases.
    message : str
        What is wrong, where, measured against allowed, and what to do; without the code.
    trace_id : str
        Of the reading that failed, as the logs on its way have it; "" where there is none.
    """

    code = "INTERNAL"

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message
        self.trace_id = ""

    def of_trace(self, trace_id: str) -> Self:
        """Name the trace that it is of; a traceback says so too."""
        if trace_id and not self.trace_id:
            self.trace_id = trace_id
            self.add_note(f"trace {trace_id}")
        return self

    def reworded(self, message: str) -> Self:
        """The same in other words."""
        return type(self)(message).of_trace(self.trace_id)

    def wire(self) -> str:
        """The text that crosses the server boundary: ``[CODE] message``."""
        return f"[{self.code}] {self.message}"


class InvalidRequest(CxrError):
    """A request or an option is malformed, unknown or out of range; the message names it and what is allowed."""

    code = "INVALID_REQUEST"


class PromptTooLong(InvalidRequest):
    """Prompt and images leave no room for an answer; shorten the text, send fewer images or export more context."""

    code = "PROMPT_TOO_LONG"


class ReadingMismatch(InvalidRequest):
    """A reading is put with other images than it was made of; give the files that were read, in their order."""

    code = "READING_MISMATCH"


class InvalidImage(CxrError):
    """A file is no image that can be read, is cut off or damaged; send the complete original file."""

    code = "INVALID_IMAGE"


class NotARadiograph(InvalidImage):
    """SOP class or modality is that of another kind of image; send Computed Radiography or Digital X-Ray."""

    code = "NOT_A_RADIOGRAPH"


class NotAChest(InvalidImage):
    """Header or picture show another part of the body; send a chest, or let the profile flag it (`not_a_chest`)."""

    code = "NOT_A_CHEST"


class ForProcessing(InvalidImage):
    """The image is raw detector data, not ready for display; send the For Presentation image of the exposure."""

    code = "FOR_PROCESSING"


class MultiFrame(InvalidImage):
    """The file holds several frames; send one frame per file."""

    code = "MULTI_FRAME"


class NoPixels(InvalidImage):
    """The object has no pixel data, as a report or a presentation state has none; send the image object."""

    code = "NO_PIXELS"


class UnsupportedSyntax(InvalidImage):
    """The transfer syntax or its compression cannot be decoded; convert the file to one that the message lists."""

    code = "UNSUPPORTED_SYNTAX"


class HeaderMismatch(InvalidImage):
    """The header contradicts the pixels, so that showing them would be a guess; correct the header at its source."""

    code = "HEADER_MISMATCH"


class LimitExceeded(InvalidImage):
    """An image would cost more bytes, pixels, memory or time than allowed; send a smaller one or raise the limit."""

    code = "LIMIT_EXCEEDED"


class QueueFull(CxrError):
    """The server or gateway takes nothing more in at the moment; send it again later."""

    code = "QUEUE_FULL"


class DeadlineExceeded(CxrError):
    """A reading did not come within the caller's time limit and was cancelled; raise it or look at the load."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(CxrError):
    """The caller, or the connection's end, stopped a reading before it was complete; call again."""

    code = "CANCELLED"


class Unavailable(CxrError):
    """The server cannot be reached, is starting or stopping; check its address and health, then try again."""

    code = "UNAVAILABLE"


class AccessDenied(CxrError):
    """What stands before the server takes neither token nor certificate; renew them, or ask who runs it."""

    code = "ACCESS_DENIED"


class ServerMismatch(CxrError):
    """Client and server do not speak of the same models or format; use the client of the server's release."""

    code = "SERVER_MISMATCH"


class InternalError(CxrError):
    """Something failed that no input should bring about; see the server's log, restart it and report the message."""

    code = "INTERNAL"


class InvalidProfile(CxrError):
    """A model profile has an unknown, missing or impossible value; the message names its key in the YAML."""

    code = "INVALID_PROFILE"


class InvalidRecipe(CxrError):
    """A build recipe has an unknown, missing or impossible value; the message names its key in the YAML."""

    code = "INVALID_RECIPE"


class InvalidConfig(CxrError):
    """A configuration file has an unknown, missing or impossible value; the message names its key in the YAML."""

    code = "INVALID_CONFIG"


class UnsupportedCheckpoint(CxrError):
    """A checkpoint is incomplete, or of a shape that is not exported; download it again or take a supported one."""

    code = "UNSUPPORTED_CHECKPOINT"


class LicenceNotAccepted(CxrError):
    """The weights' licence was not accepted; read it, then pass ``--accept-licence``."""

    code = "LICENCE_NOT_ACCEPTED"


class BuildFailed(CxrError):
    """A compiler refused a graph or ended early; see its log, then give it more memory or choose another recipe."""

    code = "BUILD_FAILED"


class DeviceUnavailable(CxrError):
    """There is no GPU, or no library that can use it; install what the message names or choose another engine."""

    code = "DEVICE_UNAVAILABLE"


class InvalidBundle(CxrError):
    """A bundle or an exported folder is incomplete, damaged or made for another machine; export or build it again."""

    code = "INVALID_BUNDLE"


class NotVerified(InvalidBundle):
    """A bundle has no passing record of the gate; run `cxr-triton verify` on the machine that serves it."""

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
