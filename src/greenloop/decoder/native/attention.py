"""Attention of packed groups for training on a processor: prompts, and the tree of completions behind each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import LANES, QUERIES
from greenloop.decoder.native.records import ATTENTION, place, record
from greenloop.decoder.native.team import compiled, run


@dataclass(frozen=True, slots=True)
class Heads:
    """Of a layer."""

    query: int
    """H."""
    kv: int
    """Hkv."""
    width: int
    """D, a multiple of 16."""
    scale: float
    """Of the scores."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the segments of packed trees stand among N tokens, one after another.

    Keys and values that several segments read get a gradient from each: a parcel.
    """

    segments: np.ndarray
    """int64 [n, 5]: first token, tokens, keys before them, first parcel, parcels."""
    seen: np.ndarray
    """int64 [parcels] the token of each parcel; a segment's first are the keys before its own, in their order."""
    shared: np.ndarray
    """int64 [S, 3]: a token that has parcels, its first place in `places`, their count."""
    places: np.ndarray
    """int64 [parcels]: parcels, token by token."""
    keys: int
    """Of the segment that reads most."""

    @classmethod
    def of(cls, trees: Sequence[Sequence[tuple[int, int]]]) -> Segments:
        """Of trees that stand one after another.

        Args:
            trees: tokens and parent of each segment, the root first (`tree.Segment`).

        >>> found = Segments.of([[(3, 0), (2, 0)]])
        >>> found.segments.tolist(), found.seen.tolist(), found.keys
        ([[0, 3, 0, 0, 3], [3, 2, 3, 3, 3]], [0, 1, 2, 0, 1, 2], 5)
        >>> found.shared.tolist(), found.places.tolist()
        ([[0, 0, 2], [1, 2, 2], [2, 4, 2]], [0, 3, 1, 4, 2, 5])
        """
        segments: list[tuple[int, int, int, int, int]] = []
        seen: list[np.ndarray] = []
        token, parcel = 0, 0
        for tree in trees:
            parents = {parent for _, parent in tree}
            ways: list[np.ndarray] = []
            for number, (tokens, parent) in enumerate(tree):
                before = ways[parent] if number else np.arange(0)
                ways.append(np.concatenate([before, np.arange(token, token + tokens)]))
                seen.append(ways[-1] if number in parents else before)
                segments.append((token, tokens, len(before), parcel, len(seen[-1])))
                token, parcel = token + tokens, parcel + len(seen[-1])
        together = np.concatenate(seen)
        tokens_seen, first, counts = np.unique(np.sort(together), return_index=True, return_counts=True)
        return cls(
            segments=np.array(segments),
            seen=together,
            shared=np.stack([tokens_seen, first, counts], axis=1),
            places=np.argsort(together, kind="stable"),
            keys=max(before + tokens for _, tokens, before, _, _ in segments),
        )


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, segments: Segments) -> Tensor:
    """The attended values [N, H * D].

    Args:
        qkv: [N, (H + 2 Hkv) * D], queries and keys not yet turned by their positions.
        cos: [N, 1, D / 2].
        sin: [N, 1, D / 2].
        heads: of the layer.
        segments: which token sees which.
    """
    out = torch.empty(len(qkv), heads.query * heads.width)
    _run("attend", qkv, cos, sin, heads, segments, out)
    return out


def attend_back(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, segments: Segments, gradient: Tensor) -> Tensor:
    """The gradient of qkv from that of the attended values."""
    out = torch.empty(qkv.shape)
    parcels = torch.empty(len(segments.seen), heads.kv, 2, heads.width)
    fields = {"of_qkv": place(out), "parcels": parcels.data_ptr()}
    for name in ("attend_back", "collect"):
        _run(name, qkv, cos, sin, heads, segments, gradient, **fields)
    return out


def _run(
    name: str, qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, segments: Segments, mixed: Tensor, **fields: Any
) -> None:
    threads, group = torch.get_num_threads(), heads.query // heads.kv
    keys = -(-segments.keys // LANES) * LANES
    # Of the backward pass, which needs more: keys and values, laid out, and their gradients; queries and attended
    # values, also transposed; weights and scores.
    scratch = torch.empty(threads, 6 * keys * heads.width + QUERIES * group * (4 * heads.width + 2 * keys))
    state = np.zeros(2, dtype=np.int64)
    one = record(
        ATTENTION,
        {
            "segments": segments.segments.ctypes.data,
            "segment_count": len(segments.segments),
            "seen": segments.seen.ctypes.data,
            "shared": segments.shared.ctypes.data,
            "shared_count": len(segments.shared),
            "places": segments.places.ctypes.data,
            "heads": group,
            "kv_heads": heads.kv,
            "head_width": heads.width,
            "scale": heads.scale,
            "cos": cos.data_ptr(),
            "sin": sin.data_ptr(),
            "qkv": place(qkv),
            "mixed": place(mixed),
            "keys": keys,
            "scratch": scratch.data_ptr(),
            "scratch_size": scratch.shape[1],
            "entered": state.ctypes.data,
            "taken": state[1:].ctypes.data,
            **fields,
        },
    )
    run(getattr(compiled("attention_code"), name).address, one.ctypes.data, threads)
