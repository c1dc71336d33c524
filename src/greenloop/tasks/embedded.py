"""The embedded starter set: this project's own exercises, shipped as package data in `starter/<topic>.jsonl`.

In: nothing. Out: all tasks, files in the order of their names, lines in their order.
Does not know which splits a run uses; `SHA256` beside the files freezes the content (`scripts/freeze_starter.py`).
"""

from importlib.resources import files

from greenloop.tasks.content import task_set
from greenloop.tasks.jsonl import parse_tasks
from greenloop.types import TaskSet

LICENCE = "Apache-2.0"


def load_starter() -> TaskSet:
    """All tasks of the starter set.

    Raises:
        TaskError: a line is not a task (the installation is damaged).
    """
    folder = files("greenloop.tasks") / "starter"
    topics = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".jsonl")), key=lambda entry: entry.name
    )
    tasks = parse_tasks("starter", ((f"starter/{topic.name}", topic.read_text(encoding="utf-8")) for topic in topics))
    return task_set("starter", tasks, source="greenloop's own package data", licence=LICENCE)
