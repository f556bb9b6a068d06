"""`decoder.onnx` in ONNX Runtime against transformers, with the same random weights."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from checkpoints import IMAGE_TOKEN, VISION_END, VISION_START, empty_cache, random_checkpoint

from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.decoder import write_decoder
from cxr_triton.export.graph import check

RELATIVE = 1e-4  # of the largest logit
CAPACITY = 48


class Decoder:
    """A session over `slots` rows of cache, past and present bound to the same memory."""

    def __init__(self, path, slots=1, options=None):
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        shapes = {i.name: i for i in self.session.get_inputs()}
        _, kv_heads, _, head_dim = shapes["past_key.0"].shape
        self.hidden = shapes["image_embeddings"].shape[1]
        self.dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[shapes["past_key.0"].type]
        layers = sum(name.startswith("past_key") for name in shapes)
        self.cache = empty_cache(slots, CAPACITY, layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=self.dtype)

    def __call__(self, ids, write_index, *, slots=slice(None), positions=None, images=None, image_index=None):
        """Logits [B, S, vocab] of every new token."""
        ids, write_index = np.asarray(ids), np.asarray(write_index)
        batch, new = ids.shape
        if positions is None:
            positions = np.broadcast_to(write_index[:, None] + np.arange(new), (3, batch, new))
        binding = self.session.io_binding()
        feeds = {
            "input_ids": ids,
            "image_index": np.full((batch, new), -1) if image_index is None else image_index,
            "image_embeddings": np.zeros((1, self.hidden), self.dtype) if images is None else images,
            "position_ids": positions,
            "write_index": write_index,
            "logits_index": np.broadcast_to(np.arange(new), (batch, new)),
        }
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, rows in self.cache.items():
            value = ort.OrtValue.ortvalue_from_numpy(rows[slots])
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past", "present"), value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[-1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    return folder, random_checkpoint(folder / "checkpoint")


@pytest.fixture(scope="module")
def graph(reference):
    folder, _ = reference
    path = write_decoder(Checkpoint(folder / "checkpoint"), folder / "fp32")
    check(path)
    return path


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(np.asarray(ids)), **inputs).logits.float().numpy()


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 300, shape)


def test_prefill_equals_transformers(reference, graph):
    ids = tokens(2, 20)
    assert relative_error(Decoder(graph, 2)(ids, [0, 0]), logits_of(reference[1], ids)) <= RELATIVE


def test_token_by_token_equals_transformers(reference, graph):
    ids, decoder = tokens(1, 16, seed=1), Decoder(graph)
    steps = [decoder(ids[:, i : i + 1], [i]) for i in range(16)]
    assert relative_error(np.concatenate(steps, 1), logits_of(reference[1], ids)) <= RELATIVE


def test_chunked_prefill_equals_whole_prefill(graph):
    ids, decoder = tokens(1, 23, seed=2), Decoder(graph)
    whole = Decoder(graph)(ids, [0])
    chunks = [decoder(ids[:, start:end], [start]) for start, end in ((0, 9), (9, 10), (10, 23))]
    assert relative_error(np.concatenate(chunks, 1), whole) <= 1e-5


def test_sequences_of_different_lengths_decode_in_one_step(reference, graph):
    lengths, decoder = [3, 17, 9], Decoder(graph, 3)
    prompts = [tokens(1, length, seed=length) for length in lengths]
    for slot, prompt in enumerate(prompts):
        decoder(prompt, [0], slots=slice(slot, slot + 1))
    new = tokens(3, 4, seed=5)
    logits = np.concatenate([decoder(new[:, i : i + 1], np.add(lengths, i)) for i in range(4)], 1)
    for slot, prompt in enumerate(prompts):
        expected = logits_of(reference[1], np.concatenate([prompt, new[slot : slot + 1]], 1))[:, -4:]
        assert relative_error(logits[slot : slot + 1], expected) <= RELATIVE


def test_what_lies_behind_a_sequence_is_never_seen(graph):
    ids, clean, dirty = tokens(1, 8, seed=3), Decoder(graph), Decoder(graph)
    for rows in dirty.cache.values():
        rows[...] = 7
    np.testing.assert_array_equal(clean(ids, [0]), dirty(ids, [0]))


def test_cache_is_written_in_place_and_nowhere_else(graph):
    decoder = Decoder(graph, 3)
    for rows in decoder.cache.values():
        rows[...] = 7
    decoder(tokens(1, 5), [6], slots=slice(1, 2))
    for rows in decoder.cache.values():
        assert (rows[[0, 2]] == 7).all() and (rows[1, :, :6] == 7).all() and (rows[1, :, 11:] == 7).all()
        assert not (rows[1, :, 6:11] == 7).any()


def test_logits_index_chooses_positions_for_each_sequence(graph):
    ids, decoder = tokens(2, 10, seed=4), Decoder(graph, 2)
    every = decoder(ids, [0, 0])
    feeds = {
        "input_ids": ids,
        "image_index": np.full((2, 10), -1),
        "image_embeddings": np.zeros((1, decoder.hidden), np.float32),
        "position_ids": np.ascontiguousarray(np.broadcast_to(np.arange(10), (3, 2, 10))),
        "write_index": np.zeros(2, np.int64),
        "logits_index": np.array([[9, 0], [4, 5]]),
    }
    (chosen,) = decoder.session.run(["logits"], feeds | Decoder(graph, 2).cache)
    np.testing.assert_allclose(chosen, np.stack([every[0, [9, 0]], every[1, [4, 5]]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [100, 7])
def test_images_in_the_prompt_equal_transformers(reference, graph, chunk):
    _, model = reference
    grids = torch.tensor([[1, 4, 6], [1, 8, 2]])  # patches; 6 and 4 tokens
    pixels = torch.randn(4 * 6 + 8 * 2, 1176, generator=torch.Generator().manual_seed(0))
    images = [[VISION_START, *[IMAGE_TOKEN] * count, VISION_END] for count in (6, 4)]
    ids = np.array([[5, *images[0], 17, 18, *images[1], 40, 41]])
    is_image = torch.as_tensor(ids == IMAGE_TOKEN).int()
    inputs = {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": is_image}
    expected = logits_of(model, ids, **inputs)
    with torch.no_grad():
        embeddings = model.model.visual(pixels, grids).pooler_output.numpy()
        positions, _ = model.model.get_rope_index(torch.as_tensor(ids), is_image, image_grid_thw=grids)
    # Rows of the embeddings in another order than the prompt's, so that the index is what decides.
    order = np.random.default_rng(0).permutation(10)
    index = np.full(ids.shape, -1)
    index[ids == IMAGE_TOKEN] = np.argsort(order)
    decoder = Decoder(graph)
    logits = [
        decoder(
            ids[:, start : start + chunk],
            [start],
            positions=positions.numpy()[:, :, start : start + chunk],
            images=embeddings[order],
            image_index=index[:, start : start + chunk],
        )
        for start in range(0, ids.shape[1], chunk)
    ]
    assert relative_error(np.concatenate(logits, 1), expected) <= RELATIVE


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fp32_graph_of_half_precision_weights_is_exact(tmp_path, dtype, tied):
    from transformers import Qwen2_5_VLForConditionalGeneration

    random_checkpoint(tmp_path / "checkpoint", dtype=dtype, tied=tied, layers=1)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).eval()
    path = write_decoder(Checkpoint(tmp_path / "checkpoint"), tmp_path)
    ids = tokens(1, 12)
    assert relative_error(Decoder(path)(ids, [0]), logits_of(model, ids)) <= RELATIVE


def quantize_by_blocks(weight, scale_dtype):
    """Symmetric int4, round to nearest, one scale a block of input features: what the graph should hold."""
    blocks = weight.float().unflatten(1, (-1, 128 if weight.shape[1] % 128 == 0 else 32))
    scale = (blocks.abs().amax(-1, keepdim=True) / 7).to(scale_dtype).float()
    return ((blocks / scale).round().clamp(-8, 7) * scale).flatten(1)


def quantized(folder, head, scale_dtype=torch.float32):
    """The checkpoint in transformers with every decoder projection replaced by its dequantized int4 weights."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.model.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = quantize_by_blocks(module.weight, scale_dtype)
    if head == "int4":  # its own tensor: the embedding stays as it is
        model.lm_head.weight = torch.nn.Parameter(quantize_by_blocks(model.lm_head.weight, scale_dtype))
    return model


@pytest.fixture(scope="module", params=[(128, "int4"), (128, "compute"), (64, "int4")], ids=str)
def int4(request, tmp_path_factory):
    """Graph and dequantized reference; hidden 64 takes blocks of 32, and an odd vocabulary splits bytes over rows."""
    (hidden, head), folder = request.param, tmp_path_factory.mktemp("int4")
    vocab = 320 if hidden == 128 else 319
    random_checkpoint(folder / "checkpoint", dtype="bfloat16", hidden=hidden, vocab=vocab)
    path = write_decoder(Checkpoint(folder / "checkpoint"), folder, precision="int4", head=head)
    check(path)
    return path, quantized(folder / "checkpoint", head), head


def options(level, accuracy="0"):
    chosen = ort.SessionOptions()
    chosen.graph_optimization_level = level
    chosen.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy)
    return chosen


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_int4_graph_equals_its_dequantized_weights(int4, level):
    path, model, _ = int4
    ids = tokens(1, 20)
    decoder = Decoder(path, options=options(getattr(ort.GraphOptimizationLevel, level)))
    assert relative_error(decoder(ids, [0]), logits_of(model, ids)) <= RELATIVE


def test_int4_with_int8_products_stays_near_its_dequantized_weights(int4):
    path, model, _ = int4
    ids = tokens(1, 20)
    actual = Decoder(path, options=options(ort.GraphOptimizationLevel.ORT_ENABLE_ALL, "4"))(ids, [0])
    expected = logits_of(model, ids)
    assert relative_error(actual, expected) < 0.05
    assert (actual * expected).sum() / np.linalg.norm(actual) / np.linalg.norm(expected) > 0.999


def test_onnx_runtime_fuses_every_int4_layer(int4, tmp_path):
    path, model, head = int4
    chosen = options(ort.GraphOptimizationLevel.ORT_ENABLE_ALL, "4")
    chosen.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(path), chosen, providers=["CPUExecutionProvider"])
    nodes = onnx.load(chosen.optimized_model_filepath, load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    layers = model.config.text_config.num_hidden_layers
    assert kinds.count("MatMulNBits") == 7 * layers + (head == "int4")
    assert not {"DequantizeLinear", "MatMul"} & set(kinds)


def test_a_tied_head_shares_the_table(reference, tmp_path):
    sizes = {}
    for head in ("compute", "int4"):
        path = write_decoder(Checkpoint(reference[0] / "checkpoint"), tmp_path / head, precision="int4", head=head)
        model = onnx.load(path, load_external_data=False)
        sizes[head] = {t.name: list(t.dims) for t in model.graph.initializer if 320 in t.dims}
    assert sizes["compute"] == {"language_model.embed_tokens.weight": [320, 128]}
    assert sizes["int4"] == {
        "language_model.embed_tokens.weight": [320, 128],
        "lm_head.weight.int4": [128, 320],
        "lm_head.weight.scale": [1, 320],
    }


def test_an_int4_graph_keeps_the_bytes_of_the_embedding(tmp_path):
    model = random_checkpoint(tmp_path / "checkpoint", dtype="bfloat16", layers=1)
    path = write_decoder(Checkpoint(tmp_path / "checkpoint"), tmp_path, precision="int4")
    (table,) = (t for t in onnx.load(path).graph.initializer if t.name == "language_model.embed_tokens.weight")
    assert table.data_type == onnx.TensorProto.BFLOAT16
    assert table.raw_data == model.model.language_model.embed_tokens.weight.detach().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("precision, compute", [("fp32", 1), ("fp16", 10), ("bf16", 16), ("int4", 1)])
def test_contract_and_standard_operators(reference, tmp_path, precision, compute):
    path = write_decoder(Checkpoint(reference[0] / "checkpoint"), tmp_path, precision=precision)
    check(path)
    model = onnx.load(path, load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}

    def described(values):
        return {
            v.name: (
                v.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        }

    int64, cache = onnx.TensorProto.INT64, (compute, ["B", 2, "max_seq", 32])
    parts = [f"{part}.{i}" for i in range(3) for part in ("key", "value")]
    assert described(model.graph.input) == {
        "input_ids": (int64, ["B", "S"]),
        "image_index": (int64, ["B", "S"]),
        "image_embeddings": (compute, ["N", 128]),
        "position_ids": (int64, [3, "B", "S"]),
        "write_index": (int64, ["B"]),
        "logits_index": (int64, ["B", "P"]),
        **{f"past_{part}": cache for part in parts},
    }
    assert described(model.graph.output) == {
        "logits": (onnx.TensorProto.FLOAT, ["B", "P", 320]),
        **{f"present_{part}": cache for part in parts},
    }


def test_fp16_in_onnx_runtime(reference, tmp_path):
    path = write_decoder(Checkpoint(reference[0] / "checkpoint"), tmp_path, precision="fp16")
    ids, decoder = tokens(1, 20), Decoder(path)
    logits = np.concatenate([decoder(ids[:, :15], [0]), decoder(ids[:, 15:], [15])], 1)
    assert relative_error(logits, logits_of(reference[1], ids)) < 5e-3


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_bf16_by_the_reference_evaluator(reference, tmp_path, precision):
    # ONNX Runtime has no bf16 kernels on a CPU; ONNX's own evaluator computes every operator in the graph's types.
    import ml_dtypes
    from onnx.reference import ReferenceEvaluator

    folder, model = reference
    path = write_decoder(Checkpoint(folder / "checkpoint"), tmp_path, precision=precision, compute="bf16")
    ids = tokens(1, 9)
    feeds = {
        "input_ids": ids,
        "image_index": np.full((1, 9), -1),
        "image_embeddings": np.zeros((1, 128), ml_dtypes.bfloat16),
        "position_ids": np.ascontiguousarray(np.broadcast_to(np.arange(9), (3, 1, 9))),
        "write_index": np.zeros(1, np.int64),
        "logits_index": np.arange(9)[None],
        **empty_cache(1, 12, layers=3, kv_heads=2, head_dim=32, dtype=ml_dtypes.bfloat16),
    }
    logits = ReferenceEvaluator(str(path)).run(["logits"], feeds)[0]
    if precision == "int4":
        model = quantized(folder / "checkpoint", "int4", torch.bfloat16)
    assert relative_error(logits, logits_of(model, ids)) < 5e-2
