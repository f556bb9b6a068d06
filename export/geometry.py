"""The geometry that a Qwen2.5-VL `config.json` states, flat or nested, and the tensors that it calls for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from cxr_triton.errors import UnsupportedCheckpoint

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
_Config = TypeVar("_Config", "TextConfig", "VisionConfig")


@dataclass(frozen=True)
class TextConfig:
    """Decoder geometry. The values here are the class defaults of transformers 5.23, which files leave out."""

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    use_sliding_window: bool = False
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)

    @property
    def head_dim(self) -> int:
        """Values of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower geometry. Files usually leave out depth, window and full-attention blocks: class defaults."""

    depth: int = 32
    hidden_size: int = 3584
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Values of one attention head."""
        return self.hidden_size // self.num_heads


_KINDS: dict[str, type] = {
    "architectures": list,
    **dict.fromkeys(("text_config", "vision_config", "rope_scaling", "rope_parameters"), dict),
    **dict.fromkeys(("image_token_id", "vision_start_token_id"), int),
}


def refuse_other_architectures(config: dict) -> None:
    """Raise `UnsupportedCheckpoint` where `config.json` is of another model, or what it holds is of another type."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key, kind in _KINDS.items():
            value = part.get(key) if isinstance(part, dict) else None
            if value is not None and type(value) is not kind:
                raise UnsupportedCheckpoint(f"config.json has {key} = {value!r:.60}, not a {kind.__name__}")
    architectures = config.get("architectures") or []
    found = architectures[0] if architectures else config.get("model_type")
    if ARCHITECTURE not in architectures and not (not architectures and config.get("model_type") == "qwen2_5_vl"):
        raise UnsupportedCheckpoint(
            f"the checkpoint is a {found}; only {ARCHITECTURE} (NV-Reason-CXR-3B, CheXOne) is exported"
        )


def _pick(cls: type[_Config], values: dict, **overrides: object) -> _Config:
    """`cls` from a config's known, non-null keys, each of its default's type."""
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        value: Any = overrides.get(field.name, values.get(field.name))
        if value is None:
            continue
        kind: type = type(field.default)
        try:
            value = tuple(int(v) for v in value) if kind is tuple else kind(value)
        except (TypeError, ValueError):
            raise UnsupportedCheckpoint(f"config.json has {field.name} = {value!r}, not a {kind.__name__}") from None
        if kind is int and value < 1:
            raise UnsupportedCheckpoint(f"config.json has {field.name} = {value}, at least 1 is needed")
        chosen[field.name] = value
    return cls(**chosen)


def read_config(config: dict) -> tuple[TextConfig, VisionConfig]:
    """Geometry from `config.json`, flat or nested; raises `UnsupportedCheckpoint` where it cannot be exported."""
    return _text_config(config), _vision_config(config)


def _text_config(config: dict) -> TextConfig:
    values = config.get("text_config") or config  # a flat config keeps the text keys at its top
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    text = _pick(
        TextConfig,
        values,
        rope_theta=rope.get("rope_theta", values.get("rope_theta")),
        mrope_section=rope.get("mrope_section"),
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise UnsupportedCheckpoint(f"config.json has rope type {kind!r}; only default (mrope) is exported")
    if text.hidden_act != "silu" or text.use_sliding_window:
        raise UnsupportedCheckpoint(
            f"config.json has hidden_act {text.hidden_act!r}, use_sliding_window {text.use_sliding_window}; "
            "only 'silu' and false are exported"
        )
    if text.hidden_size % text.num_attention_heads or text.num_attention_heads % text.num_key_value_heads:
        raise UnsupportedCheckpoint(
            f"config.json has hidden_size {text.hidden_size}, {text.num_attention_heads} heads and "
            f"{text.num_key_value_heads} KV heads; each has to be a multiple of the next"
        )
    if 2 * sum(text.mrope_section) != text.head_dim or len(text.mrope_section) != 3:
        raise UnsupportedCheckpoint(
            f"config.json has mrope_section {list(text.mrope_section)}; three numbers with sum {text.head_dim // 2} "
            "(half the head size) are needed"
        )
    return text


def _vision_config(config: dict) -> VisionConfig:
    values = config.get("vision_config") or {}
    values = {"in_channels": values.get("in_chans"), **values}
    vision = _pick(VisionConfig, values, rope_theta=(values.get("rope_parameters") or {}).get("rope_theta"))
    fixed = {
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "hidden_act": "silu",
    }
    for name, value in fixed.items():
        if getattr(vision, name) != value:
            raise UnsupportedCheckpoint(f"vision_config has {name} {getattr(vision, name)!r}; {value!r} is exported")
    if vision.hidden_size % (4 * vision.num_heads):
        raise UnsupportedCheckpoint(
            f"vision_config has hidden_size {vision.hidden_size} over {vision.num_heads} heads; "
            "the head size has to be a multiple of 4 (row and column rotary halves)"
        )
    return vision


def is_tied(config: dict) -> bool:
    """Whether the head of a checkpoint with this ``config.json`` is its embedding table."""
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False))


def tensor_shapes(text: TextConfig, vision: VisionConfig, tied: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor that the graphs use, with the shape that the config calls for."""
    hidden, kv = text.hidden_size, text.num_key_value_heads * text.head_dim
    shapes = {"language_model.embed_tokens.weight": (text.vocab_size, hidden), "language_model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (text.vocab_size, hidden)
    for i in range(text.num_hidden_layers):
        layer = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (hidden, hidden),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (text.intermediate_size, hidden),
            "mlp.up_proj.weight": (text.intermediate_size, hidden),
            "mlp.down_proj.weight": (hidden, text.intermediate_size),
        }
        shapes.update({f"language_model.layers.{i}.{name}": shape for name, shape in layer.items()})
    width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes["visual.patch_embed.proj.weight"] = (width, *patch)
    for i in range(vision.depth):
        block = {
            "norm1.weight": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
        }
        for name, (rows, cols) in {
            "gate_proj": (vision.intermediate_size, width),
            "up_proj": (vision.intermediate_size, width),
            "down_proj": (width, vision.intermediate_size),
        }.items():
            block |= {f"mlp.{name}.weight": (rows, cols), f"mlp.{name}.bias": (rows,)}
        shapes.update({f"visual.blocks.{i}.{name}": shape for name, shape in block.items()})
    return shapes | {
        "visual.merger.ln_q.weight": (width,),
        "visual.merger.mlp.0.weight": (merged, merged),
        "visual.merger.mlp.0.bias": (merged,),
        "visual.merger.mlp.2.weight": (vision.out_hidden_size, merged),
        "visual.merger.mlp.2.bias": (vision.out_hidden_size,),
    }
