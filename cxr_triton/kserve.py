"""What all callers of KServe v2 over gRPC share: the streaming call, channel options, an end before the interpreter."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable

from tritonclient.grpc import service_pb2 as pb

STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
STREAM_INFER_TYPES = {
    "request_serializer": pb.ModelInferRequest.SerializeToString,
    "response_deserializer": pb.ModelStreamInferResponse.FromString,
}


def channel_options(max_message_mib: int) -> list[tuple[str, int]]:
    """Options of a gRPC channel that carries messages of so many MiB."""
    max_bytes = max_message_mib << 20
    return [
        ("grpc.max_send_message_length", max_bytes),
        ("grpc.max_receive_message_length", max_bytes),
        # Pictures of patients never take the web proxy that an environment happens to name.
        ("grpc.enable_http_proxy", 0),
        # Closing one reader closes its connection, and a new one does not inherit another's back-off.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]


_open: weakref.WeakKeyDictionary[object, Callable] = weakref.WeakKeyDictionary()
_opening = threading.Lock()


def at_exit(owner: object, close: Callable) -> None:
    """Call ``close(owner)`` before the interpreter ends, if `owner` is still there.

    A call of gRPC takes its lock as it dies. In an interpreter that ends, gRPC's threads have stopped for ever, maybe
    with that lock: no call may live so long.
    """
    with _opening:
        _open[owner] = close


@atexit.register
def _close_all() -> None:
    with _opening:
        owners = list(_open.items())
    for owner, close in owners:
        close(owner)
