"""Log-probs of the trained tokens from hidden states, in chunks: the logits [M, V] are never whole.

d log p(y) / d h = (W_y - sum_v p_v W_v) / temperature needs no upstream gradient, so the forward pass takes it from the
logits while it has them, and the backward pass is one scaling. The head is frozen (LoRA never targets it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from greenloop.decoder import FusedLinear
from greenloop.decoder.native import lays_out, reads, rows, sums

_CHUNK, _NATIVE_CHUNK = 256, 512
"""Tokens whose logits are made together, by PyTorch, which copies them several times, and by native code."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What the policy says of the trained tokens."""

    logprobs: Tensor
    """[M] float32 nats, differentiable."""
    entropy: Tensor
    """[M] float32 nats of the next-token distribution, no gradient."""

    def at(self, index: Tensor) -> Scored:
        """Of the tokens at [n] `index`, each as often as it stands there."""
        return Scored(self.logprobs.index_select(0, index), self.entropy.index_select(0, index))

    def split(self, sizes: list[int]) -> list[Scored]:
        """In pieces of `sizes` tokens."""
        pieces = zip(self.logprobs.split(sizes), self.entropy.split(sizes), strict=True)
        return [Scored(logprobs, entropy) for logprobs, entropy in pieces]


def score(hidden: Tensor, head: FusedLinear, labels: Tensor, temperature: float) -> Scored:
    """Full-vocabulary log-softmax of logits / temperature at the labels, in float32.

    Args:
        hidden: [M, d] after the final norm.
        head: [V, d] output weights, frozen and without adapter.
        labels: [M] int64.
        temperature: of the sampling.
    """
    logprobs, entropy = _ChunkedLogProb.apply(hidden, head, labels, temperature)
    return Scored(logprobs, entropy)


class _ChunkedLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: FusedLinear, labels: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        count = labels.shape[0]
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        judge, chunk = (_judged_natively, _NATIVE_CHUNK) if lays_out(head.weight) else (_judged, _CHUNK)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            into = None if slope is None else slope[part]
            logprobs[part], entropy[part] = judge(hidden[part], head, labels[part], temperature, into)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (gradients[0][:, None] * slope).to(slope.dtype), None, None, None


def _judged(
    hidden: Tensor, head: FusedLinear, labels: Tensor, temperature: float, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy [n] of a chunk; puts d log-prob / d hidden [n, d] into `slope`."""
    scores = (hidden @ head.weight.T).float().div_(temperature).log_softmax(dim=-1)
    logprobs = scores.gather(1, labels[:, None]).squeeze(1)
    probabilities = scores.exp()
    entropy = -torch.linalg.vecdot(probabilities, scores)
    if slope is not None:
        # p - 1 at the label in float32: a confident token's slope would drown in the rounding of p otherwise.
        probabilities.scatter_add_(1, labels[:, None], probabilities.new_full((1, 1), -1.0).expand(len(scores), 1))
        slope.copy_((probabilities.to(head.weight.dtype) @ head.weight) / -temperature)
    return logprobs, entropy


def _judged_natively(
    hidden: Tensor, head: FusedLinear, labels: Tensor, temperature: float, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same; the logits are not rounded to bfloat16, half of what sampler and trainer would differ by."""
    weight, logits = head.weight, sums.multiply(hidden.float(), head.factor())
    logprobs, entropy = rows.judged(logits, labels, temperature, slope=slope is not None)
    if slope is not None:
        # A processor that multiplies in bfloat16 is faster at it than native code.
        natively = reads(weight)
        slope.copy_(sums.multiply(logits, head.factor(back=True)) if natively else logits.to(weight.dtype) @ weight)
    return logprobs, entropy
