"""Starts `tritonserver` with the doors closed that readings do not need.

``python3 -m cxr_triton.triton_repo.guard tritonserver FLAG…``, and for a container's health ``… --is-ready HOST:PORT``.

A repository that is not as `package` wrote it is refused, unless ``--modified`` stands before ``tritonserver``.
Shared memory, model repository, trace and logging stay closed for everybody, statistics open with a value derived from
the server's secret. Its files are for its user alone.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping

from cxr_triton.engines.secret import SECRET, derived, secret_of
from cxr_triton.errors import CxrError
from cxr_triton.triton_repo.integrity import require_as_packaged

UMASK = 0o077
SHM_PREFIX = "triton_python_backend_shm_region_"
"""Servers newer than 2.51 let nobody register shared memory whose name begins so."""
_CLOSED = "shared-memory,model-repository,trace,logging"
_WEB = "inference,model-config"  # a page in a browser reaches HTTP, and no reading comes that way
_STATISTICS = "cxr-triton"


def statistics_header(secret: str) -> tuple[str, str]:
    """Metadata of a call that opens the statistics of a server with a secret."""
    return f"triton-grpc-protocol-{_STATISTICS}", derived(secret, "statistics").hex()


def guarded(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Environment and flags of a server.

    Raises
    ------
    InvalidConfig
        The environment's secret is too short.
    """
    secret = secret_of(environment)
    # Others on the machine may read a process's arguments, so this opens nothing: gRPC refuses a header with a capital,
    # and no header of HTTP/1, where capitals do not count, can hold a line feed.
    closed = f"Closed={secrets.token_hex(32)}\n"
    statistics = f"statistics:{_STATISTICS}={statistics_header(secret)[1]}"
    flags = [
        f"--grpc-restricted-protocol={_CLOSED}:{closed}",
        f"--grpc-restricted-protocol={statistics}",
        f"--http-restricted-api={_CLOSED},{_WEB}:{closed}",
        f"--http-restricted-api={statistics}",
    ]
    kept = {name: value for name, value in environment.items() if not name.startswith("AIP_")}  # opens Vertex's door
    return {**kept, SECRET: secret}, flags


def is_ready(address: str) -> bool:
    """Whether a server says that it and all of its models are ready."""
    import grpc
    from tritonclient.grpc.service_pb2 import ServerReadyRequest
    from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

    from cxr_triton.kserve import channel_options

    try:
        with grpc.insecure_channel(address, channel_options(1)) as channel:
            return GRPCInferenceServiceStub(channel).ServerReady(ServerReadyRequest(), timeout=2).ready
    except grpc.RpcError as error:
        error.__traceback__ = None  # it is the call, which its traceback would keep alive
        return False


def _main(arguments: list[str]) -> None:
    if arguments[0] == "--is-ready":
        sys.exit(not is_ready(arguments[1]))
    if arguments[0] == "--modified":
        arguments = arguments[1:]
    else:
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name == "--model-repository":
                require_as_packaged(value)
    environment, flags = guarded(os.environ)
    os.umask(UMASK)
    os.execvpe(arguments[0], [*arguments, *flags], environment)  # noqa: S606  # the command line's own program


if __name__ == "__main__":
    try:
        _main(sys.argv[1:])
    except (CxrError, OSError) as error:
        sys.exit(f"error: {ascii(str(error))[1:-1]}")
