"""Patches equal to the Hugging Face processor's, windows in the order of transformers."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_triton.errors import InvalidImage
from cxr_triton.pixels import image

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

SIZES = [
    (512, 512),  # square, down to the budget
    (30, 40),  # up to the least area
    (28, 28),
    (1, 1),
    (7, 1200),  # a side that rounds to zero
    (224, 224),  # already a multiple of 28: no resize
    (420, 504),
    (476, 476),  # the budget itself
    (390, 320),
    (1024, 760),
    (3056, 2544),
    (200, 2000),
    (2000, 231),
    (602, 350),  # rounds half to even: 21.5 and 12.5 units
]


def processor(**config):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**config)


def picture(height, width, channels, seed=0):
    """Noise over a gradient: both the resampler's averaging and its overshoot at 0 and 255 matter."""
    rng = np.random.default_rng(seed)
    base = np.linspace(-60, 315, height)[:, None] + np.linspace(-40, 40, width)
    pixels = np.clip(base[..., None] + rng.normal(0, 60, (height, width, channels or 1)), 0, 255).astype(np.uint8)
    return pixels if channels else pixels[..., 0]


def in_processor_order(vision, normalize=True):
    """fp32 [patches, 1176] in the processor's raster order of merge units, out of the windows."""
    units = vision.pixel_windows.reshape(-1, 4, 588)[vision.merge_order[: vision.tokens]]
    patches = units.reshape(-1, 3, 1, 196)
    # The processor's own arithmetic: scale in fp64, then fp32.
    scaled = (patches.astype(np.float64) * (1 / 255)).astype(np.float32)
    normalized = (scaled - MEAN[:, None, None]) / STD[:, None, None]
    return np.repeat(normalized, 2, axis=2).reshape(len(patches), -1)


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("height, width", SIZES)
def test_patches_equal_processor(height, width, channels):
    limits = {"min_pixels": 128 * 128, "max_pixels": 476 * 476}
    pixels = picture(height, width, channels)
    rgb = pixels if channels else np.repeat(pixels[..., None], 3, axis=2)
    expected = processor(**limits)(rgb, input_data_format="channels_last", return_tensors="np")

    size = image.target_size(height, width, **limits)
    vision = image.windows(image.resize(pixels, size), window_budget=60, token_budget=320)

    assert (1, vision.rows, vision.cols) == tuple(expected["image_grid_thw"][0])
    np.testing.assert_array_equal(in_processor_order(vision), expected["pixel_values"])


@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    least=st.integers(1, 300_000),
    extra=st.integers(784, 2_000_000),
)
@settings(max_examples=500, deadline=None)
def test_target_size_equals_smart_resize(height, width, least, extra):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    limits = {"min_pixels": least, "max_pixels": least + extra}
    try:
        expected = smart_resize(height, width, **limits)
    except ValueError:
        with pytest.raises(InvalidImage, match="aspect ratio"):
            image.target_size(height, width, **limits)
        return
    assert image.target_size(height, width, **limits) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"min_pixels": 3136, "max_pixels": 226_576},
        {"size": {"shortest_edge": 3136, "longest_edge": 262_144}},
        {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}, "max_pixels": 226_576},
        {},
    ],
)
def test_both_spellings_of_the_pixel_limits(config):
    reference = processor(**config).size
    assert image.pixel_limits(config) == (reference["shortest_edge"], reference["longest_edge"])


@pytest.mark.parametrize("rows, cols", [(16, 16), (34, 34), (30, 36), (2, 2), (2, 40), (46, 8), (18, 14), (20, 26)])
def test_windows_equal_transformers(rows, cols):
    import torch
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    grid_thw = torch.tensor([[1, rows, cols]])
    order, bounds = get_vision_window_index(grid_thw, spatial_merge_size=2, window_size=112, patch_size=14)
    positions = get_vision_position_ids(grid_thw, 2).numpy().reshape(-1, 4, 2)

    vision = image.windows(np.zeros((rows * 14, cols * 14), np.uint8), window_budget=40, token_budget=320)

    # Dropping the padding leaves the windows of transformers: their patches, lengths and token order.
    in_window_order = positions[order.numpy()].reshape(-1, 2)
    np.testing.assert_array_equal(vision.patch_rows_cols[vision.valid], in_window_order)
    lengths = vision.valid.sum(1)
    np.testing.assert_array_equal(lengths[lengths > 0], np.diff(bounds.numpy()))
    valid_units = np.flatnonzero(vision.valid.reshape(-1, 4)[:, 0])
    restored = np.searchsorted(valid_units, vision.merge_order[: vision.tokens])
    np.testing.assert_array_equal(restored, torch.argsort(order).numpy())

    assert not vision.patch_rows_cols[~vision.valid].any()
    assert not vision.merge_order[vision.tokens :].any()
    assert vision.pixel_windows.shape == (40, 64, 588)
    assert vision.merge_order.shape == (320,)


def test_strips_are_refused_with_their_ratio_and_the_limits():
    wide = np.zeros((28, 28 * 60), np.uint8)
    with pytest.raises(InvalidImage, match=r"aspect ratio 60\.0.* 15 windows and 60 tokens, allowed are 9 and 81"):
        image.windows(wide, window_budget=9, token_budget=81)
    with pytest.raises(InvalidImage, match=r"needs 15 windows and 60 tokens, allowed are 20 and 59"):
        image.windows(wide, window_budget=20, token_budget=59)
    with pytest.raises(InvalidImage, match=r"aspect ratio 201, at most 200"):
        image.target_size(10, 2010, min_pixels=1, max_pixels=10**6)
    with pytest.raises(InvalidImage, match="0x5"):
        image.target_size(0, 5, min_pixels=1, max_pixels=10**6)
    with pytest.raises(InvalidImage, match="multiples of 28"):
        image.windows(np.zeros((30, 28), np.uint8), window_budget=9, token_budget=81)


def test_stack_pads_mixed_grids_to_one_batch():
    small = image.windows(np.full((28, 56), 7, np.uint8), window_budget=4, token_budget=40)
    large = image.windows(np.full((196, 140), 9, np.uint8), window_budget=4, token_budget=40)
    empty = image.blank(4, 40)
    batch = image.stack([small, large, empty])
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "pixel_windows": ("uint8", (3, 4, 64, 588)),
        "patch_rows_cols": ("int32", (3, 4, 64, 2)),
        "valid": ("bool", (3, 4, 64)),
        "merge_order": ("int32", (3, 40)),
    }
    assert batch["valid"].sum((1, 2)).tolist() == [8, 140, 4]
    np.testing.assert_array_equal(np.unique(batch["pixel_windows"][1][batch["valid"][1]]), [9])
    assert batch["valid"][2].any(1).tolist() == [True, False, False, False]
