"""The run folder: where a run's files lie, and how they are written.

    recipe.toml  environment.json  probe.json  journal.jsonl  rollouts/step-00000.parquet  checkpoints/step-00005/
    adapter/  adapter-best/  evaluation/{before,after}/  results.json

Every file but the journal appears whole or not at all. Knows no torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenloop.errors import RunError
from greenloop.files import write_atomically
from greenloop.types import Group

_CHECKPOINT = re.compile(r"step-\d+")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.toml"

    @property
    def environment(self) -> Path:
        """Versions and hashes."""
        return self.root / "environment.json"

    @property
    def journal(self) -> Path:
        """One JSON object a step."""
        return self.root / "journal.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Saved states."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The last adapter, in PEFT's format."""
        return self.root / "adapter"

    @property
    def best_adapter(self) -> Path:
        """The adapter with the best validation score."""
        return self.root / "adapter-best"

    @property
    def results(self) -> Path:
        """Before, after and their difference."""
        return self.root / "results.json"

    @property
    def probe(self) -> Path:
        """Task id to [passed, failed] before the first step."""
        return self.root / "probe.json"

    def evaluation(self, when: str) -> Path:
        """Folder of one evaluation: `before` or `after`."""
        return self.root / "evaluation" / when

    def create(self) -> None:
        """Make the folder.

        Raises:
            RunError: there is a run in it already, or it cannot be made.
        """
        if self.newest_checkpoint() is not None:
            raise RunError(f"{self.root}: holds a run already; continue it with --resume, or give another --out")
        try:
            (self.root / "rollouts").mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.root}: cannot be written ({error.strerror}); give another --out") from None

    def newest_checkpoint(self) -> Path | None:
        """The last complete checkpoint, or None."""
        complete = complete_checkpoints(self.checkpoints)
        return complete[-1] if complete else None

    def truncate_journal(self, steps: int) -> None:
        """Drop the records of steps from `steps` on, and a torn last line: a resumed run writes them again."""
        kept = [record for record in read_journal(self.journal) if record["step"] < steps]
        write_atomically(self.journal, "".join(json.dumps(record) + "\n" for record in kept))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a step to the journal."""
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_rollouts(
        self,
        step: int,
        groups: Sequence[Group],
        rewards: Sequence[Sequence[float]],
        advantages: Sequence[Sequence[float]],
    ) -> None:
        """The step's prompts, completions, verdicts, rewards and advantages as Parquet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            _rollout_row(step, group, k, rewards[p][k], advantages[p][k])
            for p, group in enumerate(groups)
            for k in range(len(group.completions))
        ]
        path = self.root / "rollouts" / f"step-{step:05d}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(pa.Table.from_pylist(rows), partial)
        os.replace(partial, path)


def _rollout_row(step: int, group: Group, k: int, reward: float, advantage: float) -> dict[str, Any]:
    completion, verdict, task = group.completions[k], group.verdicts[k], group.prompt.task
    return {
        "step": step,
        "task_id": task.task_id,
        "sample": completion.sample,
        "prompt": group.prompt.text,
        "completion": completion.text,
        "program": group.programs[k],
        "finish": completion.finish.value,
        "tokens": len(completion.token_ids),
        "outcome": verdict.outcome.value,
        "tests_passed": verdict.tests_passed,
        "tests_total": verdict.tests_total,
        "hidden_passed": verdict.hidden_passed,
        "hidden_total": verdict.hidden_total,
        "ran": verdict.ran,
        "detail": verdict.detail,
        "well_formed": group.well_formed[k],
        "reward": reward,
        "advantage": advantage,
    }


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a journal; a torn last line (a killed run) is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise RunError(f"{path}:{number}: not a JSON object; the journal was changed by hand") from None
    return records


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all; one that is there already is replaced."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    if path.exists():
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old)
    else:
        os.replace(partial, path)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in the order of their steps; what a killed run left half written is not among them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name))


def keep_last(folder: Path, count: int) -> None:
    """Remove all but the last `count` checkpoints."""
    for old in complete_checkpoints(folder)[:-count]:
        shutil.rmtree(old)
