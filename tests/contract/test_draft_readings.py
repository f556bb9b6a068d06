"""What the demonstration model says of phantoms, with and without guessing what it says."""

from pathlib import Path

import numpy as np
import pytest
from bundles import build_openvino
from test_generate import Free, Receiver

from cxr_triton import phantom
from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.pipeline import Preprocessor, sampling_of
from cxr_triton.engines.runtime.drafts import Drafts
from cxr_triton.engines.runtime.judged import JudgedSession
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.verify.reference import request_json
from cxr_triton.export.export import export_checkpoint
from cxr_triton.profile import load_profile

PHANTOM = Path(__file__).parents[1] / "phantom"
PHANTOMS = 24


@pytest.fixture(scope="module", params=["fp32", "int4"])
def export(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts") / "export"
    profile = load_profile(PHANTOM / "profile.yaml")
    export_checkpoint(str(PHANTOM / "checkpoint"), folder, profile=profile, precision=request.param, progress=False)
    return folder, request.param


@pytest.fixture(params=[build_bundle, build_openvino], ids=["onnxruntime", "openvino"])
def bundle(request, export, tmp_path):
    folder, precision = export
    more = {"precision": precision} if request.param is build_openvino else {}
    return request.param(folder, tmp_path / "bundle", **more)


def requests(bundle):
    """Of phantoms, through our preprocessing and tower."""
    preset = load_profile(PHANTOM / "profile.yaml").pixel_preset
    vision, preprocessor, asked = bundle.open_vision(threads=1), Preprocessor(bundle.path), []
    for file in phantom.png_files(PHANTOMS, 7, preset):
        step = preprocessor.prepare([file], request_json({}))
        rows = vision.encode(step.pixel_windows, step.patch_rows_cols, step.valid, step.merge_order)
        asked.append(
            Generation(
                input_ids=step.input_ids,
                position_ids=step.position_ids,
                image_index=step.image_index,
                image_embeddings=rows.reshape(-1, rows.shape[-1]),
                sampling=sampling_of(step.context),
            )
        )
    preprocessor.close()
    return asked


def read(bundle, asked, slots, drafts=None):
    with DecoderRuntime(bundle, slots=slots, threads=1, drafts=drafts) as runtime:
        receivers = [Receiver() for _ in asked]
        for generation, receiver in zip(asked, receivers, strict=True):
            runtime.submit(generation, receiver)
        return [receiver.wait().tokens for receiver in receivers], runtime.steps


def test_readings_of_phantoms_are_the_same_with_drafts(bundle):
    """In fp32 token by token; where weights are int4 and a step's rows are rounded together, but for near ties."""
    asked = requests(bundle)
    plain, plain_steps = read(bundle, asked, slots=1)
    drafts = Drafts(1 << 20, costs=Free())
    alone, steps = read(bundle, asked, slots=1, drafts=drafts)
    assert steps < 0.5 * plain_steps and drafts.counts()["accepted"] > 200
    crowd, _ = read(bundle, asked, slots=8, drafts=drafts)
    session = JudgedSession(bundle, bundle.open_decoder(slots=1, threads=1))
    for generation, said, *others in zip(asked, plain, alone, crowd, strict=True):
        for other in others:
            if other == said:
                continue
            assert bundle.precision == "int4"
            at = next(i for i, (one, two) in enumerate(zip(said, other, strict=False)) if one != two)
            (logits,) = session.forced([generation], [np.array(said[: at + 1])])
            best = np.sort(logits[at])[-2:]
            assert {said[at], other[at]} == set(np.argsort(logits[at])[-2:].tolist())
            assert best[1] - best[0] < 0.02 * np.abs(logits[at]).max()
