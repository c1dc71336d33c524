"""The sections of a card that come from what a run says: results, training, versions, limits.

In: a `RunFacts`. Out: Markdown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from greenloop.card.run import RunFacts
from greenloop.card.text import EQUATIONS, MBPP_PLUS, ONE_RUN, PROGRAMS, PUBLIC_TASKS, STARTER_TASKS
from greenloop.recipe import Recipe
from greenloop.results import Record, estimate_of, percent
from greenloop.summary import Mode


def results(facts: RunFacts) -> str:
    """Before and after with intervals, how they were measured and on what machine."""
    after = facts.results.get("after")
    if not after:
        return "This run was not evaluated."
    rows = "\n".join(_result_rows(facts.results))
    return (
        f"{_measured(after, facts.environment)}\n\n| | before | after | paired difference |\n|---|---|---|---|\n{rows}"
    )


def _measured(after: Record, environment: Record) -> str:
    settings, tasks = after["settings"], after["tasks"]
    shown = "all shown" if settings["shown_tests"] is None else f"{settings['shown_tests']} shown"
    how = [f"protocol `{settings['protocol']}`, tests {shown}, at most {settings['max_new_tokens']} new tokens"]
    if after["sampled"]:
        how.append(f"{settings['samples']} samples a task at temperature {settings['temperature']:g}")
    return (
        f"Measured on the {tasks['count']} tasks of {task_link(tasks, tasks['spec'])} "
        f"(content hash `{tasks['sha256'][:16]}`): {'; '.join(how)}; seed {after['seed']}. Brackets are 95 % intervals "
        f"over tasks. Hardware: {_hardware(environment)}."
    )


def _result_rows(results: Record) -> Iterator[str]:
    after, before = results["after"], results.get("before")
    difference = results.get("difference") or {}
    for mode in Mode:
        key = mode.value
        if not after[key]:
            continue
        old, new = (before or {}).get(key), after[key]
        paired = difference.get(key) or {}
        yield _row(f"pass@1, {key}", _score(old, "pass@1"), _score(new, "pass@1"), paired.get("pass_at_1"))
        yield _row(f"programs that run, {key}", _score(old, "ran"), _score(new, "ran"), None)
        yield _row(
            f"passes among those, {key}",
            _score(old, "passed_of_ran"),
            _score(new, "passed_of_ran"),
            paired.get("among_ran"),
        )


def _score(summary: Record | None, key: str) -> str:
    found = (summary["pass_at_k"]["1"] if key == "pass@1" else summary[key]) if summary else None
    return percent(estimate_of(found)) if found else "-"


def _row(name: str, old: str, new: str, difference: Mapping[str, Any] | None) -> str:
    points = "-"
    if difference:
        value, low, high = (100 * difference[key] for key in ("difference", "low", "high"))
        points = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}], p = {difference['p_value']:.2g}"
    return f"| {name} | {old} | {new} | {points} |"


def training(facts: RunFacts) -> str:
    """The algorithm, the course of the run, the recipe."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _recipe_rows(facts).items())
    return (
        f"K completions of each prompt are sampled, judged by the task's tests in a sandbox (level "
        f"`{facts.environment.get('sandbox_level', 'unknown')}`), and reinforced (Ahmadian et al. 2024); r is the "
        f"reward, y a completion of prompt x:\n\n```text\n{EQUATIONS}\n```\n\n"
        f"{_course(facts)}\n\n| | |\n|---|---|\n{rows}"
    )


def _recipe_rows(facts: RunFacts) -> dict[str, object]:
    recipe, model = facts.recipe, facts.model
    lora, optimizer, reward = recipe.lora, recipe.optimizer, recipe.reward
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    weights = {name: getattr(reward, name) for name in ("passed", "fraction", "ran", "well_formed")}
    return {
        "base model": f"`{model.get('spec', recipe.model)}`",
        "base weights": f"`{model.get('weights_sha256', 'unknown')}`",
        "training tasks": f"`{recipe.tasks}`",
        "prompt protocol": f"`{recipe.prompt.protocol}`, tests shown: {recipe.prompt.shown_tests}",
        "steps": recipe.steps if len(facts.journal) == recipe.steps else f"{len(facts.journal)} of {recipe.steps}",
        "tasks of a step": _draw(recipe),
        "prompts a step, P": recipe.prompts,
        "samples a prompt, K": recipe.samples,
        "temperature": recipe.sampling.temperature,
        "new tokens at most": recipe.sampling.max_new_tokens,
        "reward": " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight),
        "beta": recipe.beta,
        "epsilon, epsilon_high": f"{recipe.rloo.epsilon:g}, {recipe.rloo.epsilon_high or recipe.rloo.epsilon:g}",
        "passes over a batch": recipe.rloo.passes,
        "LoRA": f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, {targets}{_share(recipe)}",
        "AdamW": f"learning rate {optimizer.learning_rate:g}, {optimizer.schedule}, {optimizer.warmup_steps} warm-up "
        f"steps, gradient norm at most {optimizer.max_grad_norm:g}",
        "seed": recipe.seed,
    }


def _share(recipe: Recipe) -> str:
    share = recipe.lora.interpolation
    return "" if share == 1 else f"; {share:g} of what was trained is kept (interpolation with the base)"


def _draw(recipe: Recipe) -> str:
    probe = recipe.curriculum.probe
    if not probe:
        return "every task once an epoch"
    return f"by the chance of a group with both outcomes, after a probe of {probe} samples a task"


def _course(facts: RunFacts) -> str:
    """What the journal says, in a sentence."""
    steps = facts.journal
    if not steps:
        return "The run kept no journal."
    seconds = sum(step.get("seconds", {}).get("total", 0) for step in steps)
    tokens = [step["tokens"] for step in steps if isinstance(step.get("tokens"), int)]
    rates = [step["pass_rate"] for step in steps if isinstance(step.get("pass_rate"), int | float)]
    sentences = [f"Steps run: {len(steps)}, in {seconds / 60:.1f} minutes on {_hardware(facts.environment)}."]
    if tokens:
        sentences.append(f"{sum(tokens):,} tokens were sampled.")
    if rates:
        few = min(5, len(rates))
        first, last = 100 * fmean(rates[:few]), 100 * fmean(rates[-few:])
        chosen = " The curriculum chooses the tasks, so this is not the rate on the set." * bool(
            facts.recipe.curriculum.probe
        )
        sentences.append(
            f"Pass rate in training, mean over {few} steps: {first:.1f} % first, {last:.1f} % last.{chosen}"
        )
    return " ".join(sentences)


def versions(environment: Record) -> str:
    """Packages and hashes of the tasks, as a list."""
    names = ("greenloop", "python", "torch", "transformers", "peft")
    listed = [f"{name} {environment[name]}" for name in names if environment.get(name)]
    hashes = [
        f"* {title}: `{tasks['spec']}`, content hash `{tasks['sha256']}`, from {_source(tasks)}"
        for key, title in (("tasks", "training tasks"), ("eval_tasks", "evaluation tasks"))
        if (tasks := environment.get(key))
    ]
    return "\n".join([f"* {', '.join(listed)}", *hashes])


def _source(tasks: Record) -> str:
    """Where the tasks came from, without the folders of the machine."""
    source = str(tasks.get("source", "an unrecorded source"))
    return Path(source).name if Path(source).is_absolute() else source


def limits(facts: RunFacts) -> Iterator[str]:
    """What a reader must know before believing or using the adapter, one sentence or two each."""
    sets = [facts.environment.get(key) or {} for key in ("tasks", "eval_tasks")]
    specs = [str(tasks.get("spec", "")) for tasks in sets]
    if facts.quantisation:
        yield _quantised(facts)
    elif not facts.base_id:
        yield "The base model is a local folder; its origin is not recorded in this card's metadata."
    if any(spec.startswith(("mbpp", "humaneval")) for spec in specs):
        yield PUBLIC_TASKS
    if specs[0].startswith("mbpp") and not specs[0].endswith(":test"):
        yield MBPP_PLUS
    if any(spec.startswith("starter") for spec in specs):
        yield STARTER_TASKS
    yield ONE_RUN
    yield _sandbox(str(facts.environment.get("sandbox_level", "")))
    yield PROGRAMS


def _quantised(facts: RunFacts) -> str:
    kind = "" if facts.quantisation == "GGUF" else f"{facts.quantisation} "
    other = f" (`{facts.base_id}`)" if facts.base_id else ""
    return (
        f"The adapter fits the dequantised {kind}weights of a GGUF file, and its config names their folder on the "
        f"machine where it was trained. On the original base{other} it is another model: measure it again before "
        "quoting a score."
    )


def _sandbox(level: str) -> str:
    if level == "rlimits-only":
        return (
            "UNSANDBOXED: rewards and scores come from level `rlimits-only`, where programs could read files and use "
            "the network; their verdicts were decided in another process."
        )
    return (
        f"Rewards and scores come from sandbox level `{level or 'unknown'}`: programs were locked up, and the tests "
        "ran in another process that compares their values itself. Hard-coded answers are caught by hidden tests alone."
    )


def _hardware(environment: Record) -> str:
    cores = f", {environment['cores']} cores" if environment.get("cores") else ""
    parts = [f"{environment.get('cpu', 'unknown CPU')}{cores}"]
    parts += [f"{key} {environment[key]}" for key in ("device", "dtype") if environment.get(key)]
    if environment.get("matmul_precision") == "high":
        parts.append("matmul_precision high")
    return ", ".join(parts)


def task_link(tasks: Record, spec: str) -> str:
    """The spec, linked to its data set where that is on the hub."""
    hub = tasks.get("hub_id")
    return f"[`{spec}`](https://huggingface.co/datasets/{hub})" if hub else f"`{spec}`"
