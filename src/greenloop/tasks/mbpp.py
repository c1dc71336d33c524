"""MBPP, full and sanitized (Austin et al. 2021, arXiv 2108.07732), with its official splits.

In: the authors' file or the hub's rows, which have the same columns. Out: tasks `mbpp/<id>` in the order of their ids.
The sanitized version keeps the ids, so `mbpp/11` is the same exercise in both.

Left out on purpose: `challenge_test_list`, which 11 of the 974 tasks have. The published evaluations count the three
tests of `test_list` alone, so counting more here would make those 11 tasks harder than everybody else's.
Set-up code runs after the solution: tasks 367 and 927 build trees of a class that the solution defines.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from greenloop.errors import TaskError
from greenloop.tasks.content import task_set
from greenloop.tasks.hub import download
from greenloop.tasks.jsonl import json_lines, read_text, tasks_of_rows
from greenloop.types import TaskSet

HUB_ID = "google-research-datasets/mbpp"
LICENCE = "CC-BY-4.0"
FULL_FILE, SANITIZED_FILE = "mbpp.jsonl", "sanitized-mbpp.json"
LAST_ID_OF_SPLIT = {"prompt": 10, "test": 510, "validation": 600, "train": 974}

PlacedRow = tuple[str, Mapping[str, object]]


def load_mbpp(data_dir: Path | None) -> TaskSet:
    """The full version, 974 tasks; from `data_dir` if it holds `mbpp.jsonl`, else from the hub.

    Raises:
        TaskError: the data cannot be had, or it is not MBPP.
    """
    if data_dir is not None and (path := data_dir / FULL_FILE).exists():
        return _task_set("mbpp", json_lines(str(path), read_text(path)), str(path))
    hub = download(HUB_ID, "full")
    return _task_set("mbpp", ((HUB_ID, row) for row in hub.rows), hub.source)


def load_mbpp_sanitized(data_dir: Path | None) -> TaskSet:
    """The sanitized version, 427 tasks; from `data_dir` if it holds `sanitized-mbpp.json`, else from the hub.

    Raises:
        TaskError: the data cannot be had, or it is not sanitized MBPP.
    """
    if data_dir is not None and (path := data_dir / SANITIZED_FILE).exists():
        return _task_set("mbpp-sanitized", _json_list(path), str(path))
    hub = download(HUB_ID, "sanitized")
    return _task_set("mbpp-sanitized", ((HUB_ID, row) for row in hub.rows), hub.source)


def split_of(number: int) -> str:
    """The official split of an id.

    >>> [split_of(number) for number in (10, 11, 510, 511, 600, 601)]
    ['prompt', 'test', 'test', 'validation', 'validation', 'train']
    """
    return next((split for split, last in LAST_ID_OF_SPLIT.items() if number <= last), "train")


def _json_list(path: Path) -> list[PlacedRow]:
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: expected a JSON list, but it is not JSON ({error}).") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TaskError(f"{path}: expected a JSON list of objects.")
    return [(f"{path}, entry {number}", row) for number, row in enumerate(rows, start=1)]


def _task_set(name: str, placed: Iterable[PlacedRow], source: str) -> TaskSet:
    numbered = sorted(((_number(row, place), place, row) for place, row in placed), key=lambda item: item[0])
    tasks = tasks_of_rows(name, ((place, _schema_row(number, place, row)) for number, place, row in numbered))
    return task_set(name, tasks, source=source, licence=LICENCE, hub_id=HUB_ID)


def _number(row: Mapping[str, object], place: str) -> int:
    number = row.get("task_id")
    if not isinstance(number, int):
        raise TaskError(f"{place}, field task_id: expected a whole number, found {number!r}; this is not MBPP.")
    return number


def _schema_row(number: int, place: str, row: Mapping[str, object]) -> dict[str, object]:
    """A row of either version in the schema of `jsonl`; sanitized rows have a list of imports as set-up."""
    full = "text" in row
    columns = (
        ("text", "test_list", "test_setup_code", "code") if full else ("prompt", "test_list", "test_imports", "code")
    )
    if missing := [column for column in columns if column not in row]:
        raise TaskError(f"{place}: expected a row of MBPP, but it has no column {missing[0]}.")
    statement, tests, setup, reference = (row[column] for column in columns)
    if isinstance(setup, list) and all(isinstance(line, str) for line in setup):
        setup = "\n".join(setup)
    return {
        "task_id": f"mbpp/{number}",
        "statement": statement,
        "tests": tests,
        "setup": setup,
        "reference": reference,
        "split": split_of(number),
    }
