"""Prompts to completions: continuous batching over the fused decoder.

In: requests (a prompt, K, a seed). Out: completions in the order in which they end, each with the log-prob of every
token. A prompt is computed once, however many requests have it; a row retires when it stops and the next sample takes
its place. Knows no task, no reward and no adapter files. `refresh` after an optimiser step keeps rollouts on-policy.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder import Decoder
from greenloop.engine.cache import KVCache, PromptAttention, RowAttention
from greenloop.engine.request import Request, Sampling
from greenloop.engine.sampler import draw, uniforms
from greenloop.engine.stopping import Stopper
from greenloop.seeding import seed_for
from greenloop.types import Completion, Finish

CACHE_BYTES = 2**30
MOST_ROWS = 128
"""More rows gain little: at 128 the arithmetic outweighs the reading of the weights."""


@dataclass(slots=True)
class _Row:
    """A completion being decoded."""

    group: int
    sample: int
    slot: int
    uniform: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Slot:
    """A prompt with rows in flight or waiting."""

    token_ids: tuple[int, ...]
    logits: Tensor
    """[V] after the prompt's last token: every sample's first draw."""


class Engine:
    """Rollouts for the Llama/Qwen family on any device."""

    def __init__(self, decoder: Decoder, stopper: Stopper, *, rows: int = 0) -> None:
        """With at most `rows` completions decoded at a time; 0: as many as `CACHE_BYTES` hold, at most `MOST_ROWS`."""
        self.decoder = decoder
        self.stopper = stopper
        self.rows = rows
        self.decoder.pack(rows or MOST_ROWS)

    def refresh(self) -> None:
        """Take the adapter's present values."""
        self.decoder.refresh()
        self.decoder.pack(self.rows or MOST_ROWS)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Every request's completions, each as soon as it ends."""
        if requests:
            rows = self.rows or affordable_rows(self.decoder, requests, sampling)
            yield from _Batch(self.decoder, self.stopper, requests, sampling, rows).run()


def affordable_rows(decoder: Decoder, requests: Sequence[Request], sampling: Sampling) -> int:
    """How many completions may be in flight within `CACHE_BYTES`: a strip each, and the prompts that they may have."""
    wanted = _completions_of(requests)
    tokens = CACHE_BYTES // KVCache.bytes_per_token(decoder)
    longest = max(map(len, wanted))
    # With fewer rows than prompts each row may have a prompt of its own.
    own_prompts = tokens // (sampling.max_new_tokens + longest)
    shared = (tokens - len(wanted) * longest) // sampling.max_new_tokens
    return max(1, min(MOST_ROWS, max(own_prompts, shared)))


def _completions_of(requests: Sequence[Request]) -> Counter[tuple[int, ...]]:
    """How many completions of each prompt are wanted."""
    wanted: Counter[tuple[int, ...]] = Counter()
    for request in requests:
        wanted[request.token_ids] += request.samples
    return wanted


class _Batch:
    """The rows in flight of one call of `generate`."""

    def __init__(
        self, decoder: Decoder, stopper: Stopper, requests: Sequence[Request], sampling: Sampling, rows: int
    ) -> None:
        self.decoder, self.stopper, self.requests, self.sampling = decoder, stopper, requests, sampling
        self.ways = [request.sampling(sampling) for request in requests]
        self.unfinished = _completions_of(requests)
        # Requests of one prompt follow each other, so that no prompt holds a slot without a row.
        place = {token_ids: place for place, token_ids in enumerate(self.unfinished)}
        order = sorted(range(len(requests)), key=lambda group: place[requests[group].token_ids])
        self.waiting = deque((group, k) for group in order for k in range(requests[group].samples))
        self.capacity = min(rows, len(self.waiting))
        self.cache = KVCache(
            decoder,
            rows=self.capacity,
            slots=min(self.capacity, len(self.unfinished)),
            prompt_tokens=max(len(request.token_ids) for request in requests),
            new_tokens=sampling.max_new_tokens,
        )
        self.active: list[_Row] = []
        self.slots: list[_Slot] = []

    def run(self) -> Iterator[Completion]:
        """Decode until every sample has ended."""
        while self.waiting or self.active:
            yield from self._admit()
            if self.active:
                yield from self._advance(range(len(self.active)), self._decode())

    def _admit(self) -> Iterator[Completion]:
        """Fill free rows with waiting samples; their first token comes from the prompt's logits."""
        while self.waiting and len(self.active) < self.capacity:
            before = len(self.active)
            while self.waiting and len(self.active) < self.capacity:
                group, sample = self.waiting.popleft()
                slot = self._slot_of(self.requests[group].token_ids)
                seed = seed_for(self.requests[group].seed, sample)
                self.active.append(_Row(group, sample, slot, uniforms(seed, self.sampling.max_new_tokens)))
            admitted = range(before, len(self.active))
            logits = torch.stack([self.slots[self.active[row].slot].logits for row in admitted])
            yield from self._advance(admitted, logits)

    def _slot_of(self, token_ids: tuple[int, ...]) -> int:
        """The prompt's slot; a new prompt is computed into the next free one."""
        for index in reversed(range(len(self.slots))):
            if self.slots[index].token_ids == token_ids:
                return index
        index, length = len(self.slots), len(token_ids)
        positions = torch.arange(length, device=self.decoder.device)
        attend = PromptAttention(self.cache, index, length)
        hidden = self.decoder.forward(torch.tensor(token_ids, device=self.decoder.device), positions, attend)
        self.slots.append(_Slot(token_ids, self.decoder.logits(hidden[-1:])[0]))
        return index

    def _decode(self) -> Tensor:
        """[B, V] logits after the last token of every active row."""
        device = self.decoder.device
        own = torch.tensor([len(row.tokens) - 1 for row in self.active], device=device)
        row_slots = torch.tensor([row.slot for row in self.active], device=device)
        prompt = torch.tensor([len(slot.token_ids) for slot in self.slots], device=device)
        token_ids = torch.tensor([row.tokens[-1] for row in self.active], device=device)
        attend = RowAttention(self.cache, row_slots, prompt, own)
        return self.decoder.logits(self.decoder.forward(token_ids, prompt[row_slots] + own, attend))

    def _advance(self, rows: range, logits: Tensor) -> Iterator[Completion]:
        """Draw a token for each of `rows`; retire and yield those that end."""
        ended: list[tuple[int, Finish]] = []
        for row, (token, logprob) in zip(rows, self._drawn([self.active[row] for row in rows], logits), strict=True):
            state = self.active[row]
            state.tokens.append(token)
            state.logprobs.append(logprob)
            finish = self.stopper.finish(state.tokens, self.requests[state.group], self.sampling.max_new_tokens)
            if finish is not None:
                ended.append((row, finish))
        for row, finish in reversed(ended):
            yield self._retire(row, finish)

    def _drawn(self, rows: Sequence[_Row], logits: Tensor) -> Iterator[tuple[int, float]]:
        """The next token of each row and its log-prob."""
        uniform = torch.tensor([row.uniform[len(row.tokens)] for row in rows], dtype=torch.float64)
        ways = [self.ways[row.group] for row in rows]
        tokens, logprobs = torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows))
        for way in set(ways):
            index = torch.tensor([at for at, one in enumerate(ways) if one == way])
            chosen = logits if len(index) == len(rows) else logits[index.to(logits.device)]
            drawn = draw(chosen, uniform[index].to(logits.device), way)
            tokens[index], logprobs[index] = drawn.tokens.cpu(), drawn.logprobs.cpu()
        return zip(tokens.tolist(), logprobs.tolist(), strict=True)

    def _retire(self, index: int, finish: Finish) -> Completion:
        """Take a row out; the last one moves into its place."""
        row, last = self.active[index], self.active.pop()
        if row is not last:
            self.active[index] = last
            self.cache.move_row(len(self.active), index, len(last.tokens))
        request = self.requests[row.group]
        self.unfinished[request.token_ids] -= 1
        if not self.unfinished[request.token_ids]:
            self._free(row.slot)
        return Completion(
            group=row.group,
            sample=row.sample,
            token_ids=tuple(row.tokens),
            logprobs=tuple(row.logprobs),
            finish=finish,
            text=self.stopper.text(row.tokens, request.stop),
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
