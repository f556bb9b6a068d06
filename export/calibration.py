"""What calibrates: images through the product's own pixels, the profile's prompts, and the text that a model writes."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cxr_triton import phantom
from cxr_triton.chat import ChatTokenizer
from cxr_triton.errors import CxrError, InvalidRequest
from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.progress import bar
from cxr_triton.pixels import image
from cxr_triton.pixels.sandbox import Sandbox
from cxr_triton.profile import ModelProfile, Task
from cxr_triton.request import ReadRequest

MINIMUM_IMAGES = 16
"""Fewer do not span the ranges of activations: one file would decide the scale of a layer."""
DEFAULT_LIMIT = 128
REASONING_TOKENS = 256
PHANTOM_WARNING = (
    "no calibration images given: synthetic phantoms are used. They exercise every layer with the real prompts, but "
    "their activations are not those of radiographs; for a model that reads people, pass --images with at least "
    f"{MINIMUM_IMAGES} radiographs of your own"
)
# What stands in a prompt's placeholders; a name that is not here stands for itself.
EXAMPLES = {
    "indication": "Shortness of breath",
    "anatomy": "left lower lung",
    "disease": "pleural effusion",
    "diagnosis": "pneumonia",
    "phrase": "small left pleural effusion",
    "boxes": "<|box|>(12,60),(38,87)<|/box|>",
    "question": "Which finding does the image show?",
    "options": ["Pleural effusion", "Pneumothorax", "Cardiomegaly", "No finding"],
    "text": "The heart is enlarged. There is a small left pleural effusion.",
    "findings": "The lungs are clear. The heart is of normal size.",
}


@dataclass(frozen=True, eq=False)
class Sample:
    """One calibration sequence: token ids, and the resized pictures that its image tokens stand for."""

    task: str
    input_ids: np.ndarray
    pictures: Sequence[np.ndarray]
    generated: int = 0


def files(folder: Path, seed: int) -> tuple[Iterator[bytes], dict]:
    """The folder's files in an order that `seed` decides."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    order = np.random.default_rng(seed).permutation(len(found))
    return (found[i].read_bytes() for i in order), {"kind": "files", "found": len(found)}


def phantoms(limit: int, seed: int, profile: ModelProfile) -> tuple[Iterator[bytes], dict]:
    """Synthetic phantoms as the profile displays them, both photometrics in turn."""
    warnings.warn(PHANTOM_WARNING, stacklevel=3)
    return phantom.png_files(limit, seed, profile.pixel_preset), {"kind": "phantoms", "warning": PHANTOM_WARNING}


def pictures(
    contents: Iterator[bytes], profile: ModelProfile, limit: int, *, progress: bool | None
) -> tuple[list[np.ndarray], dict]:
    """Up to `limit` different pictures, displayed and resized as they are served, and what the record says of them.

    Raises
    ------
    InvalidRequest
        Fewer than `MINIMUM_IMAGES` can be read; the message counts the others by their errors.
    """
    found: list[np.ndarray] = []
    digests: list[str] = []
    refused: Counter[str] = Counter()
    budgets = {"window_budget": profile.window_budget, "token_budget": profile.token_budget}
    with Sandbox() as sandbox, bar(limit, "images", progress) as shown:
        for data in contents:
            digest = hashlib.sha256(data).hexdigest()
            if digest in digests:
                refused["DUPLICATE"] += 1
                continue
            try:
                pixels = sandbox.prepare(
                    data, preset=profile.pixel_preset, min_pixels=profile.min_pixels, max_pixels=profile.max_pixels
                ).pixels
                image.windows(pixels, **budgets)
            except CxrError as error:
                refused[error.code] += 1
                continue
            found.append(pixels)
            digests.append(digest)
            shown.update()
            if len(found) == limit:
                break
    if len(found) < MINIMUM_IMAGES:
        others = ", ".join(f"{count} {code}" for code, count in refused.items()) or "none"
        raise InvalidRequest(
            f"{len(found)} different readable images to calibrate with, at least {MINIMUM_IMAGES} are needed "
            f"(refused: {others}); give a folder with more DICOM, PNG or JPEG radiographs"
        )
    return found, {"count": len(found), "sha256": digests, "refused": dict(refused)}


def image_tasks(profile: ModelProfile, *, follow_ups: bool) -> list[tuple[str, Task]]:
    """Tasks that show an image; those that continue a conversation only where there is an answer to continue."""
    tasks = [
        (name, task) for name, task in profile.tasks.items() if task.max_images and (follow_ups or not task.follow_up)
    ]
    if not tasks:
        raise InvalidRequest(f"profile {profile.name} has no task that shows an image; give another profile")
    return tasks


def samples(
    model,
    checkpoint: Checkpoint,
    profile: ModelProfile,
    shown: list[np.ndarray],
    *,
    reasoning_tokens: int,
    progress: bool | None,
) -> list[Sample]:
    """A sequence for each picture, the profile's image tasks in turn, with the answer that the model itself writes.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
        Writes the answers; not asked where the profile does not reason.
    checkpoint : Checkpoint
    profile : ModelProfile
    shown : list of (height, width) or (height, width, 3) uint8 array
        As `pictures` gives them.
    reasoning_tokens : int
        Most tokens of an answer; 0 for none.
    progress : bool or None
        See `bar`.
    """
    reasons = reasoning_tokens > 0 and profile.modes[profile.default_mode].grammar != "plain"
    tokenizer = ChatTokenizer(checkpoint.folder)
    tasks = image_tasks(profile, follow_ups=reasons)
    first_turns = [(name, task) for name, task in tasks if not task.follow_up]

    def ask(name: str, task: Task, images: Sequence[np.ndarray], history: list[dict]) -> tuple[ReadRequest, np.ndarray]:
        request: dict[str, object] = {"task": name}
        if task.placeholders:
            request["variables"] = {word: EXAMPLES.get(word, word) for word in task.placeholders}
        if history:
            request["history"] = history
        asked = ReadRequest.from_json(json.dumps(request), profile)
        grids = [image.grid(*pixels.shape[:2]) for pixels in images]
        return asked, tokenizer.encode(asked.messages(len(images)), grids).input_ids

    def answered(ids: np.ndarray, images: Sequence[np.ndarray]) -> np.ndarray:
        room = min(reasoning_tokens, profile.max_sequence - len(ids))
        return _generate(model, checkpoint, ids, images, room) if reasons and room > 0 else ids

    def sample(i: int) -> Sample:
        name, task = tasks[i % len(tasks)]
        images = [shown[(i + j) % len(shown)] for j in range(max(1, task.min_images))]
        history, generated = [], 0
        if task.follow_up:
            opening = next((t for t in first_turns if t[0] == profile.default_task), first_turns[0])
            asked, ids = ask(*opening, images, [])
            whole = answered(ids, images)
            generated = len(whole) - len(ids)
            stream = tokenizer.stream()
            said = stream.push(whole[len(ids) :]) + stream.finish()
            history = [{"role": "user", "content": asked.text}, {"role": "assistant", "content": said}]
        _, ids = ask(name, task, images, history)
        whole = answered(ids, images)
        return Sample(name, whole, images, generated + len(whole) - len(ids))

    found = []
    with bar(len(shown), "reasoning" if reasons else "prompts", progress) as line:
        for i in range(len(shown)):
            found.append(sample(i))
            line.update()
    return found


def pixel_values(pixels: np.ndarray, preprocessor: dict) -> np.ndarray:
    """Patches of a resized picture as transformers' vision tower takes them.

    Parameters
    ----------
    pixels : (height, width) or (height, width, 3) uint8 array
        Sides are multiples of 28.
    preprocessor : dict
        `preprocessor_config.json`.

    Returns
    -------
    (rows * cols, 1176) float32 array
        Merge unit by merge unit; a patch is (channel, frame, row, column), both frames alike.
    """
    rows, cols = image.grid(*pixels.shape[:2])
    colour = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    mean, std = (np.asarray(preprocessor[key], np.float32) for key in ("image_mean", "image_std"))
    scaled = colour.astype(np.float32) * np.float32(preprocessor.get("rescale_factor", 1 / 255))
    values = (scaled - mean) / std
    # [unit row, patch row, y, unit column, patch column, x, channel]
    split = values.reshape(rows // 2, 2, image.PATCH, cols // 2, 2, image.PATCH, 3)
    patches = split.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None].repeat(2, axis=5)
    return patches.reshape(rows * cols, -1)


def inputs(model, checkpoint: Checkpoint, ids: np.ndarray, shown: Sequence[np.ndarray]) -> dict:
    """Tensors of a sequence and its pictures on the model's device, as its `forward` takes them."""
    import torch

    input_ids = torch.from_numpy(ids[None])
    tensors = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == checkpoint.image_token_id).int(),
        "pixel_values": torch.from_numpy(np.concatenate([pixel_values(p, checkpoint.preprocessor) for p in shown])),
        "image_grid_thw": torch.tensor([[1, *image.grid(*p.shape[:2])] for p in shown]),
    }
    return {name: value.to(model.device) for name, value in tensors.items()}


def _generate(model, checkpoint: Checkpoint, ids: np.ndarray, shown: Sequence[np.ndarray], most: int) -> np.ndarray:
    """The prompt and up to `most` tokens that the model writes to it, greedily."""
    import torch

    ends = sorted(checkpoint.eos_token_ids)
    with torch.inference_mode():
        out = model.generate(
            **inputs(model, checkpoint, ids, shown),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=most,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    return out[0].cpu().numpy()
