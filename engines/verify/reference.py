"""The unquantized checkpoint in transformers: what an engine's numbers and readings are held against.

Only pixels are shared with the served pipeline (decoding and display, in the sandbox) and the checkpoint's chat
template; resize, patches, vision tower, positions and greedy decoding are those of transformers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.chat import ChatTokenizer, Prompt
from cxr_triton.engines.verify.answers import Answer
from cxr_triton.errors import InvalidRequest
from cxr_triton.pixels.sandbox import Sandbox
from cxr_triton.profile import ModelProfile
from cxr_triton.request import ReadRequest

if TYPE_CHECKING:
    from cxr_triton.export.checkpoint import Checkpoint

BATCH = 8
_UNRESIZED = 2**31  # pixels


@dataclass(frozen=True, eq=False)
class Case:
    """One image and what is asked of it.

    Attributes
    ----------
    image : bytes
        DICOM Part 10, PNG or JPEG.
    request : str
        REQUEST JSON, see `cxr_triton.request`.
    """

    image: bytes
    request: str = "{}"

    @property
    def key(self) -> str:
        """SHA-256 of both."""
        return hashlib.sha256(self.image + b"\0" + self.request.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class _Input:
    prompt: Prompt
    picture: tuple  # patches as a torch tensor, and how many there are in a column and a row
    asked: ReadRequest


class Reference:
    """A checkpoint in transformers: fp32 on a CPU, bf16 on a CUDA device; greedy.

    What it has computed for a case is kept, so that several engines can be held against one reference.

    Parameters
    ----------
    checkpoint : path
        Folder of the unquantized checkpoint.
    profile : ModelProfile
        As the user names it: not the copy in a bundle, which may be wrong.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    adapter : path, optional
        Folder of the LoRA adapter that the profile names; the decoder's weights are those that it makes of them.

    Raises
    ------
    UnsupportedCheckpoint, InvalidRequest
        The folder holds no such checkpoint, or a quantized one; or no adapter that the profile names.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        profile: ModelProfile,
        *,
        device: str = "auto",
        adapter: str | Path | None = None,
    ):
        import torch
        from transformers import Qwen2VLImageProcessorPil

        from cxr_triton.export.adapter import named_adapter
        from cxr_triton.export.checkpoint import Checkpoint, torch_model

        if (Path(checkpoint) / "hf_quant_config.json").exists():
            raise InvalidRequest(f"{checkpoint} is quantized; give the checkpoint that it was made from")
        self.source = Checkpoint(checkpoint)
        self.profile = profile.merge_generation_config(self.source.generation)
        self.adapter = named_adapter(adapter, self.source, profile)
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.dtype = "bf16" if self.device == "cuda" else "fp32"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self._torch = torch
        self._model = torch_model(checkpoint, dtype).to(self.device)
        for name, delta in self.adapter.deltas() if self.adapter else ():
            weight = self._model.model.get_parameter(name).data
            weight.copy_(weight.float() + torch.from_numpy(delta).to(self.device))
        self._tokenizer = ChatTokenizer(checkpoint)
        self._processor = Qwen2VLImageProcessorPil.from_dict(dict(self.source.preprocessor))
        self._sandbox = Sandbox()
        self._pictures: dict[str, np.ndarray] = {}
        self._answers: dict[str, Answer] = {}
        self._ids: dict[str, np.ndarray] = {}
        self._embeddings: dict[str, np.ndarray] = {}

    def close(self) -> None:
        """End the process that decodes images."""
        self._sandbox.close()

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def facts(self) -> dict:
        """What a record says of the reference."""
        from importlib import metadata

        return {
            "runtime": "transformers",
            "device": self.device if self.device == "cpu" else self._torch.cuda.get_device_name(),
            "dtype": self.dtype,
            "profile": self.profile.name,
            **({"adapter": self.adapter.record()} if self.adapter else {}),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        }

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the checkpoint's files."""
        return self.source.digests()

    def picture(self, image: bytes) -> np.ndarray:
        """Displayed picture in the file's size: uint8 [rows, cols] or [rows, cols, 3]."""
        key = hashlib.sha256(image).hexdigest()
        if key not in self._pictures:
            prepared = self._sandbox.prepare(
                image, preset=self.profile.pixel_preset, min_pixels=1, max_pixels=_UNRESIZED, factor=1
            )
            self._pictures[key] = prepared.pixels
        return self._pictures[key]

    def prompt(self, case: Case) -> Prompt:
        """Token ids and positions of a case."""
        return self._input(case).prompt

    def ids(self, case: Case) -> np.ndarray:
        """(A,) int64 tokens of a case's answer; the last one ends it if its `finish_reason` is ``stop``."""
        self.read([case])
        return self._ids[case.key]

    def encode(self, pixels: np.ndarray, *, resize: bool = True) -> np.ndarray:
        """Image embeddings of a picture: (T, hidden) float32."""
        values, grid = self._patches(pixels, resize)
        visual = self._model.model.visual
        with self._torch.inference_mode():
            out = visual(values.to(self.device, visual.dtype), self._torch.tensor([[1, *grid]], device=self.device))
        return out.pooler_output.float().cpu().numpy()

    def embeddings(self, case: Case) -> np.ndarray:
        """Image embeddings of a case: (T, hidden) float32."""
        if case.key not in self._embeddings:
            self._embeddings[case.key] = self.encode(self.picture(case.image))
        return self._embeddings[case.key]

    def read(self, cases: Sequence[Case], progress: Callable[[int], None] = lambda more: None) -> list[Answer]:
        """Greedy answers; cases of one prompt length and grid run as a batch."""
        groups: defaultdict[tuple, dict[str, _Input]] = defaultdict(dict)
        for case in cases:
            if case.key in self._answers:
                progress(1)
                continue
            entry = self._input(case)
            length, asked = len(entry.prompt.input_ids), entry.asked
            limit = min(asked.max_new_tokens, self.profile.max_sequence - length)
            groups[length, entry.picture[1], limit, asked.repetition_penalty][case.key] = entry
        for (_, _, limit, penalty), members in groups.items():
            keys = list(members)
            for at in range(0, len(keys), BATCH):
                batch = {key: members[key] for key in keys[at : at + BATCH]}
                self._generate(batch, limit, penalty)
                progress(len(batch))
        return [self._answers[case.key] for case in cases]

    def _generate(self, batch: dict[str, _Input], limit: int, repetition_penalty: float) -> None:
        """Keep answers to a batch, by the keys of its cases."""
        ends = sorted(self.source.eos_token_ids)
        inputs = self._batch([e.prompt.input_ids for e in batch.values()], [e.picture for e in batch.values()])
        with self._torch.inference_mode():
            out = self._model.generate(
                **inputs,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=limit,
                repetition_penalty=repetition_penalty,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )
        rows = out[:, inputs["input_ids"].shape[1] :].cpu().numpy().astype(np.int64)
        for (key, entry), row in zip(batch.items(), rows, strict=True):
            stops = np.flatnonzero(np.isin(row, ends))
            ids = self._ids[key] = row[: stops[0] + 1] if len(stops) else row
            stream = self._tokenizer.stream()
            text, reason = stream.push(ids) + stream.finish(), "stop" if len(stops) else "length"
            self._answers[key] = Answer.of(text, len(ids), reason, entry.asked, self.profile)

    @contextlib.contextmanager
    def storing(self, weights: Checkpoint, precision: str, head: str) -> Iterator[None]:
        """Within the block the decoder holds its weights as an engine stores them, and rounds inputs where it does.

        Parameters
        ----------
        weights : Checkpoint
            What the engine was exported from: the quantized checkpoint of ``fp8`` and ``int4-awq``, else this one.
        precision, head : str
            Of the engine, see `cxr_triton.export.graph.Precision`.
        """
        if precision not in ("int4", "int4-awq", "fp8"):
            yield  # one float type for another: that is the engine's arithmetic, not what it stores
            return
        layer = self._model.lm_head
        with contextlib.ExitStack() as hooks:
            hooks.callback(self._load, self.source, hooks)
            hooks.callback(setattr, layer, "weight", layer.weight)
            self._load(weights, hooks, rounded=precision == "int4")
            if head != "compute":
                stored = weights.array("language_model.embed_tokens.weight" if weights.tied else "lm_head.weight")
                values = _rounded_int4(stored) if head == "int4" else _rounded_fp8(stored)
                layer.weight = self._torch.nn.Parameter(self._tensor(values), requires_grad=False)
            if head == "fp8":
                hooks.enter_context(self._rounded_input(layer, weights.head_input_scale()))
            yield

    def _load(self, weights: Checkpoint, hooks: contextlib.ExitStack, rounded: bool = False) -> None:
        """Fill the decoder from a checkpoint, linear layers rounded to int4; fp8 layers get a hook on their input."""
        from cxr_triton.export.checkpoint import Fp8Weight, Int4Weight

        model = self._model.model
        for name in [name for name, _ in model.named_parameters() if name.startswith("language_model.")]:
            stored = weights.weight(name)
            if isinstance(stored, Fp8Weight):
                module = model.get_submodule(name.removesuffix(".weight"))
                hooks.enter_context(self._rounded_input(module, stored.input_scale))
                stored = stored.values.astype(np.float32) * stored.scale
            elif isinstance(stored, Int4Weight):
                stored = _unpacked(stored)
            elif rounded and name.endswith("_proj.weight"):
                stored = _rounded_int4(stored)
            model.get_parameter(name).data.copy_(self._tensor(stored))

    def _tensor(self, values: np.ndarray):
        values = np.array(values, np.float32)
        return self._torch.from_numpy(values).to(self.device, self._model.dtype)

    def _rounded_input(self, module, scale: np.float32 | None):
        """A hook that rounds a module's input to float8 e4m3 by a scale."""
        if scale is None:
            raise InvalidRequest("the checkpoint has no scale of the fp8 head's input; quantize it again")
        float8, by = self._torch.float8_e4m3fn, float(scale)

        def rounded(_module, inputs):
            x, *others = inputs
            return ((x.float() / by).clamp(-448, 448).to(float8).float() * by).to(x.dtype), *others

        return module.register_forward_pre_hook(rounded)

    def logits(self, case: Case) -> np.ndarray:
        """Logits with which each token of the reference's own answer is predicted: (A, vocab) float32."""
        ids = self.ids(case)
        before = np.concatenate([self.prompt(case).input_ids, ids[:-1]])
        return self.forced(before, self.picture(case.image), len(ids))

    def forced(self, ids: np.ndarray, pixels: np.ndarray | None, count: int) -> np.ndarray:
        """Logits that predict the token after each of the last `count` of a sequence: (count, vocab) float32.

        Parameters
        ----------
        ids : (S,) int64 array
        pixels : (rows, cols) or (rows, cols, 3) uint8 array or None
            Picture of the sequence's image tokens.
        count : int
        """
        inputs = self._batch([ids], [] if pixels is None else [self._patches(pixels, True)])
        with self._torch.inference_mode():
            out = self._model(**inputs, logits_to_keep=count)
        return out.logits[0].float().cpu().numpy()

    def _input(self, case: Case) -> _Input:
        picture = self._patches(self.picture(case.image), True)
        asked = ReadRequest.from_json(case.request, self.profile)
        return _Input(self._tokenizer.encode(asked.messages(1), [picture[1]]), picture, asked)

    def _patches(self, pixels: np.ndarray, resize: bool) -> tuple:
        from PIL import Image

        limits = {"shortest_edge": self.profile.min_pixels, "longest_edge": self.profile.max_pixels}
        out = self._processor(Image.fromarray(pixels), size=limits, do_resize=resize, return_tensors="pt")
        _, rows, cols = out["image_grid_thw"][0].tolist()
        return out["pixel_values"], (rows, cols)

    def _batch(self, rows: Sequence[np.ndarray], pictures: Sequence[tuple]) -> dict:
        """What the model takes: rows of token ids, all of one length, and the pictures that some stand for."""
        torch = self._torch
        ids = torch.from_numpy(np.stack(rows)).to(self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pictures:
            inputs |= {
                "mm_token_type_ids": (ids == self.source.image_token_id).int(),
                "pixel_values": torch.cat([values for values, _ in pictures]).to(self.device, self._model.dtype),
                "image_grid_thw": torch.tensor([[1, *grid] for _, grid in pictures], device=self.device),
            }
        return inputs


def _rounded_int4(stored: np.ndarray) -> np.ndarray:
    """Round to nearest: symmetric blocks of 128 along K (32 where 128 does not divide it), the largest value is 7."""
    values = stored.astype(np.float32)
    block = 32 if values.shape[1] % 128 else 128
    blocks = values.reshape(len(values), -1, block)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(7)
    scales[scales == 0] = 1
    return (np.clip(np.rint(blocks / scales), -8, 7) * scales).reshape(values.shape)


def _rounded_fp8(stored: np.ndarray) -> np.ndarray:
    """Round to float8 e4m3 by one scale: the largest value is 448."""
    import ml_dtypes

    values = stored.astype(np.float32)
    scale = np.float32(np.abs(values).max() / 448 or 1)
    return np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def _unpacked(stored) -> np.ndarray:
    """An `Int4Weight` as [N, K] float32, its `pre_quant_scale` multiplied in."""
    low, high = stored.packed & 0xF, stored.packed >> 4
    values = np.empty((2 * len(low), low.shape[1]), np.float32)
    values[0::2], values[1::2] = ((half.astype(np.int8) ^ 8) - 8 for half in (low, high))
    values *= np.repeat(stored.scales, values.shape[1] // stored.scales.shape[1], axis=1)
    return values if stored.pre_quant_scale is None else values * stored.pre_quant_scale.astype(np.float32)


def request_json(request: Mapping) -> str:
    """REQUEST, as JSON, of a request's keys."""
    return json.dumps(dict(request), sort_keys=True, ensure_ascii=False)


def png(pixels: np.ndarray) -> bytes:
    """PNG file of a uint8 picture."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
