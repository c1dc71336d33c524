"""One decode step of the rows in flight, in the two ways that suit a processor and a GPU.

In: the last token of every row and where it stands. Out: logits, or the next tokens. A processor gets shapes as small
as the step allows; a GPU gets shapes that never change, so that the whole step is one CUDA graph: launching its kernels
one by one takes longer than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from greenloop.decoder import Attend, Decoder
from greenloop.engine.cache import KVCache, PaddedPromptAttention, PromptAttention, RowAttention
from greenloop.engine.request import Sampling
from greenloop.engine.sampler import Drawn, draw

_LEAST_ROWS = 16
"""Fewer take as long."""
_ROUND_TOKENS = 64
"""Fixed shapes come in multiples of this, so that few sizes are captured and every mask is aligned."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """The active rows before a step."""

    tokens: Sequence[int]
    """[B] last token of each row."""
    own: Sequence[int]
    """[B] tokens of its own that stand in each row's strip."""
    slots: Sequence[int]
    """[B] slot of each row's prompt."""
    prompts: Sequence[int]
    """[slots in use] tokens of each prompt."""


class Steps(Protocol):
    """Computes decode steps over a cache."""

    cache: KVCache
    prefill_tokens: int
    """Prompts are computed together up to this many tokens."""

    def prompts(self, first_slot: int, lengths: list[int]) -> Attend:
        """The attention of prompts that stand one after another, for the slots from `first_slot` on."""
        ...

    def logits(self, rows: InFlight) -> Tensor:
        """[B, V] after the last token of every active row; valid until the next call."""
        ...

    def drawn(self, rows: InFlight, uniform: Sequence[float], sampling: Sampling) -> Drawn:
        """The next token of every active row, on the CPU; `uniform` as for `draw`."""
        ...


class FreeSteps:
    """Each step in its own shapes."""

    prefill_tokens = 2048

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder, self.cache = decoder, cache

    def prompts(self, first_slot: int, lengths: list[int]) -> Attend:
        """See `Steps`."""
        return PromptAttention(self.cache, first_slot, lengths)

    def logits(self, rows: InFlight) -> Tensor:
        """See `Steps`."""
        own, slots, prompts, tokens = (
            torch.tensor(values, device=self.decoder.device)
            for values in (rows.own, rows.slots, rows.prompts, rows.tokens)
        )
        attend = RowAttention(self.cache, slots, prompts, own)
        return self.decoder.logits(self.decoder.forward(tokens, prompts[slots] + own, attend))

    def drawn(self, rows: InFlight, uniform: Sequence[float], sampling: Sampling) -> Drawn:
        """See `Steps`."""
        logits = self.logits(rows)
        return draw(logits, torch.tensor(uniform, dtype=torch.float64, device=logits.device), sampling).cpu()


class FixedSteps:
    """Each step in one of a few shapes: a power of two of rows, 16 at least, over whole strips.

    On a CUDA device every shape is captured once. A graph keeps the addresses of what it read, so the cache outlives
    the calls that use it, and weights may change in place only (`FusedLinear.refresh` does).
    """

    prefill_tokens = 16384

    def __init__(self, decoder: Decoder, *, rows: int, slots: int, prompt_tokens: int, new_tokens: int) -> None:
        """Over a new cache of at least these sizes."""
        prompt_tokens, new_tokens = (-(-n // _ROUND_TOKENS) * _ROUND_TOKENS for n in (prompt_tokens, new_tokens))
        self.decoder, self.rows = decoder, rows
        self.cache = KVCache(
            decoder, rows=rows, slots=slots, prompt_tokens=prompt_tokens, new_tokens=new_tokens, whole=True
        )
        self.tokens = torch.zeros(2, rows, dtype=torch.int64, device=decoder.device)
        """Last token of each row, and its position."""
        self.uniform = torch.zeros(rows, dtype=torch.float64, device=decoder.device)
        self.angles = decoder.rotary(torch.arange(prompt_tokens + new_tokens, device=decoder.device))
        self._graphs: dict[tuple[int, Sampling | None], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None

    def prompts(self, first_slot: int, lengths: list[int]) -> Attend:
        """See `Steps`."""
        return PaddedPromptAttention(self.cache, first_slot, lengths)

    def logits(self, rows: InFlight) -> Tensor:
        """See `Steps`."""
        width = self._placed(rows)
        return self._computed(partial(self._logits, width), (width, None))[: len(rows.tokens)]

    def drawn(self, rows: InFlight, uniform: Sequence[float], sampling: Sampling) -> Drawn:
        """See `Steps`."""
        width = self._placed(rows)
        self.uniform[: len(uniform)] = torch.tensor(uniform, dtype=torch.float64)
        tokens, logprobs = self._computed(partial(self._drawn, width, sampling), (width, sampling)).cpu()
        count = len(rows.tokens)
        return Drawn(tokens[:count].long(), logprobs[:count].float())

    def _placed(self, rows: InFlight) -> int:
        """Hand the rows to the device; returns how many it computes.

        Rows beyond the active ones compute something that nobody reads, into strips that nobody has.
        """
        positions = [rows.prompts[slot] + own for slot, own in zip(rows.slots, rows.own, strict=True)]
        count = len(positions)
        width = min(self.rows, max(_LEAST_ROWS, 1 << (count - 1).bit_length()))
        idle = [0] * (width - count)
        self.tokens[:, :width] = torch.tensor([[*rows.tokens, *idle], [*positions, *idle]])
        return width

    def _computed(self, compute: Callable[[], Tensor], key: tuple[int, Sampling | None]) -> Tensor:
        if self._pool is None:
            return compute()
        if key not in self._graphs:
            # Libraries choose their kernels and take their workspaces at the first call, which no graph may hold.
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                compute()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = compute()
            self._graphs[key] = graph, result
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def _logits(self, width: int) -> Tensor:
        """[width, V]."""
        tokens, positions = self.tokens[:, :width]
        cos, sin = (angle[positions] for angle in self.angles)
        attend = FixedAttention(self.cache, positions)
        return self.decoder.logits(self.decoder.forward_at(tokens, cos, sin, attend))

    def _drawn(self, width: int, sampling: Sampling) -> Tensor:
        """[2, width] float64: tokens and log-probs, so that one copy brings both."""
        drawn = draw(self._logits(width), self.uniform[:width], sampling)
        return torch.stack([drawn.tokens.double(), drawn.logprobs.double()])


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
        beyond = torch.arange(cache.own_k.shape[3], device=positions.device) > positions[:, None]
        self.mask = torch.zeros(beyond.shape, dtype=cache.own_k.dtype, device=positions.device)
        self.mask = self.mask.masked_fill_(beyond, float("-inf"))[:, None, None]

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
