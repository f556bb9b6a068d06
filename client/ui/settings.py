"""What the reading room listens on, and what it gives each session: frozen and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cxr_triton.client.address import is_loopback
from cxr_triton.client.endpoint import Http, TlsFiles
from cxr_triton.config import Checked, in_range
from cxr_triton.errors import InvalidConfig

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """Options of `cxr-triton ui`.

    Attributes
    ----------
    password_file : Path, optional
        File with the password of the login; without it there is none.
    cert, key : Path, optional
        PEM files with which it encrypts.
    clear_text : bool
        Allows to listen off the loopback interface without encryption.
    allowed_hosts : tuple of str
        Names in the Host header, besides those of the loopback interface.
    timeout_s : float
        From the request to the end of a reading.
    max_sessions : int
        Browser tabs at once; one more is `QUEUE_FULL`.
    session_mib, sessions_mib : int
        What one session, and all together, may hold in memory: files, their pictures, readings.
    max_pictures, max_readings : int
        Of one session.
    max_under_way : int
        Readings of one session that are being written.
    idle_s : float
        After so long without a request a session ends.
    decoders : int
        Processes that decode uploaded files.
    body_s, write_s : float
        For a whole body to come, and for the browser to take a line.
    grace_s : float
        For what is under way to end once the server was told to stop.

    Raises
    ------
    InvalidConfig
        Anybody could look, or listen in on, what is off the loopback interface.
    """

    host: str = "127.0.0.1"
    port: int = in_range(0, 65535, default=8080)
    password_file: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    clear_text: bool = False
    allowed_hosts: tuple[str, ...] = ()
    timeout_s: float = in_range(0.1, 86400.0, default=600.0)
    max_sessions: int = in_range(1, 1000, default=32)
    session_mib: int = in_range(1, 16384, default=256)
    sessions_mib: int = in_range(1, 65536, default=2048)
    max_pictures: int = in_range(1, 100, default=16)
    max_readings: int = in_range(1, 1000, default=64)
    max_under_way: int = in_range(1, 16, default=4)
    idle_s: float = in_range(0.1, 86400.0, default=1800.0)
    decoders: int = in_range(1, 16, default=2)
    max_connections: int = in_range(1, 10_000, default=256)
    max_per_address: int = in_range(1, 10_000, default=256)
    body_s: float = in_range(0.1, 600.0, default=120.0)
    write_s: float = in_range(0.1, 600.0, default=30.0)
    grace_s: float = in_range(0.0, 3600.0, default=10.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key and not self.cert:
            raise InvalidConfig("--key is the key of a certificate; give --cert too")
        if is_loopback(self.host):
            return
        if not self.password_file:
            raise InvalidConfig(
                f"--host {self.host} is not the loopback interface, and anybody there could look; give --password-file"
            )
        if not self.cert and not self.clear_text:
            raise InvalidConfig(
                f"--host {self.host} is not the loopback interface, and pictures and password could be read on their "
                "way; give --cert and --key, or --clear-text where something else encrypts"
            )

    @property
    def http(self) -> Http:
        """Of the listener."""
        return Http(
            host=self.host,
            port=self.port,
            tls=TlsFiles(cert=str(self.cert), key=str(self.key) if self.key else None) if self.cert else None,
            clear_text=True,
            max_connections=self.max_connections,
            max_per_address=self.max_per_address,
            idle_s=max(self.body_s, self.write_s),
            total_s=min(self.body_s + self.timeout_s + 60.0, 86400.0),
        )

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names that a request may come for; None allows any.

        A page of anywhere can have its own name lead to 127.0.0.1; the name stays in its requests.
        """
        if not is_loopback(self.host) and not self.allowed_hosts:
            return None
        return frozenset({*LOOPBACK_NAMES, *map(str.lower, self.allowed_hosts)})
