"""Scores of the demonstration model: against transformers, alone and in a crowd, and against what was drawn."""

import json
import time
from pathlib import Path

import evaluate
import numpy as np
import pytest
from bundles import build_openvino
from fake_session import Receiver

from cxr_triton import phantom, phantom_file
from cxr_triton.alternatives import SCORE_LIMIT, alternatives
from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.pipeline import Preprocessor, build_reading, completion_json, sampling_of, scoring_of
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.export.export import export_checkpoint
from cxr_triton.pixels import display, image
from cxr_triton.pixels.dicom import read_image
from cxr_triton.profile import load_profile

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"
READ, CROWD = 30, 8


class Room:
    """The stages of a reading in this process."""

    def __init__(self, bundle):
        self._preprocessor = Preprocessor(bundle.path)
        self._vision, self._session = bundle.open_vision(threads=1), bundle.open_decoder(slots=8, threads=1)
        self._bundle = bundle

    def close(self):
        self._preprocessor.close()

    def prepared(self, data, **asked):
        step = self._preprocessor.prepare([data], json.dumps(asked))
        tensors = step.pixel_windows, step.patch_rows_cols, step.valid, step.merge_order
        embeddings = self._vision.encode(*tensors)
        return step.context, Generation(
            input_ids=step.input_ids,
            position_ids=step.position_ids,
            image_index=step.image_index,
            image_embeddings=embeddings.reshape(-1, embeddings.shape[-1]),
            sampling=sampling_of(step.context),
            scoring=scoring_of(step.context),
        )

    def read(self, prepared, together=True):
        """Readings, all at once or one after the other."""
        receivers = [Receiver() for _ in prepared]
        with DecoderRuntime(self._bundle, session=self._session, queue_size=len(prepared)) as runtime:
            for (_, generation), receiver in zip(prepared, receivers, strict=True):
                runtime.submit(generation, receiver)
                if not together:
                    receiver.wait()
            completions = [receiver.completion for receiver in receivers]
        arrived_s = time.monotonic()
        texts = [
            completion_json(done, context, arrived_s) for done, (context, _) in zip(completions, prepared, strict=True)
        ]
        return [build_reading(json.loads(text)) for text in texts]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder, profile = tmp_path_factory.mktemp("scores"), load_profile(PHANTOM / "profile.yaml")
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", profile, precision="fp32", progress=False)
    return folder / "export"


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def room(request, export, tmp_path_factory):
    build = build_bundle if request.param == "onnxruntime" else build_openvino
    room = Room(build(export, tmp_path_factory.mktemp("scores") / "bundle"))
    yield room
    room.close()


@pytest.fixture(scope="module")
def phantoms():
    return evaluate.held_out(READ)


@pytest.fixture(scope="module")
def files(phantoms):
    return [phantom_file.write_dicom(each, photometric=evaluate.variant(i)[1]) for i, each in enumerate(phantoms)]


@pytest.fixture(scope="module")
def reference():
    import torch

    torch.set_num_threads(1)
    return evaluate.Reference()


def in_transformers(reference, data, generation, texts):
    """Log-probability of each answer after a prompt, and that of each token of the first."""
    from PIL import Image

    torch = reference.torch
    profile = load_profile(PHANTOM / "profile.yaml")
    pixels = display.render(read_image(data), profile.pixel_preset).pixels
    budget = {"min_pixels": profile.min_pixels, "max_pixels": profile.max_pixels}
    picture = image.resize(pixels, image.target_size(*pixels.shape, **budget))
    seen = reference.processor(Image.fromarray(picture), return_tensors="pt")
    totals, first = [], None
    for text in texts:
        answer = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*generation.input_ids.tolist(), *answer]])
        with torch.inference_mode():
            logits = reference.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == reference.model.config.image_token_id).int(),
                pixel_values=seen["pixel_values"],
                image_grid_thw=seen["image_grid_thw"],
            ).logits[0]
        rows = torch.log_softmax(logits[len(generation.input_ids) - 1 : -1].double(), -1)
        each = rows[torch.arange(len(answer)), torch.tensor(answer)]
        first = each.tolist() if first is None else first
        totals.append(float(each.sum()))
    return totals, first


def test_scores_and_log_probabilities_are_those_of_transformers(room, reference, phantoms, files):
    """Every list is given to transformers as a whole answer; what all have in common drops out of the difference."""
    sizes = [len(each.labels) for each in phantoms]
    for number in (sizes.index(1), sizes.index(3)):
        context, generation = room.prepared(files[number], scores=True, logprobs=True)
        (reading,) = room.read([(context, generation)])
        found = alternatives(reading.text, generation.scoring)
        texts = [reading.text[: found.start] + text for text in found.texts]
        totals, first = in_transformers(reference, files[number], generation, texts)
        assert texts[0] == reading.text
        assert reading.token_logprobs[: len(first)] == pytest.approx(first, abs=2e-3)
        sums = {k: [np.logaddexp.reduce([totals[i] for i in side]) for side in v] for k, v in found.choices.items()}
        odds = {label: given - lacking for label, (given, lacking) in sums.items()}
        expected = {label: min(max(value, -SCORE_LIMIT), SCORE_LIMIT) for label, value in odds.items()}
        assert reading.scores == pytest.approx(expected, abs=0.1)
        assert sum(abs(score) < SCORE_LIMIT for score in reading.scores.values()) > 4
        assert {f.label: f.score for f in reading.findings} == {
            f.label: reading.scores[f.label] for f in reading.findings
        }


def test_scores_in_a_crowd_are_those_alone(room, files):
    prepared = [room.prepared(data, scores=True, logprobs=True) for data in files[:CROWD]]
    alone, crowd = room.read(prepared, together=False), room.read(prepared)
    for one, other in zip(alone, crowd, strict=True):
        assert one.text == other.text and len(one.scores) == 14
        assert other.scores == pytest.approx(one.scores, abs=2e-3)
        assert other.token_logprobs == pytest.approx(one.token_logprobs, abs=2e-3)


def test_a_label_that_was_drawn_is_scored_above_one_that_was_not(room, phantoms, files):
    readings = room.read([room.prepared(data, scores=True) for data in files])
    for label in phantom.LABELS:
        drawn = np.array([label in each.findings for each in phantoms])
        said = np.array([label in [finding.label for finding in reading.findings] for reading in readings], float)
        scores = np.array([reading.scores[label] for reading in readings])
        assert auroc(drawn, scores) >= max(0.98, auroc(drawn, said))


def auroc(truth, scores):
    above = scores[truth][:, None] - scores[~truth][None]
    return float(((above > 0) + 0.5 * (above == 0)).mean())
