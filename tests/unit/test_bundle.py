"""What a bundle vouches for: every way a folder can differ from its manifest is refused by name."""

import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import write_export
from checkpoints import random_checkpoint

from cxr_triton.engines import bundle as bundles
from cxr_triton.engines.build import build_bundle, recipe_for
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.cpu import Cpu
from cxr_triton.engines.onnxruntime import compiler
from cxr_triton.errors import InvalidBundle, InvalidProfile, InvalidRequest


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    random_checkpoint(folder / "checkpoint", layers=1, hidden=64)
    return write_export(folder / "export", folder / "checkpoint")


@pytest.fixture(scope="module")
def int4_export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4")
    random_checkpoint(folder / "checkpoint", layers=2)
    return write_export(folder / "export", folder / "checkpoint", precision="int4")


@pytest.fixture
def own_export(export, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(export, tmp_path / "spoiled"))


@pytest.fixture
def built(export, tmp_path):
    return build_bundle(export, tmp_path / "bundle").path


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_built_bundle_opens_and_says_what_it_is(export, tmp_path):
    seen = {}
    bundle = build_bundle(export, tmp_path / "bundle", progress=lambda name, count: seen.update({name: count}))
    again = Bundle.open(bundle.path)
    assert again == bundle
    assert (bundle.engine, bundle.precision) == ("onnxruntime", "fp32")
    assert bundle.geometry.layers == 1 and bundle.geometry.eos_token_ids == (314, 315)
    assert bundle.profile.name == "nv-reason-cxr-3b"
    assert set(seen) >= set(bundles.SIDE_FILES)
    assert {item.name for item in bundle.path.iterdir()} == {*bundle.manifest["files"], "manifest.json"}
    assert not list(tmp_path.glob(".bundle.*"))


def test_the_same_export_gives_the_same_digest_elsewhere(export, tmp_path):
    first, second = build_bundle(export, tmp_path / "a"), build_bundle(export, tmp_path / "deep" / "b")
    assert first.digest == second.digest


@pytest.mark.parametrize("name", ["decoder.onnx.data", "tokenizer.json", "profile.yaml"])
def test_one_changed_byte_is_named(built, name):
    data = bytearray((built / name).read_bytes())
    data[len(data) // 2] ^= 1
    (built / name).write_bytes(data)
    with pytest.raises(InvalidBundle, match=rf"^{name} has SHA-256"):
        Bundle.open(built)
    Bundle.open(built, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_named_with_both_sizes(built, verify):
    size = (built / "vision.onnx.data").stat().st_size
    os.truncate(built / "vision.onnx.data", size - 1)
    with pytest.raises(InvalidBundle, match=rf"vision\.onnx\.data has {size - 1} bytes.*{size}"):
        Bundle.open(built, verify=verify)


@pytest.mark.parametrize("name", ["decoder.onnx", "chat_template.jinja", "vision.onnx.data", "manifest.json"])
def test_a_missing_file_is_named(built, name):
    (built / name).unlink()
    with pytest.raises(InvalidBundle, match=name):
        Bundle.open(built)


def test_a_missing_file_that_the_manifest_forgot_is_named(built):
    (built / "decoder.onnx.data").unlink()
    edit(built, lambda manifest: manifest["files"].pop("decoder.onnx.data"))
    with pytest.raises(InvalidBundle, match=r"decoder\.onnx\.data is missing"):
        Bundle.open(built)


def test_a_file_that_the_manifest_does_not_know_is_named(built):
    (built / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InvalidBundle, match=r"tokenizer_config\.json"):
        Bundle.open(built)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/hostname", "a/b", "..", ".", "", "a\\b", "a\0b", "manifest.json", "x" * 5000, "\u202eonnx"],
)
def test_a_name_that_is_no_plain_file_name_is_refused(built, name):
    (built.parent / "secret").write_text("")
    entry = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    edit(built, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(InvalidBundle, match="no plain file name") as caught:
        Bundle.open(built)
    assert len(str(caught.value)) < 300


def test_a_folder_in_place_of_a_file_is_refused(built):
    (built / "profile.yaml").unlink()
    (built / "profile.yaml").mkdir()
    with pytest.raises(InvalidBundle, match=r"profile\.yaml.*not a regular file"):
        Bundle.open(built)


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema_is_refused(built, schema):
    edit(built, lambda manifest: manifest.update(schema=schema))
    with pytest.raises(InvalidBundle, match=r"schema.*reads 1"):
        Bundle.open(built)


@pytest.mark.parametrize(
    "built_with, opens", [("1.31.1", True), ("1.24.0", True), ("1.31.9", True), ("1.99.0", False), (None, False)]
)
def test_a_runtime_older_than_the_bundle_is_refused(built, monkeypatch, built_with, opens):
    monkeypatch.setattr(metadata, "version", lambda name: "1.31.1")
    edit(built, lambda manifest: manifest["versions"].update(onnxruntime=built_with))
    if opens:
        Bundle.open(built)
    else:
        with pytest.raises(InvalidBundle, match=r"onnxruntime.*1\.31\.1 is installed"):
            Bundle.open(built)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"schema": 1}', '{"schema": 1, "files": {"a": 1}}']
)
def test_a_manifest_that_is_none_is_an_error_and_nothing_worse(built, text):
    (built / "manifest.json").write_text(text)
    with pytest.raises(InvalidBundle, match=r"manifest\.json"):
        Bundle.open(built)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda geometry: geometry.pop("kv_heads"), "kv_heads"),
        (lambda geometry: geometry.update(colour="red"), "colour"),
        (lambda geometry: geometry.update(layers="3"), "layers"),
        (lambda geometry: geometry.update(layers=True), "layers"),
        (lambda geometry: geometry.update(eos_token_ids=[]), "eos_token_ids"),
    ],
)
def test_a_geometry_that_does_not_fit_names_the_key(built, change, words):
    edit(built, lambda manifest: change(manifest["geometry"]))
    with pytest.raises(InvalidBundle, match=words):
        Bundle.open(built)


def test_an_entry_without_a_digest_is_refused(built):
    edit(built, lambda manifest: manifest["files"]["config.json"].update(sha256="abc"))
    with pytest.raises(InvalidBundle, match=r"config\.json"):
        Bundle.open(built)


@pytest.mark.parametrize("name", ["export.json", "decoder.onnx.data", "chat_template.jinja"])
def test_build_refuses_an_incomplete_export_and_leaves_nothing(own_export, tmp_path, name):
    (own_export / name).unlink()
    with pytest.raises(InvalidBundle, match=name):
        build_bundle(own_export, tmp_path / "out" / "bundle")
    assert not (tmp_path / "out" / "bundle").exists()


def test_build_refuses_a_compute_type_that_a_cpu_does_not_run(own_export, tmp_path):
    export = json.loads((own_export / "export.json").read_text())
    export["geometry"]["compute"] = "bf16"
    (own_export / "export.json").write_text(json.dumps(export))
    with pytest.raises(InvalidBundle, match=r"bf16.*fp32"):
        build_bundle(own_export, tmp_path / "bundle")


def test_build_refuses_a_profile_that_is_none(own_export, tmp_path):
    (own_export / "profile.yaml").write_text("name: x\ncolour: red\n")
    with pytest.raises(InvalidProfile, match="colour"):
        build_bundle(own_export, tmp_path / "bundle")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_build_that_breaks_leaves_nothing(export, tmp_path, monkeypatch, error):
    def broken(source, target):
        target.write_bytes(b"half")
        raise error

    monkeypatch.setattr(compiler, "compile_decoder", broken)
    with pytest.raises(type(error)):
        build_bundle(export, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_build_does_not_touch_a_folder_in_use(export, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="not an empty folder"):
        build_bundle(export, tmp_path / "bundle")
    assert [item.name for item in tmp_path.rglob("*")] == ["bundle", "thesis.txt"]


WRITTEN = ("export.json", *bundles.SIDE_FILES, "vision.onnx", "vision.onnx.data", "decoder.onnx", "decoder.onnx.data")


TEXTS = ("profile.yaml", "chat_template.jinja")  # half of one may be one; the gate compares them with their sources


@pytest.mark.parametrize(
    ("name", "share"), [(name, share) for name in WRITTEN for share in (0, 0.5, 0.9) if not share or name not in TEXTS]
)
def test_build_refuses_an_export_that_was_written_in_part(own_export, tmp_path, name, share):
    assert {path.name for path in own_export.iterdir()} == set(WRITTEN)
    size = (own_export / name).stat().st_size
    os.truncate(own_export / name, int(share * size))
    with pytest.raises(InvalidBundle, match=f"{name}.*export again"):
        build_bundle(own_export, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_build_names_an_unknown_compiler(export, tmp_path):
    with pytest.raises(InvalidRequest, match="recipe"):
        build_bundle(export, tmp_path / "bundle", compiler="tensorrt")


@pytest.mark.parametrize(("tokens", "write_index"), [(7, [4]), (7, [0]), (1, [0, 4, 9])])
def test_the_compiled_int4_graph_computes_what_the_exported_one_does(int4_export, tmp_path, tokens, write_index):
    """With activations in fp32 on both sides: in int8, a last bit before rounding grows to a visible difference."""
    import onnx
    import onnxruntime

    path = build_bundle(int4_export, tmp_path / "bundle").path / "decoder.onnx"
    model = onnx.load(path, load_external_data=False)
    fused = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(fused) == 2 * 4 + 1 and not any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    for node in fused:
        (level,) = (attribute for attribute in node.attribute if attribute.name == "accuracy_level")
        assert level.i == 4
        level.i = 1
    onnx.save(model, path)
    rng = np.random.default_rng(0)
    batch, length = len(write_index), 16
    feeds = {
        "input_ids": rng.integers(0, 320, (batch, tokens)),
        "image_index": rng.integers(-1, 4, (batch, tokens)),
        "image_embeddings": rng.standard_normal((4, 128)).astype(np.float32),
        "position_ids": rng.integers(0, 50, (3, batch, tokens)),
        "write_index": np.array(write_index),
        "logits_index": rng.integers(0, tokens, (batch, 2)),
    }
    for layer in range(2):
        for part in ("key", "value"):
            feeds[f"past_{part}.{layer}"] = rng.standard_normal((batch, 2, length, 32)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    exported, compiled = (
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"]).run(None, feeds)
        for graph in (int4_export / "decoder.onnx", path)
    )
    names = [output.name for output in model.graph.output]
    for name, expected, actual in zip(names, exported, compiled, strict=True):
        rows = [slice(None)] * batch if name == "logits" else [np.s_[:, : start + tokens] for start in write_index]
        for row, used in enumerate(rows):
            np.testing.assert_allclose(actual[row][used], expected[row][used], atol=1e-4 * np.abs(expected).max())


def test_the_build_verb_writes_a_bundle_and_its_json(export, tmp_path):
    from click.testing import CliRunner

    from cxr_triton.cli import main

    arguments = ["build", str(export), "-o", str(tmp_path / "bundle"), "--json", "-"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["digest"] == Bundle.open(tmp_path / "bundle").digest
    assert f"next: cxr-triton verify {tmp_path / 'bundle'} " in result.stderr
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1 and "[INVALID_REQUEST]" in again.stderr and not again.stdout


@pytest.mark.parametrize(
    ("flags", "words", "recipe"),
    [
        (("avx2",), [], "cpu-int4"),
        (("avx512_vnni",), [], "cpu-int4-w4a8"),
        (("avx512_vnni",), ["--recipe", "cpu"], "cpu-int4-w4a8"),
        (("avx512_vnni", "amx_int8"), [], "cpu-int4-int8"),
        (("avx512_vnni",), ["--recipe", "cpu-int4"], "cpu-int4"),
    ],
)
def test_int4_is_built_by_the_recipe_of_the_processor(int4_export, tmp_path, monkeypatch, flags, words, recipe):
    from click.testing import CliRunner

    from cxr_triton.cli import main

    monkeypatch.setattr(Cpu, "here", classmethod(lambda cls: Cpu(model="Some CPU", flags=flags, cores=2)))
    done = CliRunner().invoke(main, ["build", str(int4_export), "-o", str(tmp_path / "bundle"), *words])
    assert done.exit_code == 0, done.output
    assert Bundle.open(tmp_path / "bundle").manifest["recipe"]["name"] == recipe
    assert (f"recipe {recipe}, which is this processor's" in done.stderr) is (words[1:] != ["cpu-int4"])


def test_what_no_recipe_of_a_processor_builds_is_built_as_it_was_exported(export, int4_export, tmp_path):
    assert recipe_for(export) is None, "fp32"
    edited = shutil.copytree(int4_export, tmp_path / "long")
    facts = json.loads((edited / "export.json").read_text())
    facts["geometry"]["max_sequence"] = 8192
    (edited / "export.json").write_text(json.dumps(facts))
    assert recipe_for(edited) is None, "a recipe would cut its context"


@pytest.mark.parametrize(
    ("entry", "value"), [("location", "../../secret"), ("offset", "-1"), ("length", "x"), ("location", "/etc/passwd")]
)
def test_a_graph_that_takes_its_weights_from_elsewhere_is_refused(own_export, tmp_path, entry, value):
    path = own_export / "decoder.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(item for item in tensor.external_data if item.key == entry).value = value
    onnx.save(model, path)
    with pytest.raises(InvalidBundle, match=r"from elsewhere than decoder\.onnx\.data; export again"):
        build_bundle(own_export, tmp_path / "out")


def test_a_bundle_s_profile_names_no_other_file(built):
    bundle = Bundle.open(built)
    (built / "profile.yaml").write_text("extends: /etc/passwd\n")
    with pytest.raises(InvalidProfile, match="which is complete"):
        _ = bundle.profile
