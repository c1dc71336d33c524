"""AdamW over the adapter's weights and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from greenloop.recipe import OptimizerSection

Scheduler = torch.optim.lr_scheduler.LRScheduler


def make_optimizer(parameters: list[nn.Parameter], recipe: OptimizerSection) -> torch.optim.AdamW:
    """AdamW (decoupled weight decay)."""
    return torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: OptimizerSection, optimizer_steps: int) -> Scheduler:
    """Linear warm-up, then constant or to zero after `optimizer_steps`."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, recipe.schedule, recipe.warmup_steps, optimizer_steps)
    )


def rate_factor(step: int, schedule: str, warmup: int, total: int) -> float:
    """Share of the peak rate at an optimiser step (from 0). Unlike transformers', no step has rate 0.

    >>> [rate_factor(step, "constant", 2, 9) for step in range(4)]
    [0.3333333333333333, 0.6666666666666666, 1.0, 1.0]
    >>> [rate_factor(step, "linear", 0, 4) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]
