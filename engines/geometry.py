"""Sizes and ids of a model, as an export and a bundle's manifest hold them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cxr_triton.errors import InvalidBundle


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes and ids that a runtime needs before it opens a graph.

    Attributes
    ----------
    hidden, layers, kv_heads, head_dim, vocab : int
        Of the decoder.
    window_budget, token_budget : int
        W and T of the vision graph: windows and merged tokens of one image.
    max_sequence : int
        Prompt and answer of one request, in tokens.
    compute : str
        Type of the graphs' float inputs and outputs: ``fp32``, ``fp16`` or ``bf16``.
    image_token_id, vision_start_token_id : int
    eos_token_ids : tuple of int
    merge_size : int
        Patches per side of a merge unit.
    """

    hidden: int
    layers: int
    kv_heads: int
    head_dim: int
    vocab: int
    window_budget: int
    token_budget: int
    max_sequence: int
    compute: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    vision_start_token_id: int
    merge_size: int

    @classmethod
    def from_json(cls, values: dict, where: str) -> Geometry:
        """Check names and types; raises `InvalidBundle`."""
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != set(fields):
            got = set(values) if isinstance(values, dict) else set()
            raise InvalidBundle(
                f"{where}: geometry lacks {sorted(set(fields) - got)} and has unknown {sorted(got - set(fields))}; "
                "export and build again"
            )
        for name, kind in fields.items():
            value = values[name]
            if kind == "int":
                holds = type(value) is int and value >= 0
            elif kind == "str":
                holds = isinstance(value, str)
            else:
                holds = isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
            if not holds:
                raise InvalidBundle(f"{where}: geometry.{name} is {value!r}, expected {kind}; export and build again")
        return cls(**{**values, "eos_token_ids": tuple(values["eos_token_ids"])})
