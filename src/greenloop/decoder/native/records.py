"""What native code is told, as C structures: addresses and sizes.

All values are 64 bits wide. Addresses are of float32 values unless said
otherwise; 0 means that there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEETING = [("met", "i8"), ("team_size", "i8"), ("give_way", "i8")]
"""What threads need to wait for each other: int64 0, how many have come; two functions."""

PRODUCT = np.dtype(
    [
        ("x", "i8"),
        ("packed", "i8"),  # space for x in tiles
        ("line", "i8"),  # bytes of a block's weights of one input, float32 or bfloat16
        ("weight", "i8"),  # laid out
        ("out", "i8"),
        ("rows", "i8"),
        ("width", "i8"),  # inputs
        ("blocks", "i8"),  # of outputs
        ("tiles", "i8"),  # int64 0: tiles that are taken to be packed
        ("taken", "i8"),  # int64 0: what is taken
        *MEETING,
    ]
)
"""One product of plain matrices."""

NARROW = np.dtype(
    [
        ("bits", "i8"),  # 4 or 8; 0: there is none
        ("codes", "i8"),  # as are the next two, of a Narrow
        ("scales", "i8"),
        ("offsets", "i8"),
    ]
)
"""Weights in few bits."""

LINEAR = np.dtype(
    [
        ("line", "i8"),  # bytes of a block's weights of one input, float32 or bfloat16
        ("weight", "i8"),  # [blocks, width + rank, OUTPUTS], base and B; of a rounded base B alone
        ("rounded", "i8"),  # the base (Rounded); 0 for none
        ("blocks", "i8"),
        ("width", "i8"),  # inputs
        ("rank", "i8"),  # of the adapters
        ("down", "i8"),  # [down_blocks, width, 16], A, float32
        ("down_blocks", "i8"),
        ("narrow", NARROW),  # the base
    ]
)
"""A fused linear layer."""

STRIPS = np.dtype(
    [
        ("k", "i8"),  # [strips, Hkv, places / 16, D, 16], float32 or int16
        ("v", "i8"),  # [strips, Hkv, D / 16, places, 16]
        ("k_scales", "i8"),  # [strips, Hkv, places]; 0 where both are float32
        ("v_scales", "i8"),
        ("places", "i8"),  # of tokens, a multiple of 16
    ]
)
"""A layer's part of a BlockedCache: prompts, or what rows have behind them."""

LAYER = np.dtype(
    [
        ("input_norm", "i8"),
        ("qkv", LINEAR),
        ("bias", "i8"),  # of qkv
        ("output", LINEAR),
        ("mlp_norm", "i8"),
        ("gate_up", LINEAR),
        ("down", LINEAR),
        ("prompt", STRIPS),
        ("own", STRIPS),
    ]
)
"""A decoder layer and its keys and values."""

ROWS = np.dtype([("at", "i8"), ("stride", "i8")])
"""Rows of values: the address, and values from a row to the next."""

STEP = np.dtype(
    [
        ("rows", "i8"),
        ("layers", "i8"),  # of LAYER records
        ("layer_count", "i8"),
        ("hidden", ROWS),  # the residual stream; in: the embedded tokens
        ("normed", ROWS),  # [rows, d + low]
        ("qkv", ROWS),
        ("mixed", ROWS),  # attention's result [rows, H D + low]
        ("gate_up", ROWS),
        ("gated", ROWS),  # [rows, m + low]
        ("packed", "i8"),  # what the next linear layer reads, in tiles
        ("change", ROWS),  # to be added to the residual stream
        ("logits", ROWS),
        ("width", "i8"),  # d
        ("inner", "i8"),  # m
        ("heads", "i8"),  # query heads of one KV head
        ("kv_heads", "i8"),
        ("head_width", "i8"),  # D
        ("eps", "f8"),
        ("scale", "f8"),
        ("cos", "i8"),  # [rows, D / 2]
        ("sin", "i8"),
        ("own", "i8"),  # int64 [rows] tokens in each strip before
        ("order", "i8"),  # int64 [rows] rows of a slot side by side
        ("chunks", "i8"),  # int64 [chunk_count, 3] slot, place in order, rows
        ("chunk_count", "i8"),
        ("prompts", "i8"),  # int64 [slots] tokens
        ("norm", "i8"),
        ("head", LINEAR),
        ("scratch", "i8"),  # of every thread
        ("scratch_size", "i8"),  # values
        (
            "kept",
            "i8",
        ),  # int64 [rows] where rows leave values (`decoder.traces`), 0 for nowhere; or 0
        ("kept_layer", "i8"),  # values from a layer's to the next layer's
        ("kept_rounded", "i8"),  # whether whole groups of them are rounded
        ("counts", "i8"),  # int64 zeros: what is taken of each phase
        ("entered", "i8"),  # int64 0: threads that have entered
        *MEETING,
    ]
)
"""One decode step."""

KEEPING = np.dtype(
    [
        ("rows", "i8"),
        ("key", ROWS),  # [N, Hkv D]
        ("value", ROWS),
        ("kv_heads", "i8"),
        ("head_width", "i8"),  # D
        ("sources", "i8"),  # int64 [rows] which of the N
        ("slots", "i8"),  # int64 [rows] the strip of each
        ("positions", "i8"),  # int64 [rows] its place there
        ("strips", STRIPS),
        ("taken", "i8"),  # int64 0: what is taken
    ]
)
"""Keys and values to be put into strips."""

FACTORS = np.dtype(
    [
        ("x", ROWS),
        ("weight", "i8"),  # not laid out
        ("half", "i8"),  # whether the weight is bfloat16
        ("rounded", "i8"),  # or laid out and rounded; then x is what was rounded of it
        ("output", "i8"),  # values from an output's weight to the next output's
        ("input", "i8"),  # values from an input's weight to the next input's
        ("width", "i8"),  # inputs; 0 for nothing
    ]
)
"""Rows x and a weight of any strides."""

LOW = np.dtype(
    [
        ("weight", "i8"),  # [blocks, width, 16]
        ("width", "i8"),  # inputs
        ("blocks", "i8"),  # 0 for nothing
        ("reads", "i8"),  # int64 [blocks, 2]: a block's first input that is not 0, and the one behind its last
        ("out", ROWS),  # space for whole blocks
        ("taken", "i8"),  # int64 0: what is taken
    ]
)
"""Few outputs of the rows x."""

ROUNDING = np.dtype(
    [
        ("rows", "i8"),
        ("x", ROWS),
        ("groups", "i8"),
        ("out", "i8"),  # int32 [rows, groups, GROUP_LINES]
        ("pitch", "i8"),  # bytes from a row to the next there
        ("taken", "i8"),  # int64 0: what is taken
    ]
)
"""Rows to be rounded."""

RESTORING = np.dtype(
    [
        ("rows", "i8"),
        ("places", "i8"),  # int64 [rows] the row that each is
        ("values", "i8"),  # of the first row
        ("pitch", "i8"),  # bytes from a row to the next
        ("pieces", "i8"),  # int64 [piece_count, 2]: values of a piece, whether they are rounded
        ("piece_count", "i8"),
        ("out", ROWS),  # the pieces' float32 values, one behind the other
        ("taken", "i8"),  # int64 0: what is taken
    ]
)
"""Rows of pieces to be copied, float32 again where they are rounded."""

SUM = np.dtype(
    [
        ("rows", "i8"),
        ("rounding", ROUNDING),  # of x, for a rounded weight
        ("first", FACTORS),
        ("low", LOW),  # reads what the first reads
        ("second", FACTORS),  # reads low
        ("spans", "i8"),  # int64 [blocks, 2]: the inputs of the second that a block of outputs reads
        ("outputs", "i8"),
        ("out", ROWS),  # space for whole blocks of outputs
        ("start", ROWS),  # to be added to; 0 for nothing
        ("share", "i8"),  # rows that a thread takes at a time, a multiple of a tile's
        ("taken", "i8"),  # int64 0: what is taken of the outputs
        ("scratch", "i8"),  # of every thread
        ("entered", "i8"),  # int64 0: threads that have entered
        *MEETING,
    ]
)
"""x W^T, and (x A^T) B^T added to it."""

OUTER = np.dtype(
    [
        ("factors", FACTORS),  # thin as x, and wide^T, float32, as the weight, whose inputs are the rows of both
        ("count", "i8"),  # columns of thin
        ("outputs", "i8"),  # columns of wide
        ("out", ROWS),  # [count, outputs], space for whole blocks
    ]
)
"""thin^T wide."""

OUTERS = np.dtype(
    [
        ("products", "i8"),  # of OUTER records
        ("items", "i8"),  # int64 [item_count, 2]: a product and a block of its columns
        ("item_count", "i8"),
        ("taken", "i8"),  # int64 0: what is taken
        ("scratch", "i8"),  # of every thread
        ("entered", "i8"),  # int64 0: threads that have entered
    ]
)
"""Several of them."""

SWEEP = np.dtype(
    [
        ("rows", "i8"),
        ("width", "i8"),
        ("x", ROWS),
        ("weight", "i8"),  # [width] of a norm
        ("eps", "f8"),
        ("gradient", ROWS),  # of what the forward made of x
        ("plus", ROWS),  # to be added to
        ("out", ROWS),
        ("again", ROWS),  # what the forward made of x
        ("labels", "i8"),  # int64 [rows]
        ("temperature", "f8"),
        ("logprob", "i8"),  # [rows]
        ("entropy", "i8"),  # [rows]
        ("slope", "i8"),  # whether x becomes the slope
        ("taken", "i8"),  # int64 0: what is taken
    ]
)
"""One pass over rows, each by itself."""

DRAW = np.dtype(
    [
        ("rows", "i8"),
        ("width", "i8"),
        ("x", ROWS),  # logits
        ("begins", "i8"),  # int64 [rows + 1]: the first draw from each row
        ("uniform", "i8"),  # float64 [draws]
        ("temperatures", "i8"),  # float64 [draws]; 0 for the likeliest token
        ("tokens", "i8"),  # int64 [draws]
        ("logprobs", "i8"),  # [draws]
        ("scratch", "i8"),  # of every thread: [width] and, float64, [bins]
        ("scratch_size", "i8"),  # values
        ("entered", "i8"),  # int64 0: threads that have entered
        ("taken", "i8"),  # int64 0: what is taken
    ]
)
"""Draws from the softmax of logits."""

ATTENTION = np.dtype(
    [
        ("segments", "i8"),  # int64 [segment_count, 5]: first token, tokens, keys before them, first parcel, parcels
        ("segment_count", "i8"),
        ("seen", "i8"),  # int64 [parcels] the token of each
        ("shared", "i8"),  # int64 [shared_count, 3]: a token, its first place, its parcels
        ("shared_count", "i8"),
        ("places", "i8"),  # int64 [parcels]: parcels, token by token
        ("heads", "i8"),  # query heads of one KV head
        ("kv_heads", "i8"),
        ("head_width", "i8"),  # D
        ("scale", "f8"),
        ("cos", "i8"),  # [N, D / 2]
        ("sin", "i8"),
        ("qkv", ROWS),  # before they are turned by their positions
        ("mixed", ROWS),  # attended values, or their gradient
        ("of_qkv", ROWS),  # the gradient of qkv
        ("parcels", "i8"),  # [parcels, Hkv, 2, D] gradients of keys and values from each segment that reads them
        ("keys", "i8"),  # of the longest segment, a multiple of 16
        ("scratch", "i8"),  # of every thread
        ("scratch_size", "i8"),  # values
        ("entered", "i8"),  # int64 0: threads that have entered
        ("taken", "i8"),  # int64 0: what is taken
    ]
)
"""Attention of prompts and of the segments behind them."""


def place(x: Tensor) -> dict[str, int]:
    """The fields of a ROWS record: rows of float32 values, however far from each other."""
    assert x.dtype == torch.float32, "native code reads float32"
    assert x.stride(-1) == 1, "native code reads rows"
    return {"at": x.data_ptr(), "stride": x.stride(0)}


def record(kind: np.dtype[Any], fields: Mapping[str, Any]) -> np.ndarray:
    """[1] record with the named fields, nested ones as mappings; what is not named is 0.

    >>> record(ROWS, {"at": 5, "stride": 2}).tolist()
    [(5, 2)]
    """
    return np.array([_values(kind, fields)], dtype=kind)


def _values(kind: np.dtype[Any], fields: Mapping[str, Any]) -> tuple[Any, ...]:
    assert kind.names is not None
    assert fields.keys() <= set(kind.names), "an unknown field"
    return tuple(
        fields.get(name, 0) if kind[name].names is None else _values(kind[name], fields.get(name, {}))
        for name in kind.names
    )
