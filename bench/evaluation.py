"""How long an evaluation takes, end to end, beside `transformers.generate` and llama.cpp with their best batch sizes.

    GREENLOOP_DATA_DIR=... python -m bench.evaluation --tasks mbpp:test --batch 8 16 32 --llama-rows 16 32

All sides get the same model, prompts and limit, answer greedily and have their answers judged by the same judge.
Transformers' is `generate` over left-padded batches of prompts of like length, once for each `--batch`, judged after
each batch as its users do; llama.cpp's is its batched decoding of the packaged file's own four bits, for each of
`--llama-rows` in both of its layouts of keys and values (needs `llama-cpp-python`). Both go on to the end token where
ours ends with the first whole answer. Writes `evaluation.json` and `evaluation.md` to `--out`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.command import machine, parse, parser_of, save
from greenloop.engine.build import make_engine
from greenloop.evaluate import EvaluationSettings, evaluate
from greenloop.models import resolve
from greenloop.native_trial import load_and_try
from greenloop.places import cache_dir, data_dir
from greenloop.prompt import get_protocol, render
from greenloop.sandbox import SandboxVerifier
from greenloop.tasks import load_tasks
from greenloop.tuning import prepare_process
from greenloop.types import Outcome, TaskSet, Verifier


def ours(loaded: Any, tasks: TaskSet, verifier: Verifier, limit: int) -> tuple[int, int]:
    """Passed answers and completion tokens of `greenloop eval`."""
    engine = make_engine(loaded.model, loaded.tokenizer)
    settings = EvaluationSettings(max_new_tokens=limit)
    answers = evaluate(engine, loaded.tokenizer, verifier, tasks, settings, seed=0).answers
    return sum(answer.passed for answer in answers), sum(len(answer.completion.token_ids) for answer in answers)


@torch.inference_mode()
def theirs(loaded: Any, tasks: TaskSet, verifier: Verifier, limit: int, batch: int) -> tuple[int, int]:
    """The same of `generate` in batches."""
    tokenizer, protocol = loaded.tokenizer, get_protocol("train")
    prompts = sorted((render(protocol, task, tokenizer) for task in tasks.tasks), key=lambda one: len(one.token_ids))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pad = tokenizer.pad_token_id
    passed = tokens = 0
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        rows = {"input_ids": [list(prompt.token_ids) for prompt in chosen]}
        padded = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(loaded.device)
        output = loaded.model.generate(**padded, do_sample=False, max_new_tokens=limit, pad_token_id=pad)
        new = output[:, padded["input_ids"].shape[1] :]
        tokens += int((new != pad).sum(dim=1).add_(1).clamp_max_(new.shape[1]).sum())
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        verdicts = [
            verifier.submit(prompt.task, protocol.extract(text, prompt.task))
            for prompt, text in zip(chosen, texts, strict=True)
        ]
        passed += sum(verdict.result().outcome is Outcome.PASSED for verdict in verdicts)
    return passed, tokens


def llama_batches(gguf: Path, tokenizer: Any, tasks: TaskSet, rows: int, limit: int, *, unified: bool) -> Any:
    """llama.cpp with its weights loaded and room for `rows` of the longest answers; see `Batches`."""
    from bench.batches_llama import Batches

    longest = max(len(render(get_protocol("train"), task, tokenizer).token_ids) for task in tasks.tasks)
    return Batches(gguf, rows=rows, row_tokens=longest + limit, threads=torch.get_num_threads(), unified=unified)


def by_llama(batches: Any, tokenizer: Any, tasks: TaskSet, verifier: Verifier, limit: int) -> tuple[int, int]:
    """The same of llama.cpp's batched decoding, each answer judged while others still decode."""
    protocol = get_protocol("train")
    prompts = [render(protocol, task, tokenizer) for task in tasks.tasks]
    verdicts, count = [], 0
    for index, tokens in batches.answers([prompt.token_ids for prompt in prompts], limit):
        task = prompts[index].task
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        verdicts.append(verifier.submit(task, protocol.extract(text, task)))
        count += len(tokens)
    return sum(verdict.result().outcome is Outcome.PASSED for verdict in verdicts), count


def timed(name: str, action: Callable[[], tuple[int, int]]) -> dict[str, Any]:
    """One run of one side."""
    started = time.perf_counter()
    passed, tokens = action()
    seconds = time.perf_counter() - started
    print(f"{name}: {seconds:.1f} s, {passed} passed, {tokens} tokens", flush=True)
    return {"side": name, "seconds": seconds, "passed": passed, "tokens": tokens, "tokens_per_s": tokens / seconds}


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    lines = ["| side | seconds | passed | tokens/s | times greenloop's seconds |", "|---|---|---|---|---|"]
    for run in runs:
        ratio = run["seconds"] / runs[0]["seconds"]
        lines.append(
            f"| {run['side']} | {run['seconds']:.1f} | {run['passed']} | {run['tokens_per_s']:.0f} | {ratio:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """All sides, one after the other."""
    parser = parser_of(__doc__)
    parser.set_defaults(tasks="mbpp:test")
    parser.add_argument("--limit", type=int, default=0, help="only the first n tasks; 0 takes all")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="transformers' batch sizes, each tried")
    parser.add_argument("--llama-rows", type=int, nargs="+", default=[], help="llama.cpp's rows at a time, each tried")
    options = parse(parser)
    tasks = load_tasks(options.tasks, data_dir=data_dir())
    if options.limit:
        tasks = replace(tasks, tasks=tasks.tasks[: options.limit])
    prepare_process(options.matmul_precision)
    source = resolve(options.model, cache_dir=cache_dir())
    bare = source.gguf is not None and source.adapter is None
    if options.llama_rows and not (bare and find_spec("llama_cpp")):
        parser.error("--llama-rows: needs a GGUF model without adapter and `pip install llama-cpp-python`")
    limit, runs = options.max_new_tokens, list[dict[str, Any]]()

    def run(name: str, action: Callable[[], tuple[int, int]]) -> None:
        runs.append(timed(name, action))
        save(options.out, "evaluation", {"machine": machine(), "runs": runs}, markdown(runs))

    with SandboxVerifier() as verifier:
        sides = {"greenloop": ours} | {
            f"transformers, {batch} rows": partial(theirs, batch=batch) for batch in options.batch
        }
        for name, side in sides.items():
            # Each with weights of its own: our engine lays them out anew.
            loaded = load_and_try(source, print, dtype=options.dtype, device=options.device)
            run(name, partial(side, loaded, tasks, verifier, limit))
        tokenizer = loaded.tokenizer
        del loaded
        for rows, unified in product(options.llama_rows, (False, True)):
            assert source.gguf is not None, "asked above"
            name = f"llama.cpp, {rows} rows{', one stream' if unified else ''}"
            with closing(llama_batches(source.gguf, tokenizer, tasks, rows, limit, unified=unified)) as batches:
                run(name, partial(by_llama, batches, tokenizer, tasks, verifier, limit))
    print(markdown(runs))


if __name__ == "__main__":
    main()
