"""A step's judged groups: which tasks, sampled and judged, with dead groups replaced.

In: a recipe, an engine, a verifier. Out: P groups a step, the same for the same seed, step and experience. Knows no
gradient and no file; what a probe found is the caller's to keep.
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
from greenloop.rollout import Wanted, roll_out, submitted
from greenloop.seeding import seed_for
from greenloop.types import Group, Prompt, Task, Verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What one step sampled."""

    drawn: list[Group]
    """P groups; pass rate and dead groups are counted on these."""
    extra: list[Group]
    """Groups sampled to replace dead ones."""
    trained: list[Group]
    """P groups: `drawn` with dead ones replaced by live extra ones."""
    refilled: int


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

    def groups(self, step: int, experience: Experience | None) -> Sampled:
        """The step's groups as drawn, and as trained: dead ones replaced by live extra ones, within the budget."""
        weights = None if experience is None else experience.weights(self.recipe.samples, self.recipe.curriculum.focus)
        tasks = (
            self.deck.draw(step, self.recipe.prompts)
            if weights is None
            else self.deck.favour(step, self.recipe.prompts, weights)
        )
        drawn = self._roll_out(tasks, seed_for(self.recipe.seed, step))
        dead = [index for index, group in enumerate(drawn) if is_dead(group)]
        budget = min(self.recipe.rloo.refill, len(dead))
        extra: list[Group] = []
        if budget:
            others = self.deck.extra(step, budget, tasks, weights)
            extra = self._roll_out(others, seed_for(self.recipe.seed, step, "refill"))
        trained = list(drawn)
        live = [group for group in extra if not is_dead(group)]
        for index, group in zip(dead, live, strict=False):
            trained[index] = group
        return Sampled(drawn=drawn, extra=extra, trained=trained, refilled=len(live))

    def _roll_out(self, tasks: Sequence[Task], seed: int) -> list[Group]:
        return roll_out(
            self.engine,
            self.verifier,
            self.protocol,
            [self._prompt(task) for task in tasks],
            samples=self.recipe.samples,
            sampling=self._sampling(),
            seed=seed,
        )

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
