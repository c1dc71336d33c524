"""The draw follows the chance of a group with both outcomes, and nothing else."""

from collections import Counter

import pytest
from scipy.stats import betabinom

from greenloop.curriculum import Experience, fitted_prior, live_chance, outcome_counts
from greenloop.deck import Deck
from greenloop.types import Outcome, Task, Verdict

TASKS = tuple(Task(task_id=name, statement="", entry_point="f", tests=("assert f()",)) for name in "abcd")


def verdict(outcome: Outcome) -> Verdict:
    return Verdict(
        outcome=outcome, tests_passed=0, tests_total=1, hidden_passed=0, hidden_total=0, ran=True, cpu_s=0, wall_s=0
    )


@pytest.mark.parametrize(("passed", "failed", "samples"), [(0, 0, 2), (3, 1, 4), (0, 7.5, 8), (12, 0.5, 6)])
def test_the_chance_of_a_live_group_is_that_of_the_beta_binomial(passed: float, failed: float, samples: int):
    law = betabinom(samples, 0.3 + passed, 1.1 + failed)
    assert live_chance(passed, failed, samples, (0.3, 1.1)) == pytest.approx(1 - law.pmf(0) - law.pmf(samples))


def test_the_prior_is_the_likeliest_one_of_the_grid():
    law = betabinom(4, 0.14, 1.86)
    often = [round(4000 * law.pmf(passed)) for passed in range(5)]
    counts = {f"{passed}-{n}": (passed, 4 - passed) for passed in range(5) for n in range(often[passed])}
    a, b = fitted_prior({**counts, "unjudged": (0, 0)})
    assert a / (a + b) == pytest.approx(0.07, abs=0.011)
    assert a + b == pytest.approx(2, rel=0.2)


def test_one_sample_a_task_leaves_the_strength_of_the_prior_at_one():
    counts = {str(n): (int(n < 8), int(n >= 8)) for n in range(374)}
    a, b = fitted_prior(counts)
    assert (a / (a + b), a + b) == pytest.approx((0.02, 1.0))


def test_small_weights_are_still_drawn_in_proportion():
    deck = Deck(TASKS, seed=1)
    drawn = Counter(deck.favour(step, 1, dict.fromkeys("abcd", 1e-5))[0].task_id for step in range(2000))
    assert min(drawn[name] for name in "abcd") > 400


def test_on_a_hard_set_a_task_that_never_passed_is_drawn_less_often():
    never = {f"never-{n}": (0, 4) for n in range(40)}
    hard = Experience.of_probe({**never, "mixed": (1, 3)}).weights(8)
    easy = Experience.of_probe({**never, **{f"mixed-{n}": (2, 2) for n in range(40)}}).weights(8)
    assert hard["never-0"] < 0.5 * easy["never-0"]
    assert all(weight > 0 for weight in Experience.of_probe(never).weights(8).values())


def test_unjudged_completions_count_for_nothing():
    outcomes = [Outcome.PASSED, Outcome.HARNESS, Outcome.TIMEOUT, Outcome.NO_CODE]
    counts = outcome_counts([("a", verdict(outcome)) for outcome in outcomes] + [("b", verdict(Outcome.HARNESS))])
    assert counts == {"a": (1, 2), "b": (0, 0)}


def test_a_task_is_drawn_as_often_as_its_weight_says():
    deck = Deck(TASKS, seed=1)
    weights = {"a": 0.6, "b": 0.2, "c": 0.1, "d": 0.1}
    drawn = Counter(deck.favour(step, 1, weights)[0].task_id for step in range(4000))
    for task_id, weight in weights.items():
        assert drawn[task_id] / 4000 == pytest.approx(weight, abs=0.03)


def test_a_step_draws_different_tasks_and_the_same_ones_again():
    deck = Deck(TASKS, seed=1)
    weights = dict.fromkeys("abcd", 0.5)
    for step in range(20):
        tasks = deck.favour(step, 3, weights)
        assert len({task.task_id for task in tasks}) == 3
        assert tasks == deck.favour(step, 3, weights)
    assert [deck.favour(step, 3, weights) for step in range(9)] != [
        deck.favour(step + 1, 3, weights) for step in range(9)
    ]


def test_replacements_follow_the_weights_and_leave_out_what_is_taken():
    deck = Deck(TASKS, seed=1)
    weights = {"a": 0.9, "b": 0.8, "c": 0.1, "d": 0.1}
    drawn = Counter(deck.extra(step, 1, TASKS[:1], weights)[0].task_id for step in range(3000))
    assert set(drawn) == {"b", "c", "d"}
    assert drawn["b"] / 3000 == pytest.approx(0.8, abs=0.03)


def test_experience_prefers_what_is_mixed_and_lets_go_of_what_is_learned():
    experience = Experience({"mixed": (2, 2), "hopeless": (0, 4)}, prior=(0.2, 0.8))
    first = experience.weights(8)
    assert first["mixed"] > 4 * first["hopeless"]
    for _ in range(3):
        experience = experience.after({"mixed": (8, 0)})
    assert experience.weights(8)["mixed"] < 0.5 * first["mixed"]
    assert experience.weights(8)["hopeless"] == first["hopeless"]


def test_focus_draws_the_hopeless_less_often():
    experience = Experience({"mixed": (2, 2), "hopeless": (0, 4)}, prior=(0.2, 0.8))
    plain, focused = experience.weights(8), experience.weights(8, focus=3)
    assert focused["mixed"] / focused["hopeless"] == pytest.approx((plain["mixed"] / plain["hopeless"]) ** 3)
