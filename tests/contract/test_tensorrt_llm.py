"""TensorRT-LLM checkpoints and requests, read back by an independent reader of the format, against transformers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import END, IMAGE_TOKEN, VISION_END, VISION_START, random_checkpoint
from tensorrt_llm_reader import Decoder

from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.tensorrt_llm.request import EngineConfig, extra_ids, request_tensors, stop_tensors
from cxr_triton.errors import InvalidBundle, InvalidRequest, PromptTooLong
from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.tensorrt_llm import write_tensorrt_llm
from cxr_triton.sampling import Sampling

NEW_TOKENS = 64
CONTEXT = 512


def words(seed, count):
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def image_ids(grid):
    return [VISION_START, *[IMAGE_TOKEN] * (grid[0] * grid[1] // 4), VISION_END]


SQUARE, WIDE = (14, 12), (4, 24)
ONE = [*words(4, 9), *image_ids(SQUARE), *words(5, 21)]
CASES = {
    "text": (words(6, 37), []),
    "one_image": (ONE, [SQUARE]),
    "wide_image": ([*image_ids(WIDE), *words(8, 30)], [WIDE]),
    "two_images": ([*words(9, 5), *image_ids(WIDE), *words(10, 3), *image_ids(SQUARE), *words(11, 17)], [WIDE, SQUARE]),
    "follow_up": ([*ONE, *words(12, 70), END, *words(13, 25)], [SQUARE]),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trtllm") / "checkpoint"
    random_checkpoint(folder, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint):
    """Greedy tokens and first logits of transformers on the bf16 weights, computed in fp32, and what went in."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    result = {}
    for name, (ids, grids) in CASES.items():
        ids = torch.tensor([ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
        embeddings = torch.zeros(0, model.config.text_config.hidden_size)
        thw = None
        if grids:
            thw = torch.tensor([(1, *grid) for grid in grids])
            patches = int(thw.prod(dim=1).sum())
            inputs |= {"pixel_values": torch.randn(patches, 1176, generator=torch.Generator().manual_seed(patches))}
            inputs["image_grid_thw"] = thw
            with torch.no_grad():
                embeddings = torch.cat(tuple(model.model.get_image_features(inputs["pixel_values"], thw).pooler_output))
        positions, _ = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], image_grid_thw=thw)
        with torch.no_grad():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, ids.shape[1] :].tolist()
            logits = model(**inputs).logits[0, -1]
        index = np.full(ids.shape[1], -1)
        index[ids[0].numpy() == IMAGE_TOKEN] = np.arange(len(embeddings))
        generation = Generation(
            input_ids=ids[0].numpy(),
            position_ids=positions[:, 0].numpy(),
            image_index=index,
            image_embeddings=embeddings.numpy(),
            sampling=Sampling(max_new_tokens=NEW_TOKENS, eos_token_ids=(END, END + 1)),
        )
        result[name] = generation, tokens, logits
    return result


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "bf16"
    write_tensorrt_llm(Checkpoint(checkpoint), folder, precision="bf16", max_position_embeddings=CONTEXT)
    return folder


@pytest.fixture
def engine(written, tmp_path):
    """A `config.json` as `trtllm-build` leaves it, in fp32 so that both sides get the same embeddings."""
    return engine_config(written, tmp_path)


def engine_config(written, folder, **changes):
    model = json.loads((written / "config.json").read_text()) | changes
    build = {
        "max_seq_len": CONTEXT,
        "max_num_tokens": CONTEXT,
        "max_batch_size": 4,
        "max_prompt_embedding_table_size": 4 * 100,
    }
    (folder / "config.json").write_text(json.dumps({"pretrained_config": model, "build_config": build}))
    return EngineConfig.read(folder)


def decoder(folder, **changes):
    decoder = Decoder(folder)
    decoder.config |= {"dtype": "float32"} | changes
    return decoder


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_of_transformers(written, reference, tmp_path, name):
    config = engine_config(written, tmp_path, dtype="float32")
    generation, tokens, logits = reference[name]
    actual, first = decoder(written).generate(request_tensors(generation, config), NEW_TOKENS)
    assert actual == tokens
    torch.testing.assert_close(first, logits, rtol=0, atol=1e-4 * float(logits.abs().max()))


def test_every_tensor_is_read_and_none_is_missing(written, reference, engine):
    reader = decoder(written, dtype="bfloat16")
    reader.generate(request_tensors(reference["text"][0], engine), 1)
    assert reader.read == set(reader.tensors)


def swap_fc_and_gate(decoder, inputs):
    for i in range(decoder.config["num_hidden_layers"]):
        fc, gate = (f"transformer.layers.{i}.mlp.{name}.weight" for name in ("fc", "gate"))
        decoder.tensors[fc], decoder.tensors[gate] = decoder.tensors[gate], decoder.tensors[fc]


def count_from_another_vocabulary(decoder, inputs):
    ids = inputs["input_ids"]
    inputs["input_ids"] = np.where(ids >= 320, ids + 2, ids)
    inputs["prompt_embedding_table"] = np.pad(inputs["prompt_embedding_table"], ((0, 0), (0, 2), (0, 0)))


def put_cos_before_sin(decoder, inputs):
    table = inputs["mrope_rotary_cos_sin"].reshape(CONTEXT, -1, 2)
    inputs["mrope_rotary_cos_sin"] = np.concatenate([table[..., 0], table[..., 1]], axis=1).reshape(1, -1)


def move_the_delta(decoder, inputs):
    inputs["mrope_position_deltas"] = inputs["mrope_position_deltas"] + 1


def order_kv_before_q(decoder, inputs):
    for i in range(decoder.config["num_hidden_layers"]):
        name = f"transformer.layers.{i}.attention.qkv.weight"
        decoder.tensors[name] = decoder.tensors[name].roll(64, dims=0)


@pytest.mark.parametrize(
    "mutate",
    [swap_fc_and_gate, count_from_another_vocabulary, put_cos_before_sin, move_the_delta, order_kv_before_q],
    ids=lambda mutate: mutate.__name__,
)
def test_what_is_known_to_go_wrong_is_seen(written, reference, tmp_path, mutate):
    config = engine_config(written, tmp_path, dtype="float32")
    generation, tokens, _ = reference["one_image"]
    reader, inputs = decoder(written), request_tensors(generation, config)
    assert int(inputs["mrope_position_deltas"][0, 0]) < 0
    mutate(reader, inputs)
    assert reader.generate(inputs, NEW_TOKENS)[0] != tokens


def test_int4_leaves_the_rounding_to_the_engine_build(checkpoint, written, tmp_path):
    config = write_tensorrt_llm(
        Checkpoint(checkpoint), tmp_path / "int4", precision="int4", max_position_embeddings=CONTEXT
    )
    assert config["quantization"]["quant_algo"] == "W4A16"
    assert config["quantization"]["exclude_modules"] == ["*lm_head", "*vocab_embedding"]
    assert (tmp_path / "int4/rank0.safetensors").read_bytes() == (written / "rank0.safetensors").read_bytes()


def test_a_request_carries_what_the_backend_takes(reference, engine):
    generation = reference["two_images"][0]
    sampled = dataclasses.replace(
        generation,
        sampling=Sampling(
            max_new_tokens=9000, temperature=0.7, top_p=0.9, repetition_penalty=1.05, seed=2**40, eos_token_ids=(END,)
        ),
    )
    greedy, warm, text = (request_tensors(g, engine) for g in (generation, sampled, reference["text"][0]))
    assert {name: (value.dtype.name, value.shape[0]) for name, value in greedy.items()} == {
        "input_ids": ("int32", 1),
        "input_lengths": ("int32", 1),
        "request_output_len": ("int32", 1),
        "end_id": ("int32", 1),
        "pad_id": ("int32", 1),
        "streaming": ("bool", 1),
        "repetition_penalty": ("float32", 1),
        "stop_words_list": ("int32", 1),
        "runtime_top_k": ("int32", 1),
        "prompt_embedding_table": ("bfloat16", 1),
        "mrope_rotary_cos_sin": ("float32", 1),
        "mrope_position_deltas": ("int64", 1),
    }
    assert greedy["stop_words_list"].tolist() == [[[END + 1], [1]]]
    assert warm["seed"].dtype == np.uint64 and "runtime_top_k" not in warm and "stop_words_list" not in warm
    assert warm["request_output_len"][0, 0] == CONTEXT - len(generation.input_ids)
    endless = dataclasses.replace(generation, sampling=Sampling(max_new_tokens=3))
    assert not {"end_id", "pad_id", "stop_words_list"} & set(request_tensors(endless, engine))
    assert "prompt_embedding_table" not in text and text["mrope_position_deltas"].tolist() == [[0]]
    rows = greedy["input_ids"][0][greedy["input_ids"][0] >= 320]
    assert rows.tolist() == list(range(320, 320 + len(rows)))


def test_a_request_without_a_seed_gets_one_of_its_own(reference, engine):
    warm = dataclasses.replace(reference["text"][0], sampling=Sampling(max_new_tokens=3, temperature=0.7))
    seeds = [request_tensors(warm, engine)["seed"] for _ in range(2)]
    assert seeds[0].dtype == np.uint64 and seeds[0] != seeds[1], "the engine's default is one seed for all"


def test_extra_ids_tell_images_apart_by_content_and_grid(reference, engine):
    """Equal ids at equal places have to mean equal keys, and different images different ids."""
    generation = reference["two_images"][0]
    tensors = request_tensors(generation, engine, prefix_reuse=True)
    ids = tensors["prompt_table_extra_ids"]
    assert ids.dtype == np.uint64 and ids.shape == tensors["input_ids"].shape
    is_image = generation.image_index >= 0
    assert not ids[0][~is_image].any() and len(set(ids[0][is_image].tolist())) == 2 and ids[0][is_image].all()
    table = tensors["prompt_embedding_table"][0]
    assert np.array_equal(extra_ids(generation, table), ids[0])
    first = np.flatnonzero(is_image)[0]
    shifted = dataclasses.replace(generation, position_ids=generation.position_ids + 5)
    assert np.array_equal(extra_ids(shifted, table), ids[0]), "the place is in the tokens before, not in the image"
    changed, grid = table.copy(), generation.position_ids.copy()
    changed[0, 0] += 1
    grid[1, first + 1] += 1
    for other in (extra_ids(generation, changed), extra_ids(dataclasses.replace(generation, position_ids=grid), table)):
        assert other[first] != ids[0, first] and other[is_image][-1] == ids[0][is_image][-1]
    assert "prompt_table_extra_ids" not in request_tensors(generation, engine)
    assert "prompt_table_extra_ids" not in request_tensors(reference["text"][0], engine, prefix_reuse=True)


def test_a_stop_has_what_the_backend_demands_of_every_request():
    stop = stop_tensors()
    assert stop["stop"].dtype == bool and stop["stop"].all() and set(stop) > {"input_lengths", "request_output_len"}
    assert all(value.shape == (1, 1) for value in stop.values())


def test_limits_of_the_engine(reference, engine):
    generation = reference["two_images"][0]
    with pytest.raises(InvalidRequest, match="66 tokens, the engine was built for 65"):
        request_tensors(generation, dataclasses.replace(engine, max_prompt_rows=65))
    with pytest.raises(PromptTooLong, match="95 tokens, the engine takes 94"):
        request_tensors(generation, dataclasses.replace(engine, max_prompt=94))


@pytest.mark.parametrize(
    "changes",
    [
        {"qwen_type": "qwen2"},
        {"dtype": "int8"},
        {"hidden_size": None},
        {"max_position_embeddings": 4},
        {"rotary_scaling": None},
    ],
    ids=str,
)
def test_another_engine_is_refused(written, tmp_path, changes):
    with pytest.raises(InvalidBundle):
        engine_config(written, tmp_path, **changes)


def test_the_writer_refuses_what_it_cannot_write(checkpoint, tmp_path):
    opened = Checkpoint(checkpoint)
    with pytest.raises(InvalidRequest, match="fp8 needs weights quantized to fp8"):
        write_tensorrt_llm(opened, tmp_path / "x", precision="fp8", max_position_embeddings=CONTEXT)
    with pytest.raises(InvalidRequest, match="unknown to TensorRT-LLM"):
        write_tensorrt_llm(opened, tmp_path / "x", precision="fp16", max_position_embeddings=CONTEXT)
    with pytest.raises(InvalidRequest, match="allows 1 to 4096"):
        write_tensorrt_llm(opened, tmp_path / "x", precision="bf16", max_position_embeddings=9000)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    with pytest.raises(InvalidRequest, match="not an empty folder"):
        write_tensorrt_llm(opened, tmp_path / "used", precision="bf16", max_position_embeddings=CONTEXT)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def test_the_export_verb_writes_a_decoder_for_tensorrt_llm(checkpoint, written, tmp_path):
    from click.testing import CliRunner

    from cxr_triton.cli import main

    phantom = Path(__file__).resolve().parent.parent / "phantom"
    tokenizer, profile = phantom / "checkpoint", tmp_path / "profile.yaml"
    profile.write_text(f"extends: {phantom / 'profile.yaml'}\ncheckpoint: null\n")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (checkpoint / name).write_bytes((tokenizer / name).read_bytes())
    arguments = ["export", str(checkpoint), "--profile", str(profile), "--format", "tensorrt-llm"]
    arguments += ["--precision", "bf16", "--max-sequence", str(CONTEXT), "--json", "-"]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "export")])
    assert result.exit_code == 0, result.output
    export = json.loads(result.stdout)
    assert (export["format"], export["precision"], export["geometry"]["compute"]) == ("tensorrt-llm", "bf16", "bf16")
    for name in ("config.json", "rank0.safetensors"):
        assert (tmp_path / "export/decoder" / name).read_bytes() == (written / name).read_bytes()
    assert (tmp_path / "export/vision.onnx").exists() and not (tmp_path / "export/decoder.onnx").exists()
    refused = CliRunner().invoke(main, [*arguments, "--head", "int4", "-o", str(tmp_path / "other")])
    assert refused.exit_code == 1 and "leave them out" in refused.output
