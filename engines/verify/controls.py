"""The gate's part `controls`: occluded, blank and flipped images change answers as they change the reference's."""

from __future__ import annotations

import numpy as np

from cxr_triton.engines.verify.answers import Answer
from cxr_triton.engines.verify.reference import Case, png
from cxr_triton.engines.verify.trial import Judged, Trial

CONTROLS = ("occluded", "blank", "flipped")
IMAGES = 16


def judge(trial: Trial) -> Judged:
    """How much answers change, and that they agree where an image still shows something.

    No right answer exists of a blank one, so two models may well differ there; both must change theirs.
    """
    cases, measured = trial.cases[:IMAGES], {}
    for control in CONTROLS:
        changed = [Case(_png(control, trial.reference.picture(case.image)), case.request) for case in cases]
        theirs = trial.reference.read(changed, trial.counter(f"reference reads {control}", len(cases)))
        measured[control] = _compare(trial, control, theirs, trial.read(changed, control))
    agreement = min(measured[control]["agreement"] for control in CONTROLS if control != "blank")
    reaction = max(compared["change_difference"] for compared in measured.values())
    return [trial.check("control_iou", agreement), trial.check("control_reaction", reaction)], measured


def _compare(trial: Trial, control: str, theirs: list[Answer], ours: list[Answer]) -> dict:
    """Agreement of the answers to a control, and how far each went from that to the image itself."""
    agreements, changes = [], []
    for detail, its, mine, before, mine_before in zip(
        trial.details, theirs, ours, trial.theirs, trial.ours, strict=False
    ):
        agreements.append(mine.agreement(its))
        changes.append([1 - its.agreement(before), 1 - mine.agreement(mine_before)])
        detail.setdefault("controls", {})[control] = {
            "reference": its.short(),
            "engine": mine.short(),
            "agreement": agreements[-1],
        }
    reference, engine = np.transpose(changes)
    return {
        "images": len(agreements),
        "agreement": np.mean(agreements),
        "change_reference": reference.mean(),
        "change_engine": engine.mean(),
        "change_difference": np.abs(reference - engine).mean(),
    }


def _png(control: str, picture: np.ndarray) -> bytes:
    """A picture with its middle covered, without content (faint noise: a constant is refused), or mirrored."""
    changed, grey = np.array(picture), round(float(picture.mean()))
    rows, cols = picture.shape[:2]
    if control == "occluded":
        changed[rows // 5 : rows - rows // 5, cols // 5 : cols - cols // 5] = grey
    elif control == "blank":
        noise = np.random.default_rng(0).integers(-2, 3, (rows, cols) + (1,) * (changed.ndim - 2))
        changed[:] = np.clip(grey + noise, 0, 255)
    else:
        changed = np.ascontiguousarray(changed[:, ::-1])
    return png(changed)
