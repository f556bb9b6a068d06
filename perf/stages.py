"""Where the time of a reading goes: stages of each request, and the mean request of a load point as a waterfall.

The server's stages come from the reading's own timings. `transport` is taken where the first text arrives: its time at
the client less the time at which the server says it had the first token, and less the step `report`, through which it
went too. So it covers the way in, the wait before the first step and the way out. That the stages then add up to the
time of the *last* response is a check, not a definition; what is missing or too much is the `remainder`. Triton's own
statistics, on another clock, stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cxr_triton.perf.summary import Record

SERVER_STAGES = ("image_decode", "preprocess", "vision", "queue", "prefill", "decode", "report")
STAGES = (*SERVER_STAGES, "transport")
ALLOWED_SHARE = 0.05


def stages_of(timings_ms: Mapping[str, float], sent_s: float, deltas_s: Sequence[float], end_s: float) -> dict:
    """Stages of one request in milliseconds, with the remainder.

    Parameters
    ----------
    timings_ms : mapping
        Of the reading.
    sent_s, deltas_s, end_s : float, sequence of float, float
        The client's times: request sent, responses with text, last response.
    """
    end_to_end_ms = 1e3 * (end_s - sent_s)
    stages = {stage: timings_ms[stage] for stage in SERVER_STAGES}
    if deltas_s:
        stages["transport"] = 1e3 * (deltas_s[0] - sent_s) - timings_ms["first_token"] - timings_ms["report"]
    else:  # only the difference is left, and with it no check
        stages["transport"] = end_to_end_ms - sum(stages.values())
    return {**stages, "remainder": end_to_end_ms - sum(stages.values())}


def waterfall(records: Sequence[Record], triton: Mapping[str, Mapping[str, float]]) -> dict | None:
    """``waterfall`` of the schema: the mean request, or None when no request succeeded.

    Parameters
    ----------
    records : sequence of Record
        Of all repeats of a point.
    triton : mapping
        What Triton counted for each model during the same repeats, see ``triton`` in the schema.
    """
    done = [record for record in records if record.stages_ms]
    if not done:
        return None
    means = {stage: float(np.mean([record.stages_ms[stage] for record in done])) for stage in (*STAGES, "remainder")}
    end_to_end = np.array([1e3 * (record.end_s - record.sent_s) for record in done])
    remainder_ms = means.pop("remainder")
    shares = [abs(record.stages_ms["remainder"]) / ms for record, ms in zip(done, end_to_end, strict=True)]
    share = remainder_ms / float(end_to_end.mean())
    decoded = sum(record.tokens - 1 for record in done if record.tokens)
    decode_ms = sum(record.stages_ms["decode"] for record in done)
    return {
        "stages_ms": means,
        "end_to_end_ms": float(end_to_end.mean()),
        "remainder_ms": remainder_ms,
        "remainder_share": share,
        "adds_up": abs(share) <= ALLOWED_SHARE,
        "largest_remainder_share": max(shares),
        "decode_ms_per_token": decode_ms / decoded if decoded else None,
        "triton_ms": triton_times(triton, float(end_to_end.mean())),
    }


def triton_times(triton: Mapping[str, Mapping[str, float]], end_to_end_ms: float) -> dict[str, float]:
    """Milliseconds per request by Triton's own clock."""
    times = {}
    if (ensemble := triton.get("cxr_reader")) and ensemble["requests"]:
        times["ensemble"] = ensemble["request_ms"] / ensemble["requests"]
        times["outside"] = end_to_end_ms - times["ensemble"]
    for model, name in (("dicom_preprocess", "preprocess"), ("vision_encoder", "vision")):
        if (counted := triton.get(model)) and counted["requests"]:
            times[f"{name}_wait"] = counted["queue_ms"] / counted["requests"]
            times[f"{name}_compute"] = (
                counted["compute_input_ms"] + counted["compute_infer_ms"] + counted["compute_output_ms"]
            ) / counted["requests"]
    return times
