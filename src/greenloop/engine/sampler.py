"""Logits to tokens: warping, inverse-CDF draws and log-probs, as pure functions.

The draw takes one uniform number a row, so it depends on nothing but that row's logits and its own address; batch
neighbours cannot change it. Log-probs are always those of the full vocabulary at the sampling temperature (what the
loss uses), whatever top-p, top-k and min-p cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native import rows as native
from greenloop.engine.request import Sampling

_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Drawn:
    """One decode step's tokens."""

    tokens: Tensor
    """[n] int64."""
    logprobs: Tensor
    """[n] float32, nats."""


def uniforms(seed: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): the draws of one completion, token by token (Philox, counter-based)."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling, rows: Tensor | None = None) -> Drawn:
    """Sample tokens.

    Args:
        logits: [B, V] any float type.
        uniform: [n] float in [0, 1), ignored when greedy.
        sampling: temperature and truncation.
        rows: [n] int64, the row that each is drawn from; None draws one from each row.
    """
    scores = logits.float()
    rows = torch.arange(len(scores), device=scores.device) if rows is None else rows
    if sampling.greedy:
        tokens = scores.argmax(dim=-1)
        logprobs = scores.gather(1, tokens[:, None]).squeeze(1) - scores.logsumexp(dim=-1)
        return Drawn(tokens[rows], logprobs[rows])
    weights = (scores.div_(sampling.temperature) if scores is not logits else scores / sampling.temperature).softmax(-1)
    tokens = inverse_cdf(truncate(weights, sampling) if sampling.truncates else weights, uniform, rows)
    return Drawn(tokens, weights[rows, tokens].log())


def draw_each(logits: Tensor, uniform: Sequence[float], ways: Sequence[Sampling], rows: Sequence[int]) -> Drawn:
    """`draw` with a way of its own for each token; the result is on the CPU.

    Args:
        logits: [B, V] on any device.
        uniform: [n] in [0, 1).
        ways: [n].
        rows: [n], none before an earlier one's.
    """
    different = set(ways)
    if native.draws_from(logits) and all(way.greedy or not way.truncates for way in different):
        return Drawn(*native.drawn(logits, uniform, rows, [way.temperature for way in ways]))
    numbers, sources = torch.tensor(uniform, dtype=torch.float64), torch.tensor(rows)
    tokens, logprobs = torch.empty(len(ways), dtype=torch.int64), torch.empty(len(ways))
    for way in different:
        index = torch.tensor([at for at, one in enumerate(ways) if one == way])
        needed, source = sources[index].unique(return_inverse=True)
        chosen = logits if len(needed) == len(logits) else logits[needed.to(logits.device)]
        drawn = draw(chosen, numbers[index].to(logits.device), way, source.to(logits.device))
        tokens[index], logprobs[index] = drawn.tokens.cpu(), drawn.logprobs.cpu()
    return Drawn(tokens, logprobs)


def inverse_cdf(weights: Tensor, uniform: Tensor, rows: Tensor) -> Tensor:
    """Index whose slice of the cumulative weight of a row holds `uniform`: [B, V], [n] and [n] to [n] int64.

    Two levels (blocks, then inside one block) replace a cumulative sum over the whole vocabulary. Never returns an
    index of weight 0.

    >>> inverse_cdf(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([0.2, 0.25, 0.99]), torch.tensor([0, 0, 0])).tolist()
    [0, 2, 2]
    """
    padding = -weights.shape[1] % _BLOCK
    if padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    blocks = weights.view(len(weights), -1, _BLOCK)
    edges = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)[rows]
    target = uniform.to(edges.dtype)[:, None] * edges[:, -1:]
    block = _first_above(edges, target)
    before = torch.where(block > 0, edges.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks[rows, block.squeeze(1)].to(edges.dtype).cumsum(dim=-1)
    # Rounding may put the target a hair above the block's own sum: scale into it.
    local = torch.minimum(target - before, inside[:, -1:] * (1 - 1e-12))
    return (block * _BLOCK + _first_above(inside, local)).squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """[B, 1] first index whose cumulative value is greater than the target."""
    index = torch.searchsorted(cumulative, target, right=True)
    return index.clamp_max_(cumulative.shape[1] - 1)


def truncate(weights: Tensor, sampling: Sampling) -> Tensor:
    """`weights` [B, V] with what top-k, then top-p, then min-p cut off set to 0 (transformers' order).

    >>> w = torch.tensor([[5.0, 3.0, 1.5, 0.5]])
    >>> truncate(w, Sampling(top_p=0.7)).tolist()
    [[5.0, 3.0, 0.0, 0.0]]
    """
    kept = weights
    if sampling.top_k:
        k = min(sampling.top_k, weights.shape[1])
        kept = kept.masked_fill(kept < kept.topk(k, dim=-1).values[:, -1:], 0.0)
    if sampling.top_p < 1:
        ordered, order = kept.sort(dim=-1, descending=True)
        share = ordered.cumsum(dim=-1) / ordered.sum(dim=-1, keepdim=True)
        beyond = share - ordered / ordered.sum(dim=-1, keepdim=True) >= sampling.top_p
        kept = kept.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0.0)
    if sampling.min_p > 0:
        kept = kept.masked_fill(kept < sampling.min_p * kept.amax(dim=-1, keepdim=True), 0.0)
    return kept
