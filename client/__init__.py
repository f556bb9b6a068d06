"""gRPC client of a served `cxr_reader`: `Reader`, `AsyncReader`, their streams and limits."""

from cxr_triton.client.aio import AsyncReader, AsyncReadingStream
from cxr_triton.client.limits import Timeouts, Tls
from cxr_triton.client.reader import Reader, ReadingStream
from cxr_triton.client.wire import ServerInfo

__all__ = ["AsyncReader", "AsyncReadingStream", "Reader", "ReadingStream", "ServerInfo", "Timeouts", "Tls"]
