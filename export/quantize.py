"""A checkpoint through nvidia-modelopt, calibrated on images and the profile's own prompts.

The result is modelopt's unified Hugging Face folder and `calibration.json`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cxr_triton import __version__
from cxr_triton.errors import InvalidRequest, UnsupportedCheckpoint
from cxr_triton.export import calibration
from cxr_triton.export.calibration import DEFAULT_LIMIT, MINIMUM_IMAGES, REASONING_TOKENS, Sample
from cxr_triton.export.checkpoint import CALIBRATION, GROUP_SIZES, Checkpoint, torch_model
from cxr_triton.export.geometry import ARCHITECTURE
from cxr_triton.export.progress import bar
from cxr_triton.export.source import Source, open_source
from cxr_triton.extras import require
from cxr_triton.files import new_folder, require_new
from cxr_triton.profile import ModelProfile

SCHEMA = 1
SCHEMES = ("fp8", "int4-awq")
DISTRIBUTIONS = ("nvidia-modelopt", "torch", "transformers")
PACKAGES = ("modelopt", "requests", "torch", "transformers")
# As they stand beside the weights: the quantized folder has to speak as the source does.
_COPIED = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.*", "preprocessor_config.json", "processor_config.json", "generation_config.json"),
)


@dataclass(frozen=True)
class Config:
    """How the decoder's linear layers are quantized.

    Attributes
    ----------
    scheme : {"fp8", "int4-awq"}
    group_size : int or None
        Weights along K that share an int4 scale.
    kv : {"fp8"} or None
        Type that the KV cache is calibrated for.
    """

    scheme: str
    group_size: int | None = None
    kv: str | None = None

    def of_modelopt(self) -> dict:
        """Modelopt's preset; later entries win, so what must stay as it is comes last."""
        import modelopt.torch.quantization as mtq

        config = copy.deepcopy(mtq.FP8_DEFAULT_CFG if self.scheme == "fp8" else mtq.INT4_AWQ_CFG)
        for entry in config["quant_cfg"]:
            if self.group_size and entry["quantizer_name"] == "*weight_quantizer":
                entry["cfg"]["block_sizes"][-1] = self.group_size
        if self.kv:
            config["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
        config["quant_cfg"] += [{"quantizer_name": name, "enable": False} for name in ("*lm_head*", "*visual*")]
        return config


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
    source, out, profile, revision, accept_licence, progress
        As of `export_checkpoint`. The profile's pixel preset, pixel budget and prompts calibrate.
    scheme : {"fp8", "int4-awq"}
        fp8: weights and inputs in e4m3, one static scale each. int4-awq: weights in signed blocks of 128 along K, or
        of the largest of 64 and 32 that divides every K; inputs stay in the compute type.
    kv_fp8 : bool
        Also calibrate scales for a KV cache in float8, for engines that have one.
    images : Path, optional
        Folder, searched with its subfolders, of DICOM, PNG or JPEG files; synthetic phantoms if None.
    limit, seed : int
        Most images to take, and what chooses them.
    device : {"auto", "cpu", "cuda"}
        auto takes CUDA where there is some.
    reasoning_tokens : int
        Tokens that a model which reasons writes to each prompt before calibration; 0 for none.

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
    opened = open_source(source, profile, revision=revision, accept_licence=accept_licence)
    config = Config(scheme, _group_size(opened.checkpoint, scheme), "fp8" if kv_fp8 else None)
    profile, device = profile.merge_generation_config(opened.checkpoint.generation), _device(device)
    contents, facts = calibration.files(images, seed) if images else calibration.phantoms(limit, seed, profile)
    shown, seen = calibration.pictures(contents, profile, limit, progress=progress)
    with _quiet():
        model = torch_model(opened.checkpoint.folder, "auto").to(device)
        samples = calibration.samples(
            model, opened.checkpoint, profile, shown, reasoning_tokens=reasoning_tokens, progress=progress
        )
        amax = _calibrate(model, opened.checkpoint, samples, config, progress=progress)
        more = {"images": facts | seen, "seed": seed, "head_input_amax": amax, "device": device}
        record = _record(opened, config, profile, samples) | more
        _write(model, opened.checkpoint.folder, out, record)
    return record


def _record(source: Source, config: Config, profile: ModelProfile, samples: Sequence[Sample]) -> dict:
    return {
        "schema": SCHEMA,
        **dataclasses.asdict(config),
        "source": source.record(),
        "profile": profile.name,
        "pixel_preset": profile.pixel_preset,
        "tasks": dict(Counter(sample.task for sample in samples)),
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "generated_tokens": sum(sample.generated for sample in samples),
        "versions": {"cxr_triton": __version__, **{name: metadata.version(name) for name in DISTRIBUTIONS}},
    }


def _group_size(checkpoint: Checkpoint, scheme: str) -> int | None:
    """The largest that divides every K; raises where the scheme does not fit the checkpoint."""
    if checkpoint.quantization:
        raise UnsupportedCheckpoint(
            f"{checkpoint.folder} is quantized already ({checkpoint.quantization.scheme}); give the checkpoint that it "
            "was made of"
        )
    if scheme == "fp8":
        return None
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


def _calibrate(
    model, checkpoint: Checkpoint, samples: Sequence[Sample], config: Config, *, progress: bool | None
) -> float:
    """Quantize the model in place; gives the largest absolute input of the language head."""
    import modelopt.torch.quantization as mtq
    import torch

    passes = 2 if config.scheme == "int4-awq" else 1  # statistics, then the search
    largest = 0.0

    def note(_, __, output) -> None:
        nonlocal largest
        largest = max(largest, output.detach().abs().max().item())

    hook = model.model.language_model.norm.register_forward_hook(note)  # its output is the head's input
    with bar(passes * len(samples), "calibration", progress) as shown:

        def forward(quantized) -> None:
            with torch.no_grad():
                for sample in samples:  # without the head, which is not quantized
                    tensors = calibration.inputs(model, checkpoint, sample.input_ids, sample.pictures)
                    quantized.model(**tensors, use_cache=False)
                    shown.update()

        try:
            mtq.quantize(model, config.of_modelopt(), forward)
        finally:
            hook.remove()
    if config.scheme == "fp8":
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
        for path in (path for pattern in _COPIED for path in source.glob(pattern)):
            shutil.copyfile(path, partial / path.name)
        (partial / CALIBRATION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        written = Checkpoint(partial).quantization  # what was written can be read
        found = (written.scheme, written.kv) if written else (None, None)
        if found != (record["scheme"], record["kv"]):
            raise UnsupportedCheckpoint(
                f"modelopt wrote {found[0]} with KV cache {found[1]}, {record['scheme']} with {record['kv']} was asked "
                "for; check its version"
            )
