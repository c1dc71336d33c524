"""Attention of packed groups for training on a processor: prompts, and completions behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import LANES, QUERIES
from greenloop.decoder.native.records import ATTENTION, record
from greenloop.decoder.native.rows import place
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
    """Where prompts and completions stand among N tokens."""

    segments: np.ndarray
    """int64 [n, 5]: first token, tokens, the first token of the prompt before them, its tokens, first parcel."""
    trunks: np.ndarray
    """int64 [P, 4]: a prompt's first token, its tokens, its first parcel, the segments that read it."""
    parcels: int
    """Of all prompts: a prompt's tokens, once for every segment that reads it."""
    keys: int
    """Of the longest segment."""

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> Segments:
        """Of groups that stand one after another.

        Args:
            groups: a prompt's tokens, and the tokens of each completion behind it.

        >>> found = Segments.of([(3, [2, 0])])
        >>> found.segments.tolist(), found.trunks.tolist(), found.parcels, found.keys
        ([[0, 3, 0, 0, 0], [3, 2, 0, 3, 3]], [[0, 3, 0, 2]], 6, 5)
        """
        segments, trunks, token, parcel, keys = [], [], 0, 0, 0
        for prompt, completions in groups:
            first, begin = token, parcel
            segments.append((first, prompt, first, 0, parcel))
            token, parcel, keys = token + prompt, parcel + prompt, max(keys, prompt)
            for tokens in completions:
                if tokens:
                    segments.append((token, tokens, first, prompt, parcel))
                    token, parcel, keys = token + tokens, parcel + prompt, max(keys, prompt + tokens)
            trunks.append((first, prompt, begin, (parcel - begin) // prompt))
        return cls(np.array(segments), np.array(trunks), parcel, keys)


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
    parcels = torch.empty(segments.parcels, heads.kv, 2, heads.width)
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
            "trunks": segments.trunks.ctypes.data,
            "trunk_count": len(segments.trunks),
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
