"""Prompts to judged groups: sampling, extraction and verdicts, overlapped.

Each completion is handed to the verifier as soon as it ends, while others still decode. Knows no reward, no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from greenloop.engine.request import Generator, Request, Sampling
from greenloop.prompt import PromptProtocol, well_formed
from greenloop.seeding import seed_for
from greenloop.types import Completion, Group, Prompt, Verdict, Verifier

_WORTH_A_STEP = 16
"""Completions that a decode step should have at least."""
_MARGIN = 1.1
"""Groups have as many tokens as those of the last step, more or less."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of one prompt. Sample k draws from (seed, k)."""

    prompt: Prompt
    samples: int
    seed: int
    greedy: bool = False


@dataclass(frozen=True, slots=True)
class Submitted:
    """A completion whose verdict is being decided."""

    prompt: Prompt
    greedy: bool
    completion: Completion
    program: str | None
    verdict: Future[Verdict]


def submitted(
    generator: Generator,
    verifier: Verifier,
    protocol: PromptProtocol,
    wanted: Sequence[Wanted],
    sampling: Sampling,
) -> Iterator[Submitted]:
    """Every completion as it ends, already handed to the verifier; `completion.group` counts in `wanted`."""
    requests = [
        Request(
            token_ids=one.prompt.token_ids,
            samples=one.samples,
            seed=one.seed,
            stop=one.prompt.stop,
            ends=protocol.ends(one.prompt.task),
            greedy=one.greedy,
        )
        for one in wanted
    ]
    for completion in generator.generate(requests, sampling):
        one = wanted[completion.group]
        program = protocol.extract(completion.text, one.prompt.task)
        yield Submitted(one.prompt, one.greedy, completion, program, verifier.submit(one.prompt.task, program))


def wanted_of(prompts: Sequence[Prompt], samples: int, seed: int) -> list[Wanted]:
    """K completions of every prompt.

    Sample k of a task draws from (seed, task id, turn, k) alone; a task that stands twice has turns 0 and 1.
    """
    return [
        Wanted(prompt, samples, seed_for(seed, prompt.task.task_id, turn))
        for prompt, turn in zip(prompts, _turns(prompts), strict=True)
    ]


def in_parts(wanted: Sequence[Wanted], room: int, new_tokens: float) -> list[Sequence[Wanted]]:
    """A step's groups in parts, each to be sampled and learned from before the next.

    What the sampler keeps for training has room for so many tokens, so a step that has half as many again is cut;
    not to less than 16 completions, since a decode step of few rows waits for memory, and not where a single group
    has no room.

    Args:
        wanted: all of the step.
        room: tokens; 0: nothing is kept.
        new_tokens: that a group's completions are expected to have, what several begin with counted once.
    """
    each = _MARGIN * fmean(len(one.prompt.token_ids) + new_tokens for one in wanted)
    if each > room or each * len(wanted) < 1.5 * room:
        return [wanted]
    least = math.ceil(_WORTH_A_STEP / wanted[0].samples)
    count = max(1, min(math.ceil(len(wanted) / int(room / each)), len(wanted) // least))
    cuts = [len(wanted) * part // count for part in range(count + 1)]
    return [wanted[start:end] for start, end in pairwise(cuts)]


def roll_out(
    generator: Generator,
    verifier: Verifier,
    protocol: PromptProtocol,
    wanted: Sequence[Wanted],
    sampling: Sampling,
) -> list[Group]:
    """The judged completions of every prompt, in the order of the prompts."""
    members: list[list[Submitted]] = [[] for _ in wanted]
    for one in submitted(generator, verifier, protocol, wanted, sampling):
        members[one.completion.group].append(one)
    return [_group(one.prompt, group) for one, group in zip(wanted, members, strict=True)]


def _turns(prompts: Sequence[Prompt]) -> list[int]:
    """How often each prompt's task stood before it."""
    ids = [prompt.task.task_id for prompt in prompts]
    return [ids[:index].count(task_id) for index, task_id in enumerate(ids)]


def _group(prompt: Prompt, members: Sequence[Submitted]) -> Group:
    members = sorted(members, key=lambda member: member.completion.sample)
    return Group(
        prompt=prompt,
        completions=tuple(member.completion for member in members),
        programs=tuple(member.program for member in members),
        verdicts=tuple(member.verdict.result() for member in members),
        well_formed=tuple(well_formed(member.completion.text, prompt.task.entry_point) for member in members),
    )
