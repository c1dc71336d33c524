"""Keys and values of the rows in flight: one copy a prompt, one strip a completion.

A row is one completion being decoded; a slot is one prompt with rows in flight. Active rows and slots are always the
first ones (the last moves into a gap), so every product reads a plain slice. Knows no tokens and no sampling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from greenloop.engine.decoder import Decoder


class KVCache:
    """Prompt keys/values [L, slots, Hkv, S, D] and completion keys/values [L, rows, Hkv, T, D]."""

    def __init__(self, decoder: Decoder, *, rows: int, slots: int, prompt_tokens: int, new_tokens: int) -> None:
        layers, heads, width = len(decoder.layers), decoder.kv_heads, decoder.head_width
        self.prompt_k = decoder.head.new_zeros(layers, slots, heads, prompt_tokens, width)
        self.prompt_v = torch.zeros_like(self.prompt_k)
        self.own_k = decoder.head.new_zeros(layers, rows, heads, new_tokens, width)
        self.own_v = torch.zeros_like(self.own_k)
        self.scale = width**-0.5

    def move_slot(self, source: int, target: int) -> None:
        """Put a prompt's keys and values into another slot."""
        self.prompt_k[:, target] = self.prompt_k[:, source]
        self.prompt_v[:, target] = self.prompt_v[:, source]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Put the first `length` of a row's keys and values into another row."""
        self.own_k[:, target, :, :length] = self.own_k[:, source, :, :length]
        self.own_v[:, target, :, :length] = self.own_v[:, source, :, :length]


class PromptAttention:
    """Causal attention over one prompt that leaves its keys and values in a slot."""

    def __init__(self, cache: KVCache, slot: int, tokens: int) -> None:
        self.cache, self.slot, self.tokens = cache, slot, tokens

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `decoder.Attend`."""
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        self.cache.prompt_k[layer, self.slot, :, : self.tokens] = k
        self.cache.prompt_v[layer, self.slot, :, : self.tokens] = v
        groups = q.shape[1] // k.shape[0]
        k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], is_causal=True, scale=self.cache.scale
        )
        return mixed[0].transpose(0, 1).flatten(1)


class RowAttention:
    """One decode step: every row attends to its prompt's slot and to its own strip.

    The query heads that share a KV head are folded into the query length, and so are the rows that share a prompt: its
    keys are read once for all of them.
    """

    def __init__(self, cache: KVCache, row_slots: Tensor, prompt_lengths: Tensor, own_lengths: Tensor) -> None:
        """Plan a step.

        Args:
            cache: holds the keys and values.
            row_slots: [B] int64 slot of each row.
            prompt_lengths: [slots in use] int64.
            own_lengths: [B] int64 tokens in each row's strip before this step.
        """
        self.cache = cache
        self.rows, self.slots = row_slots.shape[0], prompt_lengths.shape[0]
        self.own_lengths = own_lengths
        self.longest_prompt, self.longest_own = int(prompt_lengths.max()), int(own_lengths.max()) + 1
        device = row_slots.device
        members = F.one_hot(row_slots, self.slots)
        rank = (members.cumsum(0) - members).gather(1, row_slots[:, None]).squeeze(1)
        self.width = int(rank.max()) + 1
        self.cell = row_slots * self.width + rank
        own = torch.arange(self.longest_own, device=device)[None] > own_lengths[:, None]
        prompt = (torch.arange(self.longest_prompt, device=device)[None] >= prompt_lengths[:, None])[row_slots]
        hidden = torch.cat([prompt, own], dim=1)
        self.mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))[:, None, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `decoder.Attend`."""
        rows, heads, head_width = self.rows, k.shape[1], k.shape[2]
        fold = q.shape[1] // heads
        index = torch.arange(rows, device=q.device)
        own_k, own_v = self.cache.own_k[layer], self.cache.own_v[layer]
        own_k[index, :, self.own_lengths] = k
        own_v[index, :, self.own_lengths] = v
        own_k, own_v = own_k[:rows, :, : self.longest_own], own_v[:rows, :, : self.longest_own]
        prompt_k = self.cache.prompt_k[layer, : self.slots, :, : self.longest_prompt]
        prompt_v = self.cache.prompt_v[layer, : self.slots, :, : self.longest_prompt]

        q = q.view(rows, heads, fold, head_width)
        over_prompt = self._to_rows(self._to_slots(q) @ prompt_k.transpose(-1, -2), fold)
        over_own = q @ own_k.transpose(-1, -2)
        scores = torch.cat([over_prompt, over_own], dim=-1).float().mul_(self.cache.scale).add_(self.mask)
        weights = scores.softmax(dim=-1).to(q.dtype)
        mixed = self._to_rows(self._to_slots(weights[..., : self.longest_prompt]) @ prompt_v, fold)
        mixed = mixed + weights[..., self.longest_prompt :] @ own_v
        return mixed.reshape(rows, -1)

    def _to_slots(self, x: Tensor) -> Tensor:
        """[B, Hkv, G, X] to [slots, Hkv, width * G, X]; empty cells are 0."""
        cells = x.new_zeros(self.slots * self.width, *x.shape[1:])
        cells[self.cell] = x
        grid = cells.view(self.slots, self.width, *x.shape[1:]).transpose(1, 2)
        return grid.reshape(self.slots, x.shape[1], self.width * x.shape[2], x.shape[3])

    def _to_rows(self, x: Tensor, fold: int) -> Tensor:
        """[slots, Hkv, width * G, X] to [B, Hkv, G, X]."""
        grid: Tensor = x.unflatten(2, (self.width, fold)).transpose(1, 2)
        return grid.reshape(self.slots * self.width, *grid.shape[2:])[self.cell]
