"""How a run scores its model on tasks that it does not train on: before, after, and now and then between.

In: a recipe, an engine, a verifier. Out: evaluation folders and scores. The engine decodes with the adapter as it is at
that moment. Knows no gradient.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from greenloop.compare import compare_records, comparison_record
from greenloop.engine.request import Generator
from greenloop.evaluate import Evaluation, EvaluationSettings, evaluate
from greenloop.files import write_atomically
from greenloop.progress import Reporter
from greenloop.recipe import Recipe
from greenloop.record import rate
from greenloop.results import evaluation_lines, evaluation_record, json_text, read_record, write_evaluation
from greenloop.run_folder import RunFolder
from greenloop.seeding import seed_for
from greenloop.types import Task, TaskSet, Verifier


class HeldOut:
    """The examinations of one run."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        engine: Generator,
        verifier: Verifier,
        reporter: Reporter,
        *,
        tokenizer: Any,
        shots: Sequence[Task],
    ) -> None:
        self.recipe, self.folder, self.engine, self.verifier = recipe, folder, engine, verifier
        self.reporter, self.tokenizer, self.shots = reporter, tokenizer, shots

    def has(self, when: str) -> bool:
        """Whether the evaluation `before` or `after` is written."""
        return (self.folder.evaluation(when) / "results.json").is_file()

    def score(self, when: str, tasks: TaskSet) -> None:
        """Evaluate with the recipe's settings, write the folder of `before` or `after`, say what came out."""
        settings = self._settings()
        self.reporter.begin(f"evaluate {when}", len(tasks.tasks) * settings.answers_per_task)
        evaluation = self._evaluate(tasks, settings, "evaluation", self.reporter)
        self.reporter.end()
        environment = json.loads(self.folder.environment.read_text(encoding="utf-8"))
        write_evaluation(self.folder.evaluation(when), evaluation, environment)
        for line in evaluation_lines(evaluation_record(evaluation, environment)):
            self.reporter.say(f"{when}: {line}")

    def write_difference(self) -> None:
        """The run's `results.json`: before, after and their paired difference."""
        before, after = (read_record(self.folder.evaluation(when) / "results.json") for when in ("before", "after"))
        difference = comparison_record(compare_records(before, after))
        write_atomically(self.folder.results, json_text({"before": before, "after": after, "difference": difference}))

    def validation_rate(self, tasks: TaskSet) -> float | None:
        """Greedy pass rate; None if no answer could be judged."""
        settings = replace(self._settings(), samples=0, greedy=True, k=(1,))
        answers = self._evaluate(tasks, settings, "validation", None).answers
        return rate([answer.passed for answer in answers if answer.judged])

    def _evaluate(
        self, tasks: TaskSet, settings: EvaluationSettings, purpose: str, reporter: Reporter | None
    ) -> Evaluation:
        return evaluate(
            self.engine,
            self.tokenizer,
            self.verifier,
            tasks,
            settings,
            seed=seed_for(self.recipe.seed, purpose),
            shots=self.shots,
            on_verdict=None if reporter is None else lambda _: reporter.advance(),
        )

    def _settings(self) -> EvaluationSettings:
        section = self.recipe.evaluation
        return EvaluationSettings(
            protocol=self.recipe.prompt.protocol,
            shown_tests=self.recipe.prompt.shown,
            greedy=section.greedy,
            samples=section.samples,
            temperature=section.temperature,
            max_new_tokens=self.recipe.sampling.max_new_tokens,
            k=(1,),
        )
