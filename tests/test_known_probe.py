"""The shipped probe: taken for exactly what it was measured on, and for nothing else."""

import pytest

from greenloop.known_probe import known_probe
from greenloop.models.pull import PACKAGED
from greenloop.recipe import load_recipe
from greenloop.tasks import load_tasks


def test_the_starter_recipe_has_its_probe_shipped():
    """Fails after a change of the train split or of the recipe's sampling: see scripts/freeze_probe.py."""
    recipe, tasks = load_recipe("starter"), load_tasks("starter:train")
    counts = known_probe(recipe, tasks.sha256, PACKAGED.sha256)
    assert counts is not None
    assert set(counts) == {task.task_id for task in tasks.tasks}
    assert {passed + failed for passed, failed in counts.values()} == {recipe.curriculum.probe}
    assert sum(0 < passed < passed + failed for passed, failed in counts.values()) > 50


@pytest.mark.parametrize(
    "other", ["sampling.temperature=0.7", "sampling.max_new_tokens=101", "prompt.shown_tests=1", "curriculum.probe=5"]
)
def test_another_question_has_no_shipped_answer(other: str):
    tasks = load_tasks("starter:train").sha256
    assert known_probe(load_recipe("starter", [other]), tasks, PACKAGED.sha256) is None
    assert known_probe(load_recipe("starter"), "0" * 64, PACKAGED.sha256) is None
    assert known_probe(load_recipe("starter"), tasks, "0" * 64) is None
