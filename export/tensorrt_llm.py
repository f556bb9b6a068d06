"""Write the decoder of a checkpoint as TensorRT-LLM's `trtllm-build` takes it: `config.json` and `rank0.safetensors`.

TensorRT-LLM's engine path knows Qwen2-VL and not Qwen2.5-VL; the decoders are the same layer by layer, so ours goes in
under the older name, which is also what turns M-RoPE on. Tensor names, shapes and types are those of TensorRT-LLM 1.2
(`models/qwen`, `models/modeling_utils.py`). Not run on TensorRT-LLM here: tests read the files by its rules instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from cxr_triton.errors import InvalidRequest, UnsupportedCheckpoint
from cxr_triton.export.checkpoint import Checkpoint, Fp8Weight, Int4Weight
from cxr_triton.export.graph import Form, Precision
from cxr_triton.export.progress import bar
from cxr_triton.export.safetensors import header
from cxr_triton.files import new_folder, require_new

PRECISIONS = {"bf16": None, "fp8": "FP8", "int4-awq": "W4A16_AWQ", "int4": "W4A16"}  # and its quant_algo
_BF16, _FP32, _FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(ml_dtypes.float8_e4m3fn)
_STORED = {_BF16: "BF16", _FP32: "F32", _FP8: "F8_E4M3", np.dtype(np.int8): "I8"}
_ROWS_BYTES = 16 << 20  # converted at a time
_MLP = {"fc": "gate_proj", "gate": "up_proj", "proj": "down_proj"}  # TensorRT-LLM activates `fc`: it is the gate


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file; its rows are made when they are written."""

    dtype: np.dtype
    shape: tuple[int, ...]
    rows: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_tensorrt_llm(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    precision: str,
    max_position_embeddings: int,
    progress: bool | None = None,
) -> dict:
    """Write the folder that `trtllm-build --checkpoint_dir` takes; it appears complete or not at all.

    Parameters
    ----------
    checkpoint : Checkpoint
        Plain weights for ``bf16`` and ``int4``; quantized by the same scheme for ``fp8`` and ``int4-awq``.
    folder : Path
        Must not exist, or be an empty folder.
    precision : {"bf16", "fp8", "int4-awq", "int4"}
        ``int4`` leaves bf16 weights that `trtllm-build` rounds to int4 per channel while it loads them.
    max_position_embeddings : int
        Longest prompt and answer in tokens. Every request carries cos and sin of so many positions, 512 bytes each.
    progress : bool, optional
        Show a bar on standard error; by default on a terminal.

    Returns
    -------
    dict
        What `config.json` holds.

    Raises
    ------
    InvalidRequest
        An unknown precision, one that the checkpoint does not hold, or a folder in use.
    """
    folder = Path(folder)
    _check(checkpoint, precision, max_position_embeddings)
    require_new(folder)
    config = decoder_config(checkpoint, precision, max_position_embeddings)
    tensors = _tensors(checkpoint, config)
    with new_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        path, total = partial / "rank0.safetensors", sum(tensor.nbytes for tensor in tensors.values())
        with open(path, "wb") as file, bar(total, path.name, progress, unit="B", unit_scale=True) as shown:
            file.write(header({name: (_STORED[t.dtype], t.shape, t.nbytes) for name, t in tensors.items()}))
            for name, tensor in tensors.items():
                written = 0
                for rows in tensor.rows():
                    written += file.write(np.ascontiguousarray(rows, tensor.dtype).view(np.uint8).data)
                    shown.update(rows.size * tensor.dtype.itemsize)
                if written != tensor.nbytes:
                    raise AssertionError(f"{name}: {written} bytes written, {tensor.nbytes} announced")
    return config


def _precision(weights: str, compute: str | None, head: str | None) -> Precision:
    if compute not in (None, "bf16") or head not in (None, "compute"):
        raise InvalidRequest(
            f"compute {compute} with head {head} was asked for; TensorRT-LLM's decoder has bf16 for both, leave "
            "them out"
        )
    return Precision.of(weights, "bf16", "compute")


def _check(checkpoint: Checkpoint, precision: str, max_position_embeddings: int) -> None:
    if precision not in PRECISIONS:
        raise InvalidRequest(f"precision {precision!r} is unknown to TensorRT-LLM; choose {', '.join(PRECISIONS)}")
    held = checkpoint.quantization.scheme if checkpoint.quantization else None
    wanted = precision if precision in ("fp8", "int4-awq") else None
    if held != wanted:
        raise InvalidRequest(
            f"precision {precision} needs {f'weights quantized to {wanted}' if wanted else 'plain weights'}, "
            f"{checkpoint.folder} holds {held or 'plain ones'}; "
            + ("quantize it with `cxr-triton quantize`" if wanted else "give the original checkpoint")
        )
    limit = checkpoint.text.max_position_embeddings
    if not 1 <= max_position_embeddings <= limit:
        raise InvalidRequest(
            f"max_position_embeddings is {max_position_embeddings}, the checkpoint allows 1 to {limit}"
        )


def decoder_config(checkpoint: Checkpoint, precision: str, max_position_embeddings: int) -> dict:
    """`config.json` of the decoder, see `write_tensorrt_llm`."""
    text, held = checkpoint.text, checkpoint.quantization
    quantization: dict = {"quant_algo": PRECISIONS[precision], "kv_cache_quant_algo": None}
    if precision != "bf16":
        # Named outright: without the second pattern W4A16 rounds the embedding table too.
        quantization["exclude_modules"] = ["*lm_head", "*vocab_embedding"]
    if held and held.scheme == "int4-awq":
        quantization |= {"group_size": held.group_size, "has_zero_point": False, "pre_quant_scale": True}
    if held and held.kv:
        quantization["kv_cache_quant_algo"] = "FP8"
    return {
        "architecture": "Qwen2VLForConditionalGeneration",
        "qwen_type": "qwen2_vl",
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_size": text.head_dim,
        "hidden_act": "silu",
        "norm_epsilon": text.rms_norm_eps,
        "position_embedding_type": "mrope",
        "rotary_embedding_dim": text.head_dim,
        "rotary_base": float(text.rope_theta),
        "rotary_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "max_position_embeddings": max_position_embeddings,
        "seq_length": max_position_embeddings,
        "attn_bias": True,
        "mlp_bias": False,
        "use_logn_attn": False,
        "tie_word_embeddings": checkpoint.tied,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": quantization,
    }


def _tensors(checkpoint: Checkpoint, config: dict) -> dict[str, _Tensor]:
    """All tensors of `rank0.safetensors` by name, in the order of the file."""
    awq = config["quantization"]["quant_algo"] == "W4A16_AWQ"
    kv_scales = checkpoint.kv_scales()
    result = {"transformer.vocab_embedding.weight": _plain(checkpoint, "language_model.embed_tokens.weight")}
    for i in range(checkpoint.text.num_hidden_layers):
        ours, theirs = f"language_model.layers.{i}", f"transformer.layers.{i}"
        qkv = [f"{ours}.self_attn.{part}_proj" for part in "qkv"]
        result[f"{theirs}.input_layernorm.weight"] = _plain(checkpoint, f"{ours}.input_layernorm.weight")
        result |= _linear(checkpoint, f"{theirs}.attention.qkv", qkv, awq)
        result[f"{theirs}.attention.qkv.bias"] = _plain(checkpoint, *(f"{name}.bias" for name in qkv))
        result |= _linear(checkpoint, f"{theirs}.attention.dense", [f"{ours}.self_attn.o_proj"], awq)
        if kv_scales:
            # One for both. At least 1, as modelopt's own exporter for TensorRT-LLM writes it.
            scale = max(1.0, *kv_scales[i].values())
            result[f"{theirs}.attention.kv_cache_scaling_factor"] = _values(np.array([scale], np.float32))
        result[f"{theirs}.post_layernorm.weight"] = _plain(checkpoint, f"{ours}.post_attention_layernorm.weight")
        for name, source in _MLP.items():
            result |= _linear(checkpoint, f"{theirs}.mlp.{name}", [f"{ours}.mlp.{source}"], awq)
    result["transformer.ln_f.weight"] = _plain(checkpoint, "language_model.norm.weight")
    head = "language_model.embed_tokens.weight" if checkpoint.tied else "lm_head.weight"
    result["lm_head.weight"] = _plain(checkpoint, head)
    return result


def _linear(checkpoint: Checkpoint, name: str, sources: list[str], awq: bool) -> dict[str, _Tensor]:
    """Weight and scales of one layer, of several that lie side by side in TensorRT-LLM."""
    weights = [checkpoint.weight(f"{source}.weight") for source in sources]
    fp8 = [weight for weight in weights if isinstance(weight, Fp8Weight)]
    int4 = [weight for weight in weights if isinstance(weight, Int4Weight)]
    if len(fp8) == len(weights):
        return _fp8(name, fp8)
    if len(int4) == len(weights):
        return _awq(name, int4)
    if awq or fp8 or int4:
        # Nothing in the format says which layers of the decoder are left in bf16.
        raise UnsupportedCheckpoint(
            f"{' and '.join(sources)}: not quantized, or not alike, in a quantized checkpoint; "
            "quantize all linear layers of the decoder for TensorRT-LLM"
        )
    return {f"{name}.weight": _plain(checkpoint, *(f"{source}.weight" for source in sources))}


def _fp8(name: str, weights: list[Fp8Weight]) -> dict[str, _Tensor]:
    scale = max(weight.scale for weight in weights)

    def rows() -> Iterator[np.ndarray]:
        for weight in weights:
            for part in _slices(weight.values):
                # modelopt gives layers that are fused one scale; others are rounded again to the largest.
                yield part if weight.scale == scale else (part.astype(_FP32) * (weight.scale / scale)).astype(_FP8)

    activation = max(weight.input_scale for weight in weights)
    shape = (sum(len(weight.values) for weight in weights), weights[0].values.shape[1])
    return {
        f"{name}.weight": _Tensor(_FP8, shape, rows),
        f"{name}.weights_scaling_factor": _values(np.array([scale], np.float32)),
        f"{name}.activation_scaling_factor": _values(np.array([activation], np.float32)),
    }


def _awq(name: str, weights: list[Int4Weight]) -> dict[str, _Tensor]:
    packed, scales = [weight.packed.view(np.int8) for weight in weights], [weight.scales for weight in weights]
    folded = np.ones(packed[0].shape[1], _BF16)  # into the norm before
    smoothing = [folded if weight.pre_quant_scale is None else weight.pre_quant_scale for weight in weights]
    if not all(np.array_equal(s, smoothing[0]) for s in smoothing):
        raise UnsupportedCheckpoint(f"{name}: the layers that TensorRT-LLM fuses differ in pre_quant_scale")
    return {
        f"{name}.weight": _joined(packed, np.dtype(np.int8)),
        f"{name}.weights_scaling_factor": _joined(scales, _FP32),
        f"{name}.prequant_scaling_factor": _values(smoothing[0].astype(_BF16)),
    }


def _plain(checkpoint: Checkpoint, *names: str) -> _Tensor:
    """bf16 of tensors one below the other."""
    return _joined([checkpoint.array(name) for name in names], _BF16)


def _joined(arrays: list[np.ndarray], dtype: np.dtype) -> _Tensor:
    shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
    return _Tensor(dtype, shape, lambda: (part.astype(dtype, copy=False) for a in arrays for part in _slices(a)))


def _values(array: np.ndarray) -> _Tensor:
    return _Tensor(array.dtype, array.shape, lambda: iter([array]))


def _slices(array: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, _ROWS_BYTES * len(array) // max(1, array.nbytes))
    return (array[start : start + step] for start in range(0, len(array), step))


FORM = Form(
    "tensorrt-llm",
    _precision,
    lambda checkpoint, folder, chosen, tokens, progress: write_tensorrt_llm(
        checkpoint,
        folder / "decoder",
        precision=chosen.weights,
        max_position_embeddings=tokens,
        progress=progress,
    ),
)
