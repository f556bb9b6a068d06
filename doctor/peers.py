"""Whether a gateway's peers answer: a C-ECHO to a PACS, a handshake of TLS, OPTIONS or a server's own description.

Nothing of a patient is sent, and nothing is stored.
"""

from __future__ import annotations

import email.utils
import http.client
import logging
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple
from urllib.parse import urlsplit

from cxr_triton.client.gateway.config import Config, Remote, Unreachable
from cxr_triton.doctor.certificates import dated, presented, untrusted
from cxr_triton.doctor.check import Case, Check, Finding, fail, ok, refused, warn
from cxr_triton.errors import CxrError, InvalidConfig

SKEW_S = 30.0
PATIENCE_S = 10.0
"""For each step of a peer's answer."""


def peer_certificates(case: Case) -> Iterator[Finding]:
    """Peers show certificates that are trusted here, of their host, and valid for a month."""
    for name, to in _peers(case.config):
        where = _tls_address(to)
        if where is None:
            continue
        subject = f"{name}, {where.host}:{where.port}"
        try:
            context = to.tls.client() if to.tls else ssl.create_default_context()
            yield dated(subject, presented(where.host, where.port, context, to.timeout_s))
        except InvalidConfig as error:
            yield refused(subject, error.message, "files that can be read")
        except OSError as error:
            yield untrusted(subject, error)


def echo(case: Case) -> Iterator[Finding]:
    """Each PACS answers a C-ECHO to this gateway's AE title."""
    from cxr_triton.client.gateway.association import associate
    from cxr_triton.client.gateway.dimse import UNCOMPRESSED, VERIFICATION

    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
    for name, to in _peers(case.config):
        if to.url:
            continue
        aet, host = to.pacs
        subject, wanted = f"{name}, {aet} at {host}:{to.port}", "C-ECHO answered with 0x0000"
        remedy = f"See host, port and AE title, and that the peer knows {case.config.own_aet} at this host."
        try:
            with associate(to, case.config.own_aet, {VERIFICATION: UNCOMPRESSED}) as association:
                status = association.send_c_echo()
        except (Unreachable, InvalidConfig) as error:
            yield fail(subject, error, wanted, remedy)
        except (RuntimeError, ValueError):
            yield fail(subject, "does not take a C-ECHO", wanted, remedy)
        else:
            code = status.get("Status")
            said = f"0x{code:04X}" if code is not None else "no answer"
            yield ok(subject, said, wanted) if code == 0 else fail(subject, said, wanted, remedy)


def endpoints(case: Case) -> Iterator[Finding]:
    """Each web server answers OPTIONS, or a request for its own description, and takes the token."""
    for name, to in _peers(case.config):
        if not to.url:
            continue
        is_fhir = getattr(to, "kind", "") == "fhir"
        method, path = ("GET", "metadata") if is_fhir else ("OPTIONS", "studies")
        subject = f"{name}, {method} {_shown_url(to)}/{path}"
        answer = ask(to, method, path)
        yield from _judged(subject, answer)


def peer_clocks(case: Case) -> Iterator[Finding]:
    """Clocks of web servers, by the Date of their answers, agree with this one."""
    for name, to in _peers(case.config):
        if not to.url:
            continue
        answer = ask(to, "OPTIONS", "")
        date = answer.headers.get("Date", "")
        said = email.utils.parsedate_to_datetime(date).timestamp() if _is_date(date) else None
        if said is not None:
            yield skew(f"clock of {name}", said - time.time(), SKEW_S)


def reader(case: Case) -> Iterator[Finding]:
    """The server that readings are asked of is ready."""
    from cxr_triton.client.limits import Timeouts
    from cxr_triton.client.reader import Reader

    here = case.config.read
    wanted = "a ready server with the model cxr_reader"
    try:
        with Reader(here.url, timeouts=Timeouts(connect_s=5.0), **vars(here.access)) as connected:
            info = connected.server_info()
    except (CxrError, OSError) as error:
        message = error.message if isinstance(error, CxrError) else f"{error.strerror}; see read.tls"
        yield refused(f"read, {here.url}", message, wanted)
    else:
        yield ok(f"read, {here.url}", f"{info.name} {info.version} serves {info.model}", wanted)


class _Address(NamedTuple):
    host: str
    port: int


class Answer(NamedTuple):
    """Status of an HTTP answer, 0 for none; its headers, the begin of its body, and what kept it from coming."""

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b""
    why: str = ""


def ask(to: Remote, method: str, path: str, *, headers: Mapping[str, str] | None = None, most: int = 0) -> Answer:
    """A request without a body, over the connection that the gateway would make; redirects are not followed.

    Parameters
    ----------
    most : int
        Bytes of the answer's body that are read.
    """
    parts = urlsplit(to.root)
    is_tls = parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    target = f"{parts.path}/{path}" if path else (parts.path or "/")
    try:
        given = {"Accept-Encoding": "identity", **to.authorization(), **(headers or {})}
        context = (to.tls.client() if to.tls else ssl.create_default_context()) if is_tls else None
        proxy = urlsplit(to.proxy) if to.proxy else None
        host, at = (proxy.hostname or "", proxy.port or 80) if proxy else (parts.hostname or "", port)
        if context:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, at, timeout=to.timeout_s, context=context
            )
        else:
            connection = http.client.HTTPConnection(host, at, timeout=to.timeout_s)
        if proxy and is_tls:
            connection.set_tunnel(parts.hostname or "", port)
        elif proxy:
            target = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{target}"
        try:
            connection.request(method, target, headers=given)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.headers), answer.read(most) if most else b"")
        finally:
            connection.close()
    except InvalidConfig as error:
        return Answer(0, why=error.message)
    except ssl.SSLError as error:
        return Answer(0, why=f"no handshake of TLS ({getattr(error, 'verify_message', '') or error.reason})")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(0, why=getattr(error, "strerror", None) or type(error).__name__)


def _judged(subject: str, answer: Answer) -> Iterator[Finding]:
    status, wanted = answer.status, "an answer that lets this gateway in"
    said = f"HTTP {status}"
    if not status:
        yield fail(subject, answer.why, wanted, "See host and port, that it runs, and what is between.")
    elif status in (401, 403):
        yield fail(subject, said, wanted, "Give a token_file with a token that it takes.")
    elif 300 <= status < 400:
        yield fail(subject, f"{said}, a redirect", wanted, "Give the address that it leads to: none is followed.")
    elif status >= 500 and status != 501:
        yield fail(subject, said, wanted, "See the server's own log.")
    elif status == 404:
        yield warn(subject, said, wanted, "See the path of url: results are sent below it.")
    else:
        yield ok(subject, said, wanted)


def _is_date(text: str) -> bool:
    try:
        return bool(email.utils.parsedate_to_datetime(text))
    except (ValueError, TypeError):
        return False


def _peers(here: Config) -> Iterator[tuple[str, Remote]]:
    """`Config.remotes`, with less patience than the gateway has."""
    for name, to in here.remotes():
        yield name, replace(to, timeout_s=min(to.timeout_s, PATIENCE_S))


def _tls_address(to: Remote) -> _Address | None:
    """Where a peer speaks TLS; None where it does not, or behind a proxy, which endpoints look through."""
    if not to.url:
        return _Address(to.pacs[1], to.port) if to.tls else None
    parts = urlsplit(to.url)
    return _Address(parts.hostname or "", parts.port or 443) if parts.scheme == "https" and not to.proxy else None


def _shown_url(to: Remote) -> str:
    scheme, slashes, rest = to.root.partition("//")
    return scheme + slashes + rest.rpartition("@")[2]


def skew(subject: str, ahead_s: float, most_s: float) -> Finding:
    """How a clock that is `ahead_s` of this one agrees with it."""
    said, wanted = f"{abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}", f"within {most_s:g} s"
    if abs(ahead_s) <= most_s:
        return ok(subject, said, wanted)
    return fail(subject, said, wanted, "Keep both clocks by NTP.")


def _row(name: str, run: Callable[[Case], Iterator[Finding]], *modules: str, limit_s: float = 120) -> Check:
    return Check(
        id=f"gateway.{name}",
        run=run,
        needs="config",
        modules=modules,
        extra="gateway",
        is_connecting=True,
        limit_s=limit_s,
    )


CHECKS = (
    _row("peer_certificates", peer_certificates),
    _row("echo", echo, "pynetdicom"),
    _row("endpoints", endpoints),
    _row("peer_clocks", peer_clocks),
    _row("reader", reader, "grpc", "tritonclient", limit_s=45),
)
