"""Graphs of checkpoints that modelopt quantized, in ONNX Runtime, against modelopt's own fake-quantized forward.

A weight on the edge of two values may fall to one side in modelopt's forward, which multiplies by 1 / scale, and to the
other in its exporter, which divides by scale (and rounds a bf16 quotient before float8). One such weight of 500,000
moves the logits by half a percent, so the models here have weights that lie on values already.
"""

import copy
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from checkpoints import random_checkpoint
from test_decoder_graph import Decoder, relative_error, tokens

from cxr_triton.engines.onnxruntime.compiler import compile_decoder
from cxr_triton.errors import InvalidRequest, UnsupportedCheckpoint
from cxr_triton.export.checkpoint import CALIBRATION, Checkpoint
from cxr_triton.export.decoder import write_decoder
from cxr_triton.export.graph import check
from cxr_triton.export.quantize import Config, share_scales

pytest.importorskip("modelopt")

# Of the largest logit. int4-awq: the order of sums. fp8: that order puts an activation here and there, one of some
# 100,000, on the other side of an edge between two float8 values, which are 6 to 12 % apart.
BOUND = {"int4-awq": 1e-5, "fp8": 1e-2}
HEAD_INPUT_AMAX = 6.0


@dataclass
class Quantized:
    folder: Path
    ids: np.ndarray
    logits: np.ndarray  # of the fake-quantized forward in the checkpoint's type
    logits_fp32: np.ndarray  # of the same weights and scales, computed in fp32


def quantized(folder, scheme, *, group=128, kv_fp8=False, dtype="float32", exclude=(), samples=4, **shape):
    """A random checkpoint quantized and written by modelopt, and the logits of the fake-quantized model."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

    model = random_checkpoint(folder / "plain", dtype=dtype, **shape)
    config = Config(scheme, group if scheme == "int4-awq" else None, "fp8" if kv_fp8 else None).of_modelopt()
    config["quant_cfg"] += [{"quantizer_name": f"*{name}*", "enable": False} for name in exclude]

    def calibrate(model):
        for seed in range(samples):
            model(input_ids=torch.from_numpy(tokens(1, 40, seed=seed)))

    with torch.no_grad():
        mtq.quantize(model, config, calibrate)
        if scheme == "fp8" and not exclude:
            share_scales(model)
        # What the exporter does first: one smoothing for layers of one input, folded into the norm before them.
        requantize_resmooth_fused_llm_layers(model)
        for module in model.model.language_model.modules():
            if hasattr(module, "weight_quantizer"):
                module.weight.copy_(module.weight_quantizer(module.weight))
        ids = tokens(1, 24, seed=9)
        logits = model(input_ids=torch.from_numpy(ids)).logits.float().numpy()
        in_fp32 = logits if dtype == "float32" else fp32_logits(model, ids)
    model.config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    export_hf_checkpoint(model, export_dir=folder / "quantized")
    shutil.copy(folder / "plain" / "preprocessor_config.json", folder / "quantized")
    (folder / "quantized" / CALIBRATION).write_text(json.dumps({"head_input_amax": HEAD_INPUT_AMAX}))
    return Quantized(folder / "quantized", ids, logits, in_fp32)


def fp32_logits(model, ids):
    """Logits of a fake-quantized half precision model in fp32: same weights, same scales, no other rounding."""
    upcast = copy.deepcopy(model).float()
    # A cast model keeps the rotary frequencies of the lower precision.
    rotary = upcast.model.language_model.rotary_emb
    rotary.inv_freq = type(rotary)(upcast.config.text_config).inv_freq
    return upcast(input_ids=torch.from_numpy(ids)).logits.numpy()


def session_options():
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def run(path, ids):
    return Decoder(path, options=session_options())(ids, [0])


@pytest.fixture(
    scope="module", params=[(s, d) for s in ("int4-awq", "fp8") for d in ("float32", "bfloat16")], ids="-".join
)
def case(request, tmp_path_factory):
    scheme, dtype = request.param
    folder = tmp_path_factory.mktemp("quantized")
    made = quantized(folder, scheme, dtype=dtype)
    path = write_decoder(Checkpoint(made.folder), folder / "graph", precision=scheme, head="compute")
    check(path)
    return made, path, scheme


def test_graph_equals_the_fake_quantized_forward(case, record_property):
    made, path, scheme = case
    logits = run(path, made.ids)
    error, rounding = relative_error(logits, made.logits_fp32), relative_error(made.logits, made.logits_fp32)
    record_property("error", float(error))
    assert error <= BOUND[scheme]
    # So what separates the graph from modelopt's forward in bf16 is that forward's own rounding.
    assert relative_error(logits, made.logits) <= 1.02 * rounding + BOUND[scheme]


def layers(checkpoint):
    for i in range(checkpoint.text.num_hidden_layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            yield f"language_model.layers.{i}.{name}"
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            yield f"language_model.layers.{i}.{name}"


def stored(folder):
    """Tensors of the quantized folder as safetensors' own reader gives them, under our names."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return {name.replace("model.", "language_model.", 1): tensor for name, tensor in tensors.items()}


def test_values_and_scales_are_those_of_the_checkpoint_bit_by_bit(case):
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8

    made, path, scheme = case
    tensors, graph = stored(made.folder), {t.name: t for t in onnx.load(path).graph.initializer}
    inputs = {node.output[0]: node.input for node in onnx.load(path, load_external_data=False).graph.node}
    products = [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == "MatMul"]
    by_weight = {inputs[node.input[1]][0].rsplit(".", 1)[0]: node for node in products if node.input[1] in inputs}
    for module in layers(Checkpoint(made.folder)):
        weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"].numpy()
        if scheme == "fp8":
            assert (
                graph[f"{module}.weight.float8"].raw_data == weight.view(torch.uint8).T.contiguous().numpy().tobytes()
            )
            rounded = inputs[by_weight[f"{module}.weight"].input[0]]  # values, scale, zero of the DequantizeLinear
            input_scale = tensors[f"{module}.input_scale"].numpy()
            for name in (rounded[1], inputs[rounded[0]][1]):
                assert onnx.numpy_helper.to_array(graph[name]).tobytes() == input_scale.tobytes()
        else:
            values = onnx.numpy_helper.to_array(graph[f"{module}.weight.int4"]).astype(np.int8).T
            packed = pack_int4_in_uint8(torch.from_numpy(values.copy()), torch.ones(scale.shape), 128)
            torch.testing.assert_close(packed, weight, rtol=0, atol=0)
            assert values.min() < -6 and values.max() == 7
        assert onnx.numpy_helper.to_array(graph[f"{module}.weight.scale"]).T.tobytes() == scale.tobytes()


def test_int4_kernels_of_the_bundle_stay_near(case, tmp_path):
    """`MatMulNBits` with inputs in int8; the smoothing of o_proj and down_proj stays before it."""
    made, path, scheme = case
    compile_decoder(path, tmp_path / "decoder.onnx")
    nodes = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph.node
    kinds = Counter(node.op_type for node in nodes)
    if scheme == "fp8":  # stays as it is: rounded, multiplied
        assert kinds["MatMulNBits"] == 0 and kinds["QuantizeLinear"] == 4 * 3  # layers of one input share its rounding
        np.testing.assert_allclose(run(tmp_path / "decoder.onnx", made.ids), run(path, made.ids), atol=1e-4)
        return
    smoothed = {node.output[0] for node in nodes if node.op_type == "Mul" and "pre_quant_scale" in node.input[1]}
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(products) == 4 * 3  # query, key and value in one, gate and up in one
    assert sum(node.input[0] in smoothed for node in products) == 2 * 3
    logits = run(tmp_path / "decoder.onnx", made.ids)
    assert relative_error(logits, made.logits_fp32) < 0.1
    assert (logits * made.logits_fp32).sum() / np.linalg.norm(logits) / np.linalg.norm(made.logits_fp32) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4-awq", "fp8"])
def test_a_layer_of_the_real_shape_equals_the_fake_quantized_forward(tmp_path, scheme, record_property):
    shape = {"layers": 1, "hidden": 2048, "heads": 16, "intermediate": 11008, "samples": 1}
    made = quantized(tmp_path, scheme, dtype="bfloat16", **shape)
    path = write_decoder(Checkpoint(made.folder), tmp_path / "graph", precision=scheme, head="compute")
    error = relative_error(run(path, made.ids), made.logits_fp32)
    record_property("error", float(error))
    assert error <= BOUND[scheme]


def test_group_that_128_does_not_divide(tmp_path):
    made = quantized(tmp_path, "int4-awq", group=64, hidden=64, layers=1)
    assert Checkpoint(made.folder).quantization.group_size == 64
    path = write_decoder(Checkpoint(made.folder), tmp_path / "graph", precision="int4-awq", head="compute")
    assert relative_error(run(path, made.ids), made.logits_fp32) <= BOUND["int4-awq"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """float8 with one projection left alone, an untied head, and scales for a KV cache in float8."""
    folder = tmp_path_factory.mktemp("mixed")
    return quantized(folder, "fp8", exclude=["layers.1.mlp.down_proj"], kv_fp8=True, tied=False, layers=2)


def test_excluded_modules_keep_their_weights(mixed, tmp_path):
    checkpoint = Checkpoint(mixed.folder)
    assert any("down_proj" in pattern for pattern in checkpoint.quantization.exclude)
    path = write_decoder(checkpoint, tmp_path, precision="fp8")
    kinds = {t.name: t.data_type for t in onnx.load(path, load_external_data=False).graph.initializer}
    assert kinds["language_model.layers.1.mlp.down_proj.weight"] == onnx.TensorProto.FLOAT
    assert kinds["language_model.layers.0.mlp.down_proj.weight.float8"] == onnx.TensorProto.FLOAT8E4M3FN
    run(path, mixed.ids)


def test_kv_scales_are_carried(mixed):
    checkpoint, tensors = Checkpoint(mixed.folder), stored(mixed.folder)
    assert checkpoint.quantization.kv == "fp8"
    assert checkpoint.kv_scales() == [
        {
            "key": tensors[f"language_model.layers.{i}.self_attn.k_proj.k_scale"].item(),
            "value": tensors[f"language_model.layers.{i}.self_attn.v_proj.v_scale"].item(),
        }
        for i in range(2)
    ]


def fake_float8(x, scale):
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def test_head_in_float8(tmp_path):
    """Rounded here: weight by its largest value, input by the range that calibration.json holds."""
    made = quantized(tmp_path, "fp8", layers=1)
    checkpoint = Checkpoint(made.folder)
    graphs = {
        head: write_decoder(checkpoint, tmp_path / head, precision="fp8", head=head)
        for head in ("compute", "fp8", "int4")
    }
    for path in graphs.values():
        check(path)
    model = onnx.load(graphs["compute"])
    norm = next(node.output[0] for node in reversed(model.graph.node) if node.op_type == "RMSNormalization")
    model.graph.output.append(onnx.helper.make_tensor_value_info(norm, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "hidden.onnx")
    decoder = Decoder(tmp_path / "hidden.onnx", options=session_options())
    feeds = decoder_feeds(decoder, made.ids)
    hidden = torch.from_numpy(decoder.session.run([norm], feeds)[0])
    table = torch.from_numpy(np.array(checkpoint.array("language_model.embed_tokens.weight")))
    expected = fake_float8(hidden, HEAD_INPUT_AMAX / 448) @ fake_float8(table, table.abs().max() / 448).T
    assert relative_error(run(graphs["fp8"], made.ids), expected.numpy()) <= 1e-3


def decoder_feeds(decoder, ids):
    new = ids.shape[1]
    return {
        "input_ids": ids,
        "image_index": np.full(ids.shape, -1),
        "image_embeddings": np.zeros((1, decoder.hidden), np.float32),
        "position_ids": np.ascontiguousarray(np.broadcast_to(np.arange(new), (3, 1, new))),
        "write_index": np.zeros(1, np.int64),
        "logits_index": np.arange(new)[None],
        **decoder.cache,
    }


@pytest.mark.parametrize("scheme, head", [("fp8", "compute"), ("fp8", "fp8"), ("int4-awq", "int4")])
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_half_precision_graphs_are_sound(tmp_path, small, scheme, head, compute):
    """Strict types and shapes; ONNX Runtime has no CPU kernels to run them."""
    path = write_decoder(Checkpoint(small[scheme]), tmp_path, precision=scheme, compute=compute, head=head)
    check(path)
    kinds = {t.name: t.data_type for t in onnx.load(path, load_external_data=False).graph.initializer}
    scales = {kind for name, kind in kinds.items() if name.endswith("_proj.weight.scale")}
    half = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}[compute]
    assert scales == {onnx.TensorProto.FLOAT if scheme == "fp8" else half}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folders = {scheme: tmp_path_factory.mktemp(scheme) for scheme in ("fp8", "int4-awq")}
    return {scheme: quantized(folder, scheme, layers=1, samples=1).folder for scheme, folder in folders.items()}


def edit(folder, name, **changes):
    data = json.loads((folder / name).read_text())
    part = data["quantization"] if name == "hf_quant_config.json" else data
    part.update(changes)
    (folder / name).write_text(json.dumps(data))


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "scheme, damage, message",
    [
        ("fp8", lambda f: edit(f, "hf_quant_config.json", quant_algo="NVFP4"), "quant_algo 'NVFP4'"),
        ("fp8", lambda f: edit(f, "hf_quant_config.json", kv_cache_quant_algo="NVFP4"), "kv_cache_quant_algo 'NVFP4'"),
        ("fp8", lambda f: edit(f, "hf_quant_config.json", kv_cache_quant_algo="FP8"), "no tensor .*k_scale"),
        ("fp8", lambda f: edit(f, "hf_quant_config.json", exclude_modules=["*q_proj"]), "q_proj.weight .*F8_E4M3"),
        ("fp8", lambda f: rewrite(f, lambda t: t.pop(f"{Q}.input_scale")), "no tensor .*q_proj.input_scale"),
        ("fp8", lambda f: rewrite(f, lambda t: t.update({f"{Q}.weight_scale": torch.ones(128)})), r"shape \[128\]"),
        ("fp8", lambda f: rewrite(f, lambda t: t[f"{Q}.weight_scale"].fill_(0)), "not positive"),
        ("fp8", lambda f: rewrite(f, lambda t: t[f"{Q}.input_scale"].fill_(float("nan"))), "not positive"),
        ("fp8", lambda f: (f / "hf_quant_config.json").unlink(), "has no hf_quant_config.json"),
        ("int4-awq", lambda f: edit(f, "hf_quant_config.json", has_zero_point=True), "zero points"),
        ("int4-awq", lambda f: edit(f, "hf_quant_config.json", group_size=100), "group_size 100"),
        ("int4-awq", lambda f: edit(f, "hf_quant_config.json", group_size=64), "weight_scale .*shape"),
        ("int4-awq", lambda f: edit(f, "hf_quant_config.json", exclude_modules=[]), None),
        ("int4-awq", lambda f: rewrite(f, lambda t: t.pop(f"{Q}.weight_scale")), "no tensor .*q_proj.weight_scale"),
    ],
)
def test_what_is_damaged_or_not_supported_is_refused(small, tmp_path, scheme, damage, message):
    folder = shutil.copytree(small[scheme], tmp_path / "checkpoint")
    damage(folder)
    if message is None:  # what is never quantized needs no pattern
        write_decoder(Checkpoint(folder), tmp_path, precision=scheme)
        return
    with pytest.raises(UnsupportedCheckpoint, match=message):
        write_decoder(Checkpoint(folder), tmp_path, precision=scheme)


@pytest.mark.parametrize("precision", ["fp32", "int4", "int4-awq"])
def test_another_precision_than_the_checkpoint_holds_is_refused(small, tmp_path, precision):
    with pytest.raises(InvalidRequest, match="holds fp8"):
        write_decoder(Checkpoint(small["fp8"]), tmp_path, precision=precision)


def test_a_float8_head_needs_its_calibrated_range(small, tmp_path):
    folder = shutil.copytree(small["fp8"], tmp_path / "checkpoint")
    (folder / CALIBRATION).unlink()
    with pytest.raises(UnsupportedCheckpoint, match="head_input_amax"):
        write_decoder(Checkpoint(folder), tmp_path, precision="fp8", head="fp8")
    random_checkpoint(tmp_path / "plain", layers=1)
    with pytest.raises(UnsupportedCheckpoint, match="head_input_amax"):
        write_decoder(Checkpoint(tmp_path / "plain"), tmp_path, precision="int4", head="fp8")


def test_a_plain_checkpoint_is_not_quantized_by_a_name(tmp_path):
    random_checkpoint(tmp_path / "plain", layers=1)
    with pytest.raises(InvalidRequest, match=r"holds plain weights.*cxr-triton quantize"):
        write_decoder(Checkpoint(tmp_path / "plain"), tmp_path, precision="fp8")
