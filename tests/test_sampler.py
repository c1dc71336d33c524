"""Draws follow the distribution, exactly and one row at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greenloop.engine.request import Sampling
from greenloop.engine.sampler import draw, draw_each, inverse_cdf, truncate, uniforms

WAYS = (
    [Sampling(temperature=0.7)] * 300,
    [Sampling(temperature=(0.7, 0.0, 1.0, 1.0)[number // 3 % 4]) for number in range(300)],
    [Sampling(temperature=0.0)] * 300,
)


def test_inverse_cdf_is_the_cumulative_sum_rule():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(64, 1000, generator=generator, dtype=torch.float64)
    weights[:, ::3] = 0
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    cumulative = weights.cumsum(dim=1)
    expected = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=1)
    assert inverse_cdf(weights, uniform, torch.arange(64)).tolist() == expected.tolist()


@pytest.mark.parametrize("ways", WAYS, ids=["sampled", "sampled and greedy", "greedy"])
def test_a_processor_draws_what_torch_draws(ways: list[Sampling], monkeypatch: pytest.MonkeyPatch):
    """By native code, which adds the weights in another order: nearer than 1e-6 to an edge either may be right."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1000, generator=generator) * 3
    logits[1, 200:900] = logits[2, 950:] = -torch.inf
    # The first of two that are likeliest, in different bins.
    logits[0, [119, 120, 600]] = torch.tensor([14.8, 15.0, 15.0])
    numbers = [0.0, *torch.rand(298, generator=generator, dtype=torch.float64).tolist(), 1 - 2**-53]
    source = [number % 3 for number in range(len(numbers))]
    order = sorted(range(len(numbers)), key=lambda number: source[number])
    given_rows, uniform, ways = ([values[number] for number in order] for values in (source, numbers, ways))
    untouched = logits.clone()
    found = draw_each(logits, uniform, ways, given_rows)
    assert torch.equal(logits, untouched)
    monkeypatch.setattr("greenloop.engine.sampler.native.draws_from", lambda logits: False)
    expected = draw_each(logits, uniform, ways, given_rows)
    assert (found.tokens == expected.tokens).float().mean() > 0.99
    same = found.tokens == expected.tokens
    torch.testing.assert_close(found.logprobs[same], expected.logprobs[same], atol=1e-5, rtol=0)
    assert (logits[given_rows, found.tokens] > -torch.inf).all()
    for way in set(ways):
        mine = torch.tensor([at for at, one in enumerate(ways) if one == way])
        tokens, rows = found.tokens[mine], torch.tensor(given_rows)[mine]
        if way.greedy:
            assert torch.equal(tokens, expected.tokens[mine])
            continue
        weights = (logits.double() / way.temperature).softmax(dim=1).cumsum(dim=1)
        above, below = weights[rows, tokens], torch.where(tokens > 0, weights[rows, (tokens - 1).clamp_min(0)], 0.0)
        target = torch.tensor(uniform, dtype=torch.float64)[mine]
        assert ((below - 1e-6 <= target) & (target <= above + 1e-6)).all()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.0, 1e-30, 0.5, 3.0]), min_size=1, max_size=600), st.floats(0, 1, exclude_max=True))
def test_a_token_of_weight_zero_is_never_drawn(weights: list[float], uniform: float):
    if not any(weights):
        return
    index = int(inverse_cdf(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64), torch.tensor([0])))
    assert weights[index] > 0


def test_frequencies_are_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    count = 20_000
    drawn = draw(
        logits[None],
        torch.from_numpy(uniforms(5, count)),
        Sampling(temperature=0.5, max_new_tokens=1),
        torch.zeros(count, dtype=torch.int64),
    )
    expected = (logits / 0.5).softmax(dim=0)
    frequencies = torch.bincount(drawn.tokens, minlength=4) / count
    assert (frequencies - expected).abs().max() < 0.01
    torch.testing.assert_close(drawn.logprobs, expected.log()[drawn.tokens], atol=1e-5, rtol=0)


def test_logprobs_stay_those_of_the_whole_vocabulary_under_truncation():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    drawn = draw(logits, torch.tensor([0.99]), Sampling(temperature=1.0, top_k=2))
    assert drawn.tokens.tolist() == [1]
    assert float(drawn.logprobs) == pytest.approx(float(logits.log_softmax(1)[0, 1]), abs=1e-6)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=2), [True, True, False, False]),
        (Sampling(top_p=0.5), [True, False, False, False]),
        (Sampling(top_p=0.51), [True, True, False, False]),
        (Sampling(min_p=0.3), [True, True, True, False]),
        (Sampling(top_k=3, min_p=0.5), [True, True, False, False]),
    ],
)
def test_truncation_keeps_what_transformers_keeps(sampling: Sampling, kept: list[bool]):
    weights = torch.tensor([[5.0, 3.0, 1.5, 0.5]])
    assert (truncate(weights, sampling) > 0).tolist() == [kept]


def test_uniforms_are_addressed_by_their_seed():
    assert np.array_equal(uniforms(3, 10), uniforms(3, 20)[:10])
    assert not np.array_equal(uniforms(3, 10), uniforms(4, 10))
