"""What a stranger who reaches the ports of a real server, or another user of its machine, is refused."""

import concurrent.futures
import contextlib
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from served import Raw, radiograph
from tritonclient.grpc import service_pb2 as pb

from cxr_triton.engines.secret import SECRET, Seal
from cxr_triton.triton_repo import guard

pytestmark = pytest.mark.triton
ROOT = Path(__file__).resolve().parents[2]
SHORT = {"max_new_tokens": 12, "temperature": 2.0, "seed": 7}
GOOD = radiograph(3)
REFUSED = r"This (protocol|API) is restricted"


def private(path: Path) -> bool:
    return not path.stat().st_mode & 0o077


# ------------------------------------------------------------------------------------------------------ closed doors


def closed_calls(server) -> dict:
    segment = next(Path("/dev/shm").glob(f"{server.shm_prefix}*")).name
    override = pb.ModelRepositoryParameter(string_param='{"backend": "python", "max_batch_size": 0}')
    code = pb.ModelRepositoryParameter(bytes_param=b"import os")
    load = pb.RepositoryModelLoadRequest(model_name="mine", parameters={"config": override, "file:1/model.py": code})
    trace = pb.TraceSettingRequest(settings={"trace_file": {"value": ["/tmp/traced"]}, "trace_rate": {"value": ["1"]}})
    log = pb.LogSettingsRequest(settings={"log_verbose_level": {"uint32_param": 9}})
    register = pb.SystemSharedMemoryRegisterRequest(name="theirs", key=f"/{segment}", byte_size=64)
    return {
        "SystemSharedMemoryRegister": register,
        "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
        "SystemSharedMemoryUnregister": pb.SystemSharedMemoryUnregisterRequest(),
        "CudaSharedMemoryRegister": pb.CudaSharedMemoryRegisterRequest(name="theirs", byte_size=64),
        "CudaSharedMemoryStatus": pb.CudaSharedMemoryStatusRequest(),
        "CudaSharedMemoryUnregister": pb.CudaSharedMemoryUnregisterRequest(),
        "RepositoryIndex": pb.RepositoryIndexRequest(),
        "RepositoryModelLoad": load,
        "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(model_name="report"),
        "TraceSetting": trace,
        "LogSettings": log,
    }


def test_a_process_that_crashes_leaves_no_core_with_pictures_in_it(raw):
    """Nor one in the repository, its working directory, which would then be refused as not as it was packaged."""
    assert {resource.prlimit(pid, resource.RLIMIT_CORE) for pid in raw.server.pids} == {(0, 0)}


def test_what_no_reading_needs_is_closed_to_every_caller_of_grpc(raw):
    opens_statistics = [guard.statistics_header(raw.server.secret)]
    for name, request in closed_calls(raw.server).items():
        for metadata in ([], opens_statistics):
            with pytest.raises(grpc.RpcError, match=REFUSED):
                getattr(raw.stub, name)(request, metadata=metadata, timeout=60)
    with pytest.raises(grpc.RpcError, match=REFUSED):
        raw.stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=60)
    counted = raw.stub.ModelStatistics(pb.ModelStatisticsRequest(), metadata=opens_statistics, timeout=60)
    assert "cxr_reader" in {model.name for model in counted.model_stats}
    assert raw.read([GOOD], **SHORT)["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(
    "path",
    [
        "logging",
        "trace/setting",
        "models/cxr_reader/trace/setting",
        "repository/index",
        "repository/models/mine/load",
        "repository/models/report/unload",
        "systemsharedmemory/region/theirs/register",
        "systemsharedmemory/unregister",
        "cudasharedmemory/region/theirs/register",
        "models/stats",
        "models/vision_encoder/infer",
        "models/report/generate",
        "models/cxr_reader/generate_stream",
    ],
)
def test_a_web_page_can_post_nothing(raw, path):
    """As a browser sends it without asking the server first: plain text from elsewhere."""
    headers = {"Content-Type": "text/plain", "Origin": "https://elsewhere.example"}
    request = urllib.request.Request(
        f"http://{raw.server.http}/v2/{path}", data=b'{"log_verbose_level": 9}', method="POST", headers=headers
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 403 and re.search(REFUSED, caught.value.read().decode())


def test_health_is_told_by_http_where_it_was_asked_for(raw):
    with urllib.request.urlopen(f"http://{raw.server.http}/v2/health/ready", timeout=60) as page:
        assert page.status == 200


def arguments_of(server) -> list[str]:
    """What every user of the machine may read, see proc(5)."""
    return Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")


def test_the_secret_stands_in_no_argument(server):
    assert len(server.secret) == 64 and server.secret not in "".join(arguments_of(server))
    assert private(Path(f"/proc/{server.pid}/environ"))


def restriction(server, flag: str, api: str) -> tuple[str, str]:
    (found,) = [a for a in arguments_of(server) if a.startswith(flag) and api in a.partition("=")[2].partition(":")[0]]
    key, _, value = found.partition(":")[2].partition("=")
    return key, value


def call_by_hand(address: str, method: str, name: str, value: str) -> bytes:
    """The frames that answer a unary call of gRPC, whose metadata no library has checked."""

    def text(part: str) -> bytes:
        size = len(part)
        return (bytes([size]) if size < 127 else bytes([127, size - 127])) + part.encode()

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/inference.GRPCInferenceService/{method}",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
        f"triton-grpc-protocol-{name}": value,
    }
    block = b"".join(b"\0" + text(key) + text(value) for key, value in headers.items())
    heard = b""
    with socket.create_connection(address.split(":"), timeout=60) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block))
        connection.sendall(frame(0, 1, 1, bytes(5)))
        while not is_answered(heard) and (part := connection.recv(1 << 16)):
            heard += part
    return heard


def is_answered(heard: bytes) -> bool:
    """Whether frames of HTTP/2 hold the last one of stream 1: END_STREAM, or its reset."""
    while len(heard) >= 9:
        size, kind, flags, stream = *struct.unpack(">IBB", b"\0" + heard[:5]), struct.unpack(">I", heard[5:9])[0]
        if len(heard) < 9 + size:
            return False
        if stream == 1 and (kind == 3 or (kind in (0, 1) and flags & 1)):
            return True
        heard = heard[9 + size :]
    return False


def test_what_stands_in_the_arguments_opens_no_door_of_grpc(server):
    opens = restriction(server, "--grpc-restricted-protocol", "statistics")
    assert b"cxr_reader" in call_by_hand(server.grpc, "ModelStatistics", *opens), "the call by hand is no call"
    name, value = restriction(server, "--grpc-restricted-protocol", "model-repository")
    for tried in (name, name.lower()):
        for given in (value, value.strip()):
            assert b"cxr_reader" not in call_by_hand(server.grpc, "RepositoryIndex", tried, given)


def test_what_stands_in_the_arguments_opens_no_door_of_http(server):
    name, value = restriction(server, "--http-restricted-api", "model-repository")
    secret = value.strip()
    for line in (secret, f"{secret}\n", f"{secret}\n ", f"{secret}\r\n ", f"\r\n {secret}\r\n \r\n ", f'"{secret}\n"'):
        for tried in (name, name.lower()):
            with socket.create_connection(server.http.split(":"), timeout=60) as connection:
                head = f"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{tried}: {line}\r\n"
                connection.sendall(f"{head}Content-Length: 2\r\n\r\n{{}}".encode())
                answer = connection.recv(1 << 16)
            assert b"cxr_reader" not in answer and b" 200 " not in answer


# ------------------------------------------------------------------------------------------------- files and sockets


def test_memory_and_log_are_for_the_servers_user_alone(server):
    segments = list(Path("/dev/shm").glob(f"{server.shm_prefix}*"))
    assert segments and all(private(segment) for segment in segments)
    assert private(server.log)
    assert server.shm_prefix.startswith("triton_python_backend_shm_region_")  # newer servers refuse to register it


def test_only_readings_and_metrics_listen_and_only_on_loopback(served_bundle, tmp_path, monkeypatch):
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    monkeypatch.setenv("AIP_MODE", "PREDICTION")  # opens Vertex AI's port
    monkeypatch.setenv(SECRET, "of the operator's own choice, and long")
    settings = Settings(threads=1, slots=1, preprocess_instances=1)
    write_repository(served_bundle, tmp_path / "repository", settings, unverified=True)
    (tmp_path / "repository.log").write_text("of an older server")
    with Server(tmp_path / "repository", grpc_port=0, metrics_port=0) as server:
        assert server.http is None and server.secret == os.environ[SECRET]
        sockets = psutil.Process(server.pid).net_connections()
        listening = {f"{s.laddr.ip.removeprefix('::ffff:')}:{s.laddr.port}" for s in sockets if s.status == "LISTEN"}
        assert listening == {server.grpc, server.metrics}
        assert private(server.log)


# ------------------------------------------------------------------------------------------------------ inner models


def arrays(message) -> dict[str, np.ndarray | bytes]:
    """Outputs of a response; its error as ``RuntimeError``."""
    if message.error_message:
        raise RuntimeError(message.error_message)
    kinds = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32, "UINT8": np.uint8, "BOOL": bool}
    response = message.infer_response
    return {
        output.name: raw[4:]
        if output.datatype == "BYTES"
        else np.frombuffer(raw, kinds[output.datatype]).reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def prepared(raw, image: bytes, **asked) -> dict:
    (message,) = raw.infer("dicom_preprocess", IMAGES=image, REQUEST=json.dumps({**SHORT, **asked}).encode())
    return arrays(message)


PATCHES = ("PIXEL_WINDOWS", "PATCH_ROWS_COLS", "VALID", "MERGE_ORDER")
PROMPT = ("INPUT_IDS", "IMAGE_INDEX", "POSITION_IDS")


def embeddings(raw, step: dict) -> np.ndarray:
    (message,) = raw.infer("vision_encoder", **{name: step[name] for name in PATCHES})
    return arrays(message)["IMAGE_EMBEDDINGS"]


def decoded(raw, step: dict, seen: np.ndarray) -> str:
    """The last COMPLETION of `decoder`."""
    inputs = {name: step[name] for name in (*PROMPT, "CONTEXT")}
    return [arrays(m)["COMPLETION"].decode() for m in raw.infer("decoder", **inputs, IMAGE_EMBEDDINGS=seen)][-1]


def reported(raw, completion: bytes) -> str:
    (message,) = raw.infer("report", TEXT=b"", STREAM=b"", COMPLETION=completion)
    return arrays(message)["READING"].decode()


def test_facts_of_one_request_go_with_no_other(raw):
    """CONTEXT has an image's identity and flags: it opens once, with its own prompt, as it was written."""
    theirs, mine = prepared(raw, GOOD), prepared(raw, radiograph(4, rows=160, columns=300), prompt="Mine.")
    seen = embeddings(raw, theirs)
    for changed in (
        {**mine, "CONTEXT": theirs["CONTEXT"]},
        {**theirs, "CONTEXT": theirs["CONTEXT"].replace(b'"rows": 240', b'"rows": 241')},
        {**theirs, "CONTEXT": theirs["CONTEXT"][116:]},
        {**theirs, "POSITION_IDS": theirs["POSITION_IDS"] + 1},
    ):
        assert "[INVALID_REQUEST] CONTEXT and what belongs to it" in decoded(raw, changed, seen)
    completion = decoded(raw, theirs, seen)
    assert json.loads(reported(raw, completion.encode()))["usage"]["completion_tokens"] == 12
    assert "[INVALID_REQUEST] CONTEXT was used before" in decoded(raw, theirs, seen)


def test_report_believes_the_decoder_alone(raw):
    step = prepared(raw, GOOD)
    completion = decoded(raw, step, embeddings(raw, step))
    body = json.loads(completion[116:])
    forged = json.dumps({**body, "text": "No finding."})
    other = Seal("COMPLETION", "another server's secret, as long").close(forged)
    error = json.dumps({"error": "[INTERNAL] Call 555."})
    for wrong in (forged, completion[:116] + forged, other, step["CONTEXT"].decode(), error, "{}", "é" * 200):
        with pytest.raises(RuntimeError, match=r"\[INVALID_REQUEST\] COMPLETION"):
            reported(raw, wrong.encode())


def test_no_stream_is_stopped_by_a_guess(raw):
    call = raw.call([GOOD], max_new_tokens=600)
    next(call)
    assert raw.metric("cxr_decoder_streams") == 1
    for guess in (b"", b"s", b"1", b"s" + b"0" * 32):
        list(raw.infer("decoder", STOP=guess))
        with pytest.raises(RuntimeError):
            reported(raw, b"{}")
    *_, last = call
    assert json.loads(arrays(last)["READING"])["usage"]["completion_tokens"] == 600


def test_what_a_stranger_gives_the_vision_encoder_harms_no_reading(raw):
    """Refused where it points out of its own image; and what shares a batch with it is encoded all the same."""
    step = prepared(raw, GOOD)
    right = embeddings(raw, step)
    bad = [{**step, "MERGE_ORDER": step["MERGE_ORDER"] + by} for by in (-(2**20), 2**20)]
    bad.append({**step, "VALID": np.zeros_like(step["VALID"])})
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            good = [pool.submit(embeddings, raw, step) for _ in range(4)]
            wrong = [pool.submit(embeddings, raw, each) for each in bad]
            for asked in wrong:
                with pytest.raises(RuntimeError, match=r"\[INVALID_REQUEST\] MERGE_ORDER"):
                    asked.result()
            for asked in good:
                np.testing.assert_allclose(asked.result(), right, atol=1e-4)


# ------------------------------------------------------------------------------------------------- started by hand


@contextlib.contextmanager
def by_hand(repository: Path, *launcher: str, environment: dict[str, str]):
    """Triton on a repository as an operator starts it, and what it says, until the block ends."""
    from cxr_triton.triton_repo.serve import _clear, _port, installation

    binary, stub, libraries = installation()
    backends, log, prefix = repository.parent / "backends", repository.parent / "log", f"by_hand_{os.getpid()}_"
    (backends / "python").mkdir(parents=True)
    for file in (*(binary.parent.parent / "backends" / "python").glob("*.*"), stub):
        (backends / "python" / file.name).symlink_to(file)
    port = _port("grpc", 0)
    command = [*launcher, str(binary), f"--model-repository={repository}", f"--backend-directory={backends}"]
    command += [f"--backend-config=python,shm-region-prefix-name={prefix}", "--allow-http=false"]
    command += ["--grpc-address=127.0.0.1", f"--grpc-port={port}", "--allow-metrics=false", "--exit-timeout-secs=3"]
    environment = {
        **{name: value for name, value in os.environ.items() if name != SECRET},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, [*libraries, backends])),
        **environment,
    }
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=repository, env=environment, stdout=out, stderr=out)
    try:
        yield process, f"127.0.0.1:{port}", log
    finally:
        _clear(str(backends), prefix)
        process.wait()


@pytest.fixture
def small_repository(served_bundle, tmp_path):
    from cxr_triton.triton_repo.package import Settings, write_repository

    settings = Settings(threads=1, slots=1, preprocess_instances=1)
    write_repository(served_bundle, tmp_path / "repository", settings, unverified=True)
    return tmp_path / "repository"


def test_a_server_started_by_hand_without_a_secret_does_not_start_and_says_how(small_repository):
    with by_hand(small_repository, environment={}) as (process, _, log):
        assert process.wait(60) not in (0, -signal.SIGKILL)
        said = log.read_text()
    assert f"no {SECRET} in the environment" in said and "cxr_triton.triton_repo.guard tritonserver" in said


def test_a_server_started_by_hand_under_guard_reads_and_is_closed(small_repository):
    """As the container starts it, and with the container's own question whether it is ready."""
    from types import SimpleNamespace

    launcher = (sys.executable, "-m", "cxr_triton.triton_repo.guard")
    with by_hand(small_repository, *launcher, environment={}) as (process, address, log):
        check = healthcheck(address)
        deadline = time.monotonic() + 180
        while subprocess.run(check, capture_output=True, check=False).returncode:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        raw = Raw(SimpleNamespace(grpc=address))
        assert raw.read([GOOD], **SHORT)["usage"]["completion_tokens"] == 12
        with pytest.raises(grpc.RpcError, match=REFUSED):
            raw.stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=60)
        assert Path(f"/proc/{process.pid}/status").read_text().partition("Umask:\t")[2].startswith("0077")


def healthcheck(address: str) -> list[str]:
    """The HEALTHCHECK of deploy/Dockerfile, on another port."""
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    command = json.loads(re.search(r"^HEALTHCHECK .*\n\s*CMD (\[.*\])$", text, re.MULTILINE)[1])
    assert command[0] == "python3" and command[-1] == "127.0.0.1:8001"
    return [sys.executable, *command[1:-1], address]
