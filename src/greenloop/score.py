"""Judge ready-made completions from a file: what `greenloop score` does.

In: a task set and a JSONL file of samples. Out: one verdict for each sample, in the file's order, and optionally a
JSONL file of them. Loads no model and knows no prompt except that a HumanEval statement is the beginning of a program.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent, indent

from greenloop.errors import RunError
from greenloop.files import write_atomically
from greenloop.sandbox import Limits, SandboxVerifier
from greenloop.types import Outcome, Task, TaskSet, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One line of a samples file, made ready for the judge."""

    task: Task
    program: str | None
    """None: the completion holds no code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The verdicts on a samples file, in its order."""

    task_ids: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def outcomes(self) -> dict[str, int]:
        """How many samples had each outcome that occurred, in the order of `Outcome`."""
        counts = Counter(verdict.outcome for verdict in self.verdicts)
        return {outcome.value: counts[outcome] for outcome in Outcome if counts[outcome]}

    @property
    def all_judged(self) -> bool:
        """No verdict is our own failure."""
        return all(verdict.outcome is not Outcome.HARNESS for verdict in self.verdicts)

    @property
    def lines(self) -> tuple[str, ...]:
        """The JSON objects of the output file, without line ends."""
        return tuple(verdict_line(*pair) for pair in zip(self.task_ids, self.verdicts, strict=True))


def score(
    task_set: TaskSet,
    samples_path: Path,
    out_path: Path | None = None,
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    unsandboxed: bool = False,
    on_notice: Callable[[str], None] | None = None,
) -> Scores:
    """The verdicts on all samples of a file, judged in parallel; they are also written to `out_path`, if it is given.

    Args:
        task_set: whose tests decide.
        samples_path: see `read_samples`.
        out_path: where the verdicts go too.
        limits: of one program.
        workers: programs at a time.
        unsandboxed: see `SandboxVerifier`.
        on_notice: hears what the sandbox covers before the first program runs.

    Raises:
        RunError: the samples file cannot be used, or `out_path` cannot be written; nothing was judged then.
    """
    if out_path is not None:
        check_output(out_path, samples_path)
    samples = read_samples(task_set, samples_path)
    with SandboxVerifier(limits, workers, unsandboxed=unsandboxed) as verifier:
        if on_notice is not None:
            on_notice(verifier.notice)
        futures = [verifier.submit(sample.task, sample.program) for sample in samples]
        verdicts = tuple(future.result() for future in futures)
    scores = Scores(task_ids=tuple(sample.task.task_id for sample in samples), verdicts=verdicts)
    if out_path is not None:
        write_atomically(out_path, "".join(f"{line}\n" for line in scores.lines))
    return scores


def read_samples(task_set: TaskSet, path: Path) -> tuple[Sample, ...]:
    """The samples of a file; blank lines are skipped.

    A line is `{"task_id": ..., "solution": ...}` or the same with `completion`; a line that has both is judged
    by its solution, and other keys are ignored.

    Raises:
        RunError: no such file, no sample in it, a line out of form, or a task that the set does not have.
    """
    find = TaskFinder(task_set)
    samples = tuple(sample_of(row, find, place) for place, row in read_rows(path))
    if not samples:
        raise RunError(f"{path} holds no samples: expected lines such as {EXAMPLE}")
    return samples


EXAMPLE = '{"task_id": "mbpp/11", "completion": "..."}'


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Place (file and line) and JSON object of every line that is not blank."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 text (byte {error.start}): save it as JSONL in UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{place}: not a JSON object ({error}): expected a line such as {EXAMPLE}") from error
        if not isinstance(row, dict):
            raise RunError(f"{place}: not a JSON object: expected a line such as {EXAMPLE}")
        yield place, row


def sample_of(row: Mapping[str, object], find: TaskFinder, place: str) -> Sample:
    """The sample of one line."""
    if "task_id" not in row:
        raise RunError(f'{place}: the field "task_id" is missing: expected a line such as {EXAMPLE}')
    task = find(row["task_id"], place)
    for field in ("solution", "completion"):
        if field in row:
            text = row[field]
            if not isinstance(text, str):
                raise RunError(f'{place}: "{field}" must be a text, not {json.dumps(text)[:40]}')
            return Sample(task=task, program=text if field == "solution" else program_of(task, text))
    raise RunError(f'{place}: neither "completion" nor "solution": expected a line such as {EXAMPLE}')


def program_of(task: Task, completion: str) -> str | None:
    """The program that a completion stands for; None if it holds no code.

    Where the statement itself is the beginning of the program (HumanEval) and the completion does not define the entry
    point, the completion continues the statement.
    """
    from greenloop.prompt.extract import extract_code

    name = re.escape(task.entry_point)
    definition = re.compile(rf"^(?:[ \t]*(?:async[ \t]+def|def|class)[ \t]+{name}\b|{name}[ \t]*=(?!=))", re.MULTILINE)
    code = extract_code(completion, task.entry_point)
    if not definition.search(task.statement) or definition.search(code or ""):
        return code
    if not completion.strip():
        return None
    # A block in the middle of prose has lost the indentation that it needs as a body.
    return task.statement + (indent(dedent(code), "    ") if code and FENCE in completion else completion)


FENCE = "```"


class TaskFinder:
    """Finds the task that a line of a samples file means.

    An id is looked up as it stands; if the set has none such, without regard to case (`Mbpp/11`); if there is still
    none, as the last part of an id (`11`, or the number 11), provided that only one task of the set ends so.
    """

    def __init__(self, task_set: TaskSet) -> None:
        self._spec = task_set.spec
        self._exact = {task.task_id: task for task in task_set.tasks}
        self._folded = grouped((task.task_id.casefold(), task) for task in task_set.tasks)
        self._last_part = grouped((task.task_id.casefold().rpartition("/")[2], task) for task in task_set.tasks)

    def __call__(self, task_id: object, place: str) -> Task:
        """The task of `task_id`.

        Raises:
            RunError: `task_id` is no id, or the set has no such task, or more than one.
        """
        if isinstance(task_id, bool) or not isinstance(task_id, str | int):
            raise RunError(f'{place}: "task_id" must be a text or a whole number, not {json.dumps(task_id)[:40]}')
        name = str(task_id)
        if name in self._exact:
            return self._exact[name]
        found = self._folded.get(name.casefold()) or self._last_part.get(name.casefold(), [])
        if len(found) == 1:
            return found[0]
        if found:
            raise RunError(
                f'{place}: "task_id" {name!r} could be {found[0].task_id} or {found[1].task_id}: write it in full'
            )
        example = next(iter(self._exact), "")
        raise RunError(f'{place}: "task_id" {name!r} is not in {self._spec}, whose ids look like {example!r}')


def grouped(pairs: Iterable[tuple[str, Task]]) -> dict[str, list[Task]]:
    """The tasks of each key, in their order."""
    groups: dict[str, list[Task]] = {}
    for key, task in pairs:
        groups.setdefault(key, []).append(task)
    return groups


def verdict_line(task_id: str, verdict: Verdict) -> str:
    """One verdict as a JSON object on one line."""
    return json.dumps(
        {
            "task_id": task_id,
            "outcome": verdict.outcome.value,
            "tests_passed": verdict.tests_passed,
            "tests_total": verdict.tests_total,
            "hidden_passed": verdict.hidden_passed,
            "hidden_total": verdict.hidden_total,
            "cpu_s": round(verdict.cpu_s, 4),
            "wall_s": round(verdict.wall_s, 4),
            "detail": verdict.detail,
        }
    )


def check_output(out_path: Path, samples_path: Path) -> None:
    """Raises RunError if the verdicts could not be written to `out_path`, or if that would overwrite the samples."""
    if out_path.is_dir() or not out_path.parent.is_dir() or not os.access(out_path.parent, os.W_OK):
        raise RunError(f"{out_path} cannot be written: name a file in a folder that exists")
    if out_path.exists() and samples_path.exists() and out_path.samefile(samples_path):
        raise RunError(f"{out_path} is the samples file: name another file for the verdicts")
