"""What an archive holds, counted in one pass, as JSON and as a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from cxr_triton.archive.folder import Folder
from cxr_triton.archive.run import Ran
from cxr_triton.numbers import duration, number, percent
from cxr_triton.page import render
from cxr_triton.reading import STATUSES

SCHEMA = 1
_COUNTED = ("profile", "revision", "engine", "precision", "bundle", "server", "cxr_triton")


def summarize(folder: Folder, ran: Ran) -> dict[str, Any]:
    """Counts over all rows, and what the last run came to."""
    counts = {name: Counter[str]() for name in ("status", "error_code", "labels", *_COUNTED)}
    rows, tokens, notice = 0, 0, ""
    for batch in folder.batches([*counts, "completion_tokens"]):
        rows += batch.num_rows
        for name in ("status", "error_code", *_COUNTED):
            counts[name].update(value for value in batch.column(name).to_pylist() if value)
        for labels in batch.column("labels").to_pylist():
            counts["labels"].update(labels or ())
        tokens += sum(value or 0 for value in batch.column("completion_tokens").to_pylist())
    for batch in folder.batches(["reading"]):
        if text := next((text for text in batch.column(0).to_pylist() if text), None):
            notice = json.loads(text)["notice"]
            break
    return {
        "schema": SCHEMA,
        "archive": str(folder.path),
        "identifiers": folder.header["identifiers"],
        "request": folder.header["request"],
        "images": rows,
        "readings": sum(counts["status"].values()),
        "status": dict(counts["status"]),
        "errors": dict(counts["error_code"].most_common()),
        "labels": dict(counts["labels"].most_common()),
        "completion_tokens": tokens,
        "made_by": {name: dict(counts[name]) for name in _COUNTED},
        "run": {
            "found": ran.found,
            "there": ran.there,
            "rows": ran.rows,
            "seconds": round(ran.seconds, 3),
            "images_per_s": round(ran.rows / ran.seconds, 3) if ran.seconds else None,
            "nodes": list(ran.nodes.values()),
        },
        "notice": notice,
    }


def archive_page(summary: Mapping[str, Any]) -> str:
    """HTML of a summary."""
    run, images, readings = summary["run"], summary["images"], summary["readings"]
    request = ", ".join(f"{key} {value}" for key, value in summary["request"].items() if value is not None)
    return render(
        "archive.html",
        title="Archive",
        subtitle=f"{number(images)} images · {number(readings)} readings",
        notice=summary["notice"],
        facts=[
            ("images with a row", number(images)),
            ("of them read", f"{number(readings)}, {percent(readings / images if images else None)}"),
            ("asked", request or "the profile's default task"),
            ("identifiers", summary["identifiers"]),
            ("tokens written", number(summary["completion_tokens"])),
        ],
        ran=[
            ("images found", number(run["found"])),
            ("had a row before", number(run["there"])),
            ("read now", number(run["rows"])),
            ("in", duration(1e3 * run["seconds"])),
            ("images per second", number(run["images_per_s"])),
            ("machines", number(len(run["nodes"]))),
        ],
        statuses=[
            {"status": name, "readings": number(count), "share": percent(count / readings), "means": STATUSES.get(name)}
            for name, count in summary["status"].items()
        ],
        errors=[
            {"code": code, "images": number(count), "share": percent(count / images)}
            for code, count in summary["errors"].items()
        ],
        labels=[
            {"label": label, "readings": number(count), "share": percent(count / readings)}
            for label, count in summary["labels"].items()
        ],
        made_by=[
            (name.replace("_", "-"), ", ".join(f"{value} ({number(count)})" for value, count in found.items()) or None)
            for name, found in summary["made_by"].items()
        ],
    )
