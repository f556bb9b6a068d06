"""Pictures that were encoded before: what the tower is asked for, and that nothing else changes."""

import numpy as np
import pytest

from cxr_triton.engines.pictures import PictureCache
from cxr_triton.engines.session import VisionSession
from cxr_triton.errors import InvalidRequest
from cxr_triton.pixels import image

HIDDEN, WINDOWS, TOKENS = 8, 4, 64


class Tower(VisionSession):
    """Rows that follow from all that is given, padding apart; garbage beyond a picture's tokens."""

    def __init__(self):
        self.encoded = []

    def _run(self, feeds):
        self.encoded.append(len(feeds["valid"]))
        rows = np.full((*feeds["merge_order"].shape, HIDDEN), np.nan, np.float32)
        given = (feeds[name] for name in ("merge_order", "valid", "pixel_windows"))
        for row, order, valid, windows in zip(rows, *given, strict=True):
            tokens = int(valid.sum()) // 4
            row[:tokens] = order[:tokens, None] + float(windows[valid].sum())
        return rows


def inputs(*seeds, sizes=((56, 84), (28, 28), (112, 56))):
    return image.stack(
        [
            image.windows(
                np.random.default_rng(seed).integers(0, 256, (*sizes[seed % len(sizes)], 3), np.uint8),
                window_budget=WINDOWS,
                token_budget=TOKENS,
            )
            for seed in seeds
        ]
    )


def same(given, found, expected):
    for valid, ours, theirs in zip(given["valid"], found, expected, strict=True):
        tokens = int(valid.sum()) // 4
        assert tokens
        np.testing.assert_array_equal(ours[:tokens], theirs[:tokens])


def test_a_prior_that_is_compared_with_many_is_encoded_once():
    tower = Tower()
    cache = PictureCache(tower, 1 << 20)
    for current in (1, 2, 3, 4):
        given = inputs(0, current)
        same(given, cache.encode(**given), Tower().encode(**given))
    assert tower.encoded == [2, 1, 1, 1]
    assert (cache.pictures, cache.hits) == (8, 3)


def test_equal_pictures_of_a_batch_are_encoded_once_and_stand_in_their_order():
    tower = Tower()
    given = inputs(2, 0, 2, 1, 0)
    same(given, PictureCache(tower, 1 << 20).encode(**given), Tower().encode(**given))
    assert tower.encoded == [3]


@pytest.mark.parametrize("name", ["pixel_windows", "patch_rows_cols", "valid", "merge_order"])
def test_whatever_differs_in_what_the_tower_is_given_is_another_picture(name):
    tower, given = Tower(), inputs(0)
    cache = PictureCache(tower, 1 << 20)
    cache.encode(**given)
    used = int(np.flatnonzero(given["valid"].any(axis=(0, 2))).max())
    array = given[name].copy()
    place = (0, 0) if name == "merge_order" else (0, used, 3)
    array[place] = ~array[place] if name == "valid" else array[place] + 1
    cache.encode(**given | {name: array})
    cache.encode(**given)
    assert tower.encoded == [1, 1]


def test_embeddings_keep_their_limit_and_the_least_recently_used_go_first():
    tower = Tower()
    one = inputs(0)
    size = int(one["valid"].sum()) // 4 * HIDDEN * 4 + 512
    cache = PictureCache(tower, 2 * size)
    for seed in (0, 3, 0, 6, 0, 3):  # all of one size
        cache.encode(**inputs(seed))
        assert cache.nbytes <= 2 * size
    assert cache.hits == 2  # 0 twice; 3 had gone
    assert tower.encoded == [1] * 4


def test_no_memory_remembers_nothing_and_a_picture_that_is_refused_neither():
    tower, given = Tower(), inputs(0)
    off = PictureCache(tower, 0)
    for _ in range(2):
        off.encode(**given)
    assert (tower.encoded, off.hits, off.nbytes) == ([1, 1], 0, 0)
    cache = PictureCache(tower, 1 << 20)
    with pytest.raises(InvalidRequest):
        cache.encode(**given | {"merge_order": given["merge_order"] - 9})
    assert (cache.pictures, cache.nbytes) == (0, 0)
