"""How well a model does on a task set: greedy answers, samples, verdicts, a summary of each.

In: a rollout engine, a tokenizer, a verifier and a task set. Out: an `Evaluation`, a frozen value. Answers are judged
while others are still being decoded. Every draw has the address (seed, "evaluation", mode, task id, sample), so no
result depends on the order of the tasks. Knows no model file, no run folder and no adapter.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from greenloop.engine.request import Generator, Sampling
from greenloop.errors import ConfigError, SandboxError
from greenloop.prompt import PromptProtocol, Tokenizer, get_protocol, render, well_formed
from greenloop.rollout import Submitted, Wanted, submitted
from greenloop.seeding import seed_for
from greenloop.summary import Answer, Mode, Summary, summarise
from greenloop.tasks import load_tasks
from greenloop.types import Prompt, Task, TaskSet, Verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """What is asked of the model, and how often."""

    protocol: str = "train"
    shown_tests: int | None = None
    """How many tests of a task a prompt may show; None leaves it to the protocol."""
    greedy: bool = True
    """One answer a task at temperature 0."""
    samples: int = 0
    """Answers a task at `temperature`."""
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    k: tuple[int, ...] = (1,)
    """pass@k is estimated from the samples for k = 1 and for each of these."""

    def __post_init__(self) -> None:
        """Refuse what gives no result.

        Raises:
            ConfigError: no answer is asked for, or a k that the number of samples does not reach.
        """
        if self.samples < 0 or (self.samples == 0 and not self.greedy):
            raise ConfigError(f"samples: {self.samples} without a greedy answer gives no result, take at least 1")
        if self.samples and self.temperature <= 0:
            raise ConfigError(
                f"temperature: samples need one above 0 (got {self.temperature}), or ask for greedy alone"
            )
        most = max(self.samples, 1)
        for k in self.k:
            if not 1 <= k <= most:
                raise ConfigError(
                    f"k: pass@{k} needs k of at least 1 and at least {k} samples a task, got {self.samples}"
                )

    @property
    def answers_per_task(self) -> int:
        """How many completions a task gets, in both modes together."""
        return self.samples + self.greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of one model on one task set."""

    task_set: TaskSet
    settings: EvaluationSettings
    seed: int
    greedy: Summary | None
    sampled: Summary | None
    answers: tuple[Answer, ...]
    """Greedy ones first, then in the order of the task set, then by sample."""
    seconds: float = field(compare=False)
    """Wall time of sampling and judging together."""


def evaluate(
    generator: Generator,
    tokenizer: Tokenizer,
    verifier: Verifier,
    task_set: TaskSet,
    settings: EvaluationSettings,
    *,
    seed: int,
    shots: Sequence[Task] = (),
    on_verdict: Callable[[Answer], None] | None = None,
) -> Evaluation:
    """The evaluation of the generator's model, as it is now, on every task of the set.

    Args:
        generator: the engine; it is not refreshed here.
        tokenizer: the model's.
        verifier: judges the programs; it stays open.
        task_set: what to solve.
        settings: protocol, numbers of answers, sampling.
        seed: root of the draws and of the bootstrap.
        shots: the protocol's solved tasks (`load_shots`).
        on_verdict: called in this thread for each answer soon after it was judged.

    Raises:
        ConfigError: an unknown protocol, or the wrong shots.
        ModelError: the tokenizer cannot render the protocol.
        SandboxError: the verifier was closed meanwhile, or could not judge a single answer.
    """
    started = time.perf_counter()
    protocol = get_protocol(settings.protocol)
    presented = [task.showing(settings.shown_tests) for task in task_set.tasks]
    prompts = [render(protocol, task, tokenizer, shots=shots) for task in presented]
    answers = []
    wanted = [one for prompt in prompts for one in _wanted(prompt, settings, seed)]
    for answer in _judged(submitted(generator, verifier, protocol, wanted, _sampling(settings)), protocol):
        answers.append(answer)
        if on_verdict is not None:
            on_verdict(answer)
    answers.sort(key=_place(task_set))
    return Evaluation(
        task_set=task_set,
        settings=settings,
        seed=seed,
        greedy=_summary(answers, Mode.GREEDY, settings, seed),
        sampled=_summary(answers, Mode.SAMPLED, settings, seed),
        answers=tuple(answers),
        seconds=time.perf_counter() - started,
    )


def load_shots(protocol: str, *, data_dir: Path | None = None) -> tuple[Task, ...]:
    """The solved tasks that a protocol shows, in its order; none for most protocols.

    Raises:
        ConfigError: no such protocol.
        TaskError: MBPP cannot be had.
    """
    wanted = get_protocol(protocol).shot_ids
    if not wanted:
        return ()
    solved = {task.task_id: task for task in load_tasks("mbpp:prompt", data_dir=data_dir).tasks}
    return tuple(solved[task_id] for task_id in wanted)


def _wanted(prompt: Prompt, settings: EvaluationSettings, seed: int) -> list[Wanted]:
    """The prompt's answers in either mode, beside each other so that it is computed once."""
    return [
        Wanted(prompt, samples, seed_for(seed, "evaluation", mode.value, prompt.task.task_id), mode is Mode.GREEDY)
        for mode, samples in ((Mode.GREEDY, int(settings.greedy)), (Mode.SAMPLED, settings.samples))
        if samples
    ]


def _judged(answers: Iterator[Submitted], protocol: PromptProtocol) -> Iterator[Answer]:
    """The answers in the order of their submission, each as soon as it and those before it are judged."""
    waiting: deque[Submitted] = deque()
    try:
        for one in answers:
            waiting.append(one)
            while waiting and waiting[0].verdict.done():
                yield _answer(waiting.popleft(), protocol)
        while waiting:
            yield _answer(waiting.popleft(), protocol)
    finally:
        for one in waiting:
            one.verdict.cancel()


def _answer(one: Submitted, protocol: PromptProtocol) -> Answer:
    return Answer(
        mode=Mode.GREEDY if one.greedy else Mode.SAMPLED,
        task=one.prompt.task,
        sample=one.completion.sample,
        completion=one.completion,
        program=one.program,
        well_formed=_form(one, protocol),
        verdict=one.verdict.result(),
    )


def _form(one: Submitted, protocol: PromptProtocol) -> bool | None:
    """Whether the answer is one closed fence; only a chat protocol that opens no fence itself asks for one."""
    if not protocol.needs_chat_template or protocol.prefill:
        return None
    return well_formed(one.completion.text, one.prompt.task.entry_point)


def _sampling(settings: EvaluationSettings) -> Sampling:
    """Of the samples; greedy answers ignore the temperature."""
    return Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        max_new_tokens=settings.max_new_tokens,
    )


def _place(task_set: TaskSet) -> Callable[[Answer], tuple[bool, int, int]]:
    order = {task.task_id: index for index, task in enumerate(task_set.tasks)}
    return lambda answer: (answer.mode is Mode.SAMPLED, order[answer.task.task_id], answer.sample)


def _summary(answers: Sequence[Answer], mode: Mode, settings: EvaluationSettings, seed: int) -> Summary | None:
    chosen = [answer for answer in answers if answer.mode is mode]
    if not chosen:
        return None
    if not any(answer.judged for answer in chosen):
        reason = chosen[0].verdict.detail or "no reason given"
        raise SandboxError(
            f"none of the {len(chosen)} {mode.value} answers could be judged ({reason}): "
            "try wider sandbox limits or fewer workers"
        )
    return summarise(chosen, k=settings.k, seed=seed)
