"""A `Verifier` that runs every program in a fresh interpreter, several at a time.

In: tasks and programs. Out: futures of verdicts. The threads here only wait; nothing is forked from this process.

What it covers: endless loops, sleepers, memory, crashes, exits, floods of output, tests that were not run.
What it does not (see `NOTICE`): the program shares an interpreter with its tests and a user with the trainer.
"""

from __future__ import annotations

import os
import secrets
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from greenloop.errors import SandboxError
from greenloop.sandbox.conversation import Job
from greenloop.sandbox.interpreter import Flights, run
from greenloop.sandbox.limits import Limits
from greenloop.sandbox.transcript import Ending, Transcript, verdict_of
from greenloop.types import Outcome, Task, Verdict

LEVEL = "process"
"""The sandbox level that is written into metrics."""

NOTICE = (
    "sandbox level 'process': each program runs in a fresh process with limits, but it can read files, use the "
    "network, start processes (as root: without limit) and forge its verdict if it is written to; "
    "run only programs of models that you trust, or run all of this in a container"
)

REFERENCE_FACTOR = 5.0
"""A program may use this many times the CPU time of its task's reference."""
REFERENCE_PATIENCE = 10.0
"""The reference itself is measured under this many times the limits."""

CLOSED = "the verifier is closed and judges no more programs: make a new one"

TRIVIAL = Task(task_id="trivial", statement="", entry_point="f", tests=("assert f(1) == 2",))
RIGHT_PROGRAM = "def f(x):\n    return x + 1\n"
WRONG_PROGRAM = "def f(x):\n    return x\n"


class ProcessVerifier:
    """Judges programs in fresh interpreter processes; close it, or use it in a `with` block."""

    def __init__(self, limits: Limits | None = None, workers: int | None = None) -> None:
        """Prove that a right program passes here and a wrong one does not.

        Args:
            limits: of one program; a task gets `REFERENCE_FACTOR` times the CPU time of its reference, if that is more.
            workers: programs at a time; by default one for each CPU.

        Raises:
            SandboxError: this is not Linux, or programs cannot be judged under these limits.
        """
        if sys.platform != "linux":
            raise SandboxError(
                "programs can be judged on Linux only: use a Linux machine, container or virtual machine"
            )
        self._limits = limits or Limits()
        self._flights = Flights()
        self._reference_cpu_s: dict[Task, float] = {}
        self._threads = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="judge")
        self._prove(RIGHT_PROGRAM, Outcome.PASSED)
        self._prove(WRONG_PROGRAM, Outcome.FAILED)

    def submit(self, task: Task, program: str | None) -> Future[Verdict]:
        """Judge `program` (None: the completion held no code) against all tests of `task`.

        The future raises SandboxError if the verifier is closed before the verdict is known.

        Raises:
            SandboxError: the verifier is closed.
        """
        self._refuse_if_closed()
        if program is None:
            answered: Future[Verdict] = Future()
            answered.set_result(no_code(task))
            return answered
        try:
            return self._threads.submit(self._judge, task, program)
        except RuntimeError as error:  # closed by another thread meanwhile
            raise SandboxError(CLOSED) from error

    def close(self) -> None:
        """Kill every program in flight, give up those that wait, and return when all are reaped."""
        self._flights.ground()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> ProcessVerifier:
        """The verifier itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _prove(self, program: str, expected: Outcome) -> None:
        """Raises SandboxError if the trivial program is not judged as it must be; a broken judge can look strict."""
        verdict = verdict_of(self._run(TRIVIAL, program, self._limits), TRIVIAL)
        if verdict.outcome is not expected:
            seen = f"{verdict.outcome.value} instead of {expected.value} ({verdict.detail})"
            remedy = f"check the sandbox limits and that {sys.executable} can be run"
            raise SandboxError(f"programs cannot be judged here: a trivial one gave {seen}; {remedy}")

    def _judge(self, task: Task, program: str) -> Verdict:
        verdict = self._judge_within(task, program, self._limits)
        if verdict.outcome is not Outcome.TIMEOUT:
            return verdict
        factor = REFERENCE_FACTOR * self._reference_seconds(task) / self._limits.cpu_s
        return self._judge_within(task, program, self._limits.scaled(factor)) if factor > 1 else verdict

    def _reference_seconds(self, task: Task) -> float:
        """CPU seconds of the task's reference, measured once; 0 if it has none that passes."""
        if task not in self._reference_cpu_s:
            measured = 0.0
            if task.reference:
                patient = self._limits.scaled(REFERENCE_PATIENCE)
                verdict = verdict_of(self._run(task, task.reference, patient), task)
                measured = verdict.cpu_s if verdict.outcome is Outcome.PASSED else 0.0
            self._reference_cpu_s[task] = measured
        return self._reference_cpu_s[task]

    def _judge_within(self, task: Task, program: str, limits: Limits) -> Verdict:
        """The verdict; a crash counts for the program only if it is seen twice and a trivial program passes."""
        transcript = self._run(task, program, limits)
        if is_crash(transcript):
            transcript = self._run(task, program, limits)
        if is_crash(transcript) and transcript.ending is not Ending.NOT_STARTED:
            trivial = verdict_of(self._run(TRIVIAL, RIGHT_PROGRAM, limits), TRIVIAL)
            if trivial.outcome is not Outcome.PASSED:
                note = f"a trivial program fails too: {trivial.detail}"
                transcript = Transcript(ending=Ending.NOT_STARTED, load=None, note=note)
        return verdict_of(transcript, task)

    def _run(self, task: Task, program: str, limits: Limits) -> Transcript:
        self._refuse_if_closed()
        transcript = run(Job(task=task, program=program, nonce=secrets.token_hex(16)), limits, self._flights)
        self._refuse_if_closed()
        return transcript

    def _refuse_if_closed(self) -> None:
        if self._flights.grounded:
            raise SandboxError(CLOSED)


def is_crash(transcript: Transcript) -> bool:
    """It may have been our fault: no answer, an answer out of form, or no start."""
    return transcript.ending in (Ending.DIED, Ending.MALFORMED, Ending.NOT_STARTED)


def no_code(task: Task) -> Verdict:
    """The verdict on a completion that holds no program."""
    return Verdict(
        outcome=Outcome.NO_CODE,
        tests_passed=0,
        tests_total=len(task.tests) + len(task.hidden_tests),
        hidden_passed=0,
        hidden_total=len(task.hidden_tests),
        ran=False,
        cpu_s=0.0,
        wall_s=0.0,
        detail="the completion holds no program",
    )
