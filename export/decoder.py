"""Author of `decoder.onnx`: the Qwen2.5-VL language model with a KV cache that is updated in place.

Standard operators of opset 24 only (RMSNormalization, RotaryEmbedding, TensorScatter, Attention), so that every engine
compiles the same file. Inputs and outputs: docs/architecture.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from cxr_triton.errors import InvalidRequest, UnsupportedCheckpoint
from cxr_triton.export.checkpoint import CALIBRATION, Checkpoint
from cxr_triton.export.graph import QUANTIZED, Form, GraphWriter, Precision, check

OPSET = 24
_TABLE = "language_model.embed_tokens.weight"


def write_decoder(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    precision: str = "fp32",
    compute: str | None = None,
    head: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Write `decoder.onnx` and `decoder.onnx.data`.

    The length of the KV cache is the symbol `max_seq`: kernels that attend over the whole length that they are given
    get the length that is needed now; a compiler that needs a number puts it there.

    Parameters
    ----------
    checkpoint : Checkpoint
    folder : Path
        Made if absent.
    precision, compute, head : str
        See `Precision`.
    progress : bool, optional
        Show a bar; by default on a terminal.

    Returns
    -------
    Path
        The `.onnx` file.

    Raises
    ------
    InvalidRequest
        Unknown precision, or one that the checkpoint does not hold.
    UnsupportedCheckpoint
        A layer that int4 blocks do not fit, or a head in fp8 whose input was not calibrated.
    """
    text, chosen = checkpoint.text, Precision.of(precision, compute, head)
    check_source(checkpoint, chosen)
    path = Path(folder) / "decoder.onnx"
    source_bytes = checkpoint.nbytes("language_model.") + checkpoint.nbytes("lm_head.")
    if checkpoint.tied and chosen.head != "compute":
        source_bytes += checkpoint.nbytes(_TABLE)  # read once more for the head
    with GraphWriter(path, OPSET, chosen, source_bytes=source_bytes, progress=progress) as g:
        int64 = TensorProto.INT64
        g.input("input_ids", int64, ["B", "S"])
        g.input("image_index", int64, ["B", "S"])
        g.input("image_embeddings", g.kind, ["N", text.hidden_size])
        g.input("position_ids", int64, [3, "B", "S"])
        g.input("write_index", int64, ["B"])
        g.input("logits_index", int64, ["B", "P"])
        g.output("logits", TensorProto.FLOAT, ["B", "P", text.vocab_size])
        cache = ["B", text.num_key_value_heads, "max_seq", text.head_dim]
        for i in range(text.num_hidden_layers):
            for part in ("key", "value"):
                g.input(f"past_{part}.{i}", g.kind, cache)
                g.output(f"present_{part}.{i}", g.kind, cache)
        x = _embed(g, checkpoint)  # [B, S, hidden] fp32
        rotary, mask = _rotary(g, checkpoint), _causal_mask(g)
        for i in range(text.num_hidden_layers):
            x = _layer(g, checkpoint, i, x, rotary=rotary, mask=mask)
        _head(g, checkpoint, x)
    return path


def check_source(checkpoint: Checkpoint, precision: Precision) -> None:
    """Refuse a precision that the checkpoint's weights do not give; raises as `write_decoder`."""
    holds = checkpoint.quantization.scheme if checkpoint.quantization else None
    if holds != (precision.weights if precision.weights in QUANTIZED else None):
        raise InvalidRequest(
            f"precision {precision.weights} was asked for, {checkpoint.folder} holds {holds or 'plain'} weights; "
            + (f"export it as {holds}" if holds else "quantize it first with `cxr-triton quantize`")
        )
    if precision.head == "fp8" and checkpoint.head_input_scale() is None:
        raise UnsupportedCheckpoint(
            f"a head in fp8 needs its input's range, but {checkpoint.folder / CALIBRATION} has no head_input_amax; "
            "quantize with `cxr-triton quantize`, or choose head compute or int4"
        )


def _embed(g: GraphWriter, checkpoint: Checkpoint) -> str:
    # A tied head in the compute type shares the table; otherwise it keeps the checkpoint's bytes and is cast by row.
    shared = checkpoint.tied and g.precision.head == "compute"
    table = checkpoint.array(_TABLE)
    dtype = g.dtype if shared else table.dtype
    rows = g.node("Gather", g.table(_TABLE, table, dtype), "input_ids", axis=0)
    text = rows if dtype == np.float32 else g.cast(rows, TensorProto.FLOAT)
    zero = g.constant("zero", np.array(0, np.int64))
    image = g.node("Gather", "image_embeddings", g.node("Max", "image_index", zero), axis=0)
    is_image = g.node("Unsqueeze", g.node("GreaterOrEqual", "image_index", zero), g.ints(-1))  # [B, S, 1]
    return g.node("Where", is_image, g.to_fp32(image), text)


def _rotary(g: GraphWriter, checkpoint: Checkpoint) -> tuple[str, str]:
    """Cos and sin [B, S, head_dim / 2], fp32: each frequency turns with time, height or width (M-RoPE sections)."""
    text = checkpoint.text
    exponents = np.arange(0, text.head_dim, 2, dtype=np.float32) / np.float32(text.head_dim)
    frequencies = (1 / np.float32(text.rope_theta) ** exponents).astype(np.float32)
    axes = np.repeat(np.arange(3, dtype=np.int64), text.mrope_section)
    positions = g.node("Transpose", g.cast("position_ids", TensorProto.FLOAT), perm=[1, 2, 0])  # [B, S, 3]
    positions = g.node("Gather", positions, g.constant("rotary_axes", axes), axis=2)
    angles = g.node("Mul", positions, g.constant("rotary_frequencies", frequencies))
    return g.node("Cos", angles), g.node("Sin", angles)


def _causal_mask(g: GraphWriter) -> str:
    """Bool [B, 1, S, max_seq]: new token s of sequence b sees cache positions 0 to write_index[b] + s."""
    zero, one = g.constant("zero", np.array(0, np.int64)), g.constant("one", np.array(1, np.int64))

    def count(tensor: str, axis: int) -> str:
        size = g.node("Gather", g.node("Shape", tensor), g.constant(f"axis_{axis}", np.array(axis, np.int64)))
        return g.node("Range", zero, size, one)

    query = g.node("Add", g.node("Unsqueeze", "write_index", g.ints(1)), count("input_ids", 1))  # [B, S]
    query = g.node("Unsqueeze", query, g.ints(1, 3))  # [B, 1, S, 1]
    return g.node("LessOrEqual", count("past_key.0", 2), query)


def _norm(g: GraphWriter, checkpoint: Checkpoint, name: str, x: str) -> str:
    """fp32 [.., hidden] → compute type [.., hidden]."""
    weight = g.vector(name, checkpoint.array(name), np.dtype(np.float32))
    y = g.node("RMSNormalization", x, weight, axis=-1, epsilon=checkpoint.text.rms_norm_eps)
    return g.to_compute(y)


def _layer(g: GraphWriter, checkpoint: Checkpoint, i: int, x: str, *, rotary: tuple[str, str], mask: str) -> str:
    text, prefix = checkpoint.text, f"language_model.layers.{i}"

    def linear(y: str, name: str, *, has_bias: bool = False) -> str:
        weight = f"{prefix}.{name}.weight"
        bias = checkpoint.array(f"{prefix}.{name}.bias") if has_bias else None
        if g.precision.weights == "int4":
            return g.int4(y, weight, checkpoint.array(weight), bias)
        return g.linear(y, weight, checkpoint.weight(weight), bias)

    def heads(y: str, count: int) -> str:  # [B, S, heads · head_dim] → [B, heads, S, head_dim]
        y = g.node("Reshape", y, g.ints(0, 0, count, text.head_dim))
        return g.node("Transpose", y, perm=[0, 2, 1, 3])

    def rotate(y: str) -> str:
        return g.to_compute(g.node("RotaryEmbedding", g.to_fp32(y), *rotary))

    y = _norm(g, checkpoint, f"{prefix}.input_layernorm.weight", x)
    query = rotate(heads(linear(y, "self_attn.q_proj", has_bias=True), text.num_attention_heads))
    key = rotate(heads(linear(y, "self_attn.k_proj", has_bias=True), text.num_key_value_heads))
    value = heads(linear(y, "self_attn.v_proj", has_bias=True), text.num_key_value_heads)
    key = g.node("TensorScatter", f"past_key.{i}", key, "write_index", name=f"present_key.{i}", axis=2)
    value = g.node("TensorScatter", f"past_value.{i}", value, "write_index", name=f"present_value.{i}", axis=2)
    y = g.node(
        "Attention", query, key, value, mask, scale=text.head_dim**-0.5, softmax_precision=int(TensorProto.FLOAT)
    )
    y = g.node("Reshape", g.node("Transpose", y, perm=[0, 2, 1, 3]), g.ints(0, 0, text.hidden_size))
    x = g.node("Add", x, g.to_fp32(linear(y, "self_attn.o_proj")))
    y = _norm(g, checkpoint, f"{prefix}.post_attention_layernorm.weight", x)
    gate = linear(y, "mlp.gate_proj")
    gate = g.node("Mul", gate, g.node("Sigmoid", gate))
    y = linear(g.node("Mul", gate, linear(y, "mlp.up_proj")), "mlp.down_proj")
    return g.node("Add", x, g.to_fp32(y))


def _head(g: GraphWriter, checkpoint: Checkpoint, x: str) -> None:
    """Logits of the positions in `logits_index`, fp32 [B, P, vocab]."""
    text = checkpoint.text
    index = g.node("Unsqueeze", "logits_index", g.ints(-1))
    x = g.node("GatherND", x, index, batch_dims=1)  # [B, P, hidden]
    x = _norm(g, checkpoint, "language_model.norm.weight", x)
    name = _TABLE if checkpoint.tied else "lm_head.weight"
    weight = checkpoint.array(name)
    if g.precision.head == "int4":
        logits = g.to_fp32(g.int4(x, "lm_head.weight", weight))
    elif g.precision.head == "fp8" and (scale := checkpoint.head_input_scale()):
        logits = g.to_fp32(g.fp8(x, "lm_head.weight", weight, scale))
    else:
        # Gemm reads the table as it lies, [vocab, hidden], so that a tied head needs no second copy.
        rows = g.node("Reshape", x, g.ints(-1, text.hidden_size))
        logits = g.to_fp32(g.node("Gemm", rows, g.table(name, weight, g.dtype), transB=1))
        shape = g.node("Concat", g.node("Shape", "logits_index"), g.ints(text.vocab_size), axis=0)
        logits = g.node("Reshape", logits, shape)
    g.node("Identity", logits, name="logits")


FORM = Form(
    "onnx",
    Precision.of,
    lambda checkpoint, folder, chosen, _, progress: check(
        write_decoder(
            checkpoint,
            folder,
            precision=chosen.weights,
            compute=chosen.compute,
            head=chosen.head,
            progress=progress,
        )
    ),
)
