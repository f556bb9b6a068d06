"""Read, render and resize one untrusted image at a time in a child process that may be killed.

The child gets file bytes over a pipe and gives back the resized 8-bit picture and JSON-serialisable facts. Memory and
processor time are limited by the kernel, wall-clock time by the parent. Whatever happens to the child fails one image.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from cxr_triton.errors import CODES, InternalError, InvalidImage, LimitExceeded, NotAChest
from cxr_triton.pixels.anatomy import Anatomy
from cxr_triton.pixels.limits import Limits
from cxr_triton.pixels.plausibility import VIEWS, judge
from cxr_triton.pixels.radiograph import Metadata

_HEAD = struct.Struct("<II")  # bytes of JSON, bytes of payload
_START_S = 30.0
_PIPE_BYTES = 1 << 20


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
    decode_ms, preprocess_ms : float
        Reading the file; rendering and resizing.
    """

    pixels: np.ndarray
    source_size: tuple[int, int]
    facts: dict[str, Any]
    study_date: str
    decode_ms: float
    preprocess_ms: float


class _Child:
    """A decoding process and its pipes; it is started without waiting for it."""

    def __init__(self, interpreter: str, limits: Limits):
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)]),
            # threads that reserve address space would eat up the memory limit
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
        }
        self.limits = limits
        self.is_ready = False
        self.served = 0
        self.process = subprocess.Popen(
            [interpreter, "-P", "-m", "cxr_triton.pixels.sandbox", json.dumps(asdict(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            start_new_session=True,
        )
        # they are there, because they were asked for
        self._orders, self._answers = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        os.set_blocking(self._orders.fileno(), False)

    def await_ready(self) -> None:
        """Wait until it has imported everything; raises `EOFError` or `TimeoutError` if it cannot."""
        hello, _ = self._receive(time.monotonic() + _START_S)
        if hello["python"] != list(sys.version_info[:2]):
            raise EOFError
        self.is_ready = True

    def stop(self) -> None:
        """End it, whatever it does."""
        self._orders.close()  # it ends by itself when it is idle
        try:
            self.process.wait(0.05)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._answers.close()

    def ask(self, order: bytes, data: bytes) -> tuple[dict, bytes]:
        """What it answers, and the picture's bytes; after an error it has to be replaced."""
        deadline = time.monotonic() + self.limits.time_s
        self.served += 1
        try:
            for part in (_HEAD.pack(len(order), len(data)), order, data):
                self._send(part, deadline)
            return self._receive(deadline)
        except TimeoutError:
            self.process.kill()
            raise LimitExceeded(
                f"image took more than the {self.limits.time_s:g} s allowed to decode; send a smaller or simpler file"
            ) from None
        except (EOFError, BrokenPipeError):
            status = self.process.wait()
            if -status in (signal.SIGKILL, signal.SIGXCPU):
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

    def _receive(self, deadline: float) -> tuple[dict, bytes]:
        sizes = _HEAD.unpack(self._read(_HEAD.size, deadline))
        body = self._read(sum(sizes), deadline)
        return json.loads(body[: sizes[0]]), body[sizes[0] :]

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
            "preset": preset,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "factor": factor,
            "not_a_chest": not_a_chest,
            "views": list(views),
        }
        with self._lock:
            if self._closed:
                raise InternalError("decoding process is closed")
            child, is_spent = self._ready_child(), True
            try:
                answer, pixels = child.ask(json.dumps(order).encode(), data)
                is_spent = answer["recycle"] or child.served >= self.recycle_after
            finally:
                if is_spent:
                    self._stop()
                    self._start()
        if "error" in answer:
            raise CODES[answer["error"]](answer["message"])
        return Prepared(
            np.frombuffer(pixels, np.uint8).reshape(answer["shape"]),
            tuple(answer["source_size"]),
            answer["facts"],
            answer["study_date"],
            answer["decode_ms"],
            answer["preprocess_ms"],
        )

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
            except (EOFError, TimeoutError):
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


# --------------------------------------------------------------------------------------------------------------- child


def _serve(limits: Limits) -> None:
    """Child: answer one order after another until the parent is gone."""
    source = 0
    sink = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints must not enter the protocol
    threading.Thread(target=_exit_with_parent, args=(source, os.getppid()), daemon=True).start()
    _warm_up()
    _restrict(limits)
    _reply(sink, {"python": list(sys.version_info[:2])})
    while True:
        sizes = _HEAD.unpack(_take(source, _HEAD.size))
        order, data = json.loads(_take(source, sizes[0])), _take(source, sizes[1])
        used = resource.getrusage(resource.RUSAGE_SELF)
        # JPEG 2000 decodes on two threads, each of which uses processor time
        seconds = int(used.ru_utime + used.ru_stime + 2 * limits.time_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        answer, pixels = _answer(order, data, limits)
        answer["recycle"] = answer.get("error") == LimitExceeded.code or _peak_mib() > limits.memory_mib / 2
        _reply(sink, answer, pixels)


def _answer(order: dict, data: bytes, limits: Limits) -> tuple[dict, bytes]:
    from cxr_triton.errors import CxrError

    try:
        return _prepare(order, data, limits)
    except CxrError as error:
        return {"error": error.code, "message": error.message}, b""
    except MemoryError:
        message = f"image needs more than the {limits.memory_mib} MiB allowed; send a smaller file"
        return {"error": LimitExceeded.code, "message": message}, b""
    except Exception as error:
        message = f"image cannot be read ({type(error).__name__}); the file is damaged"
        return {"error": InvalidImage.code, "message": message}, b""


_FACTS = (
    "format",
    "transfer_syntax",
    "transfer_syntax_name",
    "sop_class",
    "modality",
    "photometric",
    "bits_stored",
    "signed",
    "rows",
    "columns",
    "pixel_aspect_ratio",
    "view",
    "patient_orientation",
    "laterality",
)
"""Of `Metadata`, those that a reading reports."""


def _prepare(order: dict, data: bytes, limits: Limits) -> tuple[dict, bytes]:
    from cxr_triton.identity import identity_of
    from cxr_triton.pixels.dicom import read_image
    from cxr_triton.pixels.display import render
    from cxr_triton.pixels.image import resize, square_size, target_size

    started = time.perf_counter()
    radiograph = read_image(data, limits)
    decoded = time.perf_counter()
    picture = render(radiograph, order["preset"])
    region, doubts = _judge(radiograph.metadata, picture.pixels, order) if order["not_a_chest"] else ({}, ())
    height, width = picture.pixels.shape[:2]
    budget = {name: order[name] for name in ("min_pixels", "max_pixels", "factor")}
    size = target_size(*square_size(height, width, radiograph.metadata.pixel_aspect_ratio), **budget)
    pixels = np.ascontiguousarray(resize(picture.pixels, size))
    finished = time.perf_counter()
    metadata = radiograph.metadata
    facts = {name: getattr(metadata, name) for name in _FACTS}
    facts |= {
        "pixel_aspect_ratio": round(metadata.pixel_aspect_ratio, 4),
        "preset": picture.preset,
        "percentiles": picture.percentiles,
        "padding_share": round(picture.padding_share, 4),
        "flags": sorted({*picture.flags, *doubts}),
        "identity": identity_of(data, radiograph),
        **region,
    }
    answer = {
        "shape": list(pixels.shape),
        "source_size": [height, width],
        "facts": facts,
        "study_date": metadata.study_date,
        "decode_ms": round((decoded - started) * 1000, 3),
        "preprocess_ms": round((finished - decoded) * 1000, 3),
    }
    return answer, pixels.tobytes()


def _judge(metadata: Metadata, pixels: np.ndarray, order: dict) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Facts about the part of the body, and flags.

    Raises
    ------
    NotAChest
        Unless the order says to flag it.
    """
    found = judge(metadata.anatomy, metadata.view, pixels, order["views"])
    if found.refusal and order["not_a_chest"] == "refuse":
        raise NotAChest(
            f"image is no chest radiograph: {found.refusal}; send a chest, or see not_a_chest of the profile"
        )
    likeness = None if found.likeness is None else round(found.likeness.chest, 3)
    doubts = (*found.doubts, "not_a_chest") if found.refusal else found.doubts
    return {"region": metadata.anatomy.says, "chest_likeness": likeness}, doubts


def _warm_up() -> None:
    """Import and touch everything that an image needs, so that the first one is not slow."""
    import imagecodecs

    import cxr_triton.identity  # noqa: F401
    from cxr_triton.pixels.display import render
    from cxr_triton.pixels.image import resize
    from cxr_triton.pixels.radiograph import Metadata, Radiograph

    picture = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    render(Radiograph(picture, Metadata("dicom", 64, 64, 12)), "voi_display")
    shown = render(Radiograph(picture, Metadata("dicom", 64, 64, 12)), "mimic_jpg").pixels
    resize(shown, (28, 28))
    judge(Anatomy(), "unknown", shown)
    for name in ("dicomrle", "htj2k", "jpeg2k", "jpeg8", "jpegls", "png"):
        getattr(imagecodecs, f"{name}_decode")


def _restrict(limits: Limits) -> None:
    """No more address space than allowed, no core dump, no file growth, no gain of privileges."""
    space = limits.memory_mib * 1024**2
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _peak_mib() -> float:
    """Most resident memory of this program; `ru_maxrss` would also count what the parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _exit_with_parent(source: int, parent: int) -> None:
    """End even in the middle of a decoder when the parent closes the pipe or dies."""
    poll = select.poll()
    poll.register(source, 0)  # POLLHUP is always reported
    while not poll.poll(1000) and os.getppid() == parent:
        pass
    os._exit(0)


def _take(fd: int, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = os.readv(fd, [view])
        if not count:
            os._exit(0)
        view = view[count:]
    return bytes(data)


def _reply(fd: int, answer: dict, pixels: bytes = b"") -> None:
    text = json.dumps(answer).encode()
    view = memoryview(_HEAD.pack(len(text), len(pixels)) + text + pixels)
    while view:
        view = view[os.write(fd, view) :]


if __name__ == "__main__":
    _serve(Limits(**json.loads(sys.argv[1])))
