"""Sections of `gateway.yaml` for the ways in: the DICOM and HTTP listeners, the worklist page, a watched folder."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from cxr_triton.client.address import is_loopback
from cxr_triton.client.endpoint import Http, TlsFiles
from cxr_triton.config import Checked, in_range
from cxr_triton.errors import InvalidConfig

_AET = re.compile(r"(?! )[\x20-\x5b\x5d-\x7e]{1,16}(?<! )")


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
class Web(Http):
    """The HTTP listener: ``/metrics``, ``/health/live``, ``/health/ready``, and STOW-RS where `stow` is true.

    Attributes
    ----------
    token_file : str, optional
        File whose content a STOW-RS client has to send as its bearer token. Required off the loopback interface.
    """

    port: int = in_range(0, 65535, default=8042)
    stow: bool = False
    token_file: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.stow and not is_loopback(self.host) and not self.token_file:
            raise InvalidConfig(f"token_file: is missing and host is {self.host}; STOW-RS there needs a token")
        if self.token_file:
            self.require_private("the token")


@dataclass(frozen=True, kw_only=True)
class Worklist(Http):
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
        self.require_private("the password")


@dataclass(frozen=True, kw_only=True)
class Folder(Checked):
    """A watched folder, and those in it. A file that no longer grows is taken; a refused one moves to ``rejected/``."""

    path: str
    every_s: float = in_range(0.05, 3600.0, default=5.0)


def require_aet(name: str, aet: str) -> None:
    """Refuse what is no AE title; raises `InvalidConfig`."""
    if not _AET.fullmatch(aet):
        raise InvalidConfig(f"{name}: {aet!r:.40} is no AE title (1 to 16 printable characters, no backslash)")
