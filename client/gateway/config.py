"""`gateway.yaml`: what the gateway listens on, reads, and delivers; frozen and validated, unknown keys refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from cxr_triton.client.address import is_loopback, leaves_machine
from cxr_triton.client.endpoint import Http, TlsFiles
from cxr_triton.client.gateway.doors import Dicom, Folder, Web, Worklist, require_aet
from cxr_triton.client.limits import Access, Timeouts, read_token
from cxr_triton.client.objects import KINDS
from cxr_triton.config import Checked, build, in_range, one_of, read_yaml
from cxr_triton.errors import InvalidConfig
from cxr_triton.identity import IDENTIFIERS

EXAMPLE = Path(__file__).with_name("gateway.yaml")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LEAST_KEY_BYTES = 16
"""Of the key that stands for UIDs in the log."""


@dataclass(frozen=True, kw_only=True)
class Intake(Checked):
    """What is accepted from whatever door.

    Attributes
    ----------
    max_object_mib : int
        Largest object.
    min_free_mib : int
        Room that has to stay on the disk of the storage folder; below it objects are answered with 0xA700 (507).
    """

    max_object_mib: int = in_range(1, 4096, default=128)
    min_free_mib: int = in_range(0, 1 << 24, default=1024)


@dataclass(frozen=True, kw_only=True)
class Grouping(Checked):
    """When a study is complete: nothing new for `quiet_s`, or `max_wait_s` after its first image."""

    quiet_s: float = in_range(0.0, 86400.0, default=30.0)
    max_wait_s: float = in_range(0.0, 86400.0, default=300.0)


@dataclass(frozen=True, kw_only=True)
class Reading(Checked):
    """How studies are read.

    Attributes
    ----------
    url : str
        Host and port of Triton's gRPC endpoint.
    max_images : int
        Images of a study in one request, the last taken ones, frontal views before others. A model takes what its
        profile says (`max_images` of the task): NV-Reason-CXR-3B one, CheXOne four.
    concurrency : int
        Readings at once.
    max_attempts : int
        Failures that may pass before a study becomes a dead letter.
    retry_s : tuple of float
        Waits between attempts, the last one repeated; each is spread by a third.
    drain_s : float
        How long readings under way may take once the gateway was told to stop; then they are given back.
    lease_s : float
        After so long without a sign of life of a gateway another one takes its study.
    unchecked_reading : bool
        Take readings of a server that does not say which images they are of.
    identifiers : str, optional
        How a reading names its images' UIDs: ``plain`` or ``hashed``; by default as the server does, plain.
    clear_text : bool
        Off the loopback interface without `tls` on purpose: nothing is said about it.
    token_file : str, optional
        File with the bearer token for the front door at `url`; read for each call. Off the loopback interface it
        needs `tls`.
    """

    url: str = "127.0.0.1:8001"
    tls: TlsFiles | None = None
    token_file: str | None = None
    task: str | None = None
    mode: str | None = None
    max_images: int = in_range(1, 16, default=1)
    concurrency: int = in_range(1, 64, default=2)
    first_delta_s: float = in_range(0.1, 86400.0, default=300.0)
    idle_s: float = in_range(0.1, 86400.0, default=60.0)
    total_s: float = in_range(0.1, 86400.0, default=900.0)
    max_attempts: int = in_range(1, 1000, default=20)
    retry_s: tuple[float, ...] = (1.0, 5.0, 15.0, 60.0)
    drain_s: float = in_range(0.0, 3600.0, default=15.0)
    lease_s: float = in_range(1.0, 3600.0, default=60.0)
    unchecked_reading: bool = False
    identifiers: str | None = None
    clear_text: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.identifiers not in (None, *IDENTIFIERS):
            raise InvalidConfig(f"identifiers: {self.identifiers!r:.40} is none of {', '.join(IDENTIFIERS)}")
        if self.token_file and not self.tls and leaves_machine(self.url):
            raise InvalidConfig(f"tls: is missing and url is {self.url}, where the token could be read on its way")
        _require_ladder("retry_s", self.retry_s)

    @property
    def access(self) -> Access:
        """How the reader is let in."""
        return Access(self.tls.grpc() if self.tls else None, self.token_file)

    @property
    def timeouts(self) -> Timeouts:
        """Limits of each reading, as the reader takes them."""
        return Timeouts(first_delta_s=self.first_delta_s, idle_s=self.idle_s, total_s=self.total_s)


class Unreachable(Exception):
    """The destination, not a result: nothing can be sent there now."""


@dataclass(frozen=True, kw_only=True)
class Remote(Checked):
    """Another system: a PACS with `aet`, `host` and `port`, or a web server at `url`.

    Attributes
    ----------
    token_file : str, optional
        File with the bearer token for `url`.
    proxy : str, optional
        HTTP proxy to `url`; none by default, whatever the environment says.
    clear_text : bool
        Allows a token over ``http://`` off the loopback interface; says of anything else that it is meant.
    """

    aet: str | None = None
    host: str | None = None
    port: int = in_range(1, 65535, default=104)
    tls: TlsFiles | None = None
    url: str | None = None
    token_file: str | None = None
    proxy: str | None = None
    clear_text: bool = False
    timeout_s: float = in_range(0.1, 600.0, default=30.0)

    def __post_init__(self):
        super().__post_init__()
        for name, url in (("url", self.url), ("proxy", self.proxy)):
            if url is not None and not (url.startswith(("http://", "https://")) and _host(url)):
                raise InvalidConfig(f"{name}: {_without_user(url)!r:.80} has to start with http(s):// and name a host")
        if self.url and self.is_clear and not self.clear_text and (self.token_file or "@" in urlsplit(self.url).netloc):
            raise InvalidConfig(
                f"url: {_without_user(self.url)!r:.80} is not encrypted, and the token could be read on its way; "
                "use https://, or set clear_text: true where something else encrypts"
            )

    @property
    def is_clear(self) -> bool:
        """Whether what goes there leaves this machine unencrypted."""
        if self.url:
            return self.url.startswith("http://") and (bool(self.proxy) or not is_loopback(_host(self.url)))
        return not self.tls and not is_loopback(self.host or "")

    @property
    def pacs(self) -> tuple[str, str]:
        """AE title and host; raises `InvalidConfig` where one is missing."""
        if not self.host or not self.aet:
            raise InvalidConfig("host: aet and host of a dicom destination are needed")
        return self.aet, self.host

    @property
    def root(self) -> str:
        """`url` without a slash at its end."""
        return (self.url or "").rstrip("/")

    def authorization(self) -> dict[str, str]:
        """HTTP header with the token of `token_file`, where there is one."""
        return {"Authorization": f"Bearer {read_token(self.token_file)}"} if self.token_file else {}


@dataclass(frozen=True, kw_only=True)
class Priors(Remote):
    """Where the patient's earlier radiograph is fetched before a study is read: a PACS (C-FIND, C-GET) or QIDO/WADO-RS.

    Attributes
    ----------
    aet, host, port : str, str, int
        The PACS.
    url : str, optional
        DICOMweb root in its place.
    max_age_days : int
        Older ones are left out.
    total_s : float
        What one answer may take to its end; `timeout_s` is for each step of it.
    task : str, optional
        Task of the profile when a prior was found, such as a comparison.
    """

    max_age_days: int = in_range(1, 36500, default=1825)
    total_s: float = in_range(0.1, 86400.0, default=300.0)
    task: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if bool(self.url) == bool(self.aet and self.host):
            raise InvalidConfig("url: give either the url of a DICOMweb server, or aet and host of a PACS")


@dataclass(frozen=True, kw_only=True)
class Results(Checked):
    """What is made of a reading; see `docs/sr.md`."""

    kinds: tuple[str, ...] = ("findings_sr", "text_sr")

    def __post_init__(self):
        super().__post_init__()
        for kind in self.kinds:
            if kind not in KINDS:
                raise InvalidConfig(f"kinds: {kind!r} is none of {', '.join(KINDS)}")
        if not self.kinds:
            raise InvalidConfig("kinds: is empty; name at least one")


@dataclass(frozen=True, kw_only=True)
class Destination(Remote):
    """Where results go: `dicom` (C-STORE to `aet` at `host`:`port`), `stow` (STOW-RS to `url`), `fhir` (PUT to `url`).

    Attributes
    ----------
    commitment : bool
        Ask for storage commitment, and count a result as delivered only then. The answer may come on any association.
    commitment_s : float
        After so long without an answer the request is sent again.
    retry_s : tuple of float
        Waits between attempts, the last one repeated; each is spread by a third.
    give_up_s : float
        A result that was not delivered for so long becomes a dead letter.
    """

    name: str
    kind: str = one_of(("dicom", "stow", "fhir"), default="dicom")
    commitment: bool = False
    commitment_s: float = in_range(0.1, 86400.0, default=300.0)
    retry_s: tuple[float, ...] = (2.0, 10.0, 60.0, 300.0, 1800.0)
    give_up_s: float = in_range(1.0, 31536000.0, default=259200.0)

    def __post_init__(self):
        super().__post_init__()
        if not _NAME.fullmatch(self.name):
            raise InvalidConfig(f"name: {self.name!r:.80} has to be letters, digits, '.', '_' or '-'")
        if self.kind == "dicom":
            aet, _ = self.pacs
            require_aet("aet", aet)
        elif not self.url:
            raise InvalidConfig(
                f"url: {_without_user(self.url or '')!r:.80} of a {self.kind} destination has to start with http(s)://"
            )
        elif self.commitment:
            raise InvalidConfig(f"commitment: is of dicom destinations, {self.kind} has none; remove it")
        _require_ladder("retry_s", self.retry_s)


@dataclass(frozen=True, kw_only=True)
class Retention(Checked):
    """How long objects, results and their history stay after a study is done or dropped, and dead.

    Attributes
    ----------
    rejected_h : float
        How long files stay in the ``rejected/`` of a watched folder.
    """

    done_h: float = in_range(0.0, 1e6, default=24.0)
    dead_h: float = in_range(0.0, 1e6, default=720.0)
    rejected_h: float = in_range(0.0, 1e6, default=720.0)


@dataclass(frozen=True, kw_only=True)
class Logging(Checked):
    """JSON lines on standard error. UIDs appear as HMAC-SHA256 under a key, so that lines of one study can be joined.

    Attributes
    ----------
    key_file : str, optional
        The key; by default a random one that is kept in the storage folder.
    """

    level: str = one_of(("debug", "info", "warning", "error"), default="info")
    key_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """The whole file.

    Attributes
    ----------
    name : str
        Of this gateway among those that share a queue.
    storage : str
        Folder of received objects and results; gateways that share a queue share it.
    queue : str, optional
        SQLAlchemy URL, such as ``postgresql+psycopg://gateway@db/cxr``; by default SQLite in the storage folder.
    share_with_group : bool
        Files and folders are also of the user's group to read and write: 0660 and 2770 in place of 0600 and 0700.
    """

    name: str = "gateway"
    storage: str
    queue: str | None = None
    share_with_group: bool = False
    dicom: Dicom | None = None
    web: Web | None = None
    worklist: Worklist | None = None
    folder: Folder | None = None
    intake: Intake = field(default_factory=Intake)
    group: Grouping = field(default_factory=Grouping)
    read: Reading = field(default_factory=Reading)
    priors: Priors | None = None
    results: Results = field(default_factory=Results)
    destinations: tuple[Destination, ...]
    retention: Retention = field(default_factory=Retention)
    log: Logging = field(default_factory=Logging)

    def __post_init__(self):
        super().__post_init__()
        if not _NAME.fullmatch(self.name):
            raise InvalidConfig(f"name: {self.name!r:.80} has to be letters, digits, '.', '_' or '-'")
        names = [destination.name for destination in self.destinations]
        if not names or len(set(names)) != len(names):
            raise InvalidConfig("destinations: at least one is needed, each with a name of its own")
        if any(destination.commitment for destination in self.destinations) and not self.dicom:
            raise InvalidConfig("dicom: is missing; the answer to a storage commitment needs a listener")
        if not self.dicom and not self.folder and not (self.web and self.web.stow):
            raise InvalidConfig("dicom: is missing; nothing would come in without it, web.stow or folder")
        if self.priors and self.read.max_images < 2:
            raise InvalidConfig("read.max_images: is 1, which leaves no room for a prior; raise it or drop priors")

    @property
    def own_aet(self) -> str:
        """AE title under which this gateway calls others."""
        return self.dicom.aet if self.dicom else "CXR_GATEWAY"

    @property
    def queue_url(self) -> str:
        """SQLAlchemy URL of the queue."""
        return self.queue or f"sqlite:///{Path(self.storage).absolute()}/queue.sqlite"

    def in_clear_text(self) -> Iterator[str]:
        """Sections whose data leave this machine unencrypted without a `clear_text` that says so."""
        for name, here in (("dicom", self.dicom), ("web", self.web)):
            if here and not (here.tls or here.clear_text or is_loopback(here.host)):
                yield name
        if not (self.read.tls or self.read.clear_text or not leaves_machine(self.read.url)):
            yield "read"
        for name, there in self.remotes():
            if there.is_clear and not there.clear_text:
                yield name

    def secret_files(self) -> Iterator[tuple[str, str]]:
        """Keys and paths of the files that nobody else should be able to read."""
        if self.log.key_file:
            yield "log.key_file", self.log.key_file
        here: list[tuple[str, Dicom | Http | Remote]] = [*self.remotes()]
        doors = (("dicom", self.dicom), ("web", self.web), ("worklist", self.worklist))
        here += [(name, one) for name, one in doors if one]
        if self.worklist:
            yield "worklist.password_file", self.worklist.password_file
        for name, one in (*here, ("read", self.read)):
            if token := getattr(one, "token_file", None):
                yield f"{name}.token_file", token
        for name, tls in [(name, one.tls) for name, one in here] + [("read", self.read.tls)]:
            if tls and tls.cert:
                yield f"{name}.tls.key", tls.key or tls.cert

    def remotes(self) -> Iterator[tuple[str, Remote]]:
        """Sections of what this gateway connects to."""
        if self.priors:
            yield "priors", self.priors
        for destination in self.destinations:
            yield f"destinations.{destination.name}", destination


def load_config(path: str | os.PathLike) -> Config:
    """The configuration in a YAML file.

    Raises
    ------
    InvalidConfig
        Not YAML, or a key that is unknown, missing, of the wrong type or out of range.
    """
    path = Path(path)
    return build(Config, read_yaml(path, InvalidConfig), path.name)


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _without_user(url: str) -> str:
    """A URL as it may be shown: without a name and a password in it."""
    scheme, slashes, rest = url.rpartition("//")
    return scheme + slashes + rest.rpartition("@")[2]


def _require_ladder(name: str, waits: tuple[float, ...]) -> None:
    if not waits or any(not wait > 0 for wait in waits):
        raise InvalidConfig(f"{name}: {list(waits)} has to be one or more waits over 0 s")
