import time
from types import SimpleNamespace


class VLLMValidationError(Exception):
    """As in vLLM 0.32: no ValueError."""


class LLMEngine:
    def __init__(self, arguments):
        if arguments.model == "broken":
            raise RuntimeError("no such model")
        self.requests, self.step_s, self.loaded = {}, arguments.step_s, None
        self.backend = arguments.structured_outputs_config.backend

    @classmethod
    def from_engine_args(cls, arguments):
        return cls(arguments)

    def has_unfinished_requests(self):
        return bool(self.requests)

    def add_lora(self, lora_request):
        if lora_request.lora_path == "broken":
            raise ValueError("no such adapter")
        self.loaded = lora_request

    def add_request(self, request_id, prompt, params, lora_request=None):
        assert lora_request is self.loaded
        ids = prompt["prompt_token_ids"]
        if ids[0] == 91:
            raise VLLMValidationError("91 is refused")
        self.requests[request_id] = ([*ids], params, len(ids))

    def abort_request(self, request_ids):
        for request_id in request_ids:
            del self.requests[request_id]

    def step(self):
        time.sleep(self.step_s)
        outputs = []
        for request_id, (ids, params, prompt) in list(self.requests.items()):
            if ids[0] == 92:
                raise RuntimeError("92 breaks")
            guide = params.structured_outputs
            ids.append(ord(guide.grammar[-2]) - 33 if guide and self.backend == "guidance" else sum(ids[-2:]) % 90)
            is_last = ids[-1] in params.stop_token_ids or len(ids) - prompt == params.max_tokens
            answer = SimpleNamespace(token_ids=ids[-1:])
            outputs.append(
                SimpleNamespace(request_id=request_id, outputs=[answer], finished=is_last, num_cached_tokens=0)
            )
            if is_last:
                del self.requests[request_id]
        return outputs
