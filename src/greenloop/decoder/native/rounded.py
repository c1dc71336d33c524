"""Weights rounded to 14 bits with a scale for 32 inputs, for products that a processor makes faster of integers.

A product of rounded rows and rounded weights adds integers up within a group, exactly, and float32 values from group to
group: block floating point, as in Rouhani et al., "Pushing the Limits of Narrow Precision Inferencing at Cloud Scale
with Microsoft Floating Point", 2020, section 3, where it has fewer bits. Its error is that of 14 bits beside a group's
largest value, a tenth of what bfloat16 makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import GROUP, blocks_of, rounded_size
from greenloop.decoder.native.records import RESTORING, ROUNDING, place, record
from greenloop.decoder.native.team import available, compiled, run

_ROWS = 4096
"""Outputs of a weight that are rounded together: what lies otherwise is copied for it."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight [outputs, inputs]."""

    blocks: Tensor
    """int32 [blocks, groups * GROUP_LINES, OUTPUTS]: of each group 16 lines of two codes, and one of float32 scales."""
    outputs: int
    inputs: int

    @classmethod
    def of(cls, weight: Tensor) -> Rounded | None:
        """Of a float32 weight [out, in] of any strides; None where its inputs make no whole groups."""
        outputs, inputs = weight.shape
        if inputs % GROUP:
            return None
        rows = torch.cat([rounded(part.contiguous()) for part in weight.split(_ROWS)])
        return cls(blocks_of(rows), outputs, inputs)


def rounds() -> bool:
    """Whether products of float32 may be made of rounded values, and are made faster so.

    They may where `torch.set_float32_matmul_precision` has allowed it ("high" or "medium").
    """
    if torch.get_float32_matmul_precision() == "highest" or not available():
        return False
    from greenloop.decoder.native.rounded_tile import multiplies_pairs

    return multiplies_pairs()


def rounded(x: Tensor, out: Tensor | None = None) -> Tensor:
    """[N, groups * GROUP_LINES], four bytes each: each group's codes, two and two, and its float32 scale.

    Args:
        x: [N, in] float32, whole groups.
        out: where to put them.
    """
    out, taken = space_for(x) if out is None else out, np.zeros(1, dtype=np.int64)
    one = record(ROUNDING, rounding(x, out, taken.ctypes.data))
    run(compiled("sums_code").round_rows.address, one.ctypes.data, torch.get_num_threads())
    return out


def restored(values: Tensor, places: Tensor, pieces: Sequence[tuple[int, bool]], out: Tensor) -> None:
    """Put into `out` [n, sum of the pieces' values] the rows of `values` at [n] places.

    Args:
        values: [N, ...] float32 rows of pieces, some of them rounded.
        places: int64 [n].
        pieces: how many values each has, and whether they are rounded.
        out: float32.
    """
    each, taken = np.array(pieces, dtype=np.int64), np.zeros(1, dtype=np.int64)
    fields = {
        "rows": len(places),
        "places": places.data_ptr(),
        "values": values.data_ptr(),
        "pitch": values.stride(0) * values.element_size(),
        "pieces": each.ctypes.data,
        "piece_count": len(pieces),
        "out": place(out),
        "taken": taken.ctypes.data,
    }
    one = record(RESTORING, fields)
    run(compiled("sums_code").restore_rows.address, one.ctypes.data, torch.get_num_threads())


def space_for(x: Tensor) -> Tensor:
    """For rows [N, in] when they are rounded."""
    return torch.empty(len(x), rounded_size(x.shape[1]), dtype=torch.int32)


def rounding(x: Tensor, out: Tensor, taken: int) -> dict[str, object]:
    """The fields of a ROUNDING record; `taken` is the address of an int64 0."""
    to = {"out": out.data_ptr(), "pitch": out.stride(0) * out.element_size(), "taken": taken}
    return {"rows": len(x), "x": place(x), "groups": x.shape[1] // GROUP, **to}
