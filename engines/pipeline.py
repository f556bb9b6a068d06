"""The model-independent stages of a reading, around which the adapters in `triton_repo/` only convert tensors.

Images and REQUEST in, step tensors out; completion in, `Reading` out.

CONTEXT carries what `report` needs through the decoder, so that `report` holds no state. Its time stamps are
CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cxr_triton.alternatives import Scoring
from cxr_triton.chat import ChatTokenizer
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.verify.record import is_verified
from cxr_triton.errors import CxrError, InternalError, InvalidRequest, PromptTooLong
from cxr_triton.identity import hashed
from cxr_triton.pixels import image
from cxr_triton.pixels.flags import DOUBTFUL
from cxr_triton.pixels.limits import Limits
from cxr_triton.pixels.sandbox import Sandbox
from cxr_triton.reading import Reading, parse
from cxr_triton.request import ReadRequest
from cxr_triton.sampling import Sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepTensors:
    """What `dicom_preprocess` gives to the next steps.

    Attributes
    ----------
    pixel_windows : (n, W, 64, 588) uint8 array
    patch_rows_cols : (n, W, 64, 2) int32 array
    valid : (n, W, 64) bool array
    merge_order : (n, T) int32 array
        Of n images; one blank image when the request has none.
    input_ids, image_index : (S,) int64 array
    position_ids : (3, S) int64 array
    context : str
        JSON for `sampling_of` and `build_reading`.
    """

    pixel_windows: np.ndarray
    patch_rows_cols: np.ndarray
    valid: np.ndarray
    merge_order: np.ndarray
    input_ids: np.ndarray
    image_index: np.ndarray
    position_ids: np.ndarray
    context: str


class Preprocessor:
    """First stage: checks a request, decodes its images in a sandbox and writes the prompt.

    Parameters
    ----------
    bundle : path
        Engine bundle; only its small files are read.
    limits : Limits, optional
        What one image may cost.
    not_a_chest : {"refuse", "flag"}, optional
        In place of the profile's.

    Raises
    ------
    InvalidBundle
        A file of the bundle is missing or of another size.
    """

    def __init__(self, bundle: str | Path, limits: Limits | None = None, not_a_chest: str | None = None):
        opened = Bundle.open(bundle, verify=False)
        generation_config = json.loads((opened.path / "generation_config.json").read_text("utf-8"))
        self.profile = opened.profile.merge_generation_config(generation_config)
        self._not_a_chest = not_a_chest or self.profile.not_a_chest
        self._geometry = opened.geometry
        self._tokenizer = ChatTokenizer(opened.path)
        self._sandbox = Sandbox(limits or Limits())
        self._model = {
            "profile": self.profile.name,
            "title": self.profile.title,
            "revision": opened.manifest["source"].get("revision"),
            "engine": opened.engine,
            "precision": opened.precision,
            "bundle": opened.digest,
            **_adapter(opened),
            "verification": "passed" if is_verified(opened) else "none",
            "labels": list(self.profile.labels),
        }

    def prepare(self, images: Sequence[bytes], request: bytes | str, trace_id: str = "") -> StepTensors:
        """Tensors of one request.

        Parameters
        ----------
        images : sequence of bytes
            DICOM Part 10, PNG or JPEG; prior first, current last; may be empty.
        request : bytes or str
            REQUEST, see `cxr_triton.request`.
        trace_id : str
            Of the request, for the reading.

        Raises
        ------
        InvalidRequest, PromptTooLong, InvalidImage
            Or a subclass; of several images the message names the one that failed.
        """
        received_s = time.monotonic()
        asked = ReadRequest.from_json(request, self.profile)
        messages = asked.messages(len(images))
        pictures = [self._picture(data, i, len(images)) for i, data in enumerate(images)]
        geometry = self._geometry
        budgets = {"window_budget": geometry.window_budget, "token_budget": geometry.token_budget}
        inputs = [image.windows(picture.pixels, **budgets) for picture in pictures]
        prompt = self._tokenizer.encode(messages, [(vision.rows, vision.cols) for vision in inputs])
        tokens = len(prompt.input_ids)
        if tokens >= geometry.max_sequence:
            raise PromptTooLong(
                f"the prompt has {tokens} tokens, allowed are {geometry.max_sequence - 1} to leave room for an answer; "
                "shorten the prompt or the history, or send fewer images"
            )
        tensors = image.stack(inputs or [image.blank(**budgets)])
        prepared_s = time.monotonic()
        identify = hashed if asked.identifiers == "hashed" else dict
        image_decode_ms = sum(picture.decode_ms for picture in pictures)
        context = {
            "task": asked.task,
            "prompt": asked.text,
            "grammar": asked.grammar,
            "answer": asked.answer,
            "guide": asked.guide,
            "labels": list(self.profile.labels) if asked.answer in ("labels", "text") else [],
            "sampling": {
                "max_new_tokens": asked.max_new_tokens,
                "temperature": asked.temperature,
                "top_p": asked.top_p,
                "repetition_penalty": asked.repetition_penalty,
                "seed": asked.seed,
                "stop": list(asked.stop),
                "eos_token_ids": list(geometry.eos_token_ids),
                "guide": asked.guide_grammar,
                "logprobs": asked.logprobs,
            },
            "scoring": dataclasses.asdict(asked.scoring) if asked.scoring else None,
            "images": [
                {**picture.facts, "identity": identify(picture.facts["identity"]), "grid": [vision.rows, vision.cols]}
                for picture, vision in zip(pictures, inputs, strict=True)
            ],
            "model": self._model,
            "notice": self.profile.notice,
            "timings_ms": {
                "image_decode": image_decode_ms,
                "preprocess": 1e3 * (prepared_s - received_s) - image_decode_ms,
            },
            "received_s": received_s,
            "prepared_s": prepared_s,
            "trace_id": trace_id,
        }
        return StepTensors(
            **tensors,
            input_ids=prompt.input_ids,
            image_index=prompt.image_index(geometry.token_budget),
            position_ids=prompt.position_ids,
            context=json.dumps(context),
        )

    def close(self) -> None:
        """End the sandbox's process."""
        self._sandbox.close()

    def _picture(self, data: bytes, index: int, count: int):
        profile = self.profile
        try:
            return self._sandbox.prepare(
                data,
                preset=profile.pixel_preset,
                min_pixels=profile.min_pixels,
                max_pixels=profile.max_pixels,
                not_a_chest=self._not_a_chest,
                views=profile.views,
            )
        except CxrError as error:
            raise type(error)(f"IMAGES[{index}]: {error.message}" if count > 1 else error.message) from None


def _adapter(bundle: Bundle) -> dict[str, str]:
    """What a reading says of the LoRA adapter that it is made with."""
    found = bundle.adapter
    return {"adapter": found["name"], "adapter_sha256": found["sha256"]} if found else {}


def sampling_of(context: str) -> Sampling:
    """How the decoder shall sample, out of CONTEXT.

    Raises
    ------
    InvalidRequest
        CONTEXT was not written by `Preprocessor`, or asks for a sampling that does not exist.
    """
    with _reading_context():
        return Sampling(**json.loads(context)["sampling"])


def scoring_of(context: str) -> Scoring | None:
    """What of the answer the decoder shall score, out of CONTEXT; None where nothing is asked for.

    Raises
    ------
    InvalidRequest
        CONTEXT was not written by `Preprocessor`.
    """
    with _reading_context():
        asked = json.loads(context)["scoring"]
        return Scoring(**{**asked, "choices": tuple(asked["choices"])}) if asked else None


@contextlib.contextmanager
def _reading_context() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidRequest(
            f"CONTEXT is not what dicom_preprocess writes ({type(error).__name__}: {error}); "
            "call the ensemble cxr_reader"
        ) from None


def completion_json(completion, context: str, arrived_s: float) -> str:
    """COMPLETION: how a stream of the decoder ended, with the CONTEXT that came with its request.

    Parameters
    ----------
    completion : cxr_triton.engines.runtime.stream.Completion
    context : str
    arrived_s : float
        Monotonic time at which the decoder got the request.
    """
    return json.dumps({**dataclasses.asdict(completion), "arrived_s": arrived_s, "context": json.loads(context)})


def build_reading(completion: dict) -> Reading:
    """Last stage: the typed reading of a COMPLETION.

    `Reading.timings_ms` covers the way from the start of preprocessing to here: ``image_decode``, ``preprocess``,
    ``vision`` (waiting for the encoder included), ``queue``, ``prefill``, ``decode``, ``scores`` (where they were asked
    for) and ``report``, each with its way through Triton; ``total`` is their sum, ``first_token`` the time until the
    decoder had the first token.
    """
    context = completion["context"]
    parsed = parse(
        completion["text"],
        grammar=context["grammar"],
        answer=context["answer"],
        labels=context["labels"],
        finish_reason=completion["finish_reason"],
        image_sizes=[(facts["rows"], facts["columns"]) for facts in context["images"]],
    )
    if parsed.status == "ok" and any(DOUBTFUL & set(facts["flags"]) for facts in context["images"]):
        parsed = dataclasses.replace(parsed, status="doubtful_image")
    scores, decoder_ms = completion["scores"], completion["timings_ms"]
    findings = tuple(dataclasses.replace(each, score=scores.get(each.label)) for each in parsed.findings)
    received_s, prepared_s = context["received_s"], context["prepared_s"]
    arrived_s, reported_s = completion["arrived_s"], time.monotonic()
    timings_ms = {
        **context["timings_ms"],
        "vision": 1e3 * (arrived_s - prepared_s),
        **{phase: decoder_ms[phase] for phase in ("queue", "prefill", "decode", "scores") if phase in decoder_ms},
        "report": 1e3 * (reported_s - arrived_s) - decoder_ms["total"],
        "first_token": 1e3 * (arrived_s - received_s) + decoder_ms["time_to_first_token"],
        "total": 1e3 * (reported_s - received_s),
    }
    return Reading.of(
        dataclasses.replace(parsed, findings=findings),
        task=context["task"],
        prompt=context["prompt"],
        model=context["model"],
        images=tuple(context["images"]),
        usage=completion["usage"],
        timings_ms={stage: round(value, 3) for stage, value in timings_ms.items()},
        token_logprobs=tuple(completion["token_logprobs"]),
        token_ends=tuple(completion["token_ends"]),
        scores=scores,
        notice=context["notice"],
        guide=context["guide"],
        trace_id=context["trace_id"],
    )


def wire_error(error: Exception, trace_id: str = "") -> str:
    """Error text for the wire; of an unexpected error only an incident number leaves the process.

    The number stands in the log with the traceback, and with the trace that the request is of.
    """
    if isinstance(error, CxrError):
        return error.wire()
    incident = secrets.token_hex(4)
    log.error("incident %s, trace %s", incident, trace_id or "unknown", exc_info=error)
    return InternalError(f"the server failed; its log has the details under incident {incident}").wire()
