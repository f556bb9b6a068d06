"""Certificates: dates, names and keys, as a handshake of this machine's own TLS library judges them."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from cxr_triton.client.endpoint import TlsFiles
from cxr_triton.doctor.check import Finding, fail, ok, warn

SOON_DAYS = 30
_EXPIRED, _NOT_YET = 10, 9  # X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_CERT_NOT_YET_VALID
_DATES = "valid today and for a month to come"


def own(where: str, tls: TlsFiles, names: tuple[str, ...], *, is_listener: bool) -> Iterator[Finding]:
    """What is wrong with the files of a connection.

    Parameters
    ----------
    where : str
        Section of the configuration.
    tls : TlsFiles
    names : tuple of str
        Hosts and addresses that peers call a listener by; the certificate should be of one.
    is_listener : bool
    """
    if tls.ca and (said := _unreadable(tls.ca)):
        yield fail(f"{where}.tls.ca, {tls.ca}", said, "certificates in PEM", "Give the file of the peer's authority.")
    if not tls.cert:
        return
    subject, key = f"{where}.tls.cert, {tls.cert}", tls.key or tls.cert
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(tls.cert, key, password=lambda: b"")
    except OSError as error:
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            yield fail(subject, f"not the certificate of {key}", "a pair", "Give the key that the certificate is of.")
        else:
            said = f"no such pair in PEM ({error.reason})" if isinstance(error, ssl.SSLError) else str(error.strerror)
            remedy = "Give a certificate and its key without a passphrase, both in PEM."
            yield fail(subject, f"{said}; key {key}", "readable", remedy)
        return
    yield from _judged(subject, tls.cert, server, names if is_listener else ())


def _judged(subject: str, cert: str, server: ssl.SSLContext, names: tuple[str, ...]) -> Iterator[Finding]:
    try:
        found = _shaken(server, cert)
    except ssl.SSLCertVerificationError as error:
        remedy = "Have it renewed." if error.verify_code == _EXPIRED else "Give a certificate that TLS accepts."
        if error.verify_code == _NOT_YET:
            remedy = "Set the clock, or wait until it is valid."
        yield fail(subject, error.verify_message, _DATES, remedy)
        return
    except ssl.SSLError as error:
        yield fail(subject, f"no handshake ({error.reason})", "a handshake of TLS 1.2", "Make a new pair.")
        return
    yield dated(subject, found)
    is_of = [name for kind, name in found.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    if names and not any(_matches(name, pattern) for name in names for pattern in is_of):
        yield warn(
            f"{subject}, names",
            ", ".join(is_of) or "none",
            f"one of {', '.join(names)}",
            "Have it made for the name that peers call this host by (subjectAltName), or they refuse it.",
        )


def dated(subject: str, certificate: dict) -> Finding:
    """Whether a certificate that is valid stays so for a while."""
    ends = str(certificate.get("notAfter", ""))
    days = (ssl.cert_time_to_seconds(ends) - time.time()) / 86400 if ends else 0.0
    said = f"until {ends}, {days:.0f} days"
    if days < SOON_DAYS:
        return warn(subject, said, _DATES, "Have it renewed before it ends: peers refuse it on that day.")
    return ok(subject, said, _DATES)


def presented(host: str, port: int, context: ssl.SSLContext, timeout_s: float) -> dict:
    """The certificate that a server shows and `context` trusts.

    Raises
    ------
    OSError
        No connection, or `ssl.SSLCertVerificationError` where it is not trusted.
    """
    with (
        socket.create_connection((host, port), timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=host) as wire,
    ):
        return wire.getpeercert() or {}


def untrusted(subject: str, error: OSError) -> Finding:
    """What a failed handshake with a peer says."""
    if isinstance(error, ssl.SSLCertVerificationError):
        remedies = {_EXPIRED: "Have the peer renew it.", _NOT_YET: "Set the clock of this machine or of the peer."}
        remedy = remedies.get(
            error.verify_code, "Give its authority as tls.ca, and call the host by the name it is for."
        )
        return fail(subject, error.verify_message, "a certificate that is trusted here", remedy)
    said = f"{error.reason}" if isinstance(error, ssl.SSLError) else (error.strerror or type(error).__name__)
    return fail(subject, f"no handshake ({said})", "TLS", "See host and port, and whether TLS is spoken there.")


def _shaken(server: ssl.SSLContext, cert: str) -> dict:
    """The certificate as a client sees it in a handshake in memory, its own file trusted; dates are judged by TLS."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cert)
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(one, other)
    there = server.wrap_bio(other, one, server_side=True)
    for _ in range(4):
        for side in (here, there):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return here.getpeercert() or {}


def _matches(name: str, pattern: str) -> bool:
    """As RFC 6125 compares a name, or an address, with one of a certificate."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        name, pattern = name.lower().rstrip("."), pattern.lower()
    else:
        return str(address) == pattern.lower()
    return name == pattern or (pattern.startswith("*.") and name.partition(".")[2] == pattern[2:])


def _unreadable(ca: str) -> str:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
    except ssl.SSLError:
        return "no certificates in PEM"
    except OSError as error:
        return error.strerror or "unreadable"
    return "" if Path(ca).stat().st_size else "empty"
