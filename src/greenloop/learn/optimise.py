"""AdamW over the adapter's weights and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from greenloop.recipe import OptimizerSection

Scheduler = torch.optim.lr_scheduler.LRScheduler


def make_optimizer(parameters: list[nn.Parameter], recipe: OptimizerSection) -> torch.optim.AdamW:
    """AdamW (decoupled weight decay)."""
    return torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: OptimizerSection, optimizer_steps: int) -> Scheduler:
    """Linear warm-up, then constant or to zero after `optimizer_steps`."""
    warmup = recipe.warmup_steps
    make: dict[str, Callable[[], Scheduler]] = {
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, optimizer_steps),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, optimizer_steps),
    }
    return make[recipe.schedule]()
