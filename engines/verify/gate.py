"""The verification gate: an engine bundle against the unquantized checkpoint in transformers; it fails closed.

Five parts, each of which has to pass: `files` (tokenizer, template, configs, profile and weights are the checkpoint's),
`vision` (image embeddings, token by token), `decoder` (next-token distributions on the reference's own text),
`readings` (what both say of the same images) and `controls` (occluded, blank and flipped images: the engine has to
react as the reference does). A part that raises, sees too few images or a number that is not finite has failed.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from cxr_triton import __version__
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.interface import ADAPTER
from cxr_triton.engines.verify import controls, decoder, files, readings, vision
from cxr_triton.engines.verify.engine_under_test import runnable
from cxr_triton.engines.verify.record import PARTS, SCHEMA, holds, subject
from cxr_triton.engines.verify.reference import Case, Reference, request_json
from cxr_triton.engines.verify.thresholds import thresholds_of
from cxr_triton.engines.verify.trial import Judged, Progress, Trial, finite
from cxr_triton.errors import CxrError, InvalidImage, InvalidRequest
from cxr_triton.profile import ModelProfile, load_profile, profile_names

log = logging.getLogger(__name__)

JUDGES = {
    "files": files.judge,
    "vision": vision.judge,
    "decoder": decoder.judge,
    "readings": readings.judge,
    "controls": controls.judge,
}


def verify_bundle(
    bundle: Bundle | str | Path,
    checkpoint: str | Path | Reference,
    profile: ModelProfile | None,
    images: Sequence[bytes | Path],
    *,
    thresholds: Mapping[str, float] | None = None,
    standin: Bundle | str | Path | None = None,
    quantized: str | Path | None = None,
    requests: Sequence[Mapping] = ({},),
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict:
    """Run the gate.

    Parameters
    ----------
    bundle : Bundle or path
    checkpoint : path or Reference
        The unquantized checkpoint, or an open reference on it, which is left open.
    profile : ModelProfile or None
        Profile of the reference; None takes the packaged one of the bundle's name. Never the bundle's own copy.
    images : sequence of bytes or Path
        DICOM, PNG or JPEG files.
    thresholds : mapping, optional
        Over the defaults of the bundle's precision; names as in `cxr_triton.engines.verify.thresholds`.
    standin : Bundle or path, optional
        Bundle of the same export source for `cxr_triton.engines.DEFAULT`, run in place of one that cannot be run here.
    quantized : path, optional
        Folder of the quantized checkpoint that an ``fp8`` or ``int4-awq`` engine was exported from: the engine has to
        compute what that checkpoint says. Without it the decoder part of such an engine fails.
    requests : sequence of mapping
        REQUESTs of one image without history; image i is asked ``requests[i % len(requests)]``.
    limit, seed : int
        So many of the images, drawn with this seed.
    device : str
        Of the reference: ``auto``, ``cpu`` or ``cuda``.
    threads : int, optional
        CPU threads of the engine.
    progress : callable, optional

    Returns
    -------
    dict
        The record: `passed`, `parts`, `runtime`, `reference`, `thresholds`, `subject` and more; `details` holds every
        reading and is not written into a manifest. A failing gate is a record with ``passed`` false, not an error.

    Raises
    ------
    InvalidRequest, InvalidBundle, UnsupportedCheckpoint, InvalidProfile
        The question makes no sense: unknown thresholds, a damaged bundle, a checkpoint that the reference cannot read,
        or no image that it can. Images that it cannot read are left out, logged and counted.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    limits = thresholds_of(bundle.precision, bundle.geometry.compute, thresholds)
    runs, runtime = runnable(bundle, standin)
    if not images:
        raise InvalidRequest("there is no image to verify on; give DICOM, PNG or JPEG radiographs")
    with _opened(checkpoint, profile, bundle, device) as reference:
        cases, pictures = _cases(images, requests, limit, seed, reference)
        trial = Trial(
            bundle=bundle,
            runs=runs,
            reference=reference,
            cases=cases,
            limits=limits,
            quantized=quantized,
            threads=threads,
            say=progress or (lambda what, done, total: None),
        )
        with contextlib.closing(trial):
            parts = {name: _run(JUDGES[name], trial) for name in PARTS}
        return _record(trial, parts) | {"runtime": runtime, "images": pictures}


def _opened(
    checkpoint: str | Path | Reference, profile: ModelProfile | None, bundle: Bundle, device: str
) -> contextlib.AbstractContextManager[Reference]:
    """The reference, which is closed at the end unless it was open."""
    if isinstance(checkpoint, Reference):
        return contextlib.nullcontext(checkpoint)
    if profile is None:
        name = bundle.profile.name
        if name not in profile_names():
            raise InvalidRequest(
                f"the bundle's profile {name!r} is none that cxr-triton ships; name its file with --profile"
            )
        profile = load_profile(name)
    adapter = bundle.path / ADAPTER if bundle.adapter else None
    return Reference(checkpoint, profile, device=device, adapter=adapter)


def _cases(
    images: Sequence[bytes | Path], requests: Sequence[Mapping], limit: int | None, seed: int, reference: Reference
) -> tuple[list[Case], dict]:
    """What is asked of the images that are drawn and can be read, and what the record says of them."""
    if limit is not None and limit < len(images):
        chosen = np.random.default_rng(seed).choice(len(images), limit, replace=False)
        images = [images[i] for i in sorted(chosen)]
    data, refused = _readable(images, reference)
    cases = [Case(entry, request_json(requests[i % len(requests)])) for i, entry in enumerate(data)]
    digest = hashlib.sha256(b"".join(hashlib.sha256(entry).digest() for entry in data)).hexdigest()
    facts = {"count": len(cases), "refused": refused, "seed": seed, "sha256": digest, "requests": len(requests)}
    return cases, facts


def _readable(images: Sequence[bytes | Path], reference: Reference) -> tuple[list[bytes], dict[str, int]]:
    """Contents of the images that the reference can read, and how many of the others there are by code; logs each."""
    readable, refused = [], Counter[str]()
    for number, entry in enumerate(images, 1):
        try:
            data = entry if isinstance(entry, bytes) else Path(entry).read_bytes()
            reference.picture(data)
            readable.append(data)
        except (InvalidImage, OSError) as error:
            code, said = (error.code, error.message) if isinstance(error, InvalidImage) else ("UNREADABLE", str(error))
            refused[code] += 1
            name = f"image {number}" if isinstance(entry, bytes) else repr(Path(entry).name)
            log.warning("%s is left out: [%s] %s", name, code, said)
    if not readable:
        codes = ", ".join(f"{count} {code}" for code, count in refused.items())
        raise InvalidRequest(f"there is no image to verify on (left out: {codes}); give DICOM, PNG or JPEG radiographs")
    return readable, dict(refused)


def _run(judge: Callable[[Trial], Judged], trial: Trial) -> dict:
    """A part of the record; what raises has failed."""
    try:
        checks, measured = judge(trial)
    except ImportError:  # says nothing of the engine
        raise
    except Exception as error:
        log.debug("a part of the gate failed", exc_info=error)
        said = error.message if isinstance(error, CxrError) else f"{type(error).__name__}: {error}"
        return {"passed": False, "error": said[:500], "checks": [], "measured": {}}
    passed = bool(checks) and all(check["passed"] for check in checks)
    return {"passed": passed, "error": None, "checks": checks, "measured": finite(measured)}


def _record(trial: Trial, parts: dict[str, dict]) -> dict:
    """The verdict and what it is about."""
    bundle, reference = trial.bundle, trial.reference
    return {
        "schema": SCHEMA,
        "passed": all(holds(part) for part in parts.values()),
        "subject": subject(bundle.manifest),
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "reference": {**reference.facts, "files": reference.digests},
        "thresholds": trial.limits,
        "parts": parts,
        "versions": {"cxr_triton": __version__},
        "details": {
            "bundle": {key: bundle.manifest[key] for key in ("engine", "precision", "source")},
            "notice": reference.profile.notice,
            "title": reference.profile.title,
            "images": trial.details,
        },
    }
