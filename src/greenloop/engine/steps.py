"""One decode step of the rows in flight, in the ways that suit a processor and a GPU.

In: the last token of every row and where it stands. Out: the next tokens. A processor gets shapes as small as the step
allows, in native code where that can be made; a GPU gets shapes that never change, so that the whole step is one CUDA
graph: launching its kernels one by one takes longer than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from greenloop.decoder import Attend, Decoder
from greenloop.decoder.native import Step, Targets, reads
from greenloop.decoder.native.attention import Segments
from greenloop.decoder.traces import Traces
from greenloop.engine.cache import (
    BlockedCache,
    FixedAttention,
    KVCache,
    PaddedPromptAttention,
    PromptAttention,
    RowAttention,
)
from greenloop.engine.request import Sampling
from greenloop.engine.sampler import Drawn, draw, draw_each
from greenloop.tree import Segment, grow, size

_LEAST_ROWS = 16
"""Fewer take as long."""
_ROUND_TOKENS = 64
"""Fixed shapes come in multiples of this, so that few sizes are captured and every mask is aligned."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """The active rows before a step."""

    completions: Sequence[Sequence[int]]
    """[B] each row's tokens behind its prompt; the last is not in its strip yet."""
    slots: Sequence[int]
    """[B] slot of each row's prompt."""
    prompts: Sequence[tuple[int, ...]]
    """[slots in use] the prompts."""

    @property
    def tokens(self) -> list[int]:
        """[B] last token of each row."""
        return [completion[-1] for completion in self.completions]

    @property
    def own(self) -> list[int]:
        """[B] tokens of its own that stand in each row's strip."""
        return [len(completion) - 1 for completion in self.completions]

    @property
    def lengths(self) -> list[int]:
        """[slots in use] tokens of each prompt."""
        return list(map(len, self.prompts))


@dataclass(frozen=True, slots=True)
class Draws:
    """The tokens to be drawn after a step."""

    uniform: Sequence[float]
    """[n] in [0, 1)."""
    ways: Sequence[Sampling]
    """[n]."""
    rows: Sequence[int]
    """[n] the row that each follows, in order."""


class Steps(Protocol):
    """Computes decode steps over a cache."""

    @property
    def cache(self) -> KVCache | BlockedCache:
        """Where the rows' keys and values are."""
        ...

    def together(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether these prompts are worth one forward."""
        ...

    def prefill(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute prompts into the slots from `first_slot` on; the logits [P, V] after each."""
        ...

    @property
    def shares(self) -> bool:
        """Whether completions that are the same so far are computed as one row."""
        ...

    def drawn(self, rows: InFlight, draws: Draws) -> Drawn:
        """The tokens that follow the active rows."""
        ...


class FreeSteps:
    """Each step in its own shapes."""

    prefill_tokens = 2048
    shares = True

    def __init__(self, decoder: Decoder, cache: KVCache | BlockedCache) -> None:
        self.decoder, self.cache = decoder, cache

    def together(self, prompts: Sequence[Sequence[int]]) -> bool:
        """See `Steps`."""
        return sum(map(len, prompts)) <= self.prefill_tokens

    def prefill(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Steps`."""
        return _prefilled(self.decoder, prompts, PromptAttention(self.cache, first_slot, list(map(len, prompts))))

    def drawn(self, rows: InFlight, draws: Draws) -> Drawn:
        """See `Steps`."""
        own, slots, prompts, tokens = (
            torch.tensor(values, device=self.decoder.device)
            for values in (rows.own, rows.slots, rows.lengths, rows.tokens)
        )
        assert isinstance(self.cache, KVCache)
        attend = RowAttention(self.cache, slots, prompts, own)
        logits = self.decoder.logits(self.decoder.forward(tokens, prompts[slots] + own, attend))
        return draw_each(logits, draws.uniform, draws.ways, draws.rows)


class NativeSteps(FreeSteps):
    """Each step as one call into native code; prompts as a tree where it reads the weights, else as `FreeSteps`."""

    def __init__(self, decoder: Decoder, cache: BlockedCache) -> None:
        super().__init__(decoder, cache)
        self._step, self._prompts = Step(decoder, cache), cache.prompts
        self._grows = reads(decoder.head)

    def together(self, prompts: Sequence[Sequence[int]]) -> bool:
        """See `Steps`."""
        if not self._grows:
            return super().together(prompts)
        return size(prompts) <= self.prefill_tokens

    def prefill(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Steps`. What prompts begin with in common is computed once."""
        if not self._grows:
            return super().prefill(first_slot, prompts)
        tree = grow(prompts)
        keep = partial(self._prompts.keep, targets=Targets.of(tree.places, first_slot))
        decoder = self.decoder
        segments = Segments.of([[Segment(0, 0), *tree.segments]])
        traces = self._traces
        first = None if traces is None else traces.prompts(list(map(tuple, prompts)), tree.places, len(tree.tokens))
        hidden = decoder.forward_tree(torch.tensor(tree.tokens), torch.tensor(tree.depths), segments, keep, first)
        return decoder.logits(decoder.norm(hidden[[places[-1] for places in tree.places]]))

    def drawn(self, rows: InFlight, draws: Draws) -> Drawn:
        """See `Steps`."""
        traces = self._traces
        prompts = [rows.prompts[slot] for slot in rows.slots]
        kept = None if traces is None else traces.addresses(prompts, rows.completions)
        logits = self._step.logits(rows.tokens, rows.own, rows.slots, rows.lengths, kept)
        return draw_each(logits, draws.uniform, draws.ways, draws.rows)

    @property
    def _traces(self) -> Traces | None:
        """If what is computed now is to be kept."""
        traces = self.decoder.traces
        return traces if traces is not None and traces.recording and self._grows else None


class FixedSteps:
    """Each step in one of a few shapes: all rows, or a power of two of them that is 16 at least, over whole strips.

    On a CUDA device every shape is captured once. A graph keeps the addresses of what it read, so the cache outlives
    the calls that use it, and weights may change in place only (`FusedLinear.refresh` does).
    """

    prefill_tokens = 16384
    shares = False
    """A step takes as long with a row less."""

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
        on_gpu = decoder.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._stream = torch.cuda.Stream(decoder.device) if on_gpu else None

    def together(self, prompts: Sequence[Sequence[int]]) -> bool:
        """See `Steps`. They are padded to the longest."""
        return len(prompts) * max(map(len, prompts)) <= self.prefill_tokens

    def prefill(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Steps`."""
        return _prefilled(self.decoder, prompts, PaddedPromptAttention(self.cache, first_slot, list(map(len, prompts))))

    def drawn(self, rows: InFlight, draws: Draws) -> Drawn:
        """See `Steps`. If all rows have the same way, the draw is in the graph too."""
        ways, count, width = draws.ways, len(rows.completions), self._placed(rows)
        if len(set(ways)) > 1:
            logits = self._computed(partial(self._logits, width), (width, None))
            return draw_each(logits[:count], draws.uniform, ways, draws.rows)
        self.uniform[:count] = torch.tensor(draws.uniform, dtype=torch.float64)
        # What a draw does not read must not make another graph.
        way = Sampling(temperature=0.0) if ways[0].greedy else replace(ways[0], max_new_tokens=1)
        tokens, logprobs = self._computed(partial(self._drawn, width, way), (width, way)).cpu()
        return Drawn(tokens[:count].long(), logprobs[:count].float())

    def _placed(self, rows: InFlight) -> int:
        """Hand the rows to the device; returns how many it computes.

        Rows beyond the active ones compute something that nobody reads, into strips that nobody has.
        """
        positions = [len(rows.prompts[slot]) + own for slot, own in zip(rows.slots, rows.own, strict=True)]
        count = len(positions)
        width = min(self.rows, max(_LEAST_ROWS, 1 << (count - 1).bit_length()))
        idle = [0] * (width - count)
        self.tokens[:, :width] = torch.tensor([[*rows.tokens, *idle], [*positions, *idle]])
        return width

    def _computed(self, compute: Callable[[], Tensor], key: tuple[int, Sampling | None]) -> Tensor:
        if self._stream is None:
            return compute()
        # A graph records the current device's stream.
        with torch.cuda.device(self.decoder.device):
            if key not in self._graphs:
                self._graphs[key] = self._captured(compute, self._stream)
            graph, result = self._graphs[key]
            graph.replay()
        return result

    def _captured(
        self, compute: Callable[[], Tensor], stream: torch.cuda.Stream
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Libraries choose kernels and take a workspace for the stream at the first call; no graph may hold that.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            result = compute()
        return graph, result

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


def _prefilled(decoder: Decoder, prompts: Sequence[Sequence[int]], attend: Attend) -> Tensor:
    """[P, V] logits after prompts that stand one after another in one forward."""
    device, lengths = decoder.device, list(map(len, prompts))
    token_ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    ends = torch.tensor(lengths).cumsum(0) - 1
    return decoder.logits(decoder.forward(token_ids, positions, attend)[ends.to(device)])
