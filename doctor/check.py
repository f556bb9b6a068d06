"""What a check is, what it finds, and what it is told of the deployment. It changes nothing and sends no picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_triton.client.limits import NO_ACCESS, Access
from cxr_triton.engines.bundle import MANIFEST, Bundle
from cxr_triton.engines.cpu import Cpu
from cxr_triton.engines.serving import BUNDLE
from cxr_triton.errors import CxrError, InvalidRequest

if TYPE_CHECKING:
    from cxr_triton.client.gateway.config import Config, Remote

OK, WARN, FAIL, SKIPPED = STATUSES = ("ok", "warn", "fail", "skipped")
REPOSITORY = "repository"
"""Folder of a `cxr-triton make-engine` that holds the model repository."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the examination.

    Attributes
    ----------
    id : str
        Of the check, ``GROUP.NAME``.
    status : str
        One of `STATUSES`. ``warn``: it works, and should be otherwise; ``skipped``: it could not be looked at.
    subject : str
        What was looked at, and where.
    found, wanted : str
        What is there, against what has to be.
    remedy : str
        What to do, in a sentence; empty where it is ok.
    """

    id: str = ""
    status: str
    subject: str
    found: str
    wanted: str = ""
    remedy: str = ""

    @property
    def group(self) -> str:
        """What the check looks at: ``machine``, ``packages``, ``repository``, ``server``, ``openai`` or ``gateway``."""
        return self.id.partition(".")[0]


def ok(subject: object, found: object, wanted: str = "") -> Finding:
    """It is as it has to be."""
    return Finding(status=OK, subject=str(subject), found=str(found), wanted=wanted)


def warn(subject: object, found: object, wanted: str, remedy: str) -> Finding:
    """It works, and should be otherwise."""
    return Finding(status=WARN, subject=str(subject), found=str(found), wanted=wanted, remedy=remedy)


def fail(subject: object, found: object, wanted: str, remedy: str) -> Finding:
    """It does not work, or lets somebody in."""
    return Finding(status=FAIL, subject=str(subject), found=str(found), wanted=wanted, remedy=remedy)


def skipped(subject: object, found: object, remedy: str = "") -> Finding:
    """It could not be looked at."""
    return Finding(status=SKIPPED, subject=str(subject), found=str(found), remedy=remedy)


def refused(subject: object, message: str, wanted: str) -> Finding:
    """A failure that one of our own errors words: what is wrong, and after its last semicolon what to do."""
    found, remedy = told(message)
    return fail(subject, found, wanted, sentence(remedy or "look it up in docs/troubleshooting.md"))


def told(message: str) -> tuple[str, str]:
    """What an error of ours says is wrong, and what it says to do."""
    found, _, remedy = message.rpartition("; ")
    return (found, remedy) if found else (message, "")


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "?")) else ".")


class Absent(Exception):
    """The user named nothing of the kind, so there is nothing to look at."""


class Unseen(Exception):
    """What was to be looked at does not answer, which another check says; the text is why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a check is told.

    Attributes
    ----------
    path : Path, optional
        A model repository, an engine bundle, or the folder of a `make-engine`.
    url : str
        Host and port of Triton's gRPC endpoint.
    is_asked : bool
        The user named `url`: there has to be a server.
    access : Access
        How it lets a client in.
    config_path : Path, optional
        Of the gateway's ``gateway.yaml``.
    openai_url : str
        Of a running `cxr-triton openai`, as a browser takes it.
    offline : bool
        Open no connection.
    root : Path
        Under which ``proc``, ``sys``, ``dev`` and ``etc`` of the system are.
    """

    path: Path | None = None
    url: str = "127.0.0.1:8001"
    is_asked: bool = False
    access: Access = NO_ACCESS
    config_path: Path | None = None
    openai_url: str = ""
    offline: bool = False
    root: Path = Path("/")

    @property
    def folder(self) -> Path:
        """`path`; raises `Absent`, as all that is of it."""
        if self.path is None:
            raise Absent
        return self.path

    @cached_property
    def repository(self) -> Path:
        """The folder of the model repository; raises `Absent` where a bundle alone was given."""
        for folder in (self.folder, self.folder / REPOSITORY):
            if (folder / BUNDLE).is_dir() or (folder / "cxr_reader").is_dir():
                return folder
        raise Absent

    @property
    def has_repository(self) -> bool:
        """Whether `repository` is there."""
        try:
            return bool(self.repository)
        except Absent:
            return False

    @property
    def served(self) -> Path:
        """The repository, or the bundle where a bundle alone was given; raises as `bundle_path`."""
        return self.repository if self.has_repository else self.bundle_path

    @property
    def bundle_path(self) -> Path:
        """The folder of the bundle.

        Raises
        ------
        InvalidRequest
            `path` holds none.
        """
        folders = [self.folder, self.folder / "bundle"]
        if self.has_repository:
            folders.insert(0, self.repository / BUNDLE)
        for folder in folders:
            if (folder / MANIFEST).is_file():
                return folder
        raise InvalidRequest(
            f"{self.path} holds no {MANIFEST}, so it is neither a bundle nor a model repository; give the folder that "
            "cxr-triton build, package or make-engine wrote"
        )

    @cached_property
    def bundle(self) -> Bundle:
        """The bundle, names and sizes of its files compared; raises `InvalidRequest` and `InvalidBundle`."""
        return Bundle.open(self.bundle_path, verify=False)

    @property
    def recipe(self) -> dict:
        """Of the bundle; empty without one, or without a bundle that can be opened."""
        try:
            return self.bundle.manifest.get("recipe") or {}
        except (Absent, CxrError):
            return {}

    @cached_property
    def config(self) -> Config:
        """The gateway's configuration; raises `InvalidConfig`."""
        if self.config_path is None:
            raise Absent
        from cxr_triton.client.gateway.config import load_config

        return load_config(self.config_path)

    @cached_property
    def api(self) -> Remote:
        """The server of OpenAI's API."""
        if not self.openai_url:
            raise Absent
        from cxr_triton.client.endpoint import TlsFiles
        from cxr_triton.client.gateway.config import Remote

        ca = self.access.tls.ca if self.access.tls else None
        return Remote(url=self.openai_url, tls=TlsFiles(ca=str(ca)) if ca else None, timeout_s=5.0)

    @property
    def host(self) -> str:
        """Of `url`, without brackets."""
        return self.url.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Of `url`."""
        return int(self.url.rpartition(":")[2])

    @property
    def cpu(self) -> Cpu:
        """The system's processor."""
        return Cpu.of(self.read("proc/cpuinfo"))

    def read(self, path: str) -> str:
        """A file of the system under `root`; empty where there is none."""
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return ""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table of checks.

    Attributes
    ----------
    id : str
        ``GROUP.NAME``; stable, for scripts.
    run : callable
        Gives findings; the first line of its docstring says in the documents what it looks at.
    needs : str
        Attribute of `Case` without which there is nothing to look at: `folder`, `repository`, `bundle`,
        `config`, `api`.
    modules : tuple of str
        Of an extra; without them the finding is ``skipped`` with the command that brings them.
    extra : str
        That one.
    is_connecting : bool
        Opens connections: left out with ``--offline``.
    limit_s : float
        How long it may take.
    """

    id: str
    run: Callable[[Case], Iterator[Finding]]
    needs: str = ""
    modules: tuple[str, ...] = ()
    extra: str = ""
    is_connecting: bool = False
    limit_s: float = 15.0

    @property
    def text(self) -> str:
        """What it looks at."""
        return (self.run.__doc__ or "").strip().splitlines()[0].rstrip(".")


def is_writable_by_others(mode: int) -> bool:
    """By the group or by everybody."""
    return bool(mode & 0o022)


def owner(path: str | os.PathLike, uid: int) -> str:
    """Name of the user that owns a file."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def mode_of(mode: int) -> str:
    """Permissions as `chmod` takes them."""
    return f"{mode & 0o7777:04o}"
