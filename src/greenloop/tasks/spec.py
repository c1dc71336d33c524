"""From a spec as the user writes it to the tasks it stands for.

`starter`, `mbpp`, `mbpp-sanitized`, `humaneval` or the path of a `.jsonl` file, each with `:split` or, for all
tasks, without.
Knows the names of the sets and nothing of their formats.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from greenloop.errors import TaskError
from greenloop.tasks.content import content_sha256
from greenloop.tasks.embedded import load_starter
from greenloop.tasks.humaneval import load_humaneval
from greenloop.tasks.jsonl import load_file
from greenloop.tasks.mbpp import load_mbpp, load_mbpp_sanitized
from greenloop.types import TaskSet

PUBLISHED = {"mbpp": load_mbpp, "mbpp-sanitized": load_mbpp_sanitized, "humaneval": load_humaneval}
SUFFIX = ".jsonl"


def load_tasks(spec: str, *, data_dir: Path | None = None) -> TaskSet:
    """The tasks that a spec stands for, in a fixed order, with the hash of their content.

    Args:
        spec: e.g. `starter:train`, `mbpp:test`, `humaneval`, `exercises.jsonl`, `exercises.jsonl:test`.
        data_dir: Folder that may hold `mbpp.jsonl`, `sanitized-mbpp.json`, `HumanEval.jsonl.gz`; what it lacks comes
            from the hub.

    Raises:
        TaskError: the spec names nothing, the split has no tasks, or the data cannot be had or used.
    """
    name, split = _name_and_split(spec)
    tasks = _load_all(name, data_dir)
    return replace(_narrowed(tasks, split), spec=spec)


def _name_and_split(spec: str) -> tuple[str, str | None]:
    if spec.endswith(SUFFIX):
        return spec, None
    name, colon, split = spec.rpartition(":")
    return (name, split) if colon else (spec, None)


def _load_all(name: str, data_dir: Path | None) -> TaskSet:
    if name == "starter":
        return load_starter()
    if name in PUBLISHED:
        if data_dir is not None and not data_dir.is_dir():
            raise TaskError(
                f"GREENLOOP_DATA_DIR: there is no folder {data_dir}; correct it or unset it to use the hub."
            )
        return PUBLISHED[name](data_dir)
    if name.endswith(SUFFIX):
        return load_file(Path(name))
    known = ", ".join(("starter", *PUBLISHED))
    raise TaskError(f"There is no task set {name!r}; give one of {known} or the path of a {SUFFIX} file.")


def _narrowed(tasks: TaskSet, split: str | None) -> TaskSet:
    if split is None:
        return tasks
    chosen = tuple(task for task in tasks.tasks if task.split == split)
    if not chosen:
        sizes = Counter(task.split for task in tasks.tasks)
        there = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        raise TaskError(f"{tasks.name} has no tasks in split {split!r}; its splits are {there}.")
    return replace(tasks, tasks=chosen, sha256=content_sha256(chosen))
