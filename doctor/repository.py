"""A bundle and the repository that serves it: whole, verified, for this machine, and nobody else's to change."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from cxr_triton.doctor.check import (
    Case,
    Check,
    Finding,
    fail,
    is_writable_by_others,
    mode_of,
    ok,
    owner,
    refused,
    sentence,
    skipped,
    told,
    warn,
)
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.verify.record import IN_ENGINE, require_verified
from cxr_triton.engines.verify.record import subject as subject_of
from cxr_triton.errors import CxrError, NotVerified
from cxr_triton.triton_repo.integrity import RECORD, differences
from cxr_triton.triton_repo.tuned import RECORD as TUNED
from cxr_triton.triton_repo.tuned import differences as differs
from cxr_triton.triton_repo.tuned import other_versions, record_of

_NAMED = 5
HASHING_S = 300.0


def files(case: Case) -> Iterator[Finding]:
    """Every file of the bundle is the one that its manifest names, and the installed libraries read it."""
    try:
        path = case.bundle_path
        bundle = Bundle.open(path)
    except (CxrError, OSError) as error:
        message = error.message if isinstance(error, CxrError) else str(error)
        yield refused(f"bundle {case.folder}", message, "as cxr-triton build wrote it")
    else:
        said = f"{bundle.profile.name}, {bundle.engine}, {bundle.precision}, digest {bundle.digest[:12]}"
        yield ok(f"bundle {path}", said, "as cxr-triton build wrote it")


def record(case: Case) -> Iterator[Finding]:
    """The repository is as `cxr-triton package` wrote it, file by file."""
    found = [each for each in differences(case.repository) if "__pycache__" not in each]  # `serve` removes them
    for each in found[:_NAMED]:
        name = each.removesuffix(" was changed").removesuffix(" was added").removesuffix(" is missing")
        yield fail(
            case.repository / name,
            each,
            f"as {RECORD} says",
            "Package the bundle again; to serve edits of your own, look at what `serve --modified` lists.",
        )
    if len(found) > _NAMED:
        yield fail(case.repository, f"{len(found) - _NAMED} more files differ", "none", "Package the bundle again.")
    if not found:
        yield ok(case.repository, f"as {RECORD} says")


def verified(case: Case) -> Iterator[Finding]:
    """The bundle has passed the verification gate as it is now."""
    try:
        made = require_verified(case.bundle)
    except NotVerified as error:
        found, remedy = told(error.message)
        tell = fail if case.bundle.manifest.get("verification") else warn
        yield tell("verification", found, "a passing record of `cxr-triton verify`", sentence(remedy))
    else:
        yield ok("verification", f"passed on {made.get('made')}", "a passing record")


def golden(case: Case) -> Iterator[Finding]:
    """Reference readings of a `make-engine` are there, and are of this bundle: `cxr-triton golden` needs them."""
    if not (case.folder / "bundle").is_dir():
        yield skipped("reference readings", "only the folder of a make-engine has them")
        return
    path = case.folder / IN_ENGINE
    try:
        made = json.loads(path.read_bytes())
        is_ours, count = made["subject"] == subject_of(case.bundle.manifest), len(made["details"]["images"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({type(error).__name__})"
        yield warn(path, why, "a record with readings", "Run `make-engine` again: it verifies what has changed.")
        return
    if is_ours:
        yield ok(path, f"{count} readings of this bundle")
    else:
        yield fail(path, "of another bundle, or an older state of it", "of this bundle", "Run `make-engine` again.")


def needs(case: Case) -> Iterator[Finding]:
    """The machine has what the bundle's engines need: packages, GPU, the version that wrote a plan, a driver."""
    graphs = {"vision": engine(case.bundle.vision_engine), "decoder": engine(case.bundle.engine)}
    if graphs["decoder"].in_container:  # it brings the other's library along
        graphs.pop("vision")
    told_of = set()
    for graph, each in graphs.items():
        for need in each.needs(case.bundle, graph):
            if (each.name, need) in told_of:
                continue
            told_of.add((each.name, need))
            subject = f"{need.what}, for {each.name}"
            if need.is_met:
                yield ok(subject, need.found, need.wanted)
            else:
                tell = warn if need.is_met is None else fail
                yield tell(subject, need.found, need.wanted, sentence(need.remedy))


def permissions(case: Case) -> Iterator[Finding]:
    """Nobody but its owner may write the repository or the bundle, which are code."""
    folder = case.served
    wrong = 0
    for path in _all(folder):
        found = path.lstat()
        if path.is_symlink() or not is_writable_by_others(found.st_mode):
            continue
        wrong += 1
        if wrong <= _NAMED:
            yield fail(
                path,
                f"mode {mode_of(found.st_mode)}",
                "writable by its owner alone",
                f"Run `chmod -R go-w {folder}`: model.py is code, and an engine a program.",
            )
    if not wrong:
        is_mounted = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
        yield ok(folder, "on a read-only mount" if is_mounted else "writable by its owner alone", "its owner alone")


def ownership(case: Case) -> Iterator[Finding]:
    """Everything in the repository is of one user, root or the one that looks."""
    folder = case.served
    strangers = {found.st_uid for path in _all(folder) if (found := path.lstat()).st_uid not in (0, os.geteuid())}
    if strangers:
        names = ", ".join(owner(folder, uid) for uid in sorted(strangers))
        yield warn(
            folder,
            f"files of {names}",
            "of root or of who serves it",
            f"Run `chown -R` on {folder} if you do not trust {names}: who owns a file may change it.",
        )
    else:
        yield ok(folder, "of root or of who looks", "of root or of who serves it")


def log(case: Case) -> Iterator[Finding]:
    """The server's log beside the repository is its user's alone."""
    path = case.repository.resolve().with_name(case.repository.resolve().name + ".log")
    if not path.exists():
        yield ok(path, "not there: no server has run here", "mode 0600")
    elif path.stat().st_mode & 0o077:
        yield fail(path, f"mode {mode_of(path.stat().st_mode)}", "mode 0600", f"Run `chmod 600 {path}`.")
    else:
        yield ok(path, f"mode {mode_of(path.stat().st_mode)}", "mode 0600")


def packaged(case: Case) -> Iterator[Finding]:
    """The repository says of itself that its bundle was verified."""
    path = case.repository / "cxr_reader" / "1" / "VERIFICATION"
    try:
        state, said = [*path.read_text().splitlines(), "", ""][:2]
    except OSError:
        yield fail(path, "missing", "passed", "Package the bundle again.")
        return
    if state == "passed":
        yield ok("packaged", said, "passed")
    else:
        yield warn("packaged", said or state, "passed", "Verify the bundle and package it again.")


def tuned(case: Case) -> Iterator[Finding]:
    """The settings were measured on this machine's CPU, with these versions, where they were measured."""
    path = case.repository / TUNED
    try:
        made = record_of(case.repository)
    except CxrError as error:
        yield refused(path, error.message, "a record of `cxr-triton tune`")
        return
    if made is None:
        yield ok("settings", "those of `package`, not measured")
        return
    found = [*differs(made, case.cpu), *other_versions(made)]
    if found:
        yield warn(path, "; ".join(found), "as on this machine", f"Run `cxr-triton tune {case.repository}` again.")
    else:
        yield ok(path, f"measured on {made['date'][:10]}", "as on this machine")


def _all(folder: Path) -> Iterator[Path]:
    yield folder
    yield from sorted(folder.rglob("*"))


CHECKS = (
    Check(id="repository.files", run=files, needs="folder", limit_s=HASHING_S),
    Check(id="repository.record", run=record, needs="repository", limit_s=HASHING_S),
    Check(id="repository.needs", run=needs, needs="bundle", limit_s=60),
    Check(id="repository.verified", run=verified, needs="bundle"),
    Check(id="repository.packaged", run=packaged, needs="repository"),
    Check(id="repository.tuned", run=tuned, needs="repository"),
    Check(id="repository.golden", run=golden, needs="bundle"),
    Check(id="repository.permissions", run=permissions, needs="served"),
    Check(id="repository.ownership", run=ownership, needs="served"),
    Check(id="repository.log", run=log, needs="repository"),
)
