"""Sections of `gateway.yaml` for the ways in: the DICOM and HTTP listeners, the worklist page, a watched folder."""

from __future__ import annotations

import ipaddress
import re
import ssl
from dataclasses import dataclass

from cxr_triton.client.address import is_loopback
from cxr_triton.client.limits import Tls
from cxr_triton.config import Checked, in_range
from cxr_triton.errors import InvalidConfig

_AET = re.compile(r"(?! )[\x20-\x5b\x5d-\x7e]{1,16}(?<! )")


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
class Peer(Checked):
    """Who may send: an AE title, and the networks that it calls from."""

    aet: str
    addresses: tuple[str, ...]

    def __post_init__(self):
        super().__post_init__()
        require_aet("aet", self.aet)
        self.networks  # noqa: B018

    @property
    def networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """`addresses`, parsed."""
        try:
            return tuple(ipaddress.ip_network(address) for address in self.addresses)
        except ValueError as error:
            raise InvalidConfig(f"addresses: {error}; give addresses or networks such as 10.1.0.0/16") from None


@dataclass(frozen=True, kw_only=True)
class Dicom(Checked):
    """The DICOM listener.

    Attributes
    ----------
    max_associations, max_per_address : int
        Associations at once, and connections at once from one address, whether they have said anything or not.
    max_pdu_bytes : int
        What is announced to peers; four times as much, at least 1 MiB, is what any PDU may have.
    first_pdu_s : float
        From the connection, TLS included, to the whole association request (the ARTIM timer).
    pdu_s : float
        From the first to the last byte of any PDU, and for the peer to take what is sent.
    idle_s : float
        Between two PDUs of an association.
    clear_text : bool
        Off the loopback interface without `tls` on purpose: nothing is said about it.
    """

    aet: str = "CXR_GATEWAY"
    host: str = "127.0.0.1"
    port: int = in_range(0, 65535, default=11112)
    tls: TlsFiles | None = None
    peers: tuple[Peer, ...] = ()
    max_associations: int = in_range(1, 1000, default=32)
    max_per_address: int = in_range(1, 1000, default=16)
    max_pdu_bytes: int = in_range(4096, 1 << 20, default=131_072)
    first_pdu_s: float = in_range(0.1, 600.0, default=10.0)
    pdu_s: float = in_range(0.1, 600.0, default=30.0)
    idle_s: float = in_range(0.1, 86400.0, default=60.0)
    clear_text: bool = False

    def __post_init__(self):
        super().__post_init__()
        require_aet("aet", self.aet)
        if self.tls:
            self.tls.listener_cert  # noqa: B018
        if not self.peers and not is_loopback(self.host):
            raise InvalidConfig(f"peers: is empty and host is {self.host}; name who may send")

    @property
    def pdu_limit(self) -> int:
        """Bytes that any PDU may have."""
        return max(1 << 20, 4 * self.max_pdu_bytes)


@dataclass(frozen=True, kw_only=True)
class Web(Checked):
    """The HTTP listener: ``/metrics``, ``/health/live``, ``/health/ready``, and STOW-RS where `stow` is true.

    Attributes
    ----------
    token_file : str, optional
        File whose content a STOW-RS client has to send as its bearer token. Required off the loopback interface.
    clear_text : bool
        Allows that token off the loopback interface without `tls`, as behind a proxy that ends it.
    max_connections, max_per_address : int
        Connections at once, and at once from one address; more are answered with 503.
    idle_s : float
        How long a connection may have no whole request head under way, and how long a body may pause.
    total_s : float
        From the head of a request to its answer.
    """

    host: str = "127.0.0.1"
    port: int = in_range(0, 65535, default=8042)
    tls: TlsFiles | None = None
    stow: bool = False
    token_file: str | None = None
    clear_text: bool = False
    max_connections: int = in_range(1, 10_000, default=64)
    max_per_address: int = in_range(1, 10_000, default=16)
    idle_s: float = in_range(0.1, 600.0, default=30.0)
    total_s: float = in_range(0.1, 86400.0, default=300.0)

    def __post_init__(self):
        super().__post_init__()
        if self.tls:
            self.tls.listener_cert  # noqa: B018
        if self.stow and not is_loopback(self.host) and not self.token_file:
            raise InvalidConfig(f"token_file: is missing and host is {self.host}; STOW-RS there needs a token")
        if self.token_file and not self.tls and not is_loopback(self.host) and not self.clear_text:
            raise InvalidConfig(
                f"clear_text: is false and host is {self.host} without tls, where the token could be read on its way; "
                "give tls, or set clear_text: true where something else encrypts"
            )


@dataclass(frozen=True, kw_only=True)
class Worklist(Web):
    """The worklist page, which `cxr-triton gateway worklist` serves.

    Attributes
    ----------
    password_file : str
        File with the password of its login, 12 characters or more.
    patients : bool
        Show Patient ID and Study Instance UID.
    """

    port: int = in_range(0, 65535, default=8043)
    password_file: str = ""
    patients: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.password_file:
            raise InvalidConfig("password_file: is missing; the worklist page has a login of its own")
        if self.stow or self.token_file:
            raise InvalidConfig("stow: and token_file are of `web`; the worklist page takes neither")
        if self.is_clear and not self.clear_text:
            raise InvalidConfig(
                f"clear_text: is false and host is {self.host} without tls, where the password could be read on its "
                "way; give tls, or set clear_text: true where something else encrypts"
            )

    @property
    def is_clear(self) -> bool:
        """Whether what people type leaves this machine unencrypted."""
        return not self.tls and not is_loopback(self.host)


@dataclass(frozen=True, kw_only=True)
class Folder(Checked):
    """A watched folder, and those in it. A file that no longer grows is taken; a refused one moves to ``rejected/``."""

    path: str
    every_s: float = in_range(0.05, 3600.0, default=5.0)


def require_aet(name: str, aet: str) -> None:
    """Refuse what is no AE title; raises `InvalidConfig`."""
    if not _AET.fullmatch(aet):
        raise InvalidConfig(f"{name}: {aet!r:.40} is no AE title (1 to 16 printable characters, no backslash)")
