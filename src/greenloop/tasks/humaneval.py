"""HumanEval (Chen et al. 2021, arXiv 2107.03374): one split, `test`, of 164 tasks.

In: the authors' file or the hub's rows, which have the same columns. Out: tasks `HumanEval/<n>` in the authors' order.
The statement is the prompt as published (signature and docstring); its tests are one block, as published, so a task is
passed or failed as a whole. What the prompt defines before the signature (imports, helpers) is the prelude.
"""

import gzip
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from greenloop.errors import TaskError
from greenloop.tasks.content import task_set
from greenloop.tasks.hub import download
from greenloop.tasks.jsonl import json_lines, tasks_of_rows
from greenloop.types import TaskSet

HUB_ID = "openai/openai_humaneval"
LICENCE = "MIT"
FILE = "HumanEval.jsonl.gz"
COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


def load_humaneval(data_dir: Path | None) -> TaskSet:
    """All 164 tasks; from `data_dir` if it holds `HumanEval.jsonl.gz`, else from the hub.

    Raises:
        TaskError: the data cannot be had, or it is not HumanEval.
    """
    if data_dir is not None and (path := data_dir / FILE).exists():
        return _task_set(json_lines(str(path), _unpacked(path)), str(path))
    hub = download(HUB_ID, "openai_humaneval")
    return _task_set(((HUB_ID, row) for row in hub.rows), hub.source)


def _unpacked(path: Path) -> str:
    try:
        return gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: expected gzipped UTF-8 text ({error}); download the file again.") from error


def _task_set(placed: Iterable[tuple[str, Mapping[str, object]]], source: str) -> TaskSet:
    tasks = tasks_of_rows("humaneval", ((place, _schema_row(place, row)) for place, row in placed))
    return task_set("humaneval", tasks, source=source, licence=LICENCE, hub_id=HUB_ID)


def _schema_row(place: str, row: Mapping[str, object]) -> dict[str, object]:
    """A published row in the schema of `jsonl`."""
    cells = [row.get(column) for column in COLUMNS]
    if not all(isinstance(cell, str) for cell in cells):
        raise TaskError(f"{place}: expected a row of HumanEval with the text columns {', '.join(COLUMNS)}.")
    task_id, prompt, solution, test, entry_point = map(str, cells)
    return {
        "task_id": task_id,
        "statement": prompt,
        "entry_point": entry_point,
        "tests": [f"{test.strip()}\n\ncheck({entry_point})\n"],
        "prelude": prelude_of(prompt, entry_point),
        "reference": prompt + solution,
        "split": "test",
    }


def prelude_of(prompt: str, entry_point: str) -> str:
    r"""What stands before the entry point's own `def`, without blank lines around it.

    >>> prelude_of("import math\n\n\ndef f(x):\n    '''Twice x.'''\n", "f")
    'import math'
    """
    signature = re.search(rf"^def {re.escape(entry_point)}\b", prompt, re.MULTILINE)
    return prompt[: signature.start()].strip("\n") if signature else ""
