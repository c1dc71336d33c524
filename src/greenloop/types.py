"""The values that travel the straight line, one frozen class per stage.

Task -> Prompt -> Completion -> Verdict -> reward -> advantage -> loss -> adapter -> journal -> report

Standard library only: the sandbox, `score` and the report use these without torch.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A programming exercise: what is asked, and the tests that decide."""

    task_id: str
    """Unique in its set, e.g. `starter/lists/count_gaps`, `mbpp/11`, `HumanEval/0`."""
    statement: str
    """The exercise in words (HumanEval: the signature with its docstring)."""
    entry_point: str
    """Name of the function that the tests call."""
    tests: tuple[str, ...]
    """Blocks of Python that assert; the prompt may show these."""
    hidden_tests: tuple[str, ...] = ()
    """Blocks that no prompt ever shows; they count for the verdict like the others."""
    setup: str = ""
    """Code of the data set's own that the tests need; runs after the solution, before the tests."""
    prelude: str = ""
    """Code of the data set's own that stands before the solution (HumanEval: imports and helpers of its prompt)."""
    reference: str = ""
    """A solution that passes, or empty."""
    wrong: tuple[str, ...] = ()
    """Plausible solutions that must not pass (starter set)."""
    split: str = "train"
    topic: str = ""

    def showing(self, shown: int | None) -> Task:
        """The same task with only its first `shown` tests shown, the rest hidden; `None` shows all.

        >>> t = Task(task_id="t", statement="", entry_point="f", tests=("a", "b"), hidden_tests=("c",))
        >>> t.showing(1).tests, t.showing(1).hidden_tests
        (('a',), ('b', 'c'))
        """
        if shown is None or shown >= len(self.tests):
            return self
        return replace(self, tests=self.tests[:shown], hidden_tests=self.tests[shown:] + self.hidden_tests)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSet:
    """The tasks that a spec such as `mbpp:test` stands for."""

    spec: str
    """The spec as the user wrote it."""
    name: str
    """The set's name without the split, e.g. `mbpp`."""
    tasks: tuple[Task, ...]
    sha256: str
    """Hash of the content of the chosen tasks, independent of where the files lay."""
    source: str
    """Where the tasks came from, for people: a file, the package or a hub id with its revision."""
    licence: str = ""
    hub_id: str = ""
    """Data set id on the hub, for the model card; empty if it is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the model reads for one task under one protocol."""

    task: Task
    """As presented: `task.tests` are the shown ones."""
    text: str
    """The rendered text, template included."""
    token_ids: tuple[int, ...]
    protocol: str
    stop: tuple[str, ...] = ()
    """Strings that end a completion besides the model's own end tokens."""


class Finish(Enum):
    """Why a completion ended."""

    EOS = "eos"
    """The model sampled one of its declared end tokens (kept as last token)."""
    STOP = "stop"
    """A stop string of the protocol appeared."""
    LENGTH = "length"
    """`max_new_tokens` was reached: the completion is truncated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer."""

    group: int
    """Index of the prompt among those given to `generate`."""
    sample: int
    """0 .. K-1 within the group."""
    token_ids: tuple[int, ...]
    """The sampled tokens, the end token included."""
    logprobs: tuple[float, ...]
    """Full-vocabulary log-prob at the sampling temperature of each sampled token, nats."""
    finish: Finish
    text: str
    """Decoded without special tokens and without the stop string and what follows it."""


class Outcome(Enum):
    """How a completion met its tests. HARNESS means that we failed, not the model."""

    PASSED = "passed"
    FAILED = "failed"
    """At least one assertion was false."""
    ERROR = "error"
    """The program or a call raised."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    CRASHED = "crashed"
    """It ended without an answer, or answered out of form."""
    NO_CODE = "no_code"
    """The completion holds no program."""
    HARNESS = "harness"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What happened when one program met its tests. A fact: it holds no reward."""

    outcome: Outcome
    """The single reason, decided outside the program's process."""
    tests_passed: int
    """Of all tests, shown and hidden."""
    tests_total: int
    hidden_passed: int
    """Of the hidden tests alone."""
    hidden_total: int
    ran: bool
    """The program's own code was executed to its end without an exception (whatever its tests said)."""
    cpu_s: float
    wall_s: float
    detail: str = ""
    """One line for people: the first failing test and why."""
    exited: bool = False
    """It ended its process, or raised SystemExit, instead of answering."""

    @property
    def shown_passed(self) -> int:
        """Of the shown tests alone."""
        return self.tests_passed - self.hidden_passed

    @property
    def shown_total(self) -> int:
        """How many tests the prompt showed."""
        return self.tests_total - self.hidden_total


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The K judged completions of one prompt."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    programs: tuple[str | None, ...]
    """What was judged."""
    verdicts: tuple[Verdict, ...]
    well_formed: tuple[bool, ...]
    """The answer has exactly one closed Python fence that defines the entry point."""


class Verifier(Protocol):
    """Judges programs, several at a time, away from this process."""

    @property
    def level(self) -> str:
        """How strongly programs are locked up; goes into every metric."""
        ...

    @property
    def notice(self) -> str:
        """What that covers, in a sentence for people."""
        ...

    def submit(self, task: Task, program: str | None) -> Future[Verdict]:
        """Judge `program` (None: the completion held no code) against all tests of `task`.

        Anything that the program does becomes an `Outcome`; what goes wrong on our side becomes `Outcome.HARNESS`.

        Raises:
            SandboxError: the verifier is closed. Nothing else.
        """
        ...
