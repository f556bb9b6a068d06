"""The served model `decoder` inside a stand-in of Triton's Python backend: every request gets its final flag, once."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from fake_session import FakeSession, Letters, until

from cxr_triton.engines.runtime.drafts import Drafts
from cxr_triton.engines.runtime.prefix import PrefixCache
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.secret import SECRET, Seal
from cxr_triton.errors import QueueFull

ROOT = Path(__file__).resolve().parents[2]
FINAL = 1
KEY = "k" * 64
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Tensor:
    def __init__(self, name, value):
        self.name, self.value = name, value

    def as_numpy(self):
        return self.value


class Metric:
    def __init__(self, **_):
        self.value = 0

    def set(self, value):
        self.value = value

    def increment(self, by):
        self.value += by


class Family(Metric):
    GAUGE = COUNTER = None

    def Metric(self, labels):
        return Metric()


class Request:
    """Is its own response sender: keeps the COMPLETIONs that were sent, and when the final flag came."""

    def __init__(self, fails="", **inputs):
        self.inputs = {name: Tensor(name, value) for name, value in inputs.items()}
        self.completions, self.finals, self.sends, self.fails = [], 0, 0, fails

    def request_id(self):
        return f"00-{TRACE}-00f067aa0ba902b7-01"

    def get_response_sender(self):
        return self

    def is_cancelled(self):
        return False

    def send(self, response=None, flags=0):
        assert not self.finals, "a response after the last one"
        self.sends += 1
        if response is not None and self.fails == ("last" if flags else "first" if self.sends == 1 else "never"):
            raise RuntimeError("no shared memory is left")
        if response is not None:
            self.completions.append({tensor.name: tensor.value for tensor in response}["COMPLETION"][0].decode())
        self.finals += flags


@pytest.fixture
def decoder(monkeypatch):
    backend = ModuleType("triton_python_backend_utils")
    backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    backend.Tensor, backend.MetricFamily, backend.InferenceResponse = Tensor, Family, list
    backend.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    monkeypatch.setenv(SECRET, KEY)
    monkeypatch.delitem(sys.modules, "cxr_triton.triton_repo.adapter", raising=False)
    spec = importlib.util.spec_from_file_location("served_decoder", ROOT / "triton_repo/decoder/1/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    session = FakeSession()
    kept = {"prefix": PrefixCache(1 << 20), "drafts": Drafts(1 << 20)}
    runtime = DecoderRuntime(None, session=session, tokenizer=Letters(), prefill_chunk=16, **kept)
    monkeypatch.setattr(module, "Bundle", SimpleNamespace(open=lambda path: path))
    monkeypatch.setattr(module, "open_runtime", lambda bundle, values: runtime)
    inputs = [{"name": name, "data_type": "TYPE_FP32"} for name in module.INPUTS]
    config = {"parameters": {"bundle": {"string_value": "b"}}, "input": inputs}
    model = module.TritonPythonModel()
    model.initialize(
        {"model_instance_name": "decoder", "model_config": json.dumps(config), "model_repository": "/nowhere/decoder"}
    )
    yield model
    model.finalize()
    sys.modules.pop("cxr_triton.triton_repo.adapter", None)


def bytes_input(value: bytes):
    return np.array([value], object)


def request(sampling=None, fails="", **changed):
    context = json.dumps({"scoring": None, "sampling": {"max_new_tokens": 20, "eos_token_ids": [], **(sampling or {})}})
    inputs = {
        "INPUT_IDS": np.array([1, 2, 3]),
        "IMAGE_INDEX": np.array([-1, -1, -1]),
        "POSITION_IDS": np.tile(np.arange(3), (3, 1)),
        "IMAGE_EMBEDDINGS": np.zeros((1, 1, 4), np.float32),
        "CONTEXT": context,
        **changed,
    }
    if isinstance(inputs["CONTEXT"], str):
        prompt = [inputs[name] for name in ("INPUT_IDS", "IMAGE_INDEX", "POSITION_IDS")]
        inputs["CONTEXT"] = bytes_input(Seal("CONTEXT", KEY).close(inputs["CONTEXT"], *prompt).encode())
    return Request(fails, **inputs)


def ended(decoder, asked):
    decoder.execute([asked])
    until(lambda: asked.finals)
    last = asked.completions[-1] if asked.completions else ""
    return json.loads(Seal("COMPLETION", KEY).open(last)) if last else None


def serves(decoder):
    """The decoder still does what it is for."""
    return ended(decoder, request())["finish_reason"] == "length"


@pytest.mark.parametrize(
    "bad",
    [
        {"STOP": bytes_input(b"\xff")},
        {"STOP": np.array([], object)},
        {"CONTEXT": bytes_input(b"\xff\xfe")},
        {"CONTEXT": np.array([], object)},
        {"CONTEXT": bytes_input(b'{"sampling": {}}')},
        {"CONTEXT": "[" * 100_000},
        {"CONTEXT": "[]"},
        {"IMAGE_EMBEDDINGS": np.zeros((1, 1, 0), np.float32)},
        {"INPUT_IDS": np.array([], np.int64)},
        {"sampling": {"stop": [1]}},
        {"sampling": {"max_new_tokens": "5"}},
        {"sampling": {"eos_token_ids": [None]}},
    ],
    ids=str,
)
def test_what_is_wrong_with_a_request_ends_it_with_the_final_flag(decoder, bad):
    completion = ended(decoder, request(**bad))
    if "IMAGE_EMBEDDINGS" in bad:
        assert completion["error"].startswith("[INTERNAL]")
    else:
        assert completion["error"].startswith("[INVALID_REQUEST]")
    assert serves(decoder)


@pytest.mark.parametrize("fails", ["first", "last"])
def test_a_response_that_cannot_be_sent_ends_its_stream_with_the_final_flag(decoder, fails):
    asked = request(fails=fails)
    completion = ended(decoder, asked)
    assert asked.finals == FINAL
    assert completion is None if fails == "last" else completion["error"].startswith("[INTERNAL]")
    until(lambda: not decoder.runtime._streams)
    assert serves(decoder) and not decoder.streams


def test_the_log_names_the_trace_of_a_request_that_broke_it(decoder, caplog):
    bad = request(IMAGE_EMBEDDINGS=np.zeros((1, 1, 0), np.float32))
    assert ended(decoder, bad)["error"].startswith("[INTERNAL]")
    [line] = [record.getMessage() for record in caplog.records if "incident" in record.getMessage()]
    assert line.endswith(f"trace {TRACE}")
    bad = request(IMAGE_EMBEDDINGS=np.zeros((1, 1, 0), np.float32))
    bad.request_id = lambda: "4711\nERROR forged"
    ended(decoder, bad)
    assert [record.getMessage()[-14:] for record in caplog.records][-1] == " trace unknown"


def test_what_prompts_shared_is_counted_and_stands_in_the_usage(decoder):
    prompt = {
        "INPUT_IDS": np.arange(40),
        "IMAGE_INDEX": np.full(40, -1),
        "POSITION_IDS": np.tile(np.arange(40), (3, 1)),
    }
    cached = [ended(decoder, request(**prompt))["usage"]["cached_tokens"] for _ in range(3)]
    assert cached == [0, 32, 32]
    counted = {name: metric.value for name, metric in decoder.metrics.items() if name.startswith("prefix_")}
    assert counted.pop("prefix_bytes") == decoder.runtime.prefix.nbytes > 0
    assert counted == {
        "prefix_prompt_tokens_total": 120,
        "prefix_tokens_total": 64,
        "prefix_hits_total": 2,
        "prefix_evicted_total": 0,
    }


def test_what_was_guessed_is_counted(decoder, monkeypatch):
    monkeypatch.setattr(decoder.runtime.drafts.costs, "best", lambda streams, tokens: 2)
    monkeypatch.setattr(decoder.runtime.drafts.costs, "rest", lambda streams, seconds: 0)
    for _ in range(2):
        ended(decoder, request())
    counted = {name: metric.value for name, metric in decoder.metrics.items() if name.startswith("draft_")}
    counts = decoder.runtime.drafts.counts()
    assert counted == {f"draft_{name}_tokens_total": count for name, count in counts.items()}
    assert counts["drafted"] >= counts["accepted"] > 5
    assert decoder.metrics["steps_total"].value == decoder.runtime.steps < 2 * 19 - 5


def test_models_of_an_earlier_release_still_get_their_errors_typed(decoder, monkeypatch):
    """A repository keeps the models that it was packaged with; they call the adapter with the error alone."""
    adapter = sys.modules["cxr_triton.triton_repo.adapter"]
    monkeypatch.setattr(adapter.pb_utils, "TritonError", lambda text: text, raising=False)
    monkeypatch.setattr(adapter.pb_utils, "InferenceResponse", lambda error: error)
    assert adapter.error_response(QueueFull("full")) == "[QUEUE_FULL] full"
