"""Contract double of the `tensorrtllm` backend: its tensors, its checks, and tokens from the independent reader.

Test code. What it declares and refuses comes from the tables of TensorRT-LLM's Triton backend (`config.pbtxt`,
`utils.cc`, `model_instance_state.cc`, `llmRequest.h`, `runtimeBuffers.cpp`), and shares nothing with the package.
"""

import collections
import json
import os
import queue
import sys
import threading
import time

import ml_dtypes
import numpy as np
import torch
import triton_python_backend_utils as pb_utils

FAILING_SEED = 666  # an engine that fails in the middle of an answer
ENDLESS_SEED = 777  # an answer that ends by a stop alone, however slow the machine that asks for it
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
SCALAR = "scalar"
INPUTS = {
    "input_ids": ("TYPE_INT32", [-1]),
    "input_lengths": ("TYPE_INT32", SCALAR),
    "request_output_len": ("TYPE_INT32", SCALAR),
    "end_id": ("TYPE_INT32", SCALAR),
    "pad_id": ("TYPE_INT32", SCALAR),
    "stop_words_list": ("TYPE_INT32", [2, -1]),
    "temperature": ("TYPE_FP32", SCALAR),
    "runtime_top_k": ("TYPE_INT32", SCALAR),
    "runtime_top_p": ("TYPE_FP32", SCALAR),
    "repetition_penalty": ("TYPE_FP32", SCALAR),
    "seed": ("TYPE_UINT64", SCALAR),
    "stop": ("TYPE_BOOL", SCALAR),
    "streaming": ("TYPE_BOOL", SCALAR),
    "prompt_embedding_table": (None, [-1, -1]),
    "prompt_table_extra_ids": ("TYPE_UINT64", [-1]),
    "mrope_rotary_cos_sin": ("TYPE_FP32", [-1]),
    "mrope_position_deltas": ("TYPE_INT64", [1]),
}
OUTPUTS = {"output_ids": ("TYPE_INT32", [-1, -1]), "sequence_length": ("TYPE_INT32", [-1])}
REQUIRED = {"input_lengths", "request_output_len"}
RAGGED = {"input_ids", "prompt_embedding_table", "prompt_table_extra_ids"}
TYPES = {"bfloat16": "TYPE_BF16", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}
ON_HOST = set(INPUTS) - {"prompt_embedding_table", "mrope_rotary_cos_sin"}


class Request:
    def __init__(self, request, inputs, limit):
        self.id, self.sender, self.inputs = request.request_id(), request.get_response_sender(), inputs
        self.limit = limit
        self.stream = None
        self.tokens = []
        self.cancelled = False
        self.generator = torch.Generator().manual_seed(int(self.scalar("seed", 0)) % (1 << 63))

    def scalar(self, name, default=None):
        return self.inputs[name].reshape(-1)[0] if name in self.inputs else default


class TritonPythonModel:
    def initialize(self, args):
        torch.set_num_threads(1)
        self.config = json.loads(args["model_config"])
        folder = self.parameter("gpt_model_path")
        if not os.path.isfile(f"{folder}/rank0.engine"):
            raise RuntimeError(f"Decoder (GPT) model path at {folder} does not exist.")
        with open(f"{folder}/config.json") as file:
            engine = json.load(file)
        self.model, self.build = engine["pretrained_config"], engine["build_config"]
        self.check_config()
        weights = self.parameter("double_weights")
        sys.path.insert(0, self.parameter("double_tests"))
        from tensorrt_llm_reader import Decoder, Stream

        self.decoder, self.open_stream = Decoder(type(self).path(weights)), Stream
        self.decoder.config["dtype"] = self.model["dtype"]
        self.step_s = float(self.config["parameters"].get("double_step_s", {"string_value": "0"})["string_value"])
        self.log_file = open(self.parameter("double_log"), "a", buffering=1)  # noqa: SIM115 (as long as the model)
        self.inbox = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    @staticmethod
    def path(text):
        from pathlib import Path

        return Path(text)

    def parameter(self, name):
        """As the backend reads one without a default: missing is an error, empty is not."""
        if name not in self.config["parameters"]:
            raise RuntimeError(f"Cannot find parameter with name: {name}")
        return self.config["parameters"][name]["string_value"]

    def flag(self, name, default):
        value = self.config["parameters"].get(name, {}).get("string_value", str(default)).lower()
        assert value in ("true", "false", "1", "0"), f"Cannot convert {value} to a boolean."
        return value in ("true", "1")

    def check_config(self):
        """The generated `config.pbtxt` declares what the backend knows, as the backend knows it."""
        assert self.parameter("gpt_model_type") in ("inflight_fused_batching", "inflight_batching", "V1")
        for name in ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend"):
            self.parameter(name)
        assert self.config["model_transaction_policy"]["decoupled"], "Streaming is only supported in decoupled mode"
        assert "dynamic_batching" in self.config
        assert 1 <= self.config["max_batch_size"] <= self.build["max_batch_size"]
        assert self.flag("exclude_input_in_output", False), "a stream would begin with the prompt"
        self.reuse = self.flag("enable_kv_cache_reuse", True)
        assert not self.flag("enable_chunked_context", False)
        for declared, known in ((self.config["input"], INPUTS), (self.config["output"], OUTPUTS)):
            for tensor in declared:
                kind, dims = known[tensor["name"]]  # KeyError: the backend has no such tensor
                assert tensor["data_type"] == (kind or TYPES[self.model["dtype"]]), tensor
                assert [int(d) for d in tensor["dims"]] == ([1] if dims == SCALAR else dims), tensor
                if known is INPUTS:
                    assert ("reshape" in tensor) == (dims == SCALAR), tensor
                    assert tensor["optional"] != (tensor["name"] in REQUIRED), tensor
                    assert tensor["allow_ragged_batch"] == (tensor["name"] in RAGGED), tensor
        assert {tensor["name"] for tensor in self.config["output"]} == set(OUTPUTS)

    def execute(self, requests):
        for request in requests:
            self.inbox.put(request)

    def finalize(self):
        self.inbox.put(None)
        self.thread.join()

    # Everything below runs in one thread, which is also the only one that sends.

    def run(self):
        waiting, active = collections.deque(), []
        while True:
            while not self.inbox.empty() or not (waiting or active):
                request = self.inbox.get()
                if request is None:
                    return
                self.receive(request, waiting, active)
                del request
            while waiting and len(active) < self.build["max_batch_size"]:
                active.append(waiting.popleft())
            self.log(active=len(active))
            for request in list(active):
                try:
                    ended = self.advance(request)
                except Exception as error:
                    self.fail(request, repr(error))
                    ended = True
                if ended:
                    active.remove(request)
            time.sleep(self.step_s)

    def log(self, **values):
        self.log_file.write(json.dumps(values) + "\n")

    def receive(self, request, waiting, active):
        sender = request.get_response_sender()
        try:
            inputs = self.read(request)
            if inputs.get("stop", np.zeros(1)).reshape(-1)[0]:
                if not request.request_id():
                    raise RuntimeError("Trying to stop a request but request ID is not provided")
                known = [other for other in (*waiting, *active) if other.id == request.request_id()]
                self.log(stop=request.request_id(), known=len(known))
                for other in known:
                    other.cancelled = True
                sender.send(flags=FINAL)
                return
            if not set(OUTPUTS) <= set(request.requested_output_names()):
                raise RuntimeError("output_ids and sequence_length must be present in list of output tensors")
            waiting.append(Request(request, inputs, self.check(inputs)))
            self.log(
                id=request.request_id(),
                inputs={name: [str(value.dtype), list(value.shape)] for name, value in inputs.items()},
                values={name: value.ravel().tolist() for name, value in inputs.items() if value.size <= 4},
                extra_ids=sorted({int(i) for i in inputs.get("prompt_table_extra_ids", np.zeros(1)).ravel()}),
            )
        except Exception as error:
            self.log(refused=str(error))
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))), flags=FINAL)

    def read(self, request):
        """Inputs as arrays. The backend reads scalars and ids on the host."""
        inputs = {}
        for tensor in request.inputs():
            if tensor.name() in ON_HOST and not tensor.is_cpu():
                raise RuntimeError(f"{tensor.name()} is not in host memory")
            if INPUTS[tensor.name()][1] == SCALAR:
                if tuple(tensor.shape()) != (1,):
                    raise RuntimeError(f"{tensor.name()} is not one value for one sequence")
                inputs[tensor.name()] = tensor.as_numpy().reshape(1, 1)
            elif tensor.name() == "prompt_embedding_table" and self.model["dtype"] == "bfloat16":
                words = torch.from_dlpack(tensor.to_dlpack()).view(torch.int16).clone().numpy()
                inputs[tensor.name()] = words.view(ml_dtypes.bfloat16)
            else:
                inputs[tensor.name()] = tensor.as_numpy().copy()
        return inputs

    def check(self, inputs):
        """What the executor checks of a request, and the number of tokens that it may generate."""
        model, build = self.model, self.build
        for name in ("input_ids", "request_output_len"):
            if name not in inputs:
                raise RuntimeError(f"{name} is not present in the request")
        length, count = inputs["input_ids"].size, int(inputs["request_output_len"].reshape(-1)[0])
        if inputs["input_ids"].shape[0] != 1 or int(inputs["input_lengths"].reshape(-1)[0]) != length:
            raise RuntimeError("one sequence for each request, and its length")
        if "mrope_rotary_cos_sin" not in inputs or "mrope_position_deltas" not in inputs:
            raise RuntimeError("missing tensor mrope_rotary_sin_cos")  # bad optional access
        if (got := inputs["mrope_rotary_cos_sin"].size) != (
            wanted := model["max_position_embeddings"] * model["rotary_embedding_dim"]
        ):
            raise RuntimeError(f"mrope_rotary_cos_sin has {got} elements, expected {wanted}")
        longest = min(build["max_seq_len"] - 1, build["max_num_tokens"])
        if length > longest:
            raise RuntimeError(f"Prompt length ({length}) exceeds maximum input length ({longest})")
        table, rows = inputs.get("prompt_embedding_table"), 0
        if table is not None:
            if table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != model["hidden_size"]:
                raise RuntimeError("Unexpected prompt tensor shape")
            if (rows := table.shape[1]) > build["max_prompt_embedding_table_size"] // build["max_batch_size"]:
                raise RuntimeError(f"{rows} rows are more than the prompt table holds")
            extra = inputs.get("prompt_table_extra_ids")
            if extra is not None and extra.size != length:
                inputs.pop("prompt_table_extra_ids")  # dropped without a word
            if self.reuse and "prompt_table_extra_ids" not in inputs:
                raise RuntimeError("Input token extra ids must be provided when enabling kv cache reuse")
        ids = inputs["input_ids"].reshape(-1)
        if ids.min() < 0 or ids.max() >= model["vocab_size"] + rows:  # the engine would read beyond its tables
            raise RuntimeError(f"id {ids.max()} is no token and no row of the prompt table")
        seed = inputs.get("seed")
        if seed is not None and seed.dtype != np.uint64:
            raise RuntimeError("seed is not UINT64")
        return min(count, build["max_seq_len"] - length)

    def advance(self, request):
        """One step of a request; whether it was the last."""
        if request.cancelled:
            self.log(freed=request.id, tokens=len(request.tokens))
            self.send(request, [], True)
            return True
        if request.scalar("seed") == FAILING_SEED and len(request.tokens) == 3:
            raise RuntimeError("/opt/engine broke")
        if request.scalar("seed") == ENDLESS_SEED and len(request.tokens) == 3:
            return False
        if request.stream is None:
            with torch.no_grad():
                request.stream = self.open_stream(self.decoder, request.inputs)
        else:
            with torch.no_grad():
                request.stream.append(request.tokens[-1])
        token = self.choose(request)
        request.tokens.append(token)
        if "end_id" in request.inputs and token == request.scalar("end_id"):  # not counted, not given
            self.send(request, [], True)
            return True
        is_last = token in self.stop_words(request) or len(request.tokens) == request.limit
        self.send(request, [token], is_last)
        return is_last

    def fail(self, request, why):
        text = f"Executor failed process requestId {request.id} due to the following error: {why}"
        self.log(failed=text)
        request.sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(text)), flags=FINAL)

    def stop_words(self, request):
        """Of one token each, all that a test needs."""
        words = request.inputs.get("stop_words_list")
        return [] if words is None else words[0, 0].tolist()

    def choose(self, request):
        logits = request.stream.logits.clone()
        penalty = float(request.scalar("repetition_penalty", 1.0))
        if penalty != 1:
            prompt = request.inputs["input_ids"].reshape(-1).tolist()
            seen = torch.tensor(sorted({i for i in prompt if i < len(logits)} | set(request.tokens)))
            logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        if int(request.scalar("runtime_top_k", 0)) == 1:
            return int(logits.argmax())
        chances = (logits / float(request.scalar("temperature", 1.0))).softmax(-1)
        ordered, order = chances.sort(descending=True)
        kept = ordered.cumsum(0) - ordered < float(request.scalar("runtime_top_p", 1.0))
        return int(order[torch.multinomial(ordered * kept, 1, generator=request.generator)])

    def send(self, request, tokens, is_last):
        outputs = [
            pb_utils.Tensor("output_ids", np.array(tokens, np.int32).reshape(1, 1, -1)),
            pb_utils.Tensor("sequence_length", np.array([[len(tokens)]], np.int32)),
        ]
        request.sender.send(pb_utils.InferenceResponse(outputs), flags=FINAL if is_last else 0)
