"""greenloop's side of a comparison: rollouts, verdicts, one RLOO update, as `greenloop train` does them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch

from bench.side import Reports, Stages, wait_for_go
from bench.work import Work, build, fixed_reward
from greenloop.decoder import unwrapped
from greenloop.engine.generate import Engine
from greenloop.engine.request import Sampling
from greenloop.engine.stopping import Stopper
from greenloop.learn.improve import Improver, TokenGroup, Update
from greenloop.learn.optimise import make_optimizer, make_scheduler
from greenloop.learn.policy import Policy
from greenloop.prompt import get_protocol
from greenloop.recipe import EngineSection, OptimizerSection, RlooSection
from greenloop.rollout import Submitted, Wanted, in_parts, submitted
from greenloop.sandbox import SandboxVerifier
from greenloop.seeding import seed_for
from greenloop.tree import size
from greenloop.types import Completion, Outcome


class Side:
    """The parts of a step."""

    def __init__(self, work: Work, verifier: SandboxVerifier) -> None:
        self.work, self.verifier = work, verifier
        model, tokenizer, self.prompts = build(work)
        self.policy = Policy(model, temperature=1.0)
        self.policy.remember(EngineSection().keep_mib * 2**20)
        stopper = Stopper(tokenizer, frozenset()) if work.equal else Stopper.of(unwrapped(model), tokenizer)
        self.engine = Engine(self.policy.decoder, stopper, rows=work.rows)
        section = OptimizerSection(learning_rate=work.learning_rate, warmup_steps=0)
        optimizer = make_optimizer(self.policy.parameters, section)
        self.improver = Improver(
            self.policy,
            optimizer,
            make_scheduler(optimizer, section, 1000),
            RlooSection(),
            beta=work.beta,
            max_grad_norm=section.max_grad_norm,
        )
        protocol = get_protocol("train")
        self.protocol = replace(protocol, answered=None) if work.equal else protocol
        self.new_tokens: float = work.samples * work.max_new_tokens

    def step(self, number: int) -> tuple[Update, list[Completion], dict[str, float]]:
        """One whole step: its update, its completions, seconds by stage."""
        work, stages = self.work, Stages()
        wanted = [
            Wanted(prompt, work.samples, seed_for(number, index))
            for index, prompt in enumerate(work.step_prompts(self.prompts, number))
        ]
        completions: list[Completion] = []
        learned: list[TokenGroup] = []
        learning = self.improver.begin(work.completions)
        for part in in_parts(wanted, self.policy.room, self.new_tokens):
            sampled = stages.timed("generation", self._sampled, part)
            outcomes = stages.timed("verification", lambda done=sampled: [one.verdict.result().outcome for one in done])
            rewards = [float(outcome is Outcome.PASSED) for outcome in outcomes]
            if work.equal:
                rewards = [fixed_reward(len(completions) + index) for index in range(len(rewards))]
            found = [one.completion for one in sampled]
            groups = [
                TokenGroup.of(one.prompt.token_ids, found[index * work.samples : (index + 1) * work.samples])
                for index, one in enumerate(part)
            ]
            table = torch.tensor(rewards).view(len(part), work.samples)
            stages.timed("update", self.improver.add, learning, groups, table)
            completions += found
            learned += groups
        update = stages.timed("update", self.improver.finish, learning)
        self.new_tokens = fmean(size(group.completions) for group in learned)
        stages.timed("update", self.engine.refresh)
        stages.seconds["reference"] = update.reference_s
        stages.seconds["update"] -= update.reference_s
        return update, completions, stages.seconds

    def _sampled(self, wanted: Sequence[Wanted]) -> list[Submitted]:
        """All completions in order, each handed to the judge when it ended."""
        sampling = Sampling(temperature=1.0, max_new_tokens=self.work.max_new_tokens)
        with self.policy.recording():
            sampled = list(submitted(self.engine, self.verifier, self.protocol, wanted, sampling))
        return sorted(sampled, key=lambda one: (one.completion.group, one.completion.sample))


def main() -> None:
    """Serve steps."""
    reports = Reports()
    with SandboxVerifier() as verifier:
        side = Side(Work.from_json(sys.argv[1]), verifier)
        reports.say(ready=True, dtype=str(side.policy.decoder.dtype), threads=torch.get_num_threads())
        number = 0
        while True:
            wait_for_go()
            started = time.perf_counter()
            update, completions, seconds = side.step(number)
            seconds["total"] = time.perf_counter() - started
            reports.say(
                seconds=seconds,
                tokens=sum(len(completion.token_ids) for completion in completions),
                trained_tokens=update.trained_tokens,
                grad_norm=update.grad_norm,
                gap_nats=update.gap_nats,
            )
            number += 1


if __name__ == "__main__":
    main()
