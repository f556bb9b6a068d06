"""What `package` wrote, held against what a server is started on.

`repository.json` has a digest of every file that Triton or a model reads: configurations, models, plans, the bundle's
manifest. The manifest in turn has those of the bundle's files, which the decoder compares when it loads. So what was
changed, added or taken away is known by name. It is not signed: who may write the repository may write the record too.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from cxr_triton.engines.bundle import MANIFEST, sha256
from cxr_triton.engines.serving import BUNDLE, ENSEMBLE
from cxr_triton.errors import InvalidBundle, InvalidRequest

RECORD = "repository.json"
SCHEMA = 1
_NAMED = 5
"""Differences that an error names."""


def require_repository(folder: Path) -> None:
    """Refuse a folder that is no model repository of this package; raises `InvalidRequest`."""
    if not (folder / ENSEMBLE / "config.pbtxt").is_file():
        raise InvalidRequest(
            f"{folder} holds no model '{ENSEMBLE}'; write one with `cxr-triton package BUNDLE -o REPOSITORY`"
        )


def seal(repository: Path) -> None:
    """Write the record of a repository as it is."""
    files = {name: _entry(repository / name) for name in sorted(_files(repository)[0])}
    record = {"schema": SCHEMA, "files": files}
    (repository / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def require_as_packaged(repository: str | Path) -> None:
    """Refuse a repository that is not what `seal` found, after the bytecode beside its models was removed.

    Python leaves it there and takes it in place of the source: it would be code that nobody recorded.

    Raises
    ------
    InvalidBundle
        Names what differs.
    """
    for folder in Path(repository).glob("*/*/__pycache__"):
        shutil.rmtree(folder, ignore_errors=True)  # what stays is named below
    found = differences(Path(repository))
    if found:
        more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise InvalidBundle(
            f"{repository} is not as `cxr-triton package` wrote it: {', '.join(found[:_NAMED])}{more}; package the "
            "bundle again, or serve your own edits with --modified"
        )


def differences(repository: Path) -> list[str]:
    """What was changed, added or taken away since `seal`, a phrase for each file; empty if nothing was."""
    try:
        record = json.loads((repository / RECORD).read_bytes())
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in record["files"].items()}
        is_known = record["schema"] == SCHEMA
    except FileNotFoundError:
        return [f"{RECORD} is missing"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        is_known = False
    if not is_known:
        return [f"{RECORD} cannot be read"]
    present, strange = _files(repository)
    found = [f"{name} is missing" for name in sorted(files.keys() - present)]
    found += [f"{name} was added" for name in sorted(strange | (present - files.keys()))]
    for name in sorted(files.keys() & present):
        path, (size, digest) = repository / name, files[name]
        if path.stat().st_size != size or sha256(path) != digest:
            found.append(f"{name} was changed")
    return found


def _files(repository: Path) -> tuple[set[str], set[str]]:
    """Names of the files that the record is of, and of what has no place in a repository: links, empty folders.

    The bundle's files are left to its manifest.
    """
    files, strange = set[str](), set[str]()
    for folder, folders, names in os.walk(repository):
        here = Path(folder)
        strange |= {str((here / name).relative_to(repository)) for name in folders if (here / name).is_symlink()}
        if not folders and not names:
            strange.add(str(here.relative_to(repository)))
        for name in names:
            path = here / name
            relative = str(path.relative_to(repository))
            if path.is_symlink() or not path.is_file():
                strange.add(relative)
            elif relative != RECORD and (name == MANIFEST or not relative.startswith(f"{BUNDLE}/")):
                files.add(relative)
    return files, strange


def _entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
