"""A server that has grown is started again: Triton 2.51 keeps memory for each client that vanishes at a bad moment.

What it keeps, and when, was measured: docs/reliability.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_triton.errors import InvalidRequest
from cxr_triton.triton_repo.drain import DRAIN_S, under_way

if TYPE_CHECKING:
    from cxr_triton.triton_repo.serve import Server

RENEW_MIB = 1024


class Renewal:
    """When a running server is to be started again.

    Parameters
    ----------
    server : Server
        Started.
    mib : int
        How much the server's own process may grow, its models' processes left out, until a moment without readings is
        used to renew it. At twice that it is renewed at once. 0 never renews.

    drain_s : float
        How long readings under way may take to end.

    Raises
    ------
    InvalidRequest
        `mib` is negative.
    """

    def __init__(self, server: Server, mib: int = RENEW_MIB, drain_s: float = DRAIN_S):
        if mib < 0:
            raise InvalidRequest(f"--renew-mib is {mib}, must be 0 (never) or more")
        self._server, self._mib, self._drain_s = server, mib, drain_s
        self._began_mib = resident_mib(server.pid)

    @property
    def grown_mib(self) -> float:
        """What the server's process holds beyond what it held at its start."""
        return resident_mib(self._server.pid) - self._began_mib

    def is_due(self) -> bool:
        """The server has grown, and no reading is under way or it has grown twice as much."""
        if not self._mib or (grown := self.grown_mib) < self._mib:
            return False
        return grown >= 2 * self._mib or not under_way(self._server.metrics)

    def renew(self) -> None:
        """Start the server again at the same addresses; its log so far is kept as ``NAME.1``.

        Readings under way get `drain_s` to end, and new ones are refused. A client that connects after that finds no
        server, which `Reader` tries again for its `Timeouts.connect_s`.
        """
        self._server.drain(self._drain_s)
        self._server.stop()
        self._server.log.replace(self._server.log.with_name(self._server.log.name + ".1"))
        self._server.start()
        self._began_mib = resident_mib(self._server.pid)


def resident_mib(pid: int) -> float:
    """Memory that a process holds; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0
