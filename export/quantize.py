"""`cxr-triton quantize`: a checkpoint through nvidia-modelopt, calibrated on images and the profile's own prompts.

The images take the product's way through pixels, the prompts come from the profile, and a model that reasons writes the
text that its decoder is calibrated on. The result is modelopt's unified Hugging Face folder and `calibration.json`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import click
import numpy as np

from cxr_triton import __version__, phantom
from cxr_triton.chat import ChatTokenizer
from cxr_triton.cli import OUT_FOLDER, PROFILES, json_option, say_next, write_json
from cxr_triton.errors import CxrError, InvalidRequest, UnsupportedCheckpoint
from cxr_triton.export.checkpoint import ARCHITECTURE, CALIBRATION, GROUP_SIZES, Checkpoint
from cxr_triton.export.command import licence_of, located, require_fit, require_licence
from cxr_triton.extras import require
from cxr_triton.files import new_folder, require_new
from cxr_triton.pixels import image
from cxr_triton.pixels.sandbox import Sandbox
from cxr_triton.profile import ModelProfile, Task, load_profile, profile_names
from cxr_triton.request import ReadRequest

SCHEMA = 1
SCHEMES = ("fp8", "int4-awq")
PACKAGES = ("modelopt", "requests", "torch", "transformers")
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
# As they stand beside the weights: the quantized folder has to speak as the source does.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


@dataclass(frozen=True, eq=False)
class _Sample:
    """One calibration sequence: token ids, and the resized pictures that its image tokens stand for."""

    task: str
    input_ids: np.ndarray
    pictures: Sequence[np.ndarray]
    generated: int = 0


def quantize_checkpoint(
    source: str,
    out: Path,
    profile: ModelProfile,
    *,
    scheme: str,
    kv_fp8: bool = False,
    images: Path | None = None,
    limit: int = DEFAULT_LIMIT,
    seed: int = 0,
    device: str = "auto",
    reasoning_tokens: int = REASONING_TOKENS,
    revision: str | None = None,
    accept_licence: bool = False,
    progress: bool | None = None,
) -> dict:
    """Write a quantized checkpoint folder; it appears complete or not at all.

    The decoder's linear layers are quantized; embedding, head, vision tower, norms and biases are not.

    Parameters
    ----------
    source : str
        Folder or hub id of an unquantized checkpoint.
    out : Path
        Must not exist, or be an empty folder.
    profile : ModelProfile
        Whose pixel preset, pixel budget and prompts calibrate.
    scheme : {"fp8", "int4-awq"}
        fp8: weights and inputs in e4m3, one static scale each. int4-awq: weights in signed blocks of 128 along K, or
        of the largest of 64 and 32 that divides every K; inputs stay in the compute type.
    kv_fp8 : bool
        Also calibrate scales for a KV cache in float8, for engines that have one.
    images : Path, optional
        Folder, searched with its subfolders, of DICOM, PNG or JPEG files; synthetic phantoms if None.
    limit : int
        Most images to take; which ones, `seed` decides.
    seed : int
    device : {"auto", "cpu", "cuda"}
        auto takes CUDA where there is some.
    reasoning_tokens : int
        Tokens that a model which reasons writes to each prompt before calibration; 0 for none.
    revision : str, optional
        Of a hub id.
    accept_licence : bool
        The user accepts the weights' non-commercial licence.
    progress : bool, optional
        Show bars on standard error; by default on a terminal.

    Returns
    -------
    dict
        What `calibration.json` holds.

    Raises
    ------
    InvalidRequest
        An unknown scheme or device, `out` in use, fewer than `MINIMUM_IMAGES` different readable images.
    LicenceNotAccepted, UnsupportedCheckpoint, InvalidProfile
    ModuleNotFoundError
        A package of the extra `quantize` is not installed.
    """
    if scheme not in SCHEMES:
        raise InvalidRequest(f"scheme {scheme!r} is unknown; choose {' or '.join(SCHEMES)}")
    if limit < MINIMUM_IMAGES:
        raise InvalidRequest(f"limit is {limit} images, at least {MINIMUM_IMAGES} calibrate; raise it")
    require_new(out)
    require(*PACKAGES)
    licence = require_licence(source, profile, accept_licence)
    folder, commit = located(source, profile, revision)
    checkpoint = Checkpoint(folder)
    require_fit(source, checkpoint, profile)
    if checkpoint.quantization:
        raise UnsupportedCheckpoint(
            f"{folder} is quantized already ({checkpoint.quantization.scheme}); give the checkpoint that it was made of"
        )
    profile = profile.merge_generation_config(checkpoint.generation)
    group = _group_size(checkpoint) if scheme == "int4-awq" else None
    device = _device(device)
    files, facts = _files(images, limit, seed) if images else _phantoms(limit, seed, profile)
    pictures, seen = _pictures(files, profile, limit, progress)
    with _quiet():
        model = _load(folder, device)
        samples = _samples(model, checkpoint, profile, pictures, reasoning_tokens, progress)
        quantized = _calibrate(model, checkpoint, samples, scheme, group, kv_fp8, progress)
        record = {
            "schema": SCHEMA,
            "scheme": scheme,
            "group_size": group,
            "kv": "fp8" if kv_fp8 else None,
            "source": {
                "name": source if commit else folder.resolve().name,
                "revision": commit,
                "files": checkpoint.digests(),
                "licence": {**dataclasses.asdict(licence), "accepted": accept_licence},
            },
            "profile": profile.name,
            "pixel_preset": profile.pixel_preset,
            "images": {**facts, **seen},
            "seed": seed,
            "tasks": dict(Counter(sample.task for sample in samples)),
            "tokens": sum(len(sample.input_ids) for sample in samples),
            "generated_tokens": sum(sample.generated for sample in samples),
            "head_input_amax": quantized,
            "device": device,
            "versions": {
                "cxr_triton": __version__,
                **{name: metadata.version(name) for name in ("nvidia-modelopt", "torch", "transformers")},
            },
        }
        _write(model, folder, out, record)
    return record


def _group_size(checkpoint: Checkpoint) -> int:
    text = checkpoint.text
    for group in sorted(GROUP_SIZES, reverse=True):
        if text.hidden_size % group == 0 and text.intermediate_size % group == 0:
            return group
    raise UnsupportedCheckpoint(
        f"config.json has hidden_size {text.hidden_size} and intermediate_size {text.intermediate_size}; int4-awq "
        f"needs multiples of {min(GROUP_SIZES)}: use fp8"
    )


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise InvalidRequest(f"device {name!r} is unknown; choose auto, cpu or cuda")
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device cuda was asked for and torch finds none; use cpu or repair the driver")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _files(folder: Path, limit: int, seed: int) -> tuple[Iterator[bytes], dict]:
    """The folder's files in an order that `seed` decides."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    order = np.random.default_rng(seed).permutation(len(found))
    return (found[i].read_bytes() for i in order), {"kind": "files", "found": len(found)}


def _phantoms(limit: int, seed: int, profile: ModelProfile) -> tuple[Iterator[bytes], dict]:
    """Synthetic phantoms as the profile displays them, both photometrics in turn."""
    import io

    from PIL import Image

    def draw() -> Iterator[bytes]:
        rng = np.random.default_rng(seed)
        for i in range(limit):
            file = io.BytesIO()
            pixels = phantom.draw(rng).picture(profile.pixel_preset, phantom.PHOTOMETRICS[i % 2])
            Image.fromarray(pixels).save(file, "PNG", compress_level=1)
            yield file.getvalue()

    warnings.warn(PHANTOM_WARNING, stacklevel=3)
    return draw(), {"kind": "phantoms", "warning": PHANTOM_WARNING}


def _pictures(files: Iterator[bytes], profile: ModelProfile, limit: int, progress: bool | None):
    """Up to `limit` different pictures, displayed and resized as they are served, and what the record says of them."""
    pictures, digests, refused = [], [], Counter()
    budgets = {"window_budget": profile.window_budget, "token_budget": profile.token_budget}
    with Sandbox() as sandbox, _bar(limit, "images", progress) as bar:
        for data in files:
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
            pictures.append(pixels)
            digests.append(digest)
            bar.update()
            if len(pictures) == limit:
                break
    if len(pictures) < MINIMUM_IMAGES:
        others = ", ".join(f"{count} {code}" for code, count in refused.items()) or "none"
        raise InvalidRequest(
            f"{len(pictures)} different readable images to calibrate with, at least {MINIMUM_IMAGES} are needed "
            f"(refused: {others}); give a folder with more DICOM, PNG or JPEG radiographs"
        )
    return pictures, {"count": len(pictures), "sha256": digests, "refused": dict(refused)}


def _bar(total: int, what: str, progress: bool | None):
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=None if progress is None else not progress)


@contextlib.contextmanager
def _quiet():
    """What libraries print goes to standard error; what they always say is left out."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="transformers .* is not tested with current version of modelopt")
            warnings.filterwarnings("ignore", message="To copy construct from a tensor")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load(folder: Path, device: str):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto").eval().to(device)


def _image_tasks(profile: ModelProfile, follow_ups: bool) -> list[tuple[str, Task]]:
    """Tasks that show an image; those that continue a conversation only where there is an answer to continue."""
    tasks = [
        (name, task) for name, task in profile.tasks.items() if task.max_images and (follow_ups or not task.follow_up)
    ]
    if not tasks:
        raise InvalidRequest(f"profile {profile.name} has no task that shows an image; give another profile")
    return tasks


def _samples(
    model,
    checkpoint: Checkpoint,
    profile: ModelProfile,
    pictures: list[np.ndarray],
    reasoning_tokens: int,
    progress: bool | None,
) -> list[_Sample]:
    """A sequence for each picture, the profile's image tasks in turn, with the answer that the model itself writes."""
    reasons = reasoning_tokens > 0 and profile.modes[profile.default_mode].grammar != "plain"
    tokenizer = ChatTokenizer(checkpoint.folder)
    tasks = _image_tasks(profile, follow_ups=reasons)
    first_turns = [(name, task) for name, task in tasks if not task.follow_up]

    def ask(name: str, task: Task, shown: Sequence[np.ndarray], history: list[dict]) -> tuple[ReadRequest, np.ndarray]:
        request = {"task": name}
        if task.placeholders:
            request["variables"] = {word: EXAMPLES.get(word, word) for word in task.placeholders}
        if history:
            request["history"] = history
        asked = ReadRequest.from_json(json.dumps(request), profile)
        grids = [image.grid(*pixels.shape[:2]) for pixels in shown]
        return asked, tokenizer.encode(asked.messages(len(shown)), grids).input_ids

    def answered(ids: np.ndarray, shown: Sequence[np.ndarray]) -> np.ndarray:
        room = min(reasoning_tokens, profile.max_sequence - len(ids))
        return _generate(model, checkpoint, ids, shown, room) if reasons and room > 0 else ids

    samples = []
    with _bar(len(pictures), "reasoning" if reasons else "prompts", progress) as bar:
        for i in range(len(pictures)):
            name, task = tasks[i % len(tasks)]
            count = max(1, task.min_images)
            shown = [pictures[(i + j) % len(pictures)] for j in range(count)]
            history, generated = [], 0
            if task.follow_up:
                opening = next((t for t in first_turns if t[0] == profile.default_task), first_turns[0])
                asked, ids = ask(*opening, shown, [])
                whole = answered(ids, shown)
                generated += len(whole) - len(ids)
                stream = tokenizer.stream()
                said = stream.push(whole[len(ids) :]) + stream.finish()
                history = [{"role": "user", "content": asked.text}, {"role": "assistant", "content": said}]
            _, ids = ask(name, task, shown, history)
            whole = answered(ids, shown)
            samples.append(_Sample(name, whole, shown, generated + len(whole) - len(ids)))
            bar.update()
    return samples


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


def _inputs(model, checkpoint: Checkpoint, ids: np.ndarray, pictures: Sequence[np.ndarray]) -> dict:
    import torch

    input_ids = torch.from_numpy(ids[None])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == checkpoint.image_token_id).int(),
        "pixel_values": torch.from_numpy(np.concatenate([pixel_values(p, checkpoint.preprocessor) for p in pictures])),
        "image_grid_thw": torch.tensor([[1, *image.grid(*p.shape[:2])] for p in pictures]),
    }
    return {name: value.to(model.device) for name, value in inputs.items()}


def _generate(model, checkpoint: Checkpoint, ids: np.ndarray, pictures: Sequence[np.ndarray], most: int) -> np.ndarray:
    """The prompt and up to `most` tokens that the model writes to it, greedily."""
    import torch

    ends = sorted(checkpoint.eos_token_ids)
    with torch.inference_mode():
        out = model.generate(
            **_inputs(model, checkpoint, ids, pictures),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=most,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    return out[0].cpu().numpy()


def _config(scheme: str, group: int | None, kv_fp8: bool) -> dict:
    """Modelopt's preset; later entries win, so what must stay as it is comes last."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG if scheme == "fp8" else mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if group and entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["block_sizes"][-1] = group
    if kv_fp8:
        config["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    config["quant_cfg"] += [{"quantizer_name": name, "enable": False} for name in ("*lm_head*", "*visual*")]
    return config


def _calibrate(
    model,
    checkpoint: Checkpoint,
    samples: Sequence[_Sample],
    scheme: str,
    group: int | None,
    kv_fp8: bool,
    progress: bool | None,
) -> float:
    """Quantize the model in place; gives the largest absolute input of the language head."""
    import modelopt.torch.quantization as mtq
    import torch

    passes = 2 if scheme == "int4-awq" else 1  # statistics, then the search
    largest = 0.0

    def note(_, __, output) -> None:
        nonlocal largest
        largest = max(largest, output.detach().abs().max().item())

    hook = model.model.language_model.norm.register_forward_hook(note)  # its output is the head's input
    with _bar(passes * len(samples), "calibration", progress) as bar:

        def forward(quantized) -> None:
            with torch.no_grad():
                for sample in samples:  # without the head, which is not quantized
                    quantized.model(**_inputs(model, checkpoint, sample.input_ids, sample.pictures), use_cache=False)
                    bar.update()

        try:
            mtq.quantize(model, _config(scheme, group, kv_fp8), forward)
        finally:
            hook.remove()
    if scheme == "fp8":
        share_scales(model)
    return largest


def share_scales(model) -> None:
    """One float8 scale for query, key and value, the largest: engines that multiply them in one keep every value."""
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        preprocess_linear_fusion([attention.q_proj, attention.k_proj, attention.v_proj])


def _write(model, source: Path, out: Path, record: dict) -> None:
    from modelopt.torch.export import export_hf_checkpoint

    model.config.architectures = [ARCHITECTURE]
    with new_folder(out) as partial:
        export_hf_checkpoint(model, export_dir=partial)
        for name in _COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, partial / name)
        (partial / CALIBRATION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        written = Checkpoint(partial).quantization  # what was written can be read
        if (written.scheme, written.kv) != (record["scheme"], record["kv"]):
            raise UnsupportedCheckpoint(
                f"modelopt wrote {written.scheme} with KV cache {written.kv}, {record['scheme']} with {record['kv']} "
                "was asked for; check its version"
            )


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=OUT_FOLDER, help="New folder.")
@click.option(
    "--profile",
    shell_complete=PROFILES,
    required=True,
    metavar="NAME|YAML",
    help=f"One of {', '.join(profile_names())}, or a file.",
)
@click.option(
    "--scheme",
    required=True,
    type=click.Choice(SCHEMES),
    help="Weights and inputs in float8, or weights in int4 blocks by AWQ.",
)
@click.option("--kv-fp8", is_flag=True, help="Calibrate scales for a KV cache in float8 too.")
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of DICOM, PNG or JPEG files.  [default: synthetic phantoms]",
)
@click.option(
    "--limit", type=click.IntRange(min=1), default=DEFAULT_LIMIT, show_default=True, help="Most images to take."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses and orders the images.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--reasoning-tokens",
    type=click.IntRange(min=0),
    default=REASONING_TOKENS,
    show_default=True,
    help="Tokens that a reasoning model writes to each prompt, to be calibrated on.",
)
@click.option("--revision", help="Of a hub id.  [default: the profile's]")
@click.option("--accept-licence", is_flag=True, help="You accept the weights' non-commercial licence.")
@click.option("--progress/--no-progress", default=None, help="Bars on standard error.  [default: on a terminal]")
@json_option
def quantize(checkpoint, out, profile, json_path, **options):
    """Quantize CHECKPOINT, a folder or a hub id ORG/NAME, with nvidia-modelopt.

    Writes a Hugging Face folder that `export` takes, with the record of its calibration in calibration.json.
    """
    chosen = load_profile(profile)
    licence = licence_of(checkpoint, chosen)
    click.echo(f"licence of the weights: {licence.name} ({licence.stated})", err=True)
    if options["images"] is None:
        click.echo(f"warning: {PHANTOM_WARNING}", err=True)
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=re.escape(PHANTOM_WARNING))  # said above
        result = quantize_checkpoint(checkpoint, out, chosen, **options)
    result |= {
        "path": str(out),
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
        "seconds": round(time.monotonic() - start, 1),
    }
    if json_path != "-":
        click.echo(
            f"{out}: {result['scheme']}, calibrated on {result['images']['count']} {result['images']['kind']} and "
            f"{result['tokens']} tokens; {result['bytes'] / 1e9:.2f} GB in {result['seconds']} s"
        )
    write_json(result, json_path)
    say_next("export", out, "--profile", profile, "-o", "EXPORT")
