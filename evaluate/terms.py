"""What each measure is called, what it means, and how an estimate is written."""

from __future__ import annotations

from collections.abc import Mapping

from cxr_triton.numbers import glued, number

TERMS = {
    "exact_match": ("All labels right", "Share of studies whose labels are all right."),
    "label_iou": ("Overlap of labels", "Labels both true and said, over those true or said; mean of studies."),
    "precision": ("Positive predictive value", "Of the studies of which the label is said, the share that has it."),
    "recall": ("Sensitivity", "Of the studies that have the label, the share of which it is said."),
    "specificity": ("Specificity", "Of the studies without the label, the share of which it is not said."),
    "f1": ("F1", "Harmonic mean of sensitivity and positive predictive value."),
    "prevalence": ("Prevalence", "Share of the studies that has the label."),
    "auroc": ("AUROC", "Chance that a study with the label has a higher score than one without; 0.5 is guessing."),
    "average_precision": (
        "Average precision",
        "Mean predictive value over all sensitivities; guessing gives the prevalence.",
    ),
    "ece": ("Calibration error", "How far scores lie from the share that is true, mean over studies; 0 is best."),
    "brier": ("Brier score", "Mean square of score less truth; 0 is best."),
    "accuracy": ("Right answers", "Share of questions that are answered right."),
    "box_iou": ("Overlap of boxes", "Common over joint area of the best pairs; a box alone counts 0; mean of studies."),
    "box_precision": ("Boxes that are right", "Of the boxes said, the share that is a hit."),
    "box_recall": ("Boxes that are found", "Of the true boxes, the share that is hit."),
    "box_f1": ("F1 of boxes", "Harmonic mean of boxes right and found."),
    "ap": ("Average precision of boxes", "COCO's, of one label."),
    "map": ("Mean average precision of boxes", "COCO's, mean of labels."),
    "rouge_l": ("ROUGE-L", "F1 of the longest common sequence of words."),
    "bleu": ("BLEU", "sacreBLEU's BLEU-4 over 100."),
}
"""Measure without its ending: its name for people, and what it means."""
ENDINGS = {
    "macro": "mean of labels",
    "micro": "all labels together",
    "weighted": "mean of labels by how many studies have them",
    "30": "overlap 0.3",
    "50": "overlap 0.5",
}


def title(measure: str) -> str:
    """A measure's name for people; a plugged one's is its own."""
    stem, _, ending = measure.rpartition("_")
    if stem in TERMS and ending in ENDINGS:
        return f"{TERMS[stem][0]}, {ENDINGS[ending]}"
    return TERMS[measure][0] if measure in TERMS else measure


def meaning(measure: str) -> str:
    """What a measure means; empty for a plugged one."""
    stem, _, ending = measure.rpartition("_")
    return TERMS[stem if stem in TERMS and ending in ENDINGS else measure][1] if title(measure) != measure else ""


def is_aside(measure: str) -> bool:
    """Another way to average a measure that stands there already."""
    return measure.endswith(("_micro", "_weighted"))


def told(estimate: Mapping[str, float | None]) -> str:
    """An estimate and its interval, two decimals; a line of a page breaks between them only."""
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if low is None:
        return short(value)
    return f"{short(value)} ({glued(f'{short(low)} to {short(high)}')})"


def short(value: float | None) -> str:
    """A value between -1 and 1, two decimals."""
    if value is None:
        return number(None)
    return f"{0.0 if abs(value) < 0.005 else value:.2f}".replace("-", "−")
