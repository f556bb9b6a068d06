"""What a process gives up for good before it reads what may have been made to harm it. Linux, x86-64 and aarch64.

Landlock takes the files and the network away, and seccomp every system call that reading, computing and answering do
not need: no file is opened, no program started, no process forked, signalled or traced, no memory made executable.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Sequence

ON = "on"
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# number on x86-64 and on aarch64; None where there is no such call
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "readv": (19, 65),
    "pread64": (17, 67),
    "recvmsg": (47, 212),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "poll": (7, None),
    "ppoll": (271, 73),
    "brk": (12, 214),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "gettimeofday": (96, 169),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "exit": (60, 93),
    "exit_group": (231, 94),
}  # fmt: skip
_MMAP, _MPROTECT, _CLONE, _CLONE3 = (9, 222), (10, 226), (56, 220), (435, 435)
_TGKILL, _PRLIMIT, _FCNTL, _SECCOMP = (234, 131), (302, 261), (72, 25), (317, 277)
_PROT_EXEC, _CLONE_THREAD, _DUPLICATE = 4, 0x10000, 1030
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_SET_NO_NEW_PRIVS, _SET_MODE_FILTER, _ALL_THREADS = 38, 1, 1
_CREATE_RULESET, _RESTRICT_SELF = 444, 446


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


def lock() -> dict[str, str]:
    """Give up what an image's decoder does not need; whatever is open stays open, nothing is opened any more.

    The calling thread should be the only one: Landlock holds it and those that it starts. Modules have to be imported
    before.

    Returns
    -------
    dict of str to str
        ``no_new_privileges``, ``landlock`` and ``seccomp``, each ``on`` or why it is not; never raises.
    """
    missing = f"off: {sys.platform} has none"
    steps = {"no_new_privileges": _give_up_privileges, "landlock": _give_up_files, "seccomp": _give_up_calls}
    if not sys.platform.startswith("linux"):
        return dict.fromkeys(steps, missing)
    done = {}
    for name, step in steps.items():
        try:
            step()
            done[name] = ON
        except (OSError, AttributeError) as error:
            done[name] = f"off: {error.strerror if isinstance(error, OSError) else error}"
    return done


def _give_up_privileges() -> None:
    _require(ctypes.CDLL(None, use_errno=True).prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _give_up_files() -> None:
    """An empty Landlock rule set of everything that the kernel knows to restrict."""
    version = _call(_CREATE_RULESET, None, 0, 1)
    files = 13 + sum(version >= since for since in (2, 3, 5))  # rights
    rules = _Ruleset((1 << files) - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    handle = _call(_CREATE_RULESET, ctypes.byref(rules), size, 0)
    try:
        _call(_RESTRICT_SELF, handle, 0)
    finally:
        os.close(handle)


def _give_up_calls() -> None:
    """A seccomp filter; what it does not allow fails with EPERM."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    column = list(_ARCHITECTURES).index(machine)
    steps = _filter(_ARCHITECTURES[machine], column, os.getpid())
    instructions = (_Instruction * len(steps))(*(_Instruction(*step) for step in steps))
    program = _Program(len(steps), instructions)
    failed = _call(_SECCOMP[column], _SET_MODE_FILTER, _ALL_THREADS, ctypes.byref(program))
    if failed:
        raise OSError(errno.EBUSY, f"thread {failed} cannot be held")


def _filter(architecture: int, column: int, pid: int) -> list[tuple[int, int, int, int]]:
    """Instructions of the filter as code, jump if so, jump if not, operand."""
    refuse, allow = (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]

    def on(numbers: Sequence[int | None], *then: tuple[int, int, int, int]) -> None:
        number = numbers[column]
        if number is not None:
            steps.extend([(_EQUAL, 0, len(then), number), *then])

    def where(argument: int, test: int, operand: int, is_good: bool) -> tuple[tuple[int, int, int, int], ...]:
        return (
            (_LOAD, 0, 0, 16 + 8 * argument),  # the lower half; the upper ones say nothing of these arguments
            (test, 0 if is_good else 1, 1 if is_good else 0, operand),
            allow,
            refuse,
        )

    for numbers in _ALLOWED.values():
        on(numbers, allow)
    for numbers in (_MMAP, _MPROTECT):
        on(numbers, *where(2, _ANY_BIT, _PROT_EXEC, False))
    on(_CLONE, *where(0, _ANY_BIT, _CLONE_THREAD, True))
    on(_CLONE3, (_RETURN, 0, 0, _ERRNO | errno.ENOSYS))  # its flags cannot be seen; libc goes on to `clone`
    on(_TGKILL, *where(0, _EQUAL, pid, True))  # `abort`
    on(_FCNTL, *where(1, _EQUAL, _DUPLICATE, True))  # `mmap` keeps a descriptor of its own
    on(_PRLIMIT, *where(0, _EQUAL, 0, True))
    return [*steps, refuse]


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    whole = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _require(libc.syscall(ctypes.c_long(number), *whole))


def _require(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
