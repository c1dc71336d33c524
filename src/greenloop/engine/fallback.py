"""Rollouts through transformers' own forward, for every causal LM that the fused decoder does not know.

Slower, behind the same protocol: one group at a time, its prompt computed once and its cache repeated; rows that ended
are dropped from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from greenloop.engine.request import Request, Sampling
from greenloop.engine.sampler import draw, uniforms
from greenloop.engine.stopping import Stopper
from greenloop.seeding import seed_for
from greenloop.types import Completion


class TransformersEngine:
    """A `Generator` over any transformers causal LM."""

    def __init__(self, model: Any, stopper: Stopper) -> None:
        self.model, self.stopper = model, stopper

    def refresh(self) -> None:
        """Nothing to do: the model itself decodes."""

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Every request's completions, group after group, each as soon as it ends."""
        training = self.model.training
        self.model.eval()
        try:
            for group, request in enumerate(requests):
                yield from self._group(group, request, request.sampling(sampling))
        finally:
            self.model.train(training)

    def _group(self, group: int, request: Request, sampling: Sampling) -> Iterator[Completion]:
        device = next(self.model.parameters()).device
        prompt = torch.tensor([request.token_ids], device=device)
        cache: Any = DynamicCache(config=self.model.config)
        output = self.model(input_ids=prompt, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(request.samples)
        logits: Tensor = output.logits[:, -1].expand(request.samples, -1)
        samples = list(range(request.samples))
        randoms = {k: uniforms(seed_for(request.seed, k), sampling.max_new_tokens) for k in samples}
        tokens: dict[int, list[int]] = {k: [] for k in samples}
        logprobs: dict[int, list[float]] = {k: [] for k in samples}
        for step in range(sampling.max_new_tokens):
            uniform = torch.tensor([randoms[k][step] for k in samples], dtype=torch.float64, device=device)
            drawn = draw(logits, uniform, sampling)
            kept: list[int] = []
            for row, (k, token, logprob) in enumerate(
                zip(samples, drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True)
            ):
                tokens[k].append(token)
                logprobs[k].append(logprob)
                finish = self.stopper.finish(tokens[k], request, sampling.max_new_tokens)
                if finish is None:
                    kept.append(row)
                    continue
                yield Completion(
                    group=group,
                    sample=k,
                    token_ids=tuple(tokens[k]),
                    logprobs=tuple(logprobs[k]),
                    finish=finish,
                    text=self.stopper.text(tokens[k], request.stop),
                )
            if not kept:
                return
            if len(kept) < len(samples):
                cache.batch_select_indices(torch.tensor(kept, device=device))
                samples = [samples[row] for row in kept]
            last = torch.tensor([[tokens[k][-1]] for k in samples], device=device)
            logits = self.model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1]
