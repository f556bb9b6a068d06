"""Sampling against the logits processors of transformers, and the sampler's own promises."""

import numpy as np
import pytest

from cxr_triton.engines.runtime.sampler import Sampler, nucleus
from cxr_triton.errors import InternalError, InvalidRequest
from cxr_triton.sampling import Sampling


def logits_rows(count, vocab, scale=4.0):
    return (np.random.default_rng(7).standard_normal((count, vocab)) * scale).astype(np.float32)


@pytest.mark.parametrize("penalty", [1.05, 1.3, 0.8])
def test_repetition_penalty_is_bitwise_that_of_transformers(penalty):
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt = np.array([5, 5, 9, 900, 3], np.int64)
    sampler = Sampler(Sampling(max_new_tokens=64, repetition_penalty=penalty), prompt)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    ids = prompt.tolist()
    for row in logits_rows(40, 1000):
        expected = processor(torch.tensor([ids]), torch.tensor(row)[None])[0].numpy()
        token = sampler.sample(row)
        np.testing.assert_array_equal(row, expected)  # sample() penalizes in place
        assert token == expected.argmax()
        ids.append(token)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_nucleus_keeps_what_transformers_keeps(temperature, top_p):
    import torch
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    for row in logits_rows(5, 5000):
        warped = TemperatureLogitsWarper(temperature)(None, torch.tensor(row, dtype=torch.float64)[None])
        warped = TopPLogitsWarper(top_p)(None, warped)[0]
        ids, probabilities = nucleus(row, temperature, top_p)
        assert set(ids.tolist()) == set(torch.isfinite(warped).nonzero()[:, 0].tolist())
        expected = torch.softmax(warped, -1).numpy()[ids]
        np.testing.assert_allclose(probabilities / probabilities.sum(), expected, rtol=1e-9)


def test_draws_follow_the_distribution():
    row = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    sampler = Sampler(Sampling(max_new_tokens=1, temperature=1.0, seed=3), np.array([0]))
    drawn = np.bincount([sampler.sample(row.copy()) for _ in range(20000)], minlength=4) / 20000
    expected = np.exp(row) / np.exp(row).sum()
    np.testing.assert_allclose(drawn, expected, atol=0.015)


def test_a_seed_repeats_and_another_differs():
    def draw(seed):
        sampler = Sampler(Sampling(max_new_tokens=1, temperature=1.0, top_p=0.95, seed=seed), np.array([0]))
        return [sampler.sample(row) for row in logits_rows(50, 300, 1.0)]

    assert draw(11) == draw(11)
    assert draw(11) != draw(12)
    assert draw(None) != draw(None)


def test_temperature_of_qwen_generation_config_is_greedy():
    rows = logits_rows(20, 300, 0.01)
    sampler = Sampler(Sampling(max_new_tokens=1, temperature=1e-6), np.array([0]))
    assert [sampler.sample(row.copy()) for row in rows] == rows.argmax(1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(value, temperature):
    row = logits_rows(1, 10)[0]
    row[4] = value
    with pytest.raises(InternalError, match="not a number"):
        Sampler(Sampling(max_new_tokens=1, temperature=temperature), np.array([0])).sample(row)


@pytest.mark.parametrize(
    "key, value",
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("stop", ("",)),
        ("temperature", 1e39),  # no float32 takes it
        ("temperature", 10**400),
        ("repetition_penalty", float("inf")),
        ("eos_token_ids", (-1,)),
        ("eos_token_ids", (1 << 31,)),
        *[("stop", value) for value in ([1], ["a", None], "ab", 1, None, {"a": 1}, [["a"]])],
        *[("eos_token_ids", value) for value in (["1"], [1.5], [True], 7, None)],
        *[("max_new_tokens", value) for value in ("5", 5.0, True, None, [5])],
        *[("seed", value) for value in ("5", 5.0, True, [5])],
        *[(key, value) for key in ("temperature", "top_p", "repetition_penalty") for value in ("1", True, None, [1.0])],
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_named(key, value):
    with pytest.raises(InvalidRequest, match=f"{key} is"):
        Sampling(**{"max_new_tokens": 5, key: value})
