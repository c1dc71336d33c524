"""What a probe finds in the case that everybody starts with: measured once and shipped with the package.

A probe of the starter tasks takes longer than all steps of the recipe on a slow machine, and finds what it found
elsewhere. In: what a probe would ask. Out: its answer, if exactly that was asked. Made by `scripts/freeze_probe.py`.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from greenloop.curriculum import Counts
from greenloop.recipe import Recipe

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens")
"""Settings of the draw, by the names that recipes and results share."""


def asked(recipe: Recipe, tasks_sha256: str, weights_sha256: str) -> dict[str, Any]:
    """All that decides what a probe finds, but for its seed, its dtype and its number of samples."""
    return {
        "weights_sha256": weights_sha256,
        "tasks_sha256": tasks_sha256,
        "protocol": recipe.prompt.protocol,
        "shown_tests": recipe.prompt.shown,
        **{name: getattr(recipe.sampling, name) for name in SAMPLING},
    }


def known_probe(recipe: Recipe, tasks_sha256: str, weights_sha256: str) -> Counts | None:
    """(passed, failed) of every task, if a shipped probe asked the same with at least as many samples."""
    folder = resources.files("greenloop") / "recipes"
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".probe.json"):
            shipped = json.loads(entry.read_text(encoding="utf-8"))
            same = shipped["asked"] == asked(recipe, tasks_sha256, weights_sha256)
            if same and shipped["samples"] >= recipe.curriculum.probe:
                return {task_id: (passed, failed) for task_id, (passed, failed) in shipped["counts"].items()}
    return None
