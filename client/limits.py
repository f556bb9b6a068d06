"""How long a client waits for each part of a reading, and how it trusts the server."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_triton.client.address import leaves_machine
from cxr_triton.errors import InvalidConfig, InvalidRequest

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True)
class Timeouts:
    """Limits of one reading, in seconds; None waits without limit.

    Attributes
    ----------
    connect_s : float
        Until the server answers that it serves the contract, retries included.
    first_delta_s : float
        From the request to the first text: queue, decoding of the pictures, vision, prefill.
    idle_s : float
        For the next response once the first has come, from when the caller asks for it: what the caller does between
        two reads does not count. The server sends empty ones while a request waits, so silence means trouble.
    total_s : float
        From the request to the end of the reading; also the gRPC deadline that the server sees.
    """

    connect_s: float | None = 5.0
    first_delta_s: float | None = 120.0
    idle_s: float | None = 30.0
    total_s: float | None = 600.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"Timeouts.{field.name} is {value!r}, must be over 0 s; None waits without limit")


DEFAULT_TIMEOUTS = Timeouts()


class Clock:
    """Which of a stream's limits its next response runs against."""

    def __init__(self, timeouts: Timeouts):
        self._timeouts = timeouts
        self._started = float("inf")
        self._is_heard = self._has_text = False

    def start(self) -> None:
        """The request is on its way."""
        self._started = time.monotonic()

    def heard(self, delta: str) -> None:
        """A response came, with or without text."""
        self._is_heard = True
        self._has_text = self._has_text or delta != ""

    def next_limit(self) -> tuple[float, str]:
        """Monotonic time by which a response awaited from now is due, and the limit's name; (inf, "") without one."""
        limits = [(float("inf"), "")]
        if not self._has_text and self._timeouts.first_delta_s is not None:
            limits.append((self._started + self._timeouts.first_delta_s, "first_delta_s"))
        if self._is_heard and self._timeouts.idle_s is not None:
            limits.append((time.monotonic() + self._timeouts.idle_s, "idle_s"))
        return min(limits)


@dataclass(frozen=True)
class Tls:
    """PEM files of an encrypted channel.

    Attributes
    ----------
    ca : path, optional
        Authorities that may have signed the server's certificate; the system's by default.
    cert, key : path, optional
        This client's own certificate and key, where the server asks for one.
    """

    ca: str | os.PathLike | None = None
    cert: str | os.PathLike | None = None
    key: str | os.PathLike | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """The files' contents, as gRPC takes them."""
        import grpc

        ca, cert, key = (Path(path).read_bytes() if path else None for path in (self.ca, self.cert, self.key))
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


@dataclass(frozen=True)
class Access:
    """How a client is let in by a server, or by the front door before it.

    Attributes
    ----------
    tls : Tls, optional
        Encrypts the channel.
    token_file : path, optional
        File with a bearer token, which goes along with every call. It is read for each, so that a token may be
        exchanged while a program runs.
    """

    tls: Tls | None = None
    token_file: str | os.PathLike | None = None

    @classmethod
    def of(cls, *, tls_ca=None, tls_cert=None, tls_key=None, token_file=None) -> Access:
        """From the values of `cxr_triton.cli.access_options`."""
        return cls(Tls(tls_ca, tls_cert, tls_key) if tls_ca or tls_cert else None, token_file)

    def require_private(self, url: str) -> None:
        """Refuse a token that others could read on its way, and one that cannot be used.

        Raises
        ------
        InvalidRequest
            The channel to `url` leaves this machine unencrypted.
        InvalidConfig
            The file holds no token.
        """
        if not self.token_file:
            return
        if not self.tls and leaves_machine(url):
            raise InvalidRequest(f"{url}: a token is not sent unencrypted; give the authority of its certificate, tls")
        self.metadata()

    def channel(self, library: Any, url: str, options: list) -> Any:
        """A channel of `grpc` or `grpc.aio`."""
        if self.tls:
            return library.secure_channel(url, self.tls.credentials(), options)
        return library.insecure_channel(url, options)

    def metadata(self) -> list[tuple[str, str]]:
        """What goes along with a call; raises `InvalidConfig` where the file holds no token."""
        return [("authorization", f"Bearer {read_token(self.token_file)}")] if self.token_file else []


NO_ACCESS = Access()
"""Of a server that asks for nothing, on this machine."""


LEAST_PASSWORD = 12


def read_password(path: str | os.PathLike, name: str) -> str:
    """The password that a file holds, without blanks around it.

    Parameters
    ----------
    name : str
        Of the setting that says which file, for the errors.

    Raises
    ------
    InvalidConfig
        The file cannot be read, or holds under `LEAST_PASSWORD` characters.
    """
    password = _read_secret(path, name)
    if len(password) < LEAST_PASSWORD:
        raise InvalidConfig(f"{name}: {path} holds {len(password)} characters; write {LEAST_PASSWORD} or more into it")
    return password


def read_token(path: str | os.PathLike) -> str:
    """The token that a file holds.

    Raises
    ------
    InvalidConfig
        The file cannot be read, or is not one line of printable ASCII characters without blanks.
    """
    token = _read_secret(path, "token_file")
    if not re.fullmatch(r"[!-~]{1,4096}", token):
        raise InvalidConfig(f"token_file: {path} holds no token; write one line of printable characters into it")
    return token


def _read_secret(path: str | os.PathLike, name: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace").strip()
    except OSError as error:
        raise InvalidConfig(f"{name}: {path} cannot be read ({error.strerror})") from None
