"""What a run records of the machine, the versions and the model."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from greenloop import __version__, tuning
from greenloop.models.load import LoadedModel
from greenloop.native_trial import precision_of
from greenloop.types import TaskSet


def describe(loaded: LoadedModel) -> dict[str, str]:
    """What a results file says of the model."""
    source = loaded.source
    return {
        "spec": source.spec,
        "base_name": source.weights.base_name,
        "weights_sha256": loaded.weights_sha256,
        "licence": source.weights.licence,
        "upstream": source.weights.upstream,
    }


def machine(loaded: LoadedModel) -> dict[str, Any]:
    """Versions and hardware, as `environment.json` names them."""
    return {
        "greenloop": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "platform": platform.platform(),
        "cpu": tuning.cpu_name(),
        "cores": tuning.cores(),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "matmul_precision": precision_of(loaded),
    }


def about_tasks(task_set: TaskSet | None) -> dict[str, str] | None:
    """What is recorded of a task set."""
    if task_set is None:
        return None
    return {name: getattr(task_set, name) for name in ("spec", "sha256", "source", "hub_id", "licence")}


def about_inputs(tasks: TaskSet, held_out: TaskSet | None, weights_sha256: str) -> dict[str, str | None]:
    """Content hashes of what a run reads, by the recipe's key."""
    return {"model": weights_sha256, "tasks": tasks.sha256, "eval_tasks": held_out.sha256 if held_out else None}
