"""A group as one sequence: [prompt | y_1 | ... | y_K], so that the prompt is computed once in training too.

In: token ids. Out: a `Pack`: what the model reads, which hidden states are scored, and where each completion stands.
The last token of a completion is only ever a label, so it is not among the inputs. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A group or a part of it: N packed tokens, M trained tokens, R completions."""

    token_ids: Tensor
    """[N] int64."""
    positions: Tensor
    """[N] int64: each completion goes on where the prompt ends."""
    prompt_tokens: int
    inputs: tuple[int, ...]
    """[R] how many of the N tokens each completion has, after the prompt and those before it."""
    scored: Tensor
    """[M] int64: index into N of the hidden state that predicts each label."""
    labels: Tensor
    """[M] int64: the sampled tokens, completion after completion."""
    owner: Tensor
    """[M] int64: 0 .. R-1, whose token it is."""
    completions: tuple[int, ...]
    """The caller's indices of the R completions."""

    @property
    def end(self) -> int:
        """One more than the last position."""
        return self.prompt_tokens + max(self.inputs)


def pack(prompt: Sequence[int], completions: Sequence[Sequence[int]], indices: Sequence[int]) -> Pack:
    """Pack the chosen completions (each of at least one token) behind their prompt.

    >>> p = pack([5, 6], [[7, 8], [9]], [0, 1])
    >>> p.token_ids.tolist(), p.positions.tolist(), p.scored.tolist(), p.labels.tolist()
    ([5, 6, 7], [0, 1, 2], [1, 2, 1], [7, 8, 9])
    """
    chosen = [completions[index] for index in indices]
    start = len(prompt)
    token_ids, positions = list(prompt), list(range(start))
    scored: list[int] = []
    for tokens in chosen:
        inputs = len(tokens) - 1
        first = len(token_ids)
        scored.extend([start - 1, *range(first, first + inputs)])
        token_ids.extend(tokens[:-1])
        positions.extend(range(start, start + inputs))
    return Pack(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions),
        prompt_tokens=start,
        inputs=tuple(len(tokens) - 1 for tokens in chosen),
        scored=torch.tensor(scored),
        labels=torch.tensor([token for tokens in chosen for token in tokens]),
        owner=torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor([len(tokens) for tokens in chosen])),
        completions=tuple(indices),
    )


def pack_group(
    prompt: Sequence[int], completions: Sequence[Sequence[int]], indices: Sequence[int], token_budget: int
) -> list[Pack]:
    """Packs of at most `token_budget` inputs, cut between completions; one completion over the budget stands alone.

    >>> [p.completions for p in pack_group([1], [[2, 2], [3, 3], [4, 4]], [0, 1, 2], token_budget=3)]
    [(0, 1), (2,)]
    """
    packs: list[Pack] = []
    taken: list[int] = []
    size = len(prompt)
    for index in indices:
        inputs = len(completions[index]) - 1
        if taken and size + inputs > token_budget:
            packs.append(pack(prompt, completions, taken))
            taken, size = [], len(prompt)
        taken.append(index)
        size += inputs
    if taken:
        packs.append(pack(prompt, completions, taken))
    return packs


def batched(
    packs: Sequence[tuple[int, Pack]], token_budget: int, *, padded: bool = False
) -> list[list[tuple[int, Pack]]]:
    """(group, pack) pairs, in their order, in batches of at most `token_budget` inputs for one forward each.

    Args:
        packs: the pairs.
        token_budget: of a forward; a pack over it stands alone.
        padded: count what a batch has when its prompts and its completions are padded to the longest.

    >>> several = [(p, pack([1, 2], [[3, 4]], [0])) for p in range(3)]
    >>> [[p for p, _ in batch] for batch in batched(several, 6)]
    [[0, 1], [2]]
    >>> uneven = [(0, pack([1] * 2, [[3, 4]], [0])), (1, pack([1] * 9, [[3, 4]], [0]))]
    >>> [len(batched(uneven, 14, padded=padded)) for padded in (False, True)]
    [1, 2]
    """
    batches: list[list[tuple[int, Pack]]] = []
    for pair in packs:
        together = [*(one for _, one in batches[-1]), pair[1]] if batches else []
        if not together or _size(together, padded) > token_budget:
            batches.append([])
        batches[-1].append(pair)
    return batches


def _size(packs: Sequence[Pack], padded: bool) -> int:
    """Inputs of one forward."""
    if not padded:
        return sum(len(one.token_ids) for one in packs)
    inputs = [inputs for one in packs for inputs in one.inputs]
    return len(packs) * max(one.prompt_tokens for one in packs) + len(inputs) * max(inputs)
