"""A running Triton: its version and addresses, which doors are open, and how its process was started.

Every call is one that reads: nothing is loaded, registered, set or inferred.
"""

from __future__ import annotations

import contextlib
import http.client
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from cxr_triton.client.address import is_loopback
from cxr_triton.doctor.check import Case, Check, Finding, Unseen, fail, ok, refused, skipped, told, warn
from cxr_triton.doctor.listening import (
    CONNECT_S,
    beyond_loopback,
    is_taken,
    listeners,
    server_process,
)
from cxr_triton.doctor.machine import control_group_limit
from cxr_triton.errors import AccessDenied, ServerMismatch, Unavailable
from cxr_triton.triton_repo.renew import RENEW_MIB, resident_mib

if TYPE_CHECKING:
    from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

FLOOR, FLOOR_SAID = (2, 71), "2.71 (container 26.07)"
"""Least version that should face a network."""
LEAST = (2, 51)
"""Least version that was tested; on loopback only."""
CLOSED = "refused: This protocol is restricted"
STEPS = ("dicom_preprocess", "vision_encoder", "decoder", "report")
FORBIDDEN_FLAGS = {
    "model-control-mode": "none",
    # Spans of OpenTelemetry say when, and nothing of what; a trace of tensors holds the pictures.
    "trace-config": r"mode=opentelemetry|opentelemetry,.*|level=(timestamps|off)|(rate|count)=\d+",
    "log-verbose": "0|false",
    "allow-sagemaker": "false",
    "allow-vertex-ai": "false",
    "http-header-forward-pattern": "",
    "grpc-header-forward-pattern": "",
}
"""Flags that open a door or log what clients send, and the values, as a pattern, that do not."""
_GUARD = "Start it with `cxr-triton serve`, or as `python3 -m cxr_triton.triton_repo.guard tritonserver …`."
_CALL_S = 5.0
GRPC = ("grpc", "tritonclient")


def ready(case: Case) -> Iterator[Finding]:
    """A server answers at the address, is ready, and serves the reader's contract; else its port is free."""
    from cxr_triton.client.limits import Timeouts
    from cxr_triton.client.reader import Reader

    wanted = "a ready server with the model cxr_reader"
    if not is_taken(case.host, case.port):
        if case.is_asked:
            remedy = "Start one with `cxr-triton serve REPOSITORY`, or correct --url."
            yield fail(case.url, "nothing listens", wanted, remedy)
        else:
            yield ok(case.url, "free: no server runs", "free, or a server")
        return
    try:
        with Reader(case.url, timeouts=Timeouts(connect_s=_CALL_S), **vars(case.access)) as reader:
            info = reader.server_info()
    except (AccessDenied, ServerMismatch, Unavailable) as error:
        if case.is_asked:
            yield refused(case.url, error.message, wanted)
        else:
            found, _ = told(error.message)
            yield warn(case.url, f"taken: {found}", "free, or a server", "Serve with another --grpc-port.")
        return
    yield ok(case.url, f"{info.name} {info.version} serves {info.model}", wanted)


def metrics_port(case: Case) -> Iterator[Finding]:
    """The port of metrics is free while no server runs, so that one can start."""
    if listeners(case, case.port) or case.is_asked:
        return
    if found := listeners(case, 8002):
        where = ", ".join(sorted(found))
        yield warn("port 8002", f"taken on {where}", "free, for metrics", "Serve with another --metrics-port.")
    else:
        yield ok("port 8002", "free", "free, for metrics")


def version(case: Case) -> Iterator[Finding]:
    """The server's version may face the network that it faces."""
    from tritonclient.grpc import service_pb2 as pb

    with _stub(case) as stub:
        said = stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=_CALL_S, metadata=case.access.metadata()).version
    numbers = tuple(int(part) for part in said.split(".")[:2] if part.isdigit())
    outside = [] if is_loopback(case.host) else [case.host]
    outside += beyond_loopback(case, case.port) if is_loopback(case.host) else []
    if numbers < LEAST:
        yield fail(f"version of {case.url}", said, "2.51 on loopback", "Serve with `cxr-triton serve`, or a container.")
    elif numbers < FLOOR and outside:
        yield fail(
            f"version of {case.url}",
            f"{said}, reached by {', '.join(outside)}",
            f"{FLOOR_SAID}, or loopback only",
            "Bind it to 127.0.0.1 behind a proxy, or serve in the container 26.07 or later.",
        )
    else:
        yield ok(f"version of {case.url}", said, f"{FLOOR_SAID}, or loopback only")


def loopback(case: Case) -> Iterator[Finding]:
    """All ports of a server on this machine listen on loopback alone: Triton has no password."""
    process = server_process(case)
    ports = {"gRPC": case.port}
    if process:
        ports |= {"HTTP": process.http_port or 0, "metrics": process.metrics_port or 0}
    if not is_loopback(case.host):
        yield skipped("addresses that are listened on", f"{case.host} is another machine: look there")
        return
    for name, port in ports.items():
        if not listeners(case, port):
            continue
        if outside := beyond_loopback(case, port):
            yield fail(
                f"{name}, port {port}",
                f"listens on {', '.join(outside)}",
                "127.0.0.1 alone",
                f"Start it with `--{name.lower()}-address=127.0.0.1`, and put a proxy in front for other hosts.",
            )
        else:
            yield ok(f"{name}, port {port}", "listens on loopback alone", "127.0.0.1 alone")


def metrics(case: Case) -> Iterator[Finding]:
    """The port of metrics of a server elsewhere does not answer here."""
    if is_loopback(case.host):
        yield skipped("metrics from elsewhere", "the server is on this machine, see server.loopback")
    elif "nv_inference" in _page(case.host, 8002, "GET", "/metrics")[1]:
        yield fail(
            f"http://{case.host}:8002/metrics",
            "answers",
            "no answer from here",
            "Let only your monitoring reach it: it tells how many requests there were and how long they took.",
        )
    else:
        yield ok(f"http://{case.host}:8002/metrics", "no metrics for this host", "no answer from here")


def encryption(case: Case) -> Iterator[Finding]:
    """What leaves this machine for the server is encrypted."""
    if case.access.tls or is_loopback(case.host):
        yield ok(case.url, "TLS" if case.access.tls else "loopback", "TLS off this machine")
    else:
        yield fail(
            case.url,
            "clear text over a network",
            "TLS",
            "Put a proxy that ends TLS in front of the server, and give --tls-ca here and to `read`.",
        )


def closed(case: Case, *, what: str, calls: tuple[str, ...]) -> Iterator[Finding]:
    """An interface of gRPC is refused to everybody."""
    import grpc
    from tritonclient.grpc import service_pb2 as pb

    requests = {
        "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
        "CudaSharedMemoryStatus": pb.CudaSharedMemoryStatusRequest(),
        "RepositoryIndex": pb.RepositoryIndexRequest(),
        "TraceSetting": pb.TraceSettingRequest(),  # without a setting it changes none
        "LogSettings": pb.LogSettingsRequest(),
        "ModelStatistics": pb.ModelStatisticsRequest(),
    }
    open_ = []
    with _stub(case) as stub:
        for call in calls:
            try:
                getattr(stub, call)(requests[call], timeout=_CALL_S)
            except grpc.RpcError as error:
                if not _is_refusal(error):
                    open_.append(call)
                error.__traceback__ = None  # it is the call, which its traceback would keep alive
            else:
                open_.append(call)
    if open_:
        yield fail(f"{what} of {case.url}", f"{', '.join(open_)} answers", CLOSED, _GUARD)
    else:
        yield ok(f"{what} of {case.url}", "refused", CLOSED)


def inner_models(case: Case) -> Iterator[Finding]:
    """A server that other hosts reach lets them call `cxr_reader` alone."""
    import grpc
    from tritonclient.grpc import service_pb2 as pb

    if is_loopback(case.host):
        yield skipped("inner models", "the server is on this machine, where a proxy may stand in front of it")
        return
    open_ = []
    with _stub(case) as stub:
        for model in STEPS:
            try:
                stub.ModelMetadata(pb.ModelMetadataRequest(name=model), timeout=_CALL_S)
                open_.append(model)
            except grpc.RpcError as error:
                error.__traceback__ = None
    if open_:
        yield fail(
            f"inner models of {case.url}",
            f"{', '.join(open_)} answer",
            "cxr_reader alone",
            "Let the proxy pass only the model cxr_reader: the others trust who calls them.",
        )
    else:
        yield ok(f"inner models of {case.url}", "refused", "cxr_reader alone")


def web(case: Case) -> Iterator[Finding]:
    """Triton's HTTP port is off, or tells health and metadata only: a page in a browser reaches it."""
    process = server_process(case)
    port = process.http_port if process else 8000
    if not port or _page(case.host, port, "GET", "/v2")[0] != 200:
        yield ok(f"HTTP of {case.host}", "off", "off, or health and metadata only")
        return
    asked = {
        "model repository": ("POST", "/v2/repository/index"),
        "shared memory": ("GET", "/v2/systemsharedmemory/status"),
        "logging": ("GET", "/v2/logging"),
        "trace": ("GET", "/v2/trace/setting"),
        "inference": ("POST", "/v2/models/cxr_reader/infer"),
    }
    open_ = [
        what for what, (method, path) in asked.items() if _page(case.host, port, method, path)[0] not in (403, 404)
    ]
    if open_:
        yield fail(f"HTTP, port {port}", f"open: {', '.join(open_)}", "403", f"Give --allow-http=false. {_GUARD}")
    else:
        yield ok(f"HTTP, port {port}", "health and metadata only", "403 for all else")


def flags(case: Case) -> Iterator[Finding]:
    """The server was started without flags that open a door, or log what clients send."""
    process = server_process(case)
    if process is None:
        yield skipped("arguments of the server", "no tritonserver of this port is seen here")
        return
    wrong = [
        f"--{name}={value}"
        for name, harmless in FORBIDDEN_FLAGS.items()
        for value in process.values(name)
        if value and not re.fullmatch(harmless, value, re.IGNORECASE)
    ]
    if wrong:
        yield fail(
            f"arguments of process {process.pid}", ", ".join(wrong), "none of these", f"Leave them out. {_GUARD}"
        )
    else:
        yield ok(f"arguments of process {process.pid}", "none that opens a door", "none of these")


def process_user(case: Case) -> Iterator[Finding]:
    """The server runs as a user of its own, and what it writes is that user's."""
    process = server_process(case)
    status = case.read(f"proc/{process.pid}/status") if process else ""
    fields = {key: value.split() for key, _, value in (line.partition(":") for line in status.splitlines())}
    if process is None or "Uid" not in fields:
        yield skipped("user of the server", "no tritonserver of this port is seen here")
        return
    subject = f"process {process.pid}"
    if fields["Uid"][1] == "0":
        remedy = "Start it as a user of its own: who runs programs as that user can read its memory and secret."
        yield warn(f"user of {subject}", "root", "a user of its own", remedy)
    else:
        yield ok(f"user of {subject}", f"user {fields['Uid'][1]}", "a user of its own")
    umask = fields.get("Umask", [""])[0]
    if umask and int(umask, 8) & 0o077 != 0o077:
        yield warn(f"umask of {subject}", umask, "0077", _GUARD)
    elif umask:
        yield ok(f"umask of {subject}", umask, "0077")


def process_memory(case: Case) -> Iterator[Finding]:
    """The server's memory has a limit, and it has not grown beyond what a renewal would have taken back."""
    process = server_process(case)
    if process is None:
        yield skipped("memory of the server", "no tritonserver of this port is seen here")
        return
    limit = control_group_limit(case, process.pid, "memory", "memory.max", "memory.limit_in_bytes")
    subject = f"process {process.pid}"
    if limit is None:
        yield warn(
            f"limit of {subject}",
            "none",
            "a limit on memory",
            "Set MemoryMax= or mem_limit: Triton takes messages of any number and up to its own limit of size.",
        )
    else:
        yield ok(f"limit of {subject}", f"{limit / (1 << 30):.1f} GiB", "a limit on memory")
    if (holds := resident_mib(process.pid)) > 2 * RENEW_MIB:
        remedy = "Start it again in a quiet moment, or serve with `--renew-mib`: Triton 2.51 leaks what is cancelled."
        yield warn(f"memory of {subject}", f"{holds:.0f} MiB", f"{2 * RENEW_MIB} MiB", remedy)
    else:
        yield ok(f"memory of {subject}", f"{holds:.0f} MiB", f"{2 * RENEW_MIB} MiB")


def _is_refusal(error: object) -> bool:
    """Of a restricted interface, or of a proxy that knows none."""
    code, details = error.code().name, error.details() or ""  # type: ignore[attr-defined]
    refusals = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED", "NOT_FOUND")
    return "restricted" in details or code in refusals


@contextlib.contextmanager
def _stub(case: Case) -> Iterator[GRPCInferenceServiceStub]:
    """Calls of the server; raises `Unseen` where it answers none."""
    import grpc
    from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

    from cxr_triton.kserve import channel_options

    try:
        with case.access.channel(grpc, case.url, channel_options(16)) as channel:
            yield GRPCInferenceServiceStub(channel)
    except grpc.RpcError as error:
        error.__traceback__ = None  # it is the call, which its traceback would keep alive
        raise Unseen(f"{case.url} answers no call of gRPC ({error.code().name}), see server.ready") from None


def _page(host: str, port: int, method: str, path: str) -> tuple[int, str]:
    """Status and the begin of a page; 0 and nothing where none answers."""
    connection = http.client.HTTPConnection(host, port, timeout=CONNECT_S)
    try:
        connection.request(method, path, body=b"" if method == "POST" else None)
        answer = connection.getresponse()
        return answer.status, answer.read(1 << 20).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


def _row(name: str, run: Callable[[Case], Iterator[Finding]], text: str = "", *, is_grpc: bool = False) -> Check:
    """A check of a server that runs, left out where none does and none was asked for."""

    def look(case: Case) -> Iterator[Finding]:
        if is_taken(case.host, case.port):
            yield from run(case)
        elif case.is_asked:
            raise Unseen(f"nothing listens at {case.url}, see server.ready")

    look.__doc__ = text or run.__doc__
    modules = GRPC if is_grpc else ()
    return Check(id=f"server.{name}", run=look, is_connecting=True, limit_s=45, modules=modules, extra="client")


def _closed(name: str, what: str, *calls: str) -> Check:
    text = f"{what.capitalize()} by gRPC is refused to everybody."
    return _row(name, partial(closed, what=what, calls=calls), text, is_grpc=True)


CHECKS = (
    Check(id="server.ready", run=ready, is_connecting=True, limit_s=30, modules=GRPC, extra="client"),
    Check(id="server.metrics_port", run=metrics_port),
    _row("version", version, is_grpc=True),
    _row("loopback", loopback),
    _row("encryption", encryption),
    _row("metrics", metrics),
    _closed("shared_memory", "shared memory", "SystemSharedMemoryStatus", "CudaSharedMemoryStatus"),
    _closed("repository", "model repository", "RepositoryIndex"),
    _closed("trace", "trace", "TraceSetting"),
    _closed("logging", "logging", "LogSettings"),
    _closed("statistics", "statistics", "ModelStatistics"),
    _row("inner_models", inner_models, is_grpc=True),
    _row("http", web),
    _row("flags", flags),
    _row("user", process_user),
    _row("memory", process_memory),
)
