"""The formulas, on numbers computed elsewhere: TRL 0.24's published vectors and hand calculations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from greenloop.learn.rloo import clipped_rows, kl_shaped, leave_one_out, normalized, sequence_losses

REWARDS = torch.tensor([[1.0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]])
KL = torch.tensor([[0.5, -0.2, 0.1, 0], [0.4, -0.4, 0, 0.8]])
ADVANTAGES = [[0.64, -0.646667, -0.666667, 0.673333], [-0.013333, 0.04, 0.013333, -0.04]]


def close(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-6, rtol=0)


def test_kl_is_taken_from_the_reward_before_the_baseline():
    shaped = kl_shaped(REWARDS, KL, 0.05)
    close(shaped, [[0.975, 0.010, -0.005, 1.0], [0.480, 0.520, 0.500, 0.460]])
    close(leave_one_out(shaped), ADVANTAGES)


def test_without_kl_equal_rewards_give_exactly_nothing():
    close(leave_one_out(REWARDS), [[0.666667, -0.666667, -0.666667, 0.666667], [0, 0, 0, 0]])
    assert leave_one_out(torch.full((1, 7), 0.1)).tolist() == [[0.0] * 7]


def test_clip_of_the_reward_comes_before_the_kl():
    rewards = (REWARDS * 10 - 2).clamp(-1, 1)
    advantages = leave_one_out(kl_shaped(rewards, KL, 0.05))
    close(advantages, [[1.306667, -1.313333, -1.333333, 1.34], [-0.013333, 0.04, 0.013333, -0.04]])


def test_normalised_advantages_match_the_vector():
    shaped = kl_shaped(REWARDS, KL, 0.05)
    expected = [[1.287433, -1.300844, -1.341076, 1.354487], [-0.026822, 0.080465, 0.026822, -0.080464]]
    torch.testing.assert_close(normalized(leave_one_out(shaped), REWARDS), torch.tensor(expected), atol=5e-6, rtol=0)


def test_normalisation_leaves_unjudged_completions_out_of_mean_and_deviation():
    rewards = torch.tensor([[1.0, 0.0, math.nan], [math.nan, math.nan, 5.0]])
    advantages = normalized(leave_one_out(rewards), rewards)
    # Two known advantages, 1 and -1: mean 0, unbiased deviation sqrt(2).
    close(advantages, [[1 / (2**0.5 + 1e-4), -1 / (2**0.5 + 1e-4), 0], [0, 0, 0]])


def test_sequence_losses_match_the_vector():
    log_ratio = torch.tensor([0, 0.1, -0.3, 0.5, -0.5, 0, 0.2, -0.1])
    losses = sequence_losses(
        log_ratio, torch.zeros(8), torch.tensor(ADVANTAGES).flatten(), epsilon=0.2, epsilon_high=0.2
    )
    close(losses, [-0.64, 0.714677, 0.533333, -0.808, 0.010667, -0.04, -0.016, 0.036193])
    assert float(losses.mean()) == pytest.approx(-0.026141, abs=1e-6)


def test_upper_clip_has_its_own_width():
    args = (torch.tensor([0.5]), torch.zeros(1), torch.tensor([1.0]))
    assert float(sequence_losses(*args, epsilon=0.2, epsilon_high=0.3)) == pytest.approx(-1.3)
    assert clipped_rows(*args, epsilon=0.2, epsilon_high=0.3).tolist() == [True]
    assert clipped_rows(*args, epsilon=0.2, epsilon_high=0.7).tolist() == [False]


def test_ratio_clips_only_where_it_would_help():
    logprobs = torch.tensor([1.0, 1.0, -1.0, -1.0])
    clipped = clipped_rows(
        logprobs, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), epsilon=0.2, epsilon_high=0.2
    )
    assert clipped.tolist() == [True, False, False, True]


def test_unjudged_completion_leaves_siblings_alone():
    rewards = torch.tensor([[1.0, math.nan, 0.0]])
    assert leave_one_out(rewards).tolist() == [[1.0, 0.0, -1.0]]


def test_unjudged_row_of_the_vector_as_trl_116_has_it():
    rewards = torch.tensor([[1.0, math.nan, 0, 1]])
    close(leave_one_out(rewards), [[0.5, 0, -1, 0.5]])


def test_a_lone_judged_completion_has_no_baseline_and_no_advantage():
    assert leave_one_out(torch.tensor([[math.nan, 3.0, math.nan]])).tolist() == [[0.0, 0.0, 0.0]]


@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=9))
def test_advantages_of_a_group_sum_to_zero(rewards: list[float]):
    assert float(leave_one_out(torch.tensor([rewards], dtype=torch.float64)).sum()) == pytest.approx(0, abs=1e-9)
