"""The stages of a reading without Triton: tensors of a request, and the reading of a completion."""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from jsonschema import Draft202012Validator
from PIL import Image
from pydicom import dcmread
from served import radiograph, write_paper_bundle

from cxr_triton import phantom, phantom_file
from cxr_triton.engines.pipeline import Preprocessor, build_reading, completion_json, sampling_of, wire_error
from cxr_triton.engines.runtime.stream import Completion
from cxr_triton.errors import InvalidImage, InvalidRequest, NotAChest, PromptTooLong, QueueFull, from_wire
from cxr_triton.pixels.flags import DOUBTFUL

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "reading.schema.json").read_text())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_paper_bundle(tmp_path_factory.mktemp("pipeline") / "bundle", penalty=1.25)


@pytest.fixture(scope="module")
def preprocessor(bundle):
    preprocessor = Preprocessor(bundle)
    yield preprocessor
    preprocessor.close()


WELL_FORMED = Completion(
    text="<think>The heart is large.</think><answer>Cardiomegaly</answer>",
    finish_reason="stop",
    usage={"prompt_tokens": 5, "completion_tokens": 6, "image_tokens": 4},
    timings_ms={"queue": 1.0, "prefill": 2.0, "decode": 3.0, "time_to_first_token": 3.0, "total": 6.0},
)


def request(**asked) -> bytes:
    return json.dumps(asked).encode()


def test_images_keep_their_order_from_pixels_to_prompt(preprocessor):
    prior, current = radiograph(1, rows=160, columns=300), radiograph(2, rows=300, columns=160)
    both = preprocessor.prepare([prior, current], request(task="compare"))
    alone = [preprocessor.prepare([data], request()) for data in (prior, current)]
    for i, single in enumerate(alone):
        assert np.array_equal(both.pixel_windows[i], single.pixel_windows[0])
        assert np.array_equal(both.merge_order[i], single.merge_order[0])
    budget = both.merge_order.shape[1]
    rows = both.image_index[both.image_index >= 0]
    tokens = [int((single.image_index >= 0).sum()) for single in alone]
    assert rows.tolist() == [*range(tokens[0]), *range(budget, budget + tokens[1])]
    facts = json.loads(both.context)["images"]
    assert [(image["rows"], image["columns"]) for image in facts] == [(160, 300), (300, 160)]


def test_a_text_only_request_carries_one_blank_image_that_no_token_uses(preprocessor):
    step = preprocessor.prepare([], request(task="quiz"))
    assert len(step.pixel_windows) == len(step.valid) == 1 and step.valid[0, 0].any()
    assert (step.image_index == -1).all()
    assert json.loads(step.context)["images"] == []


def test_sampling_comes_from_the_request_then_the_checkpoint_then_the_profile(preprocessor):
    default = sampling_of(preprocessor.prepare([radiograph(1)], b"").context)
    assert default.repetition_penalty == 1.25, "generation_config.json wins over the profile"
    assert default.max_new_tokens == 256 and default.temperature == 0
    assert default.eos_token_ids == (314,)
    asked = {"repetition_penalty": 1.5, "max_new_tokens": 9, "temperature": 0.5, "seed": 3, "stop": ["."]}
    sampling = sampling_of(preprocessor.prepare([radiograph(1)], request(**asked)).context)
    assert {name: getattr(sampling, name) for name in asked} == {**asked, "stop": (".",)}


def test_a_prompt_that_fills_the_context_is_refused(tmp_path):
    preprocessor = Preprocessor(write_paper_bundle(tmp_path / "bundle", max_sequence=512))
    try:
        head = len(preprocessor.prepare([], request(prompt="x")).input_ids)  # the tokenizer has a token for each byte
        assert len(preprocessor.prepare([], request(prompt="x" * (512 - head))).input_ids) == 511
        with pytest.raises(PromptTooLong, match="512 tokens, allowed are 511"):
            preprocessor.prepare([], request(prompt="x" * (513 - head)))
    finally:
        preprocessor.close()


def test_the_image_that_fails_is_named(preprocessor):
    with pytest.raises(InvalidImage, match=r"^IMAGES\[1\]: "):
        preprocessor.prepare([radiograph(1), b"GIF89a"], request(task="compare"))
    with pytest.raises(InvalidImage, match=r"^file is a GIF, no DICOM"):
        preprocessor.prepare([b"GIF89a"], request())


def test_a_bad_request_is_refused_before_an_image_is_decoded(preprocessor):
    with pytest.raises(InvalidRequest, match="2 given"):
        preprocessor.prepare([b"no image"] * 2, request())


def test_a_completion_becomes_a_reading(preprocessor):
    arrived_s = time.monotonic()
    step = preprocessor.prepare([radiograph(1, rows=160, columns=300)], request())
    reading = build_reading(json.loads(completion_json(WELL_FORMED, step.context, arrived_s)))
    assert reading.status == "ok" and [finding.label for finding in reading.findings] == ["Cardiomegaly"]
    assert reading.reasoning == "The heart is large."
    assert (reading.task, reading.prompt) == ("findings", "Find abnormalities and support devices.")
    assert (
        reading.model["precision"] == "int4"
        and reading.model["revision"] == "r1"
        and len(reading.model["bundle"]) == 64
    )
    assert (reading.images[0]["rows"], reading.images[0]["columns"]) == (160, 300)
    assert reading.usage["completion_tokens"] == 6
    assert "research" in reading.notice.lower()
    assert type(reading).from_json(reading.to_json()) == reading


def test_a_reading_says_which_images_it_is_of(preprocessor):
    """As it is put together from CONTEXT, in both forms; the hashed one has no UID anywhere."""
    image, picture = phantom_file.write_dicom(phantom.draw(np.random.default_rng(1))), io.BytesIO()
    Image.linear_gradient("L").save(picture, "PNG")
    source, files = dcmread(io.BytesIO(image)), [picture.getvalue(), image]
    uids = {
        "study_instance_uid": source.StudyInstanceUID,
        "series_instance_uid": source.SeriesInstanceUID,
        "sop_instance_uid": source.SOPInstanceUID,
    }
    validator = Draft202012Validator({"$ref": "#/$defs/identity", "$defs": SCHEMA["$defs"]})
    for identifiers in ("plain", "hashed"):
        context = preprocessor.prepare(files, request(task="compare", identifiers=identifiers)).context
        recorded = [facts["identity"] for facts in json.loads(context)["images"]]
        for identity in recorded:
            validator.validate(identity)
        digests = [hashlib.sha256(file).hexdigest() for file in files]
        assert [identity["file_sha256"] for identity in recorded] == digests
        assert recorded[1]["identifiers"] == identifiers and "identifiers" not in recorded[0]
        for key, uid in uids.items():
            assert recorded[1][key] == (uid if identifiers == "plain" else hashlib.sha256(uid.encode()).hexdigest())
        assert any(uid in context for uid in uids.values()) == (identifiers == "plain")
    default = json.loads(preprocessor.prepare([image], request()).context)["images"][0]["identity"]
    assert default["study_instance_uid"] == source.StudyInstanceUID


@pytest.mark.parametrize(
    ("finish_reason", "flags", "status"),
    [
        ("stop", ["lossy", "lateral", "view_unknown"], "ok"),
        *(("stop", [flag], "doubtful_image") for flag in sorted(DOUBTFUL)),
        ("length", ["picture_unlike_chest"], "truncated"),
    ],
)
def test_a_reading_of_a_doubtful_image_is_never_plainly_ok(preprocessor, finish_reason, flags, status):
    step = preprocessor.prepare([radiograph(1), radiograph(2)], request(task="compare"))
    context = json.loads(step.context)
    context["images"][0]["flags"] = flags  # of the prior
    completion = dataclasses.replace(WELL_FORMED, finish_reason=finish_reason)
    text = completion_json(completion, json.dumps(context), time.monotonic())
    assert build_reading(json.loads(text)).status == status


def test_the_bundle_s_profile_says_what_becomes_of_a_leg_and_of_a_lateral(tmp_path):
    leg, lateral = (BytesIO(radiograph(1)) for _ in range(2))
    for file, changes in ((leg, {"BodyPartExamined": "KNEE"}), (lateral, {"ViewPosition": "LL"})):
        dataset = pydicom.dcmread(file)
        dataset.update(changes)
        file.seek(0)
        dataset.save_as(file, enforce_file_format=True)
    for policy, views in (("refuse", "[frontal]"), ("flag", "[frontal, lateral]")):
        keys = f"not_a_chest: {policy}\nviews: {views}\n"
        preprocessor = Preprocessor(write_paper_bundle(tmp_path / policy, more=keys))
        with contextlib.closing(preprocessor):
            flags = json.loads(preprocessor.prepare([lateral.getvalue()], request()).context)["images"][0]["flags"]
            assert ("view_untrained" in flags) == (policy == "refuse")
            if policy == "refuse":
                with pytest.raises(NotAChest, match="KNEE"):
                    preprocessor.prepare([leg.getvalue()], request())
            else:
                context = json.loads(preprocessor.prepare([leg.getvalue()], request()).context)
                assert "not_a_chest" in context["images"][0]["flags"]


def test_stages_add_up_to_the_total(preprocessor):
    step = preprocessor.prepare([radiograph(1)], request())
    time.sleep(0.02)  # the vision encoder
    arrived_s = time.monotonic()
    time.sleep(0.06)
    timings_ms = {"queue": 10.0, "prefill": 20.0, "decode": 30.0, "time_to_first_token": 30.0, "total": 60.0}
    completion = Completion(text="", finish_reason="length", usage={}, timings_ms=timings_ms)
    text = completion_json(completion, step.context, arrived_s)
    time.sleep(0.01)
    stages = build_reading(json.loads(text)).timings_ms
    assert stages["vision"] >= 20 and stages["report"] >= 10
    total, first_token = stages.pop("total"), stages.pop("first_token")
    assert sum(stages.values()) == pytest.approx(total, abs=1)
    assert first_token == pytest.approx(sum(stages.values()) - stages["decode"] - stages["report"], abs=1)


def test_context_of_another_hand_is_refused():
    for context in ("", "[]", "{}", '{"sampling": {"max_new_tokens": 0}}', '{"sampling": {"beam": 4}}'):
        with pytest.raises(InvalidRequest):
            sampling_of(context)


def test_unexpected_errors_keep_their_details_in_the_log(caplog):
    try:
        raise KeyError("/srv/secret/patient.dcm")
    except KeyError as error:
        with caplog.at_level(logging.ERROR):
            text = wire_error(error)
    assert text.startswith("[INTERNAL] ") and "secret" not in text and "KeyError" not in text
    incident = text.rpartition(" ")[2]
    assert f"incident {incident}" in caplog.text and "/srv/secret/patient.dcm" in caplog.text
    assert type(from_wire(wire_error(QueueFull("2 wait")))) is QueueFull


def test_preprocessing_loads_no_engine(bundle):
    code = (
        "import sys; from cxr_triton.engines.pipeline import Preprocessor; Preprocessor(sys.argv[1]).close();"
        "print(*{'onnxruntime', 'onnx', 'torch', 'transformers', 'tritonclient'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code, bundle], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == []
