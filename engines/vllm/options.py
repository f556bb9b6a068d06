"""What `cxr-triton package` may ask of vLLM, and the arguments that it becomes."""

from __future__ import annotations

from collections.abc import Mapping

from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.interface import ADAPTER
from cxr_triton.engines.vllm.layout import FOLDER, TYPES, engine_type
from cxr_triton.errors import InvalidRequest

_BLOCK_TOKENS = 128  # of the KV cache on a CPU; smaller on a GPU
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
_NGRAM = {"prompt_lookup_min": 2, "prompt_lookup_max": 5}

OPTIONS: dict[str, tuple[str, ...]] = {
    "prefix-caching": ("on", "off"),
    "chunked-prefill": ("on", "off"),
    "step-tokens": (),
    "drafts": ("off", "ngram", "suffix"),
    "draft-tokens": (),
    "kv": ("auto", "fp8"),
    "compile": ("on", "off"),
}
"""Values of each option; the first is the default. None listed: a whole number of at least 1."""
MEANINGS = {
    "prefix-caching": "keep the KV cache of prompts that begin alike, pictures included",
    "chunked-prefill": "cut long prompts, so that they and running answers share a step",
    "step-tokens": "most tokens of one step",
    "drafts": "guess several tokens, from n-grams of the prompt or from suffixes of earlier answers, and check them",
    "draft-tokens": "most tokens guessed at a time",
    "kv": "type of the KV cache",
    "compile": "let vLLM compile the model and capture graphs, on a GPU",
}


def checked(options: Mapping[str, str]) -> dict[str, str]:
    """Options that are known, with values that they have.

    Raises
    ------
    InvalidRequest
        Names the nearest option, or the values.
    """
    for name, value in options.items():
        known = OPTIONS[name]
        if known and value not in known:
            raise InvalidRequest(f"option {name} is {value!r:.40}, choose {', '.join(known)}")
        if not known and not (value.isdecimal() and 1 <= int(value) <= 1 << 20):
            raise InvalidRequest(f"option {name} is {value!r:.40}, must be a whole number of at least 1")
    if "draft-tokens" in options and options.get("drafts", "off") == "off":
        raise InvalidRequest("option draft-tokens is given without drafts; add drafts=ngram or drafts=suffix")
    return dict(options)


def arguments(bundle: Bundle, slots: int, options: Mapping[str, str]) -> dict[str, object]:
    """Arguments of vLLM's `EngineArgs` for a bundle.

    Parameters
    ----------
    bundle : Bundle
    slots : int
        Streams in the engine at the same time.
    options : mapping
        As `checked` gives them.
    """
    chosen = {name: values[0] for name, values in OPTIONS.items() if values} | dict(options)
    geometry = bundle.geometry
    result: dict[str, object] = {
        "model": str(bundle.path / FOLDER),
        "dtype": TYPES[engine_type(bundle.precision, geometry.compute)],
        "max_model_len": geometry.max_sequence,
        "max_num_seqs": slots,
        "enforce_eager": bundle.is_on_cpu or chosen["compile"] == "off",
        "enable_prefix_caching": chosen["prefix-caching"] == "on",
        "enable_chunked_prefill": chosen["chunked-prefill"] == "on",
        "kv_cache_dtype": chosen["kv"] if chosen["kv"] != "auto" else _calibrated(bundle),
        "kv_cache_memory_bytes": kv_bytes(bundle, slots, chosen["kv"]),
        # The tower is ours: vLLM loads none, and takes rows in its place.
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        "enable_mm_embeds": True,
        "skip_mm_profiling": True,
        "mm_processor_cache_gb": 0,
        "disable_log_stats": True,
        "generation_config": "vllm",  # a request says itself how it is sampled
    }
    if "step-tokens" in chosen:
        result["max_num_batched_tokens"] = int(chosen["step-tokens"])
    elif chosen["chunked-prefill"] == "off":
        result["max_num_batched_tokens"] = max(geometry.max_sequence, slots)
    if chosen["drafts"] != "off":
        more = _NGRAM if chosen["drafts"] == "ngram" else {}
        tokens = int(chosen.get("draft-tokens", 4))
        result["speculative_config"] = {"method": chosen["drafts"], "num_speculative_tokens": tokens, **more}
    if held := bundle.manifest.get("adapter"):
        rank = next(rank for rank in _LORA_RANKS if rank >= held["rank"])
        result |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    return result


def adapter(bundle: Bundle) -> dict[str, str] | None:
    """``name`` and ``path`` of the LoRA adapter that every request of a bundle is answered with."""
    return bundle.adapter and {"name": bundle.adapter["name"], "path": str(bundle.path / ADAPTER)}


def kv_bytes(bundle: Bundle, slots: int, kv: str = "auto") -> int:
    """Bytes of a KV cache that holds every slot at its longest, blocks half empty included."""
    geometry, recipe = bundle.geometry, bundle.manifest.get("recipe") or {}
    kind = kv if kv != "auto" else engine_type(bundle.precision, geometry.compute)
    share = (recipe.get("decoder") or {}).get("kv_share", 1.0)
    tokens = max(share * slots * geometry.max_sequence, geometry.max_sequence) + (slots + 1) * _BLOCK_TOKENS
    return int(tokens) * 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * _BYTES[kind]


def _calibrated(bundle: Bundle) -> str:
    """fp8 where the recipe asks for it, from scales that the checkpoint holds."""
    recipe = bundle.manifest.get("recipe") or {}
    return "fp8" if (recipe.get("decoder") or {}).get("kv") == "fp8" else "auto"
