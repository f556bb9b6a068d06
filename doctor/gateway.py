"""A gateway's configuration: folders, secrets, certificates, the queue, and whether its peers answer.

Peers get a C-ECHO, a handshake of TLS, OPTIONS or a request for a server's own description: nothing of a patient.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import logging
import os
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from cxr_triton.client.gateway.config import Config, Remote, TlsFiles, read_token
from cxr_triton.doctor.certificates import dated, own, presented, untrusted
from cxr_triton.doctor.check import (
    Absent,
    Case,
    Check,
    Finding,
    Unseen,
    fail,
    mode_of,
    ok,
    owner,
    refused,
    skipped,
    told,
    warn,
)
from cxr_triton.doctor.listening import is_loopback, is_taken
from cxr_triton.errors import CxrError, InvalidConfig

if TYPE_CHECKING:
    from cxr_triton.client.gateway.database import Seen

LEAST_KEY_BYTES = 16
SKEW_S = 30.0
PATIENCE_S = 10.0
"""For each step of a peer's answer."""
WIDE = 65536
"""Addresses of a network from which on it is no list of senders any more."""
_GATEWAY = ("sqlalchemy", "psycopg")


def config(case: Case) -> Iterator[Finding]:
    """gateway.yaml is one that the gateway takes."""
    if case.config_path is None:
        raise Absent
    try:
        ways = [name for name in ("dicom", "web", "folder") if getattr(case.config, name)]
        yield ok(case.config_path, f"{', '.join(ways)} to {len(case.config.destinations)} destinations", "valid")
    except InvalidConfig as error:
        found, remedy = told(error.message)
        yield fail(case.config_path, found, "valid", remedy or "See `cxr-triton gateway example` for all keys.")


def storage(case: Case) -> Iterator[Finding]:
    """The storage folder is there or can be made, is the gateway's alone, and lets it write."""
    folder = Path(case.config.storage)
    if not folder.exists():
        above = _storage_disk(case.config)
        if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
            yield ok(folder, "not there: the gateway makes it", "a folder that it may write")
        else:
            yield fail(
                folder, f"{above} may not be written", "a folder that it may write", f"Make {folder} for its user."
            )
        return
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        what = "no folder" if not folder.is_dir() else "may not be read and written"
        yield fail(folder, what, "a folder that it may write", f"Give {folder} to the gateway's user.")
        return
    allowed = 0o2770 if case.config.share_with_group else 0o700
    for path in (folder, *sorted(each for each in folder.iterdir() if each.is_file())):
        found = path.stat()
        if stat.S_IMODE(found.st_mode) & 0o777 & ~allowed:
            yield fail(
                path,
                f"mode {mode_of(found.st_mode)}, of {owner(path, found.st_uid)}",
                f"{allowed:04o} or stricter",
                f"Run `chmod {'o=' if case.config.share_with_group else 'go='} {path}`: it holds images.",
            )
            return
    yield ok(folder, f"mode {mode_of(folder.stat().st_mode)}", f"{allowed:04o} or stricter")


def disk(case: Case) -> Iterator[Finding]:
    """The disk of the storage folder has the room below which nothing is taken in."""
    folder = _storage_disk(case.config)
    free, wanted = shutil.disk_usage(folder).free >> 20, case.config.intake.min_free_mib
    if free < wanted:
        yield fail(
            f"disk of {folder}",
            f"{free} MiB free",
            f"{wanted} MiB (intake.min_free_mib)",
            "Free some space: below it every object is answered with 0xA700.",
        )
    elif free < 2 * wanted:
        yield warn(
            f"disk of {folder}", f"{free} MiB free", f"twice {wanted} MiB", "Free some space before it is needed."
        )
    else:
        yield ok(f"disk of {folder}", f"{free} MiB free", f"{wanted} MiB")


def encrypted(case: Case) -> Iterator[Finding]:
    """The disk of the storage folder is encrypted, as far as the kernel tells: images lie there in clear."""
    folder = _storage_disk(case.config)
    device = folder.stat().st_dev
    block = case.root / "sys" / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}"
    if not block.exists():
        yield skipped(f"disk of {folder}", "a file system without a device: see how its host encrypts it")
    elif _is_encrypted(block):
        yield ok(f"disk of {folder}", "dm-crypt", "encrypted")
    else:
        remedy = "Put the storage folder on an encrypted disk (LUKS), or see that the host encrypts it."
        yield warn(f"disk of {folder}", "no dm-crypt below it", "encrypted", remedy)


def log_key(case: Case) -> Iterator[Finding]:
    """The key that stands for UIDs in the log is long enough, and nobody else's to read."""
    path = Path(case.config.log.key_file or Path(case.config.storage) / "log.key")
    try:
        found, key = path.stat(), path.read_bytes()
    except FileNotFoundError:
        if case.config.log.key_file:
            yield fail(path, "missing", "16 bytes and more", f"Make it: `head -c 32 /dev/urandom > {path}`.")
        else:
            yield ok(path, "not there: the gateway makes it", "16 bytes and more")
        return
    except OSError as error:
        yield fail(path, error.strerror, "a file that it may read", f"Give {path} to the gateway's user.")
        return
    if len(key.strip()) < LEAST_KEY_BYTES:
        remedy = "Remove it if no key was ever in it, and make another: `head -c 32 /dev/urandom > log.key`."
        yield fail(path, f"{len(key.strip())} bytes", f"{LEAST_KEY_BYTES} bytes and more", remedy)
    elif found.st_mode & 0o007:
        remedy = f"Run `chmod o= {path}`, and make another key if others had this one."
        yield fail(path, f"mode {mode_of(found.st_mode)}", "nobody else's", remedy)
    else:
        yield ok(path, f"{len(key)} bytes, mode {mode_of(found.st_mode)}", "nobody else's")


def secrets(case: Case) -> Iterator[Finding]:
    """Files of tokens and keys are there, and nobody else's to read."""
    for key, path in case.config.secret_files():
        try:
            found = os.stat(path)
        except OSError as error:
            yield fail(f"{key}, {path}", error.strerror, "a file", f"Make {path}, or correct {key}.")
            continue
        if found.st_mode & 0o007:
            yield fail(f"{key}, {path}", f"mode {mode_of(found.st_mode)}", "0600", f"Run `chmod 600 {path}`.")
        else:
            yield ok(f"{key}, {path}", f"mode {mode_of(found.st_mode)}", "0600")


def tokens(case: Case) -> Iterator[Finding]:
    """Each token file holds one token."""
    named = [(f"{name}.token_file", to.token_file) for name, to in _remotes(case.config)]
    if case.config.web:
        named.append(("web.token_file", case.config.web.token_file))
    for key, path in named:
        if path:
            try:
                read_token(path)
            except InvalidConfig as error:
                yield refused(f"{key}, {path}", error.message, "one line without blanks")
            else:
                yield ok(f"{key}, {path}", "holds a token", "one line without blanks")


def clear_text(case: Case) -> Iterator[Finding]:
    """Nothing leaves this machine unencrypted, unless `clear_text: true` says that it is meant."""
    sections = list(case.config.in_clear_text())
    for section in sections:
        remedy = "Give it tls, or set clear_text: true in it where the network is your own."
        yield warn(section, "clear text over a network", "TLS", remedy)
    if not sections:
        yield ok("connections", "encrypted, on this machine, or meant to be clear", "TLS")


def certificates(case: Case) -> Iterator[Finding]:
    """Certificates and keys of this gateway belong together, are valid for a month, and are of this host."""
    here = case.config
    for name, tls, host in _own_tls(here):
        yield from own(name, tls, _names(host), is_listener=name in ("dicom", "web"))


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


def ports(case: Case) -> Iterator[Finding]:
    """The gateway's ports are free, or it is the gateway that listens there."""
    listening = [("dicom", case.config.dicom), ("web", case.config.web)]
    for name, section in listening:
        if section is None or not section.port:
            continue
        host = section.host if section.host not in ("0.0.0.0", "::") else "127.0.0.1"  # noqa: S104  # compared only
        subject = f"{name}, {section.host}:{section.port}"
        problem = _why_not_bound(section.host, section.port)
        if problem == "":
            yield ok(subject, "free", "free, or this gateway")
        elif not is_taken(host, section.port):
            yield fail(subject, problem, "free, or this gateway", "Correct the host, or choose another port.")
        elif _is_running(case.config):
            yield ok(subject, "this gateway listens", "free, or this gateway")
        else:
            yield fail(subject, "another program listens", "free, or this gateway", "End it, or choose another port.")


def exposed(case: Case) -> Iterator[Finding]:
    """/metrics and /health are on the loopback interface, or let only monitoring in."""
    web = case.config.web
    if web and not is_loopback(web.host):
        remedy = "Set web.host to 127.0.0.1, or let only your monitoring reach it: /metrics needs no token."
        yield warn(f"web, {web.host}", "reached by other hosts", "127.0.0.1", remedy)
    elif web:
        yield ok(f"web, {web.host}", "loopback", "127.0.0.1")


def senders(case: Case) -> Iterator[Finding]:
    """Who may send is a list of hosts, not of the whole world: a sender may fill the disk down to min_free_mib."""
    if not case.config.dicom:
        return
    wide = [
        f"{peer.aet} from {network}"
        for peer in case.config.dicom.peers
        for network in peer.networks
        if network.num_addresses >= WIDE
        and not (isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 64)
    ]
    for each in wide:
        yield warn("dicom.peers", each, "addresses of senders", "Name the addresses that the sender calls from.")
    if not wide:
        yield ok("dicom.peers", f"{len(case.config.dicom.peers)} senders", "addresses of senders")


def watched_folder(case: Case) -> Iterator[Finding]:
    """The watched folder is there, lets the gateway take files, and is not everybody's to write."""
    if not case.config.folder:
        return
    path = Path(case.config.folder.path)
    if not path.is_dir() or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        what = "may not be read and written" if path.is_dir() else "no folder"
        yield fail(
            path, what, "a folder that it may take files from", f"Make {path}, and give it to the gateway's user."
        )
    elif path.stat().st_mode & 0o002:
        remedy = f"Run `chmod o-w {path}`: who writes into it has anything read that they can link."
        yield warn(path, f"mode {mode_of(path.stat().st_mode)}", "written by senders alone", remedy)
    elif path.resolve().is_relative_to(Path(case.config.storage).resolve()):
        yield fail(path, "inside the storage folder", "a folder of its own", "Watch a folder outside of `storage`.")
    else:
        yield ok(path, f"mode {mode_of(path.stat().st_mode)}", "written by senders alone")


def queue(case: Case) -> Iterator[Finding]:
    """The queue's database answers, and has the tables of this release."""
    subject, wanted = f"queue, {_shown(case.config)}", "the tables of this release"
    try:
        seen = _look(case.config)
    except InvalidConfig as error:
        yield refused(subject, error.message, wanted)
        return
    if seen is None or seen.is_new:
        yield ok(subject, "empty: the gateway makes its tables", wanted)
    elif seen.missing:
        yield warn(
            subject,
            f"without {', '.join(seen.missing)}",
            wanted,
            "Back it up and start this release once: it adds what is missing; a newer queue needs its release.",
        )
    else:
        yield ok(subject, "all tables", wanted)


def queue_password(case: Case) -> Iterator[Finding]:
    """No password stands in the configuration."""
    parsed = urlsplit(case.config.queue_url)
    if parsed.password:
        remedy = "Take it out of `queue`, and put it into a .pgpass of mode 0600 or use a certificate."
        yield fail("queue", "a password in gateway.yaml", "none", remedy)
    else:
        yield ok("queue", "no password in gateway.yaml", "none")


def dead_letters(case: Case) -> Iterator[Finding]:
    """No study was given up."""
    if seen := _answered(case.config):
        if seen.dead:
            remedy = "See `cxr-triton gateway status` for why, and `gateway retry` once it is mended."
            yield warn("dead letters", seen.dead, "none", remedy)
        else:
            yield ok("dead letters", "none", "none")


def database_clock(case: Case) -> Iterator[Finding]:
    """The clock of the queue's host agrees with this one: leases of several gateways go by their clocks."""
    if case.config.queue and not case.config.queue.startswith("sqlite") and (seen := _answered(case.config)):
        yield _skew("clock of the queue's host", seen.ahead_s, min(SKEW_S, case.config.read.lease_s / 4))


def echo(case: Case) -> Iterator[Finding]:
    """Each PACS answers a C-ECHO to this gateway's AE title."""
    from pynetdicom.sop_class import Verification

    from cxr_triton.client.gateway.association import Unreachable, associate
    from cxr_triton.client.gateway.dimse import UNCOMPRESSED

    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
    for name, to in _peers(case.config):
        if to.url:
            continue
        aet, host = to.pacs
        subject, wanted = f"{name}, {aet} at {host}:{to.port}", "C-ECHO answered with 0x0000"
        remedy = f"See host, port and AE title, and that the peer knows {case.config.own_aet} at this host."
        try:
            with associate(to, case.config.own_aet, {Verification: UNCOMPRESSED}) as association:
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
        answer = _ask(to, method, path)
        yield from _judged(subject, answer)


def peer_clocks(case: Case) -> Iterator[Finding]:
    """Clocks of web servers, by the Date of their answers, agree with this one."""
    for name, to in _peers(case.config):
        if not to.url:
            continue
        answer = _ask(to, "OPTIONS", "")
        said = email.utils.parsedate_to_datetime(answer.date).timestamp() if _is_date(answer.date) else None
        if said is not None:
            yield _skew(f"clock of {name}", said - time.time(), SKEW_S)


def reader(case: Case) -> Iterator[Finding]:
    """The server that readings are asked of is ready."""
    from cxr_triton.client.limits import Timeouts
    from cxr_triton.client.reader import Reader

    here = case.config.read
    wanted = "a ready server with the model cxr_reader"
    try:
        tls = here.tls.grpc() if here.tls else None
        with Reader(here.url, timeouts=Timeouts(connect_s=5.0), tls=tls) as connected:
            info = connected.server_info()
    except (CxrError, OSError) as error:
        message = error.message if isinstance(error, CxrError) else f"{error.strerror}; see read.tls"
        yield refused(f"read, {here.url}", message, wanted)
    else:
        yield ok(f"read, {here.url}", f"{info.name} {info.version} serves {info.model}", wanted)


class _Address(NamedTuple):
    host: str
    port: int


class _Answer(NamedTuple):
    """Status of an HTTP answer, 0 for none; its Date, and what kept it from coming."""

    status: int
    date: str = ""
    why: str = ""


def _ask(to: Remote, method: str, path: str) -> _Answer:
    """A request without a body, over the connection that the gateway would make; redirects are not followed."""
    parts = urlsplit(to.root)
    is_tls = parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    target = f"{parts.path}/{path}" if path else (parts.path or "/")
    try:
        headers = {"Accept-Encoding": "identity", **to.authorization()}
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
            connection.request(method, target, headers=headers)
            answer = connection.getresponse()
            return _Answer(answer.status, answer.headers.get("Date", ""))
        finally:
            connection.close()
    except InvalidConfig as error:
        return _Answer(0, why=error.message)
    except ssl.SSLError as error:
        return _Answer(0, why=f"no handshake of TLS ({getattr(error, 'verify_message', '') or error.reason})")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _Answer(0, why=getattr(error, "strerror", None) or type(error).__name__)


def _judged(subject: str, answer: _Answer) -> Iterator[Finding]:
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


def _storage_disk(here: Config) -> Path:
    """The storage folder, or the folder in which it will be made."""
    folder = Path(here.storage).absolute()
    return next(each for each in (folder, *folder.parents) if each.exists())


def _skew(subject: str, ahead_s: float, most_s: float) -> Finding:
    said, wanted = f"{abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}", f"within {most_s:g} s"
    if abs(ahead_s) <= most_s:
        return ok(subject, said, wanted)
    return fail(subject, said, wanted, "Keep both clocks by NTP.")


def _is_date(text: str) -> bool:
    try:
        return bool(email.utils.parsedate_to_datetime(text))
    except (ValueError, TypeError):
        return False


def _remotes(here: Config) -> Iterator[tuple[str, Remote]]:
    if here.priors:
        yield "priors", here.priors
    for destination in here.destinations:
        yield f"destinations.{destination.name}", destination


def _peers(here: Config) -> Iterator[tuple[str, Remote]]:
    """`_remotes`, with less patience than the gateway has."""
    for name, to in _remotes(here):
        yield name, replace(to, timeout_s=min(to.timeout_s, PATIENCE_S))


def _own_tls(here: Config) -> Iterator[tuple[str, TlsFiles, str]]:
    for name, section in (("dicom", here.dicom), ("web", here.web)):
        if section and section.tls:
            yield name, section.tls, section.host
    if here.read.tls:
        yield "read", here.read.tls, ""
    for name, to in _remotes(here):
        if to.tls:
            yield name, to.tls, ""


def _names(host: str) -> tuple[str, ...]:
    """What peers may call a listener by."""
    if is_loopback(host):
        return tuple(dict.fromkeys((host, "localhost", "127.0.0.1")))
    given = () if host in ("0.0.0.0", "::") else (host,)  # noqa: S104  # compared only
    return tuple(dict.fromkeys((*given, socket.gethostname(), socket.getfqdn())))


def _tls_address(to: Remote) -> _Address | None:
    """Where a peer speaks TLS; None where it does not, or behind a proxy, which endpoints look through."""
    if not to.url:
        return _Address(to.pacs[1], to.port) if to.tls else None
    parts = urlsplit(to.url)
    return _Address(parts.hostname or "", parts.port or 443) if parts.scheme == "https" and not to.proxy else None


def _why_not_bound(host: str, port: int) -> str:
    """What keeps a listener from its address; empty if nothing does."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def _is_running(here: Config) -> bool:
    """A gateway holds the lock of this one's name."""
    lock = Path(here.storage) / f"{here.name}.lock"
    inodes = {row.split()[5].rpartition(":")[2] for row in Path("/proc/locks").read_text().splitlines()}
    return lock.exists() and str(lock.stat().st_ino) in inodes


def _look(here: Config) -> Seen | None:
    from cxr_triton.client.gateway.database import look

    return look(here.queue_url)


def _answered(here: Config) -> Seen | None:
    try:
        return _look(here)
    except InvalidConfig:
        raise Unseen("the queue does not answer, see gateway.queue") from None


def _shown(here: Config) -> str:
    """The queue's URL without a name and a password in it."""
    scheme, slashes, rest = here.queue_url.partition("//")
    return scheme + slashes + rest.rpartition("@")[2].partition("?")[0]


def _shown_url(to: Remote) -> str:
    scheme, slashes, rest = to.root.partition("//")
    return scheme + slashes + rest.rpartition("@")[2]


def _is_encrypted(block: Path) -> bool:
    """A device of the kernel is dm-crypt's, or lies on one that is."""
    try:
        uuid = (block / "dm" / "uuid").read_text()
    except OSError:
        uuid = ""
    return uuid.startswith("CRYPT-") or any(_is_encrypted(below) for below in (block / "slaves").glob("*"))


def _row(name: str, run: Callable[[Case], Iterator[Finding]], **options: Any) -> Check:
    return Check(id=f"gateway.{name}", run=run, needs="config", extra="gateway", **options)


CHECKS = (
    Check(id="gateway.config", run=config),
    _row("storage", storage),
    _row("disk", disk),
    _row("encrypted_disk", encrypted),
    _row("log_key", log_key),
    _row("secrets", secrets),
    _row("tokens", tokens),
    _row("folder", watched_folder),
    _row("clear_text", clear_text),
    _row("certificates", certificates),
    _row("ports", ports),
    _row("exposed", exposed),
    _row("senders", senders),
    _row("queue_password", queue_password),
    _row("queue", queue, modules=_GATEWAY, is_connecting=True, limit_s=45),
    _row("queue_clock", database_clock, modules=_GATEWAY, is_connecting=True, limit_s=45),
    _row("dead_letters", dead_letters, modules=_GATEWAY, is_connecting=True, limit_s=45),
    _row("peer_certificates", peer_certificates, is_connecting=True, limit_s=120),
    _row("echo", echo, modules=("pynetdicom",), is_connecting=True, limit_s=120),
    _row("endpoints", endpoints, is_connecting=True, limit_s=120),
    _row("peer_clocks", peer_clocks, is_connecting=True, limit_s=120),
    _row("reader", reader, modules=("grpc", "tritonclient"), is_connecting=True, limit_s=45),
)
