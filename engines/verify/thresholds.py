"""What the verification gate measures, and the limits that an engine's precision and compute type set by default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cxr_triton.errors import InvalidRequest, unknown_key


@dataclass(frozen=True)
class Threshold:
    """A limit that a measurement is held against.

    Attributes
    ----------
    at_least : bool
        The measurement has to be as large; as small otherwise.
    meaning : str
        What is measured, with its unit, for people.
    """

    at_least: bool
    meaning: str


THRESHOLDS = {
    "vision_cosine": Threshold(True, "mean over tokens of the cosine of image embeddings"),
    "vision_cosine_min": Threshold(True, "cosine of the worst token"),
    "vision_norm": Threshold(False, "relative error of an image's root mean square, worst image"),
    "top1_agreement": Threshold(True, "share of tokens with the same most likely next token"),
    "kl": Threshold(False, "mean over tokens of KL(reference || engine), nats"),
    "logit_error": Threshold(
        False, "relative difference of logits from transformers on the weights as the engine stores them"
    ),
    "images": Threshold(True, "images that were read"),
    "label_iou": Threshold(True, "mean intersection over union of label sets, options or boxes"),
    "prose_f1": Threshold(True, "mean F1 of the words of prose answers"),
    "label_flips": Threshold(False, "share of images on which a label flips, worst label"),
    "format_drop": Threshold(False, "well-formed answers: the reference's share less the engine's"),
    "truncated_rise": Threshold(False, "truncated answers: the engine's share less the reference's"),
    "unknown_rise": Threshold(False, "answers out of vocabulary: the engine's share less the reference's"),
    "length_drift": Threshold(False, "relative difference of the mean lengths, tokens"),
    "reward_drop": Threshold(False, "mean reward of the reference less the engine's, worst reward"),
    "control_iou": Threshold(True, "mean agreement of the answers, worse of occluded and flipped"),
    "control_reaction": Threshold(False, "mean difference of how much the answers change, worst control"),
}
"""Everything that the gate checks against a number, by the name that a recipe uses."""

_ALWAYS = {"images": 8, "format_drop": 0.02, "truncated_rise": 0.02, "unknown_rise": 0.02, "length_drift": 0.05}
_BY_PRECISION = {  # fp32, 16 bit, fp8, 4 bit
    "top1_agreement": (0.999, 0.985, 0.97, 0.95),
    "kl": (1e-5, 5e-3, 0.02, 0.05),
    "label_iou": (0.99, 0.97, 0.97, 0.95),
    "prose_f1": (0.95, 0.80, 0.70, 0.60),
    "label_flips": (0.02, 0.05, 0.08, 0.10),
    "reward_drop": (0.02, 0.04, 0.06, 0.08),
    "control_iou": (0.97, 0.95, 0.90, 0.85),
    "control_reaction": (0.03, 0.06, 0.10, 0.15),
}
_PRECISIONS = {"fp32": 0, "fp16": 1, "bf16": 1, "fp8": 2, "int4": 3, "int4-awq": 3}
# Int8 activations of the CPU's int4 kernel alone make 0.006 of `logit_error` in the phantom's four layers.
_BY_COMPUTE = {
    "fp32": {"vision_cosine": 0.99999, "vision_cosine_min": 0.9999, "vision_norm": 1e-3, "logit_error": 0.02},
    "fp16": {"vision_cosine": 0.999, "vision_cosine_min": 0.99, "vision_norm": 0.01, "logit_error": 0.02},
    "bf16": {"vision_cosine": 0.99, "vision_cosine_min": 0.95, "vision_norm": 0.03, "logit_error": 0.05},
}


def thresholds_of(precision: str, compute: str, given: Mapping[str, float] | None = None) -> dict[str, float]:
    """The limits of an engine by the names of `THRESHOLDS`: defaults with `given` laid over them.

    Parameters
    ----------
    precision, compute : str
        Of the decoder's weights, and the type that both graphs compute in.
    given : mapping, optional
        As in a recipe's ``thresholds``.

    Raises
    ------
    InvalidRequest
        The precision, the compute type or a key is unknown, or a value is no finite number.
    """
    for kind, value, known in (("precision", precision, _PRECISIONS), ("compute", compute, _BY_COMPUTE)):
        if value not in known:
            raise InvalidRequest(f"no thresholds for {kind} {value!r}, known are {', '.join(known)}")
    column = _PRECISIONS[precision]
    chosen = _ALWAYS | {name: limits[column] for name, limits in _BY_PRECISION.items()} | _BY_COMPUTE[compute]
    if precision == "fp32":
        chosen["logit_error"] = 1e-3  # nothing is rounded: 3e-7 in the phantom's four layers
    for name, limit in (given or {}).items():
        if name not in THRESHOLDS:
            raise InvalidRequest(unknown_key(str(name), THRESHOLDS, "thresholds"))
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            raise InvalidRequest(f"thresholds.{name} is {limit!r:.40}, must be a finite number")
        chosen[name] = limit
    return chosen
