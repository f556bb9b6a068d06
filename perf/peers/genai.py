"""onnxruntime-genai's own build of the text decoder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxr_triton.engines.rewrite import step_bytes
from cxr_triton.errors import BuildFailed, InvalidRequest
from cxr_triton.files import new_folder
from cxr_triton.perf.peers.peer import Peer, told

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
        ids = np.random.default_rng(0).integers(0, self.vocab // 2, self.prompt)
        took = self.write([ids.tolist()], self.tokens)
        return {
            "prefill_tokens_per_s": self.prompt / took["first_s"],
            "decode_tokens_per_s": took["tokens_per_s"],
        }

    def write(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict:
        """See `Peer.write`; prompts of one length, as one batch."""
        parameters, length = self.library.GeneratorParams(self.model), len(prompts[0]) + tokens
        parameters.set_search_options(
            batch_size=len(prompts), max_length=length + 1, min_length=length, do_sample=False
        )
        generator = self.library.Generator(self.model, parameters)
        started_s, arrived_s = time.perf_counter(), []
        generator.append_tokens(np.asarray(prompts, np.int32))
        for _ in range(tokens):
            generator.generate_next_token()
            arrived_s.append(time.perf_counter())
        return told(started_s, [arrived_s] * len(prompts))


class Genai(GenaiEngine, Peer):
    """Prompt and answer of the same lengths as ours, without images."""

    title = "onnxruntime-genai int4, decoder only"
    packages = PACKAGES
    scope = "decoder"
    elsewhere = True
    variable = "CXR_GENAI_PYTHON"

    @classmethod
    def prepare(cls, checkpoint: Path, work: Path) -> Path:
        if (checkpoint / "genai_config.json").exists():
            return checkpoint
        if not (work / "genai").exists():
            with new_folder(work / "genai") as new:
                build_genai(checkpoint, new, cls.python())
        return work / "genai"

    @classmethod
    def step_bytes(cls, folder: Path, streams: int = 1) -> int:
        return step_bytes(folder / "model.onnx")

    def __init__(self, folder: str):
        super().__init__(folder, 0, 0)

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        self.prompt, self.tokens = prompt_tokens, tokens
        rates = self.round()
        first_s = prompt_tokens / rates["prefill_tokens_per_s"]
        seconds = first_s + ((tokens - 1) / rates["decode_tokens_per_s"] if tokens > 1 else 0.0)
        return {"prompt_tokens": prompt_tokens, "tokens": tokens, "first_s": first_s, "seconds": seconds}


def build_genai(checkpoint: Path, folder: Path, python: str = sys.executable) -> None:
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
        builder = (python, "-m", "onnxruntime_genai.models.builder")
        done = subprocess.run([*builder, "-m", text, "-o", str(folder), "-p", "int4", "-e", "cpu"], check=False)
    if done.returncode:
        raise BuildFailed(f"onnxruntime-genai's builder ends with {done.returncode} for {checkpoint}; see what it says")


PEER = Genai
