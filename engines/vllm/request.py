"""What the engine's process takes for one generation, checked: vLLM dies of embeddings of a wrong shape."""

from __future__ import annotations

import hashlib
import secrets

import numpy as np

from cxr_triton.engines.geometry import Geometry
from cxr_triton.engines.runtime.sampler import GREEDY_BELOW_TEMPERATURE
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.errors import InvalidRequest
from cxr_triton.sampling import Sampling


def message(generation: Generation, geometry: Geometry) -> tuple[dict, np.ndarray]:
    """A request and the rows of its images.

    vLLM writes an image's tokens itself, from one in the place of all, and computes M-RoPE positions from the grids.

    Parameters
    ----------
    generation : Generation
    geometry : Geometry

    Returns
    -------
    dict
        ``ids``, ``images`` with ``grid`` (time, rows and columns of patches) and ``digest``, ``hidden``, ``sampling``,
        ``guide``.
    (N, hidden) float32 array
        Of all images, one below the other.

    Raises
    ------
    InvalidRequest
        Image tokens without rows, or positions that no grid of rows and columns has.
    """
    spans = image_spans(generation.image_index)
    ids = generation.input_ids
    if not np.array_equal(ids == geometry.image_token_id, generation.image_index >= 0):
        raise InvalidRequest("image tokens and rows of image_embeddings do not belong together; call cxr_reader")
    kept, images, rows = np.ones(len(ids), bool), list[dict](), []
    for start, end in spans:
        kept[start + 1 : end] = False
        values = np.ascontiguousarray(generation.image_embeddings[generation.image_index[start:end]], np.float32)
        height, width = _grid(generation.position_ids[:, start:end])
        grid = [1, height * geometry.merge_size, width * geometry.merge_size]
        images.append({"grid": grid, "digest": _digest(values, height, width)})
        rows.append(values)
    _check_positions(generation.position_ids, spans)
    asked = {
        "ids": ids[kept].tolist(),
        "images": images,
        "hidden": geometry.hidden,
        "sampling": sampling_params(generation.sampling, geometry.max_sequence - len(ids)),
        "guide": generation.sampling.guide,
    }
    return asked, np.concatenate(rows) if rows else np.zeros((0, geometry.hidden), np.float32)


def image_spans(image_index: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of each image's tokens; control tokens stand between two images."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], image_index >= 0, [False]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def sampling_params(sampling: Sampling, room: int) -> dict:
    """Arguments of vLLM's `SamplingParams`; stop strings are text and stay with whoever reads the tokens."""
    params: dict[str, object] = {
        "max_tokens": min(sampling.max_new_tokens, room),
        "repetition_penalty": float(sampling.repetition_penalty),
        "stop_token_ids": list(map(int, sampling.eos_token_ids)),
    }
    if sampling.temperature < GREEDY_BELOW_TEMPERATURE:
        return params | {"temperature": 0.0}
    seed = secrets.randbits(63) if sampling.seed is None else int(sampling.seed) % (1 << 63)
    return params | {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p), "seed": seed}


def _grid(positions: np.ndarray) -> tuple[int, int]:
    """Rows and columns of an image's tokens."""
    height, width = (int(axis.max() - axis.min()) + 1 for axis in positions[1:])
    return height, width


def _check_positions(given: np.ndarray, spans: list[tuple[int, int]]) -> None:
    """They have to be those that vLLM computes: text counts on, an image spans its grid from where the text stopped."""
    expected, index, position = np.empty_like(given), 0, 0
    for start, end in [*spans, (given.shape[1],) * 2]:
        expected[:, index:start] = np.arange(position, position + start - index)
        position += start - index
        if start < end:
            height, width = _grid(given[:, start:end])
            if height * width != end - start:
                raise InvalidRequest(
                    f"an image has {end - start} tokens, its positions span {height} rows and {width} columns; "
                    "call cxr_reader"
                )
            grid = np.stack([np.zeros((height, width)), *np.indices((height, width))])
            expected[:, start:end] = position + grid.reshape(3, -1)
            position += max(height, width)
        index = end
    if not np.array_equal(given, expected):
        raise InvalidRequest("position_ids are not those of this prompt and its images; call cxr_reader")


def _digest(rows: np.ndarray, height: int, width: int) -> str:
    """What tells one picture from another; equal rows in another grid are another picture."""
    content = hashlib.blake2b(f"{height}x{width}".encode(), digest_size=16)
    content.update(rows.data)
    return content.hexdigest()
