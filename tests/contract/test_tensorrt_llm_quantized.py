"""Quantized TensorRT-LLM checkpoints: read back against modelopt's model, laid out as by its own exporter."""

import numpy as np
import pytest
import torch

pytest.importorskip("modelopt")

from safetensors.torch import load_file
from tensorrt_llm_reader import Decoder, unpack
from test_decoder_graph import relative_error, tokens
from test_quantized_graph import quantized

from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.quantize import Config
from cxr_triton.export.tensorrt_llm import write_tensorrt_llm

CONTEXT = 128
# Largest difference over the largest logit, both sides in fp32 on bf16 tensors; see test_quantized_graph.
BOUNDS = {"int4-awq": 1e-3, "fp8": 2e-2}


@pytest.fixture(scope="module", params=list(BOUNDS))
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trtllm")
    made = quantized(folder, request.param, dtype="bfloat16")
    write_tensorrt_llm(
        Checkpoint(made.folder), folder / "decoder", precision=request.param, max_position_embeddings=CONTEXT
    )
    return made, folder / "decoder", request.param


def first_logits(decoder, ids):
    """Logits behind a text prompt, from tensors made here."""
    half, length = decoder.config["rotary_embedding_dim"] // 2, ids.shape[1]
    angles = np.zeros((CONTEXT, half), np.float32)
    angles[:length] = np.arange(length)[:, None] / np.float32(1e6) ** (np.arange(half, dtype=np.float32) / half)
    inputs = {
        "input_ids": ids.astype(np.int32),
        "input_lengths": np.array([[length]], np.int32),
        "mrope_rotary_cos_sin": np.stack([np.cos(angles), np.sin(angles)], -1).reshape(1, -1),
        "mrope_position_deltas": np.array([[0]]),
    }
    return decoder.generate(inputs, 1)[1].numpy()


def test_logits_are_those_of_modelopts_model(written):
    made, folder, scheme = written
    decoder = Decoder(folder)
    assert relative_error(first_logits(decoder, made.ids), made.logits_fp32[0, -1]) <= BOUNDS[scheme]
    assert decoder.read == set(decoder.tensors)


def exchange_nibbles(tensors):
    for name, value in tensors.items():
        if value.dtype == torch.int8:
            bits = value.view(torch.uint8)
            tensors[name] = ((bits >> 4) | (bits << 4)).view(torch.int8)


def shift_the_scales(tensors):
    for name, value in tensors.items():
        if name.endswith("weights_scaling_factor"):
            tensors[name] = value.roll(1, 0) if len(value) > 1 else value * 1.25


def shrink_the_activation_scales(tensors):
    for name, value in tensors.items():
        if name.endswith(("activation_scaling_factor", "prequant_scaling_factor")):
            tensors[name] = value * 1e-3


@pytest.mark.parametrize("mutate", [exchange_nibbles, shift_the_scales, shrink_the_activation_scales])
def test_what_is_known_to_go_wrong_is_seen(written, mutate):
    made, folder, scheme = written
    if mutate is exchange_nibbles and scheme == "fp8":
        pytest.skip("float8 has no nibbles")
    decoder = Decoder(folder)
    mutate(decoder.tensors)
    assert relative_error(first_logits(decoder, made.ids), made.logits_fp32[0, -1]) > 5 * BOUNDS[scheme]


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int4-awq"])
def test_files_are_laid_out_as_by_modelopts_exporter(scheme, tmp_path):
    """Its exporter takes the text-only twin of the decoder: same names, types and shapes, and the same products.

    Where numbers differ: modelopt's unified checkpoint, our source, was rounded from bf16 quotients, and has folded
    smoothing into the norms, where the older exporter leaves it beside the weights.
    """
    ours, theirs, norms = both(scheme, tmp_path)
    extra = {name for name in theirs if name.endswith(("k_cache_scaling_factor", "v_cache_scaling_factor"))}
    assert set(ours) == set(theirs) - (extra - set(ours))  # k and v beside the one for both, which alone is read
    for name, value in ours.items():
        assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape), name
        if scheme == "bf16" or name.endswith(("bias", "lm_head.weight", "vocab_embedding.weight", "ln_f.weight")):
            assert torch.equal(value, theirs[name]), name
    for name in ours:
        if name.endswith("weights_scaling_factor"):
            a, b = (
                effective(tensors, name.removesuffix(".weights_scaling_factor"), norms) for tensors in (ours, theirs)
            )
            # Two roundings of one weight are a step apart at most: an eighth of it in e4m3, a scale in int4.
            step = a.abs().maximum(b.abs()) / 8 if scheme == "fp8" else b.abs().amax(1, keepdim=True) / 6
            assert ((a - b).abs() <= step + 2e-4 * b.abs().max()).float().mean() > 0.997, name
            assert (a - b).abs().mean() <= (0.05 if scheme == "fp8" else 0.15) * b.abs().mean(), name
    if scheme == "fp8":
        for name in (n for n in ours if n.endswith(("activation_scaling_factor", "kv_cache_scaling_factor"))):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=0)


def effective(tensors, name, norms):
    """What a layer multiplies the normalized residual stream with, [out, in]."""
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weights_scaling_factor"]
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * scale
    weight = unpack(weight) * scale.float().repeat_interleave(128, dim=1)
    weight = weight * tensors[f"{name}.prequant_scaling_factor"].float()
    for part, norm in norms.items():
        if part in name:
            weight = weight * tensors[f"{name.split(part)[0]}{norm}.weight"].float()
    return weight


def both(scheme, folder):
    """Tensors that we and modelopt's exporter write of one decoder, calibrated alike."""
    import modelopt.torch.quantization as mtq
    from checkpoints import random_checkpoint
    from modelopt.torch.export import export_tensorrt_llm_checkpoint
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

    if scheme == "bf16":
        random_checkpoint(folder / "plain", dtype="bfloat16")
        source = folder / "plain"
    else:
        source = quantized(folder, scheme, dtype="bfloat16", kv_fp8=scheme == "fp8").folder
    write_tensorrt_llm(Checkpoint(source), folder / "ours", precision=scheme, max_position_embeddings=CONTEXT)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "plain", dtype=torch.bfloat16)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = model.config.text_config
    config = Qwen2Config(
        **{key: getattr(text, key) for key in (*same, "num_key_value_heads", "rms_norm_eps")},
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    twin = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    twin.model.load_state_dict(model.model.language_model.state_dict())
    twin.tie_weights()

    def calibrate(model):
        for seed in range(4):
            model(input_ids=torch.from_numpy(tokens(1, 40, seed=seed)))

    with torch.no_grad():
        if scheme != "bf16":
            config = Config("fp8", None, "fp8") if scheme == "fp8" else Config(scheme, 128)
            mtq.quantize(twin, config.of_modelopt(), calibrate)
        export_tensorrt_llm_checkpoint(
            twin, "qwen", torch.bfloat16, export_dir=folder / "theirs", inference_tensor_parallel=1
        )
    norms = {"attention.qkv": "input_layernorm", "mlp.fc": "post_layernorm", "mlp.gate": "post_layernorm"}
    return load_file(folder / "ours/rank0.safetensors"), load_file(folder / "theirs/rank0.safetensors"), norms
