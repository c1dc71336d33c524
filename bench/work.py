"""The work that both sides of a comparison do: the same model, adapter, prompts, rewards and settings.

In: a `Work`. Out: the parts that a side builds its step from. Knows neither side.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from greenloop.learn.policy import adapt
from greenloop.models import resolve
from greenloop.models.load import load_model
from greenloop.prompt import get_protocol, render
from greenloop.recipe import LoraSection
from greenloop.tasks import load_tasks
from greenloop.tuning import prepare_process
from greenloop.types import Prompt

B_STD = 0.01
"""Of the adapter's B: a fresh adapter's is zero, and the gradient of its A with it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One comparison."""

    prompts: int
    """P: tasks a step."""
    samples: int
    """K: completions a task."""
    max_new_tokens: int = 200
    beta: float = 0.05
    mode: str = "equal"
    """`equal`: no end of sequence and fixed rewards, so that both sides do the same work to the token; `natural`."""
    model: str = "smollm2-135m"
    tasks: str = "mbpp:train"
    dtype: str = "auto"
    matmul_precision: str = "highest"
    device: str = "auto"
    learning_rate: float = 1e-4
    rank: int = 16
    trl_rows: int = 16
    """Completions that TRL takes in one forward and backward; the rest of a step is accumulated."""
    rows: int = 0
    """Completions that greenloop decodes at a time; 0: its default."""
    cache_dir: str = ""
    data_dir: str = ""

    @property
    def equal(self) -> bool:
        """Whether ends of sequence are ignored and rewards fixed."""
        return self.mode == "equal"

    @property
    def completions(self) -> int:
        """Of a step."""
        return self.prompts * self.samples

    def to_json(self) -> str:
        """For a side's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        """What `to_json` wrote."""
        return cls(**json.loads(text))

    def step_prompts(self, prompts: list[Prompt], step: int) -> list[Prompt]:
        """The step's P prompts, each step other ones."""
        return [prompts[(step * self.prompts + index) % len(prompts)] for index in range(self.prompts)]


def build(work: Work) -> tuple[Any, Any, list[Prompt]]:
    """The model with its adapter (B not zero), its tokenizer, and every prompt in order."""
    prepare_process(work.matmul_precision)
    loaded = load_model(resolve(work.model, cache_dir=Path(work.cache_dir)), dtype=work.dtype, device=work.device)
    model = adapt(loaded.model, LoraSection(rank=work.rank, alpha=2 * work.rank), 0, work.model)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(B_STD * torch.randn(parameter.shape, generator=draws))
    protocol = get_protocol("train")
    tasks = load_tasks(work.tasks, data_dir=Path(work.data_dir) if work.data_dir else None).tasks
    return model, loaded.tokenizer, [render(protocol, task, loaded.tokenizer, shots=()) for task in tasks]


def fixed_reward(index: int) -> float:
    """Of completion `index` in equal mode: every group has both outcomes, whatever its size."""
    return float(index % 2)
