"""gRPC client of a served `cxr_reader`: `Reader`, `AsyncReader`, their streams and limits."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cxr_triton.client.aio import AsyncReader, AsyncReadingStream
    from cxr_triton.client.conversation import Conversation
    from cxr_triton.client.limits import Timeouts, Tls
    from cxr_triton.client.reader import Reader, ReadingStream
    from cxr_triton.client.wire import ServerInfo

__all__ = [
    "AsyncReader",
    "AsyncReadingStream",
    "Conversation",
    "Reader",
    "ReadingStream",
    "ServerInfo",
    "Timeouts",
    "Tls",
]

_MODULES = {
    "AsyncReader": "aio",
    "AsyncReadingStream": "aio",
    "Conversation": "conversation",
    "Reader": "reader",
    "ReadingStream": "reader",
    "ServerInfo": "wire",
    "Timeouts": "limits",
    "Tls": "limits",
}


def __getattr__(name: str):
    """Import on use: the gateway's configuration and help, which are below this package, have no need of gRPC."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
