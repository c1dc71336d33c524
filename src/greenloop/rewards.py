"""Verdicts to rewards: facts to an opinion about them. No torch, no KL, no baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

from greenloop.recipe import RewardSection
from greenloop.types import Group, Outcome, Verdict


def reward_of(verdict: Verdict, well_formed: bool, parts: RewardSection) -> float:
    """Weighted sum of the parts, clipped; NaN if the program could not be judged.

    >>> from greenloop.types import Outcome, Verdict
    >>> half = Verdict(outcome=Outcome.FAILED, tests_passed=2, tests_total=4, hidden_passed=0, hidden_total=1,
    ...                ran=True, cpu_s=0, wall_s=0)
    >>> reward_of(half, True, RewardSection(passed=1, fraction=0.5, ran=0.25, well_formed=0.125))
    0.625
    """
    if verdict.outcome is Outcome.HARNESS:
        return math.nan
    fraction = verdict.tests_passed / verdict.tests_total if verdict.tests_total else 0.0
    reward = (
        parts.passed * (verdict.outcome is Outcome.PASSED)
        + parts.fraction * fraction
        + parts.ran * verdict.ran
        + parts.well_formed * well_formed
    )
    return reward if parts.clip is None else min(max(reward, parts.clip[0]), parts.clip[1])


def reward_matrix(groups: Sequence[Group], parts: RewardSection) -> list[list[float]]:
    """[P][K] task rewards; NaN marks a completion that could not be judged."""
    return [
        [reward_of(v, formed, parts) for v, formed in zip(group.verdicts, group.well_formed, strict=True)]
        for group in groups
    ]


def outcome_matrix(groups: Sequence[Group]) -> list[list[float]]:
    """[P][K] raw outcomes: 1 passed, 0 not, NaN unjudged. Dead groups and the pass rate are counted on these."""
    return [[_raw(verdict) for verdict in group.verdicts] for group in groups]


def is_dead(group: Group) -> bool:
    """Every judged completion had the same raw outcome (shaped rewards do not count)."""
    return len({raw for raw in map(_raw, group.verdicts) if not math.isnan(raw)}) <= 1


def _raw(verdict: Verdict) -> float:
    return math.nan if verdict.outcome is Outcome.HARNESS else float(verdict.outcome is Outcome.PASSED)
