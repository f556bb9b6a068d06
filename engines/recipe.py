"""What is built for one target: compilers, precisions, slots, shapes and the memory that all of it takes.

A recipe is YAML, one of the bundled `recipe_names()` or a file of the user's own; `load_recipe` gives it back frozen
and validated, and refuses one that does not fit its card.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cxr_triton.config import Checked, build, in_range, one_of, read_yaml
from cxr_triton.engines import engine, engine_names
from cxr_triton.engines.cpu import Cpu
from cxr_triton.engines.interface import COMPUTES
from cxr_triton.engines.verify.thresholds import thresholds_of
from cxr_triton.errors import CxrError, InvalidRecipe, unknown_key
from cxr_triton.profile import load_profile, profile_names

RECIPES = Path(__file__).with_name("recipes")
CPU = "cpu"
"""In the place of a recipe's name: what this processor is fastest with, as far as that was measured."""
PRECISIONS = ("fp32", "fp16", "bf16", "int4", "fp8", "int4-awq")
GIB = 1 << 30
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
INT4_BLOCK = 128

# The 3B as its config.json is published (NV-Reason-CXR-3B and CheXOne have the same).
TEXT_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "use_sliding_window": False,
    "max_window_layers": 70,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
VISION_3B = {  # depth, window and full-attention blocks are left to the class defaults, as in the published file
    "hidden_size": 1280,
    "in_chans": 3,
    "out_hidden_size": 2048,
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
}


class _Checked(Checked):
    error = InvalidRecipe


@dataclass(frozen=True, kw_only=True)
class VisionRecipe(_Checked):
    """Compiler of the vision graph, and the type that its weights have and it computes in; int8 is of the blocks."""

    compiler: str = one_of(engine_names("vision"))
    precision: str = one_of((*COMPUTES, "int8"))


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe(_Checked):
    """Compiler and types of the decoder graph; `precision`, `compute` and `head` as `cxr-triton export` takes them.

    Attributes
    ----------
    kv : str
        Type of the KV cache: the compute type, or fp8 with fp8 weights where the engine has it, from scales that
        `cxr-triton quantize --kv-fp8` calibrated.
    kv_share : float
        What a paged cache holds, as a share of ``slots`` times ``max_sequence`` tokens. Less than 1 saves memory where
        few readings are as long as they may be; a stream waits while the cache is full.
    """

    compiler: str = one_of(engine_names())
    precision: str = one_of(PRECISIONS)
    compute: str = one_of(COMPUTES)
    head: str = one_of(("compute", "fp8", "int4"))
    kv: str = one_of((*COMPUTES, "fp8"))
    kv_share: float = in_range(0.01, 1, default=1.0)


@dataclass(frozen=True, kw_only=True)
class Recipe(_Checked):
    """One target.

    Attributes
    ----------
    gpu : str or None
        Name of the card; None is a CPU.
    compute_capability : str or None
        Of the card, as ``"8.9"``.
    memory_gib : float
        Memory of the card as its driver reports it, or of the host that a CPU engine may take.
    slots : int
        Sequences that the KV cache holds.
    max_sequence : int
        Most tokens of prompt and answer; an export with less stays at its own.
    image_budget : int
        Most images in one run of the vision engine.
    container : str or None
        Image that serves the bundle, and builds it where the engine is built in one.
    thresholds : dict
        Limits of the verification gate that differ from its defaults, see `cxr_triton.engines.verify.thresholds`.
    accuracy : dict
        Measures on labelled data (`make-engine --evaluate`) to the least that they have to be; the most of those of
        which less is better.
    """

    name: str
    gpu: str | None = None
    compute_capability: str | None = None
    memory_gib: float = in_range(0.5, 4096)
    vision: VisionRecipe
    decoder: DecoderRecipe
    slots: int = in_range(1, 256)
    max_sequence: int = in_range(64, 131072)
    image_budget: int = in_range(1, 64)
    container: str | None = None
    thresholds: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", self.name):
            raise InvalidRecipe(f"name: {self.name!r} is not lower-case letters, digits, dot, dash and underscore")
        decoder, compute = self.decoder, self.decoder.compute
        engines = {"vision": engine(self.vision.compiler), "decoder": engine(decoder.compiler)}
        if not any(each.exchanges(self.vision.precision, compute) for each in engines.values()):
            raise InvalidRecipe(
                f"vision.precision: {self.vision.precision} is not decoder.compute {compute}; image embeddings go from "
                "one graph to the other in one type: make them equal"
            )
        engines["decoder"].check_decoder(self)
        for graph, each in engines.items():
            each.check_target(self, graph)
        try:
            thresholds_of(decoder.precision, compute, self.thresholds)
        except CxrError as error:
            raise InvalidRecipe(f"thresholds: {error.message}") from None

    def to_json(self) -> dict:
        """The recipe as plain values, as the bundle's manifest holds it."""
        return dataclasses.asdict(self)

    @property
    def tag(self) -> str:
        """Of the container; empty without one."""
        return (self.container or "").rpartition(":")[2]

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds in all."""
        return int(self.decoder.kv_share * self.slots * self.max_sequence)

    def memory(self, text: dict = TEXT_3B, vision: dict = VISION_3B, *, tied: bool = True) -> dict:
        """Bytes that the recipe takes.

        Weights and KV cache are exact but for alignment; activations are an allowance, see `_activations`.

        Parameters
        ----------
        text, vision : dict
            ``text_config`` and ``vision_config`` of a checkpoint; the published 3B's by default.
        tied : bool
            The head is the embedding table.

        Returns
        -------
        dict
            ``decoder_layers``, ``embedding``, ``head`` (0 where a tied head shares the table), ``vision_tower``,
            ``kv_cache``, ``prompt_tables`` (what the engine keeps for all streams beside it), ``activations``,
            ``total``, ``card``: bytes.
        """
        from cxr_triton.export.geometry import read_config, tensor_shapes

        language, tower = read_config({"text_config": text, "vision_config": vision})
        decoder, item = self.decoder, BYTES[self.decoder.compute]
        parts = {"decoder_layers": 0, "embedding": 0, "head": 0, "vision_tower": 0}
        for name, shape in tensor_shapes(language, tower, tied).items():
            if name.startswith("visual."):
                # Norms are stored in fp32; the patch kernel is summed over its two frames.
                is_norm, is_layer = "norm" in name or "ln_q" in name, ".blocks." in name and len(shape) == 2
                size = 4 if is_norm else BYTES.get(self.vision.precision, 1 if is_layer else 4)
                parts["vision_tower"] += math.prod(shape) * size // (2 if len(shape) == 5 else 1)
            elif name.endswith("_proj.weight"):
                stored = engine(decoder.compiler).stored(name.split(".")[-2], decoder.precision)
                parts["decoder_layers"] += _linear_bytes(shape, stored, item)
            elif name.endswith("bias"):
                parts["decoder_layers"] += math.prod(shape) * item
            elif len(shape) == 1:
                parts["decoder_layers"] += math.prod(shape) * 4
        table = (language.vocab_size, language.hidden_size)
        shared = tied and decoder.head == "compute"
        parts["embedding"] = math.prod(table) * (item if shared else 2)
        if not shared:
            parts["head"] = _linear_bytes(table, decoder.head, item)
        parts["decoder_layers"] *= engine(decoder.compiler).copies
        parts["embedding" if shared else "head"] *= engine(decoder.compiler).head_copies
        row = language.num_hidden_layers * 2 * language.num_key_value_heads * language.head_dim * BYTES[decoder.kv]
        parts["kv_cache"] = row * self.kv_tokens
        parts["prompt_tables"] = self.slots * engine(decoder.compiler).stream_bytes(self, language)
        parts["activations"] = self._activations(language, tower)
        if engine(decoder.compiler).splits_attention:
            tokens = engine(decoder.compiler).step_tokens(self)
            scores = language.num_attention_heads * tokens * (self.max_sequence + tokens) * 4
            parts["activations"] += _SCORES * scores + row * self.max_sequence
        parts["total"] = sum(parts.values())
        parts["card"] = int(self.memory_gib * GIB)
        return parts

    def _activations(self, text, vision) -> int:
        """Allowance for activations of both engines, with what the libraries themselves take.

        Basis: the 3B's bf16 engines (docs/results/engines-3b-rtx.json) report 110 kB for a token of prefill, 1.0 MB for
        a sequence of a decode step and 34 kB for an image's patch, which is 10 bytes for each column of the MLP, 6.5
        for each logit and 10 for each column of the tower's MLP; here 12, 8 and 12. Added is what was not measured:
        0.75 GiB for CUDA's context and kernels, 0.25 GiB on a CPU.
        """
        windows = max(load_profile(name).window_budget for name in profile_names())
        tokens = engine(self.decoder.compiler).step_tokens(self) * text.intermediate_size * 12
        logits = self.slots * text.vocab_size * 8
        patches = self.image_budget * windows * 64 * vision.intermediate_size * 12
        return tokens + logits + patches + (GIB // 4 if self.gpu is None else 3 * GIB // 4)

    def check_memory(self) -> None:
        """Refuse a recipe that the published 3B does not fit with.

        Raises
        ------
        InvalidRecipe
        """
        memory = self.memory()
        if memory["total"] > memory["card"]:
            largest = max((key for key in memory if key not in ("total", "card")), key=lambda part: memory[part])
            raise InvalidRecipe(
                f"{self.name}: needs {memory['total'] / GIB:.1f} GiB, {self.gpu or 'the host'} gives "
                f"{self.memory_gib:g} GiB; {largest} takes {memory[largest] / GIB:.1f} GiB: lower slots, "
                "max_sequence or image_budget, or choose a smaller precision"
            )


_SCORES = 3  # arrays of all scores at once: one whose parts are joined, the joined one, and shares of it


def _linear_bytes(shape: tuple[int, ...], precision: str, item: int) -> int:
    """A matrix [N, K] in a precision, with its scales; `item` bytes hold a value of the compute type."""
    n, k = shape
    if precision == "fp8":
        return n * k + 8
    if precision in ("int4", "int4-awq"):
        return n * k // 2 + n * -(-k // INT4_BLOCK) * item
    return n * k * BYTES.get(precision, item)


@dataclass(frozen=True, kw_only=True)
class Choice(_Checked):
    """One row of what `CPU` means.

    Attributes
    ----------
    recipe : str
    has : tuple of str
        Features of a processor, as Linux names them, of which one has to be there; none: any processor.
    """

    recipe: str
    has: tuple[str, ...] = ()

    def fits(self, flags: Iterable[str]) -> bool:
        """Whether a processor with these features is meant."""
        return not self.has or not set(flags).isdisjoint(self.has)


def choices() -> list[Choice]:
    """Which recipe a processor gets, the first that fits."""
    path = RECIPES / f"{CPU}.yaml"
    rows = read_yaml(path, InvalidRecipe)
    return [build(Choice, row, f"{path.name}[{i}]") for i, row in enumerate(rows if isinstance(rows, list) else [])]


def recipe_of(cpu: Cpu) -> Recipe:
    """The recipe that was measured to be the fastest on a processor, of those whose engines are installed."""
    for choice in choices():
        recipe = _load(RECIPES / f"{choice.recipe}.yaml")
        names = {recipe.vision.compiler, recipe.decoder.compiler}
        if choice.fits(cpu.flags) and all(engine(name).is_installed for name in names):
            break
    return recipe


def recipe_names() -> list[str]:
    """Names of the bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != CPU)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A bundled recipe by name, or a user's own by the path of its YAML file; `CPU` is that of this processor.

    Raises
    ------
    InvalidRecipe
        No such recipe, not YAML, a key that is unknown, missing, of the wrong type or out of range, types that no
        compiler takes, or more memory than the card has.
    """
    text = str(name_or_path)
    if text == CPU:
        return recipe_of(Cpu.here())
    path = RECIPES / f"{text}.yaml" if text in recipe_names() else Path(text)
    if not path.is_file():
        if "/" in text or text.endswith((".yaml", ".yml")):
            raise InvalidRecipe(f"no recipe file {text}; give the path of a YAML file or one of {recipe_names()}")
        raise InvalidRecipe(unknown_key(text, [*recipe_names(), CPU], "recipe names"))
    return _load(path)


def _load(path: Path) -> Recipe:
    recipe = build(Recipe, read_yaml(path, InvalidRecipe), path.name)
    recipe.check_memory()
    return recipe
