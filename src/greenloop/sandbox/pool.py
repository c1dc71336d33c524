"""A `Verifier` over several judges: programs in, verdicts out as they are known.

The threads here only wait for judges; nothing is forked from this process, and no program or test runs in it. A judge
that ends or hangs is replaced and the program judged once more on a fresh one. If that fails too, it is the program's
doing, unless a trivial program fails there as well: only then is it our fault, and masked.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from greenloop.errors import SandboxError
from greenloop.sandbox.limits import Limits
from greenloop.sandbox.probes import PROBES, Probe
from greenloop.sandbox.transcript import Ending, Transcript, verdict_of
from greenloop.sandbox.worker import Worker, WorkerError, WorkerHungError
from greenloop.types import Outcome, Task, Verdict

REFERENCE_FACTOR = 5.0
"""A program may use this many times the CPU time of its task's reference."""
REFERENCE_PATIENCE = 10.0
"""The reference itself is measured under this many times the limits."""
PROGRAMS_A_WORKER = 5000
"""Then a fresh one takes its place."""

CLOSED = "the verifier is closed and judges no more programs: make a new one"
NOTICES = {
    "full": "each program runs without network, files, processes or tests in reach; its verdict is decided elsewhere",
    "no-open": "as full, without Landlock (not in this kernel): programs can open no file at all, so that modules "
    "outside the preloaded standard library cannot be imported",
    "rlimits-only": "UNSANDBOXED: programs can read files, use the network and start processes; only their verdict is "
    "decided elsewhere. Run only programs of models that you trust",
}


class SandboxVerifier:
    """Judges programs in locked processes; close it, or use it in a `with` block."""

    def __init__(
        self,
        limits: Limits | None = None,
        workers: int | None = None,
        *,
        unsandboxed: bool = False,
        landlock: bool = True,
    ) -> None:
        """Start a judge and prove that it accepts what is right and refuses what is not.

        Args:
            limits: of one program; a task gets `REFERENCE_FACTOR` times the CPU time of its reference, if that is more.
            workers: programs at a time; by default one for each CPU.
            unsandboxed: take level `rlimits-only`: limits and the split verdict, but no locks.
            landlock: use it where the kernel has it; without it the level is `no-open`.

        Raises:
            SandboxError: this machine cannot lock programs up, or a proof failed; says what to do.
        """
        if sys.platform != "linux":
            raise SandboxError(
                "programs can be judged on Linux only: use a Linux machine, container or virtual machine"
            )
        self._mode = "rlimits-only" if unsandboxed else "auto" if landlock else "no-open"
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._closed = False
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._reference_cpu_s: dict[Task, float] = {}
        cpus = sorted(os.sched_getaffinity(0))
        workers = workers or len(cpus)
        self._cpus = cpus if workers >= len(cpus) else []
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        try:
            # By a thread of the pool: a judge dies with the thread that started it.
            first = self._threads.submit(self._start).result()
        except (WorkerError, SandboxError) as error:
            self.close()
            raise SandboxError(f"programs cannot be judged here: {error}{_remedy(error)}") from None
        self.level = first.level
        self._give_back(first)

    @property
    def notice(self) -> str:
        """What the level covers, in a sentence."""
        return f"sandbox level '{self.level}': {NOTICES[self.level]}"

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
        """Kill every judge, give up the programs that wait, and return when all are reaped."""
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.process.kill()
        self._threads.shutdown(wait=True, cancel_futures=False)
        for worker in self._all:
            worker.close()

    def __enter__(self) -> SandboxVerifier:
        """The verifier itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _judge(self, task: Task, program: str) -> Verdict:
        if program == task.reference:  # nothing but itself says how long it may take
            return self._judge_within(task, program, self._limits.scaled(REFERENCE_PATIENCE))
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
                verdict = self._judge_within(task, task.reference, patient)
                if verdict.outcome in (Outcome.HARNESS, Outcome.CRASHED):
                    return 0.0  # nothing is known of the task yet
                measured = verdict.cpu_s if verdict.outcome is Outcome.PASSED else 0.0
            self._reference_cpu_s[task] = measured
        return self._reference_cpu_s[task]

    def _judge_within(self, task: Task, program: str, limits: Limits) -> Verdict:
        """The verdict; a judge that fails on the program twice is the program's doing if it works without it."""
        try:
            return verdict_of(self._seen(self._take, task, program, limits), task)
        except WorkerError:
            pass
        try:
            return verdict_of(self._seen(self._start, task, program, limits), task)
        except WorkerHungError:
            transcript = Transcript(ending=Ending.WALL, load=None, note="the judge hung on it twice")
        except WorkerError as error:
            transcript = Transcript(ending=Ending.DIED, load=None, note=f"{error} on it twice")
        try:
            self._give_back(self._start())
        except (WorkerError, SandboxError) as error:
            transcript = Transcript(ending=Ending.NOT_STARTED, load=None, note=str(error))
        self._refuse_if_closed()
        return verdict_of(transcript, task)

    def _seen(self, get: Callable[[], Worker], task: Task, program: str, limits: Limits) -> Transcript:
        worker = get()
        try:
            transcript = worker.judge(task, program, limits)
        except WorkerError:
            self._drop(worker)
            self._refuse_if_closed()
            raise
        self._refuse_if_closed()
        self._give_back(worker)
        return transcript

    def _take(self) -> Worker:
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return self._start()
            if worker.process.poll() is None:
                return worker
            self._drop(worker)

    def _give_back(self, worker: Worker) -> None:
        if worker.judged >= PROGRAMS_A_WORKER:
            self._drop(worker)
            return
        with self._lock:
            self._idle.append(worker)

    def _drop(self, worker: Worker) -> None:
        worker.close()
        with self._lock:
            self._all.discard(worker)

    def _start(self) -> Worker:
        """A proven worker; raises WorkerError, or SandboxError if a proof fails or the verifier is closed."""
        self._refuse_if_closed()
        worker = Worker(self._mode, self._free_cpu())
        with self._lock:
            self._all.add(worker)
            if self._closed:
                worker.process.kill()
        for probe in PROBES:
            try:
                self._prove(worker, probe)
            except (WorkerError, SandboxError):
                self._drop(worker)
                self._refuse_if_closed()
                raise
        return worker

    def _free_cpu(self) -> int | None:
        """The CPU with the fewest judges, where there is at least one for each; else the kernel knows better.

        A judge, its fork server and a program take turns: across CPUs each turn wakes one up, which took a fifth of
        all time.
        """
        with self._lock:
            taken = [worker.cpu for worker in self._all]
        return min(self._cpus, key=taken.count, default=None)

    def _prove(self, worker: Worker, probe: Probe) -> None:
        """A broken judge can look strict, and a broken lock can look fine."""
        if probe.locks and worker.level == "rlimits-only":
            return
        limits = self._limits if probe.cpu_s is None else self._limits.scaled(probe.cpu_s / self._limits.cpu_s)
        verdict = verdict_of(worker.judge(probe.task, probe.program, limits), probe.task)
        if verdict.outcome is not probe.expected:
            seen = f"{verdict.outcome.value} instead of {probe.expected.value} ({verdict.detail})"
            raise SandboxError(
                f"the proof '{probe.task.task_id}' gave {seen}; check the sandbox limits, or run in a container or "
                "virtual machine whose kernel has seccomp"
            )

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise SandboxError(CLOSED)


def _remedy(error: Exception) -> str:
    """What to do where the machine itself is the reason; a failed proof says it itself."""
    if not isinstance(error, WorkerError):
        return ""
    return (
        "; use a kernel or container with seccomp, or, for programs of a model that you trust, "
        "--sandbox rlimits-only --allow-unsandboxed (in a recipe sandbox.level and sandbox.allow_unsandboxed)"
    )


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
