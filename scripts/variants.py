"""Score what could be made of a run's checkpoints: shrunk towards the base, averaged, or older.

    greenloop train starter --set seed=20 --set checkpoint.every=12 --set checkpoint.keep=9 --out runs/dev
    python scripts/variants.py runs/dev --tasks scripts/development.jsonl 72 72*0.7 48-72

A variant is a step, or the mean of all checkpoints from one step to another, and a factor of LoRA's B. `base` is the
model without adapter. For choosing a recipe: never give it the split that the result is shown on.
"""

import argparse
import math
import re
import statistics
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from greenloop import tuning
from greenloop.engine.build import make_engine
from greenloop.evaluate import EvaluationSettings, evaluate
from greenloop.learn.policy import Policy, adapt
from greenloop.models import resolve
from greenloop.models.load import load_model
from greenloop.places import cache_dir
from greenloop.recipe import load_recipe
from greenloop.run_folder import RunFolder
from greenloop.sandbox import Limits, SandboxVerifier
from greenloop.seeding import seed_for
from greenloop.summary import Mode
from greenloop.tasks import load_tasks

VARIANT = re.compile(r"(?:(?P<first>\d+)-)?(?P<last>\d+)(?:\*(?P<factor>[\d.]+))?")


def adapter(folder: RunFolder, variant: str) -> dict[str, Tensor]:
    """The variant's weights, by their names in PEFT's files."""
    paths = {int(path.name.removeprefix("step-")): path for path in folder.checkpoints.glob("step-?????")}
    if variant == "base":
        variant = f"{max(paths)}*0"
    found = VARIANT.fullmatch(variant)
    if found is None:
        raise SystemExit(f"{variant}: not a variant; write base, 72, 72*0.7, 48-72 or 48-72*0.7")
    last = int(found["last"])
    steps = [step for step in paths if int(found["first"] or last) <= step <= last]
    if last not in steps:
        raise SystemExit(f"{variant}: {folder.checkpoints} has no step {last}, but {sorted(paths)}")
    states = [load_file(paths[step] / "adapter.safetensors") for step in steps]
    factor = float(found["factor"] or 1)
    return {
        name: sum(state[name] for state in states) / len(states) * (factor if "lora_B" in name else 1.0)
        for name in states[0]
    }


def main() -> None:
    """Score each variant and print a Markdown table; differences are to the first one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("variants", nargs="+", help="base, 72, 72*0.7, 48-72, 48-72*0.7")
    parser.add_argument("--tasks", default="starter:validation", help="task spec")
    parser.add_argument("--samples", type=int, default=8, help="a task")
    options = parser.parse_args()
    tuning.prepare_process()
    folder = RunFolder(options.run)
    recipe = load_recipe(str(folder.recipe))
    tasks = load_tasks(options.tasks)
    source = resolve(recipe.model, cache_dir=cache_dir())
    loaded = load_model(source, dtype=recipe.dtype, device=recipe.device)
    policy = Policy(adapt(loaded.model, recipe.lora, recipe.seed, source.base_name), recipe.sampling.temperature)
    engine = make_engine(policy.model, loaded.tokenizer, rows=recipe.engine.rows, decoder=policy.decoder)
    settings = EvaluationSettings(
        protocol=recipe.prompt.protocol,
        shown_tests=recipe.prompt.shown,
        samples=options.samples,
        temperature=recipe.evaluation.temperature,
        max_new_tokens=recipe.sampling.max_new_tokens,
    )
    print("| variant | sampled | greedy | paired difference in sampled (standard error) |\n|---|---|---|---|")
    first: dict[str, float] | None = None
    with SandboxVerifier(Limits(), recipe.sandbox.workers or None, unsandboxed=False) as verifier:
        for variant in options.variants:
            set_peft_model_state_dict(policy.model, adapter(folder, variant))
            policy.refresh()
            engine.refresh()
            seed = seed_for(recipe.seed, "variants")
            answers: Any = evaluate(engine, loaded.tokenizer, verifier, tasks, settings, seed=seed).answers
            rates = {mode: by_task(answers, mode) for mode in (Mode.SAMPLED, Mode.GREEDY)}
            sampled, greedy = (100 * statistics.mean(rates[mode].values()) for mode in (Mode.SAMPLED, Mode.GREEDY))
            first = first or rates[Mode.SAMPLED]
            gains = [100 * (rate - first[task]) for task, rate in rates[Mode.SAMPLED].items()]
            error = statistics.stdev(gains) / math.sqrt(len(gains))
            print(
                f"| {variant} | {sampled:.1f} % | {greedy:.1f} % | {statistics.mean(gains):+.1f} ({error:.1f}) |",
                flush=True,
            )


def by_task(answers: Any, mode: Mode) -> dict[str, float]:
    """Each task's pass rate in a mode."""
    passed: dict[str, list[bool]] = {}
    for answer in answers:
        if answer.mode is mode and answer.judged:
            passed.setdefault(answer.task.task_id, []).append(answer.passed)
    return {task: statistics.mean(rates) for task, rates in passed.items()}


if __name__ == "__main__":
    main()
