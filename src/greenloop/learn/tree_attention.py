"""Attention for packed groups, forward and backward, as pure functions.

The prompt attends causally to itself; each segment behind it attends to all on its way to the root and causally to
itself; siblings do not see each other. Both parts are one dense product each (a segment's keys are those before it,
then its own), padded to the longest; nothing is spent on sibling pairs. A GPU takes all of a forward's groups together,
a processor each by itself, with less padding. The query heads of one KV head are folded into the query length, so keys
are never repeated for them. The weights are computed again in the backward pass instead of being kept: what is kept
grows with the tokens (padding included), not with their pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from greenloop.learn.packing import Pack


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sequences that stand somewhere among N tokens, as the rows of a padded table."""

    tokens: Tensor
    """[rows, T] int64: index into N, 0 on padding."""
    at: Tensor
    """[n] int64: index into N of every token that is no padding, row after row."""
    cells: Tensor
    """[n] int64: its cell, counted along the rows."""
    inside: Tensor | None
    """[rows, T] bool, false on padding; None if there is none."""

    @classmethod
    def of(cls, rows: Sequence[Tensor], device: torch.device) -> Grid:
        """Of rows that hold the tokens at these indices."""
        lengths = torch.tensor([len(row) for row in rows])
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        padded = bool((~inside).any())
        return cls(
            tokens=tokens.to(device),
            at=tokens[inside].to(device),
            cells=inside.flatten().nonzero().squeeze(1).to(device),
            inside=inside.to(device) if padded else None,
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

    def add(self, table: Tensor, flat: Tensor) -> None:
        """[rows, T, ...] to what stands in its places of [N, ...]; a token may stand in several rows."""
        flat.index_add_(0, self.at, table.flatten(0, 1)[self.cells].to(flat.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Segments that attend in one product."""

    own: Grid
    before: Grid | None
    """The tokens before each segment's own, from the root on; None if there are none."""
    mask: Tensor
    """See `Part`."""

    @classmethod
    def of(cls, own: Sequence[Tensor], before: Sequence[Tensor], *, queries: int, like: Tensor) -> Reads:
        """Of segments of one kind, as indices of tokens; see `Layout.of`."""
        ours = Grid.of(own, like.device)
        theirs = Grid.of(before, like.device) if any(map(len, before)) else None
        hidden = like.new_zeros(1, 0 if theirs is None else theirs.tokens.shape[1])
        if theirs is not None and theirs.inside is not None:
            hidden = like.new_zeros(theirs.inside.shape).masked_fill_(~theirs.inside, float("-inf"))
        return cls(own=ours, before=theirs, mask=_mask(ours.tokens.shape[1], hidden, queries))

    def keys(self, flat: Tensor) -> Tensor:
        """[N, Hkv, D] to [Hkv * rows, S, D]: those before, then their own."""
        own = self.own.read(flat)
        both = own if self.before is None else torch.cat([self.before.read(flat), own], dim=1)
        return both.permute(2, 0, 1, 3).flatten(0, 1)

    def add(self, found: Tensor, flat: Tensor) -> None:
        """The gradient of `keys(flat)` to that of `flat`."""
        by_row = found.unflatten(0, (-1, len(self.own.tokens))).permute(1, 2, 0, 3)
        ours = self.own.tokens.shape[1]
        if self.before is not None:
            self.before.add(by_row[:, :-ours], flat)
        self.own.add(by_row[:, -ours:], flat)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where P groups and the segments behind their prompts stand among N tokens."""

    prompts: Reads
    branches: Reads | None
    """None if no completion has an input (all are one token long)."""

    @classmethod
    def of(cls, packs: Sequence[Pack], offset: int = 0, *, queries: int, like: Tensor) -> Layout:
        """Of packs that stand one after another.

        Args:
            packs: of the groups.
            offset: among the N tokens, of the first.
            queries: G, query heads a KV head.
            like: has the dtype and the device of the queries.
        """
        prompts: list[Tensor] = []
        branches: list[Tensor] = []
        before: list[Tensor] = []
        for pack in packs:
            own: list[Tensor] = []
            ways: list[Tensor] = []
            for segment in pack.segments:
                own.append(torch.arange(offset, offset + segment.tokens))
                # Before the root itself there is nothing.
                ways.append(torch.cat([ways[segment.parent], own[segment.parent]]) if ways else own[0][:0])
                offset += segment.tokens
            prompts.append(own[0])
            branches.extend(own[1:])
            before.extend(ways[1:])
        reads = partial(Reads.of, queries=queries, like=like)
        return cls(
            reads(prompts, [prompt[:0] for prompt in prompts]),
            reads(branches, before) if branches else None,
        )

    @property
    def parts(self) -> list[Reads]:
        """Both, or the one."""
        return [self.prompts] if self.branches is None else [self.prompts, self.branches]


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
    """Queries over their keys: the prompts (P rows), or all segments behind them."""

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


def plant(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> list[Part]:
    """Lay the heads out for the products, one each of the layout's parts.

    Args:
        query: [N, H, D].
        key: [N, Hkv, D].
        value: [N, Hkv, D].
        layout: which of the N tokens, and how.
        scale: of the scores.
    """
    query = (query * scale).unflatten(1, (key.shape[1], -1))
    return [
        Part(
            _fold_queries(reads.own.read(query)),
            reads.keys(key),
            reads.keys(value),
            reads.own.tokens.shape[1],
            reads.mask,
        )
        for reads in layout.parts
    ]


def mix(tree: Sequence[Part], layout: Layout, out: Tensor) -> None:
    """Write the attended values into their places of `out`, [N, H * D]."""
    for part, reads in zip(tree, layout.parts, strict=True):
        rows = reads.own.tokens.shape
        heads = out.unflatten(-1, (len(part.key) // rows[0], -1, part.key.shape[-1]))
        reads.own.write(_unfold_queries(part.mix(), *rows), heads)


def gradients(
    tree: Sequence[Part], layout: Layout, mixed: Tensor, scale: float, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """The gradients of query [N, H, D], key and value [N, Hkv, D].

    Args:
        tree: of the forward.
        layout: of the forward.
        mixed: [N, H * D] the gradient of the attended values.
        scale: of the forward.
        out: where the first is written, and the others, in float32, are added to.
    """
    query, key, value = out
    mixed = mixed.unflatten(-1, (key.shape[1], -1, key.shape[2]))
    query = query.unflatten(1, (key.shape[1], -1))
    for part, reads in zip(tree, layout.parts, strict=True):
        found = part.gradients(_fold_queries(reads.own.read_gradient(mixed)))
        reads.own.write(_unfold_queries(found.query, *reads.own.tokens.shape).mul_(scale), query)
        reads.add(found.key, key)
        reads.add(found.value, value)


def _fold_queries(x: Tensor) -> Tensor:
    """[rows, T, Hkv, G, D] to [Hkv * rows, G * T, D]."""
    return x.permute(2, 0, 3, 1, 4).reshape(x.shape[2] * x.shape[0], -1, x.shape[-1])


def _unfold_queries(x: Tensor, rows: int, tokens: int) -> Tensor:
    """[Hkv * rows, G * T, D] to [rows, T, Hkv, G, D]."""
    unfolded: Tensor = x.unflatten(0, (-1, rows)).unflatten(2, (-1, tokens))
    return unfolded.permute(1, 3, 0, 2, 4)
