"""A model spec to a finished evaluation folder, or to one answer: what `greenloop eval` and `generate` do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from greenloop import tuning
from greenloop.engine.build import make_engine
from greenloop.engine.request import Request, Sampling
from greenloop.environment import describe, machine
from greenloop.errors import ConfigError
from greenloop.evaluate import EvaluationSettings, evaluate, load_shots
from greenloop.models import resolve
from greenloop.models.check import check
from greenloop.native_trial import load_and_try
from greenloop.progress import Reporter
from greenloop.prompt import get_protocol, render
from greenloop.results import evaluation_lines, evaluation_record, write_evaluation
from greenloop.sandbox import SandboxVerifier
from greenloop.tasks import load_tasks
from greenloop.tasks.content import content_sha256
from greenloop.types import Task


def evaluate_model(
    spec: str,
    tasks: str,
    settings: EvaluationSettings,
    out: Path,
    reporter: Reporter,
    *,
    cache_dir: Path,
    data_dir: Path | None,
    seed: int,
    limit: int = 0,
    dtype: str = "auto",
    matmul_precision: str = "highest",
    device: str = "auto",
    rows: int = 0,
    unsandboxed: bool = False,
) -> Path:
    """Score the model on the tasks and write results and samples to `out`; the path of `results.json`.

    Raises:
        UsageError: a spec or a setting cannot be used; nothing was sampled.
        SandboxError: programs cannot be judged.
    """
    if (out / "results.json").exists():
        raise ConfigError(f"--out: {out} holds the results of an evaluation already; give another folder")
    task_set = load_tasks(tasks, data_dir=data_dir)
    if limit:
        chosen = task_set.tasks[:limit]
        task_set = replace(task_set, tasks=chosen, sha256=content_sha256(chosen), spec=f"{tasks} (first {len(chosen)})")
    source = resolve(spec, cache_dir=cache_dir)
    check(source, chat_template=get_protocol(settings.protocol).needs_chat_template)
    shots = load_shots(settings.protocol, data_dir=data_dir)
    tuning.prepare_process(matmul_precision)
    with SandboxVerifier(unsandboxed=unsandboxed) as verifier:
        reporter.say(verifier.notice)
        loaded = load_and_try(source, reporter.say, dtype=dtype, device=device)
        engine = make_engine(loaded.model, loaded.tokenizer, rows=rows)
        tokenizer: Any = loaded.tokenizer
        reporter.begin(f"evaluate {tasks}", len(task_set.tasks) * settings.answers_per_task)
        evaluation = evaluate(
            engine, tokenizer, verifier, task_set, settings,
            seed=seed, shots=shots, on_verdict=lambda _: reporter.advance(),
        )  # fmt: skip
        reporter.end()
    described = {**machine(loaded), "model": describe(loaded), "sandbox_level": verifier.level}
    for line in evaluation_lines(evaluation_record(evaluation, described)):
        reporter.say(line)
    return write_evaluation(out, evaluation, described)


def answer(
    spec: str,
    request: str,
    say: Callable[[str], None],
    *,
    cache_dir: Path,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    dtype: str = "auto",
    matmul_precision: str = "highest",
    device: str = "auto",
) -> str:
    """The model's answer to a task in words, under the `train` protocol; `say` takes what else the user should know.

    Raises:
        UsageError: the model cannot be used, or the request is empty.
    """
    if not request.strip():
        raise ConfigError('generate: the task is empty; say what the program should do, e.g. "reverse a string"')
    source = resolve(spec, cache_dir=cache_dir)
    check(source, chat_template=True)
    tuning.prepare_process(matmul_precision)
    loaded = load_and_try(source, say, dtype=dtype, device=device)
    tokenizer: Any = loaded.tokenizer
    task = Task(task_id="request", statement=request, entry_point="", tests=())
    prompt = render(get_protocol("train"), task, tokenizer)
    engine = make_engine(loaded.model, tokenizer, rows=1)
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
    wanted = Request(token_ids=prompt.token_ids, samples=1, seed=seed, stop=prompt.stop)
    (completion,) = engine.generate([wanted], sampling)
    return completion.text
