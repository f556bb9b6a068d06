"""The verification record of a bundle: where it is kept, what it is about, and whether it still holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from cxr_triton.engines.bundle import MANIFEST, Bundle
from cxr_triton.errors import InvalidRequest, NotVerified
from cxr_triton.files import write

SCHEMA = 1
RECORDS = ("verification", "accuracy")
"""Of a manifest: what the gate found, and how right the engine was on labelled data."""
IN_ENGINE = "verification/record.json"
"""The record with its readings, in the folder of a `make-engine`."""
PARTS = ("files", "vision", "decoder", "readings", "controls")
"""All of them have to pass; see `cxr_triton.engines.verify.gate`."""


def subject(manifest: Mapping) -> str:
    """SHA-256 of a manifest without its records: what a record is about, down to the last byte of every file."""
    stripped = {key: value for key, value in manifest.items() if key not in RECORDS}
    return hashlib.sha256(json.dumps(stripped, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_record(bundle: Bundle | str | Path, record: Mapping, name: str = "verification") -> Bundle:
    """Put a record of `RECORDS` into ``manifest.json``, in place of an older one; the bundle's digest changes with it.

    `details` of the record (the readings themselves) stay out of the manifest.

    Raises
    ------
    InvalidRequest
        The record is about another bundle, or about an older state of this one.
    """
    path = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    manifest = Bundle.open(path, verify=False).manifest
    if record.get("subject") != subject(manifest):
        raise InvalidRequest(f"the record is not about the bundle in {path} as it is now; run cxr-triton verify again")
    kept = {key: value for key, value in record.items() if key != "details"}
    text = json.dumps({**manifest, name: kept}, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write(path / MANIFEST, text, beside=path.parent)
    return Bundle.open(path, verify=False)


def require_verified(bundle: Bundle) -> dict:
    """The record of a bundle that passed the gate as it is now.

    A record guards against mistakes, not against forgery: nobody signs it.

    Raises
    ------
    NotVerified
        There is no record, it is about another bundle or an older state, or a part of it has not passed.
    """
    record, remedy = bundle.manifest.get("verification"), "run cxr-triton verify on it, or package with --unverified"
    if not isinstance(record, dict):
        raise NotVerified(f"the bundle in {bundle.path} was not verified; {remedy}")
    if record.get("schema") != SCHEMA or record.get("subject") != subject(bundle.manifest):
        raise NotVerified(f"the bundle in {bundle.path} has the record of another bundle or schema; {remedy}")
    parts = record.get("parts")
    parts = parts if isinstance(parts, dict) else {}
    failed = [name for name in PARTS if not holds(parts.get(name))]
    if failed or record.get("passed") is not True:
        raise NotVerified(f"the bundle in {bundle.path} failed the gate in {', '.join(failed) or 'its sum'}; {remedy}")
    return record


def require_accurate(bundle: Bundle) -> dict | None:
    """The record of how right a bundle was on labelled data; None where nobody measured it.

    Raises
    ------
    NotVerified
        It was not right enough, or the record is about another bundle or an older state.
    """
    record, remedy = bundle.manifest.get("accuracy"), "measure it again, or package with --unverified"
    if record is None:
        return None
    if not isinstance(record, dict) or record.get("subject") != subject(bundle.manifest):
        raise NotVerified(f"the bundle in {bundle.path} has the accuracy of another bundle; {remedy}")
    if record.get("passed") is not True:
        failed = [
            f"{check['name']} {check['value']:.4g}, {'least' if check['at_least'] else 'most'} {check['limit']:g}"
            if check["value"] is not None
            else f"{check['name']} not known"
            for check in record.get("checks", ())
            if not check.get("passed")
        ]
        failed += ["it is worse than the engine that it was held against"] if record.get("verdict") == "worse" else []
        said = "; ".join(failed) or "its sum"
        raise NotVerified(f"the bundle in {bundle.path} is not right enough on labelled data: {said}; {remedy}")
    return record


def holds(part: object) -> bool:
    """A part of a record has checks, and all of them passed."""
    if not isinstance(part, dict) or part.get("passed") is not True or part.get("error") is not None:
        return False
    checks = part.get("checks")
    return isinstance(checks, list) and bool(checks) and all(check.get("passed") is True for check in checks)


def is_verified(bundle: Bundle) -> bool:
    """`require_verified` as a yes or no."""
    try:
        require_verified(bundle)
    except NotVerified:
        return False
    return True
