"""Ray: on this machine by default, for itself alone; the cluster that RAY_ADDRESS names instead."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import secrets
from collections.abc import Iterator
from typing import Any

from cxr_triton.errors import Unavailable

ADDRESS = "RAY_ADDRESS"
OBJECT_STORE_BYTES = 200 << 20
_ALWAYS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
_ON_ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Where a cluster cannot be, Ray takes the loopback interface for its own address and listens nowhere else."""


def is_cluster() -> bool:
    """Whether the environment names a cluster."""
    return os.environ.get(ADDRESS, "") not in ("", "local")


@contextlib.contextmanager
def ray_started(cpus: int, gpus: int = 0) -> Iterator[None]:
    """Ray for as long as the block runs; one that this process has already is taken, and stays.

    Its settings are in the environment, so ray must not have been imported before.

    Parameters
    ----------
    cpus, gpus : int
        Of the local Ray, for its actors; a cluster has its own.

    Raises
    ------
    Unavailable
        The cluster cannot be reached.
    """
    os.environ.update(_ALWAYS)
    if not is_cluster():
        # A token of its own, so that nobody else on this machine can have it run something.
        os.environ.update(_ON_ONE_MACHINE, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    try:
        if is_cluster():
            ray.init(**quiet)
        else:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Unavailable(f"Ray did not start ({type(error).__name__}: {error}); see {ADDRESS}") from None
    try:
        yield
    finally:
        ray.shutdown()
        leave_at_exit()


@functools.cache
def leave_at_exit() -> None:
    """Have this process end with its status as soon as Python has ended.

    Ray 2.60 now and then waits for ever in a destructor of its own: `boost::asio::thread_pool` joins the thread
    ``worker.io``, which waits for a mutex that is gone already. Handlers of the C library run in reverse order, so this
    one, which is registered after Ray's, comes before.
    """
    libc = ctypes.CDLL(None)
    libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)
