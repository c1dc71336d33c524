"""Ratios of sums over tasks, such as the pass rate among answers that ran.

In: two counts a task (how many passed, of how many that ran). Out: the ratio of their sums with a 95 % interval, and
the paired difference of two such ratios. The unit is the task, as in `statistics`: tasks are resampled whole.

Intervals are percentile intervals; where every resample gives the same ratio (all passed, or none) the interval has the
width that Wilson's has for none, or all, of as many tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from greenloop.seeding import seed_for
from greenloop.statistics import CONFIDENCE, DRAWS, Estimate, wilson_interval

Array = npt.NDArray[Any]

_TIE = 1e-12


@dataclass(frozen=True, slots=True)
class Share:
    """Some of a number of answers to one task."""

    part: int
    whole: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioDifference:
    """The second ratio minus the first over the same tasks."""

    first: float
    second: float
    difference: float
    low: float
    high: float
    """The 95 % interval's ends."""
    p_value: float
    """Two-sided, for no difference: swap permutation over tasks, never 0."""
    tasks: int


def ratio_estimate(shares: Sequence[Share], *, seed: int, draws: int = DRAWS) -> Estimate | None:
    """Sum of parts over sum of wholes with its interval over tasks; None where the wholes sum to 0.

    >>> ratio_estimate([Share(0, 0)], seed=0) is None, ratio_estimate([Share(1, 4), Share(2, 2)], seed=0).value
    (True, 0.5)
    """
    counts = _columns(shares)
    value = float(_ratio(counts.sum(axis=0)))
    if np.isnan(value):
        return None
    low, high = _percentiles(_ratio(_resampled(counts, seed, draws)))
    if high - low < _TIE:
        margin = wilson_interval(0, int((counts[:, 1] > 0).sum())).high
        low, high = max(0.0, value - margin), min(1.0, value + margin)
    return Estimate(value, low, high)


def compare_ratios(
    first: Mapping[str, Share], second: Mapping[str, Share], *, seed: int, draws: int = DRAWS
) -> RatioDifference | None:
    """Two sets of shares by task id, over the tasks that are in both; None where either ratio is undefined.

    Under no difference each task's two shares may as well have come the other way round, so the p-value counts the
    swaps whose |difference| is at least the observed one.
    """
    tasks = sorted(first.keys() & second.keys())
    one, two = _columns([first[task] for task in tasks]), _columns([second[task] for task in tasks])
    values = _ratio(one.sum(axis=0)), _ratio(two.sum(axis=0))
    if np.isnan(values).any():
        return None
    difference = float(values[1] - values[0])
    # Both sides are resampled with the same tasks.
    spread = _ratio(_resampled(two, seed, draws)) - _ratio(_resampled(one, seed, draws))
    low, high = _percentiles(spread)
    if high - low < _TIE:
        margin = wilson_interval(0, int(((one[:, 1] > 0) | (two[:, 1] > 0)).sum())).high
        low, high = max(-1.0, difference - margin), min(1.0, difference + margin)
    return RatioDifference(
        first=float(values[0]),
        second=float(values[1]),
        difference=difference,
        low=low,
        high=high,
        p_value=_swap_p_value(one, two, difference, seed=seed, draws=draws),
        tasks=len(tasks),
    )


def _columns(shares: Sequence[Share]) -> Array:
    """[N, 2] float: parts and wholes."""
    return np.array([(share.part, share.whole) for share in shares], dtype=np.float64).reshape(-1, 2)


def _ratio(sums: Array) -> Array:
    """[..., 2] to [...]: part / whole, NaN where the whole is 0."""
    whole = sums[..., 1]
    return np.where(whole > 0, sums[..., 0] / np.maximum(whole, 1), np.nan)


def _resampled(counts: Array, seed: int, draws: int) -> Array:
    """[draws, 2] sums over tasks drawn with replacement; the same tasks for the same seed and number of tasks."""
    tasks = len(counts)
    random = np.random.Generator(np.random.Philox(key=seed_for(seed, "ratio bootstrap")))
    times = random.multinomial(tasks, np.full(tasks, 1 / tasks), size=draws)
    sums: Array = times @ counts
    return sums


def _percentiles(values: Array) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _swap_p_value(one: Array, two: Array, difference: float, *, seed: int, draws: int) -> float:
    random = np.random.Generator(np.random.Philox(key=seed_for(seed, "ratio swap")))
    swap = random.integers(0, 2, size=(draws, len(one))).astype(np.float64)
    moved = swap @ (two - one)
    swapped = _ratio(two.sum(axis=0) - moved) - _ratio(one.sum(axis=0) + moved)
    # A swap that leaves one side without answers says nothing: counted against a difference.
    extreme = int((~(np.abs(swapped) < abs(difference) - _TIE)).sum())
    return (1 + extreme) / (1 + draws)
