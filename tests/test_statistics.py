from __future__ import annotations

import itertools
import subprocess
import sys
from random import Random
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenloop.errors import ConfigError, RunError
from greenloop.statistics import (
    Estimate,
    Interval,
    PairedTest,
    PassCount,
    bootstrap_interval,
    compare_greedy,
    compare_rates,
    greedy_estimate,
    mcnemar_p_value,
    mean_estimate,
    mean_pass_at_k,
    pass_at_k,
    sign_flip_p_value,
    wilson_interval,
)

UNIT = Interval(0, 1)


@pytest.mark.parametrize(
    ("passed", "samples", "k", "expected"),
    [
        (2, 5, 1, 0.4),
        (2, 5, 2, 0.7),
        (2, 5, 3, 0.9),
        (2, 5, 4, 1.0),
        (0, 5, 5, 0.0),
        (5, 5, 1, 1.0),
        (1, 200, 100, 0.5),
    ],
)
def test_pass_at_k_gives_the_numbers_worked_out_by_hand(passed, samples, k, expected):
    assert pass_at_k(PassCount(passed, samples), k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_a_pass():
    for samples, k in itertools.product(range(1, 7), range(1, 7)):
        for passed in range(samples + 1) if k <= samples else ():
            draws = list(itertools.combinations([1] * passed + [0] * (samples - passed), k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(PassCount(passed, samples), k) == pytest.approx(share)


def test_mean_pass_at_k_averages_tasks_and_not_samples():
    counts = [PassCount(2, 5), PassCount(0, 2), PassCount(10, 10)]
    assert mean_pass_at_k(counts, 2, seed=0, draws=200).value == pytest.approx((0.7 + 0 + 1) / 3)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_more_samples_than_there_are_cannot_be_asked_for(k):
    with pytest.raises(ConfigError, match=rf"pass@{k} needs k of at least 1 and at least {k} judged samples .*got 4"):
        pass_at_k(PassCount(1, 4), k)


def test_wilson_gives_the_interval_worked_out_by_hand():
    # z² = 3.8415; 8 of 10: centre (0.8 + 0.19207) / 1.38415, half sqrt(3.8415 (0.016 + 0.0096037)) / 1.38415
    interval = wilson_interval(8, 10)
    assert (interval.low, interval.high) == (pytest.approx(0.49016, abs=1e-5), pytest.approx(0.94332, abs=1e-5))
    assert greedy_estimate(8, 10) == Estimate(0.8, interval.low, interval.high)


@pytest.mark.parametrize(("passed", "tasks"), [(0, 1), (0, 500), (31, 500), (1, 3), (99, 100), (100, 100)])
def test_wilson_agrees_with_scipy(passed, tasks):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(passed, tasks).proportion_ci(method="wilson")
    ours = wilson_interval(passed, tasks)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=1e-12), pytest.approx(theirs.high, abs=1e-12))


def test_the_bootstrap_interval_of_skewed_rates_agrees_with_scipys():
    stats = pytest.importorskip("scipy.stats")
    rates = [0.0] * 30 + [0.25] * 6 + [0.5] * 3 + [1.0]
    theirs = stats.bootstrap((rates,), fmean_axis, n_resamples=10_000, method="BCa", rng=0).confidence_interval
    ours = bootstrap_interval(rates, within=UNIT, seed=0)
    assert ours.low == pytest.approx(theirs.low, abs=0.004)
    assert ours.high == pytest.approx(theirs.high, abs=0.004)
    percentile = stats.bootstrap(
        (rates,), fmean_axis, n_resamples=10_000, method="percentile", rng=0
    ).confidence_interval
    assert ours.high - percentile.high > 0.008


def fmean_axis(sample, axis):
    return sample.mean(axis=axis)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    rates = [0.1 * i for i in range(10)]
    assert mean_estimate(rates, seed=3) == mean_estimate(rates, seed=3)
    assert mean_estimate(rates, seed=3, draws=500) != mean_estimate(rates, seed=4, draws=500)


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0.0, 0.2775), (1.0, 0.7225, 1.0), (0.5, 0.2225, 0.7775)])
def test_rates_without_spread_get_wilsons_width_instead_of_none(rate, low, high):
    estimate = mean_estimate([rate] * 10, seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (
        rate,
        pytest.approx(low, abs=1e-4),
        pytest.approx(high, abs=1e-4),
    )


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_an_interval_stays_within_the_rates_range_and_around_their_mean(eighths, seed):
    rates = [count / 8 for count in eighths]
    estimate = mean_estimate(rates, seed=seed, draws=300)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def simulated_rates(random, tasks=60, samples=4):
    """Rates of tasks whose difficulty is Beta(0.1, 1.5) distributed: mostly zeros, mean 1/16."""
    difficulties = (random.betavariate(0.1, 1.5) for _ in range(tasks))
    return [sum(random.random() < p for _ in range(samples)) / samples for p in difficulties]


def test_ninety_five_percent_intervals_hold_the_truth_that_often_and_normal_ones_end_too_low():
    random, trials = Random(7), 300
    held = missed_above = normal_missed_above = 0
    for trial in range(trials):
        rates = simulated_rates(random)
        interval = bootstrap_interval(rates, within=UNIT, seed=trial, draws=400)
        held += interval.low <= 1 / 16 <= interval.high
        missed_above += interval.high < 1 / 16
        normal_missed_above += fmean(rates) + 1.96 * stdev(rates) / len(rates) ** 0.5 < 1 / 16
    assert 0.91 <= held / trials <= 0.985
    assert normal_missed_above > 1.5 * missed_above
    assert normal_missed_above / trials > 0.06


def test_a_paired_difference_is_second_minus_first_whatever_the_order_of_the_tasks():
    first = {"a": 0.25, "b": 0.5, "c": 0.0, "d": 1.0}
    second = {"d": 0.75, "c": 0.5, "b": 0.5, "a": 1.0}
    result = compare_rates(first, second, seed=0, draws=500)
    assert result.difference == pytest.approx((0.75 + 0 + 0.5 - 0.25) / 4)
    assert (result.tasks, result.better, result.worse, result.test) == (4, 2, 1, PairedTest.SIGN_FLIP)
    assert result == compare_rates(dict(reversed(first.items())), second, seed=0, draws=500)
    assert compare_rates(second, first, seed=0, draws=500).p_value == result.p_value


def test_pairing_finds_a_small_gain_that_every_task_shares():
    first = {str(i): (i % 5) / 8 for i in range(40)}
    second = {task: rate + 0.125 for task, rate in first.items()}
    second["0"] = 0.25
    result = compare_rates(first, second, seed=0, draws=1000)
    assert 0.12 < result.low <= result.difference <= result.high < 0.15
    assert result.p_value == pytest.approx(1 / 1001)


def test_identical_results_differ_by_nothing_but_not_with_certainty():
    rates = {str(i): i / 10 for i in range(10)}
    result = compare_rates(rates, rates, seed=0, draws=100)
    assert (result.difference, result.p_value, result.better, result.worse) == (0, 1, 0, 0)
    assert result.low == pytest.approx(-result.high)
    assert result.high == pytest.approx(wilson_interval(0, 10).high)


def test_greedy_results_are_compared_by_mcnemars_exact_test():
    first = {str(i): i < 10 for i in range(40)}
    second = {str(i): 3 <= i < 19 for i in range(40)}
    result = compare_greedy(first, second, seed=0, draws=2000)
    # 9 gained, 3 lost: 2 (C(12,0) + C(12,1) + C(12,2) + C(12,3)) / 2^12 = 598 / 4096
    assert result.p_value == pytest.approx(598 / 4096)
    assert (result.better, result.worse, result.tasks, result.test) == (9, 3, 40, PairedTest.MCNEMAR)
    assert result.difference == pytest.approx(6 / 40)
    assert -0.1 < result.low <= 0 < result.difference < result.high < 0.4


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (0, 6), (4, 4), (5, 4), (20, 9), (700, 500)])
def test_mcnemars_p_value_is_scipys_binomial_test(better, worse):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar_p_value(better, worse) == pytest.approx(theirs, rel=1e-9)


def test_the_sign_flip_test_approaches_the_exact_share_of_all_flips():
    differences = [
        0.25,
        0.25,
        -0.125,
        0.375,
        0.25,
        0.0,
        -0.25,
        0.5,
        0.75,
        0.125,
        0.25,
        0.125,
        -0.5,
        -0.25,
        0.125,
        0.125,
        1.0,
    ]
    signs = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(sign, differences, strict=True))) for sign in signs]
    exact = sum(total >= abs(sum(differences)) for total in sums) / len(sums)
    assert sign_flip_p_value(differences, seed=0) == pytest.approx(exact, abs=0.006)


def test_the_sign_flip_test_agrees_with_scipys_permutation_test():
    stats = pytest.importorskip("scipy.stats")
    random = Random(5)
    differences = [random.gauss(0.3, 1) for _ in range(30)]
    theirs = stats.permutation_test(
        (differences,), fmean_axis, permutation_type="samples", n_resamples=20_000, vectorized=True, rng=0
    )
    assert sign_flip_p_value(differences, seed=0) == pytest.approx(theirs.pvalue, abs=0.015)


def test_the_sign_flip_p_value_counts_the_observed_flip_and_is_never_zero():
    assert sign_flip_p_value([1.0] * 60, seed=0, draws=99) == 1 / 100
    assert sign_flip_p_value([], seed=0, draws=99) == 1
    assert sign_flip_p_value([0.0, 0.0], seed=0, draws=99) == 1
    assert sign_flip_p_value([0.1], seed=0, draws=99) == 1


def test_under_no_difference_small_p_values_are_as_rare_as_they_say():
    random, trials = Random(11), 300
    small = sum(
        sign_flip_p_value([random.gauss(0, 1) for _ in range(20)], seed=trial, draws=200) <= 0.05
        for trial in range(trials)
    )
    assert 0.02 <= small / trials <= 0.085


def test_results_about_different_tasks_cannot_be_compared():
    with pytest.raises(RunError, match="not about the same tasks: 2 are in one only, such as b, c"):
        compare_rates({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 0.0}, seed=0)


@pytest.mark.parametrize(
    "score",
    [
        lambda: mean_estimate([], seed=0),
        lambda: mean_pass_at_k([], 1, seed=0),
        lambda: greedy_estimate(0, 0),
        lambda: compare_greedy({}, {}, seed=0),
    ],
)
def test_a_score_of_no_task_is_refused(score):
    with pytest.raises(RunError, match="no judged task"):
        score()


def test_the_module_needs_neither_numpy_nor_scipy():
    code = "import sys, greenloop.statistics; sys.exit(any(m in sys.modules for m in ('numpy', 'scipy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
