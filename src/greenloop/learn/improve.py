"""One RLOO update: groups and rewards in, optimiser steps and their measurements out.

A group's forward gives its log-probs; detached, they and the reference's give the KL; then reward, advantage, loss and
backward: there is no forward for "old" log-probs. Only normalised advantages, and a group over the token budget with
beta > 0, need their advantages before the graph is built; they pay one forward without gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from greenloop.errors import TrainingError
from greenloop.learn.logprob import Scored
from greenloop.learn.packing import Pack, batched, pack_group
from greenloop.learn.policy import Policy
from greenloop.learn.rloo import clipped_rows, kl_shaped, leave_one_out, normalized, sequence_losses
from greenloop.recipe import RlooSection
from greenloop.types import Completion, Finish


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGroup:
    """One prompt and its K completions, as tokens."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    sampler_logprobs: tuple[tuple[float, ...], ...]
    """Per token, nats; only for the gap alarm."""
    truncated: tuple[bool, ...]

    @classmethod
    def of(cls, prompt: tuple[int, ...], completions: Sequence[Completion]) -> TokenGroup:
        """The tokens of sampled completions of one prompt."""
        return cls(
            prompt=prompt,
            completions=tuple(completion.token_ids for completion in completions),
            sampler_logprobs=tuple(completion.logprobs for completion in completions),
            truncated=tuple(completion.finish is Finish.LENGTH for completion in completions),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one step did. NaN: not measured."""

    advantages: Tensor
    """[P, K] as used."""
    loss: float
    """Of the first pass, mean over P * K."""
    kl_nats: float
    """Mean over completions of the summed k1 estimate; NaN when beta is 0 (no reference forward)."""
    entropy_nats: float
    """Mean over the trained tokens of the first pass."""
    clipped_fraction: float
    """Trained completions whose gradient the clip took away, over all passes."""
    gap_nats: float
    """Mean over the trained tokens of |sampler - trainer| log-prob."""
    gap_nats_worst: float
    """The largest of them."""
    grad_norm: float
    """Before clipping, last pass; 0 when no step was taken."""
    trained_tokens: int
    """Completion tokens with gradient, first pass."""
    optimizer_steps: int
    reference_s: float
    """Seconds in the reference's forwards."""


@dataclass(slots=True)
class _Tally:
    """Sums that one update collects while it goes."""

    tokens: int = 0
    entropy: float = 0.0
    gap: float = 0.0
    gap_worst: float = 0.0
    rows: int = 0
    clipped: int = 0
    reference_s: float = 0.0
    kl: list[Tensor] = field(default_factory=list)

    def first_pass(self, group: TokenGroup, pack: Pack, scored: Scored) -> None:
        sampled = torch.tensor([value for k in pack.completions for value in group.sampler_logprobs[k]])
        gap = (sampled - scored.logprobs.detach().cpu()).abs()
        self.tokens += len(sampled)
        self.entropy += float(scored.entropy.sum())
        self.gap += float(gap.sum())
        self.gap_worst = max(self.gap_worst, float(gap.max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Groups of one rollout and what is known of them; the first pass fills in what is not."""

    groups: Sequence[TokenGroup]
    rewards: Tensor
    """[P, K]."""
    behaviour: Tensor | None
    """[P, K] given summed log-probs of the policy that sampled."""
    advantages: Tensor
    """[P, K]; NaN where they wait for the first pass."""
    fresh: Tensor
    """[P, K] the first pass's summed log-probs."""

    def unknown(self, p: int) -> bool:
        """The group's advantages wait for the first pass."""
        return bool(self.advantages[p].isnan().any())


@dataclass(slots=True)
class Learning:
    """An update under way, of `Improver.begin`."""

    completions: int
    """P * K: the denominator of the loss."""
    parts: list[_Part] = field(default_factory=list)
    tally: _Tally = field(default_factory=_Tally)
    loss: float = 0.0
    """Of the first pass, of the parts so far."""


class Improver:
    """Turns groups and rewards into optimiser steps."""

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        rloo: RlooSection,
        *,
        beta: float,
        max_grad_norm: float,
    ) -> None:
        self.policy, self.optimizer, self.scheduler = policy, optimizer, scheduler
        self.rloo, self.beta, self.max_grad_norm = rloo, beta, max_grad_norm
        high = rloo.epsilon if rloo.epsilon_high is None else rloo.epsilon_high
        self.group_tokens = rloo.token_budget or policy.most_tokens
        self.batch_tokens = rloo.token_budget or policy.batch_tokens
        self.clip = {"epsilon": rloo.epsilon, "epsilon_high": high}

    def improve(self, groups: Sequence[TokenGroup], rewards: Tensor, behaviour: Tensor | None = None) -> Update:
        """Take the recipe's passes over one batch that is there as a whole; see `add` and `finish`."""
        learning = self.begin(rewards.numel())
        self.add(learning, groups, rewards, behaviour)
        return self.finish(learning)

    def begin(self, completions: int) -> Learning:
        """A new update, of P * K completions in all; the gradients of one that was not finished are dropped."""
        self.optimizer.zero_grad(set_to_none=True)
        return Learning(completions)

    def add(
        self, learning: Learning, groups: Sequence[TokenGroup], rewards: Tensor, behaviour: Tensor | None = None
    ) -> None:
        """Gradients of a part of the update's groups, while what the sampler kept of them is still there.

        Args:
            learning: of `begin`, and no other since.
            groups: p of the P prompts with K completions each; all P with `normalize_advantages`.
            rewards: [p, K] task rewards, clipped; NaN where unjudged.
            behaviour: [p, K] summed log-probs under the policy that sampled, for data that is not fresh; None says
                that the present policy did.

        Raises:
            TrainingError: the loss is not finite.
        """
        assert not self.rloo.normalize_advantages or rewards.numel() == learning.completions, (
            "they need the whole batch"
        )
        # Between two rollouts the second copy of the weights would only stand beside the activations.
        self.policy.decoder.unpack()
        part = _Part(
            groups=groups,
            rewards=rewards,
            behaviour=behaviour,
            advantages=self._advantages_ahead(groups, rewards, behaviour, learning.tally),
            fresh=torch.full_like(rewards, math.nan),
        )
        learning.parts.append(part)
        learning.loss += sum(self._first_pass(learning, part, batch) for batch in self._batches(part))

    def finish(self, learning: Learning) -> Update:
        """Take the first pass's optimiser step, and the recipe's further passes.

        Raises:
            TrainingError: the loss or the gradient is not finite; no step was taken with it.
        """
        added = sum(part.rewards.numel() for part in learning.parts)
        assert added == learning.completions, f"{added} of {learning.completions} completions were added"
        steps, norm = 0, 0.0
        if learning.tally.rows:
            norm, steps = self._step(learning.loss), 1
            for _ in range(self.rloo.passes - 1):
                self.optimizer.zero_grad(set_to_none=True)
                again = sum(
                    self._later_pass(learning, part, batch) for part in learning.parts for batch in self._batches(part)
                )
                norm, steps = self._step(again), steps + 1
        return _update(learning, norm, steps)

    def _advantages_ahead(
        self, groups: Sequence[TokenGroup], rewards: Tensor, behaviour: Tensor | None, tally: _Tally
    ) -> Tensor:
        """[P, K] advantages; rows that the first pass will fill in (from its own forward) are NaN."""
        if not self.beta:
            advantages = leave_one_out(rewards)
        else:
            advantages = torch.full_like(rewards, math.nan)
            for p, group in enumerate(groups):
                if self.rloo.normalize_advantages or len(self._packs(group, range(rewards.shape[1]))) > 1:
                    old = None if behaviour is None else behaviour[p]
                    advantages[p] = self._measured_advantages(group, rewards[p], old, tally)
        if self.rloo.normalize_advantages:
            advantages = normalized(advantages, rewards)
        return advantages

    @torch.no_grad()
    def _measured_advantages(
        self, group: TokenGroup, rewards: Tensor, behaviour: Tensor | None, tally: _Tally
    ) -> Tensor:
        """[K] KL-shaped advantages from forwards without gradient."""
        sums = torch.empty_like(rewards)
        reference = torch.empty_like(rewards)
        for pack in self._packs(group, range(rewards.shape[0])):
            rows = list(pack.completions)
            sums[rows] = _per_completion(self.policy.logprobs([pack])[0].logprobs, pack)
            reference[rows] = self._references([pack], tally)[0]
        return self._shaped_advantages(rewards, sums if behaviour is None else behaviour, reference, tally)

    def _shaped_advantages(self, rewards: Tensor, behaviour: Tensor, reference: Tensor, tally: _Tally) -> Tensor:
        kl = behaviour - reference
        tally.kl.append(kl)
        return leave_one_out(kl_shaped(rewards, kl, self.beta)[None])[0]

    def _references(self, packs: Sequence[Pack], tally: _Tally) -> list[Tensor]:
        """[R] summed log-probs under the base, pack by pack."""
        if not packs:
            return []
        started = time.perf_counter()
        logprobs = self.policy.reference_logprobs(packs)
        tally.reference_s += time.perf_counter() - started
        return [_per_completion(tokens, pack) for tokens, pack in zip(logprobs, packs, strict=True)]

    def _batches(self, part: _Part) -> list[list[tuple[int, Pack]]]:
        """What has a gradient, or whose advantage must be measured first, forward by forward."""
        packs = [
            (p, pack)
            for p, group in enumerate(part.groups)
            for pack in self._packs(group, range(len(group.completions)) if part.unknown(p) else self._live(part, p))
        ]
        return batched(packs, self.batch_tokens, padded=self.policy.together)

    def _first_pass(self, learning: Learning, part: _Part, batch: Sequence[tuple[int, Pack]]) -> float:
        """Gradients of one batch; fills in its rows of `advantages` and `fresh`. Returns its share of the loss."""
        unknown = [part.unknown(p) for p, _ in batch]
        scored = self.policy.logprobs([pack for _, pack in batch])
        waiting = [pack for (_, pack), waits in zip(batch, unknown, strict=True) if waits]
        references = self._references(waiting, learning.tally)
        losses = []
        for (p, pack), result, waits in zip(batch, scored, unknown, strict=True):
            rows = list(pack.completions)
            sums = _per_completion(result.logprobs, pack)
            part.fresh[p, rows] = sums.detach()
            learning.tally.first_pass(part.groups[p], pack, result)
            old = sums.detach() if part.behaviour is None else part.behaviour[p, rows]
            if waits:
                part.advantages[p] = self._shaped_advantages(part.rewards[p], old, references.pop(0), learning.tally)
            losses.append(self._loss(learning, sums, old, part.advantages[p, rows]))
        return _backward(losses)

    def _later_pass(self, learning: Learning, part: _Part, batch: Sequence[tuple[int, Pack]]) -> float:
        """Gradients of one batch against the first pass's log-probs. Returns its share of the loss."""
        old = part.fresh if part.behaviour is None else part.behaviour
        losses = []
        for (p, pack), result in zip(batch, self.policy.logprobs([pack for _, pack in batch]), strict=True):
            rows = list(pack.completions)
            sums = _per_completion(result.logprobs, pack)
            losses.append(self._loss(learning, sums, old[p, rows], part.advantages[p, rows]))
        return _backward(losses)

    def _loss(self, learning: Learning, sums: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        """The completions' share of the loss."""
        loss = sequence_losses(sums, old, advantages, **self.clip).sum() / learning.completions
        learning.tally.rows += int(advantages.count_nonzero())
        learning.tally.clipped += int(clipped_rows(sums.detach(), old, advantages, **self.clip).sum())
        return loss

    def _live(self, part: _Part, p: int) -> list[int]:
        """The group's completions with a gradient."""
        live = part.advantages[p].nonzero().flatten().tolist()
        return [k for k in live if not (self.rloo.mask_truncated and part.groups[p].truncated[k])]

    def _packs(self, group: TokenGroup, rows: Sequence[int]) -> list[Pack]:
        return pack_group(group.prompt, group.completions, rows, self.group_tokens)

    def _step(self, loss: float) -> float:
        """One optimiser step; returns the gradient norm before clipping."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters, self.max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient norm is {norm} (loss {loss})")
        self.optimizer.step()
        self.policy.refresh()
        self.scheduler.step()
        return norm


def _backward(losses: Sequence[Tensor]) -> float:
    """Add the gradients of the sum of `losses`; returns it."""
    loss = torch.stack(list(losses)).sum()
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss is {float(loss.detach())}")
    loss.backward()
    return float(loss.detach())


def _per_completion(tokens: Tensor, pack: Pack) -> Tensor:
    """[M] per token to [R] sums, on the CPU."""
    sums = torch.zeros(len(pack.completions), dtype=tokens.dtype, device=tokens.device)
    return sums.index_add(0, pack.owner.to(tokens.device), tokens).cpu()


def _update(learning: Learning, norm: float, steps: int) -> Update:
    tally = learning.tally
    tokens = tally.tokens or math.nan
    return Update(
        advantages=torch.cat([part.advantages for part in learning.parts]),
        loss=learning.loss,
        kl_nats=float(torch.cat(tally.kl).mean()) if tally.kl else math.nan,
        entropy_nats=tally.entropy / tokens,
        clipped_fraction=tally.clipped / tally.rows if tally.rows else 0.0,
        gap_nats=tally.gap / tokens,
        gap_nats_worst=tally.gap_worst,
        grad_norm=norm,
        trained_tokens=tally.tokens,
        optimizer_steps=steps,
        reference_s=tally.reference_s,
    )
