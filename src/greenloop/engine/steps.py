"""One decode step of the rows in flight, in the two ways that suit a processor and a GPU.

In: the last token of every row and where it stands. Out: logits. A CPU gets shapes as small as the step allows; a GPU
gets shapes that never change, so that the whole step is one CUDA graph: launching its kernels one by one takes longer
than they do. Knows no sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from greenloop.decoder import Decoder
from greenloop.engine.cache import KVCache, RowAttention

_ROUND_TOKENS = 64
"""Fixed shapes come in multiples of this, so that few sizes are captured and every mask is aligned."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """The active rows before a step."""

    tokens: Sequence[int]
    """[B] last token of each row."""
    own: Sequence[int]
    """[B] tokens in each row's strip."""
    slots: Sequence[int]
    """[B] slot of each row's prompt."""
    prompts: Sequence[int]
    """[slots in use] tokens of each prompt."""


class Steps(Protocol):
    """Computes decode steps over a cache."""

    cache: KVCache

    def logits(self, rows: InFlight) -> Tensor:
        """[B, V] after the last token of every active row; valid until the next call."""
        ...


class FreeSteps:
    """Each step in its own shapes."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder, self.cache = decoder, cache

    def logits(self, rows: InFlight) -> Tensor:
        """See `Steps`."""
        own, slots, prompts, tokens = (
            torch.tensor(values, device=self.decoder.device)
            for values in (rows.own, rows.slots, rows.prompts, rows.tokens)
        )
        attend = RowAttention(self.cache, slots, prompts, own)
        return self.decoder.logits(self.decoder.forward(tokens, prompts[slots] + own, attend))


class FixedSteps:
    """Each step in one of a few shapes: a power of two of rows over whole prompts and whole strips.

    On a CUDA device every shape is captured once. A graph keeps the addresses of what it read, so the cache outlives
    the calls that use it, and weights may change in place only (`FusedLinear.refresh` does).
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder, self.cache = decoder, cache
        device = decoder.device
        self.state = torch.zeros(3 * cache.rows + cache.slots, dtype=torch.int64, device=device)
        self.angles = decoder.rotary(torch.arange(cache.prompt_tokens + cache.new_tokens, device=device))
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @staticmethod
    def sized(decoder: Decoder, *, rows: int, slots: int, prompt_tokens: int, new_tokens: int) -> FixedSteps:
        """Over a new cache of at least these sizes."""
        prompt_tokens, new_tokens = (-(-n // _ROUND_TOKENS) * _ROUND_TOKENS for n in (prompt_tokens, new_tokens))
        cache = KVCache(decoder, rows=rows, slots=slots, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        return FixedSteps(decoder, cache)

    def logits(self, rows: InFlight) -> Tensor:
        """See `Steps`."""
        count, most = len(rows.tokens), self.cache.rows
        state = torch.zeros(self.state.shape, dtype=torch.int64)
        for at, values in ((0, rows.tokens), (most, rows.own), (2 * most, rows.slots), (3 * most, rows.prompts)):
            state[at : at + len(values)] = torch.tensor(values)
        self.state.copy_(state)
        # Rows beyond the active ones compute something that nobody reads, into strips that nobody has.
        width = min(most, 1 << (count - 1).bit_length())
        logits = self._compute(width) if self._pool is None else self._replayed(width)
        return logits[:count]

    def _replayed(self, width: int) -> Tensor:
        if width not in self._graphs:
            # Libraries choose their kernels and take their workspaces at the first call, which no graph may hold.
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                self._compute(width)
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                logits = self._compute(width)
            self._graphs[width] = graph, logits
        graph, logits = self._graphs[width]
        graph.replay()
        return logits

    def _compute(self, width: int) -> Tensor:
        """[width, V] from `state`."""
        most = self.cache.rows
        tokens, own, slots = (self.state[at : at + width] for at in (0, most, 2 * most))
        prompts = self.state[3 * most :][slots]
        positions = prompts + own
        attend = FixedAttention(self.cache, slots, prompts, own)
        cos, sin = (angle[positions] for angle in self.angles)
        return self.decoder.logits(self.decoder.forward_at(tokens, cos, sin, attend))


class FixedAttention:
    """`RowAttention` in fixed shapes: every row over its whole prompt slot and its whole strip, ends masked."""

    def __init__(self, cache: KVCache, slots: Tensor, prompts: Tensor, own: Tensor) -> None:
        """Plan a step.

        Args:
            cache: holds the keys and values.
            slots: [B] int64 slot of each row.
            prompts: [B] int64 tokens of each row's prompt.
            own: [B] int64 tokens in each row's strip before this step.
        """
        self.cache, self.slots, self.own = cache, slots, own
        self.rows = len(slots)
        self.index = torch.arange(self.rows, device=slots.device)
        in_prompt = torch.arange(cache.prompt_tokens, device=slots.device) < prompts[:, None]
        in_own = torch.arange(cache.new_tokens, device=slots.device) <= own[:, None]
        hidden = torch.cat([in_prompt, in_own], dim=1).logical_not_()[:, None, None]
        self.mask = torch.zeros(hidden.shape, dtype=cache.own_k.dtype, device=slots.device)
        self.mask.masked_fill_(hidden, float("-inf"))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `decoder.Attend`."""
        cache = self.cache
        # The query heads that share a KV head are folded into the query length.
        q = q.unflatten(1, (k.shape[1], -1))
        keys = self._stored(cache.prompt_k[layer], cache.own_k[layer], k)
        values = self._stored(cache.prompt_v[layer], cache.own_v[layer], v)
        mask = self.mask.expand(-1, q.shape[1], q.shape[2], -1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=cache.scale).flatten(1)

    def _stored(self, prompts: Tensor, strips: Tensor, new: Tensor) -> Tensor:
        """[B, Hkv, S + T, D] after the `new` [B, Hkv, D] was stored."""
        strips[self.index, :, self.own] = new
        return torch.cat([prompts.index_select(0, self.slots), strips[: self.rows]], dim=2)
