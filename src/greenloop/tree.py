"""Token sequences that begin alike, as a tree that holds each common beginning once. Knows no model and no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Segment(NamedTuple):
    """Tokens that follow each other with no branch in between."""

    tokens: int
    parent: int
    """Index of the segment that it goes on from; the first one is the root, and its own parent."""


class Tree(NamedTuple):
    """Sequences behind a root."""

    segments: list[Segment]
    """Without the root (parent 0); parents before children, so the first is number 1."""
    tokens: list[int]
    """[N], segment after segment."""
    depths: list[int]
    """[N] tokens before each on its way from the root, not counting the root's."""
    places: list[list[int]]
    """Indices of each sequence's tokens."""


def grow(sequences: Sequence[Sequence[int]]) -> Tree:
    """The tree of these sequences.

    >>> segments, *others = grow([[7, 8], [9], [7, 3]])
    >>> [tuple(segment) for segment in segments], others
    ([(1, 0), (1, 0), (1, 1), (1, 1)], [[7, 9, 8, 3], [0, 0, 1, 1], [[0, 2], [1], [0, 3]]])
    """
    tree = Tree([], [], [], [[] for _ in sequences])
    ends: list[tuple[int, int, Sequence[int]]] = [(0, 0, range(len(sequences)))]
    while ends:
        parent, depth, rows = ends.pop()
        branches: dict[int, list[int]] = {}
        for row in rows:
            if len(sequences[row]) > depth:
                branches.setdefault(sequences[row][depth], []).append(row)
        for branch in branches.values():
            end, first = alike([sequences[row] for row in branch]), len(tree.tokens)
            tree.segments.append(Segment(end - depth, parent))
            tree.tokens.extend(sequences[branch[0]][depth:end])
            tree.depths.extend(range(depth, end))
            for row in branch:
                tree.places[row].extend(range(first, len(tree.tokens)))
            ends.append((len(tree.segments), end, branch))
    return tree


def alike(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with.

    >>> alike([[1, 2, 3], [1, 2], [1, 2, 4]])
    2
    """
    for count, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return count
    return min(map(len, sequences))


def size(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens their tree has.

    >>> sequences = [[1, 2, 3, 4], [5], [1, 2, 6], [1, 7]]
    >>> size(sequences), len(grow(sequences).tokens)
    (7, 7)
    """
    # In order each has most in common with its neighbour.
    ordered = sorted(map(tuple, sequences))
    return sum(map(len, ordered)) - sum(map(alike, pairwise(ordered)))
