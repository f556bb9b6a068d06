"""Guided answers of the demonstration model, greedy and drawn, on two engines, with drafts too; see `perf.guided`."""

import json
from pathlib import Path

import jsonschema
import pytest
from bundles import build_openvino
from test_generate import Free

from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.runtime.drafts import Drafts
from cxr_triton.export.export import export_checkpoint
from cxr_triton.perf.guided import DRAWN, REPORT, WAYS, Asked, drawn, greedy
from cxr_triton.profile import load_profile

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"
PICTURES, ANSWERS = 6, 30


@pytest.fixture(scope="module", params=["onnxruntime", "openvino", "onnxruntime with drafts"])
def asked(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"guided-{request.param}")
    profile = load_profile(PHANTOM / "profile.yaml")
    engine, _, drafting = request.param.partition(" ")
    precision = "fp32" if drafting else "int4"  # int4 rounds a step's rows together
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", profile, precision=precision, progress=False)
    if engine == "onnxruntime":
        bundle = build_bundle(folder / "export", folder / "bundle")
    else:
        bundle = build_openvino(folder / "export", folder / "bundle", precision="int4")
    drafts = Drafts(1 << 20, costs=Free()) if drafting else None
    asked = Asked(bundle, PICTURES, threads=1, drafts=drafts)
    yield asked
    asked.close()
    assert drafts is None or drafts.counts()["accepted"] > PICTURES


def test_greedy_answers_are_those_without_a_guide(asked):
    found = greedy(asked)
    assert found["legal_without"] == PICTURES
    assert found["same_tokens"] == PICTURES


def test_drawn_answers_are_in_the_vocabulary(asked):
    faults = {"malformed", "out_of_vocabulary"}
    assert faults & drawn(asked, WAYS["none"], ANSWERS)["statuses"].keys()
    for way in ("answer", "labels"):
        found = drawn(asked, WAYS[way], ANSWERS)
        assert not faults & found["statuses"].keys() and found["in_vocabulary"] > ANSWERS / 2, found


def test_drawn_answers_follow_a_schema(asked):
    requests = [(i % PICTURES, {**WAYS["json_schema"], **DRAWN, "seed": i}) for i in range(12)]
    whole = [parsed for parsed, _ in asked.answers(requests) if parsed.status != "truncated"]
    assert len(whole) > 6
    for parsed in whole:
        assert parsed.status == "ok"
        jsonschema.validate(json.loads(parsed.answer), REPORT)
