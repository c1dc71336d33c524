"""Attention for packed groups, forward and backward, as pure functions.

The prompt attends causally to itself; each completion attends to the whole prompt and causally to itself; siblings do
not see each other. Both parts are one dense product each (a completion's keys are the prompt's, then its own), so
nothing is spent on sibling pairs. The query heads of one KV head are folded into the query length, so keys are never
repeated for them. The weights are computed again in the backward pass instead of being kept: memory grows with the
tokens, not with their pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from greenloop.learn.packing import Pack


@dataclass(frozen=True, slots=True)
class Part:
    """Queries over their keys: the prompt (one row), or all completions (R rows)."""

    query: Tensor
    """[Hkv * rows, G * T, D], scaled."""
    key: Tensor
    """[Hkv * rows, S, D]; the last T keys are the queries' own."""
    value: Tensor
    """[Hkv * rows, S, D]."""
    tokens: int
    """T, padding included."""

    def weights(self) -> Tensor:
        """[Hkv * rows, G * T, S] softmax over the keys that each query may see."""
        scores = torch.bmm(self.query, self.key.transpose(1, 2))
        own = scores.unflatten(1, (-1, self.tokens))[..., -self.tokens :]
        later = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=scores.device).triu_(1)
        own.masked_fill_(later, float("-inf"))
        return scores.softmax(dim=-1)

    def mix(self) -> Tensor:
        """[Hkv * rows, G * T, D]."""
        return torch.bmm(self.weights(), self.value)

    def gradients(self, mixed: Tensor) -> Part:
        """Gradients of query, key and value from that of `mix()`."""
        weights = self.weights()
        of_value = torch.bmm(weights.transpose(1, 2), mixed)
        of_weights = torch.bmm(mixed, self.value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = torch.bmm(of_scores, self.key)
        of_key = torch.bmm(of_scores.transpose(1, 2), self.query)
        return Part(of_query, of_key, of_value, self.tokens)


@dataclass(frozen=True, slots=True)
class Tree:
    """A pack's queries, keys and values in their two parts."""

    prompt: Part
    branches: Part | None
    """None if no completion has an input (all are one token long)."""


def plant(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float) -> Tree:
    """Lay the pack's heads out for the two products.

    Args:
        query: [N, H, D].
        key: [N, Hkv, D].
        value: [N, Hkv, D].
        pack: the group's layout.
        scale: of the scores.
    """
    end = pack.prompt_tokens
    rows, longest = pack.grid.shape
    query = (query * scale).unflatten(1, (key.shape[1], -1))
    prompt_key, prompt_value = _fold_keys(key[:end][None]), _fold_keys(value[:end][None])
    prompt = Part(_fold_queries(query[:end][None]), prompt_key[:, 0], prompt_value[:, 0], end)
    if not longest:
        return Tree(prompt, None)

    def keys(trunk: Tensor, flat: Tensor) -> Tensor:
        own = _fold_keys(flat[pack.grid])
        return torch.cat([trunk.expand(-1, rows, -1, -1), own], dim=2).flatten(0, 1)

    branches = Part(_fold_queries(query[pack.grid]), keys(prompt_key, key), keys(prompt_value, value), longest)
    return Tree(prompt, branches)


def mix(tree: Tree, pack: Pack) -> Tensor:
    """[N, H * D] attended values."""
    mixed = _unfold_queries(tree.prompt.mix(), 1, pack.prompt_tokens)[0]
    if tree.branches is None:
        return mixed.flatten(1)
    rows, longest = pack.grid.shape
    branches = _unfold_queries(tree.branches.mix(), rows, longest)[pack.inside]
    return torch.cat([mixed, branches]).flatten(1)


def gradients(tree: Tree, pack: Pack, mixed: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query [N, H, D], key and value [N, Hkv, D] from that of `mix`, [N, H * D]."""
    end = pack.prompt_tokens
    rows, longest = pack.grid.shape
    kv_heads, _, width = tree.prompt.key.shape
    mixed = mixed.unflatten(-1, (kv_heads, -1, width))
    prompt = tree.prompt.gradients(_fold_queries(mixed[:end][None]))
    query = _unfold_queries(prompt.query, 1, end)[0]
    key, value = prompt.key.transpose(0, 1), prompt.value.transpose(0, 1)
    if tree.branches is not None:
        # On padding the incoming gradient must be nothing, whatever token stands there.
        incoming = mixed[pack.grid].mul_(pack.inside[:, :, None, None, None])
        branches = tree.branches.gradients(_fold_queries(incoming))
        query = torch.cat([query, _unfold_queries(branches.query, rows, longest)[pack.inside]])
        key, value = (
            _join(trunk, part.unflatten(0, (kv_heads, rows)), pack)
            for trunk, part in ((key, branches.key), (value, branches.value))
        )
    return query.flatten(1, 2).mul_(scale), key, value


def _join(trunk: Tensor, branches: Tensor, pack: Pack) -> Tensor:
    """[S0, Hkv, D] of the prompt's own part and [Hkv, R, S0 + T, D] of the completions', to [N, Hkv, D]."""
    end = pack.prompt_tokens
    shared = branches[:, :, :end].sum(dim=1).transpose(0, 1)
    own = branches[:, :, end:].permute(1, 2, 0, 3)[pack.inside]
    return torch.cat([trunk + shared, own])


def _fold_queries(x: Tensor) -> Tensor:
    """[rows, T, Hkv, G, D] to [Hkv * rows, G * T, D]."""
    return x.permute(2, 0, 3, 1, 4).reshape(x.shape[2] * x.shape[0], -1, x.shape[-1])


def _unfold_queries(x: Tensor, rows: int, tokens: int) -> Tensor:
    """[Hkv * rows, G * T, D] to [rows, T, Hkv, G, D]."""
    unfolded: Tensor = x.unflatten(0, (-1, rows)).unflatten(2, (-1, tokens))
    return unfolded.permute(1, 3, 0, 2, 4)


def _fold_keys(x: Tensor) -> Tensor:
    """[rows, T, Hkv, D] to [Hkv, rows, T, D]."""
    return x.permute(2, 0, 1, 3).contiguous()
