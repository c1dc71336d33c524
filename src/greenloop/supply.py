"""A step's judged groups: which tasks, sampled and judged, with dead groups replaced.

In: a recipe, an engine, a verifier. Out: P groups a step, at once or in parts; the same for the same seed, step and
experience. Knows no gradient and no file; what a probe found is the caller's to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from greenloop.curriculum import Experience, outcome_counts
from greenloop.deck import Deck
from greenloop.engine.request import Generator, Sampling
from greenloop.prompt import get_protocol, render
from greenloop.recipe import Recipe
from greenloop.rewards import is_dead
from greenloop.rollout import Wanted, roll_out, submitted, wanted_of
from greenloop.seeding import seed_for
from greenloop.types import Group, Prompt, Task, Verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What one step, or a part of it, sampled."""

    drawn: list[Group]
    """P groups; pass rate and dead groups are counted on these."""
    extra: list[Group]
    """Groups sampled to replace dead ones."""
    trained: list[Group]
    """P groups: `drawn` with dead ones replaced by live extra ones."""
    refilled: int

    @classmethod
    def joined(cls, parts: Sequence[Sampled]) -> Sampled:
        """A whole step of its parts."""
        return cls(
            drawn=[group for part in parts for group in part.drawn],
            extra=[group for part in parts for group in part.extra],
            trained=[group for part in parts for group in part.trained],
            refilled=sum(part.refilled for part in parts),
        )


class Supply:
    """Draws tasks and has them solved."""

    def __init__(
        self,
        recipe: Recipe,
        tasks: Sequence[Task],
        engine: Generator,
        verifier: Verifier,
        *,
        tokenizer: Any,
        shots: Sequence[Task],
    ) -> None:
        self.recipe, self.tasks, self.engine, self.verifier = recipe, tasks, engine, verifier
        self.tokenizer, self.shots = tokenizer, shots
        self.protocol = get_protocol(recipe.prompt.protocol)
        self.deck = Deck(tasks, seed_for(recipe.seed, "deck"))

    def probe(self, on_completion: Callable[[], None]) -> dict[str, tuple[int, int]]:
        """(passed, failed) of every task, from the recipe's number of samples each."""
        samples = self.recipe.curriculum.probe
        wanted = [
            Wanted(self._prompt(task), samples, seed_for(self.recipe.seed, "probe", task.task_id))
            for task in self.tasks
        ]
        pending = []
        for one in submitted(self.engine, self.verifier, self.protocol, wanted, self._sampling()):
            pending.append(one)
            on_completion()
        return outcome_counts((one.prompt.task.task_id, one.verdict.result()) for one in pending)

    def wanted(self, step: int, experience: Experience | None) -> list[Wanted]:
        """The step's P groups, to be sampled."""
        weights = self._weights(experience)
        tasks = (
            self.deck.draw(step, self.recipe.prompts)
            if weights is None
            else self.deck.favour(step, self.recipe.prompts, weights)
        )
        return self._wanted(tasks, seed_for(self.recipe.seed, step))

    def groups(self, step: int, wanted: Sequence[Wanted], experience: Experience | None) -> Sampled:
        """Groups as drawn, and as trained: dead ones replaced by live extra ones, within the budget.

        Args:
            step: from 0.
            wanted: groups of that step; all of them where there is a budget.
            experience: what the weights of extra tasks come from.
        """
        drawn = self._roll_out(wanted)
        dead = [index for index, group in enumerate(drawn) if is_dead(group)]
        budget = min(self.recipe.rloo.refill, len(dead))
        extra: list[Group] = []
        if budget:
            tasks = [one.prompt.task for one in wanted]
            others = self.deck.extra(step, budget, tasks, self._weights(experience))
            extra = self._roll_out(self._wanted(others, seed_for(self.recipe.seed, step, "refill")))
        trained = list(drawn)
        live = [group for group in extra if not is_dead(group)]
        for index, group in zip(dead, live, strict=False):
            trained[index] = group
        return Sampled(drawn=drawn, extra=extra, trained=trained, refilled=len(live))

    def _weights(self, experience: Experience | None) -> dict[str, float] | None:
        """Of the tasks, by id; None draws them in turn."""
        return None if experience is None else experience.weights(self.recipe.samples, self.recipe.curriculum.focus)

    def _wanted(self, tasks: Sequence[Task], seed: int) -> list[Wanted]:
        return wanted_of([self._prompt(task) for task in tasks], self.recipe.samples, seed)

    def _roll_out(self, wanted: Sequence[Wanted]) -> list[Group]:
        return roll_out(self.engine, self.verifier, self.protocol, wanted, self._sampling())

    def _prompt(self, task: Task) -> Prompt:
        return render(self.protocol, task.showing(self.recipe.prompt.shown), self.tokenizer, shots=self.shots)

    def _sampling(self) -> Sampling:
        section = self.recipe.sampling
        return Sampling(
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            min_p=section.min_p,
            max_new_tokens=section.max_new_tokens,
        )
