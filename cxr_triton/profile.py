"""What differs between models: prompts, modes, pixel budget, decoding defaults, answer grammar, licence.

A profile is YAML, one of the bundled `profile_names()` or a file of the user's own; `load_profile` gives it back
frozen and validated. Sizes and token ids come from the checkpoint; a profile states them to be compared, so that no
other model is taken for its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from cxr_triton.config import Checked, build, in_range, one_of, read_yaml, value_of
from cxr_triton.errors import InvalidProfile, UnsupportedCheckpoint, unknown_key
from cxr_triton.guide import MODE_GUIDES
from cxr_triton.pixels.display import PRESETS
from cxr_triton.pixels.plausibility import POLICIES, VIEWS

PROFILES = Path(__file__).with_name("profiles")
UNIT_PX = 28
"""Side of a merge unit: 2 x 2 patches of 14 px (`spatial_merge_size`, `patch_size` of Qwen2.5-VL)."""
WINDOW_UNITS = 4
"""Side of an attention window in merge units: 112 px (`window_size` of Qwen2.5-VL)."""

ANSWERS = ("labels", "prose", "option", "boxes", "text")
GRAMMARS = ("think_answer", "answer_only", "boxed", "plain")
IMAGE_ORDERS = ("prior_first",)
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class _Checked(Checked):
    error = InvalidProfile


@dataclass(frozen=True, kw_only=True)
class Licence(_Checked):
    """Licence of the weights, and where it is stated."""

    name: str
    stated: str
    non_commercial: bool


def _size() -> typing.Any:
    return in_range(1, 1 << 20)


@dataclass(frozen=True, kw_only=True)
class TextSizes(_Checked):
    """Sizes of a decoder, named as in ``config.json``."""

    hidden_size: int = _size()
    intermediate_size: int = _size()
    num_hidden_layers: int = _size()
    num_attention_heads: int = _size()
    num_key_value_heads: int = _size()
    vocab_size: int = _size()


@dataclass(frozen=True, kw_only=True)
class VisionSizes(_Checked):
    """Sizes of a vision tower, named as in ``config.json``."""

    depth: int = _size()
    hidden_size: int = _size()
    intermediate_size: int = _size()
    num_heads: int = _size()
    out_hidden_size: int = _size()
    patch_size: int = _size()
    spatial_merge_size: int = _size()
    window_size: int = _size()


@dataclass(frozen=True, kw_only=True)
class CheckpointShape(_Checked):
    """What the checkpoints of a profile look like: the model's own and every fine-tune of the same shape.

    Attributes
    ----------
    tokens : dict of str to int
        Special tokens and their ids.
    """

    text: TextSizes
    vision: VisionSizes
    tokens: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class NamedAdapter(_Checked):
    """The LoRA adapter that readings are made with, over the weights of the checkpoint.

    Attributes
    ----------
    sha256 : str or None
        Of its ``adapter_model.safetensors``; None takes any.
    """

    name: str
    sha256: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not _NAME.fullmatch(self.name):
            raise InvalidProfile(f"name: {self.name!r} is not lower-case letters, digits, dot, dash and underscore")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise InvalidProfile(f"sha256: {self.sha256!r:.80} is not 64 digits of lower-case hexadecimal")


@dataclass(frozen=True, kw_only=True)
class Task(_Checked):
    """One thing a model can be asked.

    Attributes
    ----------
    prompt : str
        Verbatim training prompt; ``{word}`` is a placeholder that the request's variables fill.
    answer : str
        What the answer is: ``labels`` of the vocabulary, ``prose``, ``option`` (letters or yes/no), ``boxes``, or
        ``text`` (anything; a missing grammar is no error).
    follow_up : bool
        The prompt continues a conversation, so the request needs a history.
    """

    prompt: str
    answer: str = one_of(ANSWERS)
    description: str
    min_images: int = in_range(0, 16, default=1)
    max_images: int = in_range(0, 16, default=1)
    follow_up: bool = False

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Names of the placeholders, in order of appearance."""
        return tuple(dict.fromkeys(PLACEHOLDER.findall(self.prompt)))

    def __post_init__(self):
        super().__post_init__()
        if not self.prompt.strip():
            raise InvalidProfile("prompt: is empty")
        if self.min_images > self.max_images:
            raise InvalidProfile(f"min_images: {self.min_images} is more than max_images {self.max_images}")


@dataclass(frozen=True, kw_only=True)
class Mode(_Checked):
    """How a model is asked to answer: the text appended to a task's prompt and the grammar that it calls for.

    Attributes
    ----------
    guide : str
        Of `cxr_triton.guide.MODE_GUIDES`, where the request names none: ``answer`` holds the model to the grammar.
    answers : tuple of str
        Answers of the tasks that it is for; empty for all.
    """

    description: str
    grammar: str = one_of(GRAMMARS)
    suffix: str = ""
    guide: str = one_of(MODE_GUIDES, default="none")
    answers: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for answer in self.answers:
            if answer not in ANSWERS:
                raise InvalidProfile(f"answers: {unknown_key(answer, ANSWERS, 'answers')}")


@dataclass(frozen=True, kw_only=True)
class Decoding(_Checked):
    """Decoding defaults; temperature 0 is greedy, repetition penalty 1 is none.

    A checkpoint's own repetition penalty wins: see `ModelProfile.merge_generation_config`.
    """

    max_new_tokens: int = in_range(1, 32768)
    temperature: float = in_range(0.0, 2.0, default=0.0)
    top_p: float = in_range(1e-3, 1.0, default=1.0)
    repetition_penalty: float = in_range(0.5, 2.0, default=1.0)


def eos_token_ids(generation_config: dict, config: dict) -> tuple[int, ...]:
    """Ids that end an answer, from ``generation_config.json``, else from ``config.json`` (flat or nested)."""
    nested = config.get("text_config") or {}
    for source in (generation_config, config, nested):
        ids = source.get("eos_token_id")
        if ids is None:
            continue
        ids = tuple(ids) if isinstance(ids, list) else (ids,)
        if ids and all(type(i) is int and i >= 0 for i in ids):
            return ids
        raise UnsupportedCheckpoint(f"eos_token_id is {list(ids)!r}, expected one or more token ids; correct the file")
    raise UnsupportedCheckpoint("neither generation_config.json nor config.json has eos_token_id; add it")


@functools.lru_cache
def grids(min_pixels: int, max_pixels: int, max_aspect_ratio: float) -> tuple[tuple[int, int], ...]:
    """Every image grid, in merge units with rows <= columns, that the model's resize can give.

    Resize rounds each side to a multiple of 28 px, scales down with floor when the area is over the budget and up with
    ceil when it is under (Qwen2-VL's ``smart_resize``). So the sides before that step lie up to half a unit (round) or
    one unit (floor, with the budget as product; ceil, with the minimum as product) off the grid.
    """
    budget, minimum = max_pixels / UNIT_PX**2, min_pixels / UNIT_PX**2
    found = []
    for r in range(1, math.isqrt(int(budget)) + 3):
        for c in range(r, int(max_aspect_ratio * (r + 1)) + 2):
            # Each is the least aspect ratio that gives the grid by that way.
            rounded = floored = ceiled = math.inf
            if minimum <= r * c <= budget:
                rounded = (c - 0.5) / (r + 0.5)
            if r * c <= budget < (r + 1) * (c + 1):
                floored = max(c / (r + 1), c * c / budget, budget / (r + 1) ** 2)
            if (r - 1) * (c - 1) < minimum <= r * c:
                ceiled = max((c - 1) / r, (c - 1) ** 2 / minimum, minimum / r**2)
            if min(rounded, floored, ceiled) <= max_aspect_ratio:
                found.append((r, c))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class ModelProfile(_Checked):
    """Everything that differs between two models of the same architecture.

    Attributes
    ----------
    checkpoint_id, revision : str
        Hub repository of the weights and the revision that the facts were taken from.
    checkpoint : CheckpointShape or None
        What a checkpoint has to look like to be exported with this profile; None takes any.
    adapter : NamedAdapter or None
        Which `export --adapter` has to give; some engines take one only.
    system_prompt : str or None
        None leaves the system line to the checkpoint's chat template.
    min_pixels, max_pixels : int
        Pixel budget of one image; it replaces the checkpoint's, which carries the base model's.
    max_aspect_ratio : float
        Longer side over shorter side of the largest oblong that the window budget covers.
    max_sequence : int
        Tokens of prompt and answer together.
    labels : tuple of str
        Closed vocabulary of ``labels`` answers; empty when no task has them.
    not_a_chest : str
        What becomes of an image that is no chest radiograph: ``refuse`` it, or read it and ``flag`` the reading.
    views : tuple of str
        Views that the model was trained on: ``frontal``, ``lateral``, ``oblique``; a reading of another is flagged.
    """

    name: str
    title: str
    checkpoint_id: str
    revision: str
    checkpoint: CheckpointShape | None = None
    adapter: NamedAdapter | None = None
    licence: Licence
    notice: str
    system_prompt: str | None = None
    tasks: dict[str, Task]
    default_task: str
    modes: dict[str, Mode]
    default_mode: str
    min_pixels: int = in_range(UNIT_PX**2, 2**24)
    max_pixels: int = in_range(UNIT_PX**2, 2**24)
    max_aspect_ratio: float = in_range(1.0, 16.0, default=4.0)
    max_images: int = in_range(1, 16)
    image_order: str = one_of(IMAGE_ORDERS, default="prior_first")
    max_sequence: int = in_range(64, 131072)
    decoding: Decoding
    labels: tuple[str, ...] = ()
    pixel_preset: str = one_of(PRESETS, default="mimic_jpg")
    not_a_chest: str = one_of(POLICIES, default="refuse")
    views: tuple[str, ...] = ("frontal",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for fault in itertools.chain(self._faults(), self._task_faults(), self._size_faults()):
            raise InvalidProfile(fault)

    def _faults(self) -> Iterator[str]:
        for view in self.views:
            if view not in VIEWS:
                yield f"views: {unknown_key(view, VIEWS, 'views')}"
        if not _NAME.fullmatch(self.name):
            yield f"name: {self.name!r} is not lower-case letters, digits, dot, dash and underscore"
        if not self.notice.strip():
            yield "notice: is empty, but every reading has to carry one"
        if len({label.casefold() for label in self.labels}) != len(self.labels):
            yield "labels: two are equal but for case"

    def _task_faults(self) -> Iterator[str]:
        kinds = (("task", list(self.tasks), self.default_task), ("mode", list(self.modes), self.default_mode))
        for kind, names, default in kinds:
            for name in names:
                if not _NAME.fullmatch(name):
                    yield f"{kind}s: name {name!r} is not lower-case letters, digits, dash and underscore"
            if default not in names:
                yield f"default_{kind}: {unknown_key(default, names, f'{kind}s')}"
        for name, task in self.tasks.items():
            if task.max_images > self.max_images:
                yield f"tasks.{name}.max_images: {task.max_images} is more than max_images {self.max_images}"
            if task.answer == "labels" and not self.labels:
                yield f"tasks.{name}.answer: is labels, but the profile has no labels"

    def _size_faults(self) -> Iterator[str]:
        if self.min_pixels > self.max_pixels:
            yield f"min_pixels: {self.min_pixels} is more than max_pixels {self.max_pixels}"
        need = self.max_images * self.token_budget + self.decoding.max_new_tokens
        if need > self.max_sequence:
            yield (
                f"max_sequence: {self.max_sequence} is less than {need}, the tokens of {self.max_images} images "
                f"and {self.decoding.max_new_tokens} new tokens"
            )

    @property
    def token_budget(self) -> int:
        """T: most merged tokens that one image can have."""
        return max(r * c for r, c in self._grids)

    @property
    def window_budget(self) -> int:
        """W: least number of 8x8-patch windows that holds every image of the pixel budget and aspect ratio."""
        return max(math.ceil(r / WINDOW_UNITS) * math.ceil(c / WINDOW_UNITS) for r, c in self._grids)

    @property
    def _grids(self) -> tuple[tuple[int, int], ...]:
        return grids(self.min_pixels, self.max_pixels, self.max_aspect_ratio)

    def merge_generation_config(self, generation_config: dict) -> ModelProfile:
        """The profile with the repetition penalty of a checkpoint's ``generation_config.json``, if it has one.

        The file's ``do_sample`` and ``temperature`` do not win: both models ship the base model's sampling at
        temperature 1e-6, which is greedy, and a profile says greedy as temperature 0.
        """
        penalty = generation_config.get("repetition_penalty")
        if penalty is None:
            return self
        try:
            penalty = value_of(float, penalty, "repetition_penalty", InvalidProfile)
            return dataclasses.replace(self, decoding=dataclasses.replace(self.decoding, repetition_penalty=penalty))
        except InvalidProfile as error:
            raise UnsupportedCheckpoint(f"generation_config.json: {error.message}; correct the file") from None

    @property
    def follow_ups(self) -> tuple[str, ...]:
        """Names of the tasks that continue a conversation."""
        return tuple(name for name, task in self.tasks.items() if task.follow_up)

    def to_yaml(self) -> str:
        """The profile, complete and without ``extends``, as YAML that `load_profile` reads back equal."""
        data = dataclasses.asdict(self)
        data |= {"labels": list(self.labels), "views": list(self.views)}
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)

    def to_json(self) -> str:
        """The profile, complete, as a served ensemble says it; `from_json` reads it back equal."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ModelProfile:
        """A profile from `to_json`; raises `InvalidProfile` where it is none of this release."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidProfile(
                f"served profile: is not JSON: {error}; use the client of the server's release"
            ) from None
        return build(cls, data, "served profile")


def profile_names() -> list[str]:
    """Names of the bundled profiles."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name_or_path: str | Path, *, alone: bool = False) -> ModelProfile:
    """A bundled profile by name, or a user's own by the path of its YAML file.

    A file may say ``extends: NAME`` (or a path relative to the file): its keys are laid over that profile, mappings key
    by key, everything else whole. With `alone` it may not: the profile of a bundle reads no other file.

    Raises
    ------
    InvalidProfile
        No such profile, not YAML, or a key that is unknown, missing, of the wrong type or out of range.
    """
    path = _find(name_or_path, Path())
    return build(ModelProfile, _read(path, (), alone), str(path.name))


def _find(name_or_path: str | Path, folder: Path) -> Path:
    text = str(name_or_path)
    if text in profile_names():
        return PROFILES / f"{text}.yaml"
    path = folder / text
    if path.is_file():
        return path
    if "/" in text or text.endswith((".yaml", ".yml")):
        raise InvalidProfile(f"no profile file {text}; give the path of a YAML file or one of {profile_names()}")
    raise InvalidProfile(unknown_key(text, profile_names(), "profile names"))


def _read(path: Path, seen: tuple[Path, ...], alone: bool = False) -> dict:
    path = path.resolve()
    if path in seen:
        raise InvalidProfile(f"{path.name}: extends itself; remove one extends")
    data = read_yaml(path, InvalidProfile)
    if not isinstance(data, dict):
        raise InvalidProfile(f"{path.name}: is {type(data).__name__}, expected a mapping of keys")
    base = data.pop("extends", None)
    if base is None:
        return data
    if alone:
        raise InvalidProfile(f"{path.name}.extends: is not for the profile of a bundle, which is complete; build again")
    if not isinstance(base, str):
        raise InvalidProfile(f"{path.name}.extends: is {type(base).__name__}, expected a profile name or path")
    return _overlay(_read(_find(base, path.parent), (*seen, path)), data)


def _overlay(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _overlay(base[key], value) if both else value
    return merged
