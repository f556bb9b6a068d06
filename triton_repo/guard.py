"""Starts `tritonserver` with the doors closed that readings do not need.

``python3 -m cxr_triton.triton_repo.guard tritonserver FLAG…``, and for a container's health ``… --is-ready HOST:PORT``.

A repository that is not as `package` wrote it is refused, unless ``--modified`` stands before ``tritonserver``.
Shared memory, model repository, trace and logging stay closed for everybody, statistics open with a value derived from
the server's secret. Its files are for its user alone, and it writes no core.

With `OTEL_EXPORTER_OTLP_ENDPOINT` in the environment the server sends spans there, unless its flags say how.

With `CXR_TRITON_DRAIN_SECONDS` in the environment it stays the server's parent: SIGTERM and SIGINT let readings under
way end for so long and refuse new ones, and another signal ends the server at once. `CXR_TRITON_DRAIN` may name the
file that says so, for ``--is-ready`` in the same environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cxr_triton.engines.secret import SECRET, derived, secret_of
from cxr_triton.errors import CxrError, InvalidConfig, InvalidRequest
from cxr_triton.files import leave_no_core
from cxr_triton.trace import ENDPOINT, traces_url
from cxr_triton.triton_repo.drain import DRAIN, drained, is_draining
from cxr_triton.triton_repo.integrity import require_as_packaged
from cxr_triton.triton_repo.occupied import occupy

UMASK = 0o077
SHM_PREFIX = "triton_python_backend_shm_region_"
"""Servers newer than 2.51 let nobody register shared memory whose name begins so."""
_CLOSED = "shared-memory,model-repository,trace,logging"
DRAIN_SECONDS = "CXR_TRITON_DRAIN_SECONDS"
_WEB = "inference,model-config"  # a page in a browser reaches HTTP, and no reading comes that way
_STATISTICS = "cxr-triton"
SERVICE = "cxr-triton-server"


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


def trace_flags(url: str | None) -> list[str]:
    """Flags with which a server sends spans of each request to a collector; none without one.

    Raises
    ------
    InvalidRequest
        `url` is no address of HTTP.
    """
    if not url:
        return []
    settings = ("mode=opentelemetry", "level=TIMESTAMPS", "rate=1")
    own = (f"url={traces_url(url)}", f"resource=service.name={SERVICE}", "bsp_schedule_delay=1000")
    return [f"--trace-config={each}" for each in (*settings, *(f"opentelemetry,{each}" for each in own))]


def trace_flags_of(environment: Mapping[str, str]) -> list[str]:
    """`trace_flags` of what the environment names; what is none is said, and costs no server."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return []
    try:
        return trace_flags(environment.get(ENDPOINT))
    except InvalidRequest as error:
        print(f"warning: {ENDPOINT}: {ascii(error.message)[1:-1]}; no span is sent", file=sys.stderr)
        return []


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


def drain_seconds(environment: Mapping[str, str]) -> float:
    """How long an environment lets readings under way end; 0 where it says nothing.

    Raises
    ------
    InvalidConfig
        It is no number of seconds.
    """
    text = environment.get(DRAIN_SECONDS) or "0"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InvalidConfig(f"{DRAIN_SECONDS} is {text!r:.40}, must be a number of seconds; leave it out for no drain")
    return value


def _metrics_of(arguments: list[str]) -> str:
    """Where a server with these flags has its metrics, from this machine."""
    given = dict(
        argument.split("=", 1) for argument in arguments if argument.startswith("--metrics-") and "=" in argument
    )
    host = given.get("--metrics-address", "127.0.0.1")
    return f"{'127.0.0.1' if host == '0.0.0.0' else host}:{given.get('--metrics-port', '8002')}"  # noqa: S104  # a match


class _Asked(BaseException):
    """A signal asked the server to end."""


def _asked(number: int, frame: object) -> None:
    raise _Asked


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _supervise(command: list[str], environment: dict[str, str], limit_s: float) -> int:
    """Run a server until it ends, and drain it when a signal asks for its end; its exit status."""
    with tempfile.TemporaryDirectory(prefix="cxr-triton-drain-") as folder:
        file = Path(environment.setdefault(DRAIN, str(Path(folder) / "draining")))
        file.unlink(missing_ok=True)
        # A session of its own: Ctrl-C of a terminal is for this process alone.
        server = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  # no thread yet
        )
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _asked)
            server.wait()
        except _Asked:
            with contextlib.suppress(_Asked):
                drained(file, _metrics_of(command), limit_s, lambda: server.poll() is None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if server.poll() is None:
            server.terminate()  # its --exit-timeout-secs limits what follows
        status = server.wait()
        file.unlink(missing_ok=True)
        return status if status >= 0 else 128 - status


def _repositories(arguments: list[str]) -> list[str]:
    """Folders that a server with these flags serves."""
    rows = (argument.partition("=") for argument in arguments)
    return [value for name, _, value in rows if name == "--model-repository"]


def _main(arguments: list[str]) -> None:
    if arguments[0] == "--is-ready":
        sys.exit(is_draining() or not is_ready(arguments[1]))
    if arguments[0] == "--modified":
        arguments = arguments[1:]
    else:
        for repository in _repositories(arguments):
            require_as_packaged(repository)
    for repository in _repositories(arguments):
        if (lock := occupy(Path(repository))) is not None:
            os.set_inheritable(lock, True)  # the server holds it
    environment, flags = guarded(os.environ)
    if not any(argument.startswith("--trace-config") for argument in arguments):
        flags += trace_flags_of(environment)
    os.umask(UMASK)
    leave_no_core()
    if limit_s := drain_seconds(environment):
        sys.exit(_supervise([*arguments, *flags], environment, limit_s))
    os.execvpe(arguments[0], [*arguments, *flags], environment)  # noqa: S606  # the command line's own program


if __name__ == "__main__":
    try:
        _main(sys.argv[1:])
    except (CxrError, OSError) as error:
        sys.exit(f"error: {ascii(str(error))[1:-1]}")
