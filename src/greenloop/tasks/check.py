"""Run the references of a task set, and its wrong solutions, against its tests.

In: a task set and a verifier. Out: what each run gave, and which problems follow. Prints nothing.
Says nothing about whether a statement matches its tests.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum

from greenloop.types import Outcome, Task, TaskSet, Verdict, Verifier

SLOW_CPU_S = 1.0
"""A reference that needs more CPU time than this eats the time limit of the programs it is compared with."""


class Problem(Enum):
    """What is wrong with a task."""

    NO_REFERENCE = "no reference"
    UNJUDGED = "unjudged"
    """The sandbox could not judge a run: our fault, nothing is known."""
    FAILING = "failing"
    """Every run of the reference failed in the same way."""
    FLAKY = "flaky"
    """Runs of the same reference differ in outcome or in tests passed."""
    SLOW = "slow"
    WRONG_PASSES = "wrong passes"
    """A solution that the set calls wrong passed all tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCheck:
    """The runs of one task's reference and wrong solutions."""

    task_id: str
    runs: tuple[Verdict, ...]
    """The reference, once per repeat; empty if the task has none."""
    wrong: tuple[Verdict, ...]
    """Each wrong solution once, in the task's order; `shown_passed` tells how plausible it looks."""

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the slowest run of the reference; 0 without one."""
        return max((run.cpu_s for run in self.runs), default=0.0)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All that is wrong, in the order of `Problem`."""
        return tuple(problem for problem in Problem if problem in set(self._found()))

    def _found(self) -> Iterator[Problem]:
        judged = [run for run in self.runs if run.outcome is not Outcome.HARNESS]
        answers = {(run.outcome, run.tests_passed, run.hidden_passed) for run in judged}
        if not self.runs:
            yield Problem.NO_REFERENCE
        if any(run.outcome is Outcome.HARNESS for run in (*self.runs, *self.wrong)):
            yield Problem.UNJUDGED
        if len(answers) > 1:
            yield Problem.FLAKY
        elif any(run.outcome is not Outcome.PASSED for run in judged):
            yield Problem.FAILING
        if self.cpu_s > SLOW_CPU_S:
            yield Problem.SLOW
        if any(run.outcome is Outcome.PASSED for run in self.wrong):
            yield Problem.WRONG_PASSES


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The checks of a whole set, in the set's order."""

    spec: str
    checks: tuple[TaskCheck, ...]

    @property
    def passed(self) -> int:
        """How many references passed in every run."""
        return sum(bool(c.runs) and all(run.outcome is Outcome.PASSED for run in c.runs) for c in self.checks)

    def having(self, problem: Problem) -> tuple[TaskCheck, ...]:
        """The tasks with this problem."""
        return tuple(check for check in self.checks if problem in check.problems)

    @property
    def ok(self) -> bool:
        """Whether the set can be trained on: slow references and tasks without one are notices, not faults."""
        notices = {Problem.SLOW, Problem.NO_REFERENCE}
        return all(notices.issuperset(check.problems) for check in self.checks)


def check_references(task_set: TaskSet, verifier: Verifier, *, repeats: int = 2) -> CheckReport:
    """Judge every reference `repeats` times and every wrong solution once.

    Repeats go round the whole set, so that two runs of one reference lie apart in time and rarely on the same worker.

    Raises:
        SandboxError: the verifier is closed.
    """
    tasks = task_set.tasks
    rounds = [[_submit_reference(task, verifier) for task in tasks] for _ in range(repeats)]
    wrong = [[verifier.submit(task, program) for program in task.wrong] for task in tasks]
    checks = tuple(
        TaskCheck(
            task_id=task.task_id,
            runs=tuple(run.result() for run in runs if run is not None),
            wrong=tuple(verdict.result() for verdict in verdicts),
        )
        for task, runs, verdicts in zip(tasks, zip(*rounds, strict=True), wrong, strict=True)
    )
    return CheckReport(spec=task_set.spec, checks=checks)


def _submit_reference(task: Task, verifier: Verifier) -> Future[Verdict] | None:
    return verifier.submit(task, task.reference) if task.reference else None
