"""Who listens on this machine, and with which arguments: as /proc tells every user."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cxr_triton.client.address import is_loopback
from cxr_triton.doctor.check import Case

_LISTEN = "0A"
CONNECT_S = 3.0


@dataclass(frozen=True)
class ServerProcess:
    """A running `tritonserver`."""

    pid: int
    arguments: tuple[str, ...]

    def flag(self, name: str, default: str = "") -> str:
        """Value of a flag, the last one given; ``true`` for one without a value."""
        return (self.values(name) or [default])[-1]

    def values(self, name: str) -> list[str]:
        """All values of a flag, in the order given."""
        found = []
        for here, after in zip(self.arguments, (*self.arguments[1:], ""), strict=True):
            key, equals, value = here.partition("=")
            if key in (f"--{name}", f"-{name}"):
                found.append(value if equals else ("true" if after.startswith("-") or not after else after))
        return found

    @property
    def grpc_port(self) -> int:
        """Of readings."""
        return _port(self.flag("grpc-port", "8001"))

    @property
    def metrics_port(self) -> int | None:
        """None where it has no metrics."""
        return None if _is_false(self.flag("allow-metrics")) else _port(self.flag("metrics-port", "8002"))

    @property
    def http_port(self) -> int | None:
        """None where it has no HTTP."""
        return None if _is_false(self.flag("allow-http")) else _port(self.flag("http-port", "8000"))


def server_process(case: Case) -> ServerProcess | None:
    """The `tritonserver` of this machine that serves `Case.port`; None where there is none, or /proc hides it."""
    for path in sorted((case.root / "proc").glob("[0-9]*/cmdline")):
        try:
            arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if Path(arguments[0]).name == "tritonserver":
            found = ServerProcess(int(path.parent.name), tuple(arguments[1:]))
            if found.grpc_port == case.port:
                return found
    return None


def listeners(case: Case, port: int) -> set[str]:
    """Addresses of this machine on which something listens at a port."""
    found = set()
    for file in ("proc/net/tcp", "proc/net/tcp6"):
        for row in case.read(file).splitlines()[1:]:
            fields = row.split()
            address, _, number = fields[1].partition(":")
            if fields[3] == _LISTEN and int(number, 16) == port:
                found.add(_address(address))
    return found


def beyond_loopback(case: Case, port: int) -> list[str]:
    """Addresses other than loopback's on which something listens at a port."""
    return sorted(address for address in listeners(case, port) if not is_loopback(address))


def is_taken(host: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError:
        return False
    return True


def _address(text: str) -> str:
    """Of proc's hexadecimal words, each in this machine's order of bytes."""
    words = [struct.pack("=I", int(word, 16)) for word in _words(text)]
    return str(ipaddress.ip_address(b"".join(words)))


def _words(text: str) -> Iterator[str]:
    for start in range(0, len(text), 8):
        yield text[start : start + 8]


def _is_false(value: str) -> bool:
    return value.lower() in ("false", "0")


def _port(value: str) -> int:
    return int(value) if value.isdigit() else 0
