"""The whole line, once: tasks to prompts to rollouts to verdicts to rewards to an adapter to a journal.

In: a validated recipe and an output folder. Out: the run folder. Only this module sees every stage.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from greenloop import tuning
from greenloop.card import write_card
from greenloop.curriculum import Experience, probe_line
from greenloop.engine.build import make_engine
from greenloop.engine.request import Generator
from greenloop.environment import about_inputs, about_tasks, describe, machine
from greenloop.errors import ConfigError, SandboxError, TrainingError
from greenloop.evaluate import load_shots
from greenloop.files import write_atomically
from greenloop.held_out import HeldOut
from greenloop.known_probe import known_probe
from greenloop.learn import checkpoint
from greenloop.learn.checkpoint import Progress
from greenloop.learn.improve import Improver, TokenGroup, Update
from greenloop.learn.optimise import make_optimizer, make_scheduler
from greenloop.learn.policy import Policy, adapt
from greenloop.models import resolve
from greenloop.models.check import check
from greenloop.models.load import LoadedModel
from greenloop.native_trial import load_and_try
from greenloop.progress import Reporter, step_line
from greenloop.prompt import get_protocol
from greenloop.recipe import Recipe, to_toml
from greenloop.record import Clock, rollout_record, update_record
from greenloop.results import json_text
from greenloop.resume import check_resumable
from greenloop.rewards import reward_matrix
from greenloop.rollout import in_parts
from greenloop.run_folder import RunFolder, keep_last, read_journal, write_folder
from greenloop.sandbox import Limits, SandboxVerifier
from greenloop.seeding import seed_for
from greenloop.supply import Sampled, Supply
from greenloop.tasks import load_tasks
from greenloop.types import Outcome, TaskSet, Verifier

_HARNESS_LIMIT = 0.01
_GAP_ALARM_NATS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where things of this machine lie."""

    cache_dir: Path
    data_dir: Path | None


class Judge(Protocol):
    """Opens a verifier."""

    def __call__(self, limits: Limits, workers: int | None, *, unsandboxed: bool) -> AbstractContextManager[Verifier]:
        """The verifier, to be closed after the run."""
        ...


def train(
    recipe: Recipe,
    out: Path,
    places: Places,
    reporter: Reporter,
    *,
    resume: bool = False,
    judge: Judge = SandboxVerifier,
) -> RunFolder:
    """Run the recipe; returns its folder.

    Raises:
        UsageError: something in the recipe cannot be used; nothing was sampled.
        SandboxError: programs cannot be judged.
        TrainingError: the loss or the gradient is not finite, or too many programs could not be judged; the state
            was saved.
    """
    folder = RunFolder(out)
    tasks, held_out = _tasks(recipe, places)
    source = resolve(recipe.model, cache_dir=places.cache_dir)
    check(source, chat_template=get_protocol(recipe.prompt.protocol).needs_chat_template)
    if source.adapter is not None:
        raise ConfigError(
            f"model: {recipe.model} is an adapter; train on its base ({source.weights.spec}), or --resume"
        )
    if recipe.curriculum.probe and recipe.prompts > len(tasks.tasks):
        raise ConfigError(f"prompts: {recipe.prompts} a step, but {recipe.tasks} has only {len(tasks.tasks)} tasks")
    if resume:
        check_resumable(folder, recipe, about_inputs(tasks, held_out, source.weights_sha256))
    else:
        folder.create()
    tuning.prepare_process(recipe.matmul_precision)
    limits = Limits(cpu_s=recipe.sandbox.cpu_s, wall_s=recipe.sandbox.wall_s, memory_mib=recipe.sandbox.memory_mib)
    unsandboxed = recipe.sandbox.allow_unsandboxed
    with judge(limits, recipe.sandbox.workers or None, unsandboxed=unsandboxed) as verifier:
        reporter.say(verifier.notice)
        loaded = load_and_try(source, reporter.say, dtype=recipe.dtype, device=recipe.device)
        write_atomically(folder.recipe, to_toml(recipe))
        write_atomically(folder.environment, json_text(_environment(recipe, loaded, tasks, held_out, verifier.level)))
        run = Run(recipe, folder, loaded, tasks, held_out, verifier, reporter, places)
        run.resume() if resume else run.save()
        run.before()
        run.probe()
        run.steps()
        run.after()
    return folder


class Run:
    """The live parts of one run."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        loaded: LoadedModel,
        tasks: TaskSet,
        held_out: TaskSet | None,
        verifier: Verifier,
        reporter: Reporter,
        places: Places,
    ) -> None:
        self.recipe, self.folder, self.reporter = recipe, folder, reporter
        self.held_out, self.level = held_out, verifier.level
        self.tokenizer: Any = loaded.tokenizer
        self.probed = (tasks.sha256, loaded.weights_sha256)
        shots = load_shots(recipe.prompt.protocol, data_dir=places.data_dir)
        validation = recipe.evaluation.validation_tasks
        self.validation = load_tasks(validation, data_dir=places.data_dir) if validation else None
        model = adapt(loaded.model, recipe.lora, recipe.seed, loaded.source.base_name)
        self.policy = Policy(model, recipe.sampling.temperature)
        self.policy.remember(recipe.engine.keep_mib * 2**20)
        self.engine: Generator = make_engine(
            model, self.tokenizer, rows=recipe.engine.rows, decoder=self.policy.decoder
        )
        self.supply = Supply(recipe, tasks.tasks, self.engine, verifier, tokenizer=self.tokenizer, shots=shots)
        self.exam = HeldOut(recipe, folder, self.engine, verifier, reporter, tokenizer=self.tokenizer, shots=shots)
        self.optimizer = make_optimizer(self.policy.parameters, recipe.optimizer)
        self.scheduler = make_scheduler(self.optimizer, recipe.optimizer, recipe.steps * recipe.rloo.passes)
        self.improver = Improver(
            self.policy,
            self.optimizer,
            self.scheduler,
            recipe.rloo,
            beta=recipe.beta,
            max_grad_norm=recipe.optimizer.max_grad_norm,
        )
        self.progress = Progress(step=0)
        self.experience: Experience | None = None
        self.new_tokens: float = recipe.samples * recipe.sampling.max_new_tokens
        """That the completions of a group are expected to have: the last step's mean."""
        self.minutes = 0.0

    def resume(self) -> None:
        """Go on from the newest checkpoint."""
        newest = self.folder.newest_checkpoint()
        assert newest is not None, "checked before anything was loaded"
        self.progress = checkpoint.load(newest, self.policy, self.optimizer, self.scheduler)
        self.folder.truncate_journal(self.progress.step)
        for record in read_journal(self.folder.journal):
            self._book(record)
        self.engine.refresh()
        self.reporter.say(f"resumed after step {self.progress.step} from {newest}")

    def probe(self) -> None:
        """Learn which tasks are worth a group, if the recipe asks for it: from samples, or from the run folder."""
        samples = self.recipe.curriculum.probe
        if not samples:
            return
        if not self.folder.probe.is_file() and (known := known_probe(self.recipe, *self.probed)) is not None:
            self.reporter.say("the probe is shipped: it was measured with these weights, tasks and sampling")
            write_atomically(self.folder.probe, json_text(known))
        if not self.folder.probe.is_file():
            self.reporter.begin("probe", len(self.supply.tasks) * samples)
            found = self.supply.probe(self.reporter.advance)
            self.reporter.end()
            write_atomically(self.folder.probe, json_text(found))
        counts = json.loads(self.folder.probe.read_text(encoding="utf-8"))
        self.experience = Experience.of_probe(counts)
        self.reporter.say(probe_line(self.experience, self.recipe.samples))
        for record in read_journal(self.folder.journal):
            self.experience = self.experience.after(record["task_outcomes"])

    def steps(self) -> None:
        """Train until the recipe's last step, or until validation or the clock stops it early."""
        self.reporter.begin("train", self.recipe.steps)
        for _ in range(self.progress.step):
            self.reporter.advance()
        while self.progress.step < self.recipe.steps and not self._stale() and not self._late():
            record = self._step(self.progress.step)
            self.reporter.say(step_line(record, self.recipe.steps))
            self._book(record)
            self.reporter.advance(
                f"pass {record['pass_rate'] or 0:.0%}  {record['tokens_per_s']['rollout']:.0f} tokens/s"
            )
        self.reporter.end()

    def _book(self, record: dict[str, Any]) -> None:
        """Take from a step's record what the steps after it go by."""
        self.minutes += record["seconds"]["total"] / 60
        # Journals of earlier versions do not have it.
        self.new_tokens = record.get("distinct_mean", self.new_tokens)

    def _step(self, step: int) -> dict[str, Any]:
        """One step of the line; its journal record."""
        clock = Clock()
        sampled, rewards, update = self._learn(step, clock)
        self.engine.refresh()
        clock.lap("update")
        self.progress = replace(self.progress, step=step + 1)
        validation = self._validate(step)
        clock.lap("validation")
        self.folder.write_rollouts(step, sampled.trained, rewards, update.advantages.tolist())
        record = {
            "step": step,
            **rollout_record(sampled.drawn, sampled.extra, reward_matrix(sampled.drawn, self.recipe.reward)),
            "refilled": sampled.refilled,
            **update_record(update),
            "learning_rate": self.scheduler.get_last_lr()[0],
            "validation_pass_rate": validation,
            "sandbox_level": self.level,
        }
        record = self._journal(record, clock, update)
        if self.experience is not None:
            self.experience = self.experience.after(record["task_outcomes"])
        # The record comes first: resuming drops the records of steps that are done again, it cannot invent one.
        if self.progress.step % self.recipe.checkpoint.every == 0 or self.progress.step == self.recipe.steps:
            self.save()
        self._warn_of_a_gap(record)
        self._refuse_a_broken_judge(record)
        return record

    def _journal(self, record: dict[str, Any], clock: Clock, update: Update) -> dict[str, Any]:
        seconds = {**clock.seconds, "reference": update.reference_s, "total": clock.total()}
        rates = {
            "rollout": record["tokens"] / seconds["rollout"],
            "update": update.trained_tokens / seconds["update"],
            "total": record["tokens"] / seconds["total"],
        }
        record = {**record, "seconds": seconds, "tokens_per_s": rates}
        self.folder.append(record)
        return record

    def _warn_of_a_gap(self, record: dict[str, Any]) -> None:
        gap = record["sampler_trainer_gap"]
        if gap is not None and gap > _GAP_ALARM_NATS:
            self.reporter.say(
                f"warning: sampler and trainer disagree by {gap:.3f} nats a token (alarm at {_GAP_ALARM_NATS}); "
                "the rollouts are not those of the policy that learns"
            )

    def _learn(self, step: int, clock: Clock) -> tuple[Sampled, list[list[float]], Update]:
        """Sample, judge and learn, part by part; one optimiser step (or the recipe's passes) in the end.

        Returns:
            The groups, the rewards [P][K] of those trained on, and the update.
        """
        wanted = self.supply.wanted(step, self.experience)
        self.policy.seed_dropout(seed_for(self.recipe.seed, "dropout", step))
        learning = self.improver.begin(sum(one.samples for one in wanted))
        parts: list[Sampled] = []
        rewards: list[list[float]] = []
        try:
            for part in in_parts(wanted, self._room(), self.new_tokens):
                with self.policy.recording():
                    sampled = self.supply.groups(step, part, self.experience)
                clock.lap("rollout")
                tokens = [TokenGroup.of(group.prompt.token_ids, group.completions) for group in sampled.trained]
                earned = reward_matrix(sampled.trained, self.recipe.reward)
                self.improver.add(learning, tokens, torch.tensor(earned))
                clock.lap("update")
                parts.append(sampled)
                rewards += earned
            return Sampled.joined(parts), rewards, self.improver.finish(learning)
        except TrainingError as error:
            self.save()
            raise TrainingError(
                f"step {step + 1}: {error}; no step was taken with it. The state before it is in "
                f"{self.folder.newest_checkpoint()}; start again with a lower optimizer.learning_rate or dtype=float32"
            ) from None

    def _room(self) -> int:
        """Tokens that the sampler can keep for an update; 0 where the update needs the whole step at once."""
        rloo = self.recipe.rloo
        return 0 if rloo.refill or rloo.normalize_advantages else self.policy.room

    def _validate(self, step: int) -> float | None:
        """Greedy pass rate on the validation tasks, on its turn; keeps the best adapter."""
        every = self.recipe.evaluation.every
        if self.validation is None or not every or (step + 1) % every:
            return None
        with self._as_saved():
            score = self.exam.validation_rate(self.validation)
        if score is not None and (self.progress.best_score is None or score > self.progress.best_score):
            self.progress = replace(self.progress, best_score=score, stale=0)
            write_folder(self.folder.best_adapter, self._fill_adapter)
        else:
            self.progress = replace(self.progress, stale=self.progress.stale + 1)
        self.reporter.say(
            f"validation {self.validation.spec}: {score or 0:.1%} greedy, best {self.progress.best_score or 0:.1%}"
        )
        return score

    def _stale(self) -> bool:
        patience = self.recipe.evaluation.patience
        return bool(patience) and self.progress.stale >= patience

    def _late(self) -> bool:
        late = bool(self.recipe.max_minutes) and self.minutes >= self.recipe.max_minutes
        if late:
            self.reporter.say(
                f"stopped after step {self.progress.step}: max_minutes = {self.recipe.max_minutes:g} are over"
            )
        return late

    def _refuse_a_broken_judge(self, record: dict[str, Any]) -> None:
        unjudged = record["outcomes"].get(Outcome.HARNESS.value, 0)
        if unjudged > max(1, _HARNESS_LIMIT * sum(record["outcomes"].values())):
            self.save()
            raise SandboxError(
                f"step {record['step'] + 1}: {unjudged} programs could not be judged; see rollouts/, then --resume"
            )

    def save(self) -> None:
        """Write a checkpoint, unless there is one of this step, and the adapter."""
        path = self.folder.checkpoints / f"step-{self.progress.step:05d}"
        if not path.exists():
            write_folder(
                path, lambda into: checkpoint.save(into, self.policy, self.optimizer, self.scheduler, self.progress)
            )
            keep_last(self.folder.checkpoints, self.recipe.checkpoint.keep)
        # A checkpoint may be of a run that ended before its adapter was written, or that kept another share of it.
        write_folder(self.folder.adapter, self._fill_adapter)

    def _as_saved(self) -> AbstractContextManager[None]:
        """The policy is meanwhile the one that the adapter's folder has."""
        return self.policy.interpolated(self.recipe.lora.interpolation)

    def _fill_adapter(self, into: Path) -> None:
        with self._as_saved():
            self.policy.save(into)
        self.tokenizer.save_pretrained(str(into))

    def before(self) -> None:
        """Score the untrained model on the held-out tasks, unless that is done already."""
        if self.held_out is None or self.exam.has("before"):
            return
        if self.progress.step:
            raise ConfigError(f"{self.folder.root}: evaluation/before is missing and the adapter is trained already")
        self.exam.score("before", self.held_out)

    def after(self) -> None:
        """Score the trained model on the held-out tasks; write results and the card."""
        self.save()
        if self.held_out is not None:
            with self._as_saved():
                self.exam.score("after", self.held_out)
            self.exam.write_difference()
        write_card(self.folder.root)


def _tasks(recipe: Recipe, places: Places) -> tuple[TaskSet, TaskSet | None]:
    tasks = load_tasks(recipe.tasks, data_dir=places.data_dir)
    held_out = load_tasks(recipe.eval_tasks, data_dir=places.data_dir) if recipe.eval_tasks else None
    if held_out is not None:
        shared = {task.task_id for task in tasks.tasks} & {task.task_id for task in held_out.tasks}
        if shared:
            raise ConfigError(
                f"eval_tasks: {recipe.eval_tasks} shares {len(shared)} tasks with {recipe.tasks}, e.g. {min(shared)}"
            )
    return tasks, held_out


def _environment(
    recipe: Recipe, loaded: LoadedModel, tasks: TaskSet, held_out: TaskSet | None, level: str
) -> dict[str, Any]:
    return {
        **machine(loaded),
        "model": {**describe(loaded), "spec": recipe.model},
        "tasks": about_tasks(tasks),
        "eval_tasks": about_tasks(held_out),
        "inputs_sha256": about_inputs(tasks, held_out, loaded.weights_sha256),
        "sandbox_level": level,
        "seed": recipe.seed,
        "command": sys.argv[1:],
    }
