"""Held-out phantoms through the product's pixel pipeline and transformers in fp32: the share of exact label sets."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import click
import numpy as np

from cxr_triton import phantom
from cxr_triton.cli import Command
from cxr_triton.pixels import display, image
from cxr_triton.profile import ModelProfile, load_profile
from cxr_triton.reading import parse

HERE = Path(__file__).parent
HELD_OUT_SEED = 20_000  # training seeds are below 10,000


def held_out(count: int) -> list[phantom.Phantom]:
    rng = np.random.default_rng(HELD_OUT_SEED)
    return [phantom.draw(rng) for _ in range(count)]


def variant(index: int) -> tuple[str, str]:
    """Preset and photometric of the phantom at `index`: all four pairs, in turn."""
    return display.PRESETS[index % 2], phantom.PHOTOMETRICS[index // 2 % 2]


class Reference:
    """The checkpoint in transformers, fp32, greedy, with its own processor."""

    def __init__(self, checkpoint: Path = HERE / "checkpoint"):
        import torch
        from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.torch = torch
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def read(self, pictures: list[np.ndarray], prompt: str = phantom.DEFAULT_PROMPT) -> list[str]:
        """Answers to uint8 [rows, cols] pictures, in batches of one grid each."""
        from PIL import Image

        torch, groups = self.torch, defaultdict(list)
        for i, pixels in enumerate(pictures):
            inputs = self.processor(Image.fromarray(pixels), return_tensors="pt")
            groups[tuple(inputs["image_grid_thw"][0].tolist())].append((i, inputs["pixel_values"]))
        answers = [""] * len(pictures)
        for grid, members in groups.items():
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
            text = self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
            text = text.replace("<|image_pad|>", "<|image_pad|>" * (grid[1] * grid[2] // 4))
            ids = torch.tensor([self.tokenizer(text)["input_ids"]] * len(members))
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                    pixel_values=torch.cat([pixels for _, pixels in members]),
                    image_grid_thw=torch.tensor([grid] * len(members)),
                    max_new_tokens=256,
                )
            for (i, _), row in zip(members, out, strict=True):
                answers[i] = self.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
        return answers


def labels_of(answer: str, profile: ModelProfile) -> frozenset[str]:
    """Label set of an answer in the product's grammar; empty when it is malformed."""
    parsed = parse(
        answer,
        grammar="think_answer",
        answer="labels",
        labels=profile.labels,
        finish_reason="stop",
        image_sizes=[(1, 1)],
    )
    return frozenset(finding.label for finding in parsed.findings)


def score(said: list[frozenset[str]], drawn: list[frozenset[str]]) -> dict:
    """Share of exact label sets, mean intersection over union, and F1 of each label."""
    per_label = {}
    for label in (*phantom.LABELS, "No Finding"):
        both = sum(label in s and label in d for s, d in zip(said, drawn, strict=True))
        either = sum(label in s for s in said) + sum(label in d for d in drawn)
        per_label[label] = round(2 * both / either, 4) if either else None
    pairs = list(zip(said, drawn, strict=True))
    return {
        "phantoms": len(pairs),
        "exact": sum(s == d for s, d in pairs) / len(pairs),
        "iou": sum(len(s & d) / len(s | d) for s, d in pairs) / len(pairs),
        "f1": per_label,
    }


@click.command(cls=Command, extra="export")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=HERE / "checkpoint", show_default=True)
@click.option("--count", default=200, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the scores there.")
def main(checkpoint: Path, count: int, json_path: Path | None):
    """Score a checkpoint on held-out phantoms: label sets, and whole answers, which also name the sides."""
    profile, phantoms = load_profile(HERE / "profile.yaml"), held_out(count)
    pictures = [
        image.resize(p, image.target_size(*p.shape, min_pixels=profile.min_pixels, max_pixels=profile.max_pixels))
        for p in (source.picture(*variant(i)) for i, source in enumerate(phantoms))
    ]
    answers = Reference(checkpoint).read(pictures)
    scores = score([labels_of(answer, profile) for answer in answers], [frozenset(p.labels) for p in phantoms])
    scores["verbatim"] = sum(a == phantom.reading(p) for a, p in zip(answers, phantoms, strict=True)) / count
    click.echo(json.dumps(scores, indent=2))
    if json_path:
        json_path.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
