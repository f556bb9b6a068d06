"""Python and the packages: versions against what is asked for and what was tested, and which verbs work."""

from __future__ import annotations

import site
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import cxr_triton
from cxr_triton.cli import VERBS
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
    warn,
)
from cxr_triton.errors import ServerMismatch
from cxr_triton.extras import EXTRAS, missing_modules, remedy

TESTED = tomllib.loads(Path(__file__).with_name("tested.toml").read_text("utf-8"))
"""Version that the tests ran with, by distribution."""
PYTHONS = ((3, 11), (3, 13))
"""First and last that were tested."""


def requirements() -> Iterator[tuple[str, Requirement]]:
    """What an installation of this distribution asks for in this Python, each after its extra; empty for always."""
    for each in map(Requirement, metadata.requires("cxr-triton") or ()):
        if each.name == "cxr-triton":
            continue  # an extra that takes in another
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            yield "", each
        else:
            yield from ((extra, each) for extra in EXTRAS if each.marker.evaluate({"extra": extra}))


def python(case: Case) -> Iterator[Finding]:
    """The Python is one that was tested, and whether it has a local server."""
    here, said = sys.version_info[:2], ".".join(map(str, sys.version_info[:3]))
    first, last = (".".join(map(str, version)) for version in PYTHONS)
    if here < PYTHONS[0]:
        yield fail("Python", said, f"{first} to {last}", f"Install into Python {first} or later.")
    elif here > PYTHONS[1]:
        yield warn("Python", said, f"{first} to {last}", f"Use Python {last}: this one was not tested.")
    else:
        yield ok("Python", said, f"{first} to {last}")


def required(case: Case) -> Iterator[Finding]:
    """Packages that every verb needs are here, within their bounds."""
    yield from _within([asked for asked in requirements() if not asked[0]], "every verb")


def bounds(case: Case) -> Iterator[Finding]:
    """Packages of each extra that is installed lie within that extra's bounds."""
    here = [extra for extra in EXTRAS if not missing_modules(extra)]
    yield from _within([asked for asked in requirements() if asked[0] in here], "installed extras", is_extra=True)


def _within(asked: list[tuple[str, Requirement]], whose: str, *, is_extra: bool = False) -> Iterator[Finding]:
    wrong = False
    for extra, each in asked:
        version = _version(each.name)
        if version is None and is_extra:
            continue  # onnxruntime and onnxruntime-gpu bring one module
        if version is None or not each.specifier.contains(version, prereleases=True):
            wrong = True
            what, wanted = f"package {each.name}", str(each.specifier) or "any version"
            yield fail(what, version or "not installed", wanted, sentence(remedy(extra or None)))
    if not wrong:
        yield ok(f"packages of {whose}", f"{len({each.name for _, each in asked})} within their bounds")


def tested(case: Case) -> Iterator[Finding]:
    """No installed package is of a later major version than the one that was tested."""
    later = {}
    for name, version in TESTED.items():
        here = _version(name)
        if here and _major(here) > _major(version):
            later[name] = (here, version)
    for name, (here, version) in later.items():
        asked = f"'{name}<{Version(version).major + 1}'"
        yield warn(f"package {name}", here, f"{version} was tested", f"Run `pip install {asked}` if something is odd.")
    if not later:
        yield ok("packages as tested", f"{sum(_version(name) is not None for name in TESTED)} installed, none later")


def verbs(case: Case) -> Iterator[Finding]:
    """Which verbs work, and the command that brings what the others lack."""
    works = [verb for verb, (_, extra, _) in VERBS.items() if not extra or not missing_modules(extra)]
    yield ok("verbs that work", ", ".join(works))
    for extra in EXTRAS:
        lacking = [verb for verb, (_, needs, _) in VERBS.items() if needs == extra and verb not in works]
        if lacking:
            missing = ", ".join(sorted(missing_modules(extra)))
            yield skipped(f"verbs {', '.join(lacking)}", f"[{extra}] lacks {missing}", sentence(remedy(extra)))


def local_server(case: Case) -> Iterator[Finding]:
    """The pip-installed Triton is whole: its stub for this Python, libpython, numpy 1."""
    from cxr_triton.triton_repo.serve import installation

    if "pytriton" in missing_modules("local"):
        yield skipped("local server", "not installed", sentence(remedy("local")))
        return
    try:
        binary, stub, _ = installation()
    except ServerMismatch as error:
        yield refused("local server", error.message, "a server that this Python runs")
    else:
        yield ok("local server", f"{binary.name} with {stub.parent.name}'s stub")


def permissions(case: Case) -> Iterator[Finding]:
    """Nobody but their owner may write the interpreter's packages or this one."""
    folders = {Path(cxr_triton.__file__).parent, *map(Path, site.getsitepackages())}
    for folder in sorted(folder for folder in folders if folder.is_dir()):
        found = folder.stat()
        if is_writable_by_others(found.st_mode):
            yield fail(
                folder,
                f"mode {mode_of(found.st_mode)}, of {owner(folder, found.st_uid)}",
                "its owner's to write",
                f"Run `chmod go-w {folder}`: who writes there runs code as you.",
            )
        else:
            yield ok(folder, f"mode {mode_of(found.st_mode)}", "writable by its owner alone")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _major(version: str) -> tuple[int, int]:
    """The first number; of a version 0.x the second counts, too."""
    numbers = Version(version)
    return numbers.major, numbers.minor if numbers.major == 0 else 0


CHECKS = (
    Check(id="packages.python", run=python),
    Check(id="packages.required", run=required),
    Check(id="packages.bounds", run=bounds),
    Check(id="packages.tested", run=tested),
    Check(id="packages.verbs", run=verbs),
    Check(id="packages.local_server", run=local_server),
    Check(id="packages.permissions", run=permissions),
)
