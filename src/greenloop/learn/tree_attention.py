"""Attention for packed groups, forward and backward, as pure functions.

The prompt attends causally to itself; each completion attends to the whole prompt and causally to itself; siblings do
not see each other. Both parts are one dense product each (a completion's keys are the prompt's, then its own), so
nothing is spent on sibling pairs. Several groups share the two products, padded to their longest: a GPU takes all of a
forward's groups together, a processor each by itself, without padding. The query heads of one KV head are folded into
the query length, so keys are never repeated for them. The weights are computed again in the backward pass instead of
being kept: what is kept grows with the tokens (padding included), not with their pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from greenloop.learn.packing import Pack


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sequences that stand somewhere among N tokens, as the rows of a padded table, and what their queries may see."""

    tokens: Tensor
    """[rows, T] int64: index into N, 0 on padding."""
    at: Tensor
    """[n] int64: index into N of every token that is no padding, row after row."""
    cells: Tensor
    """[n] int64: its cell, counted along the rows."""
    inside: Tensor | None
    """[rows, T] bool, false on padding; None if there is none."""
    mask: Tensor
    """See `Part`."""

    @classmethod
    def of(cls, starts: Sequence[int], lengths: Sequence[int], mask: Tensor) -> Grid:
        """Rows of `lengths` tokens from `starts` on, where the mask is."""
        steps = torch.arange(max(lengths))
        inside = steps < torch.tensor(lengths)[:, None]
        tokens = (torch.tensor(starts)[:, None] + steps).mul_(inside)
        cells = inside.flatten().nonzero().squeeze(1)
        padded = len(cells) < inside.numel()
        device = mask.device
        return cls(
            tokens=tokens.to(device),
            at=tokens.flatten()[cells].to(device),
            cells=cells.to(device),
            inside=inside.to(device) if padded else None,
            mask=mask,
        )

    def read(self, flat: Tensor) -> Tensor:
        """[N, ...] to [rows, T, ...]; on padding stands some token."""
        return flat[self.tokens]

    def read_gradient(self, flat: Tensor) -> Tensor:
        """The same with zeros on padding: nothing may flow back from there."""
        found = self.read(flat)
        if self.inside is not None:
            found.mul_(self.inside.view(*self.inside.shape, *(1 for _ in found.shape[2:])))
        return found

    def write(self, table: Tensor, flat: Tensor) -> None:
        """[rows, T, ...] into its places of [N, ...]."""
        flat[self.at] = table.flatten(0, 1)[self.cells]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where P groups and their R completions stand among N tokens."""

    prompts: Grid
    branches: Grid | None
    """None if no completion has an input (all are one token long)."""
    home: Tensor
    """[R] int64: whose completion it is."""

    @classmethod
    def of(cls, packs: Sequence[Pack], offset: int = 0, *, queries: int, like: Tensor) -> Layout:
        """Of packs that stand one after another.

        Args:
            packs: of the groups.
            offset: among the N tokens, of the first.
            queries: G, query heads a KV head.
            like: has the dtype and the device of the queries.
        """
        prompt_starts, starts, lengths, home = [], [], [], []
        for group, pack in enumerate(packs):
            prompt_starts.append(offset)
            offset += pack.prompt_tokens
            for inputs in pack.inputs:
                starts.append(offset)
                lengths.append(inputs)
                home.append(group)
                offset += inputs
        prompt_lengths = [pack.prompt_tokens for pack in packs]
        longest = max(prompt_lengths)
        prompts = Grid.of(prompt_starts, prompt_lengths, _mask(longest, like.new_zeros(1, 0), queries))
        homes = torch.tensor(home, device=like.device)
        before = like.new_zeros(1, longest)
        if prompts.inside is not None:
            before = like.new_zeros(prompts.inside.shape).masked_fill_(~prompts.inside, float("-inf"))[homes]
        branches = Grid.of(starts, lengths, _mask(max(lengths), before, queries)) if any(lengths) else None
        return cls(prompts=prompts, branches=branches, home=homes)


def _mask(tokens: int, before: Tensor, queries: int) -> Tensor:
    """[G * T, S] or [rows, G * T, S] for rows of `tokens` keys of their own, causal, behind others.

    Args:
        tokens: T.
        before: [1, S - T] or [rows, S - T] of those others: 0, or -inf where they are hidden.
        queries: G.
    """
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=before.device).triu_(1)
    own = before.new_zeros(tokens, tokens).masked_fill_(later, float("-inf"))
    rows = len(before)
    mask = torch.cat([before[:, None].expand(-1, tokens, -1), own.expand(rows, -1, -1)], dim=2).repeat(1, queries, 1)
    return mask if rows > 1 else mask[0]


@dataclass(frozen=True, slots=True)
class Part:
    """Queries over their keys: the prompts (P rows), or all completions (R rows)."""

    query: Tensor
    """[Hkv * rows, G * T, D], scaled."""
    key: Tensor
    """[Hkv * rows, S, D]; the last T keys are the queries' own."""
    value: Tensor
    """[Hkv * rows, S, D]."""
    tokens: int
    """T, padding included."""
    mask: Tensor
    """[G * T, S] or [rows, G * T, S] in the query's dtype: 0, or -inf where a query must not see a key."""

    def weights(self) -> Tensor:
        """[Hkv * rows, G * T, S] softmax over the keys that each query may see."""
        scores = torch.bmm(self.query, self.key.transpose(1, 2))
        by_row = scores.unflatten(0, (-1, self._rows))
        # Where all rows have the same mask it hides nothing but keys of the queries' own.
        last = self.mask.shape[-1] if self._rows > 1 else self.tokens
        by_row[..., -last:].add_(self.mask[..., -last:])
        return scores.softmax(dim=-1)

    def mix(self) -> Tensor:
        """[Hkv * rows, G * T, D].

        By the kernel that keeps scores in float32, as the sampler's does: their rounding to bfloat16 made a quarter of
        the difference between the two.
        """
        query, key, value = (x.unflatten(0, (-1, self._rows)) for x in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=1.0).flatten(0, 1)

    @property
    def _rows(self) -> int:
        """Of the mask; 1 if all rows have the same."""
        return len(self.mask) if self.mask.dim() > 2 else 1

    def gradients(self, mixed: Tensor) -> Part:
        """Gradients of query, key and value from that of `mix()`."""
        weights = self.weights()
        of_value = torch.bmm(weights.transpose(1, 2), mixed)
        of_weights = torch.bmm(mixed, self.value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = torch.bmm(of_scores, self.key)
        of_key = torch.bmm(of_scores.transpose(1, 2), self.query)
        return Part(of_query, of_key, of_value, self.tokens, self.mask)


@dataclass(frozen=True, slots=True)
class Tree:
    """The queries, keys and values of a layout in their two parts."""

    prompt: Part
    branches: Part | None
    """As in the layout."""


def plant(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tree:
    """Lay the heads out for the two products.

    Args:
        query: [N, H, D].
        key: [N, Hkv, D].
        value: [N, Hkv, D].
        layout: which of the N tokens, and how.
        scale: of the scores.
    """
    prompts, branches = layout.prompts, layout.branches
    query = (query * scale).unflatten(1, (key.shape[1], -1))
    prompt_key, prompt_value = _fold_keys(prompts.read(key)), _fold_keys(prompts.read(value))
    prompt = Part(
        _fold_queries(prompts.read(query)),
        prompt_key.flatten(0, 1),
        prompt_value.flatten(0, 1),
        prompts.tokens.shape[1],
        prompts.mask,
    )
    if branches is None:
        return Tree(prompt, None)

    def keys(trunk: Tensor, flat: Tensor) -> Tensor:
        own = _fold_keys(branches.read(flat))
        shared = trunk.expand(-1, own.shape[1], -1, -1) if trunk.shape[1] == 1 else trunk[:, layout.home]
        return torch.cat([shared, own], dim=2).flatten(0, 1)

    longest = branches.tokens.shape[1]
    own_query = _fold_queries(branches.read(query))
    return Tree(prompt, Part(own_query, keys(prompt_key, key), keys(prompt_value, value), longest, branches.mask))


def mix(tree: Tree, layout: Layout, out: Tensor) -> None:
    """Write the attended values into their places of `out`, [N, H * D]."""
    heads = out.unflatten(-1, (len(tree.prompt.key) // len(layout.prompts.tokens), -1, tree.prompt.key.shape[-1]))
    layout.prompts.write(_unfold_queries(tree.prompt.mix(), *layout.prompts.tokens.shape), heads)
    if tree.branches is not None and layout.branches is not None:
        layout.branches.write(_unfold_queries(tree.branches.mix(), *layout.branches.tokens.shape), heads)


def gradients(tree: Tree, layout: Layout, mixed: Tensor, scale: float, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Write the gradients of query [N, H, D], key and value [N, Hkv, D] into `out`.

    Args:
        tree: of the forward.
        layout: of the forward.
        mixed: [N, H * D] the gradient of the attended values.
        scale: of the forward.
        out: the three, of which the layout's tokens are written.
    """
    query, key, value = out
    kv_heads, width = key.shape[1:]
    mixed = mixed.unflatten(-1, (kv_heads, -1, width))
    query = query.unflatten(1, (kv_heads, -1))
    prompts, branches = layout.prompts, layout.branches
    prompt = tree.prompt.gradients(_fold_queries(prompts.read_gradient(mixed)))
    prompts.write(_unfold_queries(prompt.query, *prompts.tokens.shape).mul_(scale), query)
    trunks = [part.unflatten(0, (kv_heads, -1)) for part in (prompt.key, prompt.value)]
    if tree.branches is not None and branches is not None:
        part = tree.branches.gradients(_fold_queries(branches.read_gradient(mixed)))
        branches.write(_unfold_queries(part.query, *branches.tokens.shape).mul_(scale), query)
        for trunk, found, flat in zip(trunks, (part.key, part.value), (key, value), strict=True):
            by_row = found.unflatten(0, (kv_heads, -1))
            shared, own = by_row[:, :, : trunk.shape[2]], by_row[:, :, trunk.shape[2] :]
            if trunk.shape[1] == 1:
                trunk += shared.sum(dim=1, keepdim=True)
            else:
                # Summed in float32 like the other sum, in which a row's share does not round those before it.
                trunk.copy_(trunk.float().index_add_(1, layout.home, shared.float()))
            branches.write(_unfold_keys(own), flat)
    for trunk, flat in zip(trunks, (key, value), strict=True):
        prompts.write(_unfold_keys(trunk), flat)


def _fold_queries(x: Tensor) -> Tensor:
    """[rows, T, Hkv, G, D] to [Hkv * rows, G * T, D]."""
    return x.permute(2, 0, 3, 1, 4).reshape(x.shape[2] * x.shape[0], -1, x.shape[-1])


def _unfold_keys(x: Tensor) -> Tensor:
    """[Hkv, rows, T, D] to [rows, T, Hkv, D]."""
    return x.permute(1, 2, 0, 3)


def _unfold_queries(x: Tensor, rows: int, tokens: int) -> Tensor:
    """[Hkv * rows, G * T, D] to [rows, T, Hkv, G, D]."""
    unfolded: Tensor = x.unflatten(0, (-1, rows)).unflatten(2, (-1, tokens))
    return unfolded.permute(1, 3, 0, 2, 4)


def _fold_keys(x: Tensor) -> Tensor:
    """[rows, T, Hkv, D] to [Hkv, rows, T, D]."""
    return x.permute(2, 0, 1, 3).contiguous()
