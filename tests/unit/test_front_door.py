"""deploy/front before a stand-in of Triton: who is let in, to what, how much of it, and what is written down."""

import asyncio
import datetime
import hashlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from click.testing import CliRunner
from fake_server import FakeServer, response
from fake_session import until
from front import FRONT, Authority, FrontDoor, nginx
from front_door import trespass
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from cxr_triton.cli import main
from cxr_triton.client import AsyncReader, Reader, Timeouts, Tls
from cxr_triton.client.address import leaves_machine
from cxr_triton.client.limits import Access
from cxr_triton.errors import AccessDenied, InvalidConfig, InvalidRequest, LimitExceeded, QueueFull, Unavailable
from cxr_triton.perf.load import Load, offer
from cxr_triton.perf.stages import SERVER_STAGES
from cxr_triton.reading import Reading, parse

READING = Reading.of(
    parse("<think> a </think>\n<answer> b </answer>", grammar="think_answer", answer="text"),
    task="findings",
    prompt="",
    model={"profile": "none"},
    notice="A test double answered. Research only, never for diagnosis.",
).to_json()
BENCH_READING = json.dumps(
    {
        "status": "ok",
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        "timings_ms": dict.fromkeys([*SERVER_STAGES, "total", "first_token"], 1.0),
    }
)


def answer(request, context):
    yield response("text ")
    yield response("", READING, final=True)


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """By tokens, with a limit of 1 MiB; shared by the tests that do not change it."""
    with FakeServer(answer) as server:
        limits = {"client_max_body_size": "1m"}
        with FrontDoor(tmp_path_factory.mktemp("door"), [server.url], limits=limits) as door:
            door.server = server
            yield door


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """By certificates."""
    with FakeServer(answer) as server, FrontDoor(tmp_path_factory.mktemp("locked"), [server.url], auth="mtls") as door:
        yield door


def asked(door, token=None, method="ServerReady", cert=None, ca=None):
    """Status of a call of any API."""
    pair = [file.read_bytes() for file in cert] if cert else [None, None]
    trusted = grpc.ssl_channel_credentials((ca or door.ca).cert.read_bytes(), pair[1], pair[0])
    with grpc.secure_channel(door.url, trusted) as channel:
        request = getattr(pb, "ModelInferRequest" if "Infer" in method else f"{method}Request")()
        call = getattr(GRPCInferenceServiceStub(channel), method)
        try:
            if method == "ModelStreamInfer":
                list(call(iter([request]), metadata=bearer(token), timeout=60))
            else:
                call(request, metadata=bearer(token), timeout=60)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def bearer(token):
    return [("authorization", f"Bearer {token}")] if token else []


def read(door, **options):
    options = {"tls": Tls(ca=door.ca.cert), "token_file": door.token_file, **options}
    with Reader(door.url, **options) as reader:
        return reader.read(b"picture").result()


def test_a_reading_goes_through(door):
    assert read(door).status == "ok"

    async def twin():
        async with AsyncReader(door.url, tls=Tls(ca=door.ca.cert), token_file=door.token_file) as reader:
            return await reader.read(b"picture").result(), await reader.server_info()

    assert asyncio.run(twin())[0].status == "ok"


def test_nobody_gets_through_without_a_token_that_holds(door):
    ended = door.add_token("ended", "--days", "-1")
    today = door.add_token("today", "--days", "0")
    wrong = [None, "x", "", door.token[:-1], door.token + "x", door.token.swapcase(), ended, "a" * 4000]
    before = len(door.server.requests)
    for token in wrong:
        for method in ("ServerReady", "ModelMetadata", "ModelStreamInfer"):
            assert asked(door, token, method) == grpc.StatusCode.UNAUTHENTICATED, token
    assert len(door.server.requests) == before
    assert asked(door, today) == asked(door, door.token) == grpc.StatusCode.OK
    with pytest.raises(AccessDenied, match="token or certificate"):
        read(door, token_file=None)


APIS = (
    "ModelInfer",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)
APIS += (
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "CudaSharedMemoryStatus",
    "TraceSetting",
    "LogSettings",
)


def test_of_many_calls_that_nobody_may_make_none_gets_through(tmp_path):
    """What docs/results/front-door.json counted of 10,000."""
    result = trespass(tmp_path, 320, seed=1)
    assert result["calls"] == 320 and result["got_through"] == 0
    assert set(result["ended_as"]) <= {"UNAUTHENTICATED", "UNIMPLEMENTED"} and len(result["by_kind"]) > 5


@pytest.mark.parametrize("method", APIS)
def test_no_other_api_is_behind_the_door(door, method):
    assert asked(door, door.token, method) == grpc.StatusCode.UNIMPLEMENTED


def test_what_clients_call_is_let_through():
    """The list of nginx.conf holds what the client's code calls, and nothing of what is named above."""
    lists = re.findall(r"ModelStreamInfer[|A-Za-z]*", (FRONT / "nginx.conf").read_text())
    assert len(set(lists)) == 1
    allowed = set(lists[0].split("|"))
    assert allowed >= {
        "ModelStreamInfer",
        "ModelMetadata",
        "ModelConfig",
        "ServerMetadata",
        "ServerReady",
    } and not allowed & set(APIS)


def test_other_paths_queries_methods_and_protocols_end_at_the_door(door):
    path = "/inference.GRPCInferenceService/ServerReady"
    targets = ["/", "/v2", "/metrics", "/token", "//token", f"{path}/", f"{path}x", f"{path}?PatientName=Doe"]
    for target in [*targets, "/x/../token", f"{path}/.."]:
        with grpc.secure_channel(door.url, grpc.ssl_channel_credentials(door.ca.cert.read_bytes())) as channel:
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary(target)(b"", metadata=bearer(door.token), timeout=60)
            assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED, target
    with talking(door) as plain:  # HTTP/1.1
        plain.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {door.token}\r\n\r\n".encode())
        assert b"grpc-status: 12" in plain.recv(4096)


def talking(door):
    context = ssl.create_default_context(cafile=door.ca.cert)
    host, _, port = door.url.partition(":")
    return context.wrap_socket(socket.create_connection(("127.0.0.1", int(port)), 60), server_hostname=host)


def test_tokens_come_and_go_without_a_restart(door):
    pids, kept = door.pids, door.tokens.read_text()
    second = door.add_token("second")
    assert asked(door, second) == asked(door, door.token) == grpc.StatusCode.OK
    lines = door.tokens.read_text().splitlines()
    door.tokens.write_text("\n".join(line for line in lines if not line.startswith("test ")) + "\n# none\n")
    assert asked(door, door.token) == grpc.StatusCode.UNAUTHENTICATED
    assert asked(door, second) == grpc.StatusCode.OK
    for broken in ("test not-a-digest\n", kept + "x\n", "\xff"):
        door.tokens.write_text(broken, "latin-1")
        assert asked(door, second) == asked(door, door.token) == grpc.StatusCode.UNAVAILABLE
    door.tokens.unlink()
    assert asked(door, door.token) == grpc.StatusCode.UNAVAILABLE
    door.tokens.write_text(kept)
    assert asked(door, door.token) == grpc.StatusCode.OK and door.pids == pids


def test_a_token_may_be_exchanged_under_a_running_reader(door):
    kept = door.tokens.read_text()
    with Reader(door.url, tls=Tls(ca=door.ca.cert), token_file=door.token_file) as reader:
        assert reader.read(b"x").result().status == "ok"
        new = door.add_token("new")
        door.tokens.write_text("".join(f"{line}\n" for line in door.tokens.read_text().splitlines() if "new" in line))
        with pytest.raises(AccessDenied):
            reader.read(b"x").result()
        door.token_file.write_text(new)
        assert reader.read(b"x").result().status == "ok"
    door.tokens.write_text(kept)
    door.token_file.write_text(door.token)


def test_a_judge_that_is_away_lets_nobody_in(tmp_path):
    """nginx answers for it, and an answer of nginx's own may not be taken for a yes."""
    with FakeServer(answer) as server, FrontDoor(tmp_path, [server.url]) as door:
        assert asked(door, door.token) == grpc.StatusCode.OK
        door._processes[0].terminate()
        door._processes[0].wait(60)
        for token in (None, door.token):
            for method in ("ServerReady", "ModelStreamInfer"):
                assert asked(door, token, method) == grpc.StatusCode.UNAVAILABLE
        assert not server.requests


def test_certificates(locked, tmp_path):
    good, other = locked.ca.sign("client"), Authority(tmp_path / "other")
    assert asked(locked, cert=good) == grpc.StatusCode.OK
    assert read(locked, tls=Tls(locked.ca.cert, *good), token_file=None).status == "ok"
    ended, strange = locked.ca.sign("ended", days=-1), other.sign("client")
    for cert in (None, ended, strange):
        for method in ("ServerReady", "ModelStreamInfer"):
            assert asked(locked, cert=cert, method=method) == grpc.StatusCode.UNAUTHENTICATED
    assert {line["server"] for line in locked.log() if line["grpc"] == "16"} == {""}
    with pytest.raises(Unavailable):  # the client does not know the door
        read(locked, tls=Tls(other.cert, *good), token_file=None, timeouts=Timeouts(connect_s=0.5))


def test_a_certificate_and_a_token(tmp_path):
    with FakeServer(answer) as server, FrontDoor(tmp_path, [server.url], auth="both") as door:
        cert = door.ca.sign("client")
        assert asked(door, door.token, cert=cert) == grpc.StatusCode.OK
        assert asked(door, door.token) == asked(door, None, cert=cert) == grpc.StatusCode.UNAUTHENTICATED


def test_the_doors_own_certificate_is_exchanged_under_a_reading(tmp_path):
    going, go_on = threading.Event(), threading.Event()

    def slowly(request, context):
        yield response("text ")
        going.set()
        go_on.wait(60)
        yield response("", READING, final=True)

    with FakeServer(slowly) as server, FrontDoor(tmp_path / "a", [server.url]) as door, ThreadPoolExecutor() as pool:
        reading = pool.submit(read, door)
        assert going.wait(60)
        old, door.ca = door.ca, Authority(tmp_path / "new")
        for made, name in zip(door.ca.sign("localhost"), ("tls.crt", "tls.key"), strict=True):
            (door.conf / "tls" / name).write_bytes(made.read_bytes())
        door.reload()
        exchanged = (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
        deadline = time.monotonic() + 60
        while (asked(door, door.token), asked(door, door.token, ca=old)) != exchanged:
            assert time.monotonic() < deadline  # old and new workers accept side by side for a moment
        go_on.set()
        assert reading.result(60).status == "ok"


def test_what_is_too_large_reaches_no_server(door):
    before = len(door.server.requests)
    with Reader(door.url, tls=Tls(ca=door.ca.cert), token_file=door.token_file) as reader:
        with pytest.raises(LimitExceeded, match="front door"):
            reader.read(bytes(2 << 20)).result()
    assert len(door.server.requests) == before


def test_the_slow_are_shown_out(tmp_path):
    """A body that stops coming, and a connection that never says anything; by a door where nobody else may be slow."""
    going, limits = threading.Event(), {"client_body_timeout": "1s", "client_header_timeout": "1s"}

    def requests():
        going.wait(60)
        yield from ()

    with FakeServer(answer) as server, FrontDoor(tmp_path, [server.url], limits=limits) as door:
        with grpc.secure_channel(door.url, grpc.ssl_channel_credentials(door.ca.cert.read_bytes())) as channel:
            call = GRPCInferenceServiceStub(channel).ModelStreamInfer(
                requests(), metadata=bearer(door.token), timeout=60
            )
            with pytest.raises(grpc.RpcError) as error:
                next(call)
            going.set()
            assert error.value.code() != grpc.StatusCode.DEADLINE_EXCEEDED
        host, _, port = door.url.partition(":")
        with socket.create_connection((host, int(port)), 60) as silent:
            assert silent.recv(1) == b""


def test_too_many_calls_are_refused_before_anybody_is_asked(tmp_path):
    limits = {
        "limit_req": "zone=calls burst=5 nodelay",
        "limit_req_zone": "$binary_remote_addr zone=calls:1m rate=1r/m",
    }
    with FakeServer(answer) as server, FrontDoor(tmp_path, [server.url], limits=limits) as door:
        said = [asked(door, door.token) for _ in range(12)]
        assert said.count(grpc.StatusCode.OK) <= 8 and grpc.StatusCode.RESOURCE_EXHAUSTED in said
        with pytest.raises(QueueFull, match="too many requests"):
            read(door)


def test_a_server_that_is_away_is_passed_by(tmp_path):
    with FakeServer(answer) as server, FrontDoor(tmp_path, ["127.0.0.1:9", server.url]) as door:
        assert [read(door).status for _ in range(4)] == ["ok"] * 4
    with FrontDoor(tmp_path / "none", ["127.0.0.1:9"]) as door:
        with pytest.raises(Unavailable, match="no server behind"):
            read(door, timeouts=Timeouts(connect_s=0.5))


def test_no_log_says_who_a_patient_is_or_what_a_token_is(door):
    """Whatever a client puts into path, query, header or body."""
    mark = "Doe-1957"
    trusted = grpc.ssl_channel_credentials(door.ca.cert.read_bytes())
    options = [("grpc.primary_user_agent", mark)]
    with grpc.secure_channel(door.url, trusted, options) as channel:
        stub = GRPCInferenceServiceStub(channel)
        more = [("x-patient", mark), *bearer(door.token)]
        list(stub.ModelStreamInfer(iter([pb.ModelInferRequest(model_name=mark, id=mark)]), metadata=more))
        for path in (f"/studies/{mark}", f"/inference.GRPCInferenceService/{mark}", f"/a?{mark}"):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(path)(mark.encode(), metadata=more)
        big = pb.ModelInferRequest(id=mark * (1 << 18))
        with pytest.raises(grpc.RpcError):
            list(stub.ModelStreamInfer(iter([big]), metadata=more))
        with pytest.raises(grpc.RpcError):
            stub.ServerReady(pb.ServerReadyRequest(), metadata=[("authorization", f"Bearer {mark}")])
    written = (door.folder / "access.log").read_text() + door.errors()
    assert mark not in written and door.token not in written
    assert hashlib.sha256(door.token.encode()).hexdigest() not in written
    assert {"test", ""} <= {line["who"] for line in door.log()}
    kept = [file for file in door.state.rglob("*") if file.is_file() and file.name != "nginx.pid"]
    assert kept == []


def told(door) -> list[str]:
    """The traces of readings in the log."""
    return [line["trace"] for line in door.log() if line["call"] == "ModelStreamInfer"]


@pytest.mark.parametrize("shape", ["plain", "chart"])
def test_a_trace_goes_through_and_what_is_none_is_replaced(tmp_path, shape):
    heard, trace = [], "4bf92f3577b34da6a3ce929d0e0e4736"

    def hear(request, context):
        heard.append(dict(context.invocation_metadata())["traceparent"])
        return answer(request, context)

    conf = FRONT if shape == "plain" else FRONT.parent / "helm" / "cxr-triton" / "front"
    with FakeServer(hear) as server, FrontDoor(tmp_path, [server.url], conf=conf) as door:
        given = f"00-{trace}-00f067aa0ba902b7-01"
        with Reader(door.url, tls=Tls(ca=door.ca.cert), token_file=door.token_file) as reader:
            assert reader.read(b"picture", traceparent=given).result().trace_id == trace
        wrong = [given.upper(), f"00-{'0' * 32}-00f067aa0ba902b7-01", "Doe-1957", given + "-Doe", "x" * 2000]
        trusted = grpc.ssl_channel_credentials(door.ca.cert.read_bytes())
        with grpc.secure_channel(door.url, trusted) as channel:
            call = GRPCInferenceServiceStub(channel).ModelStreamInfer
            for text in (*wrong, None):
                more = [("traceparent", text)] if text else []
                list(call(iter([pb.ModelInferRequest()]), metadata=[*bearer(door.token), *more]))
        until(lambda: len(told(door)) >= 7)  # a line comes after the answer that it is of
        log = told(door)
    form = re.compile("00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-0[01]")
    assert heard[0] == given and all(form.fullmatch(each) for each in heard) and len(set(heard)) == len(heard) == 7
    assert sorted(log) == sorted(form.fullmatch(each)[1] for each in heard)


def test_the_load_of_bench_goes_through(tmp_path):
    def answered(request, context):
        yield response("text ")
        yield response("", BENCH_READING, final=True)

    request = pb.ModelInferRequest(model_name="cxr_reader").SerializeToString()
    with FakeServer(answered) as server, FrontDoor(tmp_path, [server.url]) as door:
        for token_file, code in ((door.token_file, None), (None, "ACCESS_DENIED")):
            access = Access(Tls(ca=door.ca.cert), token_file)
            records, failure = offer(
                door.url, [request], Load("concurrency", 2), min_seconds=0, min_requests=3, access=access
            )
            assert (failure and failure.code) == code and len(records) >= 1
    with pytest.raises(InvalidRequest, match="not sent unencrypted"):
        offer(
            "192.0.2.1:1", [request], Load("concurrency", 1), min_seconds=0, min_requests=1,
            access=Access(None, door.token_file),
        )  # fmt: skip


def test_the_command_line_goes_through(door):
    options = ["--url", door.url, "--tls-ca", str(door.ca.cert), "--token-file", str(door.token_file)]
    done = CliRunner().invoke(main, ["read", "--prompt", "x", *options])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["read", "--prompt", "x", *options[:4]])
    assert done.exit_code == 1 and "ACCESS_DENIED" in done.output
    environment = {"CXR_TRITON_TOKEN_FILE": str(door.token_file)}
    assert CliRunner().invoke(main, ["read", "--prompt", "x", *options[:4]], env=environment).exit_code == 0


def test_a_token_is_never_sent_in_clear_text_off_the_machine(tmp_path):
    token = tmp_path / "token"
    token.write_text("secret")
    for url in (
        "192.0.2.1:8001",
        "dns:///reader.example:8001",
        "reader.example:8001",
        "ipv4:192.0.2.1:1",
        "[2001:db8::1]:1",
    ):
        assert leaves_machine(url)
        with pytest.raises(InvalidRequest, match="not sent unencrypted"):
            Reader(url, token_file=token)
        done = CliRunner().invoke(main, ["read", "--prompt", "x", "--url", url, "--token-file", str(token)])
        assert done.exit_code == 1 and "not sent unencrypted" in done.output
    for url in ("127.0.0.1:8001", "localhost:1", "unix:/run/x", "ipv4:127.0.0.1:1", "dns:///localhost:1", "[::1]:1"):
        assert not leaves_machine(url)
        Reader(url, token_file=token).close()
    token.write_text("two words")
    with pytest.raises(InvalidConfig, match="no token"):
        Reader("127.0.0.1:8001", token_file=token)


def test_the_gateways_file_takes_a_token_and_keeps_it_from_clear_text(tmp_path):
    from cxr_triton.client.gateway.config import load_config

    (tmp_path / "token").write_text("secret\n")
    file = tmp_path / "gateway.yaml"

    def given(read):
        text = f"storage: {tmp_path}\nfolder: {{path: {tmp_path}/in}}\nread: {{token_file: {tmp_path}/token, {read}}}\n"
        file.write_text(f"{text}destinations: [{{name: pacs, aet: PACS, host: 127.0.0.1}}]\n")
        return load_config(file)

    with pytest.raises(InvalidConfig, match=r"read\.tls: is missing"):
        given("url: 'reader.example:8443'")
    config = given("url: 'reader.example:8443', tls: {ca: ca.crt}")
    assert config.read.access == Access(Tls(ca="ca.crt"), f"{tmp_path}/token")
    assert ("read.token_file", f"{tmp_path}/token") in list(config.secret_files())
    assert config.read.access.metadata() == [("authorization", "Bearer secret")]


def test_a_file_of_tokens_holds_none_and_only_its_owner_reads_it(tmp_path):
    file = tmp_path / "tokens"
    command = [sys.executable, "-S", FRONT / "tokens.py", "add", file]
    token = subprocess.run(
        [*command, "a@b-1", "--days", "3"], check=True, capture_output=True, text=True
    ).stdout.strip()
    last = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(3)
    assert file.read_text() == f"a@b-1 {hashlib.sha256(token.encode()).hexdigest()} {last}\n"
    assert len(token) >= 43 and os.stat(file).st_mode & 0o777 == 0o600
    file.chmod(0o640)  # as its reader needs it
    subprocess.run([*command, "c-2"], check=True, capture_output=True)
    assert os.stat(file).st_mode & 0o777 == 0o640 and len(file.read_text().splitlines()) == 2
    done = subprocess.run([*command, "two words"], capture_output=True, text=True)
    assert done.returncode == 1 and "is not NAME" in done.stderr
    file.write_text("broken\n")
    assert subprocess.run([*command, "c"], capture_output=True).returncode == 1 and file.read_text() == "broken\n"


def test_nginx_takes_the_folder_as_it_is(tmp_path):
    """With the includes as they are shipped, whose server is not there."""
    with FakeServer(answer) as server:
        FrontDoor(tmp_path, [server.url])
    conf = tmp_path / "conf"
    for name in ("listen.conf", "tokens.conf"):
        (conf / name).write_text((FRONT / name).read_text())
    (conf / "upstream.conf").write_text((FRONT / "upstream.conf").read_text().replace("server:8001", "127.0.0.1:8001"))
    done = subprocess.run([nginx(), "-t", "-p", f"{tmp_path}/state/", "-c", conf / "nginx.conf"], capture_output=True)
    assert done.returncode == 0, done.stderr
