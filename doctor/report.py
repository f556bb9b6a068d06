"""An examination as lines for people and as JSON, which ``docs/doctor.schema.json`` describes."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Sequence

from cxr_triton import __version__
from cxr_triton.doctor.check import FAIL, OK, SKIPPED, STATUSES, WARN, Finding
from cxr_triton.doctor.run import GROUPS

SCHEMA = 1
MARKS = {OK: ("✓", "green"), WARN: ("!", "yellow"), FAIL: ("✗", "red"), SKIPPED: ("-", None)}
"""Mark and colour of each status."""


def lines(findings: Sequence[Finding]) -> Iterator[tuple[str, str | None]]:
    """Lines and their colours: groups, a line for each finding, what to do about it, and the count at the end."""
    for group, title in GROUPS.items():
        here = [finding for finding in findings if finding.group == group]
        if here:
            yield title, None
        for finding in here:
            yield from _lines(finding)
    counts = counted(findings)
    yield ", ".join(f"{counts[status]} {status}" for status in STATUSES), None


def _lines(finding: Finding) -> Iterator[tuple[str, str | None]]:
    mark, colour = MARKS[finding.status]
    wanted = f" (wanted: {finding.wanted})" if finding.wanted else ""
    yield f"  {mark} {finding.id}  {finding.subject}: {finding.found}{wanted}", colour
    if finding.remedy:
        yield f"      {finding.remedy}", None


def counted(findings: Sequence[Finding]) -> dict[str, int]:
    """Findings of each status."""
    found = Counter(finding.status for finding in findings)
    return {status: found[status] for status in STATUSES}


def to_json(findings: Sequence[Finding]) -> dict:
    """The examination as ``docs/doctor.schema.json`` describes it."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "counts": counted(findings),
        "findings": [
            {
                "id": finding.id,
                "group": finding.group,
                "status": finding.status,
                "subject": finding.subject,
                "found": finding.found,
                "wanted": finding.wanted,
                "remedy": finding.remedy,
            }
            for finding in findings
        ],
    }
