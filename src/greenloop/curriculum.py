"""Which tasks are worth a group of K: those whose completions can be expected to differ.

RLOO learns nothing from a group whose outcomes are all equal, and for a small model most tasks are all-fail. A probe
before the first step samples every task a few times; from then on each step's outcomes keep the picture current. A
task's chance of passing has a Beta posterior, and its weight in the draw is the probability that a group of K has both
outcomes. Everything is counted on raw outcomes, never on shaped rewards. Knows no model and no order: the same
experience gives the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from greenloop.types import Outcome, Verdict

Counts = Mapping[str, tuple[float, float]]
"""Task id to (passed, failed)."""

_PRIOR = (0.2, 0.8)
_MEMORY = 0.5


def live_chance(passed: float, failed: float, samples: int) -> float:
    """Probability that `samples` new completions have both outcomes, under a Beta(0.2 + passed, 0.8 + failed) rate.

    1 - E[p^K] - E[(1 - p)^K], by the Beta function's recurrence. The prior says that most tasks are either out of reach
    or safe.

    >>> round(live_chance(2, 2, 8), 2), round(live_chance(0, 4, 8), 2), round(live_chance(0, 40, 8), 2)
    (0.91, 0.19, 0.04)
    """
    a, b = _PRIOR[0] + passed, _PRIOR[1] + failed
    all_pass = math.prod((a + i) / (a + b + i) for i in range(samples))
    all_fail = math.prod((b + i) / (a + b + i) for i in range(samples))
    return 1 - all_pass - all_fail


def outcome_counts(verdicts: Iterable[tuple[str, Verdict]]) -> dict[str, tuple[int, int]]:
    """(passed, failed) of each task's judged completions, from (task id, verdict) pairs."""
    counts: dict[str, tuple[int, int]] = {}
    for task_id, verdict in verdicts:
        passed, failed = counts.get(task_id, (0, 0))
        judged = verdict.outcome is not Outcome.HARNESS
        right = verdict.outcome is Outcome.PASSED
        counts[task_id] = (passed + right, failed + (judged and not right))
    return counts


@dataclass(frozen=True, slots=True)
class Experience:
    """What the policy did on each task, the older the less it counts."""

    counts: Counts

    def after(self, new: Counts) -> Experience:
        """With new outcomes; what was known of those tasks counts half from now on, since the policy changes.

        >>> Experience({"a": (2, 2), "b": (0, 4)}).after({"a": (8, 0)}).counts
        {'a': (9.0, 1.0), 'b': (0, 4)}
        """
        counts = dict(self.counts)
        for task_id, (passed, failed) in new.items():
            old = counts.get(task_id, (0, 0))
            counts[task_id] = (_MEMORY * old[0] + passed, _MEMORY * old[1] + failed)
        return Experience(counts)

    def weights(self, samples: int) -> dict[str, float]:
        """Each task's chance of a live group of `samples`."""
        return {task_id: live_chance(*counts, samples) for task_id, counts in self.counts.items()}


def probe_line(counts: Counts, samples: int) -> str:
    """What a probe found, for people.

    >>> probe_line({"a": (0, 4), "b": (2, 2), "c": (4, 0), "d": (0, 4)}, 8)
    'probe: 4 tasks, 37.5 % pass; 1 mixed, 2 never, 1 always; a uniform draw of 8 samples has 0.46 live groups in 1'
    """
    total = sum(passed + failed for passed, failed in counts.values())
    passes = sum(passed for passed, _ in counts.values())
    mixed = sum(bool(passed) and bool(failed) for passed, failed in counts.values())
    never = sum(not passed for passed, _ in counts.values())
    live = sum(live_chance(*both, samples) for both in counts.values()) / max(len(counts), 1)
    share = 100 * passes / total if total else 0.0
    return (
        f"probe: {len(counts)} tasks, {share:.1f} % pass; {mixed} mixed, {never} never, "
        f"{len(counts) - mixed - never} always; a uniform draw of {samples} samples has {live:.2f} live groups in 1"
    )
