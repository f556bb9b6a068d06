"""`docs/results/reliability.json`: a section for each promise, set by the run that measured it; the others stay.

    python tests/integration/reliability.py gateway RECORD.json

A run that records itself calls `set_section`, and begins its record with `provenance`.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from cxr_triton.files import write

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ("command", "date", "machine")
RECORD = ROOT / "docs" / "results" / "reliability.json"


def set_section(name: str, section: dict, path: Path = RECORD) -> None:
    """Set one section of a record, and leave the others as they are; runs that end together take turns.

    Raises
    ------
    ValueError
        The section does not say how it came to be.
    """
    if missing := [key for key in REQUIRED if not section.get(key)]:
        raise ValueError(f"section {name} has no {', '.join(missing)}; begin it with `provenance`")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        sections = json.loads(path.read_text()) if path.exists() else {}
        write(path, json.dumps({**sections, name: section}, indent=2) + "\n")
    finally:
        os.close(folder)


def provenance(command: str, packages: Iterable[str] = (), debian: Iterable[str] = ()) -> dict:
    """Command, date, commit, load, hardware and versions of a run that begins now."""
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) >> 20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    query = ["dpkg-query", "-W", "-f", "${Package} ${Version}\n", *debian]
    installed = subprocess.run(query, capture_output=True, text=True).stdout.splitlines() if debian else []
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain") else ""),
        "load_average_at_start": round(os.getloadavg()[0], 1),
        "machine": {
            "cpu": cpu[0] if cpu else platform.processor(),
            "cores": os.cpu_count(),
            "memory_gib": memory[0] if memory else None,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
            **dict(line.split(" ") for line in installed if " " in line),
        },
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section")
    parser.add_argument("record", type=argparse.FileType(), help="JSON file; - is standard input")
    parser.add_argument("--into", type=Path, default=RECORD)
    asked = parser.parse_args()
    try:
        set_section(asked.section, json.load(asked.record), asked.into)
    except (ValueError, AttributeError) as error:
        sys.exit(f"{asked.record.name}: {error}")


if __name__ == "__main__":
    main()
