"""The engine that the gate judges: what can be run of it here, and its sessions, driven as the served models do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path

import numpy as np

from cxr_triton.chat import Prompt
from cxr_triton.engines import DEFAULT, engine
from cxr_triton.engines.bundle import SIDE_FILES, Bundle
from cxr_triton.engines.pipeline import Preprocessor, StepTensors, sampling_of
from cxr_triton.engines.runtime.stream import Chunk, Completion, Generation
from cxr_triton.engines.verify.answers import Answer
from cxr_triton.engines.verify.record import subject
from cxr_triton.engines.verify.reference import Case
from cxr_triton.errors import CxrError, InvalidRequest
from cxr_triton.pixels import image
from cxr_triton.profile import ModelProfile
from cxr_triton.request import ReadRequest
from cxr_triton.sampling import Sampling

SLOTS = 5
"""Sequences that the engine holds; also how many reference logits are in memory. Four are written together and one
alone, as an engine may run the two by other kernels."""
_ANY = Sampling(max_new_tokens=1)  # where a given answer is forced


def runnable(bundle: Bundle, standin: Bundle | str | Path | None) -> tuple[Bundle, dict]:
    """The bundle whose sessions run here, itself or its stand-in, and what the record says of it.

    Raises
    ------
    InvalidRequest
        The bundle cannot be run here, and the stand-in is missing or of another source.
    """
    error = why_not_here(bundle)
    if error is None:
        return bundle, {"engine": bundle.engine, "standin": None}
    if standin is None:
        raise InvalidRequest(
            f"the {bundle.engine} engines in {bundle.path} cannot be run here ({error}); verify on a machine that runs "
            f"them, or give an {DEFAULT} bundle of the same export with --standin"
        )
    standin = standin if isinstance(standin, Bundle) else Bundle.open(standin)
    if standin.engine != DEFAULT:
        raise InvalidRequest(f"the stand-in in {standin.path} is for {standin.engine}, must be for {DEFAULT}")
    mine, its = _made_of(bundle), _made_of(standin)
    if other := [what for what in mine if mine[what] != its[what]]:
        raise InvalidRequest(
            f"the stand-in in {standin.path} has another {other[0]}; build it from the same checkpoint"
        )
    said = f"{bundle.engine} cannot be run here ({error}); the same checkpoint was run in {DEFAULT} in its place"
    return standin, {"engine": DEFAULT, "standin": subject(standin.manifest), "said": said}


def _made_of(bundle: Bundle) -> dict[str, object]:
    """What a bundle and its stand-in have in common."""
    return {
        "source": bundle.manifest["source"],
        "adapter": bundle.manifest.get("adapter"),
        "precision": bundle.precision,
        "head": bundle.manifest.get("head"),
        "geometry": dataclasses.asdict(bundle.geometry) | {"compute": None},
        **{name: bundle.manifest["files"][name] for name in SIDE_FILES},
    }


def why_not_here(bundle: Bundle) -> str | None:
    """Why a bundle's engines cannot be run here; None if they can."""
    if bundle.engine == bundle.vision_engine == DEFAULT:
        return None
    try:
        bundle.open_vision()
        engine(bundle.engine).try_decoder(bundle, slots=SLOTS)
    except CxrError as error:
        return error.message
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class EngineUnderTest:
    """The sessions of a bundle that runs here.

    Parameters
    ----------
    bundle : Bundle
    threads : int or None
        CPU threads; all cores if None.

    Raises
    ------
    CxrError
        A session cannot be opened.
    """

    def __init__(self, bundle: Bundle, threads: int | None):
        self.bundle = bundle
        self._vision = bundle.open_vision(threads=threads)
        self._decoder = engine(bundle.engine).open_judged(bundle, slots=SLOTS, threads=threads)
        self._preprocessor = Preprocessor(bundle.path, not_a_chest="flag")  # the controls are no chests
        self._prepared: dict[str, tuple[StepTensors, np.ndarray]] = {}

    def close(self) -> None:
        """End the process that decodes images, and the engine."""
        self._preprocessor.close()
        self._decoder.close()

    def embeddings(self, case: Case) -> np.ndarray:
        """(T, hidden) float32 image embeddings of a case through the bundle's own preprocessing."""
        return self._prepare(case)[1]

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(T, hidden) float32 image embeddings of a uint8 picture that needs no resize."""
        geometry = self.bundle.geometry
        vision = image.windows(pixels, window_budget=geometry.window_budget, token_budget=geometry.token_budget)
        return self._vision.encode(**image.stack([vision]))[0, : vision.tokens]

    def _prepare(self, case: Case) -> tuple[StepTensors, np.ndarray]:
        """Step tensors and (T, hidden) embeddings of a case."""
        if case.key not in self._prepared:
            step = self._preprocessor.prepare([case.image], case.request)
            inputs = {n: getattr(step, n) for n in ("pixel_windows", "patch_rows_cols", "valid", "merge_order")}
            rows = self._vision.encode(**inputs)[0]
            self._prepared[case.key] = step, np.array(rows[: int((step.image_index >= 0).sum())])
        return self._prepared[case.key]

    def read(self, cases: Sequence[Case], profile: ModelProfile, count: Callable[[int], None]) -> list[Answer]:
        """The engine's answers through the decoder runtime, `SLOTS` at a time; `count` is called with 1 for each."""
        ends: list[futures.Future[Completion]] = []
        with self._decoder.runtime(len(cases)) as runtime:
            for case in cases:
                step, embeddings = self._prepare(case)
                generation = _generation(
                    step.input_ids, step.position_ids, step.image_index, embeddings, sampling_of(step.context)
                )
                ends.append(futures.Future())
                runtime.submit(generation, functools.partial(_settle, ends[-1], count))
            futures.wait(ends)
        answers = []
        for case, done in zip(cases, (end.result() for end in ends), strict=True):
            asked, tokens = ReadRequest.from_json(case.request, profile), done.usage["completion_tokens"]
            answers.append(Answer.of(done.text, tokens, done.finish_reason, asked, profile))
        return answers

    def forced(
        self, prompts: Sequence[Prompt], embeddings: Sequence[np.ndarray], answers: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Logits with which each token of given answers is predicted: prefill, then one step a token, as in serving.

        Parameters
        ----------
        prompts : sequence of Prompt
            At most `SLOTS`, as of the others.
        embeddings : sequence of (T, hidden) float32 array
        answers : sequence of (A,) int64 array

        Returns
        -------
        list of (A, vocab) float32 array
        """
        generations = [
            _generation(prompt.input_ids, prompt.position_ids, prompt.image_index(max(len(rows), 1)), rows)
            for prompt, rows in zip(prompts, embeddings, strict=True)
        ]
        return self._decoder.forced(generations, answers)


def _generation(
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    image_index: np.ndarray,
    image_embeddings: np.ndarray,
    sampling: Sampling = _ANY,
) -> Generation:
    return Generation(
        input_ids=input_ids,
        position_ids=position_ids,
        image_index=image_index,
        image_embeddings=image_embeddings,
        sampling=sampling,
    )


def _settle(end: futures.Future[Completion], count: Callable[[int], None], chunk: Chunk) -> None:
    """Receive a stream of which only the end matters."""
    if chunk.error is not None:
        count(1)
        end.set_exception(chunk.error)
    elif chunk.completion is not None:
        count(1)
        end.set_result(chunk.completion)
