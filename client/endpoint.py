"""Where a process of ours listens by HTTP: address, encryption, limits of connections. Imports no aiohttp."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from cxr_triton.client.address import is_loopback
from cxr_triton.client.limits import Tls
from cxr_triton.config import Checked, in_range
from cxr_triton.errors import InvalidConfig


@dataclass(frozen=True, kw_only=True)
class TlsFiles(Checked):
    """PEM files of an encrypted connection: own certificate and key, and the authorities that the peer's has to be of.

    A listener with `ca` asks each peer for a certificate; a sender without it trusts the system's authorities.
    """

    cert: str | None = None
    key: str | None = None
    ca: str | None = None

    @property
    def listener_cert(self) -> str:
        """`cert`, without which no listener can be; `InvalidConfig` says so."""
        if not self.cert:
            raise InvalidConfig("tls.cert: is missing; a listener needs a certificate and its key")
        return self.cert

    def server(self) -> ssl.SSLContext:
        """For a listener: TLS 1.2 or later (BCP 195 profile of PS3.15 B.9)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._load(context)
        if self.ca:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client(self) -> ssl.SSLContext:
        """For a sender."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not self.ca:
            context.load_default_certs()
        self._load(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            if self.cert:
                context.load_cert_chain(self.cert, self.key)
            if self.ca:
                context.load_verify_locations(self.ca)
        except OSError as error:
            files = ", ".join(file for file in (self.cert, self.key, self.ca) if file)
            raise InvalidConfig(f"tls: {error.strerror or error}; look at {files}") from None

    def grpc(self) -> Tls:
        """For the reader."""
        return Tls(ca=self.ca, cert=self.cert, key=self.key)


@dataclass(frozen=True, kw_only=True)
class Http(Checked):
    """What `cxr_triton.client.listener.HttpListener` listens on, and what it gives each connection.

    Attributes
    ----------
    clear_text : bool
        Allows secrets off the loopback interface without `tls`, as behind a proxy that ends it.
    max_connections, max_per_address : int
        Connections at once, and at once from one address; more are answered with 503.
    idle_s : float
        How long a connection may have no whole request head under way, and how long a body may pause.
    total_s : float
        From the head of a request to its answer.
    """

    host: str = "127.0.0.1"
    port: int = in_range(0, 65535, default=0)
    tls: TlsFiles | None = None
    clear_text: bool = False
    max_connections: int = in_range(1, 10_000, default=64)
    max_per_address: int = in_range(1, 10_000, default=16)
    idle_s: float = in_range(0.1, 600.0, default=30.0)
    total_s: float = in_range(0.1, 86400.0, default=300.0)

    def __post_init__(self):
        super().__post_init__()
        if self.tls:
            self.tls.listener_cert  # noqa: B018

    @property
    def is_clear(self) -> bool:
        """Whether what is sent leaves this machine unencrypted."""
        return not self.tls and not is_loopback(self.host)

    def require_private(self, secret: str) -> None:
        """Refuse to take what others could read on its way, unless `clear_text` allows it; raises `InvalidConfig`."""
        if self.is_clear and not self.clear_text:
            raise InvalidConfig(
                f"clear_text: is false and host is {self.host} without tls, where {secret} could be read on its way; "
                "give tls, or set clear_text: true where something else encrypts"
            )
