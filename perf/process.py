"""What is measured, in a process of its own on cores of its own, so that its memory and its idling can be told."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cxr_triton.errors import InternalError

_ELSEWHERE = """
import json, sys, types
from multiprocessing.connection import Connection
for name, folder in json.loads(sys.argv[1]).items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from cxr_triton.perf.process import serve
pipe = Connection(int(sys.argv[2]))
serve(pipe, *pipe.recv())
"""
"""Of a Python without our packages: modules in `_BARE` are found, and what their `__init__` import is not needed."""
_BARE = ("cxr_triton", "cxr_triton.engines", "cxr_triton.export", "cxr_triton.perf", "cxr_triton.perf.peers")


def resident_bytes(field: str, processes: Iterable[int | str] = ("self",)) -> int:
    """`VmHWM` (peak), `VmRSS`, `RssAnon` or `RssFile` of processes, added up; by default of this one."""
    total = 0
    for each in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
    return total * 1024


def serve(pipe, kind, cpus, *arguments) -> None:
    """Body of a process: answer each call, a method's name and its arguments, with the result."""
    os.sched_setaffinity(0, cpus)
    try:
        told = _served(pipe, kind, *arguments)
    except Exception as error:
        # Whoever reads it need not have the library that raised it.
        is_known = type(error).__module__.partition(".")[0] in ("builtins", "cxr_triton")
        pipe.send(error if is_known else InternalError(f"{type(error).__name__}: {error}"))
    else:
        pipe.send(told)


def _served(pipe, kind, *arguments) -> dict:
    """Answer calls until one is empty; what was made is closed before anybody is told that it has ended or failed."""
    started_s = time.perf_counter()
    running = kind(*arguments)
    try:
        processes = getattr(running, "processes", lambda: ("self",))
        loaded = resident_bytes("VmRSS", processes())
        pipe.send({"load_s": time.perf_counter() - started_s, "loaded_resident_bytes": loaded})
        while call := pipe.recv():
            method, *given = call
            pipe.send(getattr(running, method)(*given))
        busy_s = time.process_time()
        time.sleep(1)
        idle = time.process_time() - busy_s
        memory = {
            f"{name}_bytes": resident_bytes(field, processes())
            for name, field in (("peak_resident", "VmHWM"), ("anonymous", "RssAnon"), ("mapped_file", "RssFile"))
        }
        return {"idle_cpu_share": idle, **memory}
    finally:
        getattr(running, "close", lambda: None)()


class _Elsewhere(subprocess.Popen):
    """A process of another Python, called as `multiprocessing.Process` is."""

    def __init__(self, python: str, pipe: Connection):
        folders = {name: importlib.import_module(name).__path__[0] for name in _BARE}
        command = [python, "-I", "-c", _ELSEWHERE, json.dumps(folders), str(pipe.fileno())]
        nothing = subprocess.DEVNULL
        super().__init__(command, stdin=nothing, stdout=nothing, pass_fds=[pipe.fileno()])

    @property
    def exitcode(self) -> int | None:
        return self.returncode

    def join(self) -> None:
        self.wait()


class Process:
    """Something with methods, made in a process of its own from a picklable `kind` and arguments.

    With `python` it runs in that interpreter, which need not have our packages: `kind` and what its module imports get
    along without them.

    Attributes
    ----------
    facts : dict
        ``load_s``, ``ready_s`` (with the start of the process) and ``loaded_resident_bytes``; after `end` memory at its
        peak and idle CPU time too.
    """

    def __init__(self, kind, cpus, *arguments, python: str | None = None):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, child = spawn.Pipe()
        began_s = time.perf_counter()
        self.process: Any
        if python is None:
            self.process = spawn.Process(target=serve, args=(child, kind, cpus, *arguments), daemon=True)
            self.process.start()
        else:
            self.process = _Elsewhere(python, child)
            self.pipe.send((kind, cpus, *arguments))
        child.close()
        try:
            self.facts = self._receive() | {"ready_s": time.perf_counter() - began_s}
        except BaseException:
            self.kill()
            raise

    def call(self, method: str, *arguments) -> Any:
        """What a method returned; raises what it raised, and `InternalError` where the process has ended."""
        self.pipe.send((method, *arguments))
        return self._receive()

    def end(self) -> dict:
        """Stop the process; gives what loading and running took."""
        self.pipe.send(())
        self.facts |= self._receive()
        self.process.join()
        return self.facts

    def kill(self) -> None:
        """Make sure that the process is gone."""
        self.process.kill()
        self.process.join()

    def _receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise InternalError(
                f"the engine's process ended with {self.process.exitcode}; -9 is the kernel's when memory runs out"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer
