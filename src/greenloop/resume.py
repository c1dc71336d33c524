"""Whether a run may go on: the same recipe, the same data, the same weights. Reads the run folder, nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping

from greenloop.errors import ConfigError, RunError
from greenloop.recipe import Recipe, load_recipe
from greenloop.run_folder import RunFolder

_FREE: dict[str, bool | dict[str, bool]] = {
    **dict.fromkeys(("steps", "max_minutes", "checkpoint", "sandbox", "engine"), True),
    "lora": {"interpolation": True},
}
"""Keys that a resumed run may change. The training goes on with all of the adapter, whatever share of it is kept."""


def check_resumable(folder: RunFolder, recipe: Recipe, inputs: Mapping[str, str | None]) -> None:
    """A resumed run goes on with the recipe, the data and the weights that it began with; more steps are welcome, and
    another share of the adapter to be kept.

    Args:
        folder: of the run.
        recipe: as asked for now.
        inputs: content hashes of what the recipe's `model`, `tasks` and `eval_tasks` stand for now.

    Raises:
        RunError: there is no checkpoint.
        ConfigError: something differs; names the key.
    """
    if folder.newest_checkpoint() is None:
        raise RunError(f"{folder.root}: there is no checkpoint to resume from; start without --resume")
    began_with = load_recipe(str(folder.recipe))
    if recipe.optimizer.schedule != "constant" and recipe.steps != began_with.steps:
        raise ConfigError(
            f"steps: the {recipe.optimizer.schedule} schedule of {folder.recipe} ends with its steps; keep them"
        )
    before, now = (one.model_dump(exclude=_FREE) for one in (began_with, recipe))
    changed = sorted(key for key in now if now[key] != before[key])
    if changed:
        raise ConfigError(f"{changed[0]}: differs from {folder.recipe}; a resumed run keeps it, or give another --out")
    began = json.loads(folder.environment.read_text(encoding="utf-8"))["inputs_sha256"]
    for key, sha256 in inputs.items():
        if began[key] != sha256:
            raise ConfigError(
                f"{key}: {now[key]} is not what this run began with (its content hash changed since "
                f"{folder.environment} was written); put the old content back, or give another --out"
            )
