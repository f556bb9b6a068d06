"""How servers end: nothing new is taken, what is under way ends, and a limit holds."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner

from cxr_triton.cli import main
from cxr_triton.errors import InternalError, InvalidConfig, QueueFull
from cxr_triton.triton_repo import drain, guard, serve


@pytest.fixture
def metrics(monkeypatch):
    """A page of metrics; `busy` is what is under way."""
    monkeypatch.setattr(drain, "_LOOK_S", 0.02)
    state = SimpleNamespace(busy=0, looks=0)

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            state.looks += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"cxr_decoder_streams %d\n" % state.busy)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def test_nothing_is_taken_while_the_file_is_there(tmp_path, monkeypatch):
    monkeypatch.delenv(drain.DRAIN, raising=False)
    drain.require_admission()
    monkeypatch.setenv(drain.DRAIN, str(tmp_path / "draining"))
    drain.require_admission()
    (tmp_path / "draining").touch()
    assert drain.is_draining()
    with pytest.raises(QueueFull, match="send it again in 5 s"):
        drain.require_admission()


def test_a_server_is_drained_once_it_was_found_quiet_again_and_again(tmp_path, metrics):
    file = tmp_path / "draining"
    assert drain.drained(file, metrics.url, 60) and file.exists() and metrics.looks == 4
    metrics.busy = 1
    began_s = time.monotonic()
    threading.Timer(0.2, lambda: setattr(metrics, "busy", 0)).start()
    assert drain.drained(file, metrics.url, 60) and time.monotonic() - began_s > 0.2


def test_a_step_that_runs_is_waited_for_though_no_metric_says_so(tmp_path, monkeypatch, metrics):
    file = tmp_path / "draining"
    monkeypatch.setenv(drain.DRAIN, str(file))
    with drain.in_work(), drain.in_work():
        assert not drain.drained(file, metrics.url, 0.1)
    assert drain.drained(file, metrics.url, 60)
    died = "import os; from cxr_triton.triton_repo.drain import in_work; in_work().__enter__(); os._exit(0)"
    subprocess.run([sys.executable, "-c", died], check=True)
    assert drain.drained(file, metrics.url, 60)
    monkeypatch.delenv(drain.DRAIN)
    with drain.in_work():
        assert drain.drained(file, metrics.url, 60), "of another server"


def test_the_limit_holds_and_a_dead_server_is_not_waited_for(tmp_path, metrics):
    metrics.busy = 1
    assert not drain.drained(tmp_path / "draining", metrics.url, 0.1)
    assert not drain.drained(tmp_path / "draining", metrics.url, 60, lambda: False)
    assert not drain.drained(tmp_path / "draining", "127.0.0.1:9", 0.1), "silent metrics may hide a reading"


SERVER = """
import os, signal, sys, time
def end(*args):
    print("ended", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
print("up", os.environ["CXR_TRITON_DRAIN"], flush=True)
time.sleep(60)
"""


def guarded(metrics, seconds="20", **environment):
    """A program in Triton's place under the guard; gives the process and its drain file."""
    flags = ["--metrics-address=0.0.0.0", f"--metrics-port={metrics.url.rpartition(':')[2]}"]
    command = [sys.executable, "-m", "cxr_triton.triton_repo.guard", sys.executable, "-c", SERVER, *flags]
    environment = {**os.environ, "CXR_TRITON_DRAIN_SECONDS": seconds, **environment}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    up, file = process.stdout.readline().split()
    assert up == "up"
    return process, file


def until(state, seconds=60):
    ends_s = time.monotonic() + seconds
    while not state():
        assert time.monotonic() < ends_s
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_containers_entry_lets_readings_end_and_then_its_server(metrics, number):
    metrics.busy = 1
    process, file = guarded(metrics)
    (server,) = psutil.Process(process.pid).children()
    assert resource.prlimit(server.pid, resource.RLIMIT_CORE) == (0, 0)  # pictures are in its memory
    process.send_signal(number)
    until(lambda: os.path.exists(file))
    until(lambda: metrics.looks > 2)
    assert process.poll() is None
    metrics.busy = 0
    assert process.communicate(timeout=60)[0] == "ended\n"
    assert process.returncode == 7 and not os.path.exists(file)


def test_a_second_signal_and_the_limit_end_it_with_readings_under_way(metrics):
    metrics.busy = 1
    process, file = guarded(metrics)
    process.send_signal(signal.SIGTERM)
    until(lambda: os.path.exists(file))
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "ended\n"
    process, _ = guarded(metrics, seconds="0.3")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "ended\n"


def test_no_server_outlives_its_guard(metrics):
    process, _ = guarded(metrics)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(children) as file:
        [child] = file.read().split()
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not os.path.exists(f"/proc/{child}") or _state(child) == "Z")


def _state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_an_old_file_closes_no_new_server(metrics, tmp_path):
    file = tmp_path / "draining"
    file.touch()
    process, named = guarded(metrics, CXR_TRITON_DRAIN=str(file))
    assert named == str(file) and not file.exists()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def test_one_that_is_ending_is_not_ready(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "is_ready", lambda address: True)
    monkeypatch.setenv(drain.DRAIN, str(tmp_path / "draining"))
    for status, there in ((False, False), (True, True)):
        if there:
            (tmp_path / "draining").touch()
        with pytest.raises(SystemExit) as ended:
            guard._main(["--is-ready", "127.0.0.1:8001"])
        assert ended.value.code is status


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_no_number_of_seconds_is_refused(text):
    with pytest.raises(InvalidConfig, match="CXR_TRITON_DRAIN_SECONDS"):
        guard.drain_seconds({guard.DRAIN_SECONDS: text})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A `Server` whose Triton is a process that sleeps; `warm_up` is its first reading."""
    (tmp_path / "repository" / "cxr_reader").mkdir(parents=True)
    (tmp_path / "repository" / "cxr_reader" / "config.pbtxt").touch()
    binary = tmp_path / "triton" / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\nexec sleep 60\n")
    binary.chmod(0o700)
    monkeypatch.setattr(serve, "installation", lambda: (binary, binary.with_name("stub"), []))
    monkeypatch.setattr(serve.Server, "_is_ready", lambda self: True)
    monkeypatch.setattr(serve.Server, "_warm_up", lambda self, timeout_s: self.warm_up())
    made = serve.Server(tmp_path / "repository", grpc_port=0, metrics_port=0, modified=True)
    yield made
    made.stop()


def test_a_server_may_have_readings_under_way_from_its_warm_up_to_its_stop(server):
    seen = []
    server.warm_up = lambda: seen.append(server.is_up) or 1.0
    for _ in range(2):
        assert not server.is_up
        server.start()
        assert server.is_up
        server.stop()
    assert seen == [False, False] and not server.is_up

    def fail():
        raise InternalError("no reading")

    server.warm_up = fail
    with pytest.raises(InternalError), server:
        pass
    assert not server.is_up


CRASH = "import os, sys; print('error: boost::interprocess::lock_exception', flush=True); os.abort()"


@pytest.mark.parametrize(("crashes", "is_there"), [(0, True), (2, True), (3, False)])
def test_a_server_that_crashes_while_it_loads_is_started_again(server, tmp_path, monkeypatch, crashes, is_there):
    """So does Triton 2.51 on busy cores."""
    binary, starts, said = serve.installation()[0], tmp_path / "starts", []
    binary.write_text(f"""#!/bin/sh
echo >> {starts}
[ $(wc -l < {starts}) -gt {crashes} ] || exec {sys.executable} -c "{CRASH}"
exec sleep 60
""")
    monkeypatch.setattr(serve.Server, "_is_ready", lambda self: len(starts.read_text()) > crashes)
    starts.touch()
    server.warm_up = lambda: 1.0
    if is_there:
        server.start(said.append)
        assert server.is_up
    else:
        with pytest.raises(InternalError, match="SIGABRT"):
            server.start(said.append)
    assert len(starts.read_text()) == min(crashes + 1, 3) and len(said) == len(set(said))
    assert server.log.read_text().count("lock_exception") == crashes
    assert ("lock_exception" in server.trouble()) != is_there  # what a former start said is no cause of a later trouble


def test_a_server_that_ends_by_itself_while_it_loads_is_not(server, tmp_path, monkeypatch):
    binary, starts = serve.installation()[0], tmp_path / "starts"
    binary.write_text(f"#!/bin/sh\necho >> {starts}\nexit 1\n")
    monkeypatch.setattr(serve.Server, "_is_ready", lambda self: False)
    with pytest.raises(InternalError, match="status 1"):
        server.start()
    assert len(starts.read_text()) == 1


@pytest.mark.parametrize("is_up", [False, True])
def test_only_a_server_that_is_up_is_drained_when_a_signal_ends_it(server, monkeypatch, is_up):
    """One that is starting has no readings, and nothing that would say so: a drain would take its whole limit."""
    drained = []

    def end(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(serve.Server, "drain", lambda self, limit_s: bool(drained.append(limit_s)) or True)
    monkeypatch.setattr(serve.Server, "check", end)
    server.warm_up = (lambda: 1.0) if is_up else end
    monkeypatch.setattr(serve, "Server", lambda *_, **__: server)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        result = CliRunner().invoke(main, ["serve", str(server.repository), "--drain-seconds", "7", "--modified"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert result.exit_code == 0 and "stopping on SIGTERM" in result.output
    assert drained == ([7.0] if is_up else []) and server._process.poll() is not None


def test_serve_says_how_long_it_lets_readings_end():
    assert "--drain-seconds" in CliRunner().invoke(main, ["serve", "--help"]).output
