"""OpenVINO GenAI on optimum-intel's export of a checkpoint in int4: its continuous batching, pictures too.

Its Python need not be ours, see `Peer`.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxr_triton.errors import BuildFailed, InvalidRequest
from cxr_triton.files import new_folder
from cxr_triton.perf.peers.peer import Peer, told

WORD = " a"  # its pipeline for pictures takes no token ids
CACHE_GIB = 1
MOST_TOKENS = 4096  # of a step, so that no prompt is split
TAIL_CHARS = 500


class OpenVINOGenai(Peer):
    """Greedy; prompts are a word again and again, and nothing of them is kept."""

    title = "openvino-genai int4"
    packages = ("openvino-genai", "openvino", "optimum-intel", "nncf", "transformers")
    variable = "CXR_OPENVINO_GENAI_PYTHON"
    elsewhere = True

    @classmethod
    def prepare(cls, checkpoint: Path, work: Path) -> Path:
        folder = work / "openvino-genai"
        if not folder.exists():
            options = ("--model", str(checkpoint), "--task", "image-text-to-text", "--weight-format", "int4")
            command = [
                cls.python(),
                "-c",
                "from optimum.commands.optimum_cli import main; main()",
                "export",
                "openvino",
            ]
            with new_folder(folder) as new:
                done = subprocess.run([*command, *options, str(new)], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise BuildFailed(
                        f"optimum-intel's export ends with {done.returncode}: {done.stderr[-TAIL_CHARS:]}"
                    )
        return folder

    @classmethod
    def step_bytes(cls, folder: Path, streams: int = 1) -> int:
        return (folder / "openvino_language_model.bin").stat().st_size

    def __init__(self, folder: str, items: Sequence[tuple[list[tuple[tuple[int, int, int], bytes]], str]]):
        import openvino
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens = CACHE_GIB, MOST_TOKENS
        scheduler.enable_prefix_caching = False
        threads = {"INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", threads)
        self.config = openvino_genai.GenerationConfig
        self.asked = [
            ([openvino.Tensor(np.frombuffer(data, np.uint8).reshape(shape).copy()) for shape, data in pictures], text)
            for pictures, text in items
        ]

    def write(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict:
        text = WORD * len(prompts[0])
        if (length := self.pipeline.get_tokenizer().encode(text).input_ids.shape[1]) != len(prompts[0]):
            raise InvalidRequest(f"its tokenizer makes {length} tokens of {len(prompts[0])} words {WORD!r}")
        started_s = time.perf_counter()
        handles = [self.pipeline.add_request(at, text, [], self._config(tokens)) for at, _ in enumerate(prompts)]
        arrivals: list[list[float]] = [[] for _ in prompts]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for stream, handle in enumerate(handles):
                if handle.can_read():
                    written = sum(len(each.generated_ids) for each in handle.read().values())
                    arrivals[stream] += [time.perf_counter()] * written
        return told(started_s, arrivals)

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        pictures, text = self.asked[index]
        started_s = time.perf_counter()
        (done,) = self.pipeline.generate([text], images=[pictures], generation_config=[self._config(tokens)])
        seconds = time.perf_counter() - started_s
        metrics = done.perf_metrics
        return {
            "prompt_tokens": metrics.get_num_input_tokens(),
            "tokens": metrics.get_num_generated_tokens(),
            "first_s": metrics.get_ttft().mean / 1e3,
            "seconds": seconds,
        }

    def _config(self, tokens: int):
        config = self.config()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        return config


PEER = OpenVINOGenai
