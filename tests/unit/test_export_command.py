"""The export command and the graph writer: complete folders or none, little memory, no torch."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import qwen
import torch
from checkpoints import END, IMAGE_TOKEN, VISION_START, random_checkpoint
from click.testing import CliRunner

from cxr_triton.cli import main
from cxr_triton.errors import InvalidRequest, UnsupportedCheckpoint
from cxr_triton.export import export as exporting
from cxr_triton.export import source as sources
from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.decoder import write_decoder
from cxr_triton.export.geometry import read_config, tensor_shapes
from cxr_triton.export.graph import GraphWriter, Precision
from cxr_triton.perf import shape as perf_shape
from cxr_triton.profile import load_profile

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"
BUNDLE = {
    "profile.yaml",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "vision.onnx",
    "vision.onnx.data",
    "decoder.onnx",
    "decoder.onnx.data",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "checkpoint"
    random_checkpoint(folder, dtype="bfloat16", layers=1)
    generation = json.loads((folder / "generation_config.json").read_text()) | {"repetition_penalty": 1.07}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def free_profile(tmp_path_factory):
    """A profile whose weights need no acceptance."""
    path = tmp_path_factory.mktemp("profile") / "free.yaml"
    licence = "{name: Apache-2.0, stated: here, non_commercial: false}"
    path.write_text(f"extends: chexone\nname: free\ncheckpoint: null\nmax_sequence: 3072\nlicence: {licence}\n")
    return path


def export(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.fixture(scope="module")
def exported(checkpoint, free_profile, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "export"
    result = export(checkpoint, "-o", out, "--profile", free_profile, "--json", out.parent / "result.json")
    assert result.exit_code == 0, result.output
    return out


def test_folder_holds_what_a_bundle_needs_and_nothing_else(exported):
    assert {path.name for path in exported.iterdir()} == BUNDLE | {"export.json"}
    assert {path.name for path in exported.parent.iterdir()} == {"export", "result.json"}


def test_export_json_describes_the_graphs_and_their_source(exported, checkpoint):
    data = json.loads((exported / "export.json").read_text())
    profile = load_profile(exported / "profile.yaml")
    assert data["schema"] == 1 and data["precision"] == "int4" and data["head"] == "int4"
    assert data["geometry"] == {
        "hidden": 128,
        "layers": 1,
        "kv_heads": 2,
        "head_dim": 32,
        "vocab": 320,
        "window_budget": profile.window_budget,
        "token_budget": profile.token_budget,
        "max_sequence": 3072,
        "compute": "fp32",
        "image_token_id": IMAGE_TOKEN,
        "eos_token_ids": [END, END + 1],
        "vision_start_token_id": VISION_START,
        "merge_size": 2,
    }
    source = data["source"]
    assert source["name"] == "checkpoint" and source["revision"] is None
    assert source["licence"]["name"] == "Apache-2.0" and source["licence"]["accepted"] is False
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert source["files"][name] == hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    assert set(data["versions"]) >= {"cxr_triton", "onnx", "numpy"}
    result = json.loads((exported.parent / "result.json").read_text())
    assert result.items() >= data.items() and result["path"] == str(exported)


def test_profile_is_resolved_against_the_checkpoint(exported, free_profile):
    profile, original = load_profile(exported / "profile.yaml"), load_profile(free_profile)
    assert profile.decoding.repetition_penalty == 1.07
    assert profile.tasks == original.tasks and profile.name == "free"


def test_max_sequence_is_bounded_by_profile_and_checkpoint(checkpoint, free_profile, tmp_path):
    for tokens, message in ((5000, "4096"), (100, "max_sequence")):
        arguments = ("-o", tmp_path / "out", "--profile", free_profile, "--max-sequence", tokens)
        result = export(checkpoint, *arguments)
        assert result.exit_code == 1 and message in result.output
    assert not list(tmp_path.iterdir())


def test_an_unknown_form_is_told_the_nearest(checkpoint, free_profile, tmp_path):
    profile = load_profile(free_profile)
    with pytest.raises(InvalidRequest, match="did you mean 'onnx'"):
        exporting.export_checkpoint(str(checkpoint), tmp_path / "out", profile, form="onx")
    assert not list(tmp_path.iterdir())


def test_non_commercial_weights_need_acceptance(checkpoint, tmp_path_factory, tmp_path):
    profile = tmp_path_factory.mktemp("profile") / "mine.yaml"
    profile.write_text("extends: nv-reason-cxr-3b\ncheckpoint: null\n")
    arguments = (checkpoint, "-o", tmp_path / "out", "--profile", profile)
    refused = export(*arguments)
    assert refused.exit_code == 1 and "LICENCE_NOT_ACCEPTED" in refused.output
    assert "Noncommercial" in refused.output and "--accept-licence" in refused.output
    assert not list(tmp_path.iterdir())
    assert export(*arguments, "--accept-licence").exit_code == 0
    licence = json.loads((tmp_path / "out" / "export.json").read_text())["source"]["licence"]
    assert licence["non_commercial"] and licence["accepted"]


def test_hub_id_keeps_its_licence_whatever_the_profile(free_profile, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "locate", lambda *a: pytest.fail("asked the hub before the licence was accepted"))
    result = export("nvidia/NV-Reason-CXR-3B", "-o", tmp_path / "out", "--profile", free_profile)
    assert result.exit_code == 1 and "LICENCE_NOT_ACCEPTED" in result.output


def test_hub_id_takes_the_profiles_revision_and_records_it(checkpoint, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "locate", lambda *a: asked.append(a) or (checkpoint, "c0ffee"))
    profile = dataclasses.replace(load_profile("chexone"), checkpoint=None)
    for name, revision in (("default", None), ("chosen", "main")):
        exporting.export_checkpoint(
            profile.checkpoint_id, tmp_path / name, profile, precision="fp32", revision=revision, accept_licence=True
        )
    assert asked == [(profile.checkpoint_id, profile.revision), (profile.checkpoint_id, "main")]
    source = json.loads((tmp_path / "default" / "export.json").read_text())["source"]
    assert (source["name"], source["revision"]) == (profile.checkpoint_id, "c0ffee")


class FakeHub:
    """A hub whose branch moves each time that it is asked for; ids in any case."""

    def __init__(self, checkpoint, cache):
        self.checkpoint, self.cache, self.asked, self.moved = checkpoint, cache, [], 0

    def snapshot_download(self, repository, *, revision=None, allow_patterns):
        self.asked.append((repository, revision))
        commit = revision
        if revision in (None, "main"):
            self.moved += 1
            commit = f"{self.moved:040x}"
        folder = self.cache / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
        if not folder.exists():
            shutil.copytree(self.checkpoint, folder, copy_function=shutil.copy2)
        return str(folder)


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    fake = FakeHub(checkpoint, tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


@pytest.mark.parametrize("source", ["StanfordAIMI/CheXOne", "stanfordaimi/CHEXONE"])
def test_the_profile_s_own_id_is_taken_at_its_revision_in_any_case(hub, tmp_path, source):
    profile = dataclasses.replace(load_profile("chexone"), checkpoint=None)
    exporting.export_checkpoint(source, tmp_path / "out", profile, precision="fp32", accept_licence=True)
    assert hub.asked == [(source, profile.revision)]
    assert json.loads((tmp_path / "out" / "export.json").read_text())["source"]["revision"] == profile.revision


def test_another_case_of_an_id_keeps_its_licence_and_its_profile(hub, free_profile, tmp_path):
    for source in ("NVIDIA/nv-reason-cxr-3b", "nvidia/NV-Reason-CXR-3B"):
        assert sources.licence_of(source, load_profile(free_profile)).non_commercial
        result = export(source, "-o", tmp_path / "out", "--profile", free_profile)
        assert "LICENCE_NOT_ACCEPTED" in result.output and not hub.asked
        with pytest.raises(UnsupportedCheckpoint, match="it is nvidia/NV-Reason-CXR-3B"):
            sources.require_fit(source, Checkpoint(hub.checkpoint), load_profile(free_profile))


def test_another_s_id_is_recorded_at_the_commit_that_it_was_of(hub, free_profile, tmp_path):
    result = export("org/tuned", "-o", tmp_path / "out", "--profile", free_profile, "--precision", "fp32")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "export.json").read_text())["source"]["revision"] == f"{1:040x}"
    assert f"of org/tuned at commit {1:040x}" in result.output


def test_a_folder_that_is_no_commit_is_refused(hub, monkeypatch):
    import huggingface_hub

    for given, asked in (("snapshots/main", None), (f"snapshots/{2:040x}", f"{1:040x}")):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, given=given, **k: f"/hub/{given}")
        with pytest.raises(UnsupportedCheckpoint, match="not that commit"):
            sources.locate("org/tuned", asked)


RECIPE = """
name: own
memory_gib: 16
vision: {compiler: onnxruntime, precision: fp32}
decoder: {compiler: onnxruntime, precision: fp32, compute: fp32, head: compute, kv: fp32}
slots: 1
max_sequence: 3072
image_budget: 1
"""


def test_make_engine_stays_at_the_commit_that_it_began_with(hub, free_profile, tmp_path):
    from cxr_triton.triton_repo.make_engine import make_engine

    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)

    def made(source="org/tuned", **more):
        hub.asked.clear()
        result = make_engine(source, out, str(recipe), profile=str(free_profile), unverified=True, **more)
        manifest = json.loads((out / "bundle" / "manifest.json").read_text())
        return [stage["cached"] for stage in result["stages"]], manifest["source"]["revision"]

    first = f"{1:040x}"
    assert made() == ([False, False, False], first)
    assert hub.asked == [("org/tuned", None), ("org/tuned", first)], "the branch is asked once"
    assert made() == ([True, True, True], first) and hub.asked == [("org/tuned", first)]
    assert made("ORG/Tuned") == ([True, True, True], first)
    newest = made(revision="main")
    assert newest == ([False, False, False], f"{2:040x}")
    assert made()[1] == f"{2:040x}", "which the next run takes"


@pytest.fixture(scope="module")
def shape_3b(tmp_path_factory):
    """A checkpoint of the published shape whose 7.5 GB of weights are a hole in the file, with the special tokens."""
    folder = tmp_path_factory.mktemp("3b") / "checkpoint"
    folder.mkdir()
    vision = {"hidden_size": 1280, "out_hidden_size": 2048}
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "tie_word_embeddings": True, **perf_shape.TOKENS}
    config |= {"vision_config": vision, **perf_shape.TEXT_3B}
    tokens = [{"id": number, "content": token} for token, number in qwen.IDS.items()]
    files = {"config": config, "generation_config": perf_shape.GENERATION, "tokenizer": {"added_tokens": tokens}}
    for name, content in (files | {"preprocessor_config": perf_shape.PREPROCESSOR}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    header, end = {}, 0
    for name, shape in tensor_shapes(*read_config(config), tied=True).items():
        start, end = end, end + 2 * int(np.prod(shape))
        name = f"model.{name.removeprefix('language_model.')}" if name.startswith("language_model.") else name
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_profile_of_another_model_is_refused_with_all_that_differs(shape_3b, tmp_path):
    """The demonstration model as a 3B and the other way round; nothing is written."""
    to = ("-o", tmp_path / "out", "--accept-licence", "--profile")
    for name in ("chexone", "nv-reason-cxr-3b"):
        result = export(PHANTOM / "checkpoint", *to, name)
        assert result.exit_code == 1 and f"no checkpoint of profile {name}" in result.output
        for difference in (
            "text hidden_size is 256, of the profile 2048", "text num_hidden_layers is 4, of the profile 36",
            "text num_attention_heads is 4, of the profile 16", "text vocab_size is 640, of the profile 151936",
            "vision depth is 4, of the profile 32", "vision hidden_size is 128, of the profile 1280",
            "token <|im_end|> is 2, of the profile 151645",
            "token <|image_pad|> in config.json is 5, of the profile 151655",
        ):  # fmt: skip
            assert difference in result.output
        assert "patch_size" not in result.output  # what is equal is not named
    result = export(shape_3b, *to, PHANTOM / "profile.yaml")
    assert result.exit_code == 1 and "[UNSUPPORTED_CHECKPOINT]" in result.output
    assert "vocab_size is 151936, of the profile 640" in result.output and "own" in result.output
    assert not list(tmp_path.iterdir())


def test_a_fine_tune_of_the_same_shape_is_taken(shape_3b, tmp_path):
    for name in ("chexone", "nv-reason-cxr-3b"):
        sources.require_fit(str(shape_3b), Checkpoint(shape_3b), load_profile(name))
    tuned = tmp_path / "tuned"
    shutil.copytree(PHANTOM / "checkpoint", tuned)
    weights = bytearray((tuned / "model.safetensors").read_bytes())
    weights[-4096:] = bytes(4096)
    (tuned / "model.safetensors").write_bytes(weights)
    for source in (PHANTOM / "checkpoint", tuned):
        result = export(source, "-o", tmp_path / f"{source.name}-export", "--profile", PHANTOM / "profile.yaml")
        assert result.exit_code == 0, result.output


def test_a_profile_of_ones_own_says_what_its_checkpoint_looks_like(shape_3b, tmp_path):
    own = json.loads((shape_3b / "config.json").read_text()) | {"image_token_id": 151700}
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in shape_3b.iterdir():
        (changed / path.name).symlink_to(path)
    (changed / "config.json").unlink()
    (changed / "config.json").write_text(json.dumps(own))
    with pytest.raises(UnsupportedCheckpoint, match=r"in config\.json is 151700") as refused:
        sources.require_fit(str(changed), Checkpoint(changed), load_profile("chexone"))
    assert refused.value.message.count(" of the profile ") == 1
    (tmp_path / "mine.yaml").write_text(
        "extends: chexone\nname: mine\ncheckpoint:\n  text: {vocab_size: 151668}\n  tokens: {<|ref|>: 151665}\n"
    )
    with pytest.raises(UnsupportedCheckpoint, match=r"token <\|ref\|> is absent, of the profile 151665") as refused:
        sources.require_fit(str(shape_3b), Checkpoint(shape_3b), load_profile(tmp_path / "mine.yaml"))
    assert "vocab_size is 151936, of the profile 151668" in refused.value.message
    assert "hidden_size" not in refused.value.message
    (tmp_path / "any.yaml").write_text("extends: chexone\nname: any\ncheckpoint: null\n")
    sources.require_fit(str(changed), Checkpoint(changed), load_profile(tmp_path / "any.yaml"))


def test_the_hub_s_checkpoint_of_another_profile_is_refused_though_its_shape_is_the_same(shape_3b, tmp_path):
    cached = tmp_path / "hub" / "models--nvidia--NV-Reason-CXR-3B" / "snapshots" / "c0ffee"
    cached.mkdir(parents=True)
    for source in ("nvidia/NV-Reason-CXR-3B", str(cached)):
        with pytest.raises(UnsupportedCheckpoint, match="it is nvidia/NV-Reason-CXR-3B, the profile is of Stanf"):
            sources.require_fit(source, Checkpoint(shape_3b), load_profile("chexone"))
        sources.require_fit(source, Checkpoint(shape_3b), load_profile("nv-reason-cxr-3b"))
        assert sources.licence_of(source, load_profile(PHANTOM / "profile.yaml")).non_commercial
    sources.require_fit("org/tuned", Checkpoint(shape_3b), load_profile("chexone"))


def test_a_used_folder_is_left_alone(checkpoint, free_profile, tmp_path):
    (tmp_path / "mine").write_text("keep")
    result = export(checkpoint, "-o", tmp_path, "--profile", free_profile)
    assert result.exit_code == 1 and "not an empty folder" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=str)
def test_nothing_is_left_of_a_failed_export(checkpoint, free_profile, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        assert any(tmp_path.rglob("*.partial")), "fails while the graph is being written"
        raise error

    monkeypatch.setattr("cxr_triton.export.decoder._head", fail)
    result = export(checkpoint, "-o", tmp_path / "out", "--profile", free_profile)
    assert result.exit_code in (1, 130)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_earlier_graph(checkpoint, tmp_path, monkeypatch):
    path = write_decoder(Checkpoint(checkpoint), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr("cxr_triton.export.decoder._head", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_decoder(Checkpoint(checkpoint), tmp_path, precision="fp16")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert path.exists()


def test_progress_is_shown_only_when_asked_or_on_a_terminal(checkpoint, tmp_path, capfd):
    for progress, shown in ((None, False), (True, True), (False, False)):
        write_decoder(Checkpoint(checkpoint), tmp_path, progress=progress, precision="int4")
        captured = capfd.readouterr()
        assert captured.out == "" and ("decoder.onnx: 100%" in captured.err) == shown


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_weights_lie_on_pages_and_do_not_overlap(checkpoint, tmp_path, precision):
    path = write_decoder(Checkpoint(checkpoint), tmp_path, precision=precision)
    end = 0
    for weight in onnx.load(path, load_external_data=False).graph.initializer:
        if weight.data_location == onnx.TensorProto.EXTERNAL:
            facts = {entry.key: entry.value for entry in weight.external_data}
            assert facts["location"] == "decoder.onnx.data"
            assert int(facts["offset"]) % 4096 == 0 and int(facts["offset"]) >= end
            end = int(facts["offset"]) + int(facts["length"])
    assert end == (tmp_path / "decoder.onnx.data").stat().st_size


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("int8",), "int8"),
        (("fp32", "fp16"), "free with precision int4 only"),
        (("fp16", None, "int4"), "free with precision int4 only"),
        (("int4", "int4"), "int4"),
        (("int4", "fp32", "fp32"), "fp32"),
    ],
)
def test_precision_that_does_not_exist_is_refused(arguments, message):
    with pytest.raises(InvalidRequest, match=message):
        Precision.of(*arguments)


def test_int4_refuses_a_layer_that_its_blocks_do_not_fit(tmp_path):
    writer = GraphWriter(tmp_path / "g.onnx", 24, Precision.of("int4"))
    with pytest.raises(UnsupportedCheckpoint, match="48 input features"), writer as g:
        g.int4("x", "layer.weight", np.ones((8, 48), np.float32))
    assert not list(tmp_path.iterdir())


def test_a_block_of_zeros_stays_zero(tmp_path):
    from onnx.reference import ReferenceEvaluator

    weight = np.ones((2, 64), np.float32)
    weight[:, :32] = 0
    with GraphWriter(tmp_path / "g.onnx", 24, Precision.of("int4")) as g:
        g.input("x", g.kind, [1, 64])
        g.node("Identity", g.int4("x", "layer.weight", weight), name="y")
        g.output("y", g.kind, [1, 2])
    x = np.arange(64, dtype=np.float32)[None]
    np.testing.assert_allclose(ReferenceEvaluator(str(tmp_path / "g.onnx")).run(None, {"x": x})[0], x @ weight.T)


TEXT = {
    **perf_shape.TEXT_3B,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "vocab_size": 65536,
}
VISION = {**perf_shape.VISION_3B, "hidden_size": 64, "depth": 1, "out_hidden_size": 512}


@pytest.fixture(scope="module")
def shaped(tmp_path_factory, checkpoint):
    """The 3B checkpoint's layout at 1/16 of its width: 64 MiB of embedding, 175 MiB in all."""
    folder = tmp_path_factory.mktemp("shaped")
    return perf_shape.write_shape(folder, checkpoint, text_values=TEXT, vision_values=VISION)


@pytest.mark.slow
def test_random_checkpoint_is_what_transformers_expects(shaped, checkpoint, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    small = {**TEXT, "num_hidden_layers": 2, "vocab_size": 1024}
    folders = [
        perf_shape.write_shape(tmp_path / name, checkpoint, nested=nested, text_values=small, vision_values=VISION)
        for name, nested in (("flat", False), ("nested", True))
    ]
    logits = []
    for folder in folders:
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        with torch.no_grad():
            logits.append(model(input_ids=torch.arange(40, 60)[None]).logits)
    assert torch.isfinite(logits[0]).all() and logits[0].std() > 0.1
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_memory_stays_under_one_and_a_half_of_the_largest_tensor(shaped, tmp_path, precision):
    """The interpreter and 24 MiB of working set beside it: far less than the checkpoint, so nothing piles up."""
    code = (
        "import resource, sys; from pathlib import Path; from cxr_triton.export.checkpoint import Checkpoint\n"
        "from cxr_triton.export.decoder import write_decoder; import tqdm\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = peak(); c = Checkpoint(sys.argv[1])\n"
        "write_decoder(c, Path(sys.argv[2]), precision=sys.argv[3])\n"
        "print(peak() - before, c.nbytes('language_model.embed_tokens'), c.nbytes('language_model.'))"
    )
    arguments = [sys.executable, "-c", code, str(shaped), str(tmp_path), precision]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    grown, largest, everything = map(int, output.split())
    assert everything > 2.5 * largest
    assert grown < 1.5 * largest + (24 << 20)


def test_export_needs_no_torch(checkpoint, free_profile, tmp_path):
    blocker = tmp_path / "blocker"
    for name in ("torch", "transformers", "onnxruntime"):
        (blocker / name).mkdir(parents=True)
        (blocker / name / "__init__.py").write_text(f"raise ImportError('{name} was imported')")
    arguments = ["export", checkpoint, "-o", tmp_path / "out", "--profile", free_profile]
    subprocess.run(
        [sys.executable, "-c", "from cxr_triton.cli import main; main()", *map(str, arguments)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(blocker)},
    )
    assert (tmp_path / "out" / "export.json").exists()
