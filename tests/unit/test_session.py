"""What sessions share: the cache in the host's memory as a graph is given it."""

import numpy as np
import pytest

from cxr_triton.engines.session import MANY_TOKENS, HostGraph


@pytest.fixture
def cache():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((4, 2, 256, 8)).astype(np.float32) for name in ("key.0", "value.0")}


@pytest.mark.parametrize(
    ("lengths", "read"), [([0, 0], 0), ([5, 1], 64), ([64, 3], 64), ([70, 5], 128), ([256, 9], 256)]
)
def test_a_prompt_reads_the_cache_as_far_as_its_rows_hold_something(cache, lengths, read):
    held = HostGraph.held(cache, slice(1, 3), np.array(lengths), MANY_TOKENS)
    assert held.keys() == cache.keys()
    for name, part in held.items():
        np.testing.assert_array_equal(part, cache[name][1:3, :, :read])
        assert part.flags.c_contiguous


def test_a_step_reads_the_cache_where_it_lies(cache):
    held = HostGraph.held(cache, slice(1, 3), np.array([5, 1]), MANY_TOKENS - 1)
    for name, part in held.items():
        assert part.shape == (2, 2, 256, 8) and np.shares_memory(part, cache[name])
