"""Task sets and their checks as lines for people."""

from __future__ import annotations

from collections.abc import Iterator

from greenloop.errors import TaskError
from greenloop.tasks.audit import AuditReport, NearDuplicate
from greenloop.tasks.check import CheckReport, Problem
from greenloop.types import Task, TaskSet


def find_task(task_set: TaskSet, task_id: str) -> Task:
    """The task of that id, or the one whose id ends with `/task_id`.

    Raises:
        TaskError: there is none.
    """
    for task in task_set.tasks:
        if task.task_id == task_id or task.task_id.rpartition("/")[2] == task_id:
            return task
    raise TaskError(f"{task_set.spec}: there is no task {task_id!r}; ids look like {task_set.tasks[0].task_id}")


def task_lines(task: Task) -> Iterator[str]:
    """One task, whole."""
    yield f"{task.task_id}  ({task.split}{', ' + task.topic if task.topic else ''})"
    yield task.statement
    for title, blocks in (
        ("shown tests", task.tests),
        ("hidden tests", task.hidden_tests),
        ("set-up", (task.setup,) if task.setup else ()),
        ("reference", (task.reference,) if task.reference else ()),
        ("wrong", task.wrong),
    ):
        if blocks:
            yield f"\n# {title}"
            yield from blocks


def check_lines(report: CheckReport) -> Iterator[str]:
    """How the references did."""
    yield f"{report.spec}: {report.passed} of {len(report.checks)} references pass their tests"
    for problem in Problem:
        for found in report.having(problem):
            detail = next((run.detail for run in found.runs if run.detail), "")
            yield f"  {problem.value}: {found.task_id} ({found.cpu_s:.2f} s CPU) {detail}".rstrip()


def audit_lines(report: AuditReport) -> Iterator[str]:
    """Which tasks repeat one another."""
    yield from _pairs("near-duplicates across splits", report.across_splits)
    yield from _pairs("near-duplicates within a split", report.within_splits)
    if report.against:
        yield from _pairs(f"near-duplicates with {report.against}", report.with_other)


def _pairs(title: str, pairs: tuple[NearDuplicate, ...]) -> Iterator[str]:
    yield f"{title}: {len(pairs)}"
    for pair in pairs:
        yield f"  {pair.left.task_id} ~ {pair.right.task_id} (words {pair.words:.2f}, code {pair.code:.2f})"
