"""Tasks from JSON Lines, the one schema that every set passes through (`docs/tasks.md`).

In: text, or rows that another loader brought into the schema. Out: tasks, or one `TaskError` that names file, line,
field and what was expected. Source code is parsed and never executed, so a wrong expectation in a test goes
unnoticed here; `greenloop.tasks.check` finds it.
"""

import ast
import json
import keyword
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from greenloop.errors import TaskError
from greenloop.tasks import syntax
from greenloop.tasks.content import task_set, unix_newlines
from greenloop.types import Task, TaskSet

REQUIRED = ("task_id", "statement", "tests")
TEXTS = ("task_id", "statement", "entry_point", "setup", "prelude", "reference", "split", "topic")
LISTS = ("tests", "hidden_tests", "wrong")

_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}


def load_file(path: Path) -> TaskSet:
    """All tasks of one JSONL file; `source` is its path.

    Raises:
        TaskError: the file cannot be read or a line of it is not a task.
    """
    tasks = parse_tasks(str(path), ((str(path), read_text(path)),))
    return task_set(path.name, tasks, source=str(path))


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        TaskError: there is no such file, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror}); give the path of an existing file.") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: expected UTF-8 text, but byte {error.start} is not; convert the file.") from error


def parse_tasks(set_name: str, files: Iterable[tuple[str, str]]) -> tuple[Task, ...]:
    """The tasks of a set's several (name, text) pairs in their order; ids are unique over all of them.

    Raises:
        TaskError: a line is not a task, an id occurs twice, or there is no task at all.
    """
    rows = [(place, row) for name, text in files for place, row in json_lines(name, text)]
    return tasks_of_rows(set_name, rows)


def json_lines(name: str, text: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """(place, object) of each line that is not blank; the place reads `tasks.jsonl, line 3`.

    Raises:
        TaskError: a line is not a JSON object.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{place}: expected one JSON object a line, but it is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise TaskError(f"{place}: expected a JSON object, found {_kind(row)}.")
        yield place, row


def tasks_of_rows(set_name: str, rows: Iterable[tuple[str, Mapping[str, object]]]) -> tuple[Task, ...]:
    """The tasks of (place, row) pairs in their order.

    Raises:
        TaskError: a row is not a task, an id occurs twice, or there is no row.
    """
    tasks: list[Task] = []
    places: dict[str, str] = {}
    for place, row in rows:
        task = task_of_row(row, place)
        if task.task_id in places:
            raise _refusal(place, "task_id", f"an id of its own, but {places[task.task_id]} has {task.task_id!r} too")
        places[task.task_id] = place
        tasks.append(task)
    if not tasks:
        raise TaskError(f"{set_name}: expected at least one task, found none.")
    return tuple(tasks)


def task_of_row(row: Mapping[str, object], place: str) -> Task:
    """The task that a row of the schema stands for, with the entry point filled in.

    Raises:
        TaskError: a field is unknown, missing, of another type, or does not hold what it must.
    """
    _check_names(row, place)
    texts = {name: _text(row[name], place, name) for name in TEXTS if name in row}
    lists = {name: _texts(row[name], place, name) for name in LISTS if name in row}
    for name in ("task_id", "statement", "split"):
        if not texts.get(name, "-").strip():
            raise _refusal(place, name, "a string that is not empty")
    return Task(
        task_id=texts["task_id"],
        statement=texts["statement"],
        entry_point=_entry_point(texts, lists, place),
        tests=lists["tests"],
        hidden_tests=lists.get("hidden_tests", ()),
        setup=texts.get("setup", ""),
        prelude=texts.get("prelude", ""),
        reference=texts.get("reference", ""),
        wrong=lists.get("wrong", ()),
        split=texts.get("split", "train"),
        topic=texts.get("topic", ""),
    )


def _entry_point(texts: Mapping[str, str], lists: Mapping[str, tuple[str, ...]], place: str) -> str:
    """The given or derived entry point; refuses code that is not Python or does not use it."""
    tests = _test_trees(lists, place)
    setup, prelude, reference = (_tree(texts.get(name, ""), place, name) for name in ("setup", "prelude", "reference"))
    if "entry_point" in texts:
        name = texts["entry_point"]
        if not name.isidentifier() or keyword.iskeyword(name):
            raise _refusal(place, "entry_point", f"the name of a function, found {name!r}")
    else:
        shown = [test for field, test in tests.items() if field.startswith("tests")]
        name = _derived(syntax.entry_point_candidates(shown, reference, (setup, prelude)), place)
    for field, test in tests.items():
        if name not in syntax.called_names(test):
            raise _refusal(place, field, f"a call of {name!r} (or it as an argument, as in check({name}))")
    if reference.body and name not in syntax.bound_names(reference):
        raise _refusal(place, "reference", f"a definition of {name!r}")
    return name


def _test_trees(lists: Mapping[str, tuple[str, ...]], place: str) -> dict[str, ast.Module]:
    """Field, such as `tests[0]`, to syntax tree of every test, shown and hidden."""
    if not lists["tests"]:
        raise _refusal(place, "tests", "at least one test")
    trees = {}
    for name in ("tests", "hidden_tests"):
        for i, block in enumerate(lists.get(name, ())):
            field = f"{name}[{i}]"
            trees[field] = _tree(block, place, field)
            if not trees[field].body:
                raise _refusal(place, field, "a block of Python that asserts, but it is empty")
            if syntax.discards_comparison(trees[field]):
                raise _refusal(place, field, "an assertion, but a comparison stands there without `assert`")
    return trees


def _derived(candidates: Sequence[str], place: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    there = f"there are {len(candidates)} ({', '.join(candidates)})" if candidates else "there is none"
    raise _refusal(place, "entry_point", f"one function that every test calls, but {there}; name it in this field")


def _check_names(row: Mapping[str, object], place: str) -> None:
    known = sorted({*TEXTS, *LISTS})
    for name in row:
        if name not in known:
            raise _refusal(place, repr(name), f"one of the fields {', '.join(known)}")
    for name in REQUIRED:
        if name not in row:
            raise _refusal(place, name, "this field, but it is missing")


def _text(value: object, place: str, field: str) -> str:
    if not isinstance(value, str):
        raise _refusal(place, field, f"a string, found {_kind(value)}")
    return unix_newlines(value)


def _texts(value: object, place: str, field: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise _refusal(place, field, f"a list of strings, found {_kind(value)}")
    return tuple(_text(item, place, f"{field}[{i}]") for i, item in enumerate(value))


def _tree(source: str, place: str, field: str) -> ast.Module:
    try:
        return syntax.parse(source)
    except SyntaxError as error:
        raise _refusal(place, field, f"Python, but it does not parse ({error})") from error


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "a list" if isinstance(value, list) else "an object")


def _refusal(place: str, field: str, expected: str) -> TaskError:
    return TaskError(f"{place}, field {field}: expected {expected}.")
