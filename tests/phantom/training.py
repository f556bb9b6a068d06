"""Train the demonstration model on synthetic phantoms, and write it as a Hugging Face checkpoint.

Stage 1 teaches the vision tower which finding lies under each token, which a phantom knows; stage 2 teaches the decoder
NV-Reason's answer grammar on the finished tower. Without stage 1 the decoder learns the grammar and never looks at the
picture, and labels of the whole picture alone never made the tower see small findings (opacities, lines).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from cxr_triton import phantom
from cxr_triton.pixels import display, image

MIN_PIXELS, MAX_PIXELS = 56 * 56, 224 * 224
VOCAB = 640
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for turn in messages -%}
{{- '<|im_start|>' + turn.role + '\\n' -}}
{%- if turn.content is string -%}
{{- turn.content -}}
{%- else -%}
{%- for part in turn.content -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

MODEL_CARD = """\
---
license: apache-2.0
tags: [test-fixture, synthetic-data]
---
# Phantom reader

A test fixture of cxr-triton. It was trained on synthetic phantoms alone (ellipses and lines drawn from a seed) and
**knows nothing about people: what it says about a real radiograph is meaningless.** Not for diagnosis, nor for research
on radiographs.

Qwen2.5-VL architecture, 3.7 M parameters, bf16, a vocabulary of its own. It answers
`Find abnormalities and support devices.` with `<think> ... </think>` and `<answer> label, label </answer>`, and the
follow-ups `Provide differentials` and `Write a structured report` with prose. It reads the labels; the side that its
reasoning names is a guess. How it was trained, and how to train it again: `tests/phantom/README.md` in the repository.
"""


@dataclass
class Sample:
    """A phantom and one picture of it, resized for the model."""

    phantom: phantom.Phantom
    pixels: np.ndarray  # uint8 [h, w]
    token_labels: np.ndarray  # bool [tokens, labels]


def picture(source: phantom.Phantom, rng: np.random.Generator) -> np.ndarray:
    """uint8 [h, w]: a random preset and photometric, now and then JPEG, through the product's resize."""
    pixels = source.picture(str(rng.choice(display.PRESETS)), str(rng.choice(phantom.PHOTOMETRICS)))
    if rng.random() < 0.2:
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(60, 96)))
        pixels = np.asarray(Image.open(buffer))
    return image.resize(pixels, image.target_size(*pixels.shape, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS))


def token_labels(source: phantom.Phantom, size: tuple[int, int]) -> np.ndarray:
    """bool [tokens, labels]: the finding covers at least 4 % of the token's 28x28 pixels."""
    rows, cols = size[0] // 28, size[1] // 28
    labels = np.zeros((rows * cols, len(phantom.LABELS)), bool)
    for label, mask in source.masks.items():
        cover = Image.fromarray(mask.astype(np.uint8) * 255).resize((cols, rows), Image.Resampling.BOX)
        labels[:, phantom.LABELS.index(label)] = np.asarray(cover).reshape(-1) > 0.04 * 255
    return labels


def draw_samples(seed: int, count: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count // 2):  # two pictures of each phantom: drawing costs more than displaying
        source = phantom.draw(rng)
        pictures = picture(source, rng), picture(source, rng)
        labels = token_labels(source, pictures[0].shape)
        source = phantom.Phantom(np.empty(0, np.uint16), source.bits_stored, None, source.findings, {})
        samples += [Sample(source, pixels, labels) for pixels in pictures]
    return samples


def patches(pixels: np.ndarray) -> np.ndarray:
    """float32 [patches, 1176] of a gray picture, as the Hugging Face processor orders and normalizes them."""
    rows, cols = image.grid(*pixels.shape)
    scaled = (pixels[None] / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    frames = np.stack([scaled, scaled]).astype(np.float32)  # [2, 3, h, w]
    split = frames.reshape(2, 3, rows // 2, 2, 14, cols // 2, 2, 14)
    return split.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * cols, -1)


def pixel_batch(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.from_numpy(np.concatenate([patches(sample.pixels) for sample in samples]))
    return pixels, torch.tensor([[1, *image.grid(*sample.pixels.shape)] for sample in samples])


def train_tokenizer(samples: list[Sample]) -> Tokenizer:
    corpus = [
        text
        for s in samples[::7]
        for text in (phantom.reading(s.phantom), phantom.report(s.phantom), phantom.differentials(s.phantom))
    ]
    corpus += [
        phantom.DEFAULT_PROMPT,
        *phantom.FOLLOW_UPS,
        "You are a helpful assistant.",
        "system\n",
        "user\n",
        "assistant\n",
    ] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def build_model(ids: dict[str, int]) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 2,
        "out_hidden_size": 256,
        "fullatt_block_indexes": [1, 3],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def batches(samples: list[Sample], size: int, rng: np.random.Generator) -> Iterator[list[Sample]]:
    while True:
        order = rng.permutation(len(samples))
        for start in range(0, len(order) - size + 1, size):
            yield [samples[i] for i in order[start : start + size]]


class Progress:
    """A line now and then: step, smoothed loss, seconds."""

    def __init__(self, stage: str, steps: int):
        self.stage, self.steps, self.start_s, self.loss = stage, steps, time.monotonic(), None

    def __call__(self, step: int, loss: float, note: str = ""):
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        if step % 50 == 0 or step == self.steps - 1:
            seconds = time.monotonic() - self.start_s
            click.echo(f"{self.stage} {step + 1}/{self.steps} loss {self.loss:.4f} {note} {seconds:.0f} s")


def train_vision(model, samples: list[Sample], steps: int, rng: np.random.Generator) -> None:
    """Vision tower with a linear head that says which findings lie under each token."""
    tower = model.model.visual
    head = torch.nn.Linear(256, len(phantom.LABELS))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.15)
    progress, exact = Progress("vision", steps), 0.0
    for step, batch in zip(range(steps), batches(samples, 32, rng), strict=False):
        pixels, grids = pixel_batch(batch)
        logits = head(tower(pixels, grid_thw=grids).pooler_output)
        target = torch.from_numpy(np.concatenate([s.token_labels for s in batch])).float()
        loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor(5.0))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        counts = (grids.prod(1) // 4).tolist()
        said = torch.stack([t.amax(0) > 1 for t in logits.detach().split(counts)])
        drawn = torch.stack([t.amax(0) > 0 for t in target.split(counts)])
        exact = 0.95 * exact + 0.05 * (said == drawn).all(1).float().mean().item()
        progress(step, loss.item(), f"exact {exact:.3f}")


class Dialogues:
    """Samples to token ids: the default question, and for some a follow-up turn."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids = tokenizer, {token: tokenizer.token_to_id(token) for token in SPECIAL}

    def encode(self, sample: Sample, follow_up: str | None) -> tuple[list[int], list[int]]:
        """Ids, and labels that are −100 outside the assistant's turns."""
        rows, cols = image.grid(*sample.pixels.shape)
        pads = "<|image_pad|>" * (rows * cols // 4)
        turns = [(f"<|vision_start|>{pads}<|vision_end|>{phantom.DEFAULT_PROMPT}", phantom.reading(sample.phantom))]
        if follow_up:
            turns.append((follow_up, phantom.FOLLOW_UPS[follow_up](sample.phantom)))
        ids = self.tokenizer.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n").ids
        labels = [-100] * len(ids)
        for question, answer in turns:
            prompt = self.tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids
            said = [*self.tokenizer.encode(answer).ids, self.ids["<|im_end|>"]]
            end = self.tokenizer.encode("\n").ids
            ids += prompt + said + end
            labels += [-100] * len(prompt) + said + [-100] * len(end)
        return ids, labels

    def batch(self, samples: list[Sample], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        ask = [str(rng.choice(list(phantom.FOLLOW_UPS))) if rng.random() < 0.2 else None for _ in samples]
        encoded = [self.encode(sample, follow_up) for sample, follow_up in zip(samples, ask, strict=True)]
        longest = max(len(ids) for ids, _ in encoded)
        pad = self.ids["<|endoftext|>"]
        ids = torch.tensor([i + [pad] * (longest - len(i)) for i, _ in encoded])
        pixels, grids = pixel_batch(samples)
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in encoded]),
            "labels": torch.tensor([la + [-100] * (longest - len(la)) for _, la in encoded]),
            "mm_token_type_ids": (ids == self.ids["<|image_pad|>"]).int(),
            "pixel_values": pixels,
            "image_grid_thw": grids,
        }


def train_answers(model, dialogues: Dialogues, samples: list[Sample], steps: int, rng, save) -> None:
    """Decoder on the frozen tower, which already says all that the answers need."""
    model.model.visual.requires_grad_(False)
    decoder = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(decoder, lr=1.5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    progress = Progress("answers", steps)
    for step, batch in zip(range(steps), batches(samples, 16, rng), strict=False):
        loss = model(**dialogues.batch(batch, rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, loss.item())
        if step % 100 == 99:
            save()
    save()


def save_checkpoint(model, tokenizer: Tokenizer, folder: Path) -> None:
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.generation_config = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
    )
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}  # of the file, not of the model
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "README.md").write_text(MODEL_CARD)
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL[1:]),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "do_convert_rgb": True,
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": MEAN,
            "image_std": STD,
        },
    }
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, indent=2) + "\n")


def train(out: Path, *, pictures: int, vision_steps: int, answer_steps: int, seed: int) -> None:
    """Train on the CPU and write the checkpoint to `out`, again after every 100 steps of the decoder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    start_s = time.monotonic()
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(draw_samples, seed * 1000 + i, pictures // 8) for i in range(8)]
        samples = [sample for job in jobs for sample in job.result()]
    click.echo(f"drew {len(samples)} pictures in {time.monotonic() - start_s:.0f} s")
    tokenizer = train_tokenizer(samples)
    dialogues = Dialogues(tokenizer)
    model = build_model(dialogues.ids)
    click.echo(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    train_vision(model, samples, vision_steps, rng)
    save_checkpoint(model, tokenizer, out)
    train_answers(model, dialogues, samples, answer_steps, rng, lambda: save_checkpoint(model, tokenizer, out))
    click.echo(f"wrote {out} after {(time.monotonic() - start_s) / 60:.1f} min")
