"""The ensemble of a tensorrt-llm bundle on the real Triton, with a contract double in place of TensorRT-LLM's backend.

What the double checks and answers is in `tests/tensorrt_llm_double`; none of it says anything about speed.
"""

import collections
import concurrent.futures
import importlib.util
import json
import re
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from served import Raw, outputs
from served_list import PHANTOM, SHORT, Native, dicom_files, forms, profile_with_tasks
from tensorrt_llm_double import install, swap, write_bundle
from test_serving import until

from cxr_triton.errors import InternalError

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason="no Triton server here"),
]
ENDLESS = {"max_new_tokens": 700, "temperature": 1.0, "seed": 777}  # the double stays in it until it is stopped


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder with the demonstration model's export, in fp32, with tasks for two images and for none."""
    from cxr_triton.export.export import export_checkpoint

    folder = tmp_path_factory.mktemp("tensorrt-llm")
    chosen = profile_with_tasks(folder)
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", chosen, precision="fp32", progress=False)
    return folder


class Served(Raw):
    """A served repository with the double in it, and what the double wrote down."""

    def __init__(self, server, log: Path):
        super().__init__(server)
        self._log = log

    def call(self, images=(), raw_images=None, **asked):
        """As `Raw.call`, with time for a machine that is busy."""
        return super().call(images, raw_images, timeout_s=240, **asked)

    def log(self) -> list[dict]:
        return [json.loads(line) for line in self._log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def asked(self) -> dict:
        """The last request that reached the double."""
        return [entry for entry in self.log() if "inputs" in entry][-1]


def serve(bundle: Path, folder: Path, **settings):
    """A repository of the bundle with the double in it, served."""
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    write_repository(bundle, folder / "repository", Settings(threads=1, **settings), unverified=True)
    install(folder / "repository", bundle.parent / "trtllm", folder / "double.jsonl", double_step_s="0.002")
    if (folder / "repository/vision_encoder/1/model.plan").exists():
        code = Path(__file__).resolve().parents[1] / "tensorrt_llm_double/vision.py"
        swap(folder / "repository", "vision_encoder", code, backend="python", platform="", double_export=str(bundle))
    ports = {"grpc_port": 0, "metrics_port": 0}
    return Server(folder / "repository", **ports, modified=True)


@pytest.fixture(scope="module")
def served(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served-tensorrt-llm")
    bundle = write_bundle(exported / "bundle", PHANTOM / "checkpoint", exported / "export", max_batch=8)
    with serve(bundle, folder, queue_size=64) as server:
        yield Served(server, folder / "double.jsonl")
        server.check()
    assert "in-flight inferences" not in server.log.read_text().replace("that have in-flight inferences", "")


@pytest.fixture(scope="module")
def files():
    return dicom_files(8)


@pytest.fixture(scope="module")
def native(exported, tmp_path_factory):
    """The native decoder on the same images, given what the engine is given: embeddings in bf16."""
    with Native(exported / "export", tmp_path_factory.mktemp("native"), rounded=True) as native:
        yield native


def test_a_reading_streams_what_the_native_decoder_says(served, native, files):
    reading, expected = served.read(files[:1], temperature=0.0), native(files[:1], temperature=0.0)
    assert reading["text"] == expected.text and expected.finish_reason == "stop"
    assert reading["usage"] == expected.usage
    assert "".join(reading["deltas"]) == reading["text"] and len(reading["deltas"]) > 3
    assert reading["status"] == "ok" and reading["model"]["engine"] == "tensorrt-llm"
    timings_ms = reading["timings_ms"]
    assert all(timings_ms[phase] >= 0 for phase in ("queue", "prefill", "decode")) and timings_ms["decode"] > 0


def test_32_at_a_time_say_what_each_says_alone(served, native, files):
    expected = [native([file], **SHORT).text for file in files]
    before = len(served.log())
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(lambda i: served.read([files[i % 8]], **SHORT)["text"], range(32)))
    assert texts == [expected[i % 8] for i in range(32)]
    together = max(entry.get("active", 0) for entry in served.log()[before:])
    assert 2 <= together <= 8, "the engine batches in flight, up to its slots"
    assert until(lambda: served.metric("cxr_decoder_streams") == 0, 60)


def test_clients_that_hang_up_free_slots_in_the_engine(served, files):
    cancelled, before = served.metric("cxr_decoder_cancelled_total"), len(served.log())
    calls = [served.call(files[i : i + 1], **ENDLESS) for i in range(8)]
    for call in calls:
        next(call)
    for call in calls:
        call.cancel()
    assert until(lambda: served.metric("cxr_decoder_streams") == 0, 60)
    assert served.metric("cxr_decoder_cancelled_total") > cancelled
    assert until(lambda: freed(served, before), 60)
    assert all(entry["tokens"] < 700 for entry in served.log()[before:] if "freed" in entry)
    assert served.read(files[:1], **SHORT)["usage"]["completion_tokens"] == 10


def freed(served, before) -> bool:
    """The engine was told to stop, and has let go of all that still ran then."""
    log = served.log()[before:]
    stopped = {entry["stop"] for entry in log if entry.get("known")}
    return bool(stopped) and stopped <= {entry["freed"] for entry in log if "freed" in entry}


def test_a_request_that_waits_has_a_heartbeat_and_can_be_cancelled(served, files):
    calls = [served.call(files[:1], **ENDLESS) for _ in range(8)]
    for call in calls:
        next(call)
    waiting = served.call(files[:1], **ENDLESS)
    assert outputs(next(waiting))[0] == ""
    for call in (waiting, *calls):
        call.cancel()
    assert until(lambda: served.metric("cxr_decoder_streams") == 0, 60)


def test_an_engine_that_fails_fails_one_request_without_details(served, files):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        good = pool.submit(served.read, files[:1], **SHORT)
        with pytest.raises(RuntimeError) as caught:
            served.read(files[:1], max_new_tokens=10, temperature=1.0, seed=666)
    assert "[INTERNAL] the engine refused the request or failed" in str(caught.value)
    assert "/opt/engine" not in str(caught.value) and "requestId" not in str(caught.value)
    assert good.result()["usage"]["completion_tokens"] == 10
    assert "/opt/engine broke" in served.server.log.read_text()


def test_text_only_two_images_and_a_follow_up(served, native, files):
    for images, asked in forms(files):
        reading = served.read(images, **asked, **SHORT)
        assert reading["text"] == native(images, **asked, **SHORT).text
        table = served.asked()["inputs"].get("prompt_embedding_table")
        assert (table is None) == (not images)
        if images:
            assert table == ["bfloat16", [1, reading["usage"]["image_tokens"], 256]]


def test_sampling_reaches_the_engine(served, files):
    asked = {"max_new_tokens": 10, "temperature": 2.0, "top_p": 0.9, "repetition_penalty": 1.1}
    first, again, other = (served.read(files[:1], **asked, seed=seed)["text"] for seed in (5, 5, 2**40))
    assert first == again != other
    values = served.asked()["values"]
    assert values["temperature"] == [2.0] and values["seed"] == [2**40] and values["request_output_len"] == [10]
    assert values["runtime_top_p"] == pytest.approx([0.9]) and values["repetition_penalty"] == pytest.approx([1.1])
    unseeded = [served.read(files[:1], **asked) and served.asked()["values"]["seed"] for _ in range(2)]
    assert unseeded[0] != unseeded[1], "the engine's own default would draw the same for every request"
    served.read(files[:1], **SHORT)
    assert "seed" not in served.asked()["values"] and served.asked()["values"]["runtime_top_k"] == [1]


def test_stop_strings_end_the_text_and_the_engine(served, native, files):
    whole = native(files[:1], temperature=0.0).text
    stop = whole[len(whole) // 3 :][:6]
    before = len(served.log())
    reading = served.read(files[:1], temperature=0.0, stop=[stop])
    assert reading["text"] == whole[: whole.index(stop)]
    assert until(lambda: freed(served, before), 60)


def test_the_double_refuses_what_the_backend_refuses(served, caplog):
    """Its checks are what the other tests rest on."""
    from cxr_triton.engines.tensorrt_llm.backend import TensorRTLLMBackend, infer_request

    config = json.loads(next(served.server.repository.glob("decoder/1/bundle/tensorrt_llm/config.json")).read_text())
    model = config["pretrained_config"]
    scalar = {name: np.array([[value]], np.int32) for name, value in (("input_lengths", 5), ("request_output_len", 4))}
    good = {
        "input_ids": np.arange(20, 25, dtype=np.int32)[None],
        **scalar,
        "streaming": np.array([[True]]),
        "mrope_rotary_cos_sin": np.zeros(
            (1, model["max_position_embeddings"] * model["rotary_embedding_dim"]), np.float32
        ),
        "mrope_position_deltas": np.zeros((1, 1), np.int64),
        "runtime_top_k": np.ones((1, 1), np.int32),
    }
    table = {"prompt_embedding_table": np.zeros((1, 2, model["hidden_size"]), ml_dtypes.bfloat16)}
    long = {"input_ids": np.full((1, 2000), 20, np.int32), "input_lengths": np.array([[2000]], np.int32)}
    backend, heard = TensorRTLLMBackend(served.server.grpc), collections.defaultdict(list)
    try:
        for number, (change, refusal) in enumerate(
            (
                ({}, None),
                ({"mrope_rotary_cos_sin": None}, "missing tensor mrope"),
                ({"mrope_position_deltas": None}, "missing tensor mrope"),
                ({"mrope_rotary_cos_sin": good["mrope_rotary_cos_sin"][:, 2:]}, "elements, expected"),
                ({"input_ids": None}, "input_ids is not present"),
                ({"request_output_len": None}, "request_output_len is not present"),
                ({"seed": np.zeros((1, 1), np.int64)}, "seed"),  # by Triton
                (table | {"prompt_embedding_table": table["prompt_embedding_table"].astype(np.float32)}, "BF16"),
                ({"input_ids": good["input_ids"] + model["vocab_size"]}, "no token and no row"),
                ({"input_ids": good["input_ids"] - 19 + model["vocab_size"], **table}, "no token and no row"),
                (long, "exceeds maximum input length"),
                ({"prompt_embedding_table": np.zeros((1, 5000, model["hidden_size"]), ml_dtypes.bfloat16)}, "rows"),
            )
        ):
            tensors = {name: value for name, value in {**good, **change}.items() if value is not None}
            done = threading.Event()

            def hear(request_id, tokens, is_last, error, done=done):
                heard[request_id].append((tokens, error))
                if is_last:
                    done.set()

            backend.start(f"direct {number}", tensors, hear)
            assert done.wait(60), refusal
            assert (heard[f"direct {number}"][-1][1] is None) == (refusal is None)
            assert not refusal or refusal in caplog.text
            caplog.clear()
    finally:
        backend.close()
    assert sum(len(tokens) for tokens, _ in heard["direct 0"]) == 4
    unnamed = infer_request("", {**good, "stop": np.array([[True]])})
    message = next(served.stub.ModelStreamInfer(iter([unnamed]), timeout=30))
    assert "request ID is not provided" in message.error_message


@pytest.fixture(scope="module")
def plan_bundle(exported):
    folder = exported / "with-plan"
    return write_bundle(folder / "bundle", PHANTOM / "checkpoint", exported / "export", max_batch=4, plan=True)


def test_the_layout_for_a_gpu_streams_too(exported, plan_bundle, files, native, tmp_path):
    """Vision as a TensorRT plan that gives bf16 (a double too), and prefix reuse with ids of images."""
    for name in ("vision.onnx", "vision.onnx.data"):
        (plan_bundle.parent / name).write_bytes((exported / "export" / name).read_bytes())
    with serve(plan_bundle, tmp_path, prefix_reuse=True) as server:
        served = Served(server, tmp_path / "double.jsonl")
        ids = []
        for images in (files[:2], files[:2], files[1::-1]):
            reading = served.read(images, task="compare", **SHORT)
            assert reading["text"] == native(images, task="compare", **SHORT).text
            ids.append(served.asked()["extra_ids"])
        assert all(len(found) == 3 and found[0] == 0 for found in ids), "text, and one id for each of two images"
        assert ids[0] == ids[1] == ids[2], "an id is the image's, wherever it stands"


def test_the_generated_models_load_up_to_the_missing_backends(plan_bundle, tmp_path):
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    write_repository(plan_bundle, tmp_path / "repository", Settings(threads=1), unverified=True)
    server = Server(tmp_path / "repository", grpc_port=0, metrics_port=0, modified=True)
    with pytest.raises(InternalError) as caught, server:
        pass
    assert "unable to find backend library for backend 'tensorrtllm'" in caught.value.message
    assert "unable to find backend library for backend 'tensorrt'" in caught.value.message
    assert "deploy/README.md" in caught.value.message
    failed = set(re.findall(r"failed to load '(\w+)'", server.log.read_text()))
    assert failed == {"tensorrt_llm", "vision_encoder"}
