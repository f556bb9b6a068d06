"""What the server listens on, and what it gives each request: frozen and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cxr_triton.client.address import is_loopback
from cxr_triton.client.endpoint import Http, TlsFiles
from cxr_triton.config import Checked, in_range
from cxr_triton.errors import InvalidConfig

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """Options of `cxr-triton openai`.

    Attributes
    ----------
    api_keys_file : Path, optional
        See `cxr_triton.client.openai.keys.Keys`; without it nobody is asked for a key.
    cert, key : Path, optional
        PEM files with which it encrypts.
    clear_text, without_keys : bool
        Allow to listen off the loopback interface without encryption, and without keys.
    allowed_hosts : tuple of str
        Names in the Host header, besides those of the loopback interface.
    timeout_s : float
        From the request to the end of the reading.
    max_requests : int
        Completions under way; one more is `QUEUE_FULL`.
    max_body_mib, max_bodies_mib : int
        Largest body of a request, and of all that are on their way in; one more is `QUEUE_FULL`.
    body_s, write_s : float
        For a whole body to come, and for the client to take an event.
    grace_s : float
        For what is under way to end once the server was told to stop.

    Raises
    ------
    InvalidConfig
        Anybody could ask, or listen in on, what is off the loopback interface, and nobody allowed that.
    """

    host: str = "127.0.0.1"
    port: int = in_range(0, 65535, default=8080)
    api_keys_file: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    clear_text: bool = False
    without_keys: bool = False
    allowed_hosts: tuple[str, ...] = ()
    timeout_s: float = in_range(0.1, 86400.0, default=600.0)
    max_requests: int = in_range(1, 10_000, default=64)
    max_body_mib: int = in_range(1, 1024, default=64)
    max_bodies_mib: int = in_range(1, 65536, default=256)
    max_connections: int = in_range(1, 10_000, default=256)
    max_per_address: int = in_range(1, 10_000, default=256)
    body_s: float = in_range(0.1, 600.0, default=60.0)
    write_s: float = in_range(0.1, 600.0, default=30.0)
    grace_s: float = in_range(0.0, 3600.0, default=30.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_loopback(self.host):
            return
        if not self.api_keys_file and not self.without_keys:
            raise InvalidConfig(
                f"--host {self.host} is not the loopback interface, and anybody there could ask; give --api-keys-file, "
                "or --without-keys where something else lets nobody else through"
            )
        if not self.cert and not self.clear_text:
            raise InvalidConfig(
                f"--host {self.host} is not the loopback interface, and pictures and keys could be read on their way; "
                "give --cert and --key, or --clear-text where something else encrypts"
            )

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

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names that a request may come for; None allows any.

        A page of anywhere can have its own name lead to 127.0.0.1; the name stays in its requests.
        """
        if not is_loopback(self.host) and not self.allowed_hosts:
            return None
        return frozenset({*LOOPBACK_NAMES, *map(str.lower, self.allowed_hosts)})
