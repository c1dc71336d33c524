"""How near each stage is to what this machine can do.

    GREENLOOP_DATA_DIR=... python -m bench.roofline

Measures the machine (best matrix product of the model's own shapes, best reading of memory), counts what each stage has
to compute and to read, and prints the share of that bound which the stage reaches: decoding over the rows in flight,
prefill, the reference's forward, the update. Writes `roofline.json` and `roofline.md` to `--out`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from bench.command import machine, parse, parser_of, save, work_of
from bench.counting import Cost, Sizes, group_pairs
from bench.side_greenloop import Side
from greenloop.decoder import Decoder
from greenloop.decoder.kernels import packed
from greenloop.engine.generate import Engine
from greenloop.engine.request import Request, Sampling
from greenloop.learn.improve import TokenGroup
from greenloop.learn.packing import pack
from greenloop.sandbox import SandboxVerifier
from greenloop.types import Completion

GROUP = 8
FIRST, LAST = 32, 64
"""Tokens of a completion between which decode steps are timed: before, completions of a prompt still are alike, and
what is alike is one row."""


@dataclass(frozen=True, slots=True)
class Row:
    """One stage at one size."""

    stage: str
    size: str
    seconds: float
    bound_s: float
    tokens_per_s: float

    @property
    def share(self) -> float:
        """Of the bound that is reached."""
        return self.bound_s / self.seconds


def seconds_of(action: Callable[[], Any], repeats: int = 3, *, best: bool = False) -> float:
    """Median (or least) seconds, after one call to warm up."""
    action()
    times = [_timed(action) for _ in range(repeats)]
    return min(times) if best else statistics.median(times)


def _timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def machine_limits(decoder: Decoder) -> tuple[float, float]:
    """The best FLOP/s of the model's own products at 2,048 rows, and the best bytes/s of reading 1 GiB.

    Twice the FLOP/s of float32 where products are rounded: an instruction has two in the place of one.
    """
    rates = []
    for weight in [decoder.head, *(fused.weight for fused in decoder.layers[0].linears)]:
        x = torch.randn(2048, weight.shape[1], dtype=decoder.dtype, device=decoder.device)
        laid_out = packed(weight, 2048)
        ways = [lambda x=x, w=weight: torch.nn.functional.linear(x, w)]
        if laid_out is not None:
            ways.append(partial(laid_out, x))
        rates += [2 * x.shape[0] * weight.numel() / seconds_of(way, 9, best=True) for way in ways]
    block = torch.ones(2**28, dtype=torch.float32, device=decoder.device)
    return max(rates) * (2 if decoder.rounds else 1), block.numel() * 4 / seconds_of(block.sum, 9, best=True)


def generated(side: Side, groups: int, samples: int, new_tokens: int) -> list[Completion]:
    """All completions of the first `groups` prompts, decoded together."""
    engine = Engine(side.policy.decoder, side.engine.stopper, rows=groups * samples)
    prompts = [prompt.token_ids for prompt in side.prompts[:groups]]
    requests = [Request(token_ids=ids, samples=samples, seed=seed) for seed, ids in enumerate(prompts)]
    return list(engine.generate(requests, Sampling(temperature=1.0, max_new_tokens=new_tokens)))


def decoding(side: Side, groups: int, samples: int) -> tuple[int, float, Cost]:
    """Rows that part before the clock starts, seconds of a step with them in flight, and what it has to do."""
    rows = len({(one.group, one.token_ids) for one in generated(side, groups, samples, FIRST)})
    until = [seconds_of(partial(generated, side, groups, samples, tokens + 1)) for tokens in (FIRST, LAST)]
    prompt = statistics.mean(len(prompt.token_ids) for prompt in side.prompts[:groups])
    cost = Sizes.of(side.policy.decoder).decode_step(rows, groups, prompt, (FIRST + LAST + 1) / 2)
    return rows, (until[1] - until[0]) / (LAST - FIRST), cost


def group_of(side: Side, new_tokens: int) -> TokenGroup:
    """A packed group of fixed tokens."""
    ids = side.prompts[0].token_ids
    completions = tuple(tuple(100 + (7 * k + t) % 1000 for t in range(new_tokens)) for k in range(GROUP))
    return TokenGroup(
        prompt=ids,
        completions=completions,
        sampler_logprobs=tuple((0.0,) * new_tokens for _ in completions),
        truncated=(False,) * GROUP,
    )


def measure(side: Side, rows: Sequence[int], new_tokens: int) -> tuple[list[Row], dict[str, float]]:
    """All stages."""
    sizes = Sizes.of(side.policy.decoder)
    flops_per_s, bytes_per_s = machine_limits(side.policy.decoder)
    table = []

    def add(stage: str, size: str, seconds: float, cost: Cost, tokens: int) -> None:
        row = Row(stage, size, seconds, cost.seconds(flops_per_s, bytes_per_s), tokens / seconds)
        table.append(row)
        print(f"{stage}, {size}: {seconds:.3f} s, {row.share:.0%} of the roofline", flush=True)

    for count in rows:
        apart, seconds, cost = decoding(side, -(-count // GROUP), min(count, GROUP))
        add("decode step", f"{apart} rows", seconds, cost, apart)
    prompt = len(side.prompts[0].token_ids)
    prompt_pairs = prompt * (prompt + 1) / 2
    prefill_s = seconds_of(lambda: generated(side, 1, 1, 1))
    add("prefill", f"{prompt} tokens", prefill_s, sizes.forward(prompt, 1, prompt_pairs), prompt)
    group = group_of(side, new_tokens)
    inputs, trained = prompt + GROUP * (new_tokens - 1), GROUP * new_tokens
    pairs = group_pairs(prompt, GROUP, new_tokens)
    packs = [pack(group.prompt, group.completions, range(GROUP))]
    size = f"{GROUP} x {new_tokens} tokens behind {prompt}"
    reference_s = seconds_of(lambda: side.policy.reference_logprobs(packs))
    add("reference", size, reference_s, sizes.forward(inputs, trained, pairs, adapted=False), trained)
    rewards = torch.tensor([[float(k % 2) for k in range(GROUP)]])
    update_s = seconds_of(lambda: side.improver.improve([group], rewards))
    add("update", size, update_s, sizes.update(inputs, trained, pairs), trained)
    return table, {"flops_per_s": flops_per_s, "bytes_per_s": bytes_per_s}


def markdown(table: Sequence[Row], limits: dict[str, float]) -> str:
    """For people."""
    lines = [
        f"Machine: {limits['flops_per_s'] / 1e9:.0f} GFLOP/s, {limits['bytes_per_s'] / 1e9:.0f} GB/s.",
        "",
        "| stage | size | measured | bound | share | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in table:
        times = f"{1e3 * row.seconds:.0f} ms | {1e3 * row.bound_s:.0f} ms"
        lines.append(f"| {row.stage} | {row.size} | {times} | {row.share:.0%} | {row.tokens_per_s:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument(
        "--new-tokens", type=int, default=100, help="of the completions of the reference and the update"
    )
    options = parse(parser)
    if any(rows < 1 or (rows > GROUP and rows % GROUP) for rows in options.rows):
        parser.error(f"--rows: {options.rows}; take 1 to {GROUP}, the size of a group, or multiples of it")
    work = work_of(options, prompts=1, samples=GROUP, beta=0.0)
    with SandboxVerifier() as verifier:
        table, limits = measure(Side(work, verifier), options.rows, options.new_tokens)
    record = {"machine": {**machine(), **limits}, "rows": [{**asdict(row), "share": row.share} for row in table]}
    save(options.out, "roofline", record, markdown(table, limits))
    print(markdown(table, limits))


if __name__ == "__main__":
    main()
