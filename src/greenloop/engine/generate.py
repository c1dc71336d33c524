"""Prompts to completions: continuous batching over the fused decoder.

In: requests (a prompt, K, a seed). Out: completions in the order in which they end, each with the log-prob of every
token. A prompt is computed once, however many requests have it, and so are the tokens with which its completions begin
alike; a row retires when its completions stop, and the next samples take their place. Knows no task, no reward and no
adapter files. `refresh` after an optimiser step keeps rollouts on-policy.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder import Decoder
from greenloop.decoder.native import Strips
from greenloop.engine.cache import BlockedCache, KVCache
from greenloop.engine.request import Request, Sampling
from greenloop.engine.sampler import Drawn, draw_each, uniforms
from greenloop.engine.steps import Draws, FixedSteps, FreeSteps, InFlight, NativeSteps, Steps
from greenloop.engine.stopping import Stopper
from greenloop.seeding import seed_for
from greenloop.types import Completion, Finish

CACHE_BYTES = 2**30
MOST_ROWS = 128
"""More rows gain little: at 128 the arithmetic outweighs the reading of the weights."""
CUDA_SHARE = 1 / 8
"""Of a card's free memory, for keys and values."""
CUDA_MOST_ROWS = 512
ENOUGH_ROWS, CUDA_ENOUGH_ROWS = 32, 256
"""Rows from which on a token costs about as little with more of them."""
_MANY = 0.75
"""Of the rows that the shorter half of the prompts would have."""
_TOGETHER, _PORTION = 8, 0.25
"""Rows that must be free before others take their place, and the share of all rows that this is at most: prompts
computed together take less time."""


@dataclass(slots=True)
class _Sample:
    """A completion being decoded."""

    group: int
    sample: int
    uniform: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Row:
    """Completions that are the same so far."""

    slot: int
    samples: list[_Sample]

    @property
    def tokens(self) -> list[int]:
        """So far."""
        return self.samples[0].tokens


@dataclass(slots=True)
class _Slot:
    """A prompt with rows in flight or waiting."""

    token_ids: tuple[int, ...]
    logits: Tensor
    """[V] after the prompt's last token: every sample's first draw."""


class Engine:
    """Rollouts for the Llama/Qwen family on any device."""

    def __init__(self, decoder: Decoder, stopper: Stopper, *, rows: int = 0, fixed: bool | None = None) -> None:
        """Ready to generate.

        Args:
            decoder: the model.
            stopper: its end tokens.
            rows: completions decoded at a time at most; 0 takes as many as the memory for keys and values holds.
            fixed: decode in fixed shapes (`steps.FixedSteps`); None does so on a GPU.
        """
        self.decoder = decoder
        self.stopper = stopper
        self.rows = rows
        self.fixed = decoder.device.type == "cuda" if fixed is None else fixed
        self._idle: FixedSteps | None = None
        self.memory, self.most_rows, self.enough_rows = CACHE_BYTES, MOST_ROWS, ENOUGH_ROWS
        if decoder.device.type == "cuda":
            free: int = torch.cuda.mem_get_info(decoder.device)[0]
            self.memory, self.most_rows = int(CUDA_SHARE * free), CUDA_MOST_ROWS
            self.enough_rows = CUDA_ENOUGH_ROWS

    def refresh(self) -> None:
        """Take the adapter's present values. Calls of `generate` that are not finished may mix them with the old."""
        self.decoder.refresh()

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Every request's completions, each as soon as it ends; those of far longer prompts come last."""
        for groups, rows in self._waves(requests, sampling):
            yield from self._generated(requests, groups, rows, sampling)

    def _waves(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[list[int], int]]:
        """The requests' indices in parts that are decoded one after another, each with its rows.

        Every row has space for the longest prompt of its part, so a few long prompts would leave memory for a few rows
        alone. They wait for the others where those have far more rows without them.
        """
        left = [group for group, request in enumerate(requests) if request.samples]
        while left:
            lengths = sorted(len(requests[group].token_ids) for group in left)
            half = _upto(lengths[len(lengths) // 2], requests, left)
            enough = min(self.enough_rows, _MANY * self._rows(requests, half, sampling))
            parts = (_upto(length, requests, left) for length in sorted(set(lengths), reverse=True))
            sized = ((part, self._rows(requests, part, sampling)) for part in parts)
            wave, rows = next((part, rows) for part, rows in sized if rows >= enough)
            yield wave, rows
            left = sorted(set(left) - set(wave))

    def _rows(self, requests: Sequence[Request], groups: Sequence[int], sampling: Sampling) -> int:
        """Rows that the requests at these indices can use and may have."""
        chosen = [requests[group] for group in groups]
        most = self.rows or affordable_rows(
            self.decoder, chosen, sampling, memory=self.memory, most=self.most_rows, whole=self.fixed
        )
        return min(most, _completions_of(chosen).total())

    def _generated(
        self, requests: Sequence[Request], groups: Sequence[int], rows: int, sampling: Sampling
    ) -> Iterator[Completion]:
        """The completions of the requests at these indices."""
        wanted = _completions_of([requests[group] for group in groups])
        self.decoder.pack(rows)
        steps = self._steps(
            rows=rows,
            slots=min(rows, len(wanted)),
            prompt_tokens=max(map(len, wanted)),
            new_tokens=sampling.max_new_tokens,
        )
        try:
            yield from _Batch(self.decoder, self.stopper, requests, groups, sampling, steps, rows).run()
        finally:
            if isinstance(steps, FixedSteps):
                self._idle = steps

    def _steps(self, **sizes: int) -> Steps:
        """Steps over a cache of at least these sizes; fixed ones outlive the call and grow, within the memory."""
        if not self.fixed and self.decoder.native_for(sizes["rows"]):
            return NativeSteps(self.decoder, BlockedCache(self.decoder, **sizes))
        if not self.fixed:
            return FreeSteps(self.decoder, KVCache(self.decoder, **sizes, whole=False))
        # Taken out: a second call beside an unfinished one gets a cache of its own.
        idle, self._idle = self._idle, None
        if idle is not None:
            had = idle.cache.sizes
            if all(had[name] >= size for name, size in sizes.items()):
                return idle
            grown = {name: max(had[name], size) for name, size in sizes.items()}
            if KVCache.tokens_of(**grown) * KVCache.bytes_per_token(self.decoder) <= self.memory:
                sizes = grown
            del idle
        return FixedSteps(self.decoder, **sizes)


def affordable_rows(
    decoder: Decoder,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    memory: int = CACHE_BYTES,
    most: int = MOST_ROWS,
    whole: bool = False,
) -> int:
    """How many completions may be in flight within the memory for keys and values.

    Args:
        decoder: the model.
        requests: what is wanted.
        sampling: how long a completion may become.
        memory: bytes.
        most: rows that are worth their memory.
        whole: a row has its prompt in its strip too.
    """
    wanted = _completions_of(requests)
    longest = max(map(len, wanted))
    strip = sampling.max_new_tokens + (longest if whole else 0)

    def within(token_bytes: int) -> int:
        tokens = memory // token_bytes
        # With fewer rows than prompts each row may have a prompt of its own.
        own_prompts = tokens // (strip + longest)
        shared = (tokens - len(wanted) * longest) // strip
        return max(1, min(most, max(own_prompts, shared)))

    rows = within(KVCache.bytes_per_token(decoder))
    native = not whole and decoder.native_for(min(rows, wanted.total()))
    return within(Strips.bytes_per_token(decoder)) if native else rows


def _upto(length: int, requests: Sequence[Request], groups: Sequence[int]) -> list[int]:
    """Of these indices those whose prompts are no longer."""
    return [group for group in groups if len(requests[group].token_ids) <= length]


def _completions_of(requests: Sequence[Request]) -> Counter[tuple[int, ...]]:
    """How many completions of each prompt are wanted."""
    wanted: Counter[tuple[int, ...]] = Counter()
    for request in requests:
        wanted[request.token_ids] += request.samples
    return wanted


class _Batch:
    """The rows in flight of some requests of one call of `generate`, which have `capacity` samples at most."""

    def __init__(
        self,
        decoder: Decoder,
        stopper: Stopper,
        requests: Sequence[Request],
        groups: Sequence[int],
        sampling: Sampling,
        steps: Steps,
        capacity: int,
    ) -> None:
        self.decoder, self.stopper, self.requests, self.sampling = decoder, stopper, requests, sampling
        self.steps, self.cache, self.capacity = steps, steps.cache, capacity
        self.ways = [request.sampling(sampling) for request in requests]
        self.unfinished = _completions_of([requests[group] for group in groups])
        # Requests of one prompt follow each other, so that no prompt holds a slot without a row.
        place = {token_ids: place for place, token_ids in enumerate(self.unfinished)}
        order = sorted(groups, key=lambda group: place[requests[group].token_ids])
        self.waiting = deque((group, k) for group in order for k in range(requests[group].samples))
        self.active: list[_Row] = []
        self.slots: list[_Slot] = []

    def run(self) -> Iterator[Completion]:
        """Decode until every sample has ended."""
        while self.waiting or self.active:
            yield from self._admit()
            if self.active:
                yield from self._advance(range(len(self.active)), self._decoded())

    def _admit(self) -> Iterator[Completion]:
        """Fill what is free with waiting samples; their first token comes from the prompt's logits."""
        while free := min(self.capacity - sum(len(row.samples) for row in self.active), len(self.waiting)):
            if self.active and free < min(_TOGETHER, _PORTION * self.capacity, len(self.waiting)):
                break
            before = len(self.active)
            admitted = [self.waiting.popleft() for _ in range(free)]
            slots = self._slots_of([self.requests[group].token_ids for group, _ in admitted])
            for (group, sample), slot in zip(admitted, slots, strict=True):
                seed = seed_for(self.requests[group].seed, sample)
                one = _Sample(group, sample, uniforms(seed, self.sampling.max_new_tokens))
                if self.steps.shares and len(self.active) > before and self.active[-1].slot == slot:
                    self.active[-1].samples.append(one)
                else:
                    self.active.append(_Row(slot, [one]))
            fresh = self.active[before:]
            self.cache.begin_rows(before, [row.slot for row in fresh])
            logits = torch.stack([self.slots[row.slot].logits for row in fresh])
            draws = self._draws(fresh)
            drawn = draw_each(logits, draws.uniform, draws.ways, draws.rows)
            yield from self._advance(range(before, len(self.active)), drawn)

    def _slots_of(self, prompts: Sequence[tuple[int, ...]]) -> list[int]:
        """Each prompt's slot; new prompts are computed into the next free ones."""
        known = {slot.token_ids: index for index, slot in enumerate(self.slots)}
        together: list[tuple[int, ...]] = []
        for token_ids in dict.fromkeys(prompts):
            if token_ids in known:
                continue
            if together and not self.steps.together([*together, token_ids]):
                self._prefill(together)
                together = []
            known[token_ids] = len(self.slots) + len(together)
            together.append(token_ids)
        if together:
            self._prefill(together)
        return [known[token_ids] for token_ids in prompts]

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Compute prompts into the next free slots, in one forward."""
        self.slots.extend(map(_Slot, prompts, self.steps.prefill(len(self.slots), prompts)))

    def _decoded(self) -> Drawn:
        """The next token of every sample in flight."""
        rows = InFlight(
            completions=[row.tokens for row in self.active],
            slots=[row.slot for row in self.active],
            prompts=[slot.token_ids for slot in self.slots],
        )
        return self.steps.drawn(rows, self._draws(self.active))

    def _draws(self, rows: Sequence[_Row]) -> Draws:
        """How the next token of every sample of these rows is drawn."""
        samples = [(number, one) for number, row in enumerate(rows) for one in row.samples]
        return Draws(
            uniform=[float(one.uniform[len(one.tokens)]) for _, one in samples],
            ways=[self.ways[one.group] for _, one in samples],
            rows=[number for number, _ in samples],
        )

    def _advance(self, rows: range, drawn: Drawn) -> Iterator[Completion]:
        """Give each sample of `rows` its token; part those that differ from now on, yield those that end."""
        pairs = iter(zip(drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True))
        ended: list[tuple[_Sample, Finish]] = []
        for number in rows:
            row = self.active[number]
            branches: dict[int, list[_Sample]] = {}
            for one in row.samples:
                token, logprob = next(pairs)
                one.tokens.append(token)
                one.logprobs.append(logprob)
                finish = self.stopper.finish(one.tokens, self.requests[one.group], self.sampling.max_new_tokens)
                if finish is None:
                    branches.setdefault(token, []).append(one)
                else:
                    ended.append((one, finish))
            row.samples, *others = branches.values() or ([],)
            for samples in others:
                self.active.append(_Row(row.slot, samples))
                self._copy(number, len(self.active) - 1)
        for number in reversed(rows):
            if not self.active[number].samples:
                self._retire(number)
        for one, finish in ended:
            yield self._ended(one, finish)

    def _copy(self, source: int, target: int) -> None:
        """Bring keys and values into the place of a row that is entered there already."""
        row = self.active[target]
        self.cache.copy_row(source, target, len(self.slots[row.slot].token_ids), len(row.tokens))

    def _retire(self, index: int) -> None:
        """Take a row without samples out; the last one moves into its place."""
        last = self.active.pop()
        if index < len(self.active):
            self.active[index] = last
            self._copy(len(self.active), index)

    def _ended(self, one: _Sample, finish: Finish) -> Completion:
        """A sample's completion; its prompt's slot is free after the last."""
        request = self.requests[one.group]
        self.unfinished[request.token_ids] -= 1
        if not self.unfinished[request.token_ids]:
            self._free([slot.token_ids for slot in self.slots].index(request.token_ids))
        return Completion(
            group=one.group,
            sample=one.sample,
            token_ids=tuple(one.tokens),
            logprobs=tuple(one.logprobs),
            finish=finish,
            text=self.stopper.text(one.tokens, request.stop),
        )

    def _free(self, index: int) -> None:
        """Drop a slot; the last one moves into its place."""
        last = self.slots.pop()
        if index == len(self.slots):
            return
        self.slots[index] = last
        self.cache.move_slot(len(self.slots), index)
        for row in self.active:
            if row.slot == len(self.slots):
                row.slot = index
