"""Which tasks a step trains on: a pure function of seed, step and weights, so the draw itself needs no state."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from greenloop.seeding import seed_for
from greenloop.types import Task


@dataclass(frozen=True, slots=True)
class Deck:
    """The training tasks, shuffled anew each epoch or drawn by weight."""

    tasks: Sequence[Task]
    seed: int

    def draw(self, step: int, count: int) -> list[Task]:
        """The `count` tasks of a step (from 0): every task once an epoch; a step may reach over the epoch's end.

        >>> deck = Deck(["a", "b", "c"], 0)
        >>> sorted(deck.draw(0, 3)) == sorted(deck.draw(1, 3)) == ["a", "b", "c"]
        True
        """
        places = range(step * count, (step + 1) * count)
        return [self.tasks[self._order(place // len(self.tasks))[place % len(self.tasks)]] for place in places]

    def favour(self, step: int, count: int, weights: Mapping[str, float]) -> list[Task]:
        """Up to `count` different tasks, each drawn with a chance that follows its weight.

        Args:
            step: from 0.
            count: how many.
            weights: by task id, above 0.
        """
        return _weighted(random.Random(seed_for(self.seed, "favour", step)), self.tasks, count, weights)

    def extra(
        self, step: int, count: int, taken: Sequence[Task], weights: Mapping[str, float] | None = None
    ) -> list[Task]:
        """Up to `count` tasks to replace dead groups, none of those taken; by weight where weights are known."""
        ids = {task.task_id for task in taken}
        left = [task for task in self.tasks if task.task_id not in ids]
        draws = random.Random(seed_for(self.seed, "refill", step))
        return draws.sample(left, min(count, len(left))) if weights is None else _weighted(draws, left, count, weights)

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.tasks)))
        random.Random(seed_for(self.seed, "deck", epoch)).shuffle(order)
        return order


def _weighted(draws: random.Random, tasks: Sequence[Task], count: int, weights: Mapping[str, float]) -> list[Task]:
    """Without replacement: the largest of u^(1/w), as logarithms (Efraimidis & Spirakis 2006, algorithm A)."""
    keys = [math.log(draws.random() or sys.float_info.min) / weights[task.task_id] for task in tasks]
    order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
    return [tasks[place] for place in order[:count]]
