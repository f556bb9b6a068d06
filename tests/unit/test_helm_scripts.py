"""What runs in the chart's containers: the front door, the first reading of a server, and its drain."""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import grpc
import pytest
from fake_server import FakeServer, empty_final, failure, response
from helm_chart import CHART, VALUES, is_there, objects, one, render
from ports import free_port
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from cxr_triton.client import Reader, Tls
from cxr_triton.reading import Reading, parse

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_there(), reason="pip install '.[test]' brings Helm")]

TEXT = "<think> Lungs are clear. </think>\n<answer> No Finding </answer>"
READING = Reading.of(
    parse(TEXT, grammar="think_answer", answer="labels", labels=("No Finding",)),
    task="findings",
    prompt="Find abnormalities and support devices.",
    model={"profile": "test"},
    notice="A test double answered.",
).to_json()
DOORS = ("defaults", "door by token", "door by certificate and token, for the world")


@pytest.fixture(scope="module")
def rendered():
    """Objects by the name of the values."""
    return {name: objects(render(VALUES[name])) for name in DOORS}


@pytest.fixture
def metrics():
    """A metrics page whose streams each look takes one from."""

    class Page(BaseHTTPRequestHandler):
        left = 0

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            lines = (
                "# TYPE cxr_decoder_streams gauge",
                f"cxr_decoder_streams {Page.left}",
                'nv_inference_count{a="x"} 9',
            )
            self.wfile.write("\n".join((*lines, "")).encode())
            Page.left = max(0, Page.left - 1)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield Page, f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, CHART / "files" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_server_ends_when_its_last_reading_has(metrics, monkeypatch):
    page, url = metrics
    module, slept = loaded("drain"), []
    clock = SimpleNamespace(sleep=slept.append, monotonic=lambda: sum(slept))
    monkeypatch.setattr(module, "time", clock)
    page.left = 7
    assert module.drain(url, 10, 60) and page.left == 0
    assert slept[0] == 10 and sum(slept[1:]) == 7 + module.QUIET_LOOKS - 1
    slept.clear()
    page.left = 100
    assert not module.drain(url, 10, 60) and page.left == 40, "the limit passed"
    assert module.drain("http://127.0.0.1:1/metrics", 0, 60), "no server, no reading"


def test_pending_requests_of_every_model_count():
    page = """cxr_decoder_streams 2
# HELP nv_inference_pending_request_count waiting
nv_inference_pending_request_count{model="decoder",version="1"} 3
nv_inference_pending_request_count{model="report",version="1"} 0
nv_inference_request_success{model="decoder",version="1"} 7
"""
    assert sorted(loaded("drain").BUSY.findall(page)) == ["0", "2", "3"]


def script(name, *arguments):
    command = [sys.executable, str(CHART / "files" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def streamed(request, context):
    yield response("<think>")
    yield response("", READING, final=True)


def test_a_server_is_started_when_it_has_read():
    with FakeServer(streamed) as server:
        assert script("first_reading.py", server.url, 20).returncode == 0
        assert server.asked["max_new_tokens"] == 8 and len(server.requests) == 1
    with FakeServer(lambda *_: iter([failure("[INTERNAL] the engine broke"), empty_final()])) as server:
        done = script("first_reading.py", server.url, 20)
        assert done.returncode == 1 and "the engine broke" in done.stderr
    done = script("first_reading.py", server.url, 5)
    assert done.returncode == 1 and "not ready" in done.stderr


def certificate(folder, name):
    """An own signed tls.crt with its tls.key; the certificate as DER."""
    folder.mkdir(parents=True, exist_ok=True)
    new = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        f"/CN={name}",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]
    subprocess.run([*new, "-keyout", folder / "tls.key", "-out", folder / "new"], check=True, capture_output=True)
    (folder / "new").replace(folder / "tls.crt")
    return ssl.PEM_cert_to_DER_cert((folder / "tls.crt").read_text())


@pytest.fixture
def door(rendered, tmp_path):
    """Folder of the front door's files by the name of values, as its pod has them, on a free port."""
    if not (shutil.which("nginx", path="/usr/sbin:" + os.environ["PATH"]) and shutil.which("openssl")):
        pytest.skip("nginx or openssl is not here")

    def lay(name):
        folder = tmp_path / "front"
        own = certificate(folder / "tls", "first")
        certificate(tmp_path / "clients", "clients")
        shutil.copy(tmp_path / "clients" / "tls.crt", folder / "tls" / "ca.crt")
        for file, text in one(rendered[name], "ConfigMap", "lung-front")["data"].items():
            (folder / file).write_text(text)
        if not os.geteuid():  # nginx's worker would be another user, to whom a test's folders are closed
            conf = (folder / "nginx.conf").read_text()
            (folder / "nginx.conf").write_text(f"user root;\n{conf}")
        port = free_port()
        listen = (folder / "listen.conf").read_text()
        (folder / "listen.conf").write_text(listen.replace("8443", f"127.0.0.1:{port}"))
        (folder / "upstream.conf").write_text("server 127.0.0.1:1;")
        (tmp_path / "state").mkdir()
        return folder, tmp_path / "state", port, own

    return lay


def nginx_environment():
    return {**os.environ, "PATH": "/usr/sbin:" + os.environ["PATH"]}


@pytest.mark.parametrize("name", DOORS)
def test_nginx_takes_the_front_doors_files(door, name):
    folder, state, _, _ = door(name)
    command = ["nginx", "-t", "-p", f"{state}/", "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    done = subprocess.run(command, capture_output=True, text=True, env=nginx_environment(), check=False)
    assert done.returncode == 0, done.stderr


def served(port):
    """Certificate that the door shows; None where it shows none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as plain, context.wrap_socket(plain) as wrapped:
            return wrapped.getpeercert(binary_form=True)
    except OSError:
        return None


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    assert condition()


@contextlib.contextmanager
def running(*command):
    process = subprocess.Popen(command, env=nginx_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def test_the_front_door_takes_a_new_certificate_and_ends_in_peace(door):
    folder, state, port, own = door("defaults")
    with running("sh", folder / "run.sh", state, folder, "0", "1") as shell:
        within(60, lambda: served(port) == own)
        (folder / "tls" / "tls.key").write_text("no key")
        time.sleep(2)
        assert served(port) == own, "files that nginx does not take change nothing"
        new = certificate(folder / "tls", "second")
        within(60, lambda: served(port) == new)
        shell.send_signal(signal.SIGTERM)
        assert shell.wait(60) == 0 and served(port) is None


def called(port, folder, client=None, *, metadata=(), call="ServerReady"):
    """Status of a call through the door."""
    pem = [(client / file).read_bytes() for file in ("tls.key", "tls.crt")] if client else [None, None]
    credentials = grpc.ssl_channel_credentials((folder / "tls" / "tls.crt").read_bytes(), *pem)
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        stub = GRPCInferenceServiceStub(channel)
        request = {"ServerReady": pb.ServerReadyRequest(), "RepositoryIndex": pb.RepositoryIndexRequest()}[call]
        try:
            getattr(stub, call)(request, timeout=60, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


class OpenServer(FakeServer):
    """One that also answers a call which no client makes."""

    def RepositoryIndex(self, request, context):
        return pb.RepositoryIndexResponse()


def test_only_who_has_a_certificate_and_asks_for_readings_gets_through(door, tmp_path):
    folder, state, port, own = door("defaults")
    clients, strangers = tmp_path / "clients", tmp_path / "strangers"
    certificate(strangers, "clients")
    with OpenServer(streamed) as server:
        (folder / "upstream.conf").write_text(f"server {server.url} max_fails=0;")
        with running("sh", folder / "run.sh", state, folder, "0"):
            within(60, lambda: served(port) == own)
            assert called(port, folder, clients) is grpc.StatusCode.OK
            assert called(port, folder, clients, call="RepositoryIndex") is grpc.StatusCode.UNIMPLEMENTED
            assert called(port, folder) is grpc.StatusCode.UNAUTHENTICATED
            assert called(port, folder, strangers) is grpc.StatusCode.UNAUTHENTICATED
            tls = Tls(ca=folder / "tls" / "tls.crt", cert=clients / "tls.crt", key=clients / "tls.key")
            with Reader(f"localhost:{port}", tls=tls) as reader:
                assert reader.read(b"x").result().status == "ok"


def test_only_who_has_a_token_gets_through(door, tmp_path):
    folder, state, port, own = door("door by token")
    tokens, socket_path = tmp_path / "tokens", tmp_path / "t"
    judge = [sys.executable, folder / "tokens.py"]
    made = subprocess.run([*judge, "add", tokens, "ward"], capture_output=True, text=True, check=True)
    (folder / "tokens.conf").write_text(f"server unix:{socket_path};")
    with FakeServer(streamed) as server, running(*judge, "serve", tokens, "--socket", socket_path):
        (folder / "upstream.conf").write_text(f"server {server.url} max_fails=0;")
        with running("sh", folder / "run.sh", state, folder, "0"):
            within(60, lambda: served(port) == own and socket_path.exists())
            for token, status in ((made.stdout.strip(), "OK"), ("x" * 43, "UNAUTHENTICATED")):
                answer = called(port, folder, metadata=[("authorization", f"Bearer {token}")])
                assert answer is grpc.StatusCode[status]
            assert called(port, folder) is grpc.StatusCode.UNAUTHENTICATED


def test_a_door_whose_nginx_ends_ends_too(door):
    folder, state, _, _ = door("defaults")
    (folder / "limits.conf").write_text("unheard of;")
    command = ["sh", str(folder / "run.sh"), str(state), str(folder), "0", "1"]
    done = subprocess.run(command, env=nginx_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0 and "unknown directive" in done.stderr
