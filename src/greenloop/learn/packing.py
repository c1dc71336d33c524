"""A group as one tree of tokens, so that what its completions have in common is computed once in training too.

The root is the prompt; completions that begin with the same tokens share them. In: token ids. Out: a `Pack`: what the
model reads, which hidden states are scored for which labels, and which of these each completion has. The last token of
a completion is only ever a label, so it is not among the inputs. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from greenloop.tree import Segment, grow, size


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A group or a part of it: N packed tokens, E scored labels, M trained tokens, R completions."""

    token_ids: Tensor
    """[N] int64: segment after segment."""
    positions: Tensor
    """[N] int64: each segment goes on where its parent ends."""
    segments: tuple[Segment, ...]
    """Parents before children; a token sees the segments on its way to the root, and its own up to itself."""
    scored: Tensor
    """[E] int64: index into N of the hidden state that predicts each label."""
    labels: Tensor
    """[E] int64."""
    edges: Tensor
    """[M] int64: index into E of each sampled token, completion after completion."""
    owner: Tensor
    """[M] int64: 0 .. R-1, whose token it is."""
    completions: tuple[int, ...]
    """The caller's indices of the R completions."""

    @property
    def prompt_tokens(self) -> int:
        """Of the first segment."""
        return self.segments[0].tokens

    @property
    def end(self) -> int:
        """One more than the last position."""
        return int(self.positions.max()) + 1

    def paths(self) -> list[tuple[int, ...]]:
        """[N] the tokens that lead to each token, from the prompt's first one to itself."""
        tokens, found, ends = self.token_ids.tolist(), list[tuple[int, ...]](), list[tuple[int, ...]]()
        for number, segment in enumerate(self.segments):
            before = ends[segment.parent] if number else ()
            own = tuple(tokens[len(found) : len(found) + segment.tokens])
            found.extend((*before, *own[: end + 1]) for end in range(segment.tokens))
            ends.append((*before, *own))
        return found


def pack(prompt: Sequence[int], completions: Sequence[Sequence[int]], indices: Sequence[int]) -> Pack:
    """Pack the chosen completions (each of at least one token) behind their prompt.

    >>> p = pack([5, 6], [[7, 8], [9], [7, 3, 1]], [0, 1, 2])
    >>> p.token_ids.tolist(), p.positions.tolist(), [tuple(segment) for segment in p.segments]
    ([5, 6, 7, 3], [0, 1, 2, 3], [(2, 0), (1, 0), (1, 1)])
    >>> p.scored.tolist(), p.labels.tolist(), p.edges.tolist()
    ([1, 2, 1, 2, 3], [7, 8, 9, 3, 1], [0, 1, 2, 0, 3, 4])
    """
    chosen = [completions[index] for index in indices]
    root, tree = len(prompt), grow([tokens[:-1] for tokens in chosen])
    # The first token is predicted where the prompt ends.
    ways = [[root - 1, *(root + place for place in places)] for places in tree.places]
    edges: dict[tuple[int, int], int] = {}
    taken = [
        edges.setdefault(edge, len(edges))
        for tokens, way in zip(chosen, ways, strict=True)
        for edge in zip(way, tokens, strict=True)
    ]
    scored, labels = zip(*edges, strict=True)
    return Pack(
        token_ids=torch.tensor([*prompt, *tree.tokens]),
        positions=torch.tensor([*range(root), *(root + depth for depth in tree.depths)]),
        segments=(Segment(root, 0), *tree.segments),
        scored=torch.tensor(scored),
        labels=torch.tensor(labels),
        edges=torch.tensor(taken),
        owner=torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor([len(tokens) for tokens in chosen])),
        completions=tuple(indices),
    )


def pack_group(
    prompt: Sequence[int], completions: Sequence[Sequence[int]], indices: Sequence[int], token_budget: int
) -> list[Pack]:
    """Packs of at most `token_budget` inputs, cut between completions; one completion over the budget stands alone.

    >>> [p.completions for p in pack_group([1], [[2, 2], [3, 3], [2, 4], [4, 4]], [0, 1, 2, 3], token_budget=3)]
    [(0, 1, 2), (3,)]
    """
    packs: list[Pack] = []
    taken: list[int] = []
    for index in indices:
        inputs = [completions[one][:-1] for one in (*taken, index)]
        if taken and len(prompt) + size(inputs) > token_budget:
            packs.append(pack(prompt, completions, taken))
            taken = []
        taken.append(index)
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
        padded: count what a batch has when its prompts and its other segments are padded to the longest.

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
    lengths = [segment.tokens for one in packs for segment in one.segments[1:]]
    return len(packs) * max(one.prompt_tokens for one in packs) + len(lengths) * max(lengths, default=0)
