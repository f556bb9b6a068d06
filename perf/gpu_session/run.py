"""A session: its steps, each in a process of its own that is ended at its limit, and the result as JSON and tables."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import click

from cxr_triton.files import write
from cxr_triton.perf.gpu_session import agreement, parity, speed, stack
from cxr_triton.perf.gpu_session.machine import check
from cxr_triton.perf.gpu_session.session import Session

SCHEMA = 2
STEPS = {
    "prepare": (150, agreement.prepare),
    "providers": (60, agreement.providers),
    "parity": (120, parity.parity),
    "speed": (240, speed.speed),
    "stack": (120, stack.stack),
}
"""Seconds that each step may take, and what it does."""


def run(session: Session, steps: Sequence[str], limit_s: float | None = None) -> dict:
    """Run the steps; writes ``session.json`` and ``session.md`` after each, and gives what the former holds.

    Parameters
    ----------
    session : Session
    steps : sequence of str
        Names of `STEPS`; one whose parts are missing is left out, and the result says which.
    limit_s : float, optional
        For each step, in place of its own.
    """
    checked, told = check(session.is_dry), dict[str, dict]()
    result = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dry_run": session.is_dry,
        "check": checked,
        "steps": told,
    }
    for step in steps:
        (session.out / f"{step}.json").unlink(missing_ok=True)
        started_s, missing = time.perf_counter(), checked["missing"].get(step)
        status = f"not run: {', '.join(missing)}" if missing else child(step, session, limit_s or STEPS[step][0])
        rows = session.rows(step)
        if status == "done" and not all(row.get("ok", True) for row in rows):
            status = "done, with errors"
        seconds = time.perf_counter() - started_s
        told[step] = {"status": status, "seconds": seconds, "rows": rows}
        write(session.out / "session.json", json.dumps(result, indent=1))
        write(session.out / "session.md", markdown(result))
        click.echo(f"{step}: {status}, {seconds:.0f} s", err=True)
    return result


def child(step: str, session: Session, limit_s: float) -> str:
    """Run a step in a process group of its own, of which nothing is left; what became of it."""
    command = [sys.executable, "-m", "cxr_triton.perf.gpu_session", "step", step, *session.arguments]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit_s)
        return "done" if code == 0 else f"ended with {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def markdown(result: dict) -> str:
    """Tables of a session, to paste where results are kept."""
    gpu = result["check"]["machine"]["gpu"]
    title = "GPU session" if gpu else "Dry run of the GPU session, on a CPU with a small random model"
    lines = [f"# {title}", "", f"{result['created']}, {gpu['name'] if gpu else 'no GPU'}", ""]
    for step, told in result["steps"].items():
        lines += [f"## {step}: {told['status']}, {told['seconds']:.0f} s", ""]
        groups: dict[tuple, list[dict]] = {}
        for row in told["rows"]:
            flat = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
            groups.setdefault(tuple(flat), []).append(flat)
        for names, rows in groups.items():
            lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
            lines += [f"| {' | '.join(_cell(value) for value in row.values())} |" for row in rows] + [""]
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
