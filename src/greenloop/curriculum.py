"""Which tasks are worth a group of K: those whose completions can be expected to differ.

RLOO learns nothing from a group whose outcomes are all equal, and for a small model most tasks are all-fail. A probe
before the first step samples every task a few times; from then on each step's outcomes keep the picture current. A
task's chance of passing has a Beta posterior, whose prior is fitted to the whole probe (on a hard set a task that never
passed is further out of reach than on an easy one), and its weight in the draw is the probability that a group of K has
both outcomes. Everything is counted on raw outcomes, never on shaped rewards. Knows no model and no order: the same
experience gives the same weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from greenloop.types import Outcome, Verdict

Counts = Mapping[str, tuple[float, float]]
"""Task id to (passed, failed)."""

Prior = tuple[float, float]
"""The two parameters of a Beta distribution of pass rates."""

_MEANS = [mean / 100 for mean in range(1, 100)]
_STRENGTHS = [2 ** (quarter / 4) for quarter in range(-12, 17)]
_MEMORY = 0.5


def fitted_prior(counts: Counts) -> Prior:
    """The Beta distribution of pass rates under which the counts are likeliest (empirical Bayes).

    Maximum of the beta-binomial likelihood over a grid: means in steps of 0.01, a + b from 1/8 to 16. Tasks on which
    nothing was judged say nothing.

    >>> fitted_prior({str(n): (2, 2) for n in range(9)}), fitted_prior({})
    ((8.0, 8.0), (0.2, 0.8))
    """
    pairs = Counter((passed, failed) for passed, failed in counts.values() if passed + failed)
    if not pairs:
        return (0.2, 0.8)

    def likelihood(prior: Prior) -> float:
        a, b = prior
        return sum(
            count * (_log_beta(a + passed, b + failed) - _log_beta(a, b)) for (passed, failed), count in pairs.items()
        )

    # One sample a task says nothing of the strength: ties go to a + b = 1.
    grid = [(mean * total, (1 - mean) * total) for total in sorted(_STRENGTHS, key=_doublings) for mean in _MEANS]
    return max(grid, key=lambda prior: round(likelihood(prior), 9))


def _doublings(total: float) -> float:
    return abs(math.log2(total))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def live_chance(passed: float, failed: float, samples: int, prior: Prior) -> float:
    """Probability that `samples` new completions have both outcomes, when the pass rate has this prior.

    1 - E[p^K] - E[(1 - p)^K] under Beta(a + passed, b + failed), by the Beta function's recurrence.

    >>> [round(live_chance(*counts, 8, (0.2, 0.8)), 2) for counts in [(2, 2), (0, 4), (0, 40)]]
    [0.91, 0.19, 0.04]
    """
    a, b = prior[0] + passed, prior[1] + failed
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
    prior: Prior

    @classmethod
    def of_probe(cls, counts: Counts) -> Experience:
        """What a probe found."""
        return cls(counts, fitted_prior(counts))

    def after(self, new: Counts) -> Experience:
        """With new outcomes; what was known of those tasks counts half from now on, since the policy changes.

        >>> Experience.of_probe({"a": (2, 2), "b": (0, 4)}).after({"a": (8, 0)}).counts
        {'a': (9.0, 1.0), 'b': (0, 4)}
        """
        counts = dict(self.counts)
        for task_id, (passed, failed) in new.items():
            old = counts.get(task_id, (0, 0))
            counts[task_id] = (_MEMORY * old[0] + passed, _MEMORY * old[1] + failed)
        return replace(self, counts=counts)

    def weights(self, samples: int, focus: float = 1.0) -> dict[str, float]:
        """Each task's chance of a live group of `samples`, to the power of `focus`."""
        return {task_id: live_chance(*counts, samples, self.prior) ** focus for task_id, counts in self.counts.items()}


def probe_line(probed: Experience, samples: int) -> str:
    """What a probe found, for people.

    >>> probe_line(Experience.of_probe({"a": (0, 4), "b": (2, 2), "c": (4, 0), "d": (0, 4)}), 8)
    'probe: 4 tasks, 37.5 % pass; 1 mixed, 2 never, 1 always; drawn uniformly, 37 % of groups of 8 would be live'
    """
    counts = probed.counts
    total = sum(passed + failed for passed, failed in counts.values())
    passes = sum(passed for passed, _ in counts.values())
    mixed = sum(bool(passed) and bool(failed) for passed, failed in counts.values())
    never = sum(not passed for passed, _ in counts.values())
    live = 100 * sum(probed.weights(samples).values()) / max(len(counts), 1)
    share = 100 * passes / total if total else 0.0
    return (
        f"probe: {len(counts)} tasks, {share:.1f} % pass; {mixed} mixed, {never} never, "
        f"{len(counts) - mixed - never} always; drawn uniformly, {live:.0f} % of groups of {samples} would be live"
    )
