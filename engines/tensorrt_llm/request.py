"""What TensorRT-LLM's C++ backend wants for one generation: fake ids, prompt table, M-RoPE table, sampling.

Names, types and checks are those of the `tensorrtllm` backend's model `tensorrt_llm` (TensorRT-LLM 1.2). Not run on it
here: tests hold the tensors against a reader of its rules.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from cxr_triton.engines.runtime.sampler import GREEDY_BELOW_TEMPERATURE
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.errors import InvalidBundle, InvalidRequest, PromptTooLong

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What a request depends on, from the engine's `config.json`.

    Attributes
    ----------
    dtype : str
        Type of the engine, and of the prompt table: ``bfloat16``, ``float16`` or ``float32``.
    vocab_size : int
        Ids from here on are rows of the prompt table.
    max_positions : int
        Rows of the M-RoPE table, `max_position_embeddings`.
    rotary_dim : int
    rotary_base : float
    mrope_section : tuple of int
        Frequencies that turn with time, height and width.
    max_batch : int
        Streams that run at the same time.
    max_sequence : int
        Prompt and answer, in tokens.
    max_prompt : int
        Prompt, in tokens: a whole one has to fit into a step of the engine, and to leave room for an answer.
    max_prompt_rows : int
        Rows of a request's prompt table.
    hidden : int
        Values of a row.
    """

    dtype: str
    vocab_size: int
    max_positions: int
    rotary_dim: int
    rotary_base: float
    mrope_section: tuple[int, ...]
    max_batch: int
    max_sequence: int
    max_prompt: int
    max_prompt_rows: int
    hidden: int

    @classmethod
    def read(cls, path: str | Path) -> EngineConfig:
        """From `config.json` in an engine's folder.

        Raises
        ------
        InvalidBundle
            No engine of a Qwen2-VL decoder with M-RoPE.
        """
        path = Path(path) / "config.json"
        try:
            whole = json.loads(path.read_bytes())
            model, build = whole["pretrained_config"], whole["build_config"]
            if (model["qwen_type"], model["position_embedding_type"]) != ("qwen2_vl", "mrope"):
                raise InvalidBundle(
                    f"{path} is an engine of {model['qwen_type']} with {model['position_embedding_type']} positions, "
                    "qwen2_vl with mrope is needed; build it from what cxr-triton export --format tensorrt-llm wrote"
                )
            section = tuple(int(size) for size in model["rotary_scaling"]["mrope_section"])
            if model["dtype"] not in DTYPES or 2 * sum(section) != model["rotary_embedding_dim"]:
                raise ValueError(f"dtype {model['dtype']}, mrope_section {section}")
            if build["max_seq_len"] > model["max_position_embeddings"]:
                raise ValueError(f"max_seq_len {build['max_seq_len']} is more than max_position_embeddings")
            if str(build.get("kv_cache_type", "paged")).lower().rpartition(".")[2] != "paged":
                raise ValueError(f"kv_cache_type {build['kv_cache_type']}, in-flight batching needs paged")
            return cls(
                dtype=model["dtype"],
                vocab_size=int(model["vocab_size"]),
                max_positions=int(model["max_position_embeddings"]),
                rotary_dim=int(model["rotary_embedding_dim"]),
                rotary_base=float(model["rotary_base"]),
                mrope_section=section,
                max_batch=int(build["max_batch_size"]),
                max_sequence=int(build["max_seq_len"]),
                max_prompt=min(int(build["max_seq_len"]) - 1, int(build["max_num_tokens"])),
                hidden=int(model["hidden_size"]),
                max_prompt_rows=int(build["max_prompt_embedding_table_size"]) // int(build["max_batch_size"]),
            )
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise InvalidBundle(
                f"{path} does not describe an engine ({type(error).__name__}: {error}); build it again"
            ) from None


def check_request(generation: Generation, config: EngineConfig) -> None:
    """Refuse what the engine would refuse.

    Raises
    ------
    PromptTooLong
        The prompt does not fit into a step, or leaves no room for an answer.
    InvalidRequest
        More image tokens than the engine was built for.
    """
    length, rows = len(generation.input_ids), int((generation.image_index >= 0).sum())
    if length > config.max_prompt:
        raise PromptTooLong(
            f"the prompt has {length} tokens, the engine takes {config.max_prompt} (one step, or its context of "
            f"{config.max_sequence} less 1 for the answer); shorten the prompt or the history, send fewer images, or "
            "build for more"
        )
    if rows > config.max_prompt_rows:
        raise InvalidRequest(
            f"the images take {rows} tokens, the engine was built for {config.max_prompt_rows}; send fewer or smaller "
            "images, or build with more"
        )


def request_tensors(
    generation: Generation, config: EngineConfig, *, prefix_reuse: bool = False
) -> dict[str, np.ndarray]:
    """Inputs of the model `tensorrt_llm` for one streamed request, each with its batch axis of 1.

    Stop strings are text and stay with whoever reads the tokens.

    Parameters
    ----------
    generation : Generation
    config : EngineConfig
    prefix_reuse : bool
        The engine keeps KV blocks for prompts that begin alike, and has to be told which image an image token is of.

    Returns
    -------
    dict of str to array
        By the backend's names. `prompt_embedding_table` is absent for a text-only request; the two M-RoPE tensors never
        are, or the engine refuses the request.

    Raises
    ------
    PromptTooLong, InvalidRequest
        As `check_request`.
    """
    check_request(generation, config)
    sampling, length = generation.sampling, len(generation.input_ids)
    ids, table = _fake_ids(generation, config)
    ends = sampling.eos_token_ids
    tensors = {
        "input_ids": ids.astype(np.int32),
        "input_lengths": np.array([length], np.int32),
        "request_output_len": np.array([min(sampling.max_new_tokens, config.max_sequence - length)], np.int32),
        "streaming": np.array([True]),
        "repetition_penalty": np.array([sampling.repetition_penalty], np.float32),
        "mrope_rotary_cos_sin": rotary_table(generation.position_ids, config),
        "mrope_position_deltas": np.array([int(generation.position_ids.max()) + 1 - length], np.int64),
    }
    if ends:
        tensors |= {name: np.array(ends[:1], np.int32) for name in ("end_id", "pad_id")}
    if ends[1:]:  # as words of one token each
        tensors["stop_words_list"] = np.array([ends[1:], np.arange(1, len(ends))], np.int32)
    if sampling.temperature < GREEDY_BELOW_TEMPERATURE:
        tensors["runtime_top_k"] = np.array([1], np.int32)
    else:
        tensors["temperature"] = np.array([sampling.temperature], np.float32)
        tensors["runtime_top_p"] = np.array([sampling.top_p], np.float32)
        # Without one the engine would draw the same for every request.
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % (1 << 64)
        tensors["seed"] = np.array([seed], np.uint64)
    if len(table):
        tensors["prompt_embedding_table"] = table
        if prefix_reuse:
            tensors["prompt_table_extra_ids"] = extra_ids(generation, table)
    return {name: value[None] for name, value in tensors.items()}


def _fake_ids(generation: Generation, config: EngineConfig) -> tuple[np.ndarray, np.ndarray]:
    """Ids whose image tokens count on from the vocabulary, and the rows that they name in their order."""
    is_image = generation.image_index >= 0
    ids = generation.input_ids.copy()
    ids[is_image] = config.vocab_size + np.arange(int(is_image.sum()))
    return ids, generation.image_embeddings[generation.image_index[is_image]].astype(DTYPES[config.dtype])


def extra_ids(generation: Generation, table: np.ndarray) -> np.ndarray:
    """What tells the image tokens of different images apart in the engine's hashes of KV blocks.

    An id is made of what the keys of an image's tokens depend on besides the tokens before them: its embeddings and its
    grid, so equal ids at equal places mean equal keys.

    Parameters
    ----------
    generation : Generation
    table : (rows, hidden) array
        The request's prompt table.

    Returns
    -------
    (S,) uint64 array
        0 for text, one positive number for all tokens of an image.
    """
    is_image = generation.image_index >= 0
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_image, [False]])))
    ids, row = np.zeros(len(is_image), np.uint64), 0
    for start, end in edges.reshape(-1, 2):  # an image is a run of image tokens, framed by its two control tokens
        grid = generation.position_ids[:, start:end] - generation.position_ids[:, start : start + 1]
        content = hashlib.blake2b(np.ascontiguousarray(grid, np.int64).tobytes(), digest_size=8)
        content.update(table[row : row + end - start].tobytes())
        ids[start:end] = int.from_bytes(content.digest(), "little") or 1
        row += end - start
    return ids


def stop_tensors() -> dict[str, np.ndarray]:
    """Inputs that cancel the request whose id they are sent under; the three others only have to be there."""
    nothing = {name: np.zeros((1, 1), np.int32) for name in ("input_ids", "input_lengths", "request_output_len")}
    return {**nothing, "stop": np.array([[True]])}


def rotary_table(position_ids: np.ndarray, config: EngineConfig) -> np.ndarray:
    """Cos and sin of every position of the context, interleaved, as the engine reads them.

    Parameters
    ----------
    position_ids : (3, S) int64 array
    config : EngineConfig

    Returns
    -------
    (max_positions * rotary_dim,) float32 array
        Of [position, frequency, (cos, sin)]; beyond the prompt those of position 0, which the engine does not read.
    """
    half = config.rotary_dim // 2
    frequencies = (1 / np.float32(config.rotary_base) ** (np.arange(half, dtype=np.float32) / half)).astype(np.float32)
    axes = np.repeat(np.arange(3), config.mrope_section)
    angles = position_ids[axes].T.astype(np.float32) * frequencies
    table = np.zeros((config.max_positions, half, 2), np.float32)
    table[:, :, 0] = 1
    table[: len(angles)] = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return table.ravel()
