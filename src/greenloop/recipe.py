"""The recipe: everything that decides a training run, typed and validated.

In: a TOML file (or the name of a shipped one) and `--set key=value` overrides. Out: a frozen `Recipe`.
Unknown keys and impossible combinations raise `ConfigError` with the key's path. Knows no model, no task and no torch.

Defaults that differ from TRL's `RLOOConfig`, theirs in brackets: temperature 0.8 (1.0), beta 0 (0.05), learning rate
1e-4 (1e-6, meant for full fine-tuning), constant schedule with warm-up (linear decay), LoRA on all linear layers with
dropout 0 (PEFT's default targets, 0.05), K = 8 (2).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from greenloop.errors import ConfigError

Beta = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class PromptSection(_Section):
    """How a task is put to the model."""

    protocol: str = "train"
    """Named prompt protocol: train, mbpp-3shot, lm-eval-instruct, bigcode, evalplus-chat."""
    shown_tests: Literal["all"] | int = "all"
    """How many of a task's tests the prompt shows; the others still count for the reward."""

    @model_validator(mode="after")
    def _shown_is_a_count(self) -> Self:
        if isinstance(self.shown_tests, int) and self.shown_tests < 0:
            raise ValueError('shown_tests must be "all" or a number of at least 0')
        return self

    @property
    def shown(self) -> int | None:
        """The count for `Task.showing`; None shows all."""
        return None if self.shown_tests == "all" else self.shown_tests


class SamplingSection(_Section):
    """How rollouts are drawn."""

    temperature: float = Field(0.8, gt=0, le=5)
    """Divides the logits, in sampling and in the loss alike."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus; 1 is off."""
    top_k: int = Field(0, ge=0)
    """Keep the k most likely tokens; 0 is off."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Keep tokens at least this fraction as likely as the likeliest; 0 is off."""
    max_new_tokens: int = Field(160, ge=1, le=32768)
    """A completion that reaches this is truncated."""
    accept_bias: bool = False
    """Training takes top_p, top_k and min_p only if this says that the biased gradient is wanted."""


class LoraSection(_Section):
    """The adapter (PEFT)."""

    rank: int = Field(16, ge=1, le=1024)
    """r."""
    alpha: float = Field(32, gt=0)
    """Scale is alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Not 0 makes sampler and trainer differ; keep 0 for RLOO."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Module names, or all linear layers except the output head."""
    interpolation: float = Field(1.0, gt=0, le=1)
    """Of the trained B, what the saved and scored adapters have: below 1 they lie between base and trained model."""


class OptimizerSection(_Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-4, gt=0, lt=1)
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled, on adapter weights."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Global norm clip over the adapter's gradients."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant, or to zero at the last step."""
    warmup_steps: int = Field(2, ge=0)
    """Linear warm-up, optimiser steps."""


class RlooSection(_Section):
    """The estimator (docs in `learn.rloo`)."""

    epsilon: float = Field(0.2, gt=0, lt=1)
    """Lower clip of the sequence ratio: 1 - epsilon."""
    epsilon_high: float | None = Field(None, gt=0)
    """Upper clip: 1 + epsilon_high; unset takes epsilon."""
    passes: int = Field(1, ge=1, le=16)
    """Optimiser passes over one batch of rollouts."""
    normalize_advantages: bool = False
    """Divide by the batch's standard deviation (needs the whole batch first)."""
    mask_truncated: bool = False
    """Truncated completions get no gradient; they stay in the baseline and the denominator."""
    refill: int = Field(0, ge=0)
    """At most this many extra prompts a step, drawn to replace dead groups (all raw outcomes equal)."""
    token_budget: int = Field(0, ge=0)
    """Packed tokens in one forward and backward; a longer group is cut between completions. 0: what the memory holds on
    a GPU; on a CPU 2048 for one group, 1024 for several."""


class CurriculumSection(_Section):
    """Which tasks a step draws."""

    probe: int = Field(0, ge=0)
    """Samples of every task before the first step; tasks are then drawn by their chance of a group with both outcomes,
    which each step's outcomes keep current. 0: no probe, every task once an epoch."""
    focus: float = Field(1.0, gt=0, le=10)
    """Tasks are drawn by that chance to this power: 1 also tries what never passed, 3 keeps to what is known mixed."""


class RewardSection(_Section):
    """Weights of the parts of the reward; each part is in 0..1."""

    passed: float = 1.0
    """All tests passed."""
    fraction: float = 0.0
    """Fraction of tests passed: pays for `return True`, use with care."""
    ran: float = 0.0
    """The program's own code ran to its end without an exception."""
    well_formed: float = 0.0
    """Exactly one closed Python fence that parses and defines the entry point."""
    clip: tuple[float, float] | None = None
    """Clamp of the weighted sum, before any KL."""

    @model_validator(mode="after")
    def _clip_is_ordered(self) -> Self:
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError("clip must be [low, high] with low < high")
        return self


class SandboxSection(_Section):
    """Limits of one program under test."""

    cpu_s: float = Field(3.0, gt=0)
    """CPU seconds, all tests included."""
    wall_s: float = Field(10.0, gt=0)
    """Wall seconds, for sleepers."""
    memory_mib: int = Field(512, ge=64)
    """Address space."""
    workers: int = Field(0, ge=0)
    """Programs judged at a time; 0 takes one a core."""
    level: Literal["auto", "rlimits-only"] = "auto"
    """auto takes the strongest level of this kernel and refuses to run without one; rlimits-only has no locks."""
    allow_unsandboxed: bool = False
    """rlimits-only must be allowed in so many words."""

    @model_validator(mode="after")
    def _unsandboxed_is_meant(self) -> Self:
        if (self.level == "rlimits-only") != self.allow_unsandboxed:
            raise ValueError(
                'level = "rlimits-only" (programs are not locked up) needs allow_unsandboxed = true, only it'
            )
        return self


class EvaluationSection(_Section):
    """Evaluation before, during and after training."""

    samples: int = Field(4, ge=0)
    """Samples a task for the before/after evaluation; 0 leaves only greedy."""
    temperature: float = Field(0.7, gt=0)
    """Of those samples."""
    greedy: bool = True
    """Also one greedy answer a task before and after."""
    validation_tasks: str = ""
    """Task spec scored during training; empty: none."""
    every: int = Field(0, ge=0)
    """Score validation_tasks every n steps (greedy); 0 never."""
    patience: int = Field(0, ge=0)
    """Stop after this many scorings without a new best; 0 never stops early."""


class CheckpointSection(_Section):
    """Saved state."""

    every: int = Field(5, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1)
    """The last n are kept."""


class EngineSection(_Section):
    """The rollout engine."""

    rows: int = Field(0, ge=0)
    """Completions decoded at a time; 0 takes as many as 1 GiB of keys and values holds, at most 128; on a GPU an eighth
    of its free memory, at most 512."""
    keep_mib: int = Field(3072, ge=0)
    """On a processor in float32, what the sampler computes is kept for the update, which then needs no forward: at most
    so many MiB. A step of half as much again is sampled and learned in parts; what has no room is computed again."""


class Recipe(_Section):
    """One training run."""

    model: str = "smollm2-135m"
    """Hub id, folder, .gguf file, run or adapter folder, or the alias of the packaged model."""
    tasks: str = "starter:train"
    """Task spec to train on."""
    eval_tasks: str = "starter:test"
    """Held-out task spec, scored before and after; empty: none."""
    steps: int = Field(50, ge=1)
    """Training steps."""
    max_minutes: float = Field(0.0, ge=0)
    """Begin no further step after this many minutes of steps, resumed ones included; 0: no limit. How many steps that
    is depends on the machine."""
    prompts: int = Field(6, ge=1)
    """P: tasks a step."""
    samples: int = Field(8, ge=2)
    """K: completions a task."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL penalty in the reward, sequence level."""
    seed: int = Field(0, ge=0)
    """Root of every random draw."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base weights; auto is bfloat16 where the hardware computes fast in it."""
    matmul_precision: Literal["highest", "high"] = "highest"
    """Of products of float32 values, as `torch.set_float32_matmul_precision` names it: `high` lets a processor with
    AVX-512 VNNI or AVX-VNNI multiply in 14 bits, with a tenth of bfloat16's error, and a GPU in TF32; elsewhere it
    changes nothing."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""
    prompt: PromptSection = PromptSection()
    sampling: SamplingSection = SamplingSection()
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    rloo: RlooSection = RlooSection()
    curriculum: CurriculumSection = CurriculumSection()
    reward: RewardSection = RewardSection()
    sandbox: SandboxSection = SandboxSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        sampling = self.sampling
        truncates = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
        if truncates and not sampling.accept_bias:
            raise ValueError(
                "sampling: top_p, top_k and min_p make the gradient biased (the loss uses the full vocabulary); "
                "leave them off, or set sampling.accept_bias = true"
            )
        if self.evaluation.every and not self.evaluation.validation_tasks:
            raise ValueError("evaluation.every needs evaluation.validation_tasks")
        if not self.evaluation.samples and not self.evaluation.greedy:
            raise ValueError("evaluation: samples = 0 and greedy = false leave nothing to score")
        if self.evaluation.patience and not self.evaluation.every:
            raise ValueError("evaluation.patience needs evaluation.every")
        if self.max_minutes and self.optimizer.schedule != "constant":
            raise ValueError(
                f"max_minutes: the {self.optimizer.schedule} schedule needs to know its last step; "
                'use optimizer.schedule = "constant"'
            )
        if self.rloo.mask_truncated and self.beta:
            raise ValueError("rloo.mask_truncated works with beta = 0 only: a masked completion has no KL")
        return self


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package, sorted."""
    folder = resources.files("greenloop") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """The validated recipe of a shipped name or a TOML file, with `key=value` overrides applied.

    Raises:
        ConfigError: no such recipe, not TOML, an unknown key or a value out of range; names the key's path.
    """
    values = _read(name_or_path)
    for override in overrides:
        _apply(values, override)
    return validated(values, name_or_path)


def validated(values: Mapping[str, Any], origin: str) -> Recipe:
    """`values` as a recipe.

    Raises:
        ConfigError: with `origin` and the path of the first wrong key.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, origin)) from None


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML; unset values are left out. `load_recipe` reads it back to an equal recipe."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def describe_keys() -> Iterable[str]:
    """One line a key: its path, default and meaning."""
    return _described(Recipe, "")


def _described(model: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from _described(type(field.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} = {field.default!r}: {field.description}"


def _read(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    try:
        if name_or_path in shipped_recipes():
            text = (resources.files("greenloop") / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
        elif path.suffix == ".toml" or path.is_file():
            text = path.read_text(encoding="utf-8")
        else:
            raise ConfigError(f"{name_or_path}: no recipe of this name; shipped are {_known()}, or give a .toml file")
        return tomllib.loads(text)
    except OSError:
        raise ConfigError(f"{name_or_path}: no such recipe file; give a TOML file or one of {_known()}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name_or_path}: not UTF-8 text; save the recipe as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name_or_path}: not valid TOML: {error}") from None


def _known() -> str:
    return ", ".join(shipped_recipes())


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in place; the value is TOML, or a plain word."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: expected key=value, e.g. --set sampling.max_new_tokens=200")
    *sections, last = key.strip().split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    target[last] = _value(text.strip())


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError, origin: str) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{origin}: {path}: unknown key; {_suggest(path)}"
    place = f"{origin}: {path}: " if path else f"{origin}: "
    given = f" (got {first['input']!r})" if path and not isinstance(first["input"], dict | BaseModel) else ""
    return f"{place}{message}{given}"


def _suggest(path: str) -> str:
    import difflib

    known = list(_paths(Recipe))
    close = difflib.get_close_matches(path, known, n=1) or [k for k in known if k.split(".")[-1] == path.split(".")[-1]]
    return f"did you mean {close[0]}?" if close else "`greenloop recipes keys` lists the known ones"


def _paths(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
