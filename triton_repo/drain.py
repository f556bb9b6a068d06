"""How a server ends without losing a reading: it takes no new one, and ends when none is under way.

Triton 2.51 by itself does not: at SIGTERM it refuses the next step of every ensemble, so that readings under way say
nothing more until its own time limit is over. So its models close first. `DRAIN` names a file, and while it is there
`dicom_preprocess` refuses what comes.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from cxr_triton.errors import QueueFull

DRAIN = "CXR_TRITON_DRAIN"
DRAIN_S = 30.0
RETRY_S = 5
_LOOKS, _LOOK_S = 4, 0.15
"""Of the metrics, all of which have to find nothing: between two steps a reading is in neither."""
_METRICS_TIMEOUT_S = 5
_UNDER_WAY = re.compile(r"^(?:nv_inference_pending_request_count|cxr_decoder_streams)(?:{.*})? (\S+)$", re.MULTILINE)
_LOCK = ".lock"


def is_draining() -> bool:
    """Whether the server that this process belongs to is ending."""
    file = os.environ.get(DRAIN)
    return file is not None and os.path.exists(file)


def require_admission() -> None:
    """Raise `QueueFull` where nothing more is taken, as the server is ending."""
    if is_draining():
        raise QueueFull(f"this server is ending and takes no more readings; send it again in {RETRY_S} s")


def under_way(metrics: str) -> float:
    """Requests that wait and streams that decode, by the metrics of a server at ``HOST:PORT``; 1 where it is silent."""
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{metrics}/metrics", timeout=_METRICS_TIMEOUT_S) as page:
            return sum(map(float, _UNDER_WAY.findall(page.read().decode())))
    except (OSError, http.client.HTTPException):
        return 1.0


def drained(file: Path, metrics: str, limit_s: float, is_alive: Callable[[], bool] = lambda: True) -> bool:
    """Close a server by its file, and wait until nothing is under way; whether that came within the limit."""
    file.touch(mode=0o600)
    ends_s, quiet = time.monotonic() + limit_s, 0
    while is_alive():
        quiet = 0 if _is_in_work(file) or under_way(metrics) else quiet + 1
        if quiet == _LOOKS:
            return True
        if time.monotonic() > ends_s:
            return False
        time.sleep(_LOOK_S)
    return False


@contextlib.contextmanager
def in_work() -> Iterator[None]:
    """A step has requests until the block ends, which Triton tells nobody; one that dies has none."""
    file = os.environ.get(DRAIN)
    if file is None:
        yield
        return
    with open(file + _LOCK, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _is_in_work(file: Path) -> bool:
    """Whether a step of the server whose `DRAIN` names `file` has requests."""
    with open(f"{file}{_LOCK}", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
