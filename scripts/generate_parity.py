"""Compare our engine's greedy completions with `transformers.generate`, token by token, in float32 on a real model.

    GREENLOOP_DATA_DIR=... python scripts/generate_parity.py smollm2-135m --tasks mbpp:test --count 50

Both get the prompts of the `train` protocol and end at the model's own end tokens alone. Exit status 1 if one differs.
"""

import argparse
import sys
from typing import Any

import torch

from greenloop import tuning
from greenloop.engine.build import make_engine
from greenloop.engine.request import Request, Sampling
from greenloop.models import resolve
from greenloop.models.load import load_model
from greenloop.places import cache_dir, data_dir
from greenloop.prompt import get_protocol, render
from greenloop.tasks import load_tasks


def main() -> int:
    """Print a line a task and the count of equal ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tasks", default="mbpp:test")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()
    tasks = load_tasks(options.tasks, data_dir=data_dir()).tasks[: options.count]
    tuning.prepare_process()
    loaded = load_model(resolve(options.model, cache_dir=cache_dir()), dtype="float32")
    tokenizer: Any = loaded.tokenizer
    prompts = [render(get_protocol("train"), task, tokenizer).token_ids for task in tasks]
    theirs = [by_transformers(loaded.model, prompt, options.max_new_tokens) for prompt in prompts]
    # After theirs: the engine lays the model's weights out anew.
    requests = [Request(token_ids=prompt, samples=1, seed=0) for prompt in prompts]
    sampling = Sampling(temperature=0.0, max_new_tokens=options.max_new_tokens)
    ours = {one.group: one.token_ids for one in make_engine(loaded.model, tokenizer).generate(requests, sampling)}
    equal = 0
    for index, (task, expected) in enumerate(zip(tasks, theirs, strict=True)):
        same = ours[index] == expected
        equal += same
        at = next((i for i, pair in enumerate(zip(ours[index], expected, strict=False)) if pair[0] != pair[1]), None)
        print(f"{task.task_id}  {len(expected)} tokens  {'equal' if same else f'differs at token {at}'}", flush=True)
    print(f"{equal} of {len(tasks)} completions are equal")
    return int(equal < len(tasks))


@torch.inference_mode()
def by_transformers(model: Any, prompt: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """The new tokens of one greedy `generate`, the end token included."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit)
    return tuple(output[0, len(prompt) :].tolist())


if __name__ == "__main__":
    sys.exit(main())
