"""What a set of judged answers says about a model.

In: answers (completion, program, verdict). Out: counts of each task and estimates with 95 % intervals. An answer that
could not be judged is masked: it counts for no rate and is reported by number. Knows no model and no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import fmean

from greenloop.ratios import Share, ratio_estimate
from greenloop.statistics import Estimate, PassCount, greedy_estimate, mean_estimate, mean_pass_at_k
from greenloop.types import Completion, Finish, Outcome, Task, Verdict


class Mode(Enum):
    """How answers were drawn."""

    GREEDY = "greedy"
    """The likeliest token always, one answer a task."""
    SAMPLED = "sampled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One completion of an evaluation, judged."""

    mode: Mode
    task: Task
    """As presented: `task.tests` are those that the prompt showed."""
    sample: int
    completion: Completion
    program: str | None
    """What was judged; None: the completion holds no code."""
    well_formed: bool | None
    """The answer has the form that the protocol asks for; None: it asks for none."""
    verdict: Verdict

    @property
    def judged(self) -> bool:
        """The verdict is about the model, not about us."""
        return self.verdict.outcome is not Outcome.HARNESS

    @property
    def passed(self) -> bool:
        """All tests, shown and hidden."""
        return self.verdict.outcome is Outcome.PASSED

    @property
    def passed_shown(self) -> bool:
        """All shown tests, whatever the hidden ones said."""
        return self.verdict.shown_passed == self.verdict.shown_total

    @property
    def truncated(self) -> bool:
        """It ended because it reached the limit of new tokens."""
        return self.completion.finish is Finish.LENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCounts:
    """How one task went: what a paired comparison needs."""

    task_id: str
    n: int
    """Answers that were judged; all counts but `harness` are of these."""
    passed: int
    ran: int
    """Programs whose own code ran to its end without an exception."""
    passed_shown: int
    harness: int
    """Answers that could not be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassAtK:
    """pass@k with its interval."""

    k: int
    estimate: Estimate
    tasks: int
    """Tasks with at least k judged answers, over which it is the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All that the answers of one mode say together."""

    mode: Mode
    answers: int
    judged: int
    harness: int
    """answers - judged: our fault, in no rate."""
    pass_at_k: tuple[PassAtK, ...]
    """For k = 1 and each k that was asked for, ascending; a k that no task has the answers for is left out."""
    outcomes: dict[str, int]
    """How many answers had each outcome, in the order of `Outcome`, zeros included."""
    ran: Estimate
    """Share of answers whose program ran to its end."""
    passed_of_ran: Estimate | None
    """Pass rate among those; None where none ran."""
    shown_hidden_gap: Estimate | None
    """Share that pass all shown tests minus share that pass all; None where no test is shown or none is hidden."""
    truncated: float
    """Share of all answers that reached the limit of new tokens."""
    mean_tokens: float
    """Sampled tokens an answer, the end token included."""
    well_formed: float | None
    """Share of all answers that have the form asked for; None: the protocol asks for none."""
    tasks: tuple[TaskCounts, ...]
    """In the order of the task set."""


def summarise(answers: Sequence[Answer], *, k: Iterable[int], seed: int) -> Summary:
    """The summary of the answers of one mode, at least one of them judged.

    It does not depend on the order of the answers, but that `tasks` keeps the order in which tasks first occur.

    Raises:
        RunError: no answer was judged.
    """
    tasks = _counts(answers)
    judged = sorted((task for task in tasks if task.n), key=lambda task: task.task_id)
    greedy = answers[0].mode is Mode.GREEDY
    well_formed = [answer.well_formed for answer in answers if answer.well_formed is not None]
    outcomes = Counter(answer.verdict.outcome for answer in answers)
    return Summary(
        mode=answers[0].mode,
        answers=len(answers),
        judged=sum(task.n for task in tasks),
        harness=sum(task.harness for task in tasks),
        pass_at_k=(_greedy_pass(judged),) if greedy else _sampled_pass(judged, k, seed),
        outcomes={outcome.value: outcomes[outcome] for outcome in Outcome},
        ran=_ran(judged, greedy, seed),
        passed_of_ran=_passed_of_ran(judged, greedy, seed),
        shown_hidden_gap=_gap(answers, judged, seed),
        truncated=fmean(answer.truncated for answer in answers),
        mean_tokens=fmean(len(answer.completion.token_ids) for answer in answers),
        well_formed=fmean(well_formed) if well_formed else None,
        tasks=tasks,
    )


def _counts(answers: Sequence[Answer]) -> tuple[TaskCounts, ...]:
    by_task: dict[str, list[Answer]] = {}
    for answer in answers:
        by_task.setdefault(answer.task.task_id, []).append(answer)
    return tuple(_task_counts(task_id, group) for task_id, group in by_task.items())


def _task_counts(task_id: str, answers: Sequence[Answer]) -> TaskCounts:
    judged = [answer for answer in answers if answer.judged]
    return TaskCounts(
        task_id=task_id,
        n=len(judged),
        passed=sum(answer.passed for answer in judged),
        ran=sum(answer.verdict.ran for answer in judged),
        passed_shown=sum(answer.passed_shown for answer in judged),
        harness=len(answers) - len(judged),
    )


def _greedy_pass(tasks: Sequence[TaskCounts]) -> PassAtK:
    estimate = greedy_estimate(sum(task.passed for task in tasks), len(tasks))
    return PassAtK(k=1, estimate=estimate, tasks=len(tasks))


def _sampled_pass(tasks: Sequence[TaskCounts], ks: Iterable[int], seed: int) -> tuple[PassAtK, ...]:
    enough = {k: [task for task in tasks if task.n >= k] for k in sorted({1, *ks})}
    return tuple(
        PassAtK(
            k=k,
            estimate=mean_pass_at_k([PassCount(passed=task.passed, samples=task.n) for task in chosen], k, seed=seed),
            tasks=len(chosen),
        )
        for k, chosen in enough.items()
        if chosen
    )


def _ran(tasks: Sequence[TaskCounts], greedy: bool, seed: int) -> Estimate:
    if greedy:
        return greedy_estimate(sum(task.ran for task in tasks), len(tasks))
    return mean_estimate([task.ran / task.n for task in tasks], seed=seed)


def _passed_of_ran(tasks: Sequence[TaskCounts], greedy: bool, seed: int) -> Estimate | None:
    ran = sum(task.ran for task in tasks)
    if greedy:
        return greedy_estimate(sum(task.passed for task in tasks), ran) if ran else None
    return ratio_estimate([Share(task.passed, task.ran) for task in tasks], seed=seed)


def _gap(answers: Sequence[Answer], tasks: Sequence[TaskCounts], seed: int) -> Estimate | None:
    if not any(answer.task.tests and answer.task.hidden_tests for answer in answers):
        return None
    return mean_estimate([(task.passed_shown - task.passed) / task.n for task in tasks], seed=seed)
