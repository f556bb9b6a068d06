"""vLLM given our tower's rows against `transformers.generate`: greedy tokens, alone and with 16 in flight."""

import dataclasses
import threading

import numpy as np
import pytest
from lora_adapter import merge, write_random
from test_generate import Receiver
from vllm_api import has
from vllm_room import CHECKPOINT, PHANTOM, build, vllm_python  # noqa: F401

from cxr_triton import phantom
from cxr_triton.chat import ChatTokenizer
from cxr_triton.engines.pipeline import Preprocessor, sampling_of
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.verify.reference import Case, Reference, request_json
from cxr_triton.engines.vllm.options import adapter, arguments
from cxr_triton.engines.vllm.process import EngineProcess
from cxr_triton.engines.vllm.request import message
from cxr_triton.engines.vllm.runtime import VLLMRuntime
from cxr_triton.errors import InvalidRequest
from cxr_triton.export.checkpoint import torch_model
from cxr_triton.guide import answer_grammar
from cxr_triton.pixels import image
from cxr_triton.profile import NamedAdapter, load_profile
from cxr_triton.reading import parse
from cxr_triton.sampling import Sampling

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_python")]
IN_FLIGHT = 16
PHANTOMS = 100
NEW_TOKENS = 40
STEPS = {"ngram": 15, "suffix": 10}  # that an answer of so many tokens, most of them one again and again, takes
PENALTY = 1.05
PAD, START, END = 5, 3, 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return build(tmp_path_factory.mktemp("vllm"), "fp32")


@pytest.fixture(scope="module")
def reference():
    import torch

    torch.set_num_threads(1)
    with Reference(CHECKPOINT, load_profile(PHANTOM / "profile.yaml"), device="cpu") as reference:
        yield reference


@pytest.fixture(scope="module")
def vision(bundle):
    return bundle.open_vision(threads=1)


@pytest.fixture(scope="module")
def phantoms(bundle, vision, reference):
    """Requests through our preprocessing and tower, and the tokens that transformers gives."""
    files = list(phantom.png_files(PHANTOMS, 7, reference.profile.pixel_preset))
    cases = [Case(file, request_json({})) for file in files]
    reference.read(cases)
    preprocessor, asked = Preprocessor(bundle.path), []
    for case in cases:
        step = preprocessor.prepare([case.image], case.request)
        rows = vision.encode(step.pixel_windows, step.patch_rows_cols, step.valid, step.merge_order)
        asked.append(
            Generation(
                input_ids=step.input_ids,
                position_ids=step.position_ids,
                image_index=step.image_index,
                image_embeddings=rows.reshape(-1, rows.shape[-1]),
                sampling=sampling_of(step.context),
            )
        )
    preprocessor.close()
    return asked, [reference.ids(case).tolist() for case in cases]


def text(seed, count):
    return np.random.default_rng(seed).integers(10, 640, count).tolist()


def picture(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def image_ids(picture):
    return [START, *[PAD] * (picture.shape[0] * picture.shape[1] // 28**2), END]


def prompts():
    square, wide, small = picture(1, 196, 168), picture(2, 56, 336), picture(3, 84, 112)
    single = [*text(4, 9), *image_ids(square), *text(5, 21)]
    return {
        "text_only": (text(6, 37), []),
        "one_image": (single, [square]),
        "wide_image": ([*image_ids(wide), *text(8, 30)], [wide]),
        "two_images": ([*text(9, 5), *image_ids(small), *text(10, 3), *image_ids(wide), *text(11, 17)], [small, wide]),
        "follow_up": ([*single, *text(12, 70), END, *text(13, 25)], [square]),
        "long_text": (text(14, 300), []),
        "long_after_image": ([*image_ids(small), *text(15, 150)], [small]),
        "other_image": ([*image_ids(small), *text(15, 150)], [picture(16, 84, 112)]),
    }


@pytest.fixture(scope="module")
def cases(bundle, vision):
    """By name and penalty, requests of any tokens and pictures, and the tokens that transformers gives."""
    return answered(bundle.geometry, vision, torch_model(CHECKPOINT, "float32"))


def answered(geometry, vision, model, penalties=(1.0, PENALTY)):
    import torch
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model.generation_config.eos_token_id = None  # run to the end
    processor = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)
    asked, tokens = {}, {}
    for name, (prompt, pictures) in prompts().items():
        ids = torch.tensor([prompt])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == PAD).int()}
        index, rows = np.full(len(prompt), -1, np.int64), np.zeros((0, geometry.hidden), np.float32)
        if pictures:
            inputs |= processor(pictures, return_tensors="pt")
            budgets = {"window_budget": geometry.window_budget, "token_budget": geometry.token_budget}
            encoded = [image.windows(each, **budgets) for each in pictures]
            rows = vision.encode(**image.stack(encoded)).reshape(-1, geometry.hidden)
            own = [i * geometry.token_budget + np.arange(each.tokens) for i, each in enumerate(encoded)]
            index[np.array(prompt) == PAD] = np.concatenate(own)
        grids = inputs.get("image_grid_thw")
        positions, _ = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], image_grid_thw=grids)
        for penalty in penalties:
            options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "repetition_penalty": penalty}
            with torch.no_grad():
                tokens[name, penalty] = model.generate(**inputs, **options)[0, len(prompt) :].tolist()
            asked[name, penalty] = Generation(
                input_ids=np.array(prompt, np.int64),
                position_ids=positions[:, 0].numpy(),
                image_index=index,
                image_embeddings=rows,
                sampling=Sampling(max_new_tokens=NEW_TOKENS, repetition_penalty=penalty),
            )
    return asked, tokens


def opened(bundle, **options):
    process = EngineProcess(arguments(bundle, IN_FLIGHT, options), threads=1, adapter=adapter(bundle))
    tokenizer = ChatTokenizer(bundle.path)
    return process, VLLMRuntime(bundle.geometry, process, tokenizer, slots=IN_FLIGHT, queue_size=2 * PHANTOMS)


@pytest.fixture(scope="module")
def engine(bundle):
    """Prefixes are cached and prompts are cut, into so small steps that most are."""
    process, runtime = opened(bundle, **{"step-tokens": "96"})
    with runtime:
        yield process, runtime


def read(runtime, *asked):
    receivers = [Receiver() for _ in asked]
    for generation, receiver in zip(asked, receivers, strict=True):
        runtime.submit(generation, receiver)
    return [receiver.wait().tokens for receiver in receivers]


def test_the_demonstration_model_reads_100_phantoms_as_transformers_does(engine, phantoms):
    """With 16 in flight, and alone. A prefix cache that mixes pictures up would show: all prompts have one text."""
    asked, expected = phantoms
    assert len({tuple(tokens) for tokens in expected}) > PHANTOMS / 4
    assert read(engine[1], *asked) == expected
    assert [read(engine[1], generation)[0] for generation in asked] == expected


def test_greedy_tokens_of_any_prompt_are_those_of_transformers(engine, cases):
    asked, expected = cases
    assert all(len(tokens) == NEW_TOKENS for tokens in expected.values())
    assert any(len(set(tokens)) > 10 for tokens in expected.values())  # constant answers would prove little
    for key, generation in asked.items():
        assert read(engine[1], generation)[0] == expected[key], key


def test_greedy_tokens_with_16_in_flight_are_those_of_transformers(engine, cases):
    asked, expected = cases
    assert len(asked) == IN_FLIGHT
    assert dict(zip(asked, read(engine[1], *asked.values()), strict=True)) == expected


def test_a_kept_prefix_gives_the_same_tokens_and_no_other_pictures(engine, cases):
    """Two prompts of the same ids, longer than a block of the cache, around pictures of the same size."""
    process, runtime = engine
    asked, expected = cases
    pair = [("long_after_image", 1.0), ("other_image", 1.0)]
    assert expected[pair[0]] != expected[pair[1]]
    assert asked[pair[0]].input_ids.tolist() == asked[pair[1]].input_ids.tolist()
    for key in pair:
        assert read(runtime, asked[key])[0] == expected[key]
    for key in pair:
        before = process.cached_tokens
        assert read(runtime, asked[key])[0] == expected[key]
        assert process.cached_tokens > before


def test_a_seed_gives_the_same_answer_again(engine, cases):
    def drawn(seed, **more):
        options = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "seed": seed} | more
        return dataclasses.replace(cases[0]["one_image", 1.0], sampling=Sampling(**options))

    first, again, other, fresh, fresh_too = read(engine[1], *map(drawn, (1, 1, 2, None, None)))
    assert first == again != other and fresh != fresh_too
    assert read(engine[1], drawn(5, top_p=1e-6))[0] == cases[1]["one_image", 1.0]


def test_an_end_token_ends_an_answer_and_is_counted(engine, cases):
    expected = cases[1]["long_after_image", PENALTY]
    end = next(token for k, token in enumerate(expected) if k >= 5 and token not in expected[:k])
    generation = cases[0]["long_after_image", PENALTY]
    sampling = dataclasses.replace(generation.sampling, eos_token_ids=(2, end))
    receiver = Receiver()
    engine[1].submit(dataclasses.replace(generation, sampling=sampling), receiver)
    assert receiver.wait().tokens == expected[: expected.index(end) + 1]
    assert receiver.last.completion.finish_reason == "stop"
    assert receiver.last.completion.usage["image_tokens"] == 12


def test_a_cancelled_stream_ends_and_the_engine_goes_on(engine, cases):
    sampling = Sampling(max_new_tokens=900)
    generation = dataclasses.replace(cases[0]["text_only", 1.0], sampling=sampling)
    receivers = [Receiver() for _ in range(IN_FLIGHT)]
    streams = [engine[1].submit(generation, receiver) for receiver in receivers]
    for stream in streams:
        engine[1].cancel(stream)
    for receiver in receivers:
        assert receiver.wait().last.completion.finish_reason == "cancelled"
        assert len(receiver.tokens) < 900
    assert read(engine[1], cases[0]["text_only", 1.0])[0] == cases[1]["text_only", 1.0]


class Steps:
    """How many tokens each step of the engine gave."""

    def __init__(self):
        self.tokens, self.done = [], threading.Event()

    def __call__(self, request_id, token_ids, is_last, error):
        self.tokens.append(len(token_ids))
        if is_last:
            self.done.set()


@pytest.mark.parametrize("drafts", ["ngram", "suffix"])
def test_whole_prompts_without_a_prefix_cache_and_drafts_change_no_token(bundle, phantoms, cases, drafts):
    if drafts == "suffix" and not has("arctic_inference"):
        pytest.skip("vLLM's Python has no arctic-inference; `SUFFIX=1 deploy/vllm-cpu.sh .venv-vllm` builds it")
    process, runtime = opened(bundle, **{"prefix-caching": "off", "chunked-prefill": "off", "drafts": drafts})
    with runtime:
        asked, expected = phantoms
        assert read(runtime, *asked[:IN_FLIGHT]) == expected[:IN_FLIGHT]
        assert dict(zip(cases[0], read(runtime, *cases[0].values()), strict=True)) == cases[1]
        assert process.cached_tokens == 0
        steps, monotonous = Steps(), min(cases[1], key=lambda key: len(set(cases[1][key])))
        process.start("again", message(cases[0][monotonous], bundle.geometry), steps)
        assert steps.done.wait(60) and sum(steps.tokens) == NEW_TOKENS
        assert len(steps.tokens) <= STEPS[drafts], steps.tokens


def completed(runtime, *asked):
    receivers = [Receiver() for _ in asked]
    for generation, receiver in zip(asked, receivers, strict=True):
        runtime.submit(generation, receiver)
    return [receiver.wait().last.completion for receiver in receivers]


def test_a_cache_in_fp8_reads_the_same_labels(engine, bundle, phantoms, cases):
    """And rounds: where the option did not reach the engine, every token would be that of transformers."""

    def labels(completion):
        parsed = parse(completion.text, grammar="think_answer", answer="labels", labels=bundle.profile.labels)
        assert parsed.status == "ok", completion.text
        return [finding.label for finding in parsed.findings]

    _, runtime = opened(bundle, kv="fp8")
    with runtime:
        answers = completed(runtime, *phantoms[0])
        rounded = dict(zip(cases[0], read(runtime, *cases[0].values()), strict=True))
    pairs = list(zip(answers, completed(engine[1], *phantoms[0]), strict=True))
    assert sum(labels(one) == labels(other) for one, other in pairs) >= 0.95 * PHANTOMS
    assert rounded != cases[1]


@pytest.fixture
def held():
    """Grammars of the demonstration model's answers, by the form that they have."""
    labels = load_profile(PHANTOM / "profile.yaml").labels
    return {
        form: answer_grammar(grammar=form, answer="labels", labels=labels) for form in ("think_answer", "answer_only")
    }


def with_sampling(generation, **changes):
    return dataclasses.replace(generation, sampling=dataclasses.replace(generation.sampling, **changes))


def test_a_greedy_answer_that_its_grammar_allows_keeps_its_tokens(engine, phantoms, held):
    asked, expected = phantoms
    guided = [with_sampling(each, guide=held["think_answer"]) for each in asked[:IN_FLIGHT]]
    assert read(engine[1], *guided) == expected[:IN_FLIGHT]


@pytest.mark.parametrize("form", ["think_answer", "answer_only"])
def test_drawn_answers_follow_their_grammar(engine, bundle, phantoms, held, form):
    asked = phantoms[0][:IN_FLIGHT]
    changes = {"guide": held[form], "temperature": 1.5, "max_new_tokens": 400}
    guided = [with_sampling(each, seed=i, **changes) for i, each in enumerate(asked)]
    receivers = [Receiver() for _ in guided]
    for each, receiver in zip(guided, receivers, strict=True):
        engine[1].submit(each, receiver)
    whole = [done for receiver in receivers if (done := receiver.wait().last.completion).finish_reason == "stop"]
    assert len(whole) > IN_FLIGHT / 2
    for done in whole:
        labels = bundle.profile.labels
        assert parse(done.text, grammar=form, answer="labels", labels=labels).status == "ok", done.text


def test_a_grammar_that_is_none_is_refused_alone(engine, phantoms, held):
    asked, expected = phantoms
    refused, other = Receiver(), Receiver()
    engine[1].submit(with_sampling(asked[0], guide="start: nothing"), refused)
    engine[1].submit(asked[1], other)
    assert refused.done.wait(60) and isinstance(refused.last.error, InvalidRequest)
    assert other.wait().tokens == expected[1]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A bundle with a LoRA adapter."""
    folder = tmp_path_factory.mktemp("adapted")
    profile = load_profile(PHANTOM / "profile.yaml")
    profile = dataclasses.replace(profile, adapter=NamedAdapter(name="devices"))
    return build(folder, "fp32", profile=profile, adapter=write_random(folder / "lora", CHECKPOINT))


def test_a_lora_adapter_gives_the_tokens_of_weights_that_it_was_merged_into(adapted, bundle, vision, cases, phantoms):
    """Together, with prompts cut, and again from kept prefixes; and those of a reference that reads the adapter."""
    model = torch_model(CHECKPOINT, "float32")
    merge(model, adapted.path / "adapter")
    asked, expected = answered(bundle.geometry, vision, model, penalties=(PENALTY,))
    assert sum(expected[key] != cases[1][key] for key in expected) > len(expected) / 2  # an adapter that is not applied
    assert any(len(set(tokens)) > 10 for tokens in expected.values())
    files = [Case(file, request_json({})) for file in phantom.png_files(8, 7, adapted.profile.pixel_preset)]
    process, runtime = opened(adapted, **{"step-tokens": "96"})
    with runtime, Reference(CHECKPOINT, adapted.profile, device="cpu", adapter=adapted.path / "adapter") as reference:
        for _ in range(2):
            assert dict(zip(asked, read(runtime, *asked.values()), strict=True)) == expected
        assert process.cached_tokens > 0
        texts = [reference.ids(case).tolist() for case in files]
        assert texts != phantoms[1][: len(texts)]
        assert read(runtime, *phantoms[0][: len(texts)]) == texts
