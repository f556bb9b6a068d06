"""What such a service listens on, and what it gives each request: frozen and checked. Imports no aiohttp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cxr_triton.client.address import is_loopback, is_served
from cxr_triton.client.endpoint import Http, TlsFiles
from cxr_triton.config import Checked, in_range
from cxr_triton.errors import InvalidConfig


@dataclass(frozen=True, kw_only=True)
class DoorSettings(Checked):
    """Options that such commands have in common.

    Attributes
    ----------
    cert, key : Path, optional
        PEM files with which it encrypts.
    clear_text : bool
        Allows to listen off the loopback interface without encryption.
    allowed_hosts : tuple of str
        Names in the Host header, besides those of the loopback interface.
    timeout_s : float
        From the request to the end of a reading.
    body_s, write_s : float
        For a whole body to come, and for the client to take a part of the answer.
    grace_s : float
        For what is under way to end once the server was told to stop.

    Raises
    ------
    InvalidConfig
        Anybody could come in, or listen in on, what is off the loopback interface, and nobody allowed that.
    """

    unlocked: ClassVar[str]
    """What is said where nothing locks it off the loopback interface."""
    at_risk: ClassVar[str]
    """What could be read on its way there, besides pictures."""

    host: str = "127.0.0.1"
    port: int = in_range(0, 65535, default=8080)
    cert: Path | None = None
    key: Path | None = None
    clear_text: bool = False
    allowed_hosts: tuple[str, ...] = ()
    timeout_s: float = in_range(0.1, 86400.0, default=600.0)
    max_connections: int = in_range(1, 10_000, default=256)
    max_per_address: int = in_range(1, 10_000, default=256)
    body_s: float = in_range(0.1, 600.0, default=60.0)
    write_s: float = in_range(0.1, 600.0, default=30.0)
    grace_s: float = in_range(0.0, 3600.0, default=30.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key and not self.cert:
            raise InvalidConfig("--key is the key of a certificate; give --cert too")
        where = f"--host {self.host} is not the loopback interface, and"
        if is_loopback(self.host):
            return
        if not self.is_locked:
            raise InvalidConfig(f"{where} {self.unlocked}")
        if not self.cert and not self.clear_text:
            raise InvalidConfig(
                f"{where} pictures and {self.at_risk} could be read on their way; give --cert and --key, or "
                "--clear-text where something else encrypts"
            )

    @property
    def is_locked(self) -> bool:
        """Not everybody who reaches it comes in."""
        raise NotImplementedError

    @property
    def http(self) -> Http:
        """Of the listener."""
        return Http(
            host=self.host,
            port=self.port,
            tls=TlsFiles(cert=str(self.cert), key=str(self.key) if self.key else None) if self.cert else None,
            max_connections=self.max_connections,
            max_per_address=self.max_per_address,
            idle_s=max(self.body_s, self.write_s),
            total_s=min(self.body_s + self.timeout_s + 60.0, 86400.0),
        )

    def serves(self, hosts: list[str]) -> bool:
        """Whether a request with these Host headers is answered, see `is_served`."""
        return is_served(self.host, hosts, self.allowed_hosts)
