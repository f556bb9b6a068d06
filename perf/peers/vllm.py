"""vLLM's offline engine."""

from __future__ import annotations

import os
import time

from cxr_triton.perf.peers.peer import Peer, Prompts
from cxr_triton.profile import ModelProfile


class Vllm(Peer):
    """In bf16; it has no time of the first token to give."""

    title = "vLLM"
    packages = ("vllm", "torch")
    module = "vllm"

    def __init__(self, checkpoint: str, profile: ModelProfile, items):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # it runs in a child already, which may have none
        from vllm import LLM

        self.prompts = Prompts(checkpoint, profile, items)
        self.model = LLM(
            model=checkpoint,
            dtype="bfloat16",
            max_model_len=profile.max_sequence,
            limit_mm_per_prompt={"image": profile.max_images},
            mm_processor_kwargs={"min_pixels": profile.min_pixels, "max_pixels": profile.max_pixels},
            enable_prefix_caching=False,
        )

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        from vllm import SamplingParams

        asked, pictures = self.prompts.asked[index], self.prompts.pictures[index]
        started_s = time.perf_counter()
        # vLLM puts as many image tokens as an image needs in the place of one: a grid of one token each.
        grids = [(2, 2)] * len(pictures)
        encoded = self.prompts.tokenizer.encode(asked.messages(len(pictures)), grids)
        request = {"prompt_token_ids": encoded.input_ids.tolist()}
        if pictures:
            request["multi_modal_data"] = {"image": pictures}
        sampling = SamplingParams(
            temperature=0.0, repetition_penalty=asked.repetition_penalty, min_tokens=tokens, max_tokens=tokens
        )
        (out,) = self.model.generate([request], sampling, use_tqdm=False)
        seconds = time.perf_counter() - started_s
        return {
            "prompt_tokens": len(out.prompt_token_ids),
            "tokens": len(out.outputs[0].token_ids),
            "first_s": None,
            "seconds": seconds,
        }


PEER = Vllm
