"""What one would use instead, in the same run: same images, prompts and numbers of tokens, round by round in turn.

A round is one reading through the served ensemble and then the same by each baseline, which runs in a process of its
own on the same cores. Speeds of a machine drift, so the medians of the rounds' ratios are what counts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

from cxr_triton.errors import InvalidRequest, unknown_key
from cxr_triton.perf.decoder import GenaiEngine, Process, build_genai
from cxr_triton.profile import ModelProfile

PACKAGES = {
    "transformers": ("torch", "transformers"),
    "genai": ("onnxruntime-genai", "onnxruntime"),
    "vllm": ("vllm", "torch"),
}
TITLES = {
    "transformers": "transformers.generate",
    "genai": "onnxruntime-genai int4, decoder only",
    "vllm": "vLLM",
}
MODULES = {"transformers": "transformers", "genai": "onnxruntime_genai", "vllm": "vllm"}


class Prompts:
    """The workload's requests as a baseline takes them; decoding of files is done before, and costs it nothing.

    Parameters
    ----------
    checkpoint : str
        Folder with tokenizer and template.
    profile : ModelProfile
    items : sequence of (list of bytes, dict)
        Image files and REQUEST of each.
    """

    def __init__(self, checkpoint: str, profile: ModelProfile, items: Sequence[tuple[list[bytes], dict]]):
        from PIL import Image

        from cxr_triton.chat import ChatTokenizer
        from cxr_triton.pixels.sandbox import Sandbox
        from cxr_triton.request import ReadRequest

        generation = Path(checkpoint) / "generation_config.json"
        self.profile = profile.merge_generation_config(json.loads(generation.read_text("utf-8")))
        self.tokenizer = ChatTokenizer(checkpoint)
        self.asked = [ReadRequest.from_json(json.dumps(request), self.profile) for _, request in items]
        whole = {"preset": profile.pixel_preset, "min_pixels": 1, "max_pixels": 2**31, "factor": 1}
        with Sandbox() as sandbox:
            self.pictures = [
                [Image.fromarray(sandbox.prepare(data, **whole).pixels).convert("RGB") for data in images]
                for images, _ in items
            ]


class TransformersEngine:
    """The models' own quick start: the processor, then `generate` in bf16, on the GPU if there is one."""

    def __init__(self, checkpoint: str, profile: ModelProfile, items):
        import torch
        from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

        self.torch, self.prompts = torch, Prompts(checkpoint, profile, items)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
        self.model = self.model.eval().to(self.device)
        self.ends = self.model.generation_config.eos_token_id
        self.model.generation_config = GenerationConfig()
        self.limits = {"shortest_edge": profile.min_pixels, "longest_edge": profile.max_pixels}
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        """One reading of so many tokens."""
        torch, prompts, arrived_s = self.torch, self.prompts, []

        class Streamer:
            def put(self, value):
                arrived_s.append(time.perf_counter())

            def end(self):
                pass

        asked, pictures, inputs, grids = prompts.asked[index], prompts.pictures[index], {}, []
        started_s = time.perf_counter()
        if pictures:
            inputs = dict(self.processor(images=pictures, size=self.limits, return_tensors="pt"))
            grids = [(rows, cols) for _, rows, cols in inputs["image_grid_thw"].tolist()]
            inputs["pixel_values"] = inputs["pixel_values"].to(self.device, torch.bfloat16)
            inputs["image_grid_thw"] = inputs["image_grid_thw"].to(self.device)
        encoded = prompts.tokenizer.encode(asked.messages(len(pictures)), grids)
        ids = torch.from_numpy(encoded.input_ids)[None].to(self.device)
        inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **inputs,
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                repetition_penalty=asked.repetition_penalty,
                eos_token_id=self.ends,
                pad_token_id=self.ends[0] if isinstance(self.ends, list) else self.ends,
                streamer=Streamer(),
            )
        seconds = time.perf_counter() - started_s
        # The prompt comes to the streamer first.
        return {
            "prompt_tokens": ids.shape[1],
            "tokens": out.shape[1] - ids.shape[1],
            "first_s": arrived_s[1] - started_s,
            "seconds": seconds,
        }


class GenaiDecoder(GenaiEngine):
    """onnxruntime-genai's own int4 build of the text decoder: prompt and answer of the same lengths, no images."""

    def __init__(self, folder: str):
        super().__init__(folder, 0, 0)

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        self.prompt, self.tokens = prompt_tokens, tokens
        rates = self.round()
        first_s = prompt_tokens / rates["prefill_tokens_per_s"]
        seconds = first_s + (tokens - 1) / rates["decode_tokens_per_s"]
        return {"prompt_tokens": prompt_tokens, "tokens": tokens, "first_s": first_s, "seconds": seconds}


class VllmEngine:
    """vLLM's offline engine in bf16; it has no time of the first token to give."""

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


def parse(values: Sequence[str]) -> dict[str, Path]:
    """``--baseline`` options ``NAME=CHECKPOINT``.

    Raises
    ------
    InvalidRequest
        An unknown name, or a folder that is not there.
    """
    found = {}
    for value in values:
        name, _, folder = value.partition("=")
        if name not in TITLES:
            raise InvalidRequest(unknown_key(name, TITLES, "--baseline").replace("key", "baseline", 1))
        if not Path(folder, "config.json").is_file() and not Path(folder, "genai_config.json").is_file():
            raise InvalidRequest(
                f"--baseline {value}: {folder or 'nothing'} is no checkpoint folder; give {name}=FOLDER"
            )
        found[name] = Path(folder).resolve()
    return found


def measure(
    url: str,
    items: Sequence[tuple[list[bytes], dict]],
    profile: ModelProfile,
    baselines: Mapping[str, Path],
    *,
    rounds: int = 3,
    on_round: Callable[[str], None] = lambda what: None,
) -> list[dict]:
    """`baselines` of docs/bench.schema.json.

    Parameters
    ----------
    url : str
        gRPC endpoint of the served ensemble.
    items : sequence of (list of bytes, dict)
        Image files and REQUEST of each request; a round takes the next one.
    profile : ModelProfile
        Of the bundle that is served.
    baselines : mapping
        ``transformers``, ``genai`` or ``vllm`` to the checkpoint's folder; that of genai may also be one that its
        builder wrote.
    rounds : int
        Counted ones; one more warms up.
    on_round : callable
        Told about each round before it begins.

    Returns
    -------
    list of dict
        An entry for each; one that is not installed says so in ``why``.
    """
    from cxr_triton.client import Reader

    entries, running = [], {}
    with ExitStack() as stack:
        # First the one that may have to be built, while no other model takes the memory that this needs.
        for name, folder in sorted(baselines.items(), key=lambda entry: entry[0] != "genai"):
            if importlib.util.find_spec(MODULES[name]) is None:
                why = f"{PACKAGES[name][0]} is not installed"
                entries.append({"name": TITLES[name], "ratio_output_tokens_per_s": None, "why": why})
                continue
            on_round(f"start {name}")
            running[name] = _start(name, folder, profile, items, stack)
        reader = stack.enter_context(Reader(url))
        told = {name: [] for name in running}
        for index in range(rounds + 1):
            item = index % len(items)
            on_round(f"baselines, {'warm-up' if not index else f'round {index}'}")
            ours = _ours(reader, *items[item])
            for name, process in running.items():
                theirs = process.call("read", item, ours["prompt_tokens"], ours["tokens"])
                if index:
                    told[name].append({"item": item, "ours": ours, "theirs": theirs})
        for name, process in running.items():
            entries.append(_entry(name, told[name], process.end()))
    return entries


def _start(name: str, folder: Path, profile: ModelProfile, items, stack: ExitStack) -> Process:
    cpus = sorted(os.sched_getaffinity(0))
    if name == "genai":
        if not (folder / "genai_config.json").exists():
            built = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genai")))
            build_genai(folder, built)
            folder = built
        process = Process(GenaiDecoder, cpus, str(folder))
    else:
        engine = TransformersEngine if name == "transformers" else VllmEngine
        process = Process(engine, cpus, str(folder), profile, list(items))
    stack.callback(process.kill)
    return process


def _ours(reader, images: list[bytes], request: dict) -> dict:
    """One reading through the server, as a client sees it."""
    started_s, first_s = time.perf_counter(), None
    stream = reader.read(images, **request)
    for delta in stream:
        if delta and first_s is None:
            first_s = time.perf_counter() - started_s
    reading = stream.result()
    seconds = time.perf_counter() - started_s
    return {
        "prompt_tokens": reading.usage["prompt_tokens"],
        "tokens": reading.usage["completion_tokens"],
        "first_s": first_s,
        "seconds": seconds,
        "decoder_s": (reading.timings_ms["prefill"] + reading.timings_ms["decode"]) / 1e3,
        "decode_s": reading.timings_ms["decode"] / 1e3,
    }


def _entry(name: str, rounds: Sequence[Mapping], facts: Mapping) -> dict:
    """Medians over the rounds; of a baseline that only decodes, our prefill and decoding stand beside its own."""
    scope = "decoder" if name == "genai" else "reading"
    ours_s = [each["ours"]["decoder_s" if scope == "decoder" else "seconds"] for each in rounds]
    theirs_s = [each["theirs"]["seconds"] for each in rounds]
    pairs = [(each["ours"], each["theirs"]) for each in rounds]
    rates = [(o["tokens"] / a, t["tokens"] / b) for (o, t), a, b in zip(pairs, ours_s, theirs_s, strict=True)]
    entry = {
        "name": TITLES[name],
        "scope": scope,
        "ratio_output_tokens_per_s": statistics.median(a / b for a, b in rates),
        "ours_output_tokens_per_s": statistics.median(a for a, _ in rates),
        "theirs_output_tokens_per_s": statistics.median(b for _, b in rates),
        "ratio_decode_tokens_per_s": None,
        "ratio_time_to_first_token": None,
        "same_prompt_tokens": all(o["prompt_tokens"] == t["prompt_tokens"] for o, t in pairs),
        "same_output_tokens": all(o["tokens"] == t["tokens"] for o, t in pairs),
        "versions": {package: metadata.version(package) for package in PACKAGES[name]},
        "peak_resident_bytes": facts["peak_resident_bytes"],
        "load_s": facts["load_s"],
        "rounds": list(rounds),
    }
    if all(t["first_s"] for _, t in pairs) and all(o["tokens"] > 1 and o["decode_s"] for o, _ in pairs):
        entry["ratio_decode_tokens_per_s"] = statistics.median(
            (t["seconds"] - t["first_s"]) / o["decode_s"] for o, t in pairs
        )
        if scope == "reading":  # what a user waits for: theirs over ours
            entry["ratio_time_to_first_token"] = statistics.median(t["first_s"] / o["first_s"] for o, t in pairs)
    return entry
