"""All checks, side by side, each in its time: what hangs is said, and what breaks is a finding."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cxr_triton.doctor import gateway, machine, openai, packages, peers, repository, server
from cxr_triton.doctor.check import Absent, Case, Check, Finding, Unseen, fail, sentence, skipped
from cxr_triton.errors import CxrError
from cxr_triton.extras import extra_of, remedy, require

CHECKS: tuple[Check, ...] = (
    *machine.CHECKS,
    *packages.CHECKS,
    *repository.CHECKS,
    *server.CHECKS,
    *openai.CHECKS,
    *gateway.CHECKS,
    *peers.CHECKS,
)
GROUPS = {
    "machine": "Machine",
    "packages": "Python and packages",
    "repository": "Repository and bundle",
    "server": "Server",
    "openai": "Server of OpenAI's API",
    "gateway": "Gateway",
}
"""Groups of checks, in the order in which they are shown."""
AT_ONCE = 8


def examine(
    case: Case, checks: Sequence[Check] = CHECKS, done: Callable[[Check], object] = lambda check: None
) -> list[Finding]:
    """Run checks, `AT_ONCE` at a time.

    Parameters
    ----------
    case : Case
    checks : sequence of Check
    done : callable
        Called after each.

    Returns
    -------
    list of Finding
        In the order of the table; for a check that did not end in its time, or broke, a failure that says so.
    """
    answers: queue.Queue[tuple[Check, list[Finding]]] = queue.Queue()
    waiting, running, found = list(checks), dict[str, tuple[Check, float]](), dict[str, list[Finding]]()
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            check = waiting.pop(0)
            running[check.id] = (check, time.monotonic() + check.limit_s)
            # A thread that hangs is left behind: it is a daemon's, and keeps nobody.
            threading.Thread(target=_answer, args=(check, case, answers), daemon=True, name=check.id).start()
        ended = dict[str, list[Finding]]()
        try:
            first_due = min(due for _, due in running.values())
            check, findings = answers.get(timeout=max(0.0, first_due - time.monotonic()))
            ended[check.id] = findings
        except queue.Empty:
            now = time.monotonic()
            ended |= {check.id: [_late(check)] for check, due in running.values() if due <= now}
        for name, findings in ended.items():
            if name in running:  # not one that was given up before
                found[name] = findings
                done(running.pop(name)[0])
    return [replace(finding, id=check.id) for check in checks for finding in found[check.id]]


def _answer(check: Check, case: Case, answers: queue.Queue) -> None:
    try:
        findings = _findings(check, case)
    except BaseException as error:  # whatever it is, the other checks go on
        findings = [_broken(check, error)]
    answers.put((check, findings))


def _findings(check: Check, case: Case) -> list[Finding]:
    try:
        if check.needs:
            getattr(case, check.needs)
    except Absent:
        return []
    except (CxrError, OSError):
        what, where = ("configuration", "gateway.config") if check.needs == "config" else ("bundle", "repository.files")
        return [skipped(check.text, f"the {what} cannot be opened, see {where}")]
    if check.is_connecting and case.offline:
        return [skipped(check.text, "not asked: --offline opens no connection")]
    return _looked(check, case)


def _looked(check: Check, case: Case) -> list[Finding]:
    try:
        require(*check.modules)
        return list(check.run(case))
    except Absent:
        return []
    except Unseen as reason:
        return [skipped(check.text, reason)]
    except ModuleNotFoundError as error:
        if (error.name or "cxr_triton").split(".")[0] == "cxr_triton":
            raise
        return [_lacking(check, error)]


def _lacking(check: Check, error: ModuleNotFoundError) -> Finding:
    command = remedy(extra_of(str(error.name), check.extra or None))
    return skipped(check.text, f"the package {error.name!r} is not installed", sentence(command))


def _late(check: Check) -> Finding:
    return fail(
        check.text,
        f"no answer within {check.limit_s:g} s",
        f"an answer within {check.limit_s:g} s",
        "see what it waits for: a file system, a name server or a peer that does not answer",
    )


def _broken(check: Check, error: BaseException) -> Finding:
    """Without the error's own text, which may quote what nobody should see."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    code = f" [{error.code}] {error.message}" if isinstance(error, CxrError) else f" {type(error).__name__}{where}"
    return fail(
        check.text, f"the check itself failed:{code}", "a check that ends", "report it as a bug, with this line"
    )
