"""Small random Qwen2.5-VL checkpoints made by transformers: the reference that graphs and runtimes are held against."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

IMAGE_TOKEN, VISION_START, VISION_END, END = 311, 312, 313, 314  # far from Qwen's own ids, so that none is hard-coded


def random_checkpoint(
    folder: Path,
    *,
    dtype: str = "float32",
    tied: bool = True,
    layers: int = 3,
    hidden: int = 128,
    heads: int = 4,
    intermediate: int | None = None,
    vocab: int = 320,
    shard_size: str = "1GB",
    seed: int = 0,
):
    """Write a small checkpoint folder (weights, config, generation and preprocessor config) and give the model.

    Parameters
    ----------
    folder : Path
        Made if absent.
    dtype : {"float32", "bfloat16", "float16"}
        Type of the tensors on disk and of the returned model.
    tied : bool
        The head is the embedding table.
    layers, hidden, heads, intermediate, vocab : int
        Decoder size; 2 KV heads, by default 3 · hidden intermediate. `hidden` is a multiple of 16 · heads.
    shard_size : str
        Largest shard, as `save_pretrained` takes it.
    seed : int

    Returns
    -------
    transformers.Qwen2_5_VLForConditionalGeneration
        In evaluation mode.
    """
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    head_dim = hidden // heads
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": intermediate or 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "vocab_size": vocab,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16],
            },
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": END,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 4,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():  # fresh biases are 0 and fresh norms are 1: a graph that drops them would pass
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in name or "ln_q" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=[END, END + 1], pad_token_id=END + 1)
    model.save_pretrained(folder, max_shard_size=shard_size)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "rescale_factor": 1 / 255,
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    # Read back: a cast model keeps rotary frequencies of the lower precision, which no checkpoint holds.
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def empty_cache(batch: int, max_sequence: int, *, layers: int, kv_heads: int, head_dim: int, dtype=np.float32) -> dict:
    """Zeroed `past_key.{i}` and `past_value.{i}` feeds of `decoder.onnx`."""
    shape = (batch, kv_heads, max_sequence, head_dim)
    return {f"past_{kind}.{i}": np.zeros(shape, dtype) for i in range(layers) for kind in ("key", "value")}
