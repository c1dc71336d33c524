"""Operations on many rows [N, ...] of float32 values, for training on a processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import OUTPUTS, PANEL, ROWS, whole_blocks
from greenloop.decoder.native.records import SUM, SWEEP, record
from greenloop.decoder.native.team import available, compiled, meeting, run

_SHARES = 8
"""Of a product, for each thread."""
_FEW = 96
"""Rows for which a part of a weight is laid out at least."""


def reads(weight: Tensor) -> bool:
    """Whether training can go through native code: float32 weights on a processor.

    Bfloat16 is left to those who multiply in it.
    """
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and available()


def multiply(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """x weight^T + plus, [N, out].

    Args:
        x: [N, in].
        weight: [out, in] float32 or bfloat16, of any strides: the transposed view of a weight is as good as the weight.
        plus: [N, out].
    """
    out, fields = _target(len(x), len(weight), plus)
    _add_products(x, {"whole": fields, "first": _factors(weight)})
    return out


def project(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, plus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x weight^T + low up^T + plus, [N, out], and low = x down^T, [N, rank].

    Args:
        x: [N, in].
        weight: [out, in], of any strides as are the next two.
        down: [rank, in].
        up: [out, rank].
        plus: [N, out].
    """
    out, fields = _target(len(x), len(weight), plus)
    low, low_fields = _target(len(x), len(down))
    space = _space(low)
    _add_products(
        x,
        {
            "whole": fields,
            "first": _factors(weight),
            "low": low_fields,
            "down": _factors(down),
            "second": {"x": place(low), **_factors(up), "packed": space.data_ptr()},
        },
    )
    return out, low


def _add_products(x: Tensor, fields: dict[str, Any]) -> None:
    """Call the code with a SUM record of these fields."""
    threads = torch.get_num_threads()
    state, scratch, space = np.zeros(6, dtype=np.int64), torch.empty(threads, PANEL * OUTPUTS), _space(x)
    entered, packed, whole, low, met = (state[number:].ctypes.data for number in (0, 1, 3, 4, 5))
    for name, taken in (("whole", whole), ("low", low)):
        fields[name] = {**fields.get(name, {}), "taken": taken}
    for name in ("first", "down"):
        fields[name] = {"x": place(x), **fields.get(name, {}), "packed": space.data_ptr()}
    one = record(
        SUM,
        {
            "rows": len(x),
            **fields,
            "scratch": scratch.data_ptr(),
            "entered": entered,
            "packed": packed,
            **meeting(met),
        },
    )
    run(compiled("rows_code").add_products.address, one.ctypes.data, threads)


def _target(rows: int, outputs: int, plus: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Space for a sum of products, and the fields of its TARGET record."""
    whole = whole_blocks(outputs)
    out = torch.empty(rows, whole)
    wanted = max(1, _SHARES * torch.get_num_threads() * OUTPUTS // whole)
    share = max(_FEW, -(-rows // wanted))
    fields = {"outputs": outputs, "out": place(out), "share": -(-share // ROWS) * ROWS}
    if plus is not None and whole > outputs:
        # Whole blocks of it are read.
        out[:, :outputs], plus = plus, out
    if plus is not None:
        fields["start"] = place(plus)
    return out[:, :outputs], fields


def _space(x: Tensor) -> Tensor:
    """For x in tiles."""
    return torch.empty(-(-len(x) // ROWS) * ROWS * x.shape[1])


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x [N, d]."""
    out = torch.empty(x.shape)
    _sweep("normalise", x, x.shape[1], weight=weight.data_ptr(), eps=eps, out=place(out))
    return out


def normed_back(x: Tensor, weight: Tensor, eps: float, gradient: Tensor, plus: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of x [N, d] again, and `plus` with the gradient of x from that of its norm."""
    again, out = torch.empty(x.shape), torch.empty(x.shape)
    places = {"gradient": place(gradient), "plus": place(plus), "out": place(out), "again": place(again)}
    _sweep("normalise_back", x, x.shape[1], weight=weight.data_ptr(), eps=eps, **places)
    return again, out


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up: [N, 2m] to [N, m]."""
    width = x.shape[1] // 2
    out = torch.empty(len(x), width)
    _sweep("gate", x, width, out=place(out))
    return out


def gated_back(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gated values of x [N, 2m] again, and the gradient of x from that of its gated values [N, m]."""
    width = x.shape[1] // 2
    out, again = torch.empty(x.shape), torch.empty(len(x), width)
    _sweep("gate_back", x, width, gradient=place(gradient), out=place(out), again=place(again))
    return again, out


def judged(logits: Tensor, labels: Tensor, temperature: float, *, slope: bool) -> tuple[Tensor, Tensor]:
    """Log-prob of the labels and entropy under softmax(logits / temperature), [N] nats each.

    Args:
        logits: [N, V]; what they are afterwards depends on `slope`.
        labels: [N] int64.
        temperature: of the sampling.
        slope: the logits become d log-prob / d logits.
    """
    rows, width = logits.shape
    logprob, entropy = torch.empty(rows), torch.empty(rows)
    places = {"logprob": logprob.data_ptr(), "entropy": entropy.data_ptr(), "labels": labels.data_ptr()}
    _sweep("judge_labels", logits, width, temperature=temperature, slope=int(slope), **places)
    return logprob, entropy


def _sweep(name: str, x: Tensor, width: int, **fields: Any) -> None:
    taken = np.zeros(1, dtype=np.int64)
    one = record(SWEEP, {"rows": len(x), "width": width, "x": place(x), "taken": taken.ctypes.data, **fields})
    run(getattr(compiled("rows_code"), name).address, one.ctypes.data, torch.get_num_threads())


def _factors(weight: Tensor) -> dict[str, Any]:
    """The weight's fields of a FACTORS record."""
    return {
        "weight": weight.data_ptr(),
        "half": int(weight.dtype == torch.bfloat16),
        "output": weight.stride(0),
        "input": weight.stride(1),
        "width": weight.shape[1],
    }


def place(x: Tensor) -> dict[str, int]:
    """The fields of a ROWS record: rows of float32 values, however far from each other."""
    assert x.dtype == torch.float32, "native code reads float32"
    assert x.stride(-1) == 1, "native code reads rows"
    return {"at": x.data_ptr(), "stride": x.stride(0)}
