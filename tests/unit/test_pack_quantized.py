"""modelopt's int4 as compressed-tensors' pack-quantized: the same layers, read back by its own arithmetic."""

import json
import re

import numpy as np
import pytest
import torch
from gateway_peers import PHANTOM
from int4_checkpoint import GROUP, write_int4
from safetensors.torch import load_file

from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.folder import decoder_bytes, write_folder
from cxr_triton.export.pack_quantized import pack


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The packed folder, and the weights that the quantized checkpoint stands for."""
    folder = tmp_path_factory.mktemp("int4")
    effective = write_int4(PHANTOM / "checkpoint", folder / "modelopt")
    write_folder(Checkpoint(folder / "modelopt"), folder / "packed", progress=False)
    return folder / "packed", effective


def unpacked(tensors, name):
    """As compressed_tensors unpacks: eight nibbles to an integer, less 8, times the scale."""
    packed, scale = tensors[f"{name}_packed"], tensors[f"{name}_scale"].double()
    n, k = tensors[f"{name}_shape"].tolist()
    values = torch.zeros((n, k), dtype=torch.int32)
    for i in range(8):
        values[:, i::8] = packed >> 4 * i & 15
    return (values - 8).double() * scale.repeat_interleave(GROUP, 1)


def test_every_layer_does_what_it_did(written):
    folder, effective = written
    tensors = load_file(folder / "model.safetensors")
    x = torch.randn(5, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer in range(4):
        path = f"model.language_model.layers.{layer}"
        for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"):
            was = effective[f"model.layers.{layer}.{module}.weight"].double()
            torch.testing.assert_close(unpacked(tensors, f"{path}.{module}.weight"), was, rtol=2**-8, atol=0)
        was = effective[f"model.layers.{layer}.self_attn.o_proj.weight"].double()
        torch.testing.assert_close(tensors[f"{path}.self_attn.o_proj.weight"].double(), was, rtol=2**-8, atol=0)
        up, down = (effective[f"model.layers.{layer}.mlp.{part}_proj.weight"].double() for part in ("up", "down"))
        of_up, of_down = (unpacked(tensors, f"{path}.mlp.{part}_proj.weight") for part in ("up", "down"))
        assert not torch.allclose(of_up, up, rtol=0.05), "what down_proj had is in its rows"
        expected = (x @ up.T) @ down.T
        torch.testing.assert_close((x @ of_up.T) @ of_down.T, expected, rtol=0, atol=float(expected.std()) * 0.02)


def test_the_config_says_what_is_packed_and_what_is_not(written):
    folder, _ = written
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized" and config["config_groups"]["group_0"]["weights"]["group_size"] == GROUP
    patterns = [each.removeprefix("re:") for each in config["ignore"]]
    for name in load_file(folder / "model.safetensors"):
        module = name.removeprefix("model.").removesuffix(".weight").replace("language_model.", "language_model.model.")
        ignored = any(re.match(pattern, module) for pattern in patterns)
        if name.endswith("_proj.weight_packed"):
            assert not ignored, name
        elif name.endswith("_proj.weight") and "visual" not in name:
            assert ignored, name
    assert not (folder / "hf_quant_config.json").exists() and (folder / "tokenizer.json").exists()


def test_what_a_step_reads_is_counted_from_the_files(written):
    folder, _ = written
    packed = decoder_bytes(folder, tied=True)
    entries = load_file(folder / "model.safetensors")
    assert packed == sum(t.numel() * t.itemsize for name, t in entries.items() if "visual" not in name)
    assert decoder_bytes(folder, tied=False) < packed < decoder_bytes(PHANTOM / "checkpoint", tied=True)


def test_values_keep_their_order_and_sign():
    signed = np.arange(-8, 8, dtype=np.int8)[None]
    (low, high) = pack(signed)[0].view(np.uint32)
    assert (hex(low), hex(high)) == ("0x76543210", "0xfedcba98")
