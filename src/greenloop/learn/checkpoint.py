"""The state that a run resumes from: adapter, optimiser, schedule, step. Nothing random is among it (see `seeding`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from greenloop.errors import RunError
from greenloop.learn.optimise import Scheduler
from greenloop.learn.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands."""

    step: int
    """Steps done."""
    best_score: float | None = None
    """Best validation pass rate so far."""
    stale: int = 0
    """Validations since the best."""


def save(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, scheduler: Scheduler, progress: Progress
) -> None:
    """Write the state into an existing folder."""
    weights = {
        name: tensor.contiguous().cpu()
        for name, tensor in get_peft_model_state_dict(policy.model, save_embedding_layers=False).items()
    }
    save_file(weights, folder / "adapter.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, folder / "optimizer.pt")
    (folder / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")


def load(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, scheduler: Scheduler) -> Progress:
    """Put the state back in place.

    Raises:
        RunError: the folder is not a checkpoint of this recipe.
    """
    try:
        set_peft_model_state_dict(policy.model, load_file(folder / "adapter.safetensors"))
        policy.refresh()
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        return Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    except (
        OSError,
        KeyError,
        ValueError,
        RuntimeError,
        TypeError,
        EOFError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"{folder}: not a checkpoint of this recipe ({reason}); remove it to resume from an older one"
        ) from None
