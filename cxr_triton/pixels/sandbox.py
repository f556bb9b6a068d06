"""Read, render and resize one untrusted image at a time in a child process that may be killed.

The child (`sandbox_child`) gets file bytes over a socket and gives back the resized 8-bit picture and facts as JSON.
Memory and processor time are limited by the kernel, wall-clock time by the parent. The child gives its rights up before
it sees an image (`isolation`), and its answers are checked like a stranger's (`sandbox_answer`). Whatever happens to it
fails one image.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np

from cxr_triton import __version__
from cxr_triton.errors import CODES, InternalError, InvalidImage, LimitExceeded
from cxr_triton.pixels import sandbox_answer
from cxr_triton.pixels.dicom import Identity
from cxr_triton.pixels.isolation import ON
from cxr_triton.pixels.limits import Limits
from cxr_triton.pixels.plausibility import VIEWS
from cxr_triton.pixels.sandbox_child import HEAD, OUT_OF_MEMORY

OWN_INTERPRETER = "CXR_TRITON_DECODER_PYTHON"
"""Environment variable: the Python interpreter of the child, which has this version of cxr-triton installed."""
_START_S = 30.0
_PIPE_BYTES = 1 << 20
_log = logging.getLogger(__name__)
_said: set[str] = set()  # of what is missing, what was logged


_Accepted = TypeVar("_Accepted")


@dataclass(frozen=True, eq=False)
class Prepared:
    """One image, ready for `cxr_triton.pixels.image.windows`.

    Attributes
    ----------
    pixels : ndarray (height, width) or (height, width, 3) uint8
        Resized picture.
    source_size : (int, int)
        Rows and columns of the file's image.
    facts : dict
        What the reading reports about the image; JSON-serialisable. The UIDs of its `cxr_triton.identity` are the only
        patient data.
    study_date : str
        As `cxr_triton.pixels.radiograph.Metadata` has it; not among the facts, so that no server sends it.
    windows : tuple of (str, int, str)
        Kind, number and words of the further windows that it can be drawn with, as
        `cxr_triton.pixels.transforms.Offered` has them; free text, so not among the facts either.
    decode_ms, preprocess_ms : float
        Reading the file; rendering and resizing.
    """

    pixels: np.ndarray
    source_size: tuple[int, int]
    facts: dict[str, Any]
    study_date: str
    windows: tuple[tuple[str, int, str], ...]
    decode_ms: float
    preprocess_ms: float


class _Child:
    """A decoding process, the socket to it and the pipe from it; it is started without waiting for it."""

    def __init__(self, interpreter: str, limits: Limits):
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
        self._is_own = interpreter == os.environ.get(OWN_INTERPRETER)
        if not self._is_own:  # another one has packages of its own
            environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
        environment |= {
            # threads that reserve address space would eat up the memory limit
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
        }
        self.limits = limits
        self.is_ready = False
        self.isolation: dict[str, str] = {}
        self.served = 0
        self._orders, theirs = socket.socketpair()
        self._orders.setblocking(False)
        try:
            self.process = subprocess.Popen(
                [interpreter, "-P", "-m", "cxr_triton.pixels.sandbox_child", json.dumps(asdict(limits))],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                bufsize=0,
                start_new_session=True,
            )
        except OSError:
            self._orders.close()
            raise
        finally:
            theirs.close()
        self._answers = cast(IO[bytes], self.process.stdout)  # it is there, because it was asked for

    def await_ready(self) -> None:
        """Wait until it has imported everything; raises `EOFError` or `TimeoutError` if it cannot."""
        hello, _ = self._receive(time.monotonic() + _START_S, 0)
        if self._is_own:
            if hello.get("version") != __version__:
                raise InternalError(
                    f"{OWN_INTERPRETER} names an interpreter with cxr-triton {str(hello.get('version'))[:32]!r},"
                    f" this is {__version__!r}; install the same version there"
                )
        elif hello.get("python") != list(sys.version_info[:2]):
            raise EOFError
        self.is_ready = True
        self.isolation = hello["isolation"]
        missing = "; ".join(f"{name} is {state}" for name, state in self.isolation.items() if state != ON)
        if missing and missing not in _said:
            _said.add(missing)
            _log.warning("decoding processes are less isolated than they could be: %s", missing)

    def stop(self) -> None:
        """End it, whatever it does."""
        self._orders.close()  # it ends by itself when it is idle
        try:
            self.process.wait(0.05)
        except subprocess.TimeoutExpired:
            self._kill()
            self.process.wait()
        self._answers.close()

    def _kill(self) -> None:
        """End its whole session; where the kernel holds it to one process, that is itself."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def ask(self, order: dict[str, Any], data: bytes, file: int | None, most: int) -> tuple[dict, bytes]:
        """What it answers, and the picture's bytes; after an error it has to be replaced.

        `file` is an open file that it gets instead of `data`, `most` how many bytes a picture may have.
        """
        deadline = time.monotonic() + self.limits.time_s
        self.served += 1
        text = json.dumps(order).encode()
        try:
            socket.send_fds(self._orders, [HEAD.pack(len(text), len(data))], [] if file is None else [file])
            for part in (text, data):
                self._send(part, deadline)
            answer, pixels = self._receive(deadline, most)
            sandbox_answer.require_outcome(answer)
            return answer, pixels
        except sandbox_answer.Malformed:
            self._kill()
            raise InvalidImage("decoder's answer makes no sense; the file is damaged") from None
        except TimeoutError:
            self._kill()
            raise LimitExceeded(
                f"image took more than the {self.limits.time_s:g} s allowed to decode; send a smaller or simpler file"
            ) from None
        except (EOFError, BrokenPipeError, ConnectionResetError):
            status = self.process.wait()
            if status in (-signal.SIGKILL, -signal.SIGXCPU, OUT_OF_MEMORY):
                raise LimitExceeded(
                    f"image needs more than the {self.limits.memory_mib} MiB or {self.limits.time_s:g} s allowed;"
                    " send a smaller or simpler file"
                ) from None
            raise InvalidImage(f"decoder crashed (status {status}); the file is damaged") from None

    def _send(self, part: bytes, deadline: float) -> None:
        view, fd = memoryview(part), self._orders.fileno()
        while view:
            _wait(fd, select.POLLOUT, deadline)
            try:
                view = view[os.write(fd, view[:_PIPE_BYTES]) :]
            except BlockingIOError:
                continue

    def _receive(self, deadline: float, most: int) -> tuple[dict, bytes]:
        """An answer of bounded size; raises `sandbox_answer.Malformed`."""
        text_bytes, payload_bytes = HEAD.unpack(self._read(HEAD.size, deadline))
        if text_bytes > sandbox_answer.MOST_TEXT or payload_bytes > most:
            raise sandbox_answer.Malformed
        text = self._read(text_bytes, deadline)
        return sandbox_answer.parsed(text), self._read(payload_bytes, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        parts, fd = [], self._answers.fileno()
        while size:
            _wait(fd, select.POLLIN, deadline)
            parts.append(os.read(fd, min(size, _PIPE_BYTES)))
            if not parts[-1]:
                raise EOFError
            size -= len(parts[-1])
        return b"".join(parts)


class Sandbox:
    """One decoding process, started at once and replaced when it has served its time.

    Parameters
    ----------
    limits : Limits, optional
    recycle_after : int, default 500
        Images after which the process is replaced. It is also replaced after every image that came near a limit.

    Examples
    --------
    >>> with Sandbox() as sandbox:
    ...     prepared = sandbox.prepare(data, preset="mimic_jpg", min_pixels=3136, max_pixels=476 * 476)
    """

    def __init__(self, limits: Limits | None = None, recycle_after: int = 500):
        if recycle_after < 1:
            raise ValueError(f"recycle_after is {recycle_after}, has to be at least 1")
        self.limits = limits or Limits()
        self.recycle_after = recycle_after
        self._lock = threading.Lock()
        self._closed = False
        self._child: _Child | None = None
        self._interpreters = list(interpreters())
        self._start()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the current child."""
        return self._child.process.pid if self._child else None

    def close(self) -> None:
        """End the child; no process stays behind."""
        with self._lock:
            self._closed = True
            self._stop()

    def prepare(
        self,
        data: bytes,
        *,
        preset: str,
        min_pixels: int,
        max_pixels: int,
        factor: int = 28,
        not_a_chest: str | None = None,
        views: Sequence[str] = VIEWS,
        window: int | None = None,
    ) -> Prepared:
        """Read, render and resize one file.

        Parameters
        ----------
        data : bytes
            DICOM Part 10, PNG or JPEG.
        preset : str
            mimic_jpg or voi_display.
        min_pixels, max_pixels, factor : int
            Budget of the resized picture and what its sides are multiples of, see `pixels.image.target_size`.
        not_a_chest : {"refuse", "flag"}, optional
            What becomes of an image that is no chest, see `cxr_triton.pixels.plausibility`; by default nobody looks.
        views : sequence of str
            Views that are no doubt.
        window : int, optional
            Which one of its further windows, see `Prepared`, is used by voi_display; by default its first window.

        Raises
        ------
        InvalidImage
            Or one of its subclasses; `LimitExceeded` where the child ran into its memory or time limit. The next call
            finds a fresh child.
        InternalError
            The child cannot be started.
        """
        self.limits.require_file(data)
        order = {
            "do": "prepare",
            "preset": preset,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "factor": factor,
            "not_a_chest": not_a_chest,
            "views": list(views),
            "window": window,
        }
        # three channels; its sides are rounded, and up to a `factor` each
        most = 3 * (2 * max(min_pixels, max_pixels) + (200 * factor) ** 2)
        most = min(most, self.limits.memory_mib << 20)
        return self._ask(order, data, None, most, partial(_prepared, has_region=not_a_chest is not None))

    def identify(self, file: int) -> Identity:
        """Which object an open DICOM file is; see `cxr_triton.pixels.dicom.read_identity`.

        Parameters
        ----------
        file : int
            Its descriptor; the child reads it where it lies, and cannot write to it unless this one can.

        Raises
        ------
        InvalidImage
            As `read_identity` does, and as `prepare`.
        InternalError
            The child cannot be started.
        """
        size = os.fstat(file).st_size
        order = {"do": "identify", "size": size}
        return self._ask(order, b"", file, 0, lambda answer, _: sandbox_answer.identity(answer, size))

    def isolation(self) -> dict[str, str]:
        """What holds the child besides its limits: ``on``, or why it is not, by name; see `isolation.lock`."""
        with self._lock:
            self._require_open()
            return dict(self._ready_child().isolation)

    def _require_open(self) -> None:
        if self._closed:
            raise InternalError("decoding process is closed")

    def _ask(
        self,
        order: dict[str, Any],
        data: bytes,
        file: int | None,
        most: int,
        accept: Callable[[dict[str, Any], bytes], _Accepted],
    ) -> _Accepted:
        """What `accept` makes of the child's answer; the child is replaced after one that it does not accept."""
        with self._lock:
            self._require_open()
            child, is_spent = self._ready_child(), True
            try:
                answer, payload = child.ask(order, data, file, most)
                if "error" in answer:
                    is_spent = answer["recycle"] or child.served >= self.recycle_after
                    raise CODES[answer["error"]](answer["message"])
                accepted = accept(answer, payload)
                is_spent = answer["recycle"] or child.served >= self.recycle_after
                return accepted
            except sandbox_answer.Malformed:
                raise InvalidImage("decoder's answer makes no sense; the file is damaged") from None
            finally:
                if is_spent:
                    self._stop()
                    self._start()

    def _start(self) -> _Child:
        """Start a child of the likeliest interpreter that there is."""
        while self._interpreters:
            try:
                self._child = _Child(self._interpreters[0], self.limits)
                return self._child
            except OSError:
                del self._interpreters[0]
        self._interpreters = list(interpreters())
        raise InternalError("decoding process does not start: no fitting Python interpreter; reinstall cxr-triton")

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child:
            child.stop()

    def _ready_child(self) -> _Child:
        """The child, once it is ready; that of the next interpreter if it cannot be."""
        if self._child and self._child.process.poll() is not None:
            self._stop()  # somebody ended it between two images
        child = self._child or self._start()
        while not child.is_ready:
            try:
                child.await_ready()
            except (EOFError, TimeoutError, sandbox_answer.Malformed):
                self._stop()
                del self._interpreters[0]
                child = self._start()
        return child


def identify(images: Sequence[bytes]) -> list[dict[str, str]]:
    """The identity of each file, see `cxr_triton.identity`.

    Raises
    ------
    InvalidImage
        Or one of its subclasses, as `Sandbox.prepare` does.
    """
    with Sandbox() as sandbox:
        return [
            sandbox.prepare(data, preset="mimic_jpg", min_pixels=1, max_pixels=28 * 28, factor=1).facts["identity"]
            for data in images
        ]


def isolation() -> dict[str, str]:
    """What holds a decoding process here besides its limits: ``on``, or why it is not, by name.

    Raises
    ------
    InternalError
        None can be started.
    """
    with Sandbox() as sandbox:
        return sandbox.isolation()


def _prepared(answer: dict[str, Any], payload: bytes, has_region: bool) -> Prepared:
    sandbox_answer.require_prepared(answer, len(payload), has_region)
    return Prepared(
        np.frombuffer(payload, np.uint8).reshape(answer["shape"]),
        tuple(answer["source_size"]),
        answer["facts"],
        answer["study_date"],
        tuple((kind, number, words) for kind, number, words in answer["windows"]),
        answer["decode_ms"],
        answer["preprocess_ms"],
    )


def _wait(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise TimeoutError


def interpreters() -> Iterator[str]:
    """Python interpreters that may run the child, likeliest first.

    Inside a Triton python backend `sys.executable` is the stub or empty, so the environment's own interpreter is
    looked for; the child tells its version before it is trusted.
    """
    if own := os.environ.get(OWN_INTERPRETER):
        yield own
        return
    names = (f"python{sys.version_info[0]}.{sys.version_info[1]}", "python3", "python")
    folders = [Path(sys.prefix) / "bin"]
    # a virtual environment that the host only put on sys.path
    folders += [Path(path).parents[2] / "bin" for path in sys.path if Path(path).name == "site-packages"]
    if virtual := os.environ.get("VIRTUAL_ENV"):
        folders.append(Path(virtual) / "bin")
    folders += [Path(sys.base_prefix) / "bin", Path(sysconfig.get_config_var("BINDIR") or "/usr/bin")]
    found = [sys.executable] if Path(sys.executable or "").name.startswith("python") else []
    found += [str(folder / name) for folder in folders for name in names if os.access(folder / name, os.X_OK)]
    found += [path for name in names if (path := shutil.which(name))]
    yield from dict.fromkeys(found)
