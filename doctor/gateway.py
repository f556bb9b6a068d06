"""A gateway's own side: its configuration, folders, secrets, certificates, ports and queue, which is read only."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cxr_triton.client.address import is_loopback
from cxr_triton.client.endpoint import TlsFiles
from cxr_triton.client.gateway.config import LEAST_KEY_BYTES, Config
from cxr_triton.client.limits import read_token
from cxr_triton.doctor.certificates import own
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
    sentence,
    skipped,
    told,
    warn,
)
from cxr_triton.doctor.listening import is_taken
from cxr_triton.doctor.peers import SKEW_S, skew
from cxr_triton.errors import InvalidConfig

if TYPE_CHECKING:
    from cxr_triton.client.gateway.database import Seen

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
        yield fail(
            case.config_path, found, "valid", sentence(remedy or "see `cxr-triton gateway example` for all keys")
        )


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
    named = [(f"{name}.token_file", to.token_file) for name, to in case.config.remotes()]
    if case.config.web:
        named.append(("web.token_file", case.config.web.token_file))
    named.append(("read.token_file", case.config.read.token_file))
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
        yield skew("clock of the queue's host", seen.ahead_s, min(SKEW_S, case.config.read.lease_s / 4))


def _storage_disk(here: Config) -> Path:
    """The storage folder, or the folder in which it will be made."""
    folder = Path(here.storage).absolute()
    return next(each for each in (folder, *folder.parents) if each.exists())


def _own_tls(here: Config) -> Iterator[tuple[str, TlsFiles, str]]:
    for name, section in (("dicom", here.dicom), ("web", here.web)):
        if section and section.tls:
            yield name, section.tls, section.host
    if here.read.tls:
        yield "read", here.read.tls, ""
    for name, to in here.remotes():
        if to.tls:
            yield name, to.tls, ""


def _names(host: str) -> tuple[str, ...]:
    """What peers may call a listener by."""
    if is_loopback(host):
        return tuple(dict.fromkeys((host, "localhost", "127.0.0.1")))
    given = () if host in ("0.0.0.0", "::") else (host,)  # noqa: S104  # compared only
    return tuple(dict.fromkeys((*given, socket.gethostname(), socket.getfqdn())))


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
)
