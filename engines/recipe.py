"""What is built for one target: compilers, precisions, slots, shapes and the memory that all of it takes.

A recipe is YAML, one of the bundled `recipe_names()` or a file of the user's own; `load_recipe` gives it back frozen
and validated, and refuses one that does not fit its card.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from cxr_triton.config import Checked, build, in_range, one_of, read_yaml
from cxr_triton.engines.verify.thresholds import thresholds_of
from cxr_triton.errors import CxrError, InvalidRecipe, unknown_key
from cxr_triton.profile import load_profile, profile_names

RECIPES = Path(__file__).with_name("recipes")
CPU_ENGINES = ("onnxruntime", "openvino")
GRAPH_ENGINES = (*CPU_ENGINES, "onnxruntime-cuda")
"""Engines whose bundles hold graphs, which are compiled when they are opened."""
ENGINES = (*GRAPH_ENGINES, "tensorrt", "tensorrt-rtx")
DECODER_ENGINES = (*ENGINES, "tensorrt-llm")
PRECISIONS = ("fp32", "fp16", "bf16", "int4", "fp8", "int4-awq")
COMPUTES = ("fp32", "fp16", "bf16")
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX 1.7 builds for: its enumeration `ComputeCapability`."""
PREFILL_PROMPTS, PREFILL_TOKENS = 2, 512
"""Most prompts, and tokens of each, in one run of a TensorRT engine; sessions cut longer prompts into pieces."""

GIB = 1 << 30
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
INT4_BLOCK = 128
TENSORRT_LLM_CONTAINERS = {
    "26.03-trtllm-python-py3": "1.2.0",
    **dict.fromkeys((f"26.0{month}-trtllm-python-py3" for month in (4, 5, 6, 7)), "1.2.1"),
}
"""TensorRT-LLM of the containers whose `trtllm-build` is known here: 1.2, the last that has one."""
_NEEDS_CAPABILITY = {"fp8": (8, 9), "bf16": (8, 0)}  # tensor cores have the type from here on

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
    """Compiler of the vision graph, and the type that its weights have and it computes in.

    openvino computes in bf16 from weights and to embeddings in fp32, on a CPU that multiplies bf16; on another in fp32.
    """

    compiler: str = one_of(ENGINES)
    precision: str = one_of(COMPUTES)


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe(_Checked):
    """Compiler and types of the decoder graph; `precision`, `compute` and `head` as `cxr-triton export` takes them.

    Attributes
    ----------
    kv : str
        Type of the KV cache: the compute type, or fp8 with fp8 weights in tensorrt-llm, from scales that
        `cxr-triton quantize --kv-fp8` calibrated.
    kv_share : float
        What the paged cache of tensorrt-llm holds, as a share of ``slots`` times ``max_sequence`` tokens. Less than 1
        saves memory where few readings are as long as they may be; a stream waits while the cache is full.
    """

    compiler: str = one_of(DECODER_ENGINES)
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
        Image that serves the bundle; that of tensorrt-llm builds it too.
    thresholds : dict
        Limits of the verification gate that differ from its defaults, see `cxr_triton.engines.verify.thresholds`.
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

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", self.name):
            raise InvalidRecipe(f"name: {self.name!r} is not lower-case letters, digits, dot, dash and underscore")
        decoder, compute = self.decoder, self.decoder.compute
        by_openvino = (self.vision.compiler, self.vision.precision, compute) == ("openvino", "bf16", "fp32")
        if self.vision.precision != compute and not by_openvino:
            raise InvalidRecipe(
                f"vision.precision: {self.vision.precision} is not decoder.compute {compute}; image embeddings go from "
                "one graph to the other in one type: make them equal"
            )
        if decoder.compiler == "tensorrt-llm":
            self._check_tensorrt_llm()
        elif decoder.kv_share != 1:
            raise InvalidRecipe(
                f"decoder.kv_share: {decoder.kv_share:g} is given, but {decoder.compiler} has no paged KV cache; leave "
                "it out"
            )
        elif decoder.kv != compute:
            raise InvalidRecipe(
                f"decoder.kv: {decoder.kv} is not decoder.compute {compute}; the KV cache of {decoder.compiler} has "
                "the compute type: make them equal"
            )
        if decoder.precision in COMPUTES and (decoder.precision != compute or decoder.head != "compute"):
            raise InvalidRecipe(
                f"decoder: {decoder.precision} weights compute in {compute} with head {decoder.head}; plain weights "
                f"have compute {decoder.precision} and head compute"
            )
        for part in (self.vision, decoder):
            self._check_engine(part.compiler)
        self._check_thresholds()

    def _check_tensorrt_llm(self) -> None:
        decoder, tag = self.decoder, (self.container or "").rpartition(":")[2]
        if self.vision.compiler != "tensorrt":
            raise InvalidRecipe(
                f"vision.compiler: {self.vision.compiler} beside a tensorrt-llm decoder; its container runs tensorrt"
            )
        if tag not in TENSORRT_LLM_CONTAINERS:
            raise InvalidRecipe(
                f"container: {self.container} is not known to have trtllm-build of TensorRT-LLM 1.2; use "
                f"nvcr.io/nvidia/tritonserver:{max(TENSORRT_LLM_CONTAINERS)}"
            )
        if decoder.compute != "bf16" or decoder.head != "compute":
            raise InvalidRecipe(
                f"decoder: compute {decoder.compute} with head {decoder.head}; the checkpoint for tensorrt-llm has "
                "compute bf16 and head compute"
            )
        if decoder.precision not in ("bf16", "fp8", "int4-awq"):
            raise InvalidRecipe(
                f"decoder.precision: {decoder.precision} would be rounded by trtllm-build, unlike what the gate "
                "measures; choose bf16, fp8 or int4-awq"
            )
        if decoder.kv != "bf16" and (decoder.kv, decoder.precision) != ("fp8", "fp8"):
            raise InvalidRecipe(
                f"decoder.kv: {decoder.kv} with {decoder.precision} weights; tensorrt-llm gets a cache in bf16, or in "
                "fp8 with fp8 weights"
            )
        if self.kv_tokens < self.max_sequence:
            raise InvalidRecipe(
                f"decoder.kv_share: {decoder.kv_share:g} leaves {self.kv_tokens} tokens, one sequence may take "
                f"{self.max_sequence}; raise it to {1 / self.slots:.3g} at least"
            )

    def _check_engine(self, compiler: str) -> None:
        compute, on_cpu = self.decoder.compute, compiler in CPU_ENGINES
        if on_cpu != (compute == "fp32"):
            raise InvalidRecipe(
                f"decoder.compute: {compute} on {compiler}; {' and '.join(CPU_ENGINES)} on a CPU compute in fp32, "
                "attention on a GPU has fused kernels in fp16 and bf16 only"
            )
        if on_cpu and (self.gpu or self.compute_capability):
            raise InvalidRecipe(f"gpu: {self.gpu!r} is given, but {compiler} runs on the CPU; leave gpu out")
        if compiler == "openvino" and self.decoder.precision == "fp8":
            raise InvalidRecipe("decoder.precision: fp8 on openvino; choose fp32, int4 or int4-awq")
        if compiler == "onnxruntime-cuda" and "fp8" in (self.decoder.precision, self.decoder.head):
            raise InvalidRecipe("decoder.precision: fp8 on onnxruntime-cuda; choose bf16, int4 or int4-awq")
        if on_cpu:
            return
        if not self.gpu or not re.fullmatch(r"\d{1,2}\.\d", self.compute_capability or ""):
            raise InvalidRecipe(
                f"compute_capability: {self.compute_capability!r} of gpu {self.gpu!r}; {compiler} needs both, the "
                'capability quoted, as "8.9"'
            )
        has = tuple(int(part) for part in self.compute_capability.split("."))
        for kind in {self.decoder.precision, self.decoder.head, compute} & set(_NEEDS_CAPABILITY):
            if has < (needs := _NEEDS_CAPABILITY[kind]):
                raise InvalidRecipe(
                    f"compute_capability: {self.compute_capability} has no {kind} tensor cores, {needs[0]}.{needs[1]} "
                    "is needed; choose another precision"
                )
        if compiler == "tensorrt-rtx" and self.compute_capability not in RTX_CAPABILITIES:
            raise InvalidRecipe(
                f"compute_capability: tensorrt-rtx builds for {', '.join(RTX_CAPABILITIES)}, not for "
                f"{self.compute_capability}; use tensorrt"
            )

    def _check_thresholds(self) -> None:
        try:
            thresholds_of(self.decoder.precision, self.decoder.compute, self.thresholds)
        except CxrError as error:
            raise InvalidRecipe(f"thresholds: {error.message}") from None

    def to_json(self) -> dict:
        """The recipe as plain values, as the bundle's manifest holds it."""
        return dataclasses.asdict(self)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds in all."""
        return int(self.decoder.kv_share * self.slots * self.max_sequence)

    @property
    def step_tokens(self) -> int:
        """Most tokens of one step of a tensorrt-llm engine: the longest prompt, and a token of every other stream."""
        return min(self.max_sequence + self.slots, self.max_sequence * self.slots)

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
            ``kv_cache``, ``prompt_tables`` (image rows and M-RoPE tables of all streams, in tensorrt-llm only),
            ``activations``, ``total``, ``card``: bytes.
        """
        from cxr_triton.export.geometry import read_config, tensor_shapes

        text, vision = read_config({"text_config": text, "vision_config": vision})
        decoder, item = self.decoder, BYTES[self.decoder.compute]
        parts = {"decoder_layers": 0, "embedding": 0, "head": 0, "vision_tower": 0}
        for name, shape in tensor_shapes(text, vision, tied).items():
            if name.startswith("visual."):
                # Norms are stored in fp32; the patch kernel is summed over its two frames.
                size = 4 if "norm" in name or "ln_q" in name else BYTES[self.vision.precision]
                parts["vision_tower"] += math.prod(shape) * size // (2 if len(shape) == 5 else 1)
            elif name.endswith("_proj.weight"):
                parts["decoder_layers"] += _linear_bytes(shape, decoder.precision, item)
            elif name.endswith("bias"):
                parts["decoder_layers"] += math.prod(shape) * item
            elif len(shape) == 1:
                parts["decoder_layers"] += math.prod(shape) * 4
        table = (text.vocab_size, text.hidden_size)
        shared = tied and decoder.head == "compute"
        parts["embedding"] = math.prod(table) * (item if shared else 2)
        if not shared:
            parts["head"] = _linear_bytes(table, decoder.head, item)
        row = text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim * BYTES[decoder.kv]
        parts["kv_cache"] = row * self.kv_tokens
        parts["prompt_tables"] = self._prompt_tables(text)
        parts["activations"] = self._activations(text, vision)
        parts["total"] = sum(parts.values())
        parts["card"] = int(self.memory_gib * GIB)
        return parts

    def _prompt_tables(self, text) -> int:
        """Image rows and cos and sin of every position, which TensorRT-LLM keeps for each of its streams."""
        if self.decoder.compiler != "tensorrt-llm":
            return 0
        profiles = [load_profile(name) for name in profile_names()]
        rows = max(profile.max_images * profile.token_budget for profile in profiles)
        return self.slots * (rows * text.hidden_size * 2 + self.max_sequence * text.head_dim * 4)

    def _activations(self, text, vision) -> int:
        """Allowance for activations of both engines, with what the libraries themselves take.

        Basis: the 3B's bf16 engines (docs/results/engines-3b-rtx.json) report 110 kB for a token of prefill, 1.0 MB for
        a sequence of a decode step and 34 kB for an image's patch, which is 10 bytes for each column of the MLP, 6.5
        for each logit and 10 for each column of the tower's MLP; here 12, 8 and 12. Added is what was not measured:
        0.75 GiB for CUDA's context and kernels, 0.25 GiB on a CPU.
        """
        windows = max(load_profile(name).window_budget for name in profile_names())
        is_llm = self.decoder.compiler == "tensorrt-llm"
        step = self.step_tokens if is_llm else max(PREFILL_PROMPTS * PREFILL_TOKENS, self.slots)
        tokens = step * text.intermediate_size * 12
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
            largest = max((key for key in memory if key not in ("total", "card")), key=memory.get)
            raise InvalidRecipe(
                f"{self.name}: needs {memory['total'] / GIB:.1f} GiB, {self.gpu or 'the host'} gives "
                f"{self.memory_gib:g} GiB; {largest} takes {memory[largest] / GIB:.1f} GiB: lower slots, "
                "max_sequence or image_budget, or choose a smaller precision"
            )


def _linear_bytes(shape: tuple[int, ...], precision: str, item: int) -> int:
    """A matrix [N, K] in a precision, with its scales; `item` bytes hold a value of the compute type."""
    n, k = shape
    if precision == "fp8":
        return n * k + 8
    if precision in ("int4", "int4-awq"):
        return n * k // 2 + n * -(-k // INT4_BLOCK) * item
    return n * k * item


def recipe_names() -> list[str]:
    """Names of the bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A bundled recipe by name, or a user's own by the path of its YAML file.

    Raises
    ------
    InvalidRecipe
        No such recipe, not YAML, a key that is unknown, missing, of the wrong type or out of range, types that no
        compiler takes, or more memory than the card has.
    """
    text = str(name_or_path)
    path = RECIPES / f"{text}.yaml" if text in recipe_names() else Path(text)
    if not path.is_file():
        if "/" in text or text.endswith((".yaml", ".yml")):
            raise InvalidRecipe(f"no recipe file {text}; give the path of a YAML file or one of {recipe_names()}")
        raise InvalidRecipe(unknown_key(text, recipe_names(), "recipe names"))
    recipe = build(Recipe, read_yaml(path, InvalidRecipe), path.name)
    recipe.check_memory()
    return recipe
