"""What a task set is made of, independent of where its files lay.

In: tasks. Out: a content hash, and the `TaskSet` that carries it.
The hash does not cover the spec, the source, the licence or the name: a file and the hub give the same one.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict

from greenloop.types import Task, TaskSet

_LINE_END = re.compile(r"\r+\n|\r")


def unix_newlines(text: str) -> str:
    r"""The text with every line ended by `\n` alone.

    >>> unix_newlines("a\r\nb\rc\r\r\nd\n")
    'a\nb\nc\nd\n'
    """
    return _LINE_END.sub("\n", text)


def content_sha256(tasks: Sequence[Task]) -> str:
    """SHA-256 (hex) of the tasks in their order: canonical JSON, one object a line, empty fields left out.

    Leaving empty fields out keeps the hash when `Task` gains an optional field.
    """
    digest = hashlib.sha256()
    for task in tasks:
        fields = {name: value for name, value in asdict(task).items() if value}
        digest.update(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()


def task_set(name: str, tasks: Sequence[Task], *, source: str, licence: str = "", hub_id: str = "") -> TaskSet:
    """All tasks of a set, hashed, under its name as spec."""
    return TaskSet(
        spec=name,
        name=name,
        tasks=tuple(tasks),
        sha256=content_sha256(tasks),
        source=source,
        licence=licence,
        hub_id=hub_id,
    )
