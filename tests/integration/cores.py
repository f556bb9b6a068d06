"""Cores of their own for a server and for what measures it, on one machine: neither takes the other's time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import click


class Cores(click.ParamType):
    """Numbers of cores, such as ``0,2``."""

    name = "cores"

    def convert(self, value, param, ctx):
        """A set of int."""
        if isinstance(value, set):
            return value
        try:
            cores = set(map(int, value.split(",")))
        except ValueError:
            self.fail(f"{value!r} are no numbers of cores", param, ctx)
        if not cores <= os.sched_getaffinity(0):
            self.fail(f"{value}: this process may use {sorted(os.sched_getaffinity(0))}", param, ctx)
        return cores


def cores_options(command: Callable) -> Callable:
    """Both options."""
    for name, whose in (("--client-cores", "what measures it"), ("--server-cores", "the server")):
        command = click.option(name, type=Cores(), metavar="N,N", help=f"Of {whose}.  [default: all]")(command)
    return command


@contextlib.contextmanager
def apart(server: set[int] | None, clients: set[int] | None) -> Iterator[Callable[[], None]]:
    """What is started within it runs on the server's cores, and on the clients' after a call of what it gives."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, server or before)
    try:
        yield lambda: os.sched_setaffinity(0, clients or before)
    finally:
        os.sched_setaffinity(0, before)
