"""Keys and values of the rows in flight: one copy a prompt, one strip a completion.

A row is a completion being decoded, or several that are the same so far; a slot is one prompt that has rows in flight.
Active rows and slots are always the first ones (the last moves into a gap), so every product reads a plain slice. Knows
no tokens and no sampling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from greenloop.decoder import Decoder
from greenloop.decoder.kernels import Mixed, attend, joined
from greenloop.decoder.native import Strips, Targets


class KVCache:
    """Prompt keys/values [L, slots, Hkv, S, D] and the rows' strips [L, rows, Hkv, T, D].

    In a `whole` cache a strip begins with a copy of its prompt and has S + T places: more memory, and one product.
    """

    def __init__(
        self, decoder: Decoder, *, rows: int, slots: int, prompt_tokens: int, new_tokens: int, whole: bool = False
    ) -> None:
        layers, heads, width = len(decoder.layers), decoder.kv_heads, decoder.head_width
        strip = new_tokens + prompt_tokens if whole else new_tokens
        self.prompt_k = decoder.head.new_zeros(layers, slots, heads, prompt_tokens, width)
        self.prompt_v = torch.zeros_like(self.prompt_k)
        self.own_k = decoder.head.new_zeros(layers, rows, heads, strip, width)
        self.own_v = torch.zeros_like(self.own_k)
        self.sizes = {"rows": rows, "slots": slots, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        self.whole = whole
        self.scale = decoder.scale
        decoder.reserve(prompt_tokens + new_tokens)

    @staticmethod
    def bytes_per_token(decoder: Decoder) -> int:
        """Of one token's keys and values in all layers."""
        return 2 * len(decoder.layers) * decoder.kv_heads * decoder.head_width * decoder.head.element_size()

    @staticmethod
    def tokens_of(*, rows: int, slots: int, prompt_tokens: int, new_tokens: int) -> int:
        """Places for tokens in a whole cache of these sizes."""
        return rows * (prompt_tokens + new_tokens) + slots * prompt_tokens

    def keep_prompt(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Put a prompt's keys and values [Hkv, S, D] into a slot."""
        self.prompt_k[layer, slot, :, : k.shape[1]] = k
        self.prompt_v[layer, slot, :, : k.shape[1]] = v

    def begin_rows(self, first: int, slots: list[int]) -> None:
        """The rows from `first` on begin behind the prompts of `slots`."""
        if self.whole:
            chosen = torch.tensor(slots, device=self.own_k.device)
            rows, tokens = slice(first, first + len(slots)), self.sizes["prompt_tokens"]
            self.own_k[:, rows, :, :tokens] = self.prompt_k[:, chosen]
            self.own_v[:, rows, :, :tokens] = self.prompt_v[:, chosen]

    def move_slot(self, source: int, target: int) -> None:
        """Put a prompt's keys and values into another slot."""
        self.prompt_k[:, target] = self.prompt_k[:, source]
        self.prompt_v[:, target] = self.prompt_v[:, source]

    def copy_row(self, source: int, target: int, prompt: int, own: int) -> None:
        """Put the keys and values of a row, with so many tokens of its own behind its prompt, into another row."""
        length = prompt + own if self.whole else own
        self.own_k[:, target, :, :length] = self.own_k[:, source, :, :length]
        self.own_v[:, target, :, :length] = self.own_v[:, source, :, :length]


class BlockedCache:
    """The same for `native.Step`."""

    def __init__(self, decoder: Decoder, *, rows: int, slots: int, prompt_tokens: int, new_tokens: int) -> None:
        self.prompts = Strips.empty(decoder, slots, prompt_tokens)
        self.own = Strips.empty(decoder, rows, new_tokens)
        self.scale = decoder.scale
        decoder.reserve(prompt_tokens + new_tokens)

    def keep_prompt(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Put a prompt's keys and values [Hkv, S, D] into a slot."""
        self.prompts.keep(layer, k.transpose(0, 1), v.transpose(0, 1), Targets.of([range(k.shape[1])], slot))

    def begin_rows(self, first: int, slots: list[int]) -> None:
        """Nothing: a strip has its own tokens alone."""

    def move_slot(self, source: int, target: int) -> None:
        """Put a prompt's keys and values into another slot."""
        self.prompts.copy(source, target, self.prompts.places)

    def copy_row(self, source: int, target: int, prompt: int, own: int) -> None:
        """Put the keys and values of a row, with so many tokens of its own, into another row."""
        self.own.copy(source, target, own)


class PromptAttention:
    """Causal attention over prompts, one after another, that leaves the keys and values of each in a slot."""

    def __init__(self, cache: KVCache | BlockedCache, first_slot: int, lengths: list[int]) -> None:
        self.cache, self.first_slot, self.lengths = cache, first_slot, lengths

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `decoder.Attend`."""
        pieces = zip(q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
        return torch.cat([self._one(layer, self.first_slot + at, *piece) for at, piece in enumerate(pieces)])

    def _one(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        self.cache.keep_prompt(layer, slot, k, v)
        groups = q.shape[1] // k.shape[0]
        k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], is_causal=True, scale=self.cache.scale
        )
        return mixed[0].transpose(0, 1).flatten(1)


class PaddedPromptAttention:
    """`PromptAttention` in one padded product: a GPU waits for launches, a processor would compute the padding."""

    def __init__(self, cache: KVCache, first_slot: int, lengths: list[int]) -> None:
        self.cache, self.longest, device = cache, max(lengths), cache.own_k.device
        self.slots = slice(first_slot, first_slot + len(lengths))
        steps, counts = torch.arange(self.longest), torch.tensor(lengths)
        starts = counts.cumsum(0) - counts
        # Behind its end a prompt reads some token: causal attention hides it from the prompt's own.
        self.read = (starts[:, None] + steps).clamp_max_(int(counts.sum()) - 1).to(device)
        self.cells = (steps < counts[:, None]).flatten().nonzero().squeeze(1).to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `decoder.Attend`."""
        q, k, v = (x[self.read].transpose(1, 2) for x in (q, k, v))
        self.cache.prompt_k[layer, self.slots, :, : self.longest] = k
        self.cache.prompt_v[layer, self.slots, :, : self.longest] = v
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.cache.scale)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)[self.cells]


class RowAttention:
    """One decode step: every row attends to its prompt's slot and to its own strip, and the two are joined.

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
        self.index = torch.arange(self.rows, device=row_slots.device)
        self.longest_prompt, self.longest_own = int(prompt_lengths.max()), int(own_lengths.max()) + 1
        members = F.one_hot(row_slots, self.slots)
        rank = (members.cumsum(0) - members).gather(1, row_slots[:, None]).squeeze(1)
        self.width = int(rank.max()) + 1
        self.cell_of = row_slots * self.width + rank
        # Cells without a row compute the first row's attention over another prompt; nobody reads it.
        self.row_of = torch.zeros(self.slots * self.width, dtype=torch.int64, device=row_slots.device)
        self.row_of[self.cell_of] = self.index
        dtype = cache.own_k.dtype
        self.prompt_mask = _hidden_from(prompt_lengths, self.longest_prompt, dtype)
        self.own_mask = _hidden_from(own_lengths + 1, self.longest_own, dtype)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `decoder.Attend`."""
        cache, rows = self.cache, self.rows
        q = q.unflatten(1, (k.shape[1], -1))
        own_k, own_v = cache.own_k[layer], cache.own_v[layer]
        own_k[self.index, :, self.own_lengths] = k
        own_v[self.index, :, self.own_lengths] = v
        over_own = attend(
            q, own_k[:rows, :, : self.longest_own], own_v[:rows, :, : self.longest_own], self.own_mask, cache.scale
        )
        over_prompt = attend(
            self._to_slots(q),
            cache.prompt_k[layer, : self.slots, :, : self.longest_prompt],
            cache.prompt_v[layer, : self.slots, :, : self.longest_prompt],
            self.prompt_mask,
            cache.scale,
        )
        by_row = Mixed(self._to_rows(over_prompt.values), self._to_rows(over_prompt.log_total[..., None])[..., 0])
        return joined(by_row, over_own).reshape(rows, -1)

    def _to_slots(self, x: Tensor) -> Tensor:
        """[B, Hkv, G, X] to [slots, Hkv, width * G, X]."""
        grid: Tensor = x[self.row_of].unflatten(0, (self.slots, self.width))
        return grid.transpose(1, 2).flatten(2, 3)

    def _to_rows(self, x: Tensor) -> Tensor:
        """[slots, Hkv, width * G, X] to [B, Hkv, G, X]."""
        grid: Tensor = x.unflatten(2, (self.width, -1))
        return grid.transpose(1, 2).flatten(0, 1)[self.cell_of]


class FixedAttention:
    """`RowAttention` in fixed shapes: every row over its whole strip, its prompt included, the end masked."""

    def __init__(self, cache: KVCache, positions: Tensor) -> None:
        """Plan a step.

        Args:
            cache: a whole one.
            positions: [B] int64 of the rows' last tokens.
        """
        self.cache, self.positions, self.rows = cache, positions, len(positions)
        self.index = torch.arange(self.rows, device=positions.device)
        self.mask = _hidden_from(positions + 1, cache.own_k.shape[3], cache.own_k.dtype)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `decoder.Attend`."""
        keys, values = self.cache.own_k[layer], self.cache.own_v[layer]
        keys[self.index, :, self.positions] = k
        values[self.index, :, self.positions] = v
        # The query heads that share a KV head are folded into the query length.
        q = q.unflatten(1, (k.shape[1], -1))
        mask = self.mask.expand(-1, q.shape[1], q.shape[2], -1)
        mixed = F.scaled_dot_product_attention(
            q, keys[: self.rows], values[: self.rows], attn_mask=mask, scale=self.cache.scale
        )
        return mixed.flatten(1)


def _hidden_from(lengths: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """[n] lengths to a mask [n, 1, 1, longest]: 0 within, -inf beyond."""
    beyond = (torch.arange(longest, device=lengths.device)[None] >= lengths[:, None])[:, None, None]
    return torch.zeros(beyond.shape, dtype=dtype, device=lengths.device).masked_fill_(beyond, float("-inf"))
