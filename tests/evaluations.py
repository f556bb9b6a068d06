"""Results of evaluations, made up: rows of any kind as an engine of a given skill would have answered them."""

import hashlib

import numpy as np

from cxr_triton.evaluate.rows import Answer, Box, Header, Row, Truth

LABELS = ("Atelectasis", "Cardiomegaly", "Edema", "Pleural Effusion", "No Finding")
GROUPS = {"view": ("AP", "PA"), "sex": ("F", "M"), "age_band": ("0-39", "40-64", "65+"), "portable": ("no", "yes")}


def result(
    kind: str = "labels",
    studies: int = 200,
    *,
    skill: float = 0.85,
    seed: int = 0,
    engine: int = 0,
    scores: bool = True,
    broken: float = 0.05,
):
    """Header and rows; `seed` draws what is true, `engine` what is said."""
    random, said = np.random.default_rng(seed), np.random.default_rng([seed, engine])
    patients = random.integers(0, max(studies * 2 // 3, 1), studies)
    rows = []
    for i in range(studies):
        truth, answer = FORMS[kind](random, said, skill, scores)
        status, code = "ok", ""
        fate = said.random()
        if fate < broken / 2:
            answer, status, code = None, "error", "INVALID_IMAGE"
        elif fate < broken:
            answer, status, code = Answer(whole="<think> The heart"), "flagged", "truncated"
        groups = {name: values[random.integers(len(values))] for name, values in GROUPS.items()}
        name = f"patient-{patients[i]}"
        patient = hashlib.sha256(name.encode()).hexdigest()[:16]
        rows.append(
            Row(
                number=i, study=f"secret-study-{i}", patient=patient, groups=groups,
                images=(f"{name}/view1.png",), kind=kind, truth=truth, answer=answer, status=status, code=code,
            )
        )  # fmt: skip
    return header(kind, rows), rows


def header(kind: str, rows) -> Header:
    return Header(
        kind=kind,
        data={
            "name": "phantoms", "format": "table", "split": "test", "studies": len(rows),
            "patients": len({row.patient for row in rows}), "images": len(rows), "digest": f"sha256:{'0' * 64}",
            "pictures": f"sha256:{'1' * 64}",
        },
        labels=LABELS if kind == "labels" else (),
        request={"task": "findings", "sent": "Find abnormalities and support devices."},
        model={
            "profile": "phantom", "title": "Phantom reader", "engine": "paper", "precision": "fp32", "bundle": "0" * 64,
        },
        versions={"cxr-triton": "0.1.0", "python": "3.11"},
        notice="Output of a test fixture; never for diagnosis.",
        times={"began": "2026-01-01T00:00:00Z", "ended": "2026-01-01T00:01:00Z", "read_s": 60.0, "runs": 1},
    )  # fmt: skip


def _labels(random, said, skill, scores):
    truth = {label: int(random.random() < 0.3) for label in LABELS[:-1]}
    truth["No Finding"] = int(not any(truth.values()))
    if random.random() < 0.1:
        truth["Edema"] = None
    sure = {
        label: float(np.clip((0.75 if value else 0.25) + said.normal(0, 0.6 - 0.6 * skill + 0.05), 0, 1))
        for label, value in truth.items()
    }
    told = {label: int(value > 0.5) for label, value in sure.items()}
    names = ", ".join(label for label, value in told.items() if value)
    answer = Answer(
        labels=told,
        scores=sure if scores else None,
        text=names,
        whole=f"<think> **Heart:** seen. </think> <answer> {names} </answer>",
    )
    return Truth(labels=truth), answer


def _options(random, said, skill, scores):
    right = "ABCD"[random.integers(4)]
    letter = right if said.random() < skill else "ABCD"[said.integers(4)]
    sure = {letter: float(said.uniform(0.3, 1))} if scores else None
    return Truth(options=(right,)), Answer(options=(letter,), scores=sure, whole=f"It is \\boxed{{{letter}}}")


def _boxes(random, said, skill, scores):
    true, placed = [], []
    for _ in range(random.integers(0, 3)):
        corner, size = random.uniform(0, 200, 2), random.uniform(40, 120, 2)
        label, box = ("Nodule", "Effusion")[random.integers(2)], (*corner, *(corner + size))
        true.append(Box(label=label, corners=tuple(map(float, box))))
        moved = np.array(box) + said.normal(0, 60 * (1 - skill), 4)
        placed.append(Box(label=label, corners=tuple(map(float, (*moved[:2], *np.maximum(moved[2:], moved[:2] + 5))))))
    return Truth(boxes=tuple(true)), Answer(boxes=tuple(placed), whole="boxes")


_WORDS = ("the", "heart", "is", "large", "no", "effusion", "seen", "left", "right", "lung", "clear", "base")


def _report(random, said, skill, scores):
    words = [_WORDS[i] for i in random.integers(0, len(_WORDS), 25)]
    kept = [word if said.random() < skill else _WORDS[said.integers(len(_WORDS))] for word in words]
    return Truth(text=" ".join(words)), Answer(text=" ".join(kept), whole=" ".join(kept))


FORMS = {"labels": _labels, "options": _options, "boxes": _boxes, "report": _report}
