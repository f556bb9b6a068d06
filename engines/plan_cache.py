"""Compiled plans by the digest of everything that decides them; an entry is whole or it is built again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from cxr_triton.engines.digest import copy

log = logging.getLogger(__name__)

SCHEMA = 1


def default_folder() -> Path:
    """`cxr-triton/plans` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cxr-triton" / "plans"


def plan_key(inputs: dict) -> str:
    """Key of a plan: SHA-256 of plain values that name all that it depends on."""
    return hashlib.sha256(json.dumps([SCHEMA, inputs], sort_keys=True).encode()).hexdigest()


class PlanCache:
    """A folder of plans that several processes may use at once.

    Parameters
    ----------
    folder : Path
        Made when the first plan is kept.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def get(self, key: str, target: Path) -> dict | None:
        """Copy a plan to `target` and give its build report; None where there is none that is whole."""
        entry = self._entry(key)
        try:
            facts = json.loads((entry / "entry.json").read_bytes())
            if facts["key"] != key or copy(entry / "plan", target) != facts["sha256"]:
                raise ValueError("its digest is not that of its entry")
            return dict(facts["report"])
        except FileNotFoundError:
            target.unlink(missing_ok=True)
            if not entry.exists():
                return None
            error = "a file is missing"
        except (ValueError, KeyError, TypeError, RecursionError) as damage:
            error = str(damage)
        target.unlink(missing_ok=True)
        log.warning("the cached plan %s is damaged (%s); it is built again", key[:12], error)
        shutil.rmtree(entry, ignore_errors=True)
        return None

    def put(self, key: str, plan: Path, report: dict) -> None:
        """Keep a copy of a plan and its build report; does nothing if another process was faster."""
        entry = self._entry(key)
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=entry.parent))
        try:
            facts = {"key": key, "sha256": copy(plan, partial / "plan"), "report": report}
            (partial / "entry.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
            with contextlib.suppress(OSError):  # the entry is there
                os.replace(partial, entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _entry(self, key: str) -> Path:
        return self.folder / key[:2] / key


def built(cache: Path | None, plan: Path, inputs: Callable[[], dict], build: Callable[[], dict]) -> dict:
    """The build report of a plan, which comes out of a cache if it is there, or is built and kept.

    Parameters
    ----------
    cache : Path, optional
        Folder of a `PlanCache`; always built if None.
    plan : Path
        Where the plan is put.
    inputs : callable
        Gives what `plan_key` takes.
    build : callable
        Writes the plan and gives its report.
    """
    if cache is None:
        return build()
    kept, key = PlanCache(cache), plan_key(inputs())
    report = kept.get(key, plan)
    if report is None:
        report = build()
        kept.put(key, plan, report)
    return report
