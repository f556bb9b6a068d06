"""An independent reader of TensorRT-LLM checkpoints: a Qwen2-VL decoder in torch that knows the format's tables only.

It shares no code with the writer or the request builder. Weights are dequantized, computation is in float32.
"""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

FP8_MAX = 448.0


class Decoder:
    """Reads `config.json` and `rank0.safetensors`, and refuses what the engine would refuse.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_text())
        assert config["architecture"] == "Qwen2VLForConditionalGeneration" and config["qwen_type"] == "qwen2_vl"
        assert config["position_embedding_type"] == "mrope" and config["rotary_scaling"]["type"] == "mrope"
        assert config["hidden_act"] == "silu" and config["attn_bias"] and not config["mlp_bias"]
        assert config["mapping"]["world_size"] == 1
        self.config, self.algorithm = config, config["quantization"]["quant_algo"]
        self.excluded = config["quantization"].get("exclude_modules") or []
        self.tensors = load_file(folder / "rank0.safetensors")
        self.read = set()
        self.plain: dict[str, torch.Tensor] = {}  # weights in float32

    def tensor(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return self.tensors[name]

    def float_of(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in self.plain:
            self.plain[name] = weight.float()
        return self.plain[name]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        bias = self.tensor(f"{name}.bias").float() if f"{name}.bias" in self.tensors else None
        weight = self.tensor(f"{name}.weight")
        plain = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.excluded)
        if plain or self.algorithm in (None, "W4A16"):  # W4A16 is rounded while the engine is built
            assert weight.dtype == torch.bfloat16
            return torch.nn.functional.linear(x, self.float_of(name, weight), bias)
        if self.algorithm == "FP8":
            assert weight.dtype == torch.float8_e4m3fn
            scale, activation = (self.tensor(f"{name}.{part}_scaling_factor") for part in ("weights", "activation"))
            assert scale.shape == activation.shape == (1,) and scale.dtype == activation.dtype == torch.float32
            x = (x / activation).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * activation
            return torch.nn.functional.linear(x, weight.float() * scale, bias)
        assert self.algorithm == "W4A16_AWQ"
        values = unpack(weight)
        scale, smooth = (self.tensor(f"{name}.{part}_scaling_factor") for part in ("weights", "prequant"))
        group = self.config["quantization"]["group_size"]
        assert scale.shape == (values.shape[0], values.shape[1] // group) and smooth.shape == (values.shape[1],)
        values = values * scale.float().repeat_interleave(group, dim=1)
        return torch.nn.functional.linear(x * smooth.float(), values, bias)

    def embed(self, ids: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
        """Ids from the vocabulary's size on are rows of the prompt table."""
        vocab, embedding = self.config["vocab_size"], self.tensor("transformer.vocab_embedding.weight")
        assert embedding.shape[0] == vocab
        rows = [embedding[i].float() if i < vocab else table[i - vocab].float() for i in ids.tolist()]
        return torch.stack(rows)

    def generate(self, inputs: dict, count: int) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and the logits of the prompt's last one, from the backend's input tensors."""
        stream = Stream(self, inputs)
        first, tokens = stream.logits, []
        while len(tokens) < count:
            tokens.append(int(stream.logits.argmax()))
            stream.append(tokens[-1])
        return tokens, first

    def forward(self, x: torch.Tensor, rotary: torch.Tensor, cache: list) -> torch.Tensor:
        """Logits of the last of the new tokens; x is [S, hidden], rotary [S, dim / 2, 2]."""
        config = self.config
        heads, kv_heads, dim = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_size"))
        cos, sin = rotary[..., 0], rotary[..., 1]
        new = len(x)
        for i in range(config["num_hidden_layers"]):
            layer = f"transformer.layers.{i}"
            y = self.norm(f"{layer}.input_layernorm", x)
            qkv = self.linear(f"{layer}.attention.qkv", y)
            q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
            q, k, v = (part.reshape(new, -1, dim).transpose(0, 1) for part in (q, k, v))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if cache[i] is not None:
                k, v = torch.cat([cache[i][0], k], dim=1), torch.cat([cache[i][1], v], dim=1)
            cache[i] = k, v
            total = k.shape[1]
            mask = torch.arange(total)[None] <= torch.arange(total - new, total)[:, None]
            k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, v))
            scores = (q @ k.transpose(1, 2) / dim**0.5).masked_fill(~mask, -torch.inf)
            y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(new, heads * dim)
            x = x + self.linear(f"{layer}.attention.dense", y)
            y = self.norm(f"{layer}.post_layernorm", x)
            active = torch.nn.functional.silu(self.linear(f"{layer}.mlp.fc", y))
            x = x + self.linear(f"{layer}.mlp.proj", active * self.linear(f"{layer}.mlp.gate", y))
        return self.linear("lm_head", self.norm("transformer.ln_f", x[-1:]))[0]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["norm_epsilon"])
        return scaled * self.tensor(f"{name}.weight").float()


class Stream:
    """One request: its prompt read, and logits for the token that comes next."""

    def __init__(self, decoder: Decoder, inputs: dict):
        config = decoder.config
        ids = torch.as_tensor(inputs["input_ids"][0].astype("int64"))
        assert inputs["input_lengths"].tolist() == [[len(ids)]]
        table = inputs.get("prompt_embedding_table")
        if table is not None:
            assert str(table.dtype) == config["dtype"]
            table = torch.as_tensor(table[0].astype("float32"))
        flat = torch.as_tensor(inputs["mrope_rotary_cos_sin"][0])
        positions, dim = config["max_position_embeddings"], config["rotary_embedding_dim"]
        assert flat.shape == (positions * dim,) and flat.dtype == torch.float32
        rotary = flat.reshape(positions, dim // 2, 2)
        self.decoder, self.cache = decoder, [None] * config["num_hidden_layers"]
        self.delta = int(inputs["mrope_position_deltas"][0, 0])
        self.frequencies = config["rotary_base"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        self.logits = decoder.forward(decoder.embed(ids, table), rotary[: len(ids)], self.cache)

    def append(self, token: int) -> None:
        angle = (self.cache[0][0].shape[1] + self.delta) * self.frequencies  # ordinary rotation from here on
        step = torch.stack([angle.cos(), angle.sin()], dim=-1).float()[None]
        self.logits = self.decoder.forward(self.decoder.embed(torch.tensor([token]), None), step, self.cache)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Channel j with channel j + dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def unpack(weight: torch.Tensor) -> torch.Tensor:
    """int8 [out / 2, in] → signed 4-bit values [out, in]: even rows in the low half of a byte, odd ones in the high."""
    assert weight.dtype == torch.int8
    halves = weight.to(torch.int16)
    low, high = (halves << 12).to(torch.int16) >> 12, halves >> 4
    return torch.stack([low, high], dim=1).reshape(-1, weight.shape[1]).float()
