"""RLOO as pure functions of tensors.

Source: Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback
in LLMs" (arXiv 2402.14740): the leave-one-out baseline, the whole completion as one action. Knows no model, no tokens
and no batch order.

    R_i = r_i - beta * sum_t [log pi(y_it) - log pi_ref(y_it)]
    A_i = R_i - 1/(K-1) * sum_{j != i} R_j
    rho_i = exp(sum_t [log pi_theta - log pi_behaviour])
    L = - mean_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps_high) A_i)

Same as TRL 1.16's RLOOTrainer, NaN rewards included. Different: on the first pass over fresh rollouts the behaviour
log-probs are the trainer's own, detached, so rho is exactly 1 (TRL pays another forward for them); completions whose
advantage is 0 are skipped, and the mean's denominator stays P * K.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantage of each completion over the mean reward of its judged siblings.

    A[p, k] = r[p, k] - mean over judged j != k of r[p, j]

    Args:
        rewards: [P, K] float; NaN marks a completion that could not be judged.

    Returns:
        [P, K] float; 0 where the completion, or every sibling, is unjudged.

    >>> leave_one_out(torch.tensor([[1.0, 0.0, 0.0]])).tolist()
    [[1.0, -0.5, -0.5]]
    """
    judged = ~rewards.isnan()
    siblings = judged.sum(dim=1, keepdim=True) - 1
    baseline = (rewards.nansum(dim=1, keepdim=True) - rewards) / siblings.clamp_min(1)
    advantages = torch.where(judged & (siblings > 0), rewards - baseline, 0.0)
    # Equal rewards are exactly no signal, whatever their sum rounds to.
    flat = rewards.nan_to_num(nan=-torch.inf).amax(1, keepdim=True) == rewards.nan_to_num(nan=torch.inf).amin(
        1, keepdim=True
    )
    return torch.where(flat, 0.0, advantages)


def kl_shaped(rewards: Tensor, kl: Tensor, beta: float) -> Tensor:
    """R = r - beta * KL, before the baseline.

    Args:
        rewards: [P, K] task rewards (already clipped), NaN where unjudged.
        kl: [P, K] nats, sum over the completion's tokens of log pi - log pi_ref (estimator k1).
        beta: weight.
    """
    return rewards - beta * kl if beta else rewards


def normalized(advantages: Tensor, rewards: Tensor) -> Tensor:
    """(A - mean) / (std + 1e-4) over the batch's completions that have a baseline; unbiased std, 0 for the others.

    Args:
        advantages: [P, K] of `leave_one_out`.
        rewards: [P, K]; NaN marks a completion that could not be judged.
    """
    judged = ~rewards.isnan()
    scorable = judged & (judged.sum(dim=1, keepdim=True) > 1)
    known = advantages[scorable]
    scaled = (advantages - known.mean()) / (known.std() + 1e-4)
    # The mean is 0 but for rounding: a group without signal must not get one from it.
    return torch.where(scorable & (advantages != 0), scaled, 0.0)


def sequence_losses(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float
) -> Tensor:
    """[n] clipped surrogate loss of each completion; the caller sums and divides by P * K.

    Args:
        logprobs: [n] sum over tokens of log pi_theta, with gradient.
        behaviour: [n] the same under the policy of the first pass, no gradient.
        advantages: [n] no gradient.
        epsilon: the ratio is clipped below at 1 - epsilon.
        epsilon_high: and above at 1 + epsilon_high.
    """
    ratio = torch.exp(logprobs - behaviour)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clipped_rows(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float
) -> Tensor:
    """[n] bool: the clip bound and took the completion's gradient away."""
    ratio = torch.exp(logprobs - behaviour)
    low = (ratio < 1 - epsilon) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return low | high
