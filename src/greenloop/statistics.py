"""What a score says about a model, and how sure one can be.

In: how many samples of each task passed. Out: pass@k, 95 % intervals, paired comparisons. Standard library only.

The unit is the task. The samples of one task share its difficulty, so intervals and tests resample tasks and never
samples; the rates of tasks already contain the noise of sampling within a task. The claim is about tasks like these,
not about this list of tasks alone.

Intervals of means are bias-corrected and accelerated bootstrap intervals (BCa, Efron 1987). Pass rates of small
models are heaps of zeros with a tail; there the normal interval, which is symmetric, ends too low
(`tests/test_statistics.py` counts how often). Where all tasks have the same rate a bootstrap sees no spread at all:
the interval then is as wide as Wilson's for none, or all, of as many tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from statistics import NormalDist, fmean

from greenloop.errors import ConfigError, RunError
from greenloop.seeding import seed_for

CONFIDENCE = 0.95
DRAWS = 10_000
"""Bootstrap resamples of an interval, and sign flips of a permutation test."""

_NORMAL = NormalDist()
_TIE = 1e-12


@dataclass(frozen=True, slots=True)
class Interval:
    """From low to high, both included."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PassCount:
    """How one task went."""

    passed: int
    """Samples that passed all tests."""
    samples: int
    """Samples that were judged."""

    @property
    def rate(self) -> float:
        """0..1."""
        return self.passed / self.samples


class PairedTest(Enum):
    """How a p-value was computed."""

    MCNEMAR = "exact McNemar"
    SIGN_FLIP = "sign-flip permutation"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """The second result minus the first over the same tasks."""

    difference: float
    """Of the means, -1..1."""
    low: float
    high: float
    """The 95 % interval's ends."""
    p_value: float
    """Two-sided, for no difference."""
    test: PairedTest
    tasks: int
    better: int
    """Tasks on which the second is ahead."""
    worse: int
    """Tasks on which the first is ahead."""


def pass_at_k(count: PassCount, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement from those of one task, passed.

    pass@k = 1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, equation 1).

    Raises:
        ConfigError: fewer than k samples, or k below 1.

    >>> pass_at_k(PassCount(passed=1, samples=4), 1), pass_at_k(PassCount(passed=1, samples=4), 2)
    (0.25, 0.5)
    """
    if not 1 <= k <= count.samples:
        raise ConfigError(
            f"k: pass@{k} needs k of at least 1 and at least {k} judged samples a task, got {count.samples}"
        )
    return 1 - math.comb(count.samples - count.passed, k) / math.comb(count.samples, k)


def mean_pass_at_k(counts: Iterable[PassCount], k: int, *, seed: int, draws: int = DRAWS) -> Estimate:
    """pass@k averaged over tasks, with its interval over tasks.

    Raises:
        ConfigError: a task has fewer than k samples.
        RunError: no task at all.
    """
    return mean_estimate([pass_at_k(count, k) for count in counts], seed=seed, draws=draws)


def mean_estimate(rates: Sequence[float], *, seed: int, draws: int = DRAWS) -> Estimate:
    """The mean of per-task rates in 0..1 with its BCa interval.

    Raises:
        RunError: no rate at all.
    """
    _require_tasks(len(rates))
    interval = bootstrap_interval(rates, within=Interval(0, 1), seed=seed, draws=draws)
    return Estimate(fmean(rates), interval.low, interval.high)


def greedy_estimate(passed: int, tasks: int) -> Estimate:
    """The fraction of tasks solved by one greedy answer each, with Wilson's interval.

    Raises:
        RunError: no task at all.
    """
    _require_tasks(tasks)
    interval = wilson_interval(passed, tasks)
    return Estimate(passed / tasks, interval.low, interval.high)


def wilson_interval(passed: int, tasks: int) -> Interval:
    """Wilson's score interval of a fraction (1927), without continuity correction.

    >>> interval = wilson_interval(0, 10)
    >>> interval.low, round(interval.high, 4)
    (0.0, 0.2775)
    """
    z2 = _NORMAL.inv_cdf((1 + CONFIDENCE) / 2) ** 2
    fraction = passed / tasks
    centre = (fraction + z2 / (2 * tasks)) / (1 + z2 / tasks)
    half = math.sqrt(z2 * (fraction * (1 - fraction) / tasks + z2 / (4 * tasks * tasks))) / (1 + z2 / tasks)
    return Interval(0.0 if passed == 0 else centre - half, 1.0 if passed == tasks else centre + half)


def bootstrap_interval(values: Sequence[float], *, within: Interval, seed: int, draws: int = DRAWS) -> Interval:
    """The BCa interval of the mean over tasks of `values`, which lie in `within`.

    Its ends are the resampled means' quantiles Phi(z0 + (z0 + z) / (1 - a (z0 + z))), where z is the normal quantile of
    2.5 % or 97.5 %, z0 that of the share of resampled means below the mean (ties half), a the skewness of the mean / 6.
    """
    if max(values) - min(values) < _TIE:
        margin = wilson_interval(0, len(values)).high
        return Interval(max(within.low, values[0] - margin), min(within.high, values[0] + margin))
    random = Random(seed_for(seed, "bootstrap"))
    means = sorted(math.fsum(random.choices(values, k=len(values))) / len(values) for _ in range(draws))
    bias, acceleration = _bias(means, fmean(values)), _acceleration(values)
    tail = (1 - CONFIDENCE) / 2
    low, high = (_quantile(means, _adjusted(share, bias, acceleration)) for share in (tail, 1 - tail))
    return Interval(low, high)


def _bias(means: Sequence[float], mean: float) -> float:
    below = sum(value < mean - _TIE for value in means)
    ties = sum(abs(value - mean) <= _TIE for value in means)
    share = (below + ties / 2) / len(means)
    return _NORMAL.inv_cdf(min(max(share, 0.5 / len(means)), 1 - 0.5 / len(means)))


def _acceleration(values: Sequence[float]) -> float:
    mean = fmean(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    cubes = math.fsum((value - mean) ** 3 for value in values)
    return cubes / (6 * squares * math.sqrt(squares))


def _adjusted(share: float, bias: float, acceleration: float) -> float:
    shifted = bias + _NORMAL.inv_cdf(share)
    return _NORMAL.cdf(bias + shifted / (1 - acceleration * shifted))


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    index = min(int(position), len(ordered) - 2)
    return ordered[index] + (position - index) * (ordered[index + 1] - ordered[index])


def compare_greedy(
    first: Mapping[str, bool], second: Mapping[str, bool], *, seed: int, draws: int = DRAWS
) -> PairedDifference:
    """Two sets of one greedy answer a task, by task id: bootstrap interval over tasks, exact McNemar test.

    Raises:
        RunError: they are not about the same tasks, or about none.
    """
    differences = _differences(first, second)
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p_value = mcnemar_p_value(better, worse)
    return _paired(differences, p_value, PairedTest.MCNEMAR, seed=seed, draws=draws)


def compare_rates(
    first: Mapping[str, float], second: Mapping[str, float], *, seed: int, draws: int = DRAWS
) -> PairedDifference:
    """Two sets of sampled pass rates in 0..1, by task id: bootstrap interval over tasks, sign-flip permutation test.

    Raises:
        RunError: they are not about the same tasks, or about none.
    """
    differences = _differences(first, second)
    p_value = sign_flip_p_value(differences, seed=seed, draws=draws)
    return _paired(differences, p_value, PairedTest.SIGN_FLIP, seed=seed, draws=draws)


def mcnemar_p_value(better: int, worse: int) -> float:
    """Two-sided exact McNemar test: `better` and `worse` count the tasks that only one of the two solved.

    Under no difference, better ~ Binomial(better + worse, 1/2).

    >>> mcnemar_p_value(5, 0), mcnemar_p_value(3, 3)
    (0.0625, 1.0)
    """
    discordant = better + worse
    tail = sum(math.comb(discordant, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / (1 << discordant))


def sign_flip_p_value(differences: Sequence[float], *, seed: int, draws: int = DRAWS) -> float:
    """Two-sided paired permutation test: under no difference each task's difference may as well have the other sign.

    p = (1 + flips whose |sum| is at least the observed |sum|) / (1 + flips), never 0 (Phipson and Smyth 2010).
    """
    moved = [d for d in differences if abs(d) > _TIE]
    observed = abs(math.fsum(moved)) - _TIE * (1 + len(moved))
    tables = [_signed_sums(moved[i : i + 8]) for i in range(0, len(moved), 8)]
    random = Random(seed_for(seed, "sign-flip"))
    flips = (random.randbytes(len(tables)) for _ in range(draws))
    extreme = sum(
        abs(sum(table[signs] for table, signs in zip(tables, flip, strict=True))) >= observed for flip in flips
    )
    return (1 + extreme) / (1 + draws)


def _signed_sums(differences: Sequence[float]) -> list[float]:
    """The sum of up to eight differences for each byte of signs; bits beyond their number do nothing."""
    return [math.fsum(-d if signs >> bit & 1 else d for bit, d in enumerate(differences)) for signs in range(256)]


def _paired(
    differences: Sequence[float], p_value: float, test: PairedTest, *, seed: int, draws: int
) -> PairedDifference:
    interval = bootstrap_interval(differences, within=Interval(-1, 1), seed=seed, draws=draws)
    return PairedDifference(
        difference=fmean(differences),
        low=interval.low,
        high=interval.high,
        p_value=p_value,
        test=test,
        tasks=len(differences),
        better=sum(d > _TIE for d in differences),
        worse=sum(d < -_TIE for d in differences),
    )


def _differences(first: Mapping[str, float], second: Mapping[str, float]) -> list[float]:
    """Second minus first, in an order that does not depend on the mappings'."""
    _require_tasks(len(first))
    if alone := sorted(first.keys() ^ second.keys()):
        some = ", ".join(alone[:3])
        raise RunError(f"the two results are not about the same tasks: {len(alone)} are in one only, such as {some}")
    return [float(second[task]) - float(first[task]) for task in sorted(first)]


def _require_tasks(count: int) -> None:
    if count == 0:
        raise RunError("there is no judged task to compute a score from")
