"""The written model repository: valid, complete or not there, movable, and consistent from tensor to tensor."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from google.protobuf import text_format

from cxr_triton.cli import main
from cxr_triton.errors import InvalidBundle, InvalidRequest
from cxr_triton.triton_repo.package import BUNDLE, ENSEMBLE, MODELS, Settings, write_repository

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("integration", ".")]

from served import write_paper_bundle  # noqa: E402


@pytest.fixture
def bundle(tmp_path):
    return write_paper_bundle(tmp_path / "bundle")


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
    from cxr_triton.engines.bundle import Bundle

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
