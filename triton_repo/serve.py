"""The pip-installed Triton (wheel nvidia-pytriton) run on a model repository, bound to loopback.

`Server` starts it in a session of its own, says ready only after a request went through the whole ensemble, and leaves
neither a process nor a shared-memory segment behind, whatever died before.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cxr_triton.engines import ROOMS, engine
from cxr_triton.engines.secret import SECRET
from cxr_triton.errors import CxrError, InternalError, InvalidRequest, ServerMismatch, Unavailable
from cxr_triton.extras import remedy
from cxr_triton.files import leave_no_core
from cxr_triton.triton_repo.drain import DRAIN, drained
from cxr_triton.triton_repo.guard import SHM_PREFIX, UMASK, guarded, is_ready, trace_flags, trace_flags_of
from cxr_triton.triton_repo.integrity import require_as_packaged, require_repository
from cxr_triton.triton_repo.occupied import occupy

# A decode step reads all weights; from pages of 2 MiB it does so faster. Set it for your own server too.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
HOST = "127.0.0.1"
GRPC_ADDRESS = "CXR_TRITON_GRPC"  # tells the models the server's own gRPC endpoint
SHM = Path("/dev/shm")  # noqa: S108 (of the system, in which Triton takes its own)
SHM_MIB = 128
"""Of each process of a model."""
EXIT_TIMEOUT_S = 5
STARTS = 3
"""On busy cores Triton 2.51 now and then crashes while it loads (docs/reliability.md)."""
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
_NOISE = re.compile("CudaDriverHelper|CUDA driver version|pinned")  # said on every machine without a GPU
_UNAVAILABLE = re.compile(r"^\| \w+ +\| \d+ +\| UNAVAILABLE: (?:Internal: )?(.*?)\|$", re.MULTILINE)  # table of models
_TROUBLE = re.compile(r"^E\d{4} |Error\b|error:|UNAVAILABLE|not healthy|[Ff]ailed")


class Server:
    """A Triton server on 127.0.0.1; a context manager.

    Parameters
    ----------
    repository : path
        Folder written by ``cxr-triton package``.
    grpc_port, metrics_port : int
        Ports on 127.0.0.1; 0 takes a free one.
    http_port : int, optional
        Serves health and metadata by HTTP too, which nothing here needs.
    ready_timeout_s : float
        Time from start to the end of the warm-up request.
    shm_mib : int
        Shared memory of each model process, taken at the start. It has to hold all images of a request: growth
        while requests run is suspected of taking Triton 2.51 down (docs/architecture.md).
    log : path, optional
        File that takes the log of the server and of its models, for its owner alone; ``REPOSITORY.log`` by default.
    trace_otlp : str, optional
        Collector that Triton sends spans of its models to, as ``http://127.0.0.1:4318``; without it the one that the
        environment names, if any.
    modified : bool
        Serve a repository that is not as ``cxr-triton package`` wrote it, see `integrity`.

    Attributes
    ----------
    grpc, metrics : str
        Addresses, ``127.0.0.1:PORT``.
    http : str or None
    secret : str
        Of this server's life, or that of the environment; see `cxr_triton.triton_repo.guard`.
    pid : int
        The server's process; `pids` gives it with its models' processes and their decoding children.
    starts : int
        More than one where it crashed while it loaded.
    start_s, warm_up_ms : float
        Time until Triton was ready, and the time of the first request after that.

    Raises
    ------
    Unavailable
        On start, when a port is taken, the repository is being tuned, or the server was not ready in time.
    InternalError
        On start, when the server ended or the warm-up failed; the message quotes the log.
    InvalidRequest
        The folder is no repository, or `trace_otlp` no address of HTTP.
    InvalidBundle
        On start, when the repository was changed and `modified` is false.
    ServerMismatch
        On start, when this Python cannot run the server.
    """

    def __init__(
        self,
        repository,
        *,
        grpc_port: int = 8001,
        http_port: int | None = None,
        metrics_port: int = 8002,
        ready_timeout_s: float = 300,
        shm_mib: int = SHM_MIB,
        log=None,
        modified: bool = False,
        trace_otlp: str | None = None,
    ):
        self.repository = Path(repository).resolve()
        self.ready_timeout_s = ready_timeout_s
        self.shm_mib = shm_mib
        self.modified = modified
        self.log = Path(log) if log else self.repository.with_name(self.repository.name + ".log")
        ports = {"grpc": grpc_port, "metrics": metrics_port, "http": http_port}
        self._ports = {name: _port(name, port) for name, port in ports.items() if port is not None}
        addresses = {name: f"{HOST}:{port}" for name, port in self._ports.items()}
        self.grpc, self.metrics, self.http = addresses["grpc"], addresses["metrics"], addresses.get("http")
        self.shm_prefix = f"{SHM_PREFIX}{secrets.token_hex(8)}_"
        self._environment, self._flags = guarded(os.environ)
        self._flags += trace_flags(trace_otlp) if trace_otlp else trace_flags_of(os.environ)
        self.secret = self._environment[SECRET]
        self._process: subprocess.Popen | None = None
        self._models: dict[int, str] = {}
        self._janitor: subprocess.Popen | None = None
        self._backends = ""
        self._log_from = 0  # byte at which what the latest start said begins
        self._lock: int | None = None
        self.starts = 0
        self.is_up = False  # it may have readings under way

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._started.pid

    @property
    def _started(self) -> subprocess.Popen:
        if self._process is None:
            raise InvalidRequest("the server was not started; call start()")
        return self._process

    @property
    def pids(self) -> list[int]:
        """The server and every process that it or its models started, wherever they stand in the process tree.

        Decoding children open sessions of their own and outlive a killed parent for a moment, so all are found by the
        name of this server's backend folder in their environment.
        """
        return _processes(self._backends) if self._backends else []

    def start(self, say: Callable[[str], None] = lambda what: None) -> None:
        """Start the server and wait until it reads; `say` is told what is waited for."""
        started = time.monotonic()
        require_repository(self.repository)
        self._lock = occupy(self.repository)
        if not self.modified:
            say("checking the repository")
            require_as_packaged(self.repository)
        binary, stub, libraries = installation()
        self._check_shm()
        self._backends = tempfile.mkdtemp(prefix="cxr-triton-backends-")
        # Clears up when this process is killed, which it knows by the end of its standard input.
        self._janitor = subprocess.Popen(
            [sys.executable, "-m", __name__, self._backends, self.shm_prefix],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        backend = Path(self._backends) / "python"
        backend.mkdir()
        for file in (*(binary.parent.parent / "backends" / "python").glob("*.*"), stub):
            (backend / file.name).symlink_to(file)
        environment = {
            **HUGE_PAGES,
            **self._environment,
            # The stub embeds Python and finds this environment through the first python3 on the path.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            # The last folder holds no library: it marks the processes, see `pids`.
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, [*libraries, self._backends])),
            "PYTHONUNBUFFERED": "1",
            GRPC_ADDRESS: self.grpc,
            DRAIN: str(self._draining),
        }
        environment.pop("PYTHONHOME", None)
        command = [
            str(binary),
            f"--model-repository={self.repository}",
            f"--backend-directory={self._backends}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--backend-config=python,shm-default-byte-size={self.shm_mib << 20}",
            f"--grpc-address={HOST}",
            f"--metrics-address={HOST}",
            *(f"--{name}-port={port}" for name, port in self._ports.items()),
            f"--http-address={HOST}" if self.http else "--allow-http=false",
            *self._flags,
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        ]
        self.log.write_bytes(b"")
        deadline = started + self.ready_timeout_s
        for self.starts in itertools.count(1):
            say(
                "loading the models" if self.starts == 1 else f"the server crashed while it loaded, start {self.starts}"
            )
            self._launch(command, environment)
            if self._loaded(deadline):
                break
            _end(self._backends, self.shm_prefix)
        self._models = {pid: model for pid in self.pids if (model := _model_of(pid))}
        self.start_s = time.monotonic() - started
        say("first reading")
        self.warm_up_ms = self._warm_up(max(1.0, deadline - time.monotonic()))
        self.is_up = True

    def _launch(self, command: list[str], environment: dict[str, str]) -> None:
        with self.log.open("ab") as log:
            os.fchmod(log.fileno(), 0o600)
            self._log_from = os.fstat(log.fileno()).st_size
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.repository,  # paths in config.pbtxt are relative to it
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=UMASK,
            )
        leave_no_core(self._process.pid)

    def _loaded(self, deadline: float) -> bool:
        """Wait for the models; False where the server crashed and another start may do."""
        while not self._is_ready():
            if (status := self._started.poll()) is not None:
                if -status in CRASHES and self.starts < STARTS:
                    return False
                raise InternalError(f"the server ended with {_exit_text(status)}{self.trouble()}")
            if time.monotonic() > deadline:
                crashed = f", in which it crashed {self.starts - 1} times" if self.starts > 1 else ""
                raise Unavailable(
                    f"the server was not ready after {self.ready_timeout_s:g} s{crashed}; allow more time with "
                    f"--ready-timeout-s{self.trouble()}"
                )
            time.sleep(0.05)
        return True

    @property
    def _draining(self) -> Path:
        return Path(self._backends) / "draining"

    def drain(self, limit_s: float) -> bool:
        """Take no new reading, and wait for those under way; whether all of them ended within the limit.

        New ones get QUEUE_FULL. Call `stop` after it.
        """
        started = self._started
        return drained(self._draining, self.metrics, limit_s, lambda: started.poll() is None)

    def stop(self) -> None:
        """End the server and everything it started; may be called at any time, more than once."""
        self.is_up = False
        if self._backends:
            _clear(self._backends, self.shm_prefix)
        while self._process and self._process.poll() is None:  # while a program is exchanged it has no environment
            time.sleep(0.02)
            _clear(self._backends, self.shm_prefix)
        if self._janitor and self._janitor.stdin:
            self._janitor.stdin.close()
            self._janitor.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self) -> None:
        """Raise `Unavailable` when the server or the process of a model has died.

        Triton goes on saying ready without a model's process, and fails each request that comes to it.
        """
        if (status := self._started.poll()) is not None:
            raise Unavailable(f"the server ended with {_exit_text(status)}{self.trouble()}")
        for pid, model in self._models.items():
            if not _is_marked(pid, self._backends):
                raise Unavailable(f"the process of model {model} died; start the server again{self.trouble()}")

    def trouble(self) -> str:
        """What the log says went wrong, and where the log is, ready to be appended to a message."""
        text = self.log.read_bytes()[self._log_from :].decode(errors="replace") if self.log.exists() else ""
        causes = dict.fromkeys(row[1].strip() for row in _UNAVAILABLE.finditer(text))
        if not causes:
            wrong = [line for line in text.splitlines() if _TROUBLE.search(line) and not _NOISE.search(line)]
            causes = dict.fromkeys(line.strip()[:300] for line in wrong[-3:])
        if "No space left on device" in text or "shared memory pool" in text:
            causes[f"the models exchange tensors in {SHM}: make it larger (docker run --shm-size=1g)"] = None
        for each in map(engine, ROOMS):
            if any(f"unable to find backend library for backend '{name}'" in text for name in each.backends):
                causes[f"this repository is for {each.home}"] = None
        return "".join(f"; {cause}" for cause in causes) + f"; see {self.log}"

    def _check_shm(self) -> None:
        processes = model_processes(self.repository)
        free_mib = shutil.disk_usage(SHM).free >> 20
        if free_mib < processes * self.shm_mib:
            raise ServerMismatch(
                f"{SHM} has {free_mib} MiB free, {processes} model processes of {self.shm_mib} MiB need "
                f"{processes * self.shm_mib}; make it larger (docker run --shm-size=1g) or pass a smaller --shm-mib, "
                "which has to hold all images of a request"
            )

    def _is_ready(self) -> bool:
        """The models are there; takes their memory for this user alone, since Triton ignores the umask."""
        ready = is_ready(self.grpc)
        for segment in _segments(self.shm_prefix):
            with contextlib.suppress(FileNotFoundError):  # of a model that does not load
                segment.chmod(0o600)
        return ready

    def _warm_up(self, timeout_s: float) -> float:
        """Milliseconds of a short reading through all steps; it also makes the engines allocate what they need."""
        from cxr_triton.client.limits import Timeouts
        from cxr_triton.client.reader import Reader

        started = time.monotonic()
        timeouts = Timeouts(connect_s=timeout_s, first_delta_s=timeout_s, idle_s=timeout_s, total_s=timeout_s)
        try:
            with Reader(self.grpc, timeouts=timeouts) as reader:
                reader.read(_gradient_png(), prompt="Warm up.", max_new_tokens=8).result()
        except CxrError as error:
            raise InternalError(f"the warm-up request failed: {error.wire()}{self.trouble()}") from None
        return 1e3 * (time.monotonic() - started)


def model_processes(repository: Path) -> int:
    """Processes of the Python backend that a repository's models run in."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    configs = [text_format.Parse(file.read_text(), ModelConfig()) for file in repository.glob("*/config.pbtxt")]
    return sum(group.count for config in configs for group in config.instance_group)


def _processes(backends: str) -> list[int]:
    """Processes with a backend folder in their environment."""
    return sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_marked(p.name, backends))


def _is_marked(pid: int | str, backends: str) -> bool:
    """The process runs; a zombie's environment is gone."""
    try:
        return os.fsencode(backends) in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _clear(backends: str, shm_prefix: str) -> None:
    """End all processes of a server, and remove its shared memory and its backend folder."""
    _end(backends, shm_prefix)
    shutil.rmtree(backends, ignore_errors=True)


def _end(backends: str, shm_prefix: str) -> None:
    for pid in _processes(backends):
        with contextlib.suppress(OSError):
            if _command(pid)[0].endswith("tritonserver"):
                os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + EXIT_TIMEOUT_S + 2
    # A server that died in any other way leaves models that may wait for it for ever.
    while pids := _processes(backends):
        has_server = any(_command(pid)[0].endswith("tritonserver") for pid in pids)
        if time.monotonic() > deadline or not has_server:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for segment in _segments(shm_prefix):
        segment.unlink(missing_ok=True)


def _segments(shm_prefix: str) -> list[Path]:
    """A server's shared memory."""
    return list(SHM.glob(f"{shm_prefix}*"))


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]


def _gradient_png() -> bytes:
    """A 512 x 512 gray picture that no step refuses."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.linear_gradient("L").resize((512, 512)).save(file, "PNG")
        return file.getvalue()


def _port(name: str, port: int) -> int:
    """`port` when it is free, or a free one for 0."""
    with socket.socket() as probe:
        # As the server does, so that connections of a former server in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise Unavailable(
                f"port {port} on {HOST} cannot be used ({error.strerror}); "
                f"stop what listens there or choose another with --{name}-port (0 takes a free one)"
            ) from None
        return probe.getsockname()[1]


def installation() -> tuple[Path, Path, list[Path]]:
    """Server binary, stub of this Python, and the library folders both need; `ServerMismatch` without them."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        if sys.version_info >= (3, 13):
            raise ServerMismatch(
                f"no Triton server for Python {version}: its Python backend needs numpy 1, which has no wheel there; "
                "use Python 3.11 or 3.12"
            )
        raise ServerMismatch(f"no Triton server in this Python; {remedy('local')}")
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        raise ServerMismatch(
            f"numpy {numpy_version}: this server's Python backend misreads BYTES tensors with numpy 2; "
            "install it with pip install 'numpy<2'"
        )
    root = Path(spec.origin).parent
    stub = root / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(sorted(p.name for p in stub.parent.parent.iterdir()))
        raise ServerMismatch(f"the server has no stub for Python {version}, only for {known}; use one of these")
    libpython = str(sysconfig.get_config_var("INSTSONAME"))
    folder = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    folders = [f for f in (folder, folder / (sysconfig.get_config_var("MULTIARCH") or "")) if (f / libpython).exists()]
    if not folders:
        raise ServerMismatch(
            f"no {libpython} in {folder}: the server embeds Python; "
            f"install it (Debian: apt install libpython{version}) or use a Python built with --enable-shared"
        )
    bundled = [root / "tritonserver" / "external_libs", root.parent / "nvidia_pytriton.libs"]
    return root / "tritonserver" / "bin" / "tritonserver", stub, [folders[0], *bundled]


def _model_of(pid: int) -> str | None:
    """Name of the model whose Python process this is."""
    command = _command(pid)
    return Path(command[1]).parts[-3] if command[0].endswith("_stub") else None


def _exit_text(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    _clear(*sys.argv[1:])
