"""The process that vLLM's engine runs in: started, talked to, and seen to die."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from cxr_triton.engines.runtime.remote import Listener
from cxr_triton.engines.vllm.layout import interpreter
from cxr_triton.engines.vllm.version import check_installed, installed, its_environment
from cxr_triton.errors import CxrError, DeviceUnavailable, InvalidRequest, Unavailable

log = logging.getLogger(__name__)
START_S = 900  # a large checkpoint from a slow disk, and graphs captured
STOP_S = 2
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in the process that it was started in
    "PYTHONUNBUFFERED": "1",
}
_NO_MORE = ("", "")
_DEAD = "the engine's process ended; nothing is read until the server is started again"


@dataclass
class _Request:
    listener: Listener
    unsent: tuple[dict, np.ndarray] | None
    logits: np.ndarray | None = None


class EngineProcess:
    """vLLM in a process of its own, which is gone when this one is.

    It may be made in a thread only that lives as long as the process shall.

    Parameters
    ----------
    arguments : mapping
        Of vLLM's `EngineArgs`.
    threads : int, optional
        CPU threads; all cores if None.
    adapter : mapping, optional
        ``name`` and ``path`` of the LoRA adapter that all requests are answered with.
    judges : bool
        It takes forced answers too, and gives their logits.
    on_death : callable, optional
        Called once when the process ends without being closed, on a thread of its own, after its streams heard of it.
    start_s : float
        Most seconds until it is ready.

    Attributes
    ----------
    versions : dict of str to str
        Of vLLM, torch and transformers.
    cached_tokens : int
        Of prompts, taken from earlier ones that began alike.
    pid : int

    Raises
    ------
    DeviceUnavailable
        There is no Python with vLLM, it is of another version than `version` knows, which is known before anything is
        loaded, or it does not start with what it was given; the message quotes it.
    """

    def __init__(
        self,
        arguments: Mapping[str, object],
        *,
        threads: int | None = None,
        adapter: Mapping[str, str] | None = None,
        judges: bool = False,
        on_death: Callable[[], None] | None = None,
        start_s: float = START_S,
    ):
        self._on_death = on_death
        self._lock = threading.Lock()
        self._requests: dict[str, _Request] = {}  # guarded by _lock, as the next two are
        self._closing = self._is_dead = False
        self.cached_tokens = 0
        python = interpreter()
        self.versions = installed(python)
        check_installed(python, self.versions)  # a changed interface fails with words of its own, if a 3B loads at all
        self._process, self._socket = _start(python, threads)
        self._connection = Connection(os.dup(self._socket.fileno()))
        try:
            self._send({"engine": dict(arguments), "adapter": dict(adapter or {}), "judges": judges})
            self._ready(start_s)
        except BaseException:
            self._kill()
            raise
        self._outbox: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()  # what to do, with which request
        self._writer = threading.Thread(target=self._write, name="vllm-out", daemon=True)
        self._writer.start()
        self._thread = threading.Thread(target=self._listen, name="vllm", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the engine's process, which leads a group of its own."""
        return self._process.pid

    def check(self) -> None:
        """Raise `Unavailable` when the process has ended."""
        if self._is_dead:
            raise Unavailable(_DEAD)

    def start(self, request_id: str, request: tuple[dict, np.ndarray], listener: Listener) -> None:
        """Send a request of `request.message`; its tokens go to `listener`, on the thread of this process."""
        with self._lock:
            self.check()
            self._requests[request_id] = _Request(listener, request)
            self._outbox.put(("start", request_id))

    def stop(self, request_id: str) -> None:
        """Cancel a request; the listener hears of its end. One that has ended is ignored.

        What the engine has not read of it is dropped, so that one that reads nothing does not fill the memory.
        """
        with self._lock:
            if (request := self._requests.get(request_id)) is None or self._is_dead:
                return
            if request.unsent is None:
                self._outbox.put(("stop", request_id))
            request.unsent = None

    def close(self) -> None:
        """End the process and drop what runs. May be called twice."""
        with self._lock:
            self._closing = True
            self._requests.clear()
        self._kill()
        self._outbox.put(_NO_MORE)
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._writer.join()
            self._connection.close()

    def _send(self, message: dict, rows: np.ndarray | None = None) -> None:
        try:
            has_rows = rows is not None and rows.size
            self._connection.send_bytes(json.dumps(message | ({"arrays": 1} if has_rows else {})).encode())
            if rows is not None and has_rows:
                self._connection.send_bytes(np.ascontiguousarray(rows, np.float32).view(np.uint8).ravel().data)
        except OSError:
            raise Unavailable(_DEAD) from None

    def _ready(self, start_s: float) -> None:
        said = "it ended without a word, see the log"
        try:
            if not self._connection.poll(start_s):
                raise DeviceUnavailable(f"vLLM was not ready after {start_s:g} s; see the log")
            answer = json.loads(self._connection.recv_bytes())
            if answer["op"] == "ready":
                return
            said = answer["said"]
        except (EOFError, OSError):
            pass
        raise DeviceUnavailable(f"vLLM does not start: {said}")

    def _write(self) -> None:
        """Send what is asked for: an engine that reads nothing must not hold who asks, and so all streams."""
        with contextlib.suppress(Unavailable):  # `_listen` sees the end too, and tells it
            while (item := self._outbox.get()) is not _NO_MORE:
                op, request_id = item
                if op == "stop":
                    self._send({"op": op, "id": request_id})
                elif unsent := self._take(request_id):
                    message, rows = unsent
                    self._send({"op": op, "id": request_id, **message}, rows)
                else:
                    self._tell(request_id, [], True, None)

    def _take(self, request_id: str) -> tuple[dict, np.ndarray] | None:
        """What is to be sent of a request; nothing where it was cancelled meanwhile."""
        with self._lock:
            if (request := self._requests.get(request_id)) is None:
                return None
            unsent, request.unsent = request.unsent, None
            return unsent

    def _listen(self) -> None:
        """Pass on what the process says until it ends."""
        said = ""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = json.loads(self._connection.recv_bytes())
                if message["op"] == "dead":
                    said = message["said"]
                    break
                self._hear(message)
        self._end(said)

    def _hear(self, message: dict) -> None:
        if message["op"] == "logits":
            values = np.frombuffer(self._connection.recv_bytes(), np.float32).reshape(message["shape"])
            with self._lock:
                if request := self._requests.get(message["id"]):
                    request.logits = values
            return
        if message["op"] == "refused":
            error = InvalidRequest(f"the engine refused the request: {message['said']}")
            self._tell(message["id"], [], True, error)
            return
        self.cached_tokens += message.get("cached", 0)
        for request_id, tokens, is_last in message["streams"]:
            self._tell(request_id, tokens, is_last, None)

    def _tell(self, request_id: str, tokens: list[int], is_last: bool, error: CxrError | None) -> None:
        with self._lock:
            request = (self._requests.pop if is_last else self._requests.get)(request_id, None)
        if request is None:
            return
        if isinstance(request.listener, LogitsListener):
            request.listener.logits = request.logits
        request.listener(request_id, np.array(tokens, np.int32), is_last, error)

    def _end(self, said: str) -> None:
        """All that still run fail, and whoever wants to know of it does."""
        with self._lock:
            self._is_dead, requests = True, self._requests
            self._requests, closing = {}, self._closing
        self._kill()
        if closing:
            return
        log.error("vLLM's process ended with status %s: %s", self._process.returncode, said or "no word")
        error = Unavailable(_DEAD)
        for request_id, request in requests.items():
            request.listener(request_id, np.empty(0, np.int32), True, error)
        if self._on_death:
            self._on_death()

    def _kill(self) -> None:
        """Shut the socket, at which it ends by itself, and end its group."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class LogitsListener:
    """A listener that wants the logits of a forced answer; they are there when it hears the last tokens."""

    logits: np.ndarray | None = None

    def __call__(self, request_id: str, token_ids: np.ndarray, is_last: bool, error: CxrError | None) -> None:
        """Hear of the request."""
        raise NotImplementedError


def _start(python: str, threads: int | None) -> tuple[subprocess.Popen, socket.socket]:
    ours, theirs = socket.socketpair()
    environment = its_environment() | _ENVIRONMENT
    environment["OMP_NUM_THREADS"] = str(threads or len(os.sched_getaffinity(0)))
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with theirs:
        process = subprocess.Popen(
            [python, str(Path(__file__).with_name("worker.py")), str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=2,  # to where the server's log goes
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return process, ours
