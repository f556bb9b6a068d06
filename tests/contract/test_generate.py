"""Greedy tokens of the decoder runtime against `transformers.generate`, alone and in a crowd."""

import dataclasses
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from bundles import TOKEN_BUDGET, WINDOW_BUDGET, build_int8, build_mixed, build_openvino, build_w4a8, write_export
from checkpoints import END, IMAGE_TOKEN, VISION_END, VISION_START, random_checkpoint

from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.onnxruntime import int8
from cxr_triton.engines.onnxruntime.session import OrtDecoder
from cxr_triton.engines.runtime.drafts import WIDTHS, Costs, Drafts
from cxr_triton.engines.runtime.prefix import PrefixCache
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.pixels import image
from cxr_triton.sampling import Sampling

NEW_TOKENS = 80
PENALTY = 1.05
WAIT_S = 300


@dataclass
class Case:
    """A prompt for both sides: ids, and pictures of (height, width) pixels."""

    input_ids: np.ndarray
    pictures: list[np.ndarray]


def text(seed, count):
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def picture(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def image_ids(picture):
    tokens = picture.shape[0] * picture.shape[1] // 28**2
    return [VISION_START, *[IMAGE_TOKEN] * tokens, VISION_END]


def cases():
    square, wide, small = picture(1, 196, 168), picture(2, 56, 336), picture(3, 84, 112)
    single = [*text(4, 9), *image_ids(square), *text(5, 21)]
    return {
        "text_only": Case(text(6, 37), []),
        "one_token": Case(text(7, 1), []),
        "one_image": Case(single, [square]),
        "wide_image": Case([*image_ids(wide), *text(8, 30)], [wide]),
        "two_images": Case(
            [*text(9, 5), *image_ids(small), *text(10, 3), *image_ids(wide), *text(11, 17)], [small, wide]
        ),
        "follow_up": Case([*single, *text(12, 70), END, *text(13, 25)], [square]),
        "long_text": Case(text(14, 300), []),
        "long_after_image": Case([*image_ids(small), *text(15, 150)], [small]),
    }


@pytest.fixture(scope="module")
def model_and_export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    model = random_checkpoint(folder / "checkpoint", tied=False)
    return model, write_export(folder / "export", folder / "checkpoint")


@pytest.fixture(scope="module", params=[build_bundle, build_openvino, build_mixed])
def bundle(request, model_and_export, tmp_path_factory):
    return request.param(model_and_export[1], tmp_path_factory.mktemp("generate") / "bundle")


@pytest.fixture(scope="module")
def reference(model_and_export):
    """Tokens of `transformers.generate` by case and penalty, and the M-RoPE positions that it used."""
    tokens, positions = {}, {}
    for name, case in cases().items():
        for penalty in (1.0, PENALTY):
            tokens[name, penalty], positions[name] = generate(*model_and_export, case, penalty)
    return tokens, positions


def generate(model, export, case, penalty):
    """Tokens of `transformers.generate`, which runs to the end, and the positions of the prompt; no tokens if None."""
    import torch
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model.generation_config.eos_token_id = None
    processor = Qwen2VLImageProcessorPil.from_pretrained(export)
    ids = torch.tensor([case.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    grids = None
    inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    if case.pictures:
        pixels = processor(case.pictures, return_tensors="pt")
        inputs["pixel_values"], grids = pixels["pixel_values"], pixels["image_grid_thw"]
        inputs["image_grid_thw"] = grids
    found, _ = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], image_grid_thw=grids)
    positions = found[:, 0].numpy()
    if penalty is None:
        return [], positions
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "repetition_penalty": penalty}
    with torch.no_grad():
        output = model.generate(**inputs, **options)
    tokens = output[0, ids.shape[1] :].tolist()
    assert len(tokens) == NEW_TOKENS
    return tokens, positions


@pytest.fixture(scope="module")
def vision(bundle):
    return bundle.open_vision(threads=1)


@pytest.fixture(scope="module")
def generations(bundle, vision, reference):
    """The same requests for the runtime, image embeddings by the vision session."""
    return {
        (name, penalty): generation_of(bundle, vision, case, reference[1][name], penalty)
        for name, case in cases().items()
        for penalty in (1.0, PENALTY)
    }


def generation_of(bundle, vision, case, positions, penalty):
    ids = np.array(case.input_ids, np.int64)
    index = np.full(len(ids), -1, np.int64)
    embeddings = np.zeros((0, bundle.geometry.hidden), np.float32)
    if case.pictures:
        inputs = [image.windows(each, window_budget=WINDOW_BUDGET, token_budget=TOKEN_BUDGET) for each in case.pictures]
        embeddings = vision.encode(**image.stack(inputs)).reshape(-1, bundle.geometry.hidden)
        rows = [i * TOKEN_BUDGET + np.arange(each.tokens) for i, each in enumerate(inputs)]
        index[ids == IMAGE_TOKEN] = np.concatenate(rows)
    return Generation(
        input_ids=ids,
        position_ids=positions,
        image_index=index,
        image_embeddings=embeddings,
        sampling=Sampling(max_new_tokens=NEW_TOKENS, repetition_penalty=penalty),
    )


class Receiver:
    def __init__(self):
        self.tokens, self.done, self.last = [], threading.Event(), None

    def __call__(self, chunk):
        self.tokens.extend(chunk.token_ids.tolist())
        if chunk.completion or chunk.error:
            self.last = chunk
            self.done.set()

    def wait(self):
        assert self.done.wait(WAIT_S), "the stream did not end"
        assert self.last.error is None, self.last.error
        return self


@pytest.mark.parametrize("penalty", [1.0, PENALTY])
@pytest.mark.parametrize("slots", [1, 4])
def test_greedy_tokens_alone_are_those_of_transformers(bundle, reference, generations, slots, penalty):
    with DecoderRuntime(bundle, slots=slots, prefill_chunk=64, threads=1) as runtime:
        for name in cases():
            receiver = Receiver()
            runtime.submit(generations[name, penalty], receiver)
            assert receiver.wait().tokens == reference[0][name, penalty], name
            assert len(set(receiver.tokens)) > 10  # a constant answer would prove little


@pytest.mark.parametrize("slots", [3, 8])
def test_greedy_tokens_of_eight_in_flight_are_those_of_transformers(bundle, reference, generations, slots):
    with DecoderRuntime(bundle, slots=slots, prefill_chunk=16, threads=1) as runtime:
        running = {}
        for index, name in enumerate(cases()):
            key = (name, (1.0, PENALTY)[index % 2])
            running[key] = Receiver()
            runtime.submit(generations[key], running[key])
        for key, receiver in running.items():
            assert receiver.wait().tokens == reference[0][key], key


@pytest.fixture(scope="module")
def conversation(model_and_export, reference):
    """Three turns about one picture, and another task on it: prompts, and the tokens of `transformers.generate`."""
    turns, case = [], cases()["one_image"]
    for seed in (20, 21):
        turns.append((case, generate(*model_and_export, case, 1.0)[0]))
        case = Case([*case.input_ids, *turns[-1][1], END, *text(seed, 25)], case.pictures)
    turns.append((case, generate(*model_and_export, case, 1.0)[0]))
    first = cases()["one_image"].input_ids
    other = Case([*first[:-21], *text(22, 40)], case.pictures)
    return [*turns, (other, generate(*model_and_export, other, 1.0)[0])]


def test_turns_and_tasks_that_reuse_a_prefix_give_the_tokens_of_transformers(
    bundle, vision, model_and_export, conversation
):
    prefix = PrefixCache(64 << 20)
    with DecoderRuntime(bundle, slots=4, prefill_chunk=16, threads=1, prefix=prefix) as runtime:
        counts = []
        for case, expected in [*conversation, conversation[0]]:
            receiver = Receiver()
            runtime.submit(
                generation_of(bundle, vision, case, generate(*model_and_export, case, None)[1], 1.0), receiver
            )
            assert receiver.wait().tokens == expected
            counts.append((len(case.input_ids), receiver.last.completion.usage["cached_tokens"]))
    first, second, third, other, again = counts
    assert first[1] == 0 and again[1] == (first[0] - 1) // 16 * 16
    assert second[1] == (first[0] + NEW_TOKENS - 1) // 16 * 16  # the picture, the question and the answer
    assert third[1] == (second[0] + NEW_TOKENS - 1) // 16 * 16
    assert other[1] == (first[0] - 21) // 16 * 16


@pytest.mark.parametrize("penalty", [1.0, PENALTY])
def test_greedy_tokens_with_reuse_are_those_of_transformers(bundle, reference, generations, penalty):
    """Alone and twice, then eight in flight, each of them beside its equal."""
    prefix = PrefixCache(64 << 20)
    with DecoderRuntime(bundle, slots=8, prefill_chunk=16, threads=1, prefix=prefix) as runtime:
        for _ in range(2):
            for name in ("one_image", "follow_up", "long_text"):
                receiver = Receiver()
                runtime.submit(generations[name, penalty], receiver)
                assert receiver.wait().tokens == reference[0][name, penalty], name
        crowd = [(name, Receiver()) for name in [*cases(), *cases()]]
        for name, receiver in crowd:
            runtime.submit(generations[name, penalty], receiver)
        for name, receiver in crowd:
            assert receiver.wait().tokens == reference[0][name, penalty], name
        for name, receiver in crowd[len(cases()) :]:
            length = len(cases()[name].input_ids)
            assert receiver.last.completion.usage["cached_tokens"] == (length - 1) // 16 * 16, name


class Free(Costs):
    """A step of any width takes the same, so all that is guessed is checked."""

    def best(self, streams, tokens):
        return WIDTHS[len(tokens) - 1]

    def rest(self, streams, seconds):
        return 0


@pytest.mark.parametrize("penalty", [1.0, PENALTY])
def test_greedy_tokens_with_drafts_are_those_of_transformers(bundle, reference, generations, penalty):
    """Alone and again, then sixteen in flight by eight, each beside its equal, with prefixes and without."""
    drafts = Drafts(1 << 20, costs=Free())
    with DecoderRuntime(bundle, slots=1, prefill_chunk=64, threads=1, drafts=drafts) as runtime:
        for name in [*cases(), *cases()]:
            receiver = Receiver()
            runtime.submit(generations[name, penalty], receiver)
            assert receiver.wait().tokens == reference[0][name, penalty], name
        assert drafts.counts()["accepted"] > 0.7 * len(cases()) * NEW_TOKENS
    for prefix in (None, PrefixCache(64 << 20)):
        with DecoderRuntime(bundle, slots=8, threads=1, prefill_chunk=16, drafts=drafts, prefix=prefix) as runtime:
            before, crowd = drafts.counts()["accepted"], [(name, Receiver()) for name in [*cases(), *cases()]]
            for name, receiver in crowd:
                runtime.submit(generations[name, penalty], receiver)
            for name, receiver in crowd:
                assert receiver.wait().tokens == reference[0][name, penalty], name
        if "openvino" in bundle.engine:  # ONNX Runtime checks guesses of a stream that runs alone
            assert drafts.counts()["accepted"] - before > 0.7 * 2 * len(cases()) * NEW_TOKENS


def with_picture(given):
    """The same with a picture from its ninth token to the 85th."""
    index = given.image_index.copy()
    index[8:85] = np.arange(77)
    rows = np.random.default_rng(32).standard_normal((77, given.image_embeddings.shape[1])).astype(np.float32)
    return dataclasses.replace(given, image_index=index, image_embeddings=rows)


@pytest.fixture(
    params=[
        (build, precision) for build in (build_bundle, build_openvino, build_mixed) for precision in ("fp32", "int4")
    ]
    + [
        pytest.param(
            (build_int8, "int4"), marks=pytest.mark.skipif(not int8.is_exact(int8.cpu_features()), reason=int8.REMEDY)
        ),
        (build_w4a8, "int4"),
    ],
    ids=lambda param: f"{param[0].__name__}-{param[1]}",
)
def built(model_and_export, tmp_path, request):
    """A bundle of every engine on the CPU, in what it rounds and what it does not."""
    build, precision = request.param
    checkpoint = model_and_export[1].parent / "checkpoint"
    return build(
        write_export(tmp_path / "export", checkpoint, precision=precision),
        tmp_path / "bundle",
        **({} if build in (build_bundle, build_int8, build_w4a8) else {"precision": precision}),
    )


def test_a_prompt_that_begins_as_another_gives_the_same_bits(built):
    """Whatever the engine rounds: it is given the same runs, on rows that are the same."""
    ids = np.array(text(30, 150), np.int64)
    asked = generation_of(built, None, Case(ids.tolist(), []), np.tile(np.arange(150), (3, 1)), 1.0)
    begins_so = [*ids[:100].tolist(), *text(31, 20)]
    other = generation_of(built, None, Case(begins_so, []), np.tile(np.arange(120), (3, 1)), 1.0)
    prompts, seen, cached = [other, asked, *map(with_picture, (other, asked))], [], []
    for prefix in (None, PrefixCache(64 << 20)):
        session = built.open_decoder(slots=1, threads=1)
        prefill, logits = session.prefill, []

        def keeping(*args, prefill=prefill, logits=logits, **options):
            result = prefill(*args, **options)
            if result is not None:
                logits.append(result.copy())
            return result

        session.prefill = keeping
        with DecoderRuntime(built, session=session, prefill_chunk=32, prefix=prefix) as runtime:
            for each in prompts:
                receiver = Receiver()
                runtime.submit(each, receiver)
                cached.append(receiver.wait().last.completion.usage.get("cached_tokens"))
        seen.append(logits)
    assert cached[4:] == [0, 96, 0, 80]  # whole runs of 32 tokens, or up to the last whole block of the picture
    np.testing.assert_array_equal(seen[1], seen[0])


def test_a_prompt_is_the_same_whatever_other_slots_hold(built):
    """Bit by bit, though the cache is as long as the longest of them wants it."""
    session = built.open_decoder(slots=2, threads=1)
    ids = np.random.default_rng(0).integers(0, session.vocab, 300)

    def read(slot, start, stop):
        nothing, no_image = np.zeros((0, session.hidden), np.float32), np.full(stop - start, -1)
        places = np.tile(np.arange(start, stop), (3, 1))
        return session.prefill(slot, ids[start:stop], no_image, nothing, places, is_last=True).copy()

    def short():
        session.free(0)
        return [read(0, 0, 40), read(0, 40, 60), read(0, 60, 61)]

    alone = short()
    read(1, 0, 300)
    np.testing.assert_array_equal(short(), alone)


def test_image_embeddings_do_not_depend_on_the_batch(bundle):
    """Bit by bit, or a stream's greedy tokens would depend on whose images the server batched with its own."""
    inputs = [
        image.windows(picture(seed, height, width), window_budget=WINDOW_BUDGET, token_budget=TOKEN_BUDGET)
        for seed, (height, width) in enumerate([(196, 168), (28, 28), (56, 336), (224, 224)])
    ]
    vision = bundle.open_vision(threads=2)
    batch = vision.encode(**image.stack(inputs))
    assert batch.shape == (4, TOKEN_BUDGET, bundle.geometry.hidden)
    for each, together in zip(inputs, batch, strict=True):
        alone = vision.encode(**image.stack([each]))[0]
        np.testing.assert_array_equal(together[: each.tokens], alone[: each.tokens])


def test_an_end_token_stops_as_in_transformers(bundle, reference, generations):
    expected = reference[0]["one_image", PENALTY]
    end = next(token for k, token in enumerate(expected) if k >= 20 and token not in expected[:k])
    generation = generations["one_image", PENALTY]
    sampling = dataclasses.replace(generation.sampling, eos_token_ids=(END, end))
    with DecoderRuntime(bundle, threads=1) as runtime:
        receiver = Receiver()
        runtime.submit(dataclasses.replace(generation, sampling=sampling), receiver)
        assert receiver.wait().tokens == expected[: expected.index(end) + 1]
        assert receiver.last.completion.finish_reason == "stop"
        assert receiver.last.completion.usage["image_tokens"] == 42


def test_batch_invariant_int4_tokens_do_not_depend_on_the_crowd(tmp_path, generations):
    """Sampled at temperature 1, so a last bit that differs would show soon."""
    random_checkpoint(tmp_path / "checkpoint", tied=False)
    export = write_export(tmp_path / "export", tmp_path / "checkpoint", precision="int4")
    built = build_bundle(export, tmp_path / "bundle")
    sampled = {
        name: dataclasses.replace(
            generations[name, 1.0],
            sampling=Sampling(max_new_tokens=NEW_TOKENS, temperature=1.0, repetition_penalty=PENALTY, seed=seed),
        )
        for seed, name in enumerate(cases())
    }
    session = OrtDecoder(built, slots=8, threads=1, batch_invariant=True)
    with DecoderRuntime(built, session=session) as runtime:
        alone = {}
        for name in ("text_only", "two_images", "follow_up"):
            alone[name] = Receiver()
            runtime.submit(sampled[name], alone[name])
            alone[name].wait()
        crowd = {name: Receiver() for name in cases()}
        for name, receiver in crowd.items():
            runtime.submit(sampled[name], receiver)
        for receiver in crowd.values():
            receiver.wait()
    for name, receiver in alone.items():
        assert crowd[name].tokens == receiver.tokens, name


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_batch_invariant_int4_steps_give_every_row_the_same_bits(tmp_path, slots):
    """Whatever the number of rows, and whichever of them it is: the kernel takes them in pairs."""
    random_checkpoint(tmp_path / "checkpoint", tied=False)
    export = write_export(tmp_path / "export", tmp_path / "checkpoint", precision="int4")
    session = OrtDecoder(build_bundle(export, tmp_path / "bundle"), slots=slots, threads=1, batch_invariant=True)
    ids, none = np.arange(10, 60), np.zeros((0, session.hidden), np.float32)
    for slot in range(slots):
        session.prefill(slot, ids, np.full(50, -1), none, np.tile(np.arange(50), (3, 1)), is_last=True)
    held, expected = session.lengths.copy(), None
    for rows in range(1, slots + 1):
        session.lengths[:] = held
        logits = session.step(np.full(rows, 7), np.full(rows, 50)).copy()
        assert logits.shape == (rows, session.vocab)
        expected = logits[0] if expected is None else expected
        for row in logits:
            np.testing.assert_array_equal(row, expected)
