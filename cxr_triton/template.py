"""A checkpoint's chat template, compiled and rendered in a child process that may be killed: it is foreign code.

jinja2's sandbox keeps a template from Python's objects, not from looping or from filling the memory, even while it
compiles. So the kernel limits the child's memory and processor time, the parent the wall-clock time. The child opens
no file and starts no process.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import IO, Any, cast

from cxr_triton.errors import InternalError, InvalidRequest, UnsupportedCheckpoint

TIME_S = 5.0
"""Wall-clock and processor time of compiling or of rendering once."""
MEMORY_MIB = 256
MAX_CHARACTERS = 1 << 20
"""Of a template, and of what it gives: a request has a quarter of that."""
_START_S = 30.0
_HEAD = struct.Struct("<I")
_MAX_ANSWER_BYTES = 12 * MAX_CHARACTERS + 1024  # what JSON needs for characters beyond U+FFFF


class ChatTemplate:
    """A compiled chat template; its process ends with it.

    Parameters
    ----------
    source : str
        jinja2, as transformers takes it.

    Raises
    ------
    UnsupportedCheckpoint
        It does not compile, or not within the limits.
    """

    def __init__(self, source: str):
        if len(source) > MAX_CHARACTERS:
            raise UnsupportedCheckpoint(
                f"chat template: has {len(source)} characters, allowed {MAX_CHARACTERS}; restore the file"
            )
        self._source = source
        self._lock = threading.Lock()
        self._child = self._started()

    def render(self, messages: list[dict]) -> str:
        """The text of a chat, up to where the assistant's answer begins.

        Raises
        ------
        InvalidRequest
            The template refuses the messages.
        UnsupportedCheckpoint
            It fails, or takes more than `TIME_S`, `MEMORY_MIB` or `MAX_CHARACTERS`; the next call has a fresh process.
        """
        with self._lock:
            if not self._child.is_running:
                self._child = self._started()
            answer = self._child.ask(messages)
        if "refused" in answer:
            raise InvalidRequest(f"messages: the chat template refuses them: {answer['refused']}")
        return str(_taken(answer))

    def _started(self) -> _Child:
        """A child that has compiled the template."""
        child = _start()
        answer = child.ask(self._source)
        if "refused" in answer:
            child.stop()
            raise UnsupportedCheckpoint(f"chat template: does not compile: {answer['refused']}; restore the file")
        _taken(answer)
        return child


def _taken(answer: dict) -> object:
    if "failed" in answer:
        raise UnsupportedCheckpoint(f"chat template: {answer['failed']}; restore the file or take another checkpoint")
    return answer.get("done")


def _start() -> _Child:
    from cxr_triton.pixels.sandbox import interpreters

    for interpreter in interpreters():
        with contextlib.suppress(OSError):
            child = _Child(interpreter)
            if child.ask(None, _START_S).get("done") == list(sys.version_info[:2]):
                return child
            child.stop()
    raise InternalError("process of the chat template does not start: no fitting Python; reinstall cxr-triton")


class _Child:
    """A rendering process and its pipes; it is killed when it is let go."""

    def __init__(self, interpreter: str):
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [interpreter, "-P", "-m", "cxr_triton.template"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            start_new_session=True,
        )
        self.stop = weakref.finalize(self, _end, self._process)

    @property
    def is_running(self) -> bool:
        return self.stop.alive and self._process.poll() is None

    def ask(self, order: object, time_s: float | None = None) -> dict[str, Any]:
        """Its answer; one that it does not give within its limits is ``failed``, and the process is gone."""
        time_s = time_s or TIME_S
        deadline = time.monotonic() + time_s
        text = json.dumps(order).encode()
        # they are there, because they were asked for
        orders, answers = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        try:
            view = memoryview(_HEAD.pack(len(text)) + text)
            while view:  # it reads an order whole before it looks at it
                _wait(orders.fileno(), select.POLLOUT, deadline)
                view = view[os.write(orders.fileno(), view[: select.PIPE_BUF]) :]
            (size,) = _HEAD.unpack(_read(answers.fileno(), _HEAD.size, deadline))
            if size > _MAX_ANSWER_BYTES:
                raise ValueError(size)
            answer = json.loads(_read(answers.fileno(), size, deadline))
            if isinstance(answer, dict):
                return answer
            raise ValueError(answer)
        except TimeoutError:
            self.stop()
            return {"failed": f"takes more than {time_s:g} s"}
        except (EOFError, OSError, ValueError, RecursionError):
            self.stop()
            limited = -self._process.returncode in (signal.SIGKILL, signal.SIGXCPU)
            how = f"takes more than {MEMORY_MIB} MiB or {time_s:g} s" if limited else "ends its process"
            return {"failed": how}


def _end(process: subprocess.Popen) -> None:
    cast(IO[bytes], process.stdin).close()  # it ends by itself when it is idle
    try:
        process.wait(0.05)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    cast(IO[bytes], process.stdout).close()


def _wait(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise TimeoutError


def _read(fd: int, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        _wait(fd, select.POLLIN, deadline)
        part = os.read(fd, size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


# --------------------------------------------------------------------------------------------------------------- child


_WARM_UP = (
    r"{% for m in messages %}{{ ('\n\u2026' ~ m) | pprint | tojson | urlencode | e }}{% endfor %}{{ lipsum(n=1) }}",
    "{{ raise_exception('') }}",
    "{{ messages[0].a.b }}",
    "{{ 1 + 'a' }}",
    "{% for %}",
)
"""Templates that make jinja2 and Python import what they import late: when a template runs, no file can be opened."""


class _Large(Exception):
    """It gives more than allowed."""


def _serve() -> None:
    """Child: say the version, compile, then render, until the parent is gone."""
    import jinja2

    sink = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    environment = _environment()
    for source in _WARM_UP:
        with contextlib.suppress(Exception):
            environment.from_string(source).render(messages=[{}])
    _restrict()
    _take()
    _reply(sink, {"done": list(sys.version_info[:2])})
    template = None
    while True:
        order = json.loads(_take())
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + TIME_S) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        try:
            if template is None:
                template, done = environment.from_string(order), ""
            else:
                done = _rendered(template, order)
            answer: dict[str, object] = {"done": done}
        except jinja2.TemplateError as error:
            answer = {"refused": _short(error)}
        except _Large:
            answer = {"failed": f"gives more than {MAX_CHARACTERS} characters"}
        except MemoryError:
            answer = {"failed": f"takes more than {MEMORY_MIB} MiB"}
        except RecursionError:
            answer = {"failed": "calls itself too deeply"}
        except Exception as error:
            answer = {"failed": f"fails with {type(error).__name__}: {_short(error)}"}
        _reply(sink, answer)


def _environment():
    """As transformers compiles a template."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment


def _rendered(template, messages: list[dict]) -> str:
    parts, size = [], 0
    for part in template.generate(messages=messages, add_generation_prompt=True, tools=None, documents=None):
        size += len(part)
        if size > MAX_CHARACTERS:
            raise _Large
        parts.append(part)
    return "".join(parts)


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 300 else f"{text[:299]}…"


def _restrict() -> None:
    """No more address space than allowed, no core dump, no file, no process."""
    space = MEMORY_MIB << 20
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
        resource.setrlimit(kind, (0, 0))


def _take() -> bytes:
    (size,) = _HEAD.unpack(_exactly(_HEAD.size))
    return _exactly(size)


def _exactly(size: int) -> bytes:
    data = sys.stdin.buffer.read(size)
    if len(data) < size:
        os._exit(0)
    return data


def _reply(fd: int, answer: dict) -> None:
    text = json.dumps(answer).encode()
    view = memoryview(_HEAD.pack(len(text)) + text)
    while view:
        view = view[os.write(fd, view) :]


if __name__ == "__main__":
    _serve()
