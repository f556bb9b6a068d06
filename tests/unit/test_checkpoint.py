"""Checkpoints in every spelling are read alike, and what is not one is refused by name."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from checkpoints import END, IMAGE_TOKEN, VISION_START, random_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxr_triton.errors import UnsupportedCheckpoint
from cxr_triton.export.checkpoint import DTYPES, Checkpoint, torch_model
from cxr_triton.export.geometry import TextConfig, VisionConfig
from cxr_triton.export.safetensors import read_header
from cxr_triton.export.source import locate


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return folder, random_checkpoint(folder, dtype="bfloat16", layers=2)


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original[0], tmp_path / "checkpoint")


def edit(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flatten(folder):
    """The older spelling: text keys at the top, `rope_scaling`, class defaults left out."""
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    config |= text | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "torch_dtype": config.pop("dtype"),
    }
    vision = config["vision_config"]
    for key in ("window_size", "patch_size", "spatial_merge_size", "temporal_patch_size", "in_channels"):
        del vision[key]
    vision["in_chans"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def rename(folder, prefixes):
    """Write the tensors again under other prefixes."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next(prefix for prefix in prefixes if name.startswith(prefix))
        tensors[prefixes[old] + name.removeprefix(old)] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_class_defaults_are_those_of_transformers():
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

    for ours, theirs in ((TextConfig(), Qwen2_5_VLTextConfig()), (VisionConfig(), Qwen2_5_VLVisionConfig())):
        rope = theirs.rope_parameters
        for name in ours.__dataclass_fields__:
            expected = rope["rope_theta"] if name == "rope_theta" else getattr(theirs, name, None)
            if name != "mrope_section":  # a default of the model's code, not of its config
                assert getattr(ours, name) == (tuple(expected) if isinstance(expected, list) else expected), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_has_the_bytes_that_transformers_loads(tmp_path, dtype):
    model = random_checkpoint(tmp_path, dtype=dtype, layers=1, tied=False)
    checkpoint = Checkpoint(tmp_path)
    assert not checkpoint.tied
    seen = set()
    for name, parameter in model.named_parameters():
        array = checkpoint.array(name.removeprefix("model."))
        assert array.shape == tuple(parameter.shape)
        assert array.dtype.name == dtype
        assert array.tobytes() == parameter.detach().contiguous().view(torch.uint8).numpy().tobytes(), name
        seen.add(name)
    assert "lm_head.weight" in seen


def test_geometry_and_token_ids_come_from_the_files(original):
    checkpoint = Checkpoint(original[0])
    assert (checkpoint.image_token_id, checkpoint.vision_start_token_id) == (IMAGE_TOKEN, VISION_START)
    assert checkpoint.eos_token_ids == (END, END + 1)
    assert checkpoint.text.mrope_section == (4, 6, 6) and checkpoint.text.head_dim == 32
    assert checkpoint.vision.fullatt_block_indexes == (1, 3)
    assert checkpoint.tied


def test_flat_config_reads_like_the_nested_one(original, copy):
    flatten(copy)
    nested, flat = Checkpoint(original[0]), Checkpoint(copy)
    for attribute in ("text", "vision", "tied", "eos_token_ids", "image_token_id"):
        assert getattr(flat, attribute) == getattr(nested, attribute)


def test_both_tensor_layouts_read_alike(original, copy):
    rename(copy, {"model.": "model.language_model.", "visual.": "model.visual."})
    older, newer = Checkpoint(original[0]), Checkpoint(copy)
    for name in ("language_model.layers.1.mlp.down_proj.weight", "visual.blocks.3.attn.qkv.bias"):
        np.testing.assert_array_equal(older.array(name).view(np.uint16), newer.array(name).view(np.uint16))


def test_shards_read_like_one_file(original, tmp_path):
    random_checkpoint(tmp_path, dtype="bfloat16", layers=2, shard_size="200KB")
    whole, sharded = Checkpoint(original[0]), Checkpoint(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert whole.nbytes() == sharded.nbytes()
    for name in ("language_model.embed_tokens.weight", "visual.merger.mlp.2.weight"):
        np.testing.assert_array_equal(whole.array(name).view(np.uint16), sharded.array(name).view(np.uint16))
    assert set(sharded.digests()) >= {path.name for path in tmp_path.glob("*.safetensors*")}


def test_processor_config_stands_in_for_preprocessor_config(original, copy):
    preprocessor = (copy / "preprocessor_config.json").read_text()
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(UnsupportedCheckpoint, match=r"no preprocessor_config\.json"):
        Checkpoint(copy)
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(preprocessor)}))
    assert Checkpoint(copy).preprocessor == Checkpoint(original[0]).preprocessor


@pytest.mark.parametrize(
    "name, content",
    [
        ("chat_template.jinja", "T"),
        ("chat_template.json", '{"chat_template": "T"}'),
        ("tokenizer_config.json", '{"chat_template": "T"}'),
    ],
)
def test_chat_template_is_found_wherever_it_is(copy, name, content):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedCheckpoint, match="no chat template"):
        Checkpoint(copy).side_files()
    (copy / name).write_text(content)
    assert Checkpoint(copy).side_files()["chat_template.jinja"] == b"T"


@pytest.mark.parametrize(
    "architecture",
    ["Qwen2VLForConditionalGeneration", "Qwen3VLForConditionalGeneration", "LlavaForConditionalGeneration"],
)
def test_other_architectures_are_refused_by_name(copy, architecture):
    edit(copy, architectures=[architecture])
    with pytest.raises(UnsupportedCheckpoint, match=architecture):
        Checkpoint(copy)


def test_another_model_type_without_architectures_is_refused_by_name(copy):
    edit(copy, architectures=None, model_type="qwen3_vl")
    with pytest.raises(UnsupportedCheckpoint, match="qwen3_vl"):
        Checkpoint(copy)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantized.*awq"),
        ({"text_config": {"hidden_size": 128, "num_attention_heads": 3}}, "multiple"),
        ({"text_config": {"hidden_act": "gelu"}}, "gelu"),
        ({"text_config": {"use_sliding_window": True}}, "use_sliding_window"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "yarn"),
        ({"text_config": {"num_hidden_layers": 10**12}}, "layers"),
        ({"text_config": {"num_hidden_layers": -1}}, "num_hidden_layers"),
        ({"text_config": {"hidden_size": "wide"}}, "wide"),
        ({"vision_config": {"patch_size": 16}}, "patch_size"),
        ({"vision_config": {"window_size": 224}}, "window_size"),
        ({"vision_config": {"out_hidden_size": 64}}, "out_hidden_size"),
    ],
    ids=str,
)
def test_config_that_cannot_be_exported_says_what_and_why(copy, changes, message):
    config = json.loads((copy / "config.json").read_text())
    edit(copy, **{k: {**config[k], **v} if k in config else v for k, v in changes.items()})
    with pytest.raises(UnsupportedCheckpoint, match=message):
        Checkpoint(copy)


def test_weights_of_another_size_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    edit(copy, text_config={**config["text_config"], "intermediate_size": 256})
    with pytest.raises(UnsupportedCheckpoint, match=r"gate_proj.*\[384, 128\].*\[256, 128\]"):
        Checkpoint(copy)


def test_an_adapter_is_refused(copy):
    rename(copy, {"model.": "base_model.model.", "visual.": "base_model.visual."})
    with pytest.raises(UnsupportedCheckpoint, match="adapters"):
        Checkpoint(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(UnsupportedCheckpoint, match=name):
        Checkpoint(copy)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_config_is_named(copy, content):
    (copy / "config.json").write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint, match=r"config\.json"):
        Checkpoint(copy)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", ".hidden", ""])
def test_index_cannot_leave_the_folder(copy, file):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"visual.x": file}}))
    with pytest.raises(UnsupportedCheckpoint, match="outside"):
        Checkpoint(copy)


def test_index_that_misplaces_a_tensor_is_refused(copy):
    index = {"weight_map": {"model.norm.weight.moved": "model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedCheckpoint, match="does not hold"):
        Checkpoint(copy)


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty file": (b"", "header length"),
    "cut in the length": (b"\x01\x00", "header length"),
    "header longer than the file": (safetensors({}, length=2**63), "header length"),
    "header not JSON": (safetensors(b"{nope"), "unreadable"),
    "header nested deep": (safetensors(b"[" * 200_000), "unreadable"),
    "header not an object": (safetensors(b"[1]"), "not an object"),
    "entry not an object": (safetensors({"a": 1}), "lacks"),
    "entry without offsets": (safetensors({"a": {"dtype": "F32", "shape": [1]}}), "lacks"),
    "unknown type": (safetensors({"a": tensor(0, 4, dtype="F31")}, bytes(4)), "F31"),
    "type not a string": (safetensors({"a": {**tensor(0, 4), "dtype": ["F32"]}}, bytes(4)), "F32"),
    "negative shape": (safetensors({"a": tensor(0, 4, [-1, -1])}, bytes(4)), "-1"),
    "negative offset": (safetensors({"a": tensor(-4, 0, [1])}, bytes(4)), "-4"),
    "shape not whole": (safetensors({"a": tensor(0, 4, [1.0])}, bytes(4)), "1.0"),
    "shape beyond its bytes": (safetensors({"a": tensor(0, 4, [2**40])}, bytes(4)), "is given 4 bytes"),
    "overlapping": (safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "predecessor ends"),
    "hole": (safetensors({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), "predecessor ends"),
    "truncated": (safetensors({"a": tensor(0, 8)}, bytes(7)), "the file at"),
    "bytes behind": (safetensors({"a": tensor(0, 8)}, bytes(9)), "the file at"),
}


@pytest.mark.parametrize("content, message", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_safetensors_is_refused(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        read_header(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_in_the_header_gives_a_typed_error_or_a_sound_header(original, tmp_path, data):
    content = bytearray((original[0] / "model.safetensors").read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except UnsupportedCheckpoint:
        return
    end = max(entry.offset + entry.nbytes for entry in entries.values())
    assert end == len(content)
    assert sum(entry.nbytes for entry in entries.values()) <= len(content)


def test_an_empty_tensor_is_sound(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"a": tensor(0, 8), "none": tensor(8, 8, [0])}, bytes(8)))
    assert read_header(path)["none"].shape == (0,)
    assert "F32" in DTYPES


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_token_id", "x"),
        ("image_token_id", [1]),
        ("text_config", [1]),
        ("vision_config", "x"),
        ("rope_scaling", "x"),
        ("architectures", 5),
        ("transformers_weights", "../other.safetensors"),
    ],
)
def test_a_value_of_another_type_in_a_config_is_named(copy, key, value):
    edit(copy, **{key: value})
    with pytest.raises(UnsupportedCheckpoint, match=key):
        Checkpoint(copy)


def test_an_adapter_beside_whole_weights_is_refused_too(copy):
    """With peft, transformers would take the model that it names in place of these weights."""
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    with pytest.raises(UnsupportedCheckpoint, match="adapters are not read"):
        Checkpoint(copy)


@pytest.mark.parametrize("text", ['{"model": 5}', '{"added_tokens": [{"content": [1]}, 2]}', '{"added_tokens": 5}'])
def test_a_tokenizer_of_other_types_has_no_ids_and_fails_nothing(copy, text):
    (copy / "tokenizer.json").write_text(text)
    assert set(Checkpoint(copy).token_ids()) <= {"[1]"}


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_no_kernel_that_a_config_asks_for_is_fetched(copy, key):
    """transformers takes an attention kernel from the hub, and runs it."""
    edit(copy, **{key: "org/kernel"})
    assert torch_model(copy, "auto").config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [[int("9" * 4000)] * 9000, [1] * 9, [1 << 48]])
def test_a_shape_beyond_all_measure_is_refused_at_once(tmp_path, shape):
    header = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(UnsupportedCheckpoint, match="not a sound safetensors file") as refused:
        read_header(tmp_path / "x.safetensors")
    assert len(refused.value.message) < 1000


class TestHub:
    """Hub ids against a local hub cache; the network is never asked."""

    COMMIT = "056bd0383b35226554da9dc5866e095df174ae19"

    @pytest.fixture
    def cache(self, original, tmp_path, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        repo = tmp_path / "models--org--name"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(self.COMMIT)
        shutil.copytree(original[0], repo / "snapshots" / self.COMMIT)

    @pytest.mark.parametrize("revision", [None, "main", COMMIT])
    def test_id_and_revision_give_the_snapshot_and_its_commit(self, cache, revision):
        folder, commit = locate("org/name", revision)
        assert commit == self.COMMIT
        assert Checkpoint(folder).tied

    @pytest.mark.parametrize("source, revision", [("org/name", "v9"), ("org/absent", None)])
    def test_what_the_hub_does_not_give_is_a_typed_error(self, cache, source, revision):
        with pytest.raises(UnsupportedCheckpoint, match=f"{source} at revision {revision or 'main'}"):
            locate(source, revision)

    def test_a_folder_has_no_revision(self, original):
        assert locate(str(original[0])) == (original[0], None)

    @pytest.mark.parametrize("source", ["no/such/folder", "absent", "../up/there", "org/name;rm"])
    def test_neither_folder_nor_id(self, source):
        with pytest.raises(UnsupportedCheckpoint, match="neither a folder nor a hub id"):
            locate(source)
