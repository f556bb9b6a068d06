"""The written model repository: valid, complete or not there, movable, and consistent from tensor to tensor."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import passing
from click.testing import CliRunner
from google.protobuf import text_format
from served import write_paper_bundle

from cxr_triton.cli import main
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.serving import STEPS
from cxr_triton.engines.verify.record import PARTS, subject, write_record
from cxr_triton.errors import InvalidBundle, InvalidRequest, NotVerified
from cxr_triton.profile import ModelProfile
from cxr_triton.triton_repo import package
from cxr_triton.triton_repo.integrity import RECORD, differences, require_as_packaged
from cxr_triton.triton_repo.package import BUNDLE, ENSEMBLE, VERIFICATION, Settings, write_repository
from cxr_triton.triton_repo.serve import Server


@pytest.fixture
def unverified(tmp_path):
    return write_paper_bundle(tmp_path / "bundle")


@pytest.fixture
def bundle(unverified):
    """With a record as the gate writes one; its graphs are empty, so no gate has run."""
    write_record(unverified, passing(Bundle.open(unverified)))
    return unverified


ENGINE_CONFIG = {
    "pretrained_config": {
        "qwen_type": "qwen2_vl",
        "position_embedding_type": "mrope",
        "dtype": "bfloat16",
        "vocab_size": 320,
        "hidden_size": 64,
        "max_position_embeddings": 4096,
        "rotary_embedding_dim": 16,
        "rotary_base": 1e6,
        "rotary_scaling": {"mrope_section": [2, 3, 3]},
    },
    "build_config": {
        "max_batch_size": 32,
        "max_num_tokens": 4096,
        "max_seq_len": 4096,
        "max_prompt_embedding_table_size": 32 * 256,
        "kv_cache_type": "paged",
    },
}


def entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_engine_bundle(folder: Path, image_budget: int = 6, **build) -> Path:
    """A paper bundle as built for a tensorrt-llm recipe."""
    write_paper_bundle(folder)
    for file in folder.glob("*.onnx*"):
        file.unlink()
    (folder / "tensorrt_llm").mkdir()
    whole = ENGINE_CONFIG | {"build_config": ENGINE_CONFIG["build_config"] | build}
    contents = {"tensorrt_llm/config.json": json.dumps(whole), "tensorrt_llm/rank0.engine": "engine", "vision.plan": ""}
    for name, content in contents.items():
        (folder / name).write_text(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: e for name, e in manifest["files"].items() if ".onnx" not in name}
    manifest["files"] |= {name: entry(folder / name) for name in contents}
    manifest |= {"engine": "tensorrt-llm", "vision_engine": "tensorrt"}
    manifest["recipe"] = {"image_budget": image_budget, "decoder": {"kv_share": 0.5}}
    manifest["geometry"]["compute"] = "bf16"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def engine_bundle(tmp_path):
    return write_engine_bundle(tmp_path / "engine")


def config(repository: Path, model: str):
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())


def test_every_model_has_what_triton_wants(bundle, tmp_path):
    repository = tmp_path / "repository"
    write_repository(bundle, repository, Settings())
    folders = {path.name for path in repository.iterdir() if path.is_dir()}
    assert folders == {*STEPS, ENSEMBLE}, "Triton takes every folder for a model"
    for model in STEPS:
        assert config(repository, model).name == model
        compile((repository / model / "1" / "model.py").read_text(), model, "exec")
    assert any((repository / ENSEMBLE / "1").iterdir()), "an empty version folder gets lost in a copy"


def test_the_ensemble_joins_tensors_of_one_type_and_shape(bundle, tmp_path):
    write_repository(bundle, tmp_path / "repository", Settings())
    joined(tmp_path / "repository")


def joined(repository: Path) -> None:
    ensemble = config(repository, ENSEMBLE)

    def signature(tensor, batched):
        return tensor.data_type, ([-1] if batched else []) + list(tensor.dims)

    known = {tensor.name: signature(tensor, False) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = config(repository, step.model_name)
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
    settings = Settings(
        slots=7, preprocess_instances=3, threads=2, queue_size=5, batch_invariant=True, picture_cache_mib=9
    )
    write_repository(bundle, tmp_path / "r", settings)
    preprocess, vision, decoder = (config(tmp_path / "r", name) for name in list(STEPS)[:3])
    assert preprocess.instance_group[0].count == 3
    assert preprocess.dynamic_batching.default_queue_policy.max_queue_size == 5
    assert vision.parameters["threads"].string_value == decoder.parameters["threads"].string_value == "2"
    assert decoder.parameters["slots"].string_value == "7"
    assert decoder.parameters["queue_size"].string_value == "5"
    assert decoder.parameters["batch_invariant"].string_value == "1"
    assert vision.parameters["picture_cache_mib"].string_value == "9"
    assert decoder.model_transaction_policy.decoupled
    assert vision.max_batch_size >= 2, "all images of a request are one batch"


def test_the_ensemble_says_its_profile(bundle, tmp_path):
    packaged = write_repository(bundle, tmp_path / "r", Settings())
    said = config(tmp_path / "r", ENSEMBLE).parameters["profile"].string_value
    assert ModelProfile.from_json(said) == packaged.profile


def test_a_repository_can_be_moved(bundle, tmp_path):
    write_repository(bundle, tmp_path / "here", Settings())
    there = (tmp_path / "here").rename(tmp_path / "there")
    for model in list(STEPS)[:3]:
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


FOREIGN = "decoder/1/numpy.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: (r / "decoder/1/model.py").write_text("evil"), "decoder/1/model.py was changed"),
        (lambda r: (r / "report/config.pbtxt").unlink(), "report/config.pbtxt is missing"),
        (lambda r: (r / ENSEMBLE / "1" / VERIFICATION).write_text("passed\nfine\n"), "VERIFICATION was changed"),
        (lambda r: (r / BUNDLE / "manifest.json").write_text("{}"), "bundle/manifest.json was changed"),
        (lambda r: (r / "decoder/2").mkdir(), "decoder/2 was added"),
        (lambda r: (r / "evil").symlink_to("/tmp"), "evil was added"),
        (lambda r: (r / "report/1/model.py").rename(r / "x") and (r / "report/1/model.py").symlink_to("/x"), "was add"),
        (lambda r: (r / FOREIGN).write_text("evil"), f"{FOREIGN} was added"),
        (lambda r: (r / RECORD).unlink(), "repository.json is missing"),
        (lambda r: (r / RECORD).write_text('{"schema": 1, "files": []}'), "repository.json cannot be read"),
    ],
)
def test_a_repository_that_was_changed_is_refused_by_name(bundle, tmp_path, change, said):
    repository = tmp_path / "repository"
    write_repository(bundle, repository, Settings())
    shutil.copytree(repository, tmp_path / "elsewhere")
    require_as_packaged(repository)
    require_as_packaged(tmp_path / "elsewhere")
    change(repository)
    with pytest.raises(InvalidBundle, match=f"not as `cxr-triton package` wrote it: .*{said}.* --modified"):
        Server(repository, grpc_port=0, http_port=0, metrics_port=0).start()
    done = subprocess.run(
        [sys.executable, "-m", "cxr_triton.triton_repo.guard", "true", f"--model-repository={repository}"],
        capture_output=True,
    )
    assert done.returncode == 1 and said in done.stderr.decode()


def test_bytecode_beside_a_model_is_removed_and_never_run(bundle, tmp_path):
    """Python takes it in place of model.py, and writes it there whenever a server runs."""
    repository = tmp_path / "repository"
    write_repository(bundle, repository, Settings())
    folder = repository / "decoder" / "1" / "__pycache__"
    folder.mkdir()
    (folder / "model.cpython-311.pyc").write_bytes(b"evil")
    require_as_packaged(repository)
    assert not folder.exists()
    folder.symlink_to(tmp_path)
    with pytest.raises(InvalidBundle, match="__pycache__ was added"):
        require_as_packaged(repository)


def test_the_bundle_in_a_repository_is_held_by_its_manifest(bundle, tmp_path):
    """The decoder opens it so; its weights are not hashed twice."""
    write_repository(bundle, tmp_path / "repository", Settings())
    (tmp_path / "repository" / BUNDLE / "profile.yaml").write_text("changed")
    require_as_packaged(tmp_path / "repository")
    with pytest.raises(InvalidBundle, match=r"profile\.yaml has"):
        Bundle.open(tmp_path / "repository" / BUNDLE)


def test_a_plan_outside_the_bundle_is_recorded(engine_bundle, tmp_path):
    repository = packaged(engine_bundle, tmp_path / "repository")
    (repository / "vision_encoder/1/model.plan").write_text("another")
    assert differences(repository) == ["vision_encoder/1/model.plan was changed"]


@pytest.mark.parametrize("large", [0, 1 << 30])
def test_an_edited_bundle_changes_no_repository_or_is_seen(bundle, tmp_path, monkeypatch, large):
    """Large files are one file in both where the file system shares no blocks: then the manifest tells."""
    monkeypatch.setattr(package, "_LINKED_BYTES", large)
    write_repository(bundle, tmp_path / "repository", Settings())
    for name in ("profile.yaml", "tokenizer.json"):
        with open(bundle / name, "a") as file:
            file.write("\n")
    if large:
        Bundle.open(tmp_path / "repository" / BUNDLE)
    else:
        is_one = (bundle / "profile.yaml").samefile(tmp_path / "repository" / BUNDLE / "profile.yaml")
        with pytest.raises(InvalidBundle) if is_one else contextlib.nullcontext():
            Bundle.open(tmp_path / "repository" / BUNDLE)


def test_a_bundle_of_links_becomes_a_repository_of_files(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "_LINKED_BYTES", 0)
    shutil.copytree(bundle, tmp_path / "store")
    for path in bundle.iterdir():
        path.unlink()
        path.symlink_to(tmp_path / "store" / path.name)
    write_repository(bundle, tmp_path / "repository", Settings())
    assert not any(path.is_symlink() for path in (tmp_path / "repository").rglob("*"))
    require_as_packaged(tmp_path / "repository")


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


def test_a_bundle_that_is_not_right_enough_on_labelled_data_is_refused(bundle, tmp_path):
    def judged(value, about=None):
        check = {"name": "f1_macro", "value": value, "limit": 0.7, "at_least": True, "passed": value >= 0.7}
        record = {
            "subject": about or subject(Bundle.open(bundle).manifest),
            "passed": check["passed"],
            "checks": [check],
        }
        write_record(bundle, record | {"verdict": None, "data": {"name": "own", "studies": 6}}, "accuracy")

    judged(0.61)
    with pytest.raises(
        NotVerified, match=r"not right enough on labelled data: f1_macro 0\.61, least 0\.7; .*--unverified"
    ):
        write_repository(bundle, tmp_path / "out", Settings())
    with pytest.raises(InvalidRequest, match="not about the bundle"):
        judged(0.9, about="another")
    judged(0.9)
    write_repository(bundle, tmp_path / "out", Settings())
    said = (tmp_path / "out" / "cxr_reader" / "1" / "VERIFICATION").read_text()
    assert said.startswith("passed\n") and "Accuracy on 6 studies of own passed too." in said


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
        assert {config(repository, name).parameters["verification"].string_value for name in (*STEPS, ENSEMBLE)} == {
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
    from cxr_triton.engines.pipeline import Preprocessor

    plain = write_paper_bundle(tmp_path / "plain")
    for path, expected in ((bundle, "passed"), (plain, "none")):
        preprocessor = Preprocessor(path)
        try:
            context = json.loads(preprocessor.prepare([], json.dumps({"task": "quiz"})).context)
        finally:
            preprocessor.close()
        assert context["model"]["verification"] == expected


def packaged(bundle: Path, repository: Path, **settings) -> Path:
    write_repository(bundle, repository, Settings(**settings), unverified=True)
    return repository


def test_a_tensorrt_llm_bundle_brings_its_two_models(engine_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "_LINKED_BYTES", 0)  # as a real plan
    repository = packaged(engine_bundle, tmp_path / "repository")
    assert {path.parent.name for path in repository.glob("*/config.pbtxt")} == {*STEPS, ENSEMBLE, "tensorrt_llm"}
    assert (repository / "vision_encoder/1/model.plan").read_bytes() == (engine_bundle / "vision.plan").read_bytes()
    assert not (repository / "vision_encoder/1/model.py").exists()
    engine = config(repository, "tensorrt_llm")
    values = {key: value.string_value for key, value in engine.parameters.items()}
    folder = repository / values["gpt_model_path"]
    assert (folder / "rank0.engine").read_text() == "engine" and (folder / "config.json").is_file()
    assert (engine.backend, engine.max_batch_size) == ("tensorrtllm", 32)
    assert engine.model_transaction_policy.decoupled and engine.HasField("dynamic_batching")
    assert not engine.dynamic_batching.HasField("default_queue_policy"), "the engine's queue is ours: see `decoder`"
    assert (engine.instance_group[0].count, engine.instance_group[0].kind) == (1, 2)  # KIND_CPU
    assert {
        "gpt_model_type": "inflight_fused_batching",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "enable_kv_cache_reuse": "false",
        "enable_chunked_context": "false",
        "exclude_input_in_output": "true",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "max_tokens_in_paged_kv_cache": str(32 * 4096 // 2),
        "tokenizer_dir": "",
        "xgrammar_tokenizer_info_path": "",
        "guided_decoding_backend": "",
    }.items() <= values.items()


def test_the_engine_declares_what_is_sent(engine_bundle, tmp_path):
    """Every tensor that the front end may send is declared with its type and shape, and no other."""
    import numpy as np

    from cxr_triton.engines.runtime.stream import Generation
    from cxr_triton.engines.tensorrt_llm.backend import DATATYPES
    from cxr_triton.engines.tensorrt_llm.request import EngineConfig, request_tensors, stop_tensors
    from cxr_triton.sampling import Sampling

    repository = packaged(engine_bundle, tmp_path / "repository", prefix_reuse=True)
    engine_config = EngineConfig.read(repository / BUNDLE / "tensorrt_llm")
    sent = stop_tensors()
    for sampling in ({"temperature": 1.0, "eos_token_ids": (1, 2)}, {"temperature": 0.0, "seed": 3}):
        generation = Generation(
            input_ids=np.arange(4),
            position_ids=np.tile(np.arange(4), (3, 1)),
            image_index=np.array([-1, 0, 1, -1]),
            image_embeddings=np.zeros((2, 64), np.float32),
            sampling=Sampling(max_new_tokens=5, **sampling),
        )
        sent |= request_tensors(generation, engine_config, prefix_reuse=True)
    from tritonclient.grpc.model_config_pb2 import DataType

    declared = {tensor.name: tensor for tensor in config(repository, "tensorrt_llm").input}
    assert set(declared) == set(sent)
    for name, value in sent.items():
        tensor = declared[name]
        assert DataType.Name(tensor.data_type) == f"TYPE_{DATATYPES[value.dtype]}", name
        assert len(tensor.dims) == value.ndim - 1, name
        assert all(size in (-1, got) for size, got in zip(tensor.dims, value.shape[1:], strict=True)), name
        assert tensor.optional == (name not in ("input_lengths", "request_output_len")), name


def test_vision_is_a_plan_with_a_warm_up(engine_bundle, tmp_path):
    vision = config(packaged(engine_bundle, tmp_path / "repository", queue_size=9), "vision_encoder")
    assert (vision.platform, vision.max_batch_size) == ("tensorrt_plan", 6)
    assert vision.dynamic_batching.default_queue_policy.max_queue_size == 9
    assert [tensor.name for tensor in vision.input] == ["pixel_windows", "patch_rows_cols", "valid", "merge_order"]
    assert [tensor.name for tensor in vision.output] == ["image_embeddings"]
    assert [warm_up.batch_size for warm_up in vision.model_warmup] == [1, 6]
    for warm_up in vision.model_warmup:
        for tensor in vision.input:
            assert list(warm_up.inputs[tensor.name].dims) == list(tensor.dims)
            assert warm_up.inputs[tensor.name].data_type == tensor.data_type


def test_the_ensemble_of_an_engine_joins_tensors_too(engine_bundle, tmp_path):
    packaged(engine_bundle, tmp_path / "repository")
    joined(tmp_path / "repository")
    takes = {tensor.name: tensor.data_type for tensor in config(tmp_path / "repository", "decoder").input}
    assert takes["IMAGE_EMBEDDINGS"] == 14  # TYPE_BF16, as the plan gives it


def test_slots_and_prefix_reuse_reach_the_engine(engine_bundle, tmp_path):
    repository = packaged(engine_bundle, tmp_path / "repository", slots=8, prefix_reuse=True)
    engine, decoder = (config(repository, name) for name in ("tensorrt_llm", "decoder"))
    assert engine.max_batch_size == 8 and decoder.parameters["slots"].string_value == "8"
    assert engine.parameters["enable_kv_cache_reuse"].string_value == "true"
    assert decoder.parameters["prefix_reuse"].string_value == "1"
    plain = config(packaged(engine_bundle, tmp_path / "plain"), "tensorrt_llm")
    assert "prompt_table_extra_ids" not in {tensor.name for tensor in plain.input}


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"slots": 33}, "33 slots were asked for, the engine was built for 32"), ({"batch_invariant": True}, "none")],
)
def test_what_an_engine_does_not_do_is_refused(engine_bundle, tmp_path, settings, match):
    with pytest.raises(InvalidRequest, match=match):
        packaged(engine_bundle, tmp_path / "repository", **settings)
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_seq_len": 2048}, "2048 tokens of context, the bundle needs 4096"),
        ({"max_prompt_embedding_table_size": 32 * 8}, "8 image tokens of 2 images"),
        ({"image_budget": 1}, "takes 1 images"),
        ({"kv_cache_type": "continuous"}, "needs paged"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_engine_that_is_too_small_is_refused(tmp_path, changes, match):
    with pytest.raises(InvalidBundle, match=match):
        packaged(write_engine_bundle(tmp_path / "engine", **changes), tmp_path / "repository")


@pytest.mark.parametrize(
    ("settings", "mib"),
    [
        ({}, "512"),
        ({"prefix_reuse": True, "prefix_cache_mib": 64}, "64"),
        ({"prefix_cache_mib": 0}, "0"),
        ({"prefix_reuse": False}, "0"),
    ],
    ids=str,
)
def test_a_cpus_decoder_keeps_prefixes_unless_told_otherwise(bundle, tmp_path, settings, mib):
    write_repository(bundle, tmp_path / "r", Settings(**settings))
    assert config(tmp_path / "r", "decoder").parameters["prefix_cache_mib"].string_value == mib


@pytest.mark.parametrize(
    ("settings", "mib"),
    [
        ({}, "16"),
        ({"drafts": True, "draft_index_mib": 4}, "4"),
        ({"draft_index_mib": 0}, "0"),
        ({"drafts": False}, "0"),
        ({"batch_invariant": True}, "0"),
    ],
    ids=str,
)
def test_a_cpus_decoder_guesses_unless_told_otherwise(bundle, tmp_path, settings, mib):
    write_repository(bundle, tmp_path / "r", Settings(**settings))
    assert config(tmp_path / "r", "decoder").parameters["draft_index_mib"].string_value == mib


def test_drafts_that_cannot_be_are_refused(engine_bundle, tmp_path):
    with pytest.raises(InvalidRequest, match="draft_index_mib 0; give them memory"):
        Settings(drafts=True, draft_index_mib=0)
    with pytest.raises(InvalidRequest, match="batch_invariant, which they are not"):
        Settings(drafts=True, batch_invariant=True)
    with pytest.raises(
        InvalidRequest, match="drafts were asked for, tensorrt-llm has none; use onnxruntime or onnxruntime-int8"
    ):
        packaged(engine_bundle, tmp_path / "repository", drafts=True)


def test_prefix_reuse_without_memory_for_it_is_refused():
    with pytest.raises(InvalidRequest, match="prefix_cache_mib 0; give it memory"):
        Settings(prefix_reuse=True, prefix_cache_mib=0)
    with pytest.raises(InvalidRequest, match="picture_cache_mib is -1"):
        Settings(picture_cache_mib=-1)
