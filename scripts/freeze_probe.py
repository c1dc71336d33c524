"""Ship what evaluations found as the starter recipe's probe.

    greenloop eval smollm2-135m --tasks starter:train --no-greedy --samples 4 --temperature 0.8 \\
        --max-new-tokens 100 --out E
    python scripts/freeze_probe.py E

Needed again after each change of the train split or of the recipe's sampling; until then the recipe probes by itself.
Draws are addressed by task, so evaluations of parts of the split (tasks that came later, say) are as good as one of it
all: name each folder. What is shipped already is kept as long as none of its tasks has changed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import greenloop
from greenloop.files import write_atomically
from greenloop.known_probe import SAMPLING
from greenloop.tasks import load_tasks
from greenloop.tasks.content import content_sha256
from greenloop.types import TaskSet

SHIPPED = Path(greenloop.__file__).parent / "recipes" / "starter.probe.json"


def probe_of(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The file's content, from the `results.json` of each evaluation.

    Raises:
        SystemExit: they did not ask the same, or do not have each task of the split once.
    """
    asked = [_asked(results) for results in evaluations]
    if any(one != asked[0] for one in asked):
        sys.exit("the evaluations differ in weights, dtype, samples, protocol or sampling")
    split = load_tasks("starter:train")
    counts = _shipped(split, asked[0])
    for results in evaluations:
        unchanged = _unchanged(results, split)
        for task in results["sampled"]["tasks"]:
            if task["task_id"] in unchanged:
                counts[task["task_id"]] = [task["passed"], task["n"] - task["harness"] - task["passed"]]
    missing = {task.task_id for task in split.tasks} - counts.keys()
    if missing:
        sys.exit(f"{len(missing)} tasks of {split.spec} were not evaluated as they are now, e.g. {min(missing)}")
    samples, dtype, decides = asked[0]
    return {
        "asked": {**decides, "tasks_sha256": split.sha256},
        "samples": samples,
        "dtype": dtype,
        "counts": {task.task_id: counts[task.task_id] for task in split.tasks},
    }


def _shipped(split: TaskSet, asked: tuple[int, str, dict[str, Any]]) -> dict[str, list[int]]:
    """The counts of the probe that is shipped, if its tasks are in the split as they were and it asked the same."""
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    counts: dict[str, list[int]] = shipped["counts"]
    tasks_sha256 = content_sha256([task for task in split.tasks if task.task_id in counts])
    same = shipped["asked"] == {**asked[2], "tasks_sha256": tasks_sha256}
    return counts if same and (shipped["samples"], shipped["dtype"]) == asked[:2] else {}


def _unchanged(results: dict[str, Any], split: TaskSet) -> set[str]:
    """Ids of the tasks of the split that the evaluation saw as they are now."""
    evaluated = load_tasks(results["tasks"]["spec"])
    if evaluated.sha256 != results["tasks"]["sha256"]:
        sys.exit(f"{evaluated.spec} is not what was evaluated: its content changed since")
    return {task.task_id for task in set(split.tasks) & set(evaluated.tasks)}


def _asked(results: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
    """Samples a task, dtype and all else that decides what a probe finds, but for the tasks."""
    settings = results["settings"]
    decides = {name: settings[name] for name in ("protocol", "shown_tests", *SAMPLING)}
    return (
        settings["samples"],
        results["environment"]["dtype"],
        {"weights_sha256": results["model"]["weights_sha256"], **decides},
    )


if __name__ == "__main__":
    found = [json.loads((Path(folder) / "results.json").read_text(encoding="utf-8")) for folder in sys.argv[1:]]
    probe = probe_of(found)
    write_atomically(SHIPPED, json.dumps(probe) + "\n")
    print(f"{SHIPPED}: {len(probe['counts'])} tasks")
