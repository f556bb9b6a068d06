"""The demonstration model on held-out phantoms: in transformers, and through the whole stack as DICOM."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import pytest

from cxr_triton import phantom, phantom_file
from cxr_triton.errors import InvalidRequest
from cxr_triton.pixels import dicom, display, image
from cxr_triton.profile import load_profile

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"

HELD_OUT = 200
SERVED = 100


@pytest.fixture(scope="module")
def profile():
    return load_profile(PHANTOM / "profile.yaml")


@pytest.fixture(scope="module")
def reference():
    import torch

    torch.set_num_threads(2)
    return evaluate.Reference()


def test_reads_held_out_phantoms(profile, reference, record_property):
    phantoms = evaluate.held_out(HELD_OUT)
    pictures = [resized(p.picture(*evaluate.variant(i)), profile) for i, p in enumerate(phantoms)]
    said = [evaluate.labels_of(answer, profile) for answer in reference.read(pictures)]
    scores = evaluate.score(said, [frozenset(p.labels) for p in phantoms])
    record_property("scores", scores)
    print(json.dumps(scores))
    assert scores["exact"] >= 0.90


def test_another_picture_gets_another_answer(profile, reference):
    """The answer comes from the picture: the same prompt over 20 phantoms gives what is drawn, not one text."""
    phantoms = evaluate.held_out(20)
    answers = reference.read([resized(p.picture("mimic_jpg"), profile) for p in phantoms])
    assert len(set(answers)) > 8


@pytest.fixture(scope="module", params=["fp32", "int4", "int4-openvino", "int4-mixed", "int4-int8", "int4-w4a8"])
def served(request, tmp_path_factory):
    """A warm server on the phantom model, and its precision with the engine."""
    pytest.importorskip("pytriton")
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.engines.onnxruntime import int8
    from cxr_triton.engines.recipe import load_recipe
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    if request.param in ("int4-mixed", "int4-int8", "int4-w4a8") and not int8.is_exact(int8.cpu_features()):
        pytest.skip(f"its tower is in int8: {int8.REMEDY}")
    folder = tmp_path_factory.mktemp(f"phantom-{request.param}")
    profile = load_profile(PHANTOM / "profile.yaml")
    precision, _, engine = request.param.partition("-")
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", profile, precision=precision, progress=False)
    recipe = load_recipe(f"cpu-{request.param}") if engine else None
    bundle = build_bundle(folder / "export", folder / "bundle", recipe=recipe)
    write_repository(bundle.path, folder / "repository", Settings(threads=1), unverified=True)
    ports = {"grpc_port": 0, "metrics_port": 0}
    with Server(folder / "repository", **ports) as server:
        yield server, request.param


@pytest.fixture(scope="module")
def files():
    """Held-out phantoms as DICOM: every syntax and both photometrics, in turn."""
    syntaxes = list(phantom_file.SYNTAXES)
    return [
        phantom_file.write_dicom(p, photometric=evaluate.variant(i)[1], syntax=syntaxes[i % len(syntaxes)])
        for i, p in enumerate(evaluate.held_out(SERVED))
    ]


@pytest.fixture(scope="module")
def expected(files, profile, reference):
    """Label sets that transformers reads from the same files, displayed and resized by the product."""
    pictures = [display.render(dicom.read_image(data), profile.pixel_preset).pixels for data in files]
    answers = reference.read([resized(pixels, profile) for pixels in pictures])
    return [evaluate.labels_of(answer, profile) for answer in answers]


@pytest.mark.triton
def test_served_accuracy_is_that_of_transformers(served, files, expected, record_property):
    from cxr_triton.client import Reader

    server, precision = served
    drawn = [frozenset(p.labels) for p in evaluate.held_out(SERVED)]
    with Reader(server.grpc) as reader, ThreadPoolExecutor(4) as pool:
        readings = list(pool.map(lambda data: reader.read([data]).result(), files))
    said = [frozenset(finding.label for finding in reading.findings) for reading in readings]
    ours, theirs = evaluate.score(said, drawn), evaluate.score(expected, drawn)
    same = sum(a == b for a, b in zip(said, expected, strict=True)) / len(said)
    record_property("scores", {"precision": precision, "served": ours, "transformers": theirs, "same": same})
    print(json.dumps({"precision": precision, "served": ours["exact"], "transformers": theirs["exact"], "same": same}))
    if precision == "fp32":
        assert abs(ours["exact"] - theirs["exact"]) <= 0.01
        assert same >= 0.99
    else:
        assert ours["exact"] >= theirs["exact"] - 0.10


@pytest.mark.triton
def test_a_reading_says_how_sure_the_model_is(served, profile):
    from cxr_triton.client import Reader

    server, precision = served
    data = phantom_file.write_dicom(evaluate.held_out(1)[0])
    with Reader(server.grpc) as reader:
        plain = reader.read([data]).result()
        full = reader.read([data], logprobs=True, scores=True).result()
        with pytest.raises(InvalidRequest, match=r"REQUEST.scores: the task answers in prose"):
            history = [{"role": "user", "content": full.prompt}, {"role": "assistant", "content": full.text}]
            reader.read([data], task="differentials", history=history, scores=True).result()
    assert set(full.scores) == set(profile.labels) and plain.scores == {} and plain.token_logprobs == ()
    assert {finding.label for finding in full.findings} == {label for label, score in full.scores.items() if score > 0}
    assert [finding.score for finding in full.findings] == [full.scores[finding.label] for finding in full.findings]
    assert len(full.token_logprobs) == len(full.token_ends) == full.usage["completion_tokens"]
    assert full.token_ends[-1] == len(full.text) and max(full.token_logprobs) <= 0
    assert full.usage["scored_tokens"] > 14 and full.timings_ms["scores"] > 0 and "scores" not in plain.timings_ms
    if precision != "int4":  # a kernel of it rounds otherwise beside an odd number of rows
        assert plain.text == full.text


@pytest.mark.triton
def test_follow_up_answers_in_prose(served):
    from cxr_triton.client import Reader

    server, _ = served
    source = evaluate.held_out(1)[0]
    data = phantom_file.write_dicom(source)
    with Reader(server.grpc) as reader:
        first = reader.read([data]).result()
        history = [{"role": "user", "content": first.prompt}, {"role": "assistant", "content": first.text}]
        second = reader.read([data], task="structured_report", history=history).result()
    assert first.status == second.status == "ok"
    assert second.text == phantom.report(source) or "Impression" in second.text


@pytest.mark.triton
def test_answers_follow_a_guide(served, profile):
    from cxr_triton.client import Reader

    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    schema["additionalProperties"] = False
    source = evaluate.held_out(1)[0]
    data = phantom_file.write_dicom(source)
    with Reader(served[0].grpc) as reader:
        plain = reader.read([data]).result()
        held = reader.read([data], guide="answer").result()
        assert (held.text, held.guide, plain.guide) == (plain.text, "answer", "none")
        for seed in range(6):
            drawn = reader.read([data], guide="answer", temperature=1.5, seed=seed, max_new_tokens=600).result()
            assert drawn.status in ("ok", "truncated") and not drawn.unknown_labels
        at_once = reader.read([data], mode="labels", scores=True).result()
        assert set(at_once.scores) == set(profile.labels)
        assert at_once.status == "ok" and at_once.findings and at_once.text.startswith("<answer>")
        assert at_once.usage["completion_tokens"] < plain.usage["completion_tokens"] / 2
        as_json = reader.read([data], guide={"json_schema": schema}).result()
        assert as_json.status == "ok" and isinstance(json.loads(as_json.answer)["sure"], bool)
        with pytest.raises(InvalidRequest, match=r"REQUEST\.guide\.json_schema"):
            reader.read([data], guide={"json_schema": {"$ref": "http://127.0.0.1:1/a"}}).result()


def resized(pixels, profile):
    return image.resize(
        pixels, image.target_size(*pixels.shape, min_pixels=profile.min_pixels, max_pixels=profile.max_pixels)
    )
