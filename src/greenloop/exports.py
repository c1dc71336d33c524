"""Our answers in the lines that evalplus and human-eval read.

In: a judged answer. Out: one JSON line. Both harnesses run a single text, where our judge runs the data set's prelude
and the program one after the other; the text here is joined so that it means the same.

* evalplus: `{"task_id": "Mbpp/11" | "HumanEval/0", "solution": ...}`, the whole program; for mbpp, mbpp-sanitized and
  humaneval. Its reader skips ids that its data does not have and demands every id that it has: MBPP+ draws its tasks
  from all splits, so that only `mbpp` without a split answers all of them.
* human-eval: `{"task_id": "HumanEval/0", "completion": ...}`; it runs prompt + completion + tests; for humaneval alone,
  the only data that it knows.

An answer without code still has a line, because both demand an answer to every task; it can pass no test.
"""

from __future__ import annotations

import json
import re

from greenloop.summary import Answer
from greenloop.types import Task

EVALPLUS_SETS = frozenset({"mbpp", "mbpp-sanitized", "humaneval"})
HUMAN_EVAL_SETS = frozenset({"humaneval"})

_NO_CODE = '\nraise NotImplementedError("the answer holds no code")\n'
_FUTURE = re.compile(r"\A(?:[ \t]*(?:#[^\n]*)?\n)*(?:from __future__ import [^\n]*(?:\n|\Z))+")


def evalplus_line(answer: Answer) -> str:
    """The answer as evalplus reads it."""
    task_id = answer.task.task_id
    if task_id.startswith("mbpp/"):
        task_id = "Mbpp/" + task_id.removeprefix("mbpp/")
    return json.dumps({"task_id": task_id, "solution": whole_program(answer.task, answer.program or "")})


def human_eval_line(answer: Answer) -> str:
    """The answer as human-eval reads it."""
    completion = continuation(answer.task, answer.program)
    return json.dumps({"task_id": answer.task.task_id, "completion": completion})


def whole_program(task: Task, program: str) -> str:
    r"""The task's prelude and the program as one text; imports from `__future__` stay first.

    >>> task = Task(task_id="t", statement="", entry_point="f", tests=(), prelude="import math")
    >>> whole_program(task, "from __future__ import annotations\ndef f(): pass")
    'from __future__ import annotations\nimport math\n\ndef f(): pass'
    """
    if not task.prelude or not program:
        return program
    found = _FUTURE.match(program)
    first = found.group() if found else ""
    return f"{first}{task.prelude}\n\n{program[len(first) :]}"


def continuation(task: Task, program: str | None) -> str:
    r"""What comes after the task's statement (a signature with its docstring) so that both together are the program.

    A program that does not begin with the statement follows it as a whole and defines the entry point anew. Imports
    from `__future__` cannot stand there and are left out.

    >>> task = Task(task_id="t", statement="def f():\n    'One.'\n", entry_point="f", tests=())
    >>> continuation(task, "def f():\n    'One.'\n    return 1"), continuation(task, "def f(): return 1")
    ('    return 1', '\ndef f(): return 1')
    """
    if program is None:
        return _NO_CODE
    if program.startswith(task.statement):
        return program.removeprefix(task.statement)
    return "\n" + _FUTURE.sub("", program)
