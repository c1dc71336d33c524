"""What one process that ran a program was seen to do, and the verdict that follows from it.

In: the lines of `child` as the parent read them, how the conversation ended, the clocks. Out: a `Verdict`.
Knows no process: everything here is a pure function of what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from greenloop.types import Outcome, Task, Verdict

DETAIL_CHARS = 300
TEST_CHARS = 120


class Ending(Enum):
    """How the conversation with the program's process ended."""

    ANSWERED = "answered"
    """It sent all that it had to send."""
    NOT_STARTED = "did not start"
    """It ended before it read a byte of the program."""
    CPU = "CPU limit reached"
    WALL = "time limit reached"
    DIED = "ended without an answer"
    MALFORMED = "answered out of form"


class BlockResult(Enum):
    """What the process said about one test block."""

    PASSED = "passed"
    FAILED = "failed"
    UNCALLED = "uncalled"
    ERROR = "error"
    MEMORY = "memory"


class LoadResult(Enum):
    """What the process said about the program's top level."""

    OK = "ok"
    ERROR = "error"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """One process, start to end."""

    ending: Ending
    load: LoadResult | None
    """None: the top level did not come to its end."""
    load_detail: str = ""
    blocks: tuple[tuple[BlockResult, str], ...] = ()
    """Result and detail of the first test blocks, in order; fewer than the task has if the process was cut off."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    note: str = ""
    """More about the ending: a signal, an error of the operating system."""
    exited: bool = False
    """The program ended its process itself, or raised SystemExit."""


CUT_OFF = {
    Ending.CPU: Outcome.TIMEOUT,
    Ending.WALL: Outcome.TIMEOUT,
    Ending.DIED: Outcome.CRASHED,
    Ending.MALFORMED: Outcome.CRASHED,
    Ending.NOT_STARTED: Outcome.HARNESS,
}

OUTCOME_OF_BLOCK = {
    BlockResult.FAILED: Outcome.FAILED,
    BlockResult.UNCALLED: Outcome.FAILED,
    BlockResult.ERROR: Outcome.ERROR,
    BlockResult.MEMORY: Outcome.MEMORY,
}


def outcome_of(transcript: Transcript, tests_total: int) -> Outcome:
    """The single reason: being cut off before memory before an error of the top level before the first failing test."""
    if transcript.ending in CUT_OFF:
        return CUT_OFF[transcript.ending]
    if tests_total == 0:
        return Outcome.HARNESS
    if transcript.load is not LoadResult.OK:
        return Outcome.MEMORY if transcript.load is LoadResult.MEMORY else Outcome.ERROR
    results = [result for result, _ in transcript.blocks]
    if BlockResult.MEMORY in results:
        return Outcome.MEMORY
    return next((OUTCOME_OF_BLOCK[result] for result in results if result is not BlockResult.PASSED), Outcome.PASSED)


def named(task: Task, index: int) -> str:
    """Number and text of a test on one line.

    >>> named(Task(task_id="t", statement="", entry_point="f", tests=("assert f(1)",), hidden_tests=("x\\ny",)), 1)
    'test 2 of 2 (hidden): x y'
    """
    tests = task.tests + task.hidden_tests
    text = " ".join(tests[index].split())
    if len(text) > TEST_CHARS:
        text = text[: TEST_CHARS - 3] + "..."
    hidden = " (hidden)" if index >= len(task.tests) else ""
    return f"test {index + 1} of {len(tests)}{hidden}: {text}"


def detail_of(transcript: Transcript, task: Task) -> str:
    """One line for people: where it went wrong and how; empty if nothing did."""
    if transcript.ending is not Ending.ANSWERED:
        reason = f"{transcript.ending.value}{transcript.note and f' ({transcript.note})'}"
        if transcript.ending is Ending.NOT_STARTED:
            return reason
        at_test = transcript.load is LoadResult.OK and len(transcript.blocks) < len(task.tests + task.hidden_tests)
        return f"{reason} in {named(task, len(transcript.blocks)) if at_test else 'the program itself'}"
    if transcript.load is not LoadResult.OK:
        return f"the program itself: {transcript.load_detail}"
    for index, (result, detail) in enumerate(transcript.blocks):
        if result is BlockResult.UNCALLED:
            return f"{named(task, index)}: it completed no call of {task.entry_point}"
        if result is not BlockResult.PASSED:
            return f"{named(task, index)}: {detail}"
    return "" if transcript.blocks else "the task has no tests"


def verdict_of(transcript: Transcript, task: Task) -> Verdict:
    """The verdict that follows from what was seen."""
    passed = [result is BlockResult.PASSED for result, _ in transcript.blocks]
    tests_total = len(task.tests) + len(task.hidden_tests)
    return Verdict(
        outcome=outcome_of(transcript, tests_total),
        tests_passed=sum(passed),
        tests_total=tests_total,
        hidden_passed=sum(passed[len(task.tests) :]),
        hidden_total=len(task.hidden_tests),
        ran=transcript.load is LoadResult.OK,
        cpu_s=transcript.cpu_s,
        wall_s=transcript.wall_s,
        detail=detail_of(transcript, task)[:DETAIL_CHARS],
        exited=transcript.exited,
    )
