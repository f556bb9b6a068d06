"""`cxr-triton golden` against the real server: the same as transformers, other texts, another bundle."""

import hashlib
import json

import pytest
from click.testing import CliRunner
from served import radiograph

from cxr_triton.cli import main
from cxr_triton.engines.verify.thresholds import thresholds_of

REQUESTS = ({}, {"prompt": "Describe the heart."})  # labels, and text


@pytest.fixture(scope="module")
def engine(served_bundle, tmp_path_factory):
    """A folder as `make-engine` leaves it: bundle, images, and the record with readings of transformers."""
    from cxr_triton.engines.verify.reference import Case, Reference, request_json
    from cxr_triton.profile import load_profile

    folder = tmp_path_factory.mktemp("engine")
    (folder / "bundle").symlink_to(served_bundle)
    (folder / "phantoms").mkdir()
    (folder / "verification").mkdir()
    profile = load_profile(served_bundle.parent / "profile.yaml")
    cases = []
    for i, request in enumerate(REQUESTS * 2):
        image = radiograph(i)
        (folder / "phantoms" / f"{i}.dcm").write_bytes(image)
        cases.append(Case(image, request_json({**request, "max_new_tokens": 24})))
    reference = Reference(served_bundle.parent / "checkpoint", profile, device="cpu")
    try:
        answers = reference.read(cases)
        record = {
            "reference": reference.facts,
            "thresholds": thresholds_of("fp32", "fp32"),
            "details": {
                "images": [
                    {
                        "sha256": hashlib.sha256(case.image).hexdigest(),
                        "request": json.loads(case.request),
                        "reference": {
                            "text": a.text,
                            "tokens": a.tokens,
                            "finish_reason": a.finish_reason,
                            "status": "ok",  # as the gate adds it
                            "says": [],
                        },
                    }
                    for case, a in zip(cases, answers, strict=True)
                ]
            },
        }
    finally:
        reference.close()
    (folder / "verification" / "record.json").write_text(json.dumps(record))
    return folder


def golden(engine, server, *more):
    command = ["golden", str(engine), "--url", server.grpc, "--concurrency", "4", "--json", "-", *more]
    return CliRunner().invoke(main, command)


def test_the_server_says_what_transformers_said_alone_and_together(engine, server):
    held = golden(engine, server)
    assert held.exit_code == 0, held.output
    result = json.loads(held.stdout)
    assert result["passed"] and "passed: onnxruntime fp32" in held.stderr
    for measured in result["rounds"].values():
        assert measured["images"] == 4 and measured["identical"] == 1
        assert measured["agreement"] == {"label_iou": 1, "prose_f1": 1}
    assert result["server"]["name"] == "triton" and result["reference"]["runtime"] == "transformers"


def test_answers_that_agree_too_little_are_refused(engine, server, tmp_path):
    other = changed(engine, tmp_path, lambda cases: cases[1]["reference"].update(text="Nothing that it ever said."))
    refused = golden(other, server, "--images", str(engine / "phantoms"))
    assert refused.exit_code == 1
    result = json.loads(refused.stdout)
    assert not result["passed"] and result["rounds"]["alone"]["identical"] == 3 / 4
    assert result["rounds"]["alone"]["agreement"]["prose_f1"] < result["limits"]["prose_f1"]
    assert "REFUSED" in refused.stderr


def test_another_bundle_missing_images_and_no_record_are_errors(engine, server, tmp_path):
    lost = changed(engine, tmp_path / "lost", lambda cases: cases[0].update(sha256="0" * 64))
    said = golden(lost, server, "--images", str(engine / "phantoms"))
    assert said.exit_code == 1 and "1 of the 4 images of the record are not in" in said.stderr
    other = changed(engine, tmp_path / "other", lambda cases: None)
    (other / "bundle").unlink()
    (other / "bundle").mkdir()
    for file in (engine / "bundle").iterdir():
        (other / "bundle" / file.name).symlink_to(file)
    (other / "bundle" / "manifest.json").unlink()
    (other / "bundle" / "manifest.json").write_text((engine / "bundle" / "manifest.json").read_text() + "\n")
    said = golden(other, server, "--images", str(engine / "phantoms"))
    assert said.exit_code == 1 and "[SERVER_MISMATCH]" in said.stderr and "serves bundle" in said.stderr
    said = golden(tmp_path, server)
    assert said.exit_code == 1 and "is no record of readings" in said.stderr


def changed(engine, folder, change):
    """The folder with another record."""
    (folder / "verification").mkdir(parents=True)
    (folder / "bundle").symlink_to((engine / "bundle").resolve())
    record = json.loads((engine / "verification" / "record.json").read_text())
    change(record["details"]["images"])
    (folder / "verification" / "record.json").write_text(json.dumps(record))
    return folder
