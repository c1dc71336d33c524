"""Which tasks a step trains on: a pure function of seed and step, so resuming needs no state."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from greenloop.seeding import seed_for
from greenloop.types import Task


@dataclass(frozen=True, slots=True)
class Deck:
    """The training tasks, shuffled anew each epoch."""

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

    def extra(self, step: int, count: int, taken: Sequence[Task]) -> list[Task]:
        """Up to `count` tasks to replace dead groups, none of those taken."""
        ids = {task.task_id for task in taken}
        left = [task for task in self.tasks if task.task_id not in ids]
        return random.Random(seed_for(self.seed, "refill", step)).sample(left, min(count, len(left)))

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.tasks)))
        random.Random(seed_for(self.seed, "deck", epoch)).shuffle(order)
        return order
