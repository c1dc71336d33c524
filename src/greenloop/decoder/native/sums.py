"""Sums of products of many rows [N, ...] of float32 values, from the one copy of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import LANES, OUTPUTS, PANEL, ROWS, STRIP, blocks_of, whole_blocks
from greenloop.decoder.native.records import OUTER, OUTERS, SUM, place, record
from greenloop.decoder.native.rounded import Rounded, rounding, space_for
from greenloop.decoder.native.team import compiled, meeting, run

_SHARE = 480
"""Rows for which a part of a weight is laid out: what they read stays in a core's second cache, if it is narrow."""
_FEW = 96
"""The same where there would be too few shares for all threads."""
_SHARES = 2
"""Of a product, for each thread at least."""

Part = tuple[slice, slice]
"""Ranks of a `LowRank`, and the inputs that they read or the outputs that they write."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """A path x A^T B^T beside a weight, whose ranks may be for some of the inputs or of the outputs alone."""

    down: Tensor
    """[blocks, in, LANES]: A, laid out."""
    reads: np.ndarray
    """int64 [blocks, 2]: inputs that a block of A's outputs reads, from one to before another."""
    up: Tensor
    """[out, rank] of any strides: B."""
    spans: np.ndarray
    """int64 [blocks, 2]: ranks that a block of outputs reads."""

    @classmethod
    def of(cls, down: Tensor, up: Tensor, reading: Sequence[Part], writing: Sequence[Part]) -> LowRank:
        """With all that A and B hold beside `reading` and `writing` being 0.

        Args:
            down: [rank, in] of any strides.
            up: [out, rank], a view that follows what is written into it.
            reading: what A's ranks read.
            writing: what B's ranks write.
        """
        return cls(
            blocks_of(down.float(), LANES),
            _joined(reading, len(down), LANES),
            up,
            _joined([(outputs, ranks) for ranks, outputs in writing], len(up), OUTPUTS),
        )


def _joined(pairs: Sequence[Part], count: int, size: int) -> np.ndarray:
    """int64 [blocks, 2]: of each block of so many things the least range that all have that are paired with its own.

    >>> _joined([(slice(0, 8), slice(0, 3)), (slice(8, 24), slice(3, 5))], 24, 16).tolist()
    [[0, 5], [3, 5]]
    """
    found = []
    for begin in range(0, count, size):
        ranges = [other for one, other in pairs if one.start < begin + size and begin < one.stop]
        found.append((min((one.start for one in ranges), default=0), max((one.stop for one in ranges), default=0)))
    return np.array(found, dtype=np.int64)


def multiply(x: Tensor, weight: Tensor | Rounded, plus: Tensor | None = None) -> Tensor:
    """x weight^T + plus, [N, out].

    Args:
        x: [N, in].
        weight: [out, in] float32 or bfloat16, of any strides: the transposed view of a weight is as good as the weight.
            For one that is rounded x is rounded as well.
        plus: [N, out].
    """
    return _summed(x, weight, plus, {})


def project(x: Tensor, weight: Tensor | Rounded, path: LowRank, plus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x weight^T + low B^T + plus, [N, out], and low = x A^T, [N, rank].

    Args:
        x: [N, in].
        weight: as `multiply` takes it.
        path: A and B.
        plus: [N, out].
    """
    blocks, width, lanes = path.down.shape
    low, taken = torch.empty(len(x), blocks * lanes), np.zeros(1, dtype=np.int64)
    of_low = {
        "weight": path.down.data_ptr(),
        "width": width,
        "blocks": blocks,
        "reads": path.reads.ctypes.data,
        "out": place(low),
        "taken": taken.ctypes.data,
    }
    second = {"x": place(low), **_factors(path.up)}
    out = _summed(x, weight, plus, {"low": of_low, "second": second, "spans": path.spans.ctypes.data})
    return out, low[:, : path.up.shape[1]]


def _summed(x: Tensor, weight: Tensor | Rounded, plus: Tensor | None, fields: dict[str, Any]) -> Tensor:
    """Call the code with a SUM record of these fields and the first product's."""
    threads, rows = torch.get_num_threads(), len(x)
    outputs = weight.outputs if isinstance(weight, Rounded) else len(weight)
    whole = whole_blocks(outputs)
    out, scratch = torch.empty(rows, whole), torch.empty(threads, PANEL * OUTPUTS)
    wanted = -(-_SHARES * threads * OUTPUTS // whole)
    share = max(_FEW, min(_SHARE, -(-rows // wanted)))
    if plus is not None and whole > outputs:
        # Whole blocks of it are read.
        out[:, :outputs], plus = plus, out
    state = np.zeros(4, dtype=np.int64)
    entered, taken, met, rounds = (state[number:].ctypes.data for number in range(4))
    if isinstance(weight, Rounded):
        space = space_for(x)
        fields = fields | {"rounding": rounding(x, space, rounds)}
        first = {"weight": weight.blocks.data_ptr(), "rounded": 1, "width": weight.inputs}
    else:
        first = _factors(weight)
    one = record(
        SUM,
        {
            "rows": rows,
            "first": {"x": place(x), **first},
            **fields,
            "outputs": outputs,
            "out": place(out),
            "start": {} if plus is None else place(plus),
            "share": -(-share // ROWS) * ROWS,
            "taken": taken,
            "scratch": scratch.data_ptr(),
            "entered": entered,
            **meeting(met),
        },
    )
    run(compiled("sums_code").add_products.address, one.ctypes.data, threads)
    return out[:, :outputs]


def outer(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """thin^T wide, [n, w], for each pair of [N, n] and [N, w]."""
    threads = torch.get_num_threads()
    outs, items, records = [], [], []
    for number, (thin, wide) in enumerate(pairs):
        width = wide.shape[1]
        whole = whole_blocks(width)
        out = torch.empty(thin.shape[1], whole)
        outs.append(out[:, :width])
        factors = {"x": place(thin), **_factors(wide.T)}
        records.append(record(OUTER, {"factors": factors, "count": thin.shape[1], "outputs": width, "out": place(out)}))
        items += [(number, block) for block in range(whole // OUTPUTS)]
    products, shared = np.concatenate(records), np.array(items, dtype=np.int64)
    state, scratch = np.zeros(2, dtype=np.int64), torch.empty(threads, STRIP * OUTPUTS)
    one = record(
        OUTERS,
        {
            "products": products.ctypes.data,
            "items": shared.ctypes.data,
            "item_count": len(items),
            "taken": state.ctypes.data,
            "scratch": scratch.data_ptr(),
            "entered": state[1:].ctypes.data,
        },
    )
    run(compiled("sums_code").multiply_outer.address, one.ctypes.data, threads)
    return outs


def _factors(weight: Tensor) -> dict[str, Any]:
    """The weight's fields of a FACTORS record."""
    return {
        "weight": weight.data_ptr(),
        "half": int(weight.dtype == torch.bfloat16),
        "output": weight.stride(0),
        "input": weight.stride(1),
        "width": weight.shape[1],
    }
