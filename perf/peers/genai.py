"""onnxruntime-genai's own build of the text decoder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from cxr_triton.errors import InvalidRequest
from cxr_triton.perf.peers.peer import Peer
from cxr_triton.profile import ModelProfile

PACKAGES = ("onnxruntime-genai", "onnxruntime")


class GenaiEngine:
    """A folder that `onnxruntime_genai.models.builder` wrote."""

    def __init__(self, folder: str, prompt: int, tokens: int):
        import onnxruntime_genai

        self.library, self.model = onnxruntime_genai, onnxruntime_genai.Model(folder)
        self.vocab = json.loads((Path(folder) / "genai_config.json").read_text())["model"]["vocab_size"]
        self.prompt, self.tokens = prompt, tokens

    def round(self) -> dict:
        """Tokens per second of prefill and decode."""
        parameters = self.library.GeneratorParams(self.model)
        parameters.set_search_options(
            max_length=self.prompt + self.tokens + 1, min_length=self.prompt + self.tokens, do_sample=False
        )
        generator = self.library.Generator(self.model, parameters)
        ids = np.random.default_rng(0).integers(0, self.vocab // 2, self.prompt).astype(np.int32)
        started_s = time.perf_counter()
        generator.append_tokens(ids[None])
        generator.generate_next_token()
        first_s = time.perf_counter()
        for _ in range(self.tokens - 1):
            generator.generate_next_token()
        ended_s = time.perf_counter()
        return {
            "prefill_tokens_per_s": self.prompt / (first_s - started_s),
            "decode_tokens_per_s": (self.tokens - 1) / (ended_s - first_s),
        }


class Genai(GenaiEngine, Peer):
    """Prompt and answer of the same lengths as ours, without images."""

    title = "onnxruntime-genai int4, decoder only"
    packages = PACKAGES
    module = "onnxruntime_genai"
    scope = "decoder"

    @staticmethod
    def prepare(folder: Path, stack: ExitStack) -> Path:
        if (folder / "genai_config.json").exists():
            return folder
        built = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genai")))
        build_genai(folder, built)
        return built

    def __init__(self, folder: str, profile: ModelProfile, items: Sequence):
        super().__init__(folder, 0, 0)

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        self.prompt, self.tokens = prompt_tokens, tokens
        rates = self.round()
        first_s = prompt_tokens / rates["prefill_tokens_per_s"]
        seconds = first_s + (tokens - 1) / rates["decode_tokens_per_s"]
        return {"prompt_tokens": prompt_tokens, "tokens": tokens, "first_s": first_s, "seconds": seconds}


def build_genai(checkpoint: Path, folder: Path) -> None:
    """The text decoder of a flat checkpoint by onnxruntime-genai's builder, with its default int4.

    It is given as Qwen2 (the same layers with the same weights), whose attention the builder fuses.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    if "text_config" in config:
        raise InvalidRequest(f"{checkpoint} has a nested config; --checkpoint takes a flat one, as perf.shape writes")
    vision = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = {key: value for key, value in config.items() if key not in (*vision, "rope_scaling")}
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    with tempfile.TemporaryDirectory() as text:
        for file in checkpoint.iterdir():
            (Path(text) / file.name).symlink_to(file.resolve())
        (Path(text) / "config.json").unlink()
        (Path(text) / "config.json").write_text(json.dumps(config))
        builder = (sys.executable, "-m", "onnxruntime_genai.models.builder")
        subprocess.run([*builder, "-m", text, "-o", str(folder), "-p", "int4", "-e", "cpu"], check=True)


PEER = Genai
