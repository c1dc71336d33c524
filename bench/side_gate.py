"""One version of greenloop at small fixed work, for the regression gate: decoding, an update, verdicts.

The version is the one that PYTHONPATH names. GREENLOOP_GATE_SLOWDOWN=1.3 makes every stage take 1.3 times as long, to
see the gate fail.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import greenloop
from bench.side import Reports, wait_for_go
from greenloop.engine.generate import Engine
from greenloop.engine.request import Request, Sampling
from greenloop.engine.stopping import Stopper
from greenloop.learn.improve import Improver, TokenGroup
from greenloop.learn.optimise import make_optimizer, make_scheduler
from greenloop.learn.policy import Policy, adapt
from greenloop.recipe import LoraSection, OptimizerSection, RlooSection
from greenloop.sandbox import SandboxVerifier
from greenloop.tuning import prepare_process
from greenloop.types import Task

PROMPT, ROWS, NEW_TOKENS, GROUPS, PROGRAMS = 96, 32, 12, 2, 60
TASK = Task(task_id="t", statement="", entry_point="f", tests=("assert f(1) == 2", "assert f(2) == 3"))


def main() -> None:
    """Serve rounds: seconds of each stage."""
    reports = Reports()
    prepare_process()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=4096, tie_word_embeddings=True,
    )  # fmt: skip
    policy = Policy(adapt(LlamaForCausalLM(config).eval(), LoraSection(), 0, "random"), temperature=1.0)
    tokenizer: Any = SimpleNamespace(decode=lambda *args, **kwargs: "")
    engine = Engine(policy.decoder, Stopper(tokenizer, frozenset()))
    section = OptimizerSection()
    optimizer = make_optimizer(policy.parameters, section)
    scheduler = make_scheduler(optimizer, section, 1000)
    improver = Improver(policy, optimizer, scheduler, RlooSection(), beta=0.05, max_grad_norm=1.0)
    requests = [
        Request(token_ids=tuple(range(group, PROMPT + group)), samples=ROWS // GROUPS, seed=group)
        for group in range(GROUPS)
    ]
    sampling = Sampling(max_new_tokens=NEW_TOKENS)

    def groups() -> list[TokenGroup]:
        rows = sorted(engine.generate(requests, sampling), key=lambda row: (row.group, row.sample))
        return [
            TokenGroup(
                prompt=request.token_ids,
                completions=tuple(row.token_ids for row in rows if row.group == index),
                sampler_logprobs=tuple(row.logprobs for row in rows if row.group == index),
                truncated=(False,) * request.samples,
            )
            for index, request in enumerate(requests)
        ]

    rewards = torch.arange(ROWS).view(GROUPS, -1) % 2.0
    with SandboxVerifier() as verifier:

        def verdicts() -> None:
            for verdict in [verifier.submit(TASK, "def f(x): return x + 1") for _ in range(PROGRAMS)]:
                verdict.result()

        def update() -> None:
            improver.improve(batch, rewards)
            engine.refresh()

        batch = groups()
        stages: dict[str, Callable[[], Any]] = {
            "decode": groups,
            "update": update,
            "judge": verdicts,
        }
        reports.say(ready=True, source=str(Path(greenloop.__file__).parents[1]))
        while True:
            wait_for_go()
            reports.say(seconds={name: seconds_of(action) for name, action in stages.items()})


def seconds_of(action: Callable[[], Any]) -> float:
    """How long it takes, with the slowdown that was asked for."""
    started = time.perf_counter()
    action()
    taken = time.perf_counter() - started
    extra = taken * (float(os.environ.get("GREENLOOP_GATE_SLOWDOWN", "1")) - 1)
    time.sleep(extra)
    return taken + extra


if __name__ == "__main__":
    main()
