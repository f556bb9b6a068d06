"""The models' own quick start."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from cxr_triton.perf.peers.peer import Peer, Prompts, told
from cxr_triton.profile import ModelProfile


class Transformers(Peer):
    """The processor, then `generate` in bf16, on the GPU if there is one."""

    title = "transformers.generate"
    packages = ("transformers", "torch")

    def __init__(self, checkpoint: str, profile: ModelProfile, items):
        import torch
        from transformers import GenerationConfig, Qwen2VLImageProcessorPil

        from cxr_triton.export.checkpoint import torch_model

        self.torch, self.prompts = torch, Prompts(checkpoint, profile, items)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.model = torch_model(checkpoint, torch.bfloat16).to(self.device)
        self.ends = self.model.generation_config.eos_token_id
        self.model.generation_config = GenerationConfig()
        self.limits = {"shortest_edge": profile.min_pixels, "longest_edge": profile.max_pixels}
        self.generate: Callable = self.model.generate
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def write(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict:
        started_s = time.perf_counter()
        _, arrived_s = self._generate(self.torch.tensor(prompts, device=self.device), tokens, 1.0)
        return told(started_s, [arrived_s] * len(prompts))

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        torch, prompts = self.torch, self.prompts
        asked, pictures, inputs, grids = prompts.asked[index], prompts.pictures[index], {}, []
        started_s = time.perf_counter()
        if pictures:
            inputs = dict(self.processor(images=pictures, size=self.limits, return_tensors="pt"))
            grids = [(rows, cols) for _, rows, cols in inputs["image_grid_thw"].tolist()]
            inputs["pixel_values"] = inputs["pixel_values"].to(self.device, torch.bfloat16)
            inputs["image_grid_thw"] = inputs["image_grid_thw"].to(self.device)
        encoded = prompts.tokenizer.encode(asked.messages(len(pictures)), grids)
        ids = torch.from_numpy(encoded.input_ids)[None].to(self.device)
        out, arrived_s = self._generate(ids, tokens, asked.repetition_penalty, **inputs)
        return {
            "prompt_tokens": ids.shape[1],
            "tokens": out.shape[1] - ids.shape[1],
            "first_s": arrived_s[0] - started_s,
            "seconds": time.perf_counter() - started_s,
        }

    def _generate(self, ids, tokens: int, repetition_penalty: float, **inputs):
        """Prompts and so many tokens each, and when a token of each had come."""
        arrived_s: list[float] = []

        class Streamer:
            def put(self, value):
                arrived_s.append(time.perf_counter())

            def end(self):
                pass

        with self.torch.inference_mode():
            out = self.generate(
                input_ids=ids,
                attention_mask=self.torch.ones_like(ids),
                mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                **inputs,
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                repetition_penalty=repetition_penalty,
                eos_token_id=self.ends,
                pad_token_id=self.ends[0] if isinstance(self.ends, list) else self.ends,
                streamer=Streamer(),
            )
        return out, arrived_s[1:]  # the prompt comes to the streamer first


PEER = Transformers
