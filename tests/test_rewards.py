"""Rewards, dead groups and the deck."""

import math

import pytest

from greenloop.deck import Deck
from greenloop.recipe import RewardSection
from greenloop.rewards import is_dead, reward_matrix, reward_of
from greenloop.types import Completion, Finish, Group, Outcome, Prompt, Task, Verdict


def verdict(outcome: Outcome, passed: int = 0, ran: bool = True) -> Verdict:
    return Verdict(
        outcome=outcome, tests_passed=passed, tests_total=4, hidden_passed=0, hidden_total=1, ran=ran, cpu_s=0, wall_s=0
    )


def group(*verdicts: Verdict) -> Group:
    task = Task(task_id="t", statement="", entry_point="f", tests=("assert f()",))
    completions = tuple(
        Completion(group=0, sample=k, token_ids=(1,), logprobs=(0.0,), finish=Finish.EOS, text="")
        for k in range(len(verdicts))
    )
    return Group(
        prompt=Prompt(task=task, text="", token_ids=(1,), protocol="train"),
        completions=completions,
        programs=(None,) * len(verdicts),
        verdicts=verdicts,
        well_formed=(True,) * len(verdicts),
    )


PARTS = RewardSection(passed=1.0, fraction=0.5, ran=0.25, well_formed=0.125)


@pytest.mark.parametrize(
    ("judged", "formed", "expected"),
    [
        (verdict(Outcome.PASSED, 4), True, 1.875),
        (verdict(Outcome.FAILED, 2), False, 0.5),
        (verdict(Outcome.ERROR, 0, ran=False), True, 0.125),
        (verdict(Outcome.NO_CODE, 0, ran=False), False, 0.0),
    ],
)
def test_reward_is_the_weighted_sum_of_its_parts(judged: Verdict, formed: bool, expected: float):
    assert reward_of(judged, formed, PARTS) == expected


def test_our_own_failure_is_no_reward_at_all():
    assert math.isnan(reward_of(verdict(Outcome.HARNESS), True, PARTS))


def test_clip_bounds_the_sum():
    clipped = PARTS.model_copy(update={"clip": (0.2, 1.0)})
    assert reward_of(verdict(Outcome.PASSED, 4), True, clipped) == 1.0
    assert reward_of(verdict(Outcome.NO_CODE, 0, ran=False), False, clipped) == 0.2


def test_a_group_is_dead_by_its_raw_outcomes_whatever_the_shaped_rewards():
    shaped = group(verdict(Outcome.FAILED, 3), verdict(Outcome.ERROR, 0, ran=False))
    assert len(set(reward_matrix([shaped], PARTS)[0])) == 2
    assert is_dead(shaped)
    assert not is_dead(group(verdict(Outcome.PASSED, 4), verdict(Outcome.FAILED, 3)))
    assert is_dead(group(verdict(Outcome.PASSED, 4), verdict(Outcome.HARNESS)))


def test_every_task_is_drawn_once_an_epoch_and_orders_differ():
    deck = Deck(tuple(range(10)), seed=3)
    epochs = [[task for step in range(5) for task in deck.draw(step + 5 * epoch, 2)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert deck.draw(7, 2) == deck.draw(7, 2)
    assert Deck(tuple(range(10)), seed=4).draw(0, 10) != deck.draw(0, 10)


def test_extra_tasks_are_none_of_those_taken():
    tasks = tuple(Task(task_id=str(n), statement="", entry_point="f", tests=("a", "b")) for n in range(10))
    deck = Deck(tasks, seed=3)
    # As presented, a task may show fewer tests than the deck's.
    taken = [task.showing(1) for task in deck.draw(0, 6)]
    assert not {task.task_id for task in deck.extra(0, 3, taken)} & {task.task_id for task in taken}
    assert len(deck.extra(0, 9, taken)) == 4
