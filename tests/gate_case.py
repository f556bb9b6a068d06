"""The demonstration model for the gate: an export of it, its reference, and a bundle judged on phantoms."""

from __future__ import annotations

from pathlib import Path

PHANTOM = Path(__file__).with_name("phantom")
CHECKPOINT = PHANTOM / "checkpoint"


def export_int4(folder: Path) -> Path:
    """Its export with int4 weights."""
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.profile import load_profile

    export_checkpoint(str(CHECKPOINT), folder, load_profile(PHANTOM / "profile.yaml"), precision="int4", progress=False)
    return folder


def reference():
    """What the gate compares with, to be closed."""
    from cxr_triton.engines.verify.reference import Reference
    from cxr_triton.profile import load_profile

    return Reference(CHECKPOINT, load_profile(PHANTOM / "profile.yaml"), device="cpu")


def judged(bundle, against, count: int) -> dict:
    """The gate's record of a bundle, by its recipe's thresholds, on so many phantoms in several photometrics."""
    import evaluate

    from cxr_triton.engines.verify.gate import verify_bundle
    from cxr_triton.phantom_file import write_dicom

    images = [write_dicom(p, photometric=evaluate.variant(i)[1]) for i, p in enumerate(evaluate.held_out(count))]
    return verify_bundle(bundle, against, None, images, threads=1, thresholds=bundle.manifest["recipe"]["thresholds"])
