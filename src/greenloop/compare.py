"""Two results over the same tasks, compared task by task.

In: two `results.json` files, their folders, or run folders. Out: a `Comparison` with paired differences, intervals and
p-values; its record for files and its lines for people. Refuses results over different tasks; names other differences
(protocol, shown tests, sampling) as notes. Runs no model.

Greedy answers: exact McNemar test. Samples: bootstrap over tasks and sign-flip permutation. Among answers that ran: the
ratio passed / ran over all tasks, both sides resampled with the same tasks, swap permutation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from greenloop.errors import RunError
from greenloop.ratios import RatioDifference, Share, compare_ratios
from greenloop.results import Record, estimate_of, evaluations_of, percent, read_record
from greenloop.statistics import Estimate, PairedDifference, compare_greedy, compare_rates
from greenloop.summary import Mode

SEED = 0
"""Of bootstrap and permutations: the same two files give the same numbers."""

_SAME_SETTINGS = ("protocol", "shown_tests", "max_new_tokens")
_SAME_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeComparison:
    """One mode of two results."""

    mode: Mode
    first: Estimate
    """pass@1 of the first result, over all its judged tasks."""
    second: Estimate
    passed: PairedDifference
    """pass@1, second minus first, over the tasks that were judged in both."""
    among_ran: RatioDifference | None
    """Pass rate among answers that ran; None where nothing ran on one side."""
    left_out: int
    """Tasks without a judged answer on one side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The second result minus the first."""

    first: str
    """What the first result is about, for people."""
    second: str
    tasks: str
    """The task spec of both."""
    modes: tuple[ModeComparison, ...]
    notes: tuple[str, ...]
    """Settings that differ between the two and bear on the numbers."""


def compare(first: Path, second: Path) -> Comparison:
    """The comparison of two results; of a run folder its `after`, and `before` with `after` if both are the same run.

    Raises:
        RunError: a file is missing or not ours, the tasks differ, or the two have no mode in common.
    """
    one, two = read_record(first), read_record(second)
    same_run = first.resolve() == second.resolve() and {"before", "after"} <= evaluations_of(one).keys()
    return compare_records(
        _chosen(one, "before" if same_run else "after"),
        _chosen(two, "after"),
        first=f"{first} (before)" if same_run else str(first),
        second=f"{second} (after)" if same_run else str(second),
    )


def _chosen(record: Record, wanted: str) -> Record:
    evaluations = evaluations_of(record)
    return evaluations[wanted] if wanted in evaluations else next(iter(evaluations.values()))


def compare_records(
    one: Mapping[str, Any], two: Mapping[str, Any], *, first: str = "before", second: str = "after"
) -> Comparison:
    """The comparison of two evaluation records (`results.evaluation_record`).

    Raises:
        RunError: the tasks differ, or the two have no mode in common.
    """
    if one["tasks"]["sha256"] != two["tasks"]["sha256"]:
        raise RunError(
            f"{first} and {second} are not about the same tasks ({one['tasks']['spec']} with hash "
            f"{one['tasks']['sha256'][:12]}, {two['tasks']['spec']} with {two['tasks']['sha256'][:12]}): "
            "evaluate both on one task set"
        )
    common = [mode for mode in Mode if one[mode.value] and two[mode.value]]
    if not common:
        raise RunError(f"{first} and {second} have no mode in common: evaluate both greedy, or both with samples")
    return Comparison(
        first=first,
        second=second,
        tasks=one["tasks"]["spec"],
        modes=tuple(_compare_mode(mode, one[mode.value], two[mode.value]) for mode in common),
        notes=tuple(_notes(one, two, common)),
    )


def _compare_mode(mode: Mode, one: Record, two: Record) -> ModeComparison:
    left, right = _judged(one), _judged(two)
    both = left.keys() & right.keys()
    passed_left = {task_id: left[task_id]["passed"] / left[task_id]["n"] for task_id in both}
    passed_right = {task_id: right[task_id]["passed"] / right[task_id]["n"] for task_id in both}
    if mode is Mode.GREEDY:
        passed = compare_greedy(_solved(passed_left), _solved(passed_right), seed=SEED)
    else:
        passed = compare_rates(passed_left, passed_right, seed=SEED)
    return ModeComparison(
        mode=mode,
        first=_pass_at_1(one),
        second=_pass_at_1(two),
        passed=passed,
        among_ran=compare_ratios(_of_ran(left, both), _of_ran(right, both), seed=SEED),
        left_out=len(one["tasks"]) - len(both),
    )


def _judged(summary: Record) -> dict[str, Record]:
    return {task["task_id"]: task for task in summary["tasks"] if task["n"]}


def _solved(rates: Mapping[str, float]) -> dict[str, bool]:
    return {task_id: rate == 1 for task_id, rate in rates.items()}


def _of_ran(tasks: Mapping[str, Record], chosen: set[str]) -> dict[str, Share]:
    return {task_id: Share(tasks[task_id]["passed"], tasks[task_id]["ran"]) for task_id in chosen}


def _pass_at_1(summary: Record) -> Estimate:
    return estimate_of(summary["pass_at_k"]["1"])


def _notes(one: Mapping[str, Any], two: Mapping[str, Any], modes: list[Mode]) -> Iterator[str]:
    keys = _SAME_SETTINGS + (_SAME_SAMPLING if Mode.SAMPLED in modes else ())
    for key in keys:
        left, right = one["settings"][key], two["settings"][key]
        if left != right:
            yield f"{key} differs: {_word(left)} and {_word(right)}"
    if one["environment"].get("sandbox_level") != two["environment"].get("sandbox_level"):
        yield "the sandbox level differs"


def _word(value: object) -> str:
    return "all" if value is None else str(value)


def comparison_record(comparison: Comparison) -> Record:
    """The JSON object of a comparison: `difference` in a run's `results.json`."""
    record: Record = {"first": comparison.first, "second": comparison.second, "tasks": comparison.tasks}
    for mode in Mode:
        record[mode.value] = next((_mode_record(one) for one in comparison.modes if one.mode is mode), None)
    return {**record, "notes": list(comparison.notes)}


def _mode_record(one: ModeComparison) -> Record:
    return {
        "first": asdict(one.first),
        "second": asdict(one.second),
        "pass_at_1": {**asdict(one.passed), "test": one.passed.test.value},
        "among_ran": None if one.among_ran is None else asdict(one.among_ran),
        "left_out": one.left_out,
    }


def comparison_lines(comparison: Comparison) -> list[str]:
    """The comparison for people, one fact a line."""
    lines = [f"{comparison.tasks}: {comparison.first} -> {comparison.second}"]
    for one in comparison.modes:
        lines.append(f"{one.mode.value} pass@1: {percent(one.first)} -> {percent(one.second)}")
        lines.append(f"  paired difference {points(one.passed)}, {one.passed.test.value}, {_tasks(one.passed)}")
        if one.among_ran is not None:
            ran = one.among_ran
            lines.append(
                f"  among answers that ran: {100 * ran.first:.1f} % -> {100 * ran.second:.1f} %, "
                f"difference {points(ran)}, swap permutation"
            )
        if one.left_out:
            lines.append(f"  {one.left_out} tasks left out: no judged answer on one side")
    return [*lines, *(f"note: {note}" for note in comparison.notes)]


def points(difference: PairedDifference | RatioDifference) -> str:
    """A paired difference in percentage points with its interval and p-value, for people."""
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.difference:+.1f} points [{low:+.1f}, {high:+.1f}], p = {difference.p_value:.2g}"


def _tasks(difference: PairedDifference) -> str:
    return f"{difference.tasks} tasks: {difference.better} better, {difference.worse} worse"
