"""The written model repository: valid, complete or not there, movable, and consistent from tensor to tensor."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from google.protobuf import text_format

from cxr_triton.cli import main
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.record import PARTS, SCHEMA, subject, write_record
from cxr_triton.errors import InvalidBundle, InvalidRequest, NotVerified
from cxr_triton.triton_repo.package import BUNDLE, ENSEMBLE, MODELS, VERIFICATION, Settings, write_repository

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("integration", ".")]

from served import write_paper_bundle  # noqa: E402


@pytest.fixture
def unverified(tmp_path):
    return write_paper_bundle(tmp_path / "bundle")


@pytest.fixture
def bundle(unverified):
    """With a record as the gate writes one; its graphs are empty, so no gate has run."""
    write_record(unverified, passing(Bundle.open(unverified)))
    return unverified


def passing(bundle: Bundle) -> dict:
    part = {"passed": True, "error": None, "checks": [{"name": "paper", "passed": True}], "measured": {}}
    return {
        **{"schema": SCHEMA, "passed": True, "subject": subject(bundle.manifest), "made": "2026-11-22T00:00:00Z"},
        **{"runtime": {"engine": "onnxruntime", "standin": None}, "images": {"count": 8}},
        "parts": {name: dict(part) for name in PARTS},
    }


def config(repository: Path, model: str):
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())


def test_every_model_has_what_triton_wants(bundle, tmp_path):
    repository = tmp_path / "repository"
    write_repository(bundle, repository, Settings())
    assert {path.name for path in repository.iterdir()} == {*MODELS, ENSEMBLE}, "Triton takes every folder for a model"
    for model in MODELS:
        assert config(repository, model).name == model
        compile((repository / model / "1" / "model.py").read_text(), model, "exec")
    assert any((repository / ENSEMBLE / "1").iterdir()), "an empty version folder gets lost in a copy"


def test_the_ensemble_joins_tensors_of_one_type_and_shape(bundle, tmp_path):
    write_repository(bundle, tmp_path / "repository", Settings())
    ensemble = config(tmp_path / "repository", ENSEMBLE)

    def signature(tensor, batched):
        return tensor.data_type, ([-1] if batched else []) + list(tensor.dims)

    known = {tensor.name: signature(tensor, False) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = config(tmp_path / "repository", step.model_name)
        batched = model.max_batch_size > 0
        takes = {tensor.name: signature(tensor, batched) for tensor in model.input}
        gives = {tensor.name: signature(tensor, batched) for tensor in model.output}
        assert {takes[name] == known[value] for name, value in step.input_map.items()} == {True}
        assert takes.keys() - step.input_map.keys() <= {"STOP"}
        known |= {value: gives[name] for name, value in step.output_map.items()}
    assert {tensor.name: known[tensor.name] for tensor in ensemble.output} == {
        tensor.name: signature(tensor, False) for tensor in ensemble.output
    }


def test_settings_reach_the_models(bundle, tmp_path):
    settings = Settings(slots=7, preprocess_instances=3, threads=2, queue_size=5, batch_invariant=True)
    write_repository(bundle, tmp_path / "r", settings)
    preprocess, vision, decoder = (config(tmp_path / "r", name) for name in MODELS[:3])
    assert preprocess.instance_group[0].count == 3
    assert preprocess.dynamic_batching.default_queue_policy.max_queue_size == 5
    assert vision.parameters["threads"].string_value == decoder.parameters["threads"].string_value == "2"
    assert decoder.parameters["slots"].string_value == "7"
    assert decoder.parameters["queue_size"].string_value == "5"
    assert decoder.parameters["batch_invariant"].string_value == "1"
    assert decoder.model_transaction_policy.decoupled
    assert vision.max_batch_size >= 2, "all images of a request are one batch"


def test_a_repository_can_be_moved(bundle, tmp_path):
    write_repository(bundle, tmp_path / "here", Settings())
    there = (tmp_path / "here").rename(tmp_path / "there")
    for model in MODELS[:3]:
        relative = config(there, model).parameters["bundle"].string_value
        assert Bundle.open(there / relative).digest == Bundle.open(bundle).digest
    assert str(tmp_path) not in "".join(path.read_text() for path in there.glob("*/config.pbtxt"))


def test_a_folder_in_use_is_left_alone(bundle, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    for force in (False, True):
        with pytest.raises(InvalidRequest, match=r"not an empty folder|no model repository"):
            write_repository(bundle, out, Settings(), force=force)
    assert (out / "thesis.txt").read_text() == "years"


def test_force_replaces_a_repository(bundle, tmp_path):
    out = tmp_path / "out"
    write_repository(bundle, out, Settings(slots=1))
    with pytest.raises(InvalidRequest, match="--force"):
        write_repository(bundle, out, Settings(slots=2))
    write_repository(bundle, out, Settings(slots=2), force=True)
    assert config(out, "decoder").parameters["slots"].string_value == "2"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("force", [False, True])
def test_a_damaged_bundle_leaves_nothing_behind(bundle, tmp_path, force):
    out = tmp_path / "out"
    if force:
        write_repository(bundle, out, Settings())
    before = sorted(tmp_path.iterdir())
    path = bundle / "config.json"
    content = path.read_text()
    path.unlink()  # not the hard link in the older repository
    path.write_text(content.replace("2", "3"))
    with pytest.raises(InvalidBundle, match=r"config\.json has SHA-256"):
        write_repository(bundle, out, Settings(), force=force)
    assert sorted(tmp_path.iterdir()) == before
    assert not force or (out / BUNDLE / "config.json").read_text() == content


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"preprocess_instances": 0}, {"threads": -1}, {"queue_size": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        Settings(**wrong)


def test_the_verb_writes_its_result(bundle, tmp_path):
    out = str(tmp_path / "repository")
    ran = CliRunner().invoke(main, ["package", str(bundle), "-o", out, "--slots", "2", "--json", "-"])
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout)
    assert result["repository"] == out and result["settings"]["slots"] == 2
    assert (Path(out) / result["bundle"] / "manifest.json").is_file()
    assert result["verification"] == "passed"


def refused(bundle, out, match):
    with pytest.raises(NotVerified, match=match) as caught:
        write_repository(bundle, out, Settings())
    assert "cxr-triton verify" in caught.value.message and "--unverified" in caught.value.message
    assert not out.exists()


def test_a_bundle_without_record_is_refused(unverified, tmp_path):
    refused(unverified, tmp_path / "out", "was not verified")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["failed", "missing", "no checks", "a failed check", "an error"])
def test_every_part_has_to_have_passed(unverified, tmp_path, part, how):
    record = passing(Bundle.open(unverified))
    match how:
        case "failed":
            record["parts"][part]["passed"] = False
        case "missing":
            del record["parts"][part]
        case "no checks":
            record["parts"][part]["checks"] = []
        case "a failed check":
            record["parts"][part]["checks"] = [{"name": "paper", "passed": False}]
        case "an error":
            record["parts"][part]["error"] = "it broke"
    write_record(unverified, record)
    refused(unverified, tmp_path / "out", f"failed the gate in {part}")


def test_a_failed_record_is_refused(unverified, tmp_path):
    write_record(unverified, {**passing(Bundle.open(unverified)), "passed": False})
    refused(unverified, tmp_path / "out", "failed the gate")


def test_a_record_of_another_bundle_is_refused(bundle, tmp_path):
    other = write_paper_bundle(tmp_path / "other", penalty=1.1)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["verification"] = Bundle.open(bundle).manifest["verification"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    refused(other, tmp_path / "out", "another bundle")
    with pytest.raises(InvalidRequest, match="not about the bundle"):
        write_record(other, manifest["verification"])


def test_a_record_does_not_survive_a_changed_file(bundle, tmp_path):
    """Also when the manifest is made to agree with the file, as an edit by hand would."""
    content = (bundle / "generation_config.json").read_bytes() + b" "
    (bundle / "generation_config.json").write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["generation_config.json"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    refused(bundle, tmp_path / "out", "another bundle")


def test_the_repository_says_how_its_bundle_was_verified(bundle, tmp_path):
    write_repository(bundle, tmp_path / "passed", Settings())
    plain = write_paper_bundle(tmp_path / "plain")
    write_repository(plain, tmp_path / "plain-repository", Settings(), unverified=True)
    for repository, expected in ((tmp_path / "passed", "passed"), (tmp_path / "plain-repository", "unverified")):
        assert (repository / ENSEMBLE / "1" / VERIFICATION).read_text().splitlines()[0] == expected
        assert {config(repository, name).parameters["verification"].string_value for name in (*MODELS, ENSEMBLE)} == {
            expected
        }


def test_the_verb_refuses_and_takes_unverified(unverified, tmp_path):
    out = str(tmp_path / "repository")
    ran = CliRunner().invoke(main, ["package", str(unverified), "-o", out])
    assert ran.exit_code == 1 and "NOT_VERIFIED" in ran.output and not Path(out).exists()
    ran = CliRunner().invoke(main, ["package", str(unverified), "-o", out, "--unverified", "--json", "-"])
    assert ran.exit_code == 0 and json.loads(ran.stdout)["verification"] == "unverified"
    assert "--unverified" in ran.stderr


def test_a_reading_says_whether_its_bundle_was_verified(bundle, tmp_path):
    from cxr_triton.pipeline import Preprocessor

    plain = write_paper_bundle(tmp_path / "plain")
    for path, expected in ((bundle, "passed"), (plain, "none")):
        preprocessor = Preprocessor(path)
        try:
            context = json.loads(preprocessor.prepare([], json.dumps({"task": "quiz"})).context)
        finally:
            preprocessor.close()
        assert context["model"]["verification"] == expected
