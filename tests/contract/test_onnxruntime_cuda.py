"""The CUDA provider's graphs and sessions on ONNX Runtime's CPU, against those of the CPU engine on the same export.

What only a GPU shows (kernels of bf16, captured steps) is measured in docs/gpu-results.md.
"""

import dataclasses
import shutil
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
from bundles import TOKEN_BUDGET, WINDOW_BUDGET, write_export
from checkpoints import random_checkpoint

from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.onnxruntime_cuda import session as onnxruntime_cuda_session
from cxr_triton.engines.onnxruntime_cuda.compiler import MLP_MULTIPLE, compile_graph
from cxr_triton.engines.onnxruntime_cuda.session import BATCHES, CudaDecoder, CudaVision, Host
from cxr_triton.engines.recipe import load_recipe
from cxr_triton.engines.runtime.sampler import Sampler, TopLogits
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.errors import BuildFailed, DeviceUnavailable, InvalidRecipe, InvalidRequest
from cxr_triton.pixels import image
from cxr_triton.sampling import Sampling

GRIDS = [(196, 168), (28, 28), (56, 336), (224, 224), (84, 28)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    random_checkpoint(folder / "checkpoint", tied=False)
    return folder / "checkpoint"


@pytest.fixture(scope="module", params=["fp32", "int4"])
def pair(request, checkpoint, tmp_path_factory):
    """The CPU engine's bundle of an export, the same with the GPU's graphs, and their precision."""
    folder = tmp_path_factory.mktemp(request.param)
    export = write_export(folder / "export", checkpoint, precision=request.param)
    plain = build_bundle(export, folder / "plain")
    shutil.copytree(plain.path, folder / "cuda")
    for graph in ("vision", "decoder"):
        compile_graph(export / f"{graph}.onnx", folder / "cuda", plain.geometry.max_sequence)
    return plain, dataclasses.replace(plain, path=folder / "cuda"), request.param


def sessions(pair, slots):
    return pair[0].open_decoder(slots=slots, threads=1), CudaDecoder(pair[1], slots=slots, memory=Host())


def distance(expected, found):
    return np.abs(expected - found).max() / np.abs(expected).max()


def limit(pair):
    # int4: the CPU engine rounds activations to int8 by blocks, the GPU's graph does not.
    return 1e-4 if pair[2] == "fp32" else 0.06


def fill(decoder, counts, seed=0):
    """Prompts in pieces, with an image whose tokens have places of their own; the last logits of each."""
    rng, found = np.random.default_rng(seed), []
    embeddings = rng.standard_normal((12, decoder.hidden)).astype(np.float32)
    for slot, count in enumerate(counts):
        ids, index, positions = rng.integers(0, 256, count), np.full(count, -1), np.tile(np.arange(count), (3, 1))
        index[1:7] = np.arange(6)
        positions[:, 1:7] = 1 + np.stack([np.zeros(6, int), np.arange(6) // 3, np.arange(6) % 3])
        for piece in (slice(0, 5), slice(5, count)):
            logits = decoder.prefill(
                slot, ids[piece], index[piece], embeddings, positions[:, piece], is_last=piece.stop == count
            )
        found.append(logits.copy())
    return found


def test_image_embeddings_are_those_of_the_cpu(pair):
    rng = np.random.default_rng(0)
    inputs = [
        image.windows(
            rng.integers(0, 256, (*size, 3), np.uint8), window_budget=WINDOW_BUDGET, token_budget=TOKEN_BUDGET
        )
        for size in GRIDS
    ]
    expected = pair[0].open_vision(threads=1).encode(**image.stack(inputs))
    found = CudaVision(pair[1], memory=Host()).encode(**image.stack(inputs))
    for each, ours, theirs in zip(inputs, expected, found, strict=True):
        assert distance(ours[: each.tokens], theirs[: each.tokens]) < 1e-4


def test_logits_are_those_of_the_cpu_with_slots_in_use_moved_and_freed(pair):
    results = []
    for decoder in sessions(pair, 6):
        found = fill(decoder, (70, 9, 130, 33, 11, 50))
        for rows in (5, 1, 3, 6):  # five run as six: what the sixth row writes then is not seen in its own step
            found += [row.copy() for row in decoder.step(np.arange(rows) + 20, decoder.lengths[:rows].copy())]
        decoder.move(5, 0)
        decoder.free(5)
        found += [row.copy() for row in decoder.step(np.array([5, 6]), decoder.lengths[:2].copy())]
        results.append((found, decoder.lengths[:6].copy()))
    (expected, lengths), (found, its_lengths) = results
    np.testing.assert_array_equal(its_lengths, lengths)
    for ours, theirs in zip(expected, found, strict=True):
        assert distance(ours, theirs) < limit(pair)


def test_a_longer_prompt_does_not_move_what_a_captured_step_reads(pair):
    _, decoder = sessions(pair, 2)
    fill(decoder, (9,))
    decoder.step(np.array([3]), np.array([9]))
    before = decoder._feeds[1, 1].pointer
    decoder.free(0)
    fill(decoder, (900,))
    decoder.step(np.array([3]), np.array([900]))
    assert decoder._feeds[1, 1].pointer == before


def test_the_best_logits_of_a_step_are_those_of_its_rows(pair):
    _, decoder = sessions(pair, 3)
    fill(decoder, (70, 9, 33))
    top = decoder.step_top(np.array([1, 2, 3]), decoder.lengths[:3].copy())
    for row in top:
        logits, size = row.all().copy(), row.logits.shape[1]
        padded = np.full(-(-decoder.vocab // size) * size, -np.inf, np.float32)
        padded[: decoder.vocab] = logits
        np.testing.assert_array_equal(row.logits, padded.reshape(-1, size)[row.blocks])
        largest = padded.reshape(-1, size).max(1)
        assert set(row.blocks) == set(np.argsort(largest)[::-1][: len(row.blocks)])
        others = np.delete(padded.reshape(-1, size), row.blocks, axis=0)
        assert others.size == 0 or others.max() <= row.bound


@pytest.mark.parametrize("penalty", [1.0, 1.05, 1.8, 0.9])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_token_is_the_same_from_the_best_logits_as_from_all(penalty, temperature):
    rng, size, count = np.random.default_rng(4), 16, 4
    samplers = [
        Sampler(
            Sampling(max_new_tokens=9, temperature=temperature, top_p=0.9, repetition_penalty=penalty, seed=5),
            np.arange(40),
        )
        for _ in range(2)
    ]
    whole = 0
    for step in range(300):
        logits = rng.standard_normal(320).astype(np.float32) * (1 + step % 5) - (step % 3)
        if step % 7 == 0:  # ties, in one block and across blocks
            logits[rng.integers(0, 320, 3)] = logits.max()
        blocks = logits.reshape(-1, size)
        best = np.argsort(-blocks.max(1), kind="stable")[:count]

        def everything(row=logits):
            nonlocal whole
            whole += 1
            return row.copy()

        top = TopLogits(blocks=best, logits=blocks[best], bound=float(blocks[best[-1]].max()), all=everything)
        expected = logits.copy()
        assert samplers[0].sample(top) == samplers[1].sample(expected)
    if temperature == 0 and penalty == 1:
        assert whole < 60  # only where so many tie that the best is no larger than the bound
    if temperature or penalty < 1:
        assert whole == 300


def test_a_generation_is_that_of_the_cpu(pair):
    """Through the runtime, which takes the best logits only."""
    texts = []
    for session in sessions(pair, 2):
        ids = np.random.default_rng(7).integers(0, 256, 40)
        generation = Generation(
            input_ids=ids,
            position_ids=np.tile(np.arange(40), (3, 1)),
            image_index=np.full(40, -1),
            image_embeddings=np.zeros((0, session.hidden), np.float32),
            sampling=Sampling(max_new_tokens=8, repetition_penalty=1.05),
        )
        done, chunks = threading.Event(), []

        def take(chunk, chunks=chunks, done=done):
            chunks.append(chunk)
            if chunk.completion or chunk.error:
                done.set()

        with DecoderRuntime(pair[0], session=session) as runtime:
            runtime.submit(generation, take)
            assert done.wait(60)
        assert chunks[-1].completion.usage["completion_tokens"] == 8
        texts.append(np.concatenate([chunk.token_ids for chunk in chunks]))
    if pair[2] == "fp32":  # int4 rounds otherwise on a CPU, where a tie may fall to either side
        np.testing.assert_array_equal(*texts)


def test_cache_rows_that_are_read_and_written_elsewhere_are_those_that_were_computed(pair):
    ids, results = np.random.default_rng(8).integers(0, 256, 40), []
    for each in sessions(pair, 3):
        none = np.zeros((0, each.hidden), np.float32)
        each.prefill(2, ids, np.full(40, -1), none, np.tile(np.arange(40), (3, 1)), is_last=True)
        rows = [each.read_cache(2, start, stop) for start, stop in ((0, 32), (32, 40))]
        for slot in (0, 1):
            each.write_cache(slot, 0, rows[0])
            each.write_cache(slot, 32, rows[1])
        logits = each.step(np.full(3, 5), np.full(3, 40))
        for row in logits[:2]:
            assert distance(logits[2], row) < 1e-5
        results.append(np.concatenate(rows, axis=2))
    assert distance(*results) < limit(pair)


def test_a_layer_is_few_nodes_and_no_weight_is_stored_twice(pair):
    model = onnx.load(pair[1].path / "decoder.onnx", load_external_data=False).graph
    layers = pair[1].geometry.layers
    assert len(model.node) <= 11 * layers + 32
    kinds = [node.op_type for node in model.node]
    assert kinds.count("GroupQueryAttention") == layers
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2 * layers
    ours, theirs = ((each.path / "decoder.onnx.data").stat().st_size for each in pair[:2])
    assert ours < 1.2 * theirs
    tower = onnx.load(pair[1].path / "vision.onnx", load_external_data=False).graph
    operators = {node.op_type for node in tower.node}
    assert {"RotaryEmbedding", "SimplifiedLayerNormalization", "QuickGelu"} <= operators
    assert not {"Pow", "ReduceMean", "Sigmoid"} & operators
    sizes = {t.name: list(t.dims) for t in tower.initializer if ".mlp." in t.name and "merger" not in t.name}
    assert all(max(d for d in dims) % MLP_MULTIPLE == 0 for dims in sizes.values() if len(dims) == 2)


def bf16_bundle(checkpoint, folder, precision="bf16"):
    compute = None if precision == "bf16" else "bf16"
    export = write_export(folder / "export", checkpoint, precision=precision, compute=compute)
    recipe = load_recipe("h100-int4-ort")
    head = "compute" if precision == "bf16" else "int4"
    decoder = dataclasses.replace(recipe.decoder, precision=precision, head=head)
    return build_bundle(export, folder / "bundle", recipe=dataclasses.replace(recipe, decoder=decoder, thresholds={}))


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_graphs_in_bf16_are_well_typed_and_stop_at_the_first_missing_kernel_of_a_cpu(checkpoint, tmp_path, precision):
    """ONNX Runtime infers every type before it looks for kernels."""
    bundle = bf16_bundle(checkpoint, tmp_path, precision)
    assert (bundle.engine, bundle.vision_engine) == ("onnxruntime-cuda", "onnxruntime-cuda")
    assert Bundle.open(bundle.path).digest == bundle.digest
    for graph in ("vision", "decoder"):
        with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
            onnxruntime.InferenceSession(str(bundle.path / f"{graph}.onnx"), providers=["CPUExecutionProvider"])


def test_without_a_gpu_the_error_says_what_is_missing(checkpoint, tmp_path, monkeypatch):
    bundle = bf16_bundle(checkpoint, tmp_path)
    with pytest.raises(DeviceUnavailable, match="GPU"):
        bundle.open_vision()
    with pytest.raises(DeviceUnavailable, match="GPU"):
        bundle.open_decoder(slots=1)
    with pytest.raises(InvalidRequest, match="onnxruntime-cuda has none"):
        bundle.open_decoder(slots=1, batch_invariant=True)

    class Gpu(Host):
        kind = "cuda"

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailable, match=r"no CUDA provider.*\[cuda\]"):
        onnxruntime_cuda_session.open_graph(bundle.path / "vision.onnx", Gpu())


def test_more_slots_than_it_captures_are_refused(pair):
    with pytest.raises(InvalidRequest, match=str(BATCHES[-1])):
        CudaDecoder(pair[1], slots=BATCHES[-1] + 1, memory=Host())


def test_fp8_is_refused_before_and_after_the_export(tmp_path):
    recipe = load_recipe("h100-int4-ort")
    with pytest.raises(InvalidRecipe, match="fp8 on onnxruntime-cuda"):
        dataclasses.replace(recipe, decoder=dataclasses.replace(recipe.decoder, precision="fp8"))
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("RMSNormalization", ["x", "w"], ["y"], epsilon=1e-6)],
        "decoder",
        [
            helper.make_tensor_value_info("image_embeddings", TensorProto.FLOAT, ["N", 64]),
            helper.make_tensor_value_info("past_key.0", TensorProto.FLOAT, ["B", 2, 8, 16]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "P", 32])],
        [helper.make_tensor("language_model.embed_tokens.weight", TensorProto.FLOAT, [32, 64], np.zeros(2048))],
    )
    onnx.save(helper.make_model(graph), tmp_path / "decoder.onnx")
    (tmp_path / "decoder.onnx.data").write_bytes(b"\0" * 16)
    with pytest.raises(BuildFailed, match="another precision"):
        compile_graph(tmp_path / "decoder.onnx", tmp_path, 8)
