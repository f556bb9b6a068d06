"""LoRA adapters: what of peft's layout is taken, what is refused, and who says so."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_adapter import ALPHA, CONFIG, PREFIX, RANK, merge, save, write_random
from safetensors.torch import load_file
from vllm_room import CHECKPOINT, PHANTOM, build

from cxr_triton import phantom
from cxr_triton.engines import engine_names, without_adapter
from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.pipeline import Preprocessor
from cxr_triton.engines.recipe import load_recipe
from cxr_triton.engines.serving import BUNDLE
from cxr_triton.engines.verify.files import judge
from cxr_triton.engines.verify.reference import Reference
from cxr_triton.engines.vllm.options import adapter, arguments
from cxr_triton.errors import InvalidBundle, InvalidProfile, InvalidRequest, UnsupportedCheckpoint
from cxr_triton.export.adapter import read_adapter
from cxr_triton.export.checkpoint import Checkpoint, torch_model
from cxr_triton.export.export import export_checkpoint
from cxr_triton.profile import NamedAdapter, load_profile
from cxr_triton.triton_repo.integrity import require_as_packaged
from cxr_triton.triton_repo.make_engine import make_engine

Q_A, Q_B = (f"{PREFIX}0.self_attn.q_proj.lora_{part}.weight" for part in "AB")
PLAIN = load_profile(PHANTOM / "profile.yaml")
NAMED = dataclasses.replace(PLAIN, name="tuned", adapter=NamedAdapter(name="devices"))


@pytest.fixture
def folder(tmp_path):
    return write_random(tmp_path / "lora", CHECKPOINT)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    made = tmp_path_factory.mktemp("adapter")
    return build(made, "bf16", profile=NAMED, adapter=write_random(made / "lora", CHECKPOINT))


@pytest.mark.parametrize(("config", "scale"), [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / RANK**0.5)])
def test_what_it_adds_is_what_lora_is_defined_to_add(tmp_path, config, scale):
    folder = write_random(tmp_path / "lora", CHECKPOINT, **config)
    merged, plain = torch_model(CHECKPOINT, "float32"), torch_model(CHECKPOINT, "float32")
    merge(merged, folder, scale)
    before, changed = dict(plain.model.named_parameters()), set()
    deltas = dict(read_adapter(folder, Checkpoint(CHECKPOINT), "devices").deltas())
    for name, weight in merged.model.named_parameters():
        if not torch.equal(weight, before[name]):
            changed.add(name)
            np.testing.assert_allclose(before[name].detach() + deltas[name], weight.detach(), atol=1e-6)
    assert changed == set(deltas) and len(deltas) == 20


def test_names_of_older_releases_are_the_same_weights(folder):
    source = Checkpoint(CHECKPOINT)
    new = dict(read_adapter(folder, source, "devices").deltas())
    tensors = load_file(folder / "adapter_model.safetensors")
    save(folder, {name.replace("model.language_model.", "model."): each for name, each in tensors.items()})
    old = dict(read_adapter(folder, source, "devices").deltas())
    assert new.keys() == old.keys() and all(np.array_equal(new[name], old[name]) for name in new)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"of_a_later_release": {"a": 1}}, "of_a_later_release"),
    ],
)
def test_more_than_lora_is_refused_and_may_be_merged(folder, config, said):
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    with pytest.raises(UnsupportedCheckpoint, match=rf"{said}.*merge it into the checkpoint"):
        read_adapter(folder, Checkpoint(CHECKPOINT), "devices")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 0}, "r 0, from 1 to 512"),
        ({"r": 1 << 40}, "from 1 to 512"),
        ({"r": True}, "r True"),
        ({"r": 8}, r"is F32 \[4, \d+\].*rank 8"),
        ({"lora_alpha": -1}, "lora_alpha -1"),
        ({"lora_alpha": "16"}, "lora_alpha '16'"),
        ({"use_rslora": "yes"}, "use_rslora 'yes'"),
    ],
)
def test_a_strength_that_is_none_is_refused(folder, config, said):
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    with pytest.raises(UnsupportedCheckpoint, match=said):
        read_adapter(folder, Checkpoint(CHECKPOINT), "devices")


def _broken(tensors, fault):
    a, b = tensors[Q_A], tensors[Q_B]
    return {
        "half": {Q_A: a},
        "shape": {Q_A: a[:, 1:].contiguous(), Q_B: b},
        "type": {Q_A: a.to(torch.int8), Q_B: b},
        "infinite": {Q_A: a, Q_B: torch.full_like(b, torch.inf)},
        "tower": {Q_A.replace("model.language_model.layers", "model.visual.blocks"): a},
        "head": {"base_model.model.lm_head.lora_A.weight": a},
        "layer": {Q_A.replace("layers.0", "layers.99"): a},
        "unprefixed": {Q_A.replace("model.model.model", "model"): a},
        "whole": {"base_model.model.model.language_model.norm.weight": a[0].clone()},
        "twice": {Q_A: a, Q_B: b, Q_A.replace("model.language_model.", "model."): a.clone()},
        "none": {},
    }[fault]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("half", "one matrix of two"),
        ("shape", r"\[4, 255\], this checkpoint and rank 4 call for F32, F16, BF16 \[4, 256\]"),
        ("type", "is I8"),
        ("infinite", "not finite"),
        *((fault, "no LoRA matrix of a linear layer") for fault in ("tower", "head", "layer", "unprefixed", "whole")),
        ("twice", "matrix A of .* twice"),
        ("none", "holds no matrix"),
    ],
)
def test_weights_of_another_model_are_refused(folder, fault, said):
    save(folder, _broken(load_file(folder / "adapter_model.safetensors"), fault))
    with pytest.raises(UnsupportedCheckpoint, match=said):
        read_adapter(folder, Checkpoint(CHECKPOINT), "devices")


def test_no_pickle_is_read(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedCheckpoint, match=r"pickles .* are not read"):
        read_adapter(folder, Checkpoint(CHECKPOINT), "devices")


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"[" * 100_000, b" " * (2 << 20)])
def test_a_config_that_is_none_is_named(folder, content):
    (folder / "adapter_config.json").unlink()
    if content is not None:
        (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint, match=r"adapter_config\.json"):
        read_adapter(folder, Checkpoint(CHECKPOINT), "devices")


def test_a_profile_names_it_well():
    with pytest.raises(InvalidProfile, match="name"):
        NamedAdapter(name="Not So")
    with pytest.raises(InvalidProfile, match="sha256"):
        NamedAdapter(name="devices", sha256="12")


def export(out, profile, adapter, **options):
    asked = {"precision": "bf16", "compute": "fp32", "form": "checkpoint", "progress": False} | options
    return export_checkpoint(str(CHECKPOINT), out, profile, adapter=adapter, **asked)


def test_profile_and_folder_are_given_both_or_none(folder, tmp_path):
    with pytest.raises(InvalidRequest, match="reads with the LoRA adapter devices; give its folder with --adapter"):
        export(tmp_path / "out", NAMED, None)
    with pytest.raises(InvalidRequest, match=r"names no adapter.*`extends: phantom` and `adapter: \{name: lora\}`"):
        export(tmp_path / "out", PLAIN, folder)
    other = dataclasses.replace(NAMED, adapter=NamedAdapter(name="devices", sha256="0" * 64))
    with pytest.raises(InvalidRequest, match="has SHA-256"):
        export(tmp_path / "out", other, folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["onnx", "tensorrt-llm"])
def test_other_forms_have_no_place_for_it(folder, tmp_path, form):
    for profile, given in ((NAMED, folder), (NAMED, None), (PLAIN, folder)):
        with pytest.raises(InvalidRequest, match="takes none; choose --format checkpoint, or merge it"):
            export(tmp_path / "out", profile, given, form=form, precision=None, compute=None)


def test_one_engine_takes_it():
    assert [name for name in engine_names() if without_adapter(name, "devices") is None] == ["vllm"]


def test_an_engine_that_takes_none_gets_none(bundle, tmp_path):
    """Whatever an export says of itself."""
    copy = shutil.copytree(bundle.path.parent / "export", tmp_path / "export")
    told = json.loads((copy / "export.json").read_text())
    (copy / "export.json").write_text(json.dumps(told | {"format": "onnx"}))
    for name in ("decoder.onnx", "decoder.onnx.data"):
        (copy / name).touch()
    with pytest.raises(
        InvalidRequest, match="LoRA adapter devices was asked for, onnxruntime takes none; use vllm, or"
    ):
        build_bundle(copy, tmp_path / "bundle")
    (copy / "export.json").write_text(json.dumps({key: told[key] for key in told if key != "adapter"}))
    with pytest.raises(InvalidBundle, match="names LoRA adapter devices"):
        build_bundle(copy, tmp_path / "bundle", recipe=load_recipe("cpu-bf16-vllm"))


def test_a_bundle_holds_it_and_vouches_for_it(bundle, tmp_path):
    given = read_adapter(bundle.path.parent / "lora", Checkpoint(CHECKPOINT), "devices")
    assert bundle.manifest["adapter"] == {"name": "devices", "rank": RANK, "files": given.files}
    assert {name for name in bundle.manifest["files"] if name.startswith("adapter/")} == {
        f"adapter/{name}" for name in given.files
    }
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    with open(copy / "adapter/adapter_config.json", "r+b") as file:
        file.write(b" ")
    with pytest.raises(InvalidBundle, match=r"adapter/adapter_config\.json has SHA-256"):
        Bundle.open(copy)
    (copy / "adapter/more").touch()
    with pytest.raises(InvalidBundle, match="adapter/more"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"engine": "onnxruntime"}, "onnxruntime takes none"),
        ({"adapter": None}, "not those of its adapter"),
        ({"adapter": {"name": "devices", "rank": 4, "files": {}}}, "not those of its adapter"),
        ({"adapter": {"name": 5}}, "lacks name, rank or files"),
        ({"adapter": "devices"}, "lacks name, rank or files"),
    ],
)
def test_a_manifest_that_lies_about_it_is_refused(bundle, tmp_path, change, said):
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    manifest = bundle.manifest | change
    if change.get("engine"):
        manifest["files"] = {name: each for name, each in manifest["files"].items() if "/" not in name}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidBundle, match=said):
        Bundle.open(copy)


def test_a_profile_of_another_adapter_in_a_bundle_is_refused(bundle, tmp_path):
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    (copy / "profile.yaml").write_text(PLAIN.to_yaml())
    changed = dataclasses.replace(bundle, path=copy)
    with pytest.raises(InvalidBundle, match=r"names LoRA adapter None, manifest\.json devices"):
        _ = changed.profile


def test_the_engine_makes_room_for_it_and_readings_say_it(bundle):
    asked = arguments(bundle, 4, {})
    assert (asked["enable_lora"], asked["max_loras"], asked["max_lora_rank"]) == (True, 1, 8)
    assert adapter(bundle) == {"name": "devices", "path": str(bundle.path / "adapter")}
    with contextlib.closing(Preprocessor(bundle.path)) as preprocessor:
        step = preprocessor.prepare(list(phantom.png_files(1, 7, PLAIN.pixel_preset)), "{}")
    context = json.loads(step.context)["model"]
    assert (context["profile"], context["adapter"]) == ("tuned", "devices")
    assert context["adapter_sha256"] == bundle.manifest["files"]["adapter/adapter_model.safetensors"]["sha256"]


def test_the_gate_sees_another_adapter_than_the_reference_s(bundle, tmp_path):
    def told(reference):
        trial = type("Trial", (), {"bundle": bundle, "reference": reference})
        return {check["name"]: check["passed"] for check in judge(trial)[0]}

    with Reference(CHECKPOINT, NAMED, device="cpu", adapter=bundle.path / "adapter") as same:
        assert all(told(same).values()) and same.facts["adapter"]["name"] == "devices"
    with Reference(CHECKPOINT, NAMED, device="cpu", adapter=write_random(tmp_path / "x", CHECKPOINT, seed=1)) as other:
        assert [name for name, passed in told(other).items() if not passed] == ["adapter"]
    with Reference(CHECKPOINT, PLAIN, device="cpu") as plain:
        assert not told(plain)["adapter"] and not told(plain)["profile.yaml"]


@pytest.fixture
def own(tmp_path):
    """A profile as a user writes it."""
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: {PHANTOM / 'profile.yaml'}\nname: tuned\nadapter: {{name: devices}}\n")
    return str(path)


def test_make_engine_makes_a_repository_with_it_and_another_one_anew(own, folder, tmp_path):
    def made(adapter):
        options = {"recipe": "cpu-bf16-vllm", "profile": own, "adapter": adapter, "unverified": True}
        result = make_engine(str(CHECKPOINT), tmp_path / "engine", **options)
        require_as_packaged(result["repository"])
        return Bundle.open(Path(result["repository"]) / BUNDLE).adapter["sha256"], result

    first, _ = made(folder)
    again, result = made(folder)
    assert first == again and all(stage["cached"] for stage in result["stages"])
    assert made(write_random(tmp_path / "other", CHECKPOINT, seed=1))[0] != first


def test_make_engine_for_another_engine_says_to_merge_it_before_anything_is_made(own, folder, tmp_path):
    with pytest.raises(InvalidRequest, match="devices was asked for, onnxruntime takes none; use vllm, or merge"):
        make_engine(str(CHECKPOINT), tmp_path / "engine", "cpu-int4", profile=own, adapter=folder, unverified=True)
    assert not (tmp_path / "engine").exists()
