"""One journal record a step: what was sampled, what it earned, what was learned, how long it took."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from greenloop.curriculum import outcome_counts
from greenloop.gauges import gauge_record
from greenloop.learn.improve import Update
from greenloop.rewards import is_dead
from greenloop.tree import size
from greenloop.types import Finish, Group, Outcome, Verdict


class Clock:
    """Seconds by stage of one step."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> float:
        """Book the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now
        return self.seconds[stage]

    def total(self) -> float:
        """Seconds since the clock started."""
        return time.perf_counter() - self.started


def rollout_record(
    drawn: Sequence[Group], extra: Sequence[Group], rewards: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """The part of the record that the rollouts decide. Rates are over judged completions, 0..1.

    Args:
        drawn: the step's P groups; pass rate, rewards and dead groups are theirs alone.
        extra: groups sampled to replace dead ones; they count for outcomes and tokens.
        rewards: [P][K] of `drawn`, NaN where unjudged.
    """
    verdicts = [verdict for group in drawn for verdict in group.verdicts]
    judged = [verdict for verdict in verdicts if verdict.outcome is not Outcome.HARNESS]
    known = [reward for row in rewards for reward in row if not math.isnan(reward)]
    everything = [*drawn, *extra]
    completions = [completion for group in everything for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    counts = Counter(verdict.outcome for group in everything for verdict in group.verdicts)
    return {
        "tasks": [group.prompt.task.task_id for group in drawn],
        "task_outcomes": outcome_counts((g.prompt.task.task_id, v) for g in everything for v in g.verdicts),
        "pass_rate": rate([verdict.outcome is Outcome.PASSED for verdict in judged]),
        "reward": fmean(known) if known else None,
        "outcomes": {outcome.value: counts[outcome] for outcome in Outcome if counts[outcome]},
        "ran": rate([verdict.ran for verdict in judged]),
        "well_formed": rate([formed for group in drawn for formed in group.well_formed]),
        "shown_hidden_gap": _gap(judged),
        **gauge_record(everything),
        "dead_groups": sum(map(is_dead, drawn)),
        "truncated": rate([completion.finish is Finish.LENGTH for completion in completions]),
        "tokens": sum(lengths),
        "prompt_tokens": sum(len(group.prompt.token_ids) for group in everything),
        "distinct_mean": fmean(size([one.token_ids for one in group.completions]) for group in everything),
        "length_mean": fmean(lengths),
        "length_max": max(lengths),
    }


def update_record(update: Update) -> dict[str, Any]:
    """The part of the record that the update decides."""
    return {
        "loss": number(update.loss),
        "kl": number(update.kl_nats),
        "entropy": number(update.entropy_nats),
        "clipped_fraction": update.clipped_fraction,
        "sampler_trainer_gap": number(update.gap_nats),
        "sampler_trainer_gap_worst": number(update.gap_nats_worst),
        "grad_norm": update.grad_norm,
        "trained_tokens": update.trained_tokens,
        "optimizer_steps": update.optimizer_steps,
    }


def _gap(judged: Sequence[Verdict]) -> float | None:
    """Share that passes all shown tests less the share that passes all; None where nothing is shown or hidden."""
    both = [verdict for verdict in judged if verdict.shown_total and verdict.hidden_total]
    shown = rate([verdict.shown_passed == verdict.shown_total for verdict in both])
    passed = rate([verdict.outcome is Outcome.PASSED for verdict in both])
    return None if shown is None or passed is None else shown - passed


def rate(flags: Sequence[bool]) -> float | None:
    """Share of true ones; None of nothing."""
    return sum(flags) / len(flags) if flags else None


def number(value: float) -> float | None:
    """JSON has no NaN: what was not measured is null."""
    return value if math.isfinite(value) else None
