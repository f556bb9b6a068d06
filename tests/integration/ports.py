"""Ports for programs that are told which to listen on, and may be started again on them."""

import contextlib
import random
import socket

CHOICE = random.SystemRandom()  # tests seed the shared one


def free_port() -> int:
    """A free port that no connection takes while nobody listens: below those that the system gives to clients."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", CHOICE.randrange(16_384, 32_768)))
            return probe.getsockname()[1]
